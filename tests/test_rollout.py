"""The few-step sampler and its truncated gradient: how often the student runs, where gradient goes, and the law of
what comes out."""

import dataclasses
import math

import pytest
import torch
from oracles import GaussianMap, Recorder, point_batch
from torch import Tensor, nn

from fastgen.batch import Batch, Conditioning
from fastgen.denoiser import Denoiser, Inputs
from fastgen.rollout import RolloutPolicy, backward_simulation, draw_stops, predict_x0, sample, transition
from fastgen.schedule import FlowSchedule, Schedule

TIMES = (1.0, 0.75, 0.5, 0.25)


class SmallStudent(Denoiser):
    """A small real network, which keeps the timesteps its time embedder would be given."""

    def __init__(self, dim: int = 2):
        generator = torch.Generator().manual_seed(0)
        network = nn.Sequential(nn.Linear(dim + 2, 16), nn.Tanh(), nn.Linear(16, dim)).double()
        with torch.no_grad():
            for p in network.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 3)
        super().__init__(network, FlowSchedule(), "flow_prediction")
        self.told: list[Tensor] = []

    @property
    def time_embedding(self) -> nn.Module:
        return self.network

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        self.told.append(self.timestep(t, inputs))
        scalars = torch.stack([self.told[-1] / 1000, cond["label"].to(x_t.dtype)], dim=1)
        return self.network(torch.cat([x_t, scalars], dim=1))


def rows(student: Recorder) -> list[int]:
    """How many samples each call had."""
    return [len(call.x_t) for call in student.calls]


def full(batch: Batch, stop: int) -> Tensor:
    return torch.full_like(batch.ids, stop)


@pytest.mark.parametrize("step", ["renoise", "ode"])
@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_stop_k_calls_the_student_k_times_without_gradient_and_once_with(step: str, stop: int) -> None:
    student, batch = Recorder(SmallStudent()), point_batch(6)
    policy = RolloutPolicy(TIMES, step)
    rollout = backward_simulation(student, policy, batch, full(batch, stop))
    assert rows(student) == [6] * (stop + 1)
    assert [call.grad for call in student.calls] == [False] * stop + [True]
    assert [t[0].item() for t in student.denoiser.told] == [1000 * t for t in TIMES[: stop + 1]]  # type: ignore[union-attr]
    assert rollout.x.requires_grad and (rollout.s == 0).all() and torch.equal(rollout.stop, full(batch, stop))
    (executed,) = rollout.steps
    assert executed.x0 is rollout.x and not executed.x_t.requires_grad


def test_without_gradient_nothing_is_recorded() -> None:
    """The fake score's turn: grad=False leaves no graph, and the same numbers."""
    student, batch = Recorder(SmallStudent()), point_batch(6)
    stop, policy = torch.tensor([0, 3, 1, 2, 3, 0]), RolloutPolicy(TIMES)
    x = backward_simulation(student, policy, batch, stop, grad=False).x
    assert not any(call.grad for call in student.calls) and not x.requires_grad
    assert torch.equal(x, backward_simulation(student, policy, batch, stop).x)


def test_mixed_stops_cost_the_sum_of_active_rows() -> None:
    """Sample i costs stop[i] + 1 evaluations and no more: rows shrink as samples leave, and the last call holds all,
    each at its own level."""
    student, batch, stop = Recorder(SmallStudent()), point_batch(8), torch.tensor([0, 3, 1, 0, 3, 2, 0, 1])
    backward_simulation(student, RolloutPolicy(TIMES), batch, stop)
    assert rows(student) == [5, 3, 2, 8]
    assert sum(rows(student)) == (stop + 1).sum()
    assert torch.equal(student.calls[-1].t, torch.tensor(TIMES, dtype=torch.float64)[stop])


def by_hand(student: Denoiser, policy: RolloutPolicy, batch: Batch, row: int, stop: int) -> tuple[Tensor, Tensor]:
    """(input, prediction) of one sample at its stopping step, in plain formulas of flow matching."""
    cond = batch.cond.select(slice(row, row + 1))
    x = batch.normal("initial")[row : row + 1]
    for i in range(stop):
        t, t_next = policy.timesteps[i], policy.timesteps[i + 1]
        x0 = student(x, x.new_tensor([t]), cond).detach()
        noise = (
            batch.normal(f"step{i + 1}")[row : row + 1] if policy.transition == "renoise" else (x - (1 - t) * x0) / t
        )
        x = (1 - t_next) * x0 + t_next * noise
    return x, student(x, x.new_tensor([policy.timesteps[stop]]), cond)


