"""AnyFlow's causal video part: flow maps of chunks given their past, and DMD2's backward simulation of such students.

The exact map of every chunk of an AR(1) video is known. A tiny real Wan, in float64, shows what reaches its weights.
"""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ar1_streaming import backbone, batch_of
from test_causal_objectives import videos
from test_streaming import batch, conditioning, policy, wan
from test_streaming_training import recipe
from test_two_time import fill_inputs
from tiny_wan import tiny_wan
from torch import Tensor

from fastgen.backbones import ar1_formulas as f
from fastgen.backbones.ar1_denoisers import frames_of, past_frames, remember
from fastgen.backbones.ar1_law import AR1Law, to_complex, to_latents
from fastgen.batch import Batch, Conditioning, Draws
from fastgen.data import AR1Data
from fastgen.denoiser import Denoiser, Inputs
from fastgen.flow.time_pairs import TimePairs
from fastgen.networks import Networks
from fastgen.objectives import DMD2, AnyFlow
from fastgen.objectives.flow_map import GapTurn, OnPolicy
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy, backward_simulation, sample
from fastgen.schedule import FlowSchedule, TimeSampler, expand
from fastgen.streaming.context import Context
from fastgen.streaming.schedule import ChunkSchedule

JUMPS = RolloutPolicy((1.0, 0.7, 0.3), "ode", two_time=True, chunks=ChunkSchedule(frames=1, window=2))
TURN = GapTurn("student", ("student",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan(tmp_path_factory.mktemp("wan"), layers=2)


class ExactChunkMap(Denoiser):
    """The flow map of each frame of an AR(1) video given the one before it (F3), to the level that it is told; at its
    own level, the velocity. off: an error of the map. calls: the levels and ends, call by call."""

    takes_chunks = True

    def __init__(self, law: AR1Law, off: float = 0.0):
        super().__init__(torch.nn.Identity(), FlowSchedule(), "flow_prediction")
        self.law, self.off = law, torch.nn.Parameter(torch.tensor(off, dtype=torch.float64))
        self.calls: list[tuple[float, float]] = []

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        assert inputs.s is not None
        remember(inputs, x_t)
        if inputs.causal is None:
            self.calls.append((float(t[0]), float(inputs.s[0])))
            return self.velocity(x_t, t, inputs.s, past_frames(inputs.context, x_t))
        assert inputs.clean is not None
        parts = []
        for chunk in inputs.causal.split(x_t.shape[1]):
            own, past = slice(chunk.start, chunk.stop), frames_of(inputs.causal.past(chunk))
            parts.append(
                self.velocity(x_t[:, own], t[:, chunk.start], inputs.s[:, chunk.start], inputs.clean[:, past])
            )
        return torch.cat(parts, dim=1)

    def velocity(self, x: Tensor, t: Tensor, s: Tensor, past: Tensor) -> Tensor:
        rho, variance = self.law.rhos[0], f.innovation(self.law.rhos[0])
        mean = torch.zeros_like(x)
        if past.shape[1]:
            mean = to_latents(rho * to_complex(past[:, -1:]), x)
        else:
            variance = 1.0
        t, s = expand(t, x), expand(s, x)
        from_variance, to_variance = ((1 - v) ** 2 * variance + v**2 for v in (t, s))
        ended = (1 - s) * mean + (to_variance / from_variance).sqrt() * (x - (1 - t) * mean)
        denoised = mean + (1 - t) * variance / from_variance * (x - (1 - t) * mean)
        return self.off * x + torch.where(t > s, (x - ended) / (t - s).clamp_min(1e-9), (x - denoised) / t)

    @property
    def time_embedding(self) -> torch.nn.Module:
        return self.network


def exact(off: float = 0.0, policy: RolloutPolicy = JUMPS) -> tuple[Networks, Batch]:
    made = backbone(torch.float64, copies=4, num_frames=4, means=(0.0,))
    student = ExactChunkMap(made.law, off)
    return Networks({"student": student, "teacher": made.load("teacher")}, policy), batch_of(made, 64, 0, AR1Data())


def recursion(networks: Networks, data: Batch) -> Tensor:
    """The videos that the exact maps make of the noise: z_1 = e_1, z_{k+1} = rho z_k + s e_{k+1}."""
    student: Any = networks.student
    rho = student.law.rhos[0]
    noise = to_complex(data.chunk(range(data.latent_shape[0])).normal("initial"))
    frames = [noise[:, 0]]
    for k in range(1, noise.shape[1]):
        frames.append(rho * frames[-1] + math.sqrt(f.innovation(rho)) * noise[:, k])
    return to_latents(torch.stack(frames, dim=1), data.latents)  # type: ignore[arg-type]


@pytest.mark.parametrize("causal", ["packed", "chunks"])
@pytest.mark.parametrize(("form", "derivative"), [("semigradient", "jvp"), ("progressive", "difference")])
def test_the_exact_map_of_the_chunks_satisfies_the_identities(form: Any, derivative: Any, causal: Any) -> None:
    """Without error, and with an error that grows with that of the map. (Below 1e-3 velocities are those of 1e-3.)"""
    pairs = TimePairs(TimeSampler(low=0.05, high=1.0), diagonal=0.5)
    objective = AnyFlow(form=form, derivative=derivative, causal=causal, pairs=pairs)
    found = []
    for off in (0.0, 0.01):
        networks, data = exact(off)
        with torch.no_grad():
            residual, on_diagonal = objective.residuals(networks, data, 1.0)
        found.append(residual[~on_diagonal].abs().max().item())
    print(f"{form}, {causal}: {found}")
    assert found[0] < 1e-9 and found[1] > 1e-3


def test_the_target_of_the_mean_flow_form_is_the_exact_map_in_the_mean() -> None:
    """Its residual is the noise of single samples: it is unrelated to what the map is told, within 4 standard errors,
    which it is not for a wrong map."""
    objective = AnyFlow()
    for off, right in ((0.0, True), (0.3, False)):
        networks, data = exact(off)
        with torch.no_grad():
            residual, on_diagonal = objective.residuals(networks, data, 1.0)
            t, _ = objective.pairs(data)
            x = networks.student.schedule.add_noise(data.latents, data.normal("noise"), t)  # type: ignore[arg-type]
        for rows in (on_diagonal, ~on_diagonal):
            products = (residual * x)[rows].flatten()
            z = products.mean() / (products.std() / math.sqrt(len(products)))
            print(f"off {off}: {z:.2f} standard errors")
            assert (abs(z) < 4) == right


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_jumps_count_as_much_as_the_diagonal(power: float) -> None:
    """Squares 1 and 9 on the diagonal, 20 and 45 off it: with power 1 the loss of each jump is the diagonal's mean, 5,
    and its gradient that of 5 / 20 or 5 / 45 times its square."""
    residual = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 4.0], [6.0, 3.0]], requires_grad=True)
    on_diagonal = torch.tensor([True, True, False, False])
    loss = AnyFlow(power=power, floor=1e-12).reduced(residual, on_diagonal)
    loss.backward()
    weight = torch.tensor([1.0, 1.0, 5 / 20, 5 / 45]) if power else torch.ones(4)
    assert float(loss) == pytest.approx(5.0 if power else 75 / 4, rel=1e-6)
    assert residual.grad is not None and torch.allclose(residual.grad, weight[:, None] * residual.detach() / 2)
    alone = AnyFlow(power=power).reduced(residual[2:], on_diagonal[2:])
    assert float(alone) == pytest.approx(65 / 2, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_rollout_jumps_chunk_by_chunk(steps: int) -> None:
    """The exact maps give the exact videos, whatever the jumps are, and every chunk makes the same jumps. Contexts
    carry no gradient: the error's derivative is that of each frame given its past."""
    networks, data = exact()
    x = AnyFlow().rollout(networks, data, OnPolicy(steps=(steps,)))
    assert torch.allclose(x, recursion(networks, data), atol=1e-12)
    calls = [call for call in networks.student.calls if call[0]]  # type: ignore[operator,union-attr]
    jumps = len(calls) // 4
    assert calls == 4 * calls[:jumps] and calls[0][0] == 1 and calls[-1][1] == 0
    (grad,) = torch.autograd.grad(x[:, 3].sum(), networks.student.off)  # type: ignore[arg-type]

    def last(off: Tensor) -> Tensor:
        student: Any = networks.student
        y = data.chunk(range(3, 4)).normal("initial")
        for start, end in calls[:jumps]:
            t, s = (torch.full((len(y),), v, dtype=y.dtype) for v in (start, end))
            y = y - (start - end) * (student.velocity(y, t, s, x[:, 2:3].detach()) + (off - student.off.detach()) * y)
        return y.sum()

    expected = torch.autograd.functional.jacobian(last, networks.student.off.detach())  # type: ignore[arg-type]
    assert torch.allclose(grad, expected, rtol=1e-9)


@pytest.mark.parametrize("stop", range(3))
def test_backward_simulation_of_a_two_time_student_jumps_to_its_stop_and_to_zero(stop: int) -> None:
    """DMD2 on chunks with two_time: every stop gives the exact videos, as the sampler does."""
    networks, data = exact()
    wanted = recursion(networks, data)
    rollout = backward_simulation(networks.student, JUMPS, data, torch.full_like(data.ids, stop))
    assert torch.allclose(rollout.x, wanted, atol=1e-12)
    levels = (1.0, 0.7, 0.3)
    calls = [call for call in networks.student.calls if call[0]]  # type: ignore[operator,union-attr]
    assert calls[: stop + 1] == [*itertools.pairwise(levels[: stop + 1]), (levels[stop], 0.0)]
    draws = Draws(data.ids, data.latent_shape, data.key, data.dtype).chunk(range(4))
    made = sample(networks.student, JUMPS, data.cond, draws)
    assert torch.allclose(made, wanted, atol=1e-12)


# --- a real network


def student() -> Denoiser:
    network = wan()
    network.add_inputs({}, network.feature_dim, ("s",))
    return fill_inputs(network.double())


def loss_and_gradient(objective: AnyFlow, sampler: RolloutPolicy, data: Batch) -> tuple[Tensor, list[Tensor]]:
    objective.check(sampler)
    network = student()
    loss = objective.loss(TURN, Networks({"student": network, "teacher": network}, sampler), data, {})
    loss.total.backward()
    return loss.total.detach(), [p.grad for p in network.parameters() if p.grad is not None]


def two_times(chunks: ChunkSchedule) -> RolloutPolicy:
    return policy(chunks, 1.0, 0.6, transition="ode", two_time=True)


@pytest.mark.parametrize("form", ["mean_flow", "progressive"])
def test_both_ways_through_the_chunks_are_the_same_loss(form: Any) -> None:
    """In one masked call, where clean frames are told what a commit tells them, and chunk by chunk."""
    data, sampler = videos(6), two_times(ChunkSchedule(frames=2, window=4, context_noise=0.1))
    packed, grads = loss_and_gradient(AnyFlow(form=form), sampler, data)
    chunks, other = loss_and_gradient(AnyFlow(form=form, causal="chunks"), sampler, data)
    scale = max(g.abs().max().item() for g in grads)
    error = max((a - b).abs().max().item() for a, b in zip(grads, other, strict=True)) / scale
    print(f"{form}: loss {packed:.8f}, {chunks:.8f}; gradient {error:.1e}")
    # the differences of mean_flow divide the kernels' rounding by 2 * 5e-3
    assert chunks.item() == pytest.approx(packed.item(), rel=1e-5) and error < 1e-4


def test_later_frames_move_no_earlier_residual() -> None:
    """Other data in the last chunk, to the bit."""
    objective, sampler, data = AnyFlow(), two_times(ChunkSchedule(frames=2)), videos(6)
    assert data.latents is not None
    later = data.latents.clone()
    later[:, 4:] += 1
    network, found = student(), []
    for latents in (data.latents, later):
        own = dataclasses.replace(data, latents=latents)
        with torch.no_grad():
            found.append(objective.residuals(Networks({"student": network}, sampler), own, 1.0)[0])
    assert torch.equal(found[0][:, :4], found[1][:, :4]) and not torch.equal(found[0], found[1])


def test_dmd2_trains_a_two_time_student_on_chunks() -> None:
    """The gradient of its last step, and the same with replay."""
    gradients = []
    for replay in (False, True):
        sampler, network = two_times(ChunkSchedule(frames=2, replay=replay)), student()
        modules = {"student": network, "teacher": wan(seed=1), "fake_score": wan(seed=2)}
        loss = DMD2().student_loss(Networks(modules, sampler), batch(4))
        loss.total.backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    scale = max(g.abs().max().item() for g in gradients[0])
    assert scale > 0
    assert max((a - b).abs().max().item() for a, b in zip(*gradients, strict=True)) <= 1e-10 * scale


def test_a_context_is_told_that_its_jump_ends_at_zero() -> None:
    network, chunks = student().requires_grad_(False), ChunkSchedule(frames=2)
    context, zero = Context(chunks), torch.zeros(2, dtype=torch.float64)
    network.commit(videos(2).latents, zero, conditioning(), context, Inputs(s=zero))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes the extra inputs"):
        network.commit(videos(2).latents, zero, conditioning(), context)  # type: ignore[arg-type]


# --- refusals


@pytest.mark.parametrize(
    ("objective", "rollout", "words"),
    [
        ({}, {"chunks": {"frames": 1, "replay": True}}, "three: leave it out"),
        ({}, {"chunks": {"frames": 1, "order": "step"}}, "leave order out in this stage"),
        ({}, {}, "give rollout.chunks, or use flow_map"),
        ({}, {"two_time": False, "chunks": {"frames": 1}}, "set rollout.two_time: true"),
        ({"guidance_scale": 3.0}, {"chunks": {"frames": 1}}, "without guidance"),
        ({"teach": "teacher"}, {"chunks": {"frames": 1}}, "teach"),
        ({"form": "lagrangian"}, {"chunks": {"frames": 1}}, "form"),
    ],
)
def test_what_cannot_be_is_refused(
    objective: dict[str, Any],
    rollout: dict[str, Any],
    words: str,
    folder: Path,
    tmp_path: Path,
) -> None:
    changes: dict[str, Any] = {"data": {"name": "moving_digits", "videos": 4}, "optimizers": {"student": {"lr": 1e-3}}}
    changes["rollout"] = {"timesteps": [1.0, 0.6], "transition": "ode", "two_time": True, **rollout}
    with pytest.raises(RecipeError, match=words):
        recipe(folder, tmp_path / "run", {"name": "any_flow", **objective}, **changes)
