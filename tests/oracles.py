"""Laws, networks and batches whose answers are known in closed form, shared by the tests of many files.

Unless something else is said, noise is added as in flow matching, x_t = alpha x0 + sigma noise with alpha = 1 - t and
sigma = t, and numbers are float64. For data N(m, S) the law of x_t is then N(alpha m, V) with V = alpha^2 S + sigma^2.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgen.backbones.base import RoleOptions
from fastgen.backbones.gaussian_mixture import AnalyticDenoiser, GaussianMixture, GaussianMixtureConfig, build_mixture
from fastgen.batch import Batch, Conditioning
from fastgen.denoiser import Denoiser, Inputs
from fastgen.networks import Networks
from fastgen.objectives import Objective, Turn
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import FlowSchedule, PredictionType, Schedule, expand

Numbers = float | Sequence[float]
Rows = Numbers | Sequence[Sequence[float]] | Tensor

ONE_STEP = RolloutPolicy((1.0,))
MEAN, STD = 0.7, 1.3  # of the Gaussian teacher, where a test gives no others
M, S = 0.7, 0.5  # mean and standard deviation of the data of flow maps, in every coordinate


# --- teachers


def gaussian(mean: Numbers = MEAN, std: Numbers = STD, schedule: Schedule | None = None) -> AnalyticDenoiser:
    """The exact denoiser of N(mean, std^2). mean and std are one number each, or one for each dimension."""
    config = GaussianMixtureConfig(means=(row(mean),), stds=(row(std),))
    return AnalyticDenoiser(build_mixture(config), schedule or FlowSchedule())


def guided_pair(mean: Numbers, uncond_mean: Numbers, std: Numbers = STD) -> AnalyticDenoiser:
    """A teacher of N(mean, std^2) for label 0 and of N(uncond_mean, std^2) for the empty prompt, label 2. Guided with
    scale w it is exactly the teacher of N(mean + (w - 1) (mean - uncond_mean), std^2)."""
    config = GaussianMixtureConfig(
        (row(mean), row(uncond_mean)), (row(std), row(std)), weights=(1, 0), classes=(0, 1), uncond_weights=(0, 1)
    )
    return AnalyticDenoiser(build_mixture(config), FlowSchedule())


def mixed_teacher() -> AnalyticDenoiser:
    """A teacher in two dimensions: of N(M, S^2) for label 0, of N((-2, 0), S^2) for label 1, and of the even mixture
    of both for the empty prompt, label 2."""
    config = GaussianMixtureConfig(means=((M, M), (-2.0, 0.0)), stds=(S, S), classes=(0, 1))
    return AnalyticDenoiser(build_mixture(config), FlowSchedule())


def row(value: Numbers) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)


# --- students and their fake scores


class AffineStudent(Denoiser):
    """A student that predicts x0 = a_k + b_k x_t at step k of its policy. Its state is Gaussian after each step.

    a and b hold one number for each step, or one for each step and dimension, [steps, dim]. The last entry also serves
    all later steps: with two plain numbers the student is the same at every level."""

    def __init__(self, a: Rows, b: Rows, policy: RolloutPolicy = ONE_STEP):
        super().__init__(nn.Identity(), FlowSchedule(), "sample")
        self.a, self.b = (nn.Parameter(torch.atleast_1d(torch.as_tensor(v, dtype=torch.float64))) for v in (a, b))
        self.policy = policy

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        """Step k is the one whose level is nearest to t."""
        k = (t[:, None] - t.new_tensor(self.policy.timesteps)).abs().argmin(1).clamp(max=len(self.a) - 1)
        return expand(self.a[k], x_t) + expand(self.b[k], x_t) * x_t

    @torch.no_grad()
    def laws(self) -> tuple[Tensor, Tensor]:
        """The mean and the variance of the state after each step, [steps] or [steps, dim], starting from pure noise.

        A step goes from its level t to the next level s, which is 0 after the last step, by

            x_s = (1 - s) x0 + s cos(eta pi / 2) (x_t - (1 - t) x0) / t + s sin(eta pi / 2) noise,

        where eta is the policy's share of fresh noise: 0 for ode, 1 for renoise."""
        levels, angle = (*self.policy.timesteps, 0.0), self.policy.transition_eta * math.pi / 2
        mean, variance, found = torch.zeros_like(self.a[0]), torch.ones_like(self.a[0]), []
        for k, (t, s) in enumerate(itertools.pairwise(levels)):
            a, b = (p[min(k, len(p) - 1)] for p in (self.a, self.b))
            kept = s * math.cos(angle) / t
            factor = (1 - s) - kept * (1 - t)
            mean = factor * (a + b * mean) + kept * mean
            variance = (factor * b + kept) ** 2 * variance + (s * math.sin(angle)) ** 2
            found.append((mean, variance))
        means, variances = zip(*found, strict=True)
        return torch.stack(means), torch.stack(variances)


