"""Step-first videos (`chunks.order: step`) on tiny real Wan networks in float64."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_streaming import POLICIES, batch, conditioning, draws, gradients, policy, wan
from torch import Tensor

from fastgen.backbones.wan import WanDenoiser
from fastgen.batch import Draws
from fastgen.denoiser import Denoiser, Inputs
from fastgen.modules.experts import Experts
from fastgen.objectives import Consistency, ODERegression, TeacherForcing
from fastgen.rollout import RolloutPolicy, backward_simulation, sample, sample_chunks, step_to
from fastgen.streaming.context import Context
from fastgen.streaming.schedule import ChunkSchedule

LEVELS = (1.0, 0.8, 0.5)
FRAMES, CHUNKS = 8, 4
SCHEDULES = ["whole past", "window", "EMA sink", "context noise", "slow memory"]
# the passes differ in which frames they keep, and so do the samples
SLOW = ChunkSchedule(frames=2, window=4, sink=1, slow=1, slow_similarity=0.8)
POLICIES = POLICIES | {"slow memory": SLOW}


@pytest.fixture(scope="module")
def network() -> WanDenoiser:
    return wan().requires_grad_(False)


def step_first(name: str, *levels: float, **options: Any) -> RolloutPolicy:
    return policy(dataclasses.replace(POLICIES[name], order="step"), *(levels or LEVELS), **options)


def visited(
    networks: Denoiser | list[Denoiser],
    sampler: RolloutPolicy,
    noise: Draws,
    order: Iterable[tuple[int, int]],
) -> tuple[Tensor, list[Tensor]]:
    """The video, and the clean predictions of every pass, by the definition: step s of chunk b, visited in this order,
    with a context of its own for each step."""
    assert sampler.chunks is not None
    chunks, levels = sampler.chunks.split(FRAMES), (*sampler.timesteps, 0.0)
    steps = sampler.num_steps
    network = networks if isinstance(networks, list) else [networks] * steps
    cond, contexts = conditioning(), [Context(sampler.chunks)] * steps
    states = {b: noise.chunk(frames)("initial") for b, frames in enumerate(chunks)}
    predictions: list[dict[int, Tensor]] = [{} for _ in range(steps)]
    for b, s in order:
        own, x_t = noise.chunk(chunks[b]), states[b]
        t, t_next = (torch.full((len(x_t),), levels[i], dtype=torch.float64) for i in (s, s + 1))
        x0 = network[s](x_t, t, cond, Inputs(context=contexts[s]))
        predictions[s][b] = states[b] = x0
        seen, level = x0, torch.full_like(t, sampler.chunks.context_noise)
        if s + 1 < steps:
            draw = f"step{s + 1}"
            seen, level = step_to(network[s].schedule, sampler, x0, x_t, t, t_next, lambda: own(draw)), t_next  # noqa: B023
            states[b] = seen
        elif sampler.chunks.context_noise:
            seen = network[s].schedule.add_noise(x0, own("context"), level)
        contexts[s] = network[s].commit(seen, level, cond, contexts[s])
    video = torch.cat([states[b] for b in range(len(chunks))], dim=1)
    return video, [torch.cat([made[b] for b in range(len(chunks))], dim=1) for made in predictions]


def sequential(steps: int) -> list[tuple[int, int]]:
    """One pass after the other."""
    return [(b, s) for s in range(steps) for b in range(CHUNKS)]


def pipelined(steps: int) -> list[tuple[int, int]]:
    """Diagonal after diagonal: step s of chunk b on diagonal b + s, the later steps first."""
    return [(d - s, s) for d in range(CHUNKS + steps - 1) for s in reversed(range(steps)) if 0 <= d - s < CHUNKS]


@pytest.mark.parametrize(("name", "transition"), [*((name, "renoise") for name in SCHEDULES), ("window", "ode")])
def test_the_sampler_is_one_pass_after_the_other_and_any_diagonal(
    name: str, transition: Any, network: WanDenoiser
) -> None:
    sampler = step_first(name, transition=transition)
    made = sample(network, sampler, conditioning(), draws(FRAMES))
    for order in (sequential(3), pipelined(3)):
        assert sorted(order) == [(b, s) for b in range(CHUNKS) for s in range(3)]
        assert torch.equal(visited(network, sampler, draws(FRAMES), order)[0], made)
    chunk_first = policy(POLICIES[name], *LEVELS, transition=transition)
    assert (sample(network, chunk_first, conditioning(), draws(FRAMES)) - made).abs().max() > 1e-3


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_step_is_the_same_in_both_orders(name: str, network: WanDenoiser) -> None:
    """Sampling, training and its gradient, to the bit."""
    both = [policy(POLICIES[name], 1.0), step_first(name, 1.0)]
    one, other = (sample(network, sampler, conditioning(), draws(FRAMES)) for sampler in both)
    assert torch.equal(one, other)
    part, student = batch(FRAMES), wan()
    rollouts = [backward_simulation(student, sampler, part, torch.zeros_like(part.ids)) for sampler in both]
    assert torch.equal(rollouts[0].x, rollouts[1].x)
    grads = [torch.autograd.grad(rollout.x.square().mean(), list(student.parameters())) for rollout in rollouts]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_rollout_stops_in_a_pass_of_the_sampler(name: str, network: WanDenoiser) -> None:
    """A shared stop k gives the predictions of the sampler's pass k, to the bit; the last one is the sample."""
    sampler, part = step_first(name), batch(FRAMES)
    noise = Draws(part.ids, part.latent_shape, part.key, torch.float64)
    _, passes = visited(network, sampler, noise, sequential(3))
    for k in range(3):
        rollout = backward_simulation(network, sampler, part, torch.full_like(part.ids, k), grad=False)
        assert torch.equal(rollout.x, passes[k])