@pytest.mark.parametrize("step", ["renoise", "ode"])
def test_backward_simulation_equals_a_hand_written_loop(step: str) -> None:
    """Float64, sample by sample, with mixed stops."""
    student, batch, policy = SmallStudent(), point_batch(12, key=7), RolloutPolicy(TIMES, step)
    stop = torch.arange(12) % 4
    x = backward_simulation(student, policy, batch, stop).x
    expected = torch.cat([by_hand(student, policy, batch, i, int(k))[1] for i, k in enumerate(stop)])
    error = (x - expected).abs().max().item()
    print(f"{step}: {error:.1e}")
    assert error < 1e-13


@pytest.mark.parametrize("step", ["renoise", "ode"])
def test_gradient_flows_only_through_the_last_executed_step(step: str) -> None:
    """The parameter gradient is that of one call on the constant stopping input, and not that of the whole chain."""
    student, batch, policy = SmallStudent(), point_batch(8, key=3), RolloutPolicy(TIMES, step)
    stop, parameters = torch.arange(8) % 4, list(student.network.parameters())
    weight = torch.randn(8, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = torch.autograd.grad((backward_simulation(student, policy, batch, stop).x * weight).sum(), parameters)
    inputs = torch.cat([by_hand(student, policy, batch, i, int(k))[0] for i, k in enumerate(stop)]).detach()
    t = torch.tensor(TIMES, dtype=torch.float64)[stop]
    one_call = torch.autograd.grad((student(inputs, t, batch.cond) * weight).sum(), parameters)
    error = max((a - b).abs().max().item() for a, b in zip(got, one_call, strict=True))
    print(f"{step}: {error:.1e} of {max(b.abs().max().item() for b in one_call):.2f}")
    assert error < 1e-12


@pytest.mark.parametrize("step", ["renoise", "ode"])
def test_a_sample_does_not_depend_on_its_batch(step: str) -> None:
    """Alone, among others, in another order: the same result to the rounding of float64."""
    student, policy = SmallStudent(), RolloutPolicy(TIMES, step)
    ids, stop = torch.tensor([5, 90, 12, 7, 33]), torch.tensor([3, 0, 2, 1, 3])
    together = backward_simulation(student, policy, point_batch(ids), stop).x
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled = backward_simulation(student, policy, point_batch(ids[order]), stop[order]).x
    alone = torch.cat(
        [backward_simulation(student, policy, point_batch(ids[i : i + 1]), stop[i : i + 1]).x for i in range(5)]
    )
    errors = [(shuffled - together[order]).abs().max().item(), (alone - together).abs().max().item()]
    print(f"{step}: {errors}")
    assert max(errors) < 1e-13


@pytest.mark.parametrize("step", ["renoise", "ode"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sampling_is_backward_simulation_at_the_last_stop(step: str, steps: int) -> None:
    """What trains is what samples: bit for bit, given the same noise."""
    student, batch, policy = SmallStudent(), point_batch(6), RolloutPolicy(TIMES[:steps], step)
    sampled = sample(student, policy, batch.cond, batch.normal)
    assert torch.equal(sampled, backward_simulation(student, policy, batch, full(batch, steps - 1)).x)


def test_the_told_time_reaches_the_network() -> None:
    """A one-step student fed pure noise at t = 1 is told 399 of 1000; its output is still read at t = 1, where the
    velocity v gives x0 = x_1 - v."""
    student, batch = SmallStudent(), point_batch(3)
    policy = RolloutPolicy((1.0,), conditioning_time=0.399)
    x = backward_simulation(student, policy, batch, full(batch, 0)).x
    assert torch.allclose(student.told[0], torch.tensor(399.0, dtype=torch.float64))
    velocity = student(batch.normal("initial"), x.new_full((3,), 0.399), batch.cond, predict="flow_prediction")
    assert torch.equal(x, batch.normal("initial") - velocity)
    assert torch.equal(x, predict_x0(student, batch.normal("initial"), x.new_ones(3), batch.cond, policy))


MEANS, STDS = (0.7, -1.2), (1.3, 0.4)


def test_the_exact_student_with_ode_steps_has_the_exact_marginals() -> None:
    """Its Euler steps land on the probability-flow ODE's: every step's input is alpha m + sqrt(V) z and the sample is
    m + sqrt(S) z, sample by sample, z being the initial noise."""
    policy, batch = RolloutPolicy((1.0, 0.8, 0.55, 0.2), "ode"), point_batch(100)
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (MEANS, STDS))
    grid = torch.tensor((*policy.timesteps, 0.0), dtype=torch.float64)
    student = Recorder(GaussianMap(0.0, MEANS, STDS, end=lambda t: grid[(grid[None] >= t[:, None]).sum(1)]))
    x = backward_simulation(student, policy, batch, full(batch, 3)).x
    z, worst = batch.normal("initial"), 0.0
    for x_t, t, *_ in student.calls:
        alpha, sigma = (1 - t)[:, None], t[:, None]
        exact = alpha * mean + (alpha**2 * std**2 + sigma**2).sqrt() * z
        worst = max(worst, (x_t - exact).abs().max().item())
    end = (x - (mean + std * z)).abs().max().item()
    print(f"inputs {worst:.1e}, sample {end:.1e}")
    assert len(student.calls) == 4 and worst < 1e-13 and end < 1e-13


def test_the_exact_student_with_renoising_has_the_data_law_at_every_stop() -> None:
    """The consistency function of a Gaussian, renoised between steps: at each stop the clean samples have mean m and
    covariance S, within 5 standard errors of 100,000 samples, and are not a function of the initial noise."""
    n = 100_000
    policy, batch = RolloutPolicy(TIMES, "renoise"), point_batch(n)
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (MEANS, STDS))
    student = GaussianMap(0.0, MEANS, STDS, end=torch.zeros_like)
    for stop in range(4):
        x = backward_simulation(student, policy, batch, full(batch, stop)).x
        standard = (x - mean) / std
        root = math.sqrt(n)
        z = [
            (standard.mean(0) * root).abs().max().item(),
            ((standard.square().mean(0) - 1) * root / math.sqrt(2)).abs().max().item(),
            (standard.prod(1).mean() * root).abs().item(),
        ]
        kept = torch.corrcoef(torch.stack([standard[:, 0], batch.normal("initial")[:, 0]]))[0, 1].item()
        print(f"stop {stop}: mean, variance, covariance {z} standard errors; correlation with the start {kept:.3f}")
        assert max(z) < 5
        assert kept > 0.999 if stop == 0 else kept < 0.99


def test_stops_are_even_and_keyed() -> None:
    """Per sample: each of 4 stops a quarter of the samples, a function of the sample's id; shared: one for all, the
    same for every micro-batch of the update, even over updates."""
    stop = draw_stops(point_batch(40_000), 4, shared=False)
    z = (torch.bincount(stop, minlength=4) - 10_000) / math.sqrt(40_000 * 3 / 16)
    print(f"counts {z.tolist()} standard deviations from even")
    assert z.abs().max() < 4 and stop.dtype == torch.int64
    assert torch.equal(stop[100:200], draw_stops(point_batch(torch.arange(100, 200)), 4, shared=False))
    shared = [draw_stops(point_batch(torch.arange(k, k + 3), key=9), 4, shared=True).tolist() for k in (0, 50)]
    assert shared[0] == shared[1] and len(set(shared[0])) == 1
    drawn = torch.tensor([int(draw_stops(point_batch(1, key=k), 4, shared=True)) for k in range(4000)])
    assert ((torch.bincount(drawn, minlength=4) - 1000) / math.sqrt(4000 * 3 / 16)).abs().max() < 4


def test_float32_rollouts_follow_the_float64_ones() -> None:
    """The same samples in single precision, to its rounding."""
    student, policy = SmallStudent(), RolloutPolicy(TIMES)
    batch = point_batch(50)
    stop = draw_stops(batch, 4, shared=False)
    double = backward_simulation(student, policy, batch, stop).x
    single = backward_simulation(student.float(), policy, dataclasses.replace(batch, dtype=torch.float32), stop).x
    error = (single - double).abs().max().item()
    print(f"{error:.1e}")
    assert single.dtype == torch.float32 and error < 1e-5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"timesteps": (1.0, 0.5, 0.5)}, "strictly decreasing"),
        ({"timesteps": (0.5, 0.75)}, "strictly decreasing"),
        ({"timesteps": (1.0, 0.5, 0.0)}, r"\(0, 1\]"),
        ({"timesteps": (1.2, 0.5)}, r"\(0, 1\]"),
        ({"timesteps": (1.0, -0.5)}, r"\(0, 1\]"),
        ({"timesteps": (math.nan,)}, "timesteps"),
        ({"timesteps": ()}, "timesteps"),
        ({"timesteps": (1.0, 0.5), "conditioning_time": 0.4}, "one-step"),
        ({"timesteps": (1.0,), "conditioning_time": 0.0}, "conditioning_time"),
        ({"timesteps": (1.0,), "transition": "euler"}, "transition"),
    ],
)
def test_impossible_policies_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutPolicy(**fields)  # type: ignore[arg-type]


def test_transitions_also_hold_on_a_variance_preserving_schedule(vp_schedule: Schedule) -> None:
    """The ode step is DDIM: from x_t and the true x0 it lands on alpha' x0 + sigma' noise with the noise of x_t."""
    x0, noise = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, s = torch.linspace(0.3, 1.0, 20, dtype=torch.float64), torch.linspace(0.01, 0.7, 20, dtype=torch.float64)
    landed = transition(vp_schedule, x0, vp_schedule.add_noise(x0, noise, t), t, s, None)
    error = (landed - vp_schedule.add_noise(x0, noise, s)).abs().max().item()
    print(f"{error:.1e}")
    assert error < 1e-13