class ExactFake(Denoiser):
    """The converged fake score of an AffineStudent, at the student's current parameters.

    The state x_s ~ N(m', v') after a step has the same law as clean samples of N(m, v) noised to level s, where
    m = m' / (1 - s) and v = (v' - s^2) / (1 - s)^2. The fake score is the exact denoiser of N(m, v).
    `inputs.stop` says which step; where it is not given, `stop` does, by default the last step, whose s is 0.
    shift is added to the mean of x_s and stretch multiplies its standard deviation, to make the fake score wrong."""

    def __init__(self, student: AffineStudent, shift: float = 0.0, stretch: float = 1.0, stop: int = -1):
        super().__init__(nn.Identity(), FlowSchedule(), "sample")
        self.student = [student]  # in a list: not a submodule, its parameters are not this network's
        self.shift, self.stretch, self.stop = shift, stretch, stop

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        stop = torch.full_like(t, self.stop).long() if inputs.stop is None else inputs.stop
        mean, variance = (expand(law[stop], x_t) for law in self.student[0].laws())
        s = expand(t.new_tensor([*self.student[0].policy.timesteps[1:], 0.0])[stop], x_t)
        clean_variance = (self.stretch**2 * variance - s**2) / (1 - s) ** 2
        return posterior_mean(x_t, t, (mean + self.shift) / (1 - s), clean_variance)


def posterior_mean(x_t: Tensor, t: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """E[x0 | x_t] for x0 ~ N(mean, variance): mean + alpha variance / V (x_t - alpha mean)."""
    alpha, sigma = FlowSchedule().coefficients(t, x_t)
    return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x_t - alpha * mean)


def affine_networks(
    student: AffineStudent, teacher: Denoiser, fake: Denoiser | None = None, scorer: Any = None
) -> Networks:
    """A student under its own policy, a teacher, and a fake score: the given one, or the student's converged one."""
    modules = {"student": student, "teacher": teacher, "fake_score": fake or ExactFake(student)}
    return Networks(modules, student.policy, scorer)


class Given(Denoiser):
    """A network that predicts the same given tensor wherever it is called, broadcast to the shape of x_t."""

    def __init__(self, prediction: Tensor, prediction_type: PredictionType = "sample"):
        super().__init__(nn.Identity(), FlowSchedule(), prediction_type)
        self.prediction = prediction

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        return self.prediction.expand_as(x_t)


class Call(NamedTuple):
    """What a network was called with. grad: whether autograd was recording."""

    x_t: Tensor
    t: Tensor
    inputs: Inputs
    grad: bool


class Recorder(Denoiser):
    """Passes every call on to another denoiser, and keeps what it was called with."""

    def __init__(self, denoiser: Denoiser):
        super().__init__(nn.Identity(), denoiser.schedule, denoiser.prediction_type)
        self.denoiser = denoiser
        self.calls: list[Call] = []

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        self.calls.append(Call(x_t, t, inputs, torch.is_grad_enabled()))
        return self.denoiser(x_t, t, cond, inputs, predict=self.prediction_type)


# --- flow maps


def spread(t: Tensor, std: float | Tensor = S) -> Tensor:
    """The standard deviation of x_t for data of standard deviation std: sqrt((1 - t)^2 std^2 + t^2)."""
    return ((1 - t) ** 2 * std**2 + t**2).sqrt()