@pytest.mark.parametrize("name", ["EMA sink", "slow memory"])
def test_per_sample_stops_are_those_of_samples_alone(name: str, network: WanDenoiser) -> None:
    sampler, part, stop = step_first(name), batch(FRAMES, rows=4), torch.tensor([2, 0, 1, 0])
    mixed = backward_simulation(network, sampler, part, stop, grad=False)
    for i in range(4):
        rows = slice(i, i + 1)
        conds = {"cond": part.cond.select(rows), "uncond": part.uncond.select(rows)}
        alone = dataclasses.replace(part, ids=part.ids[rows], **conds)
        single = backward_simulation(network, sampler, alone, stop[rows], grad=False)
        assert torch.allclose(single.x[0], mixed.x[i], atol=1e-6)


@pytest.mark.parametrize("name", ["EMA sink", "context noise"])
def test_replay_gives_the_gradient_of_the_whole_graph(name: str) -> None:
    student = wan()
    whole = gradients(student, step_first(name, 1.0, 0.7, 0.4), FRAMES, to=0.2)
    part, chunks = batch(FRAMES), dataclasses.replace(POLICIES[name], order="step", replay=True)
    level = torch.full((2,), 0.2, dtype=torch.float64)
    rollout = backward_simulation(student, policy(chunks, 1.0, 0.7, 0.4), part, torch.ones_like(part.ids), to=level)
    (rollout.x * draws(FRAMES)("weight")).sum().backward()
    for parameter, expected in zip(student.parameters(), whole, strict=True):
        assert parameter.grad is not None
        assert (parameter.grad - expected).abs().max() <= 1e-10 * expected.abs().max().clamp_min(1e-12)


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_later_noise_moves_no_earlier_chunk(stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the frames before chunk j nor the gradient of their loss change with the noise of chunk j."""
    student, sampler, part = wan(), step_first("window"), batch(FRAMES)

    def run() -> tuple[Tensor, list[Tensor]]:
        rollout = backward_simulation(student, sampler, part, torch.full_like(part.ids, stop))
        grads = torch.autograd.grad(rollout.x[:, :4].square().mean(), list(student.parameters()), allow_unused=True)
        return rollout.x.detach(), [g for g in grads if g is not None]

    x, grads = run()
    plain = Draws.__call__
    later = lambda self: self.frames is not None and self.frames.start >= 4  # noqa: E731
    monkeypatch.setattr(Draws, "__call__", lambda self, name: plain(self, name) + (1.0 if later(self) else 0.0))
    other, other_grads = run()
    assert torch.equal(x[:, :4], other[:, :4]) and not torch.equal(x[:, 4:], other[:, 4:])
    assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True))


def test_experts_pass_by_pass() -> None:
    """Each pass has the context of the expert that runs it."""
    high, low = wan(seed=1), wan(seed=2)
    both = Experts([high, low], (0.9,)).requires_grad_(False)
    sampler = step_first("window")
    expected, _ = visited([high, low, low], sampler, draws(FRAMES), sequential(3))
    assert torch.allclose(sample(both, sampler, conditioning(), draws(FRAMES)), expected, atol=1e-10)


def test_the_memory_is_that_of_one_context_per_step(network: WanDenoiser) -> None:
    def sizes(sampler: RolloutPolicy) -> list[int]:
        clips = sample_chunks(network, sampler, conditioning(), draws(1))
        return [next(clips).context.nbytes for _ in range(8)]

    one, three = sizes(policy(POLICIES["sink"], *LEVELS)), sizes(step_first("sink"))
    assert three == [3 * size for size in one] and three[5] == three[-1] > 0
    assert step_first("sink").context_levels == (0.8, 0.5, 0.0)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValidationError, match="all have the same levels: leave out first_timesteps"):
        ChunkSchedule(order="step", first_timesteps=(1.0, 0.5))
    consistency: Any = {"teach": "data", "grid": {"count": 8}}
    for objective in (TeacherForcing(), ODERegression(), Consistency(**consistency)):
        with pytest.raises(ValueError, match="leave order out in this stage"):
            objective.check(step_first("window"))
    TeacherForcing(past="noisy").check(step_first("window"))