def average_velocity(x: Tensor, t: Tensor, s: Tensor, mean: float | Tensor = M, std: float | Tensor = S) -> Tensor:
    """u(x, t, s) = (x - X_{t,s}(x)) / (t - s), where the probability-flow ODE of N(mean, std^2) carries x to

        X_{t,s}(x) = (1 - s) mean + spread(s) / spread(t) (x - (1 - t) mean).

    It is written without the division by t - s, so that it has its limit, the velocity, at s = t."""
    t, s = expand(t, x), expand(s, x)
    # equal to (spread(t) - spread(s)) / spread(t) / (t - s)
    ratio = ((t + s) * (1 + std**2) - 2 * std**2) / (spread(t, std) * (spread(t, std) + spread(s, std)))
    return -mean + ratio * (x - (1 - t) * mean)


class GaussianMap(Denoiser):
    """The exact flow map of N(mean, std^2), whose average velocity has the error off * sin(2 x + 3 t - 2 s) added.

    off is its one parameter. A jump ends at the level `inputs.s`, or at t itself (which is the velocity) where none is
    given. end: gives that level as a function of t instead, whatever the network is told."""

    def __init__(
        self,
        off: float = 0.0,
        mean: Numbers = M,
        std: Numbers = S,
        end: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__(nn.Identity(), FlowSchedule(), "flow_prediction")
        self.off = nn.Parameter(torch.tensor(off, dtype=torch.float64))
        self.mean, self.std = (torch.tensor(v, dtype=torch.float64) for v in (mean, std))
        self.end = end

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        told = inputs.s if self.end is None else self.end(t)
        s = t if told is None else told
        wave = torch.sin(2 * x_t + expand(3 * t - 2 * s, x_t))
        return average_velocity(x_t, t, s, self.mean, self.std) + self.off * wave


def consistency_map(off: float = 0.0) -> GaussianMap:
    """The exact consistency function f(x, t) = M + S / spread(t) (x - (1 - t) M): a flow map whose jumps end at 0."""
    return GaussianMap(off, end=torch.zeros_like)


RENOISE = RolloutPolicy((1.0, 0.75, 0.5, 0.25))
FOUR_JUMPS = RolloutPolicy((1.0, 0.75, 0.5, 0.25), "ode", two_time=True)
ONE_JUMP = RolloutPolicy((1.0,), "ode", two_time=True)
GAUSSIAN = GaussianMixtureConfig(means=((M, M),), stds=(S,), fit_steps=0, width=16, depth=1)


def exact_networks(student: Denoiser | float = 0.0, policy: RolloutPolicy = FOUR_JUMPS) -> Networks:
    """The teacher of N(M, S^2) in two dimensions, and a student: the given one, or a GaussianMap with this error."""
    student = student if isinstance(student, Denoiser) else GaussianMap(student)
    return Networks({"student": student, "teacher": gaussian((M, M), (S, S))}, policy)


def consistency_networks(off: float = 0.0, policy: RolloutPolicy = RENOISE) -> Networks:
    """The same teacher, with its consistency function as the student, with this error."""
    return exact_networks(consistency_map(off), policy)


def one_loss(objective: Objective, networks: Networks, batch: Batch, turn: Turn | None = None) -> Tensor:
    """The total of a turn that has one loss. turn: by default the student's, the last turn of the first update."""
    turn = objective.turns(0, {})[-1] if turn is None else turn
    loss: Any = objective.loss(turn, networks, batch, objective.init_state())
    assert not hasattr(loss, "__next__")
    return loss.total


def square_growth(objective: Objective, policy: RolloutPolicy = FOUR_JUMPS) -> tuple[float, float]:
    """The loss at the exact map, and the factor by which it grows when the error of the map grows tenfold."""
    batch = gaussian_batch(pairs=True)
    at = [float(one_loss(objective, exact_networks(off, policy), batch)) for off in (0.0, 1e-3, 1e-2)]
    print(f"at the exact map {at[0]:.1e}, off by 0.001 {at[1]:.2e}, by 0.01 {at[2]:.2e}")
    assert at[1] > 1e-8
    return at[0], at[2] / at[1]


# --- batches


def point_batch(
    ids: int | Tensor, key: int = 0, dim: int = 2, uncond: int = 0, latents: Tensor | None = None
) -> Batch:
    """A batch of points with label 0 as the prompt and label `uncond` as the empty one. ids: the sample ids, or their
    number if they count from 0."""
    ids = torch.arange(ids) if isinstance(ids, int) else ids
    label, other = (Conditioning({"label": torch.full_like(ids, v)}) for v in (0, uncond))
    return Batch(ids, key, label, other, (dim,), latents=latents, dtype=torch.float64)


def gaussian_batch(count: int = 64, key: int = 0, pairs: bool = False, uncond: int = 0) -> Batch:
    """Exact data of N(M, S^2) in two dimensions, with other samples for every key. pairs: also noises, and the points
    where the exact ODE carries them."""
    batch = point_batch(torch.arange(count) + count * key, key, uncond=uncond)
    latents, noise = M + S * batch.normal("exact data"), batch.normal("pair noise")
    return dataclasses.replace(batch, latents=latents, pairs=(noise, M + S * noise) if pairs else None)


def grouped_batch(count: int, size: int = 1, key: int = 0, dim: int = 1, first: int = 0) -> Batch:
    """A batch of prompt groups: `count` samples from id `first` on, `size` of them for each prompt. In two dimensions
    the prompts alternate between the labels 0 and 1 of TINY, and 2 is the empty prompt; otherwise all are label 0."""
    ids = torch.arange(first, first + count)
    group = ids // size
    label, uncond = (group % 2, torch.full_like(ids, 2)) if dim == 2 else (torch.zeros_like(ids),) * 2
    conds = (Conditioning({"label": v}) for v in (label, uncond))
    return Batch(ids, key, *conds, (dim,), ("",) * count, group=group, dtype=torch.float64)


# --- small trained networks, and who gets gradient


TINY = GaussianMixtureConfig(
    means=((1.0, 0.0), (-1.0, 0.5)), stds=(0.5, 0.3), classes=(0, 1), width=16, depth=2, fit_steps=0
)


def tiny_backbone(config: GaussianMixtureConfig = TINY, **roles: Any) -> GaussianMixture:
    """A small mixture and its networks, in float64. roles: fields of RoleOptions, such as adapters."""
    return config.build(torch.device("cpu"), torch.float64, 0, RoleOptions(**roles))


def tiny_networks(
    objective: Objective, policy: RolloutPolicy, scorer: Any = None, backbone: GaussianMixture | None = None
) -> Networks:
    """All networks of an objective on a small mixture, with random weights."""
    torch.manual_seed(0)
    backbone = backbone or tiny_backbone()
    modules: dict[str, nn.Module] = {"student": objective.make_student(backbone, policy)}
    modules |= {"teacher": backbone.load("teacher")} | objective.auxiliary(backbone, policy)
    return Networks({role: m.double() for role, m in modules.items()}, policy, scorer)


def tiny_batch(count: int = 32, key: int = 0) -> Batch:
    """A batch of label 0 with real data of TINY, and with pairs of two unrelated samples of it."""
    ids, mixture = torch.arange(count), build_mixture(TINY)
    first, second, latents = (mixture.sample(ids, torch.zeros_like(ids), k) for k in (1, 2, 9))
    return dataclasses.replace(point_batch(count, key, uncond=2, latents=latents), pairs=(first, second))


def reached(module: nn.Module, least: float = 0.0) -> dict[str, bool]:
    """For each parameter, whether any entry of its gradient is larger than `least`."""
    return {n: p.grad is not None and p.grad.abs().max().item() > least for n, p in module.named_parameters()}


def touched(networks: Mapping[str, nn.Module]) -> set[str]:
    """The roles that hold any gradient, be it zero."""
    return {role for role, module in networks.items() if any(p.grad is not None for p in module.parameters())}
