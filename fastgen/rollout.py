"""How a few-step student turns noise into samples. Training, evaluation and export share this code."""

import itertools
import math
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.batch import Batch, Conditioning
from fastgen.denoiser import Denoiser, Inputs
from fastgen.schedule import Schedule
from fastgen.signals import transition_log_prob

Noise = Callable[[str], Tensor]
Draw = Callable[[], Tensor]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class RolloutPolicy:
    """The student's sampler. It is stored with the weights, so that a student is sampled as it was trained.

    timesteps: noise levels at which the network is called, strictly decreasing in (0, 1]; the end point 0 is implied.
    transition: renoise = x0 plus fresh noise at the next level (DMD2, consistency models);
                ode = x0 plus the network's own noise prediction (DDIM, which for flow matching is Euler);
                cps = x0 plus a mixture of both noises with the same total, see `transition_law` (RTDMD, Flow-CPS);
                tcd = an ode step to below the next level, then fresh noise up to it, see `jump_law` (TCD, CTM).
    eta: for cps and tcd only, strictly between 0 (the same as ode) and 1 (the same as renoise).
    conditioning_time: for one-step students only, the level that the network is conditioned on while its input is pure
               noise (for DMD2's one-step SDXL student, step 399 of 1000).
    two_time: the network is also conditioned on the level s where its step ends (a flow map). This is the level of the
               next call for ode, and 0 for renoise. As x0 = x_t - t u, the ode step is then the jump x_t - (t - s) u.
    embedded_guidance: the guidance scale given to a network that has it as an input, when it samples."""

    timesteps: Annotated[tuple[float, ...], Field(min_length=1)]
    transition: Literal["renoise", "ode", "cps", "tcd"] = "renoise"
    eta: float | None = Field(default=None, gt=0, lt=1)
    conditioning_time: float | None = Field(default=None, gt=0, le=1)
    two_time: bool = False
    embedded_guidance: float | None = Field(default=None, ge=0)

    @field_validator("timesteps")
    @classmethod
    def _decreasing(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < t <= 1 for t in value):
            raise ValueError(f"every timestep must lie in (0, 1], got {list(value)}")
        if any(a <= b for a, b in itertools.pairwise(value)):
            raise ValueError(f"timesteps must be strictly decreasing, got {list(value)}")
        return value

    @model_validator(mode="after")
    def _one_step(self) -> "RolloutPolicy":
        if self.conditioning_time is not None and len(self.timesteps) != 1:
            raise ValueError(
                f"conditioning_time is for one-step students, and there are {len(self.timesteps)} timesteps; give one "
                "timestep or remove conditioning_time"
            )
        if (self.eta is not None) != (self.transition in ("cps", "tcd")):
            raise ValueError(
                "transition: cps or tcd needs an eta (0.9 in RTDMD, 0.3 in TCD), and the others take none; got "
                f"transition: {self.transition} and eta: {self.eta}"
            )
        if self.two_time and (self.transition in ("cps", "tcd") or self.conditioning_time is not None):
            raise ValueError(
                "two_time needs transition: ode (or renoise, whose steps all end at 0) and no conditioning_time; got "
                f"transition: {self.transition} and conditioning_time: {self.conditioning_time}"
            )
        return self

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @property
    def transition_eta(self) -> float:
        """The eta of `transition_law`: 0 for ode, 1 for renoise. Raises ValueError for tcd, which has another law."""
        if self.transition == "tcd":
            raise ValueError(
                "this objective needs every step to have the same share of fresh noise, and with transition: tcd the "
                "share differs from step to step; use cps, renoise or ode"
            )
        return {"ode": 0.0, "renoise": 1.0}.get(self.transition, self.eta or 0.0)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The continuous inputs that the student has besides its time, any of `modules.inputs.LEVELS`."""
        return ("s",) * self.two_time + ("guidance",) * (self.embedded_guidance is not None)

    def network_inputs(self, t: Tensor, t_next: Tensor | None = None) -> Inputs:
        """The inputs that this policy gives the student at level t [B]. t_next: as in `predict_x0`."""

        def filled(value: float | None) -> Tensor | None:
            return None if value is None else torch.full_like(t, value)

        end = torch.zeros_like(t) if t_next is None or self.transition != "ode" else t_next
        return Inputs(
            time=filled(self.conditioning_time),
            s=end if self.two_time else None,
            guidance=filled(self.embedded_guidance),
        )

    @property
    def any_step(self) -> bool:
        """Whether the student can sample with any number of steps, by the jumps of a flow map."""
        return self.two_time and self.transition == "ode"

    def with_steps(self, num_steps: int) -> "RolloutPolicy":
        """The same sampler with another number of steps n, on the grid k u / (1 + (k - 1) u), u = 1, ..., 1 / n. Its
        shift k is the one that the first two of this policy's timesteps have, or 1 (a uniform grid) if there is only
        one. With its own number of steps, this returns the policy itself. Raises ValueError if the student has a fixed
        number of steps."""
        if num_steps == self.num_steps:
            return self
        if not self.any_step or self.timesteps[0] != 1:
            raise ValueError(
                f"this student was distilled to {self.num_steps} steps, and {num_steps} are asked for; leave out the "
                "number of steps"
            )
        shift = 1.0
        if self.num_steps > 1:
            u, t = 1 - 1 / self.num_steps, self.timesteps[1]
            shift = t * (1 - u) / (u * (1 - t))
        grid = (1 - i / num_steps for i in range(num_steps))
        return replace(self, timesteps=tuple(shift * u / (1 + (shift - 1) * u) for u in grid))


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class TeacherPolicy(RolloutPolicy):
    """The deterministic sampling of a stock scheduler, which need not start from the law of x_t or end at clean data.

    initial_scale: factor on the initial noise. It is sigma(timesteps[0]) where EulerDiscreteScheduler starts from
        sigma_max.
    final_level: the level that the last step goes to. It is that of step 0 where DDIMScheduler has
        set_alpha_to_one: false."""

    initial_scale: float = Field(default=1.0, gt=0)
    final_level: float = Field(default=0.0, ge=0, le=1)


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class Step:
    """One executed step: input x_t [B, ...] at level t [B], clean prediction x0, next state x_next.
    log_prob: [B], only if the transition is stochastic and its log-probability was asked for."""

    x_t: Tensor
    t: Tensor
    x0: Tensor
    x_next: Tensor
    log_prob: Tensor | None = None


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class Rollout:
    """Samples x [B, ...] at noise level s [B] (0 if clean), and the steps that were kept, in order.
    stop: [B], the index into policy.timesteps of the step that made each sample."""

    x: Tensor
    s: Tensor
    stop: Tensor
    steps: tuple[Step, ...] = ()


def predict_x0(
    student: Denoiser, x_t: Tensor, t: Tensor, cond: Conditioning, policy: RolloutPolicy, t_next: Tensor | None = None
) -> Tensor:
    """The student's clean prediction, with the conditioning time and the inputs of the policy. t_next: [B], the level
    that the policy's step goes to from here; None: 0, or a prediction that is used on its own."""
    return student(x_t, t, cond, policy.network_inputs(t, t_next))


def transition_law(
    schedule: Schedule, x0: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, eta: float
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x_{t_next} given (x_t, x0 prediction), t_next < t: the few-step Gaussian policy.

        mean = alpha' x0 + sigma' cos(eta pi / 2) noise_hat,   std = sigma' sin(eta pi / 2)   (CPS, arXiv 2605.26108)

    noise_hat is the noise that x_t and x0 imply. The variances of the two noises add up to sigma'^2 for every eta, so
    the law of x_{t_next} is exact if (x0, noise_hat) is the true pair. eta = 0 is the DDIM step (Euler for flow
    matching) and eta = 1 is renoising. x0, x_t: [B, ...]; t, t_next: [B]. Returns the mean [B, ...], which carries
    gradient, and the std [B, 1, ...]."""
    alpha, sigma = schedule.coefficients(t_next, x0)
    if eta == 1:
        return alpha * x0, sigma
    mean = schedule.add_noise(x0, math.cos(eta * math.pi / 2) * schedule.from_sample(x0, x_t, t, "epsilon"), t_next)
    return mean, math.sin(eta * math.pi / 2) * sigma


def transition(
    schedule: Schedule, x0: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, fresh: Tensor | None, eta: float = 1.0
) -> Tensor:
    """A draw from `transition_law`. fresh: [B, ...] standard normal; None: the DDIM step, whatever eta is."""
    if fresh is None:
        return transition_law(schedule, x0, x_t, t, t_next, 0.0)[0]
    mean, std = transition_law(schedule, x0, x_t, t, t_next, eta)
    return mean + std * fresh


def jump_law(
    schedule: Schedule, x0: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, eta: float
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x_{t_next} after an ode step to a lower level r and fresh noise up to t_next.

        mean = alpha_{t_next|r} (alpha_r x0 + sigma_r noise_hat),   std = sigma_{t_next|r},   r = (1 - eta) t_next

    This is TCD's step (arXiv 2402.19159). The law of x_{t_next} is right if the step to r gives the law of x_r. CTM's
    gamma sampler is of this kind."""
    r = schedule.lowered(t_next, eta)
    ratio, std = schedule.renoise_coefficients(r, t_next, x0)
    return ratio * transition(schedule, x0, x_t, t, r, None), std


def policy_law(
    schedule: Schedule, policy: RolloutPolicy, x0: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the policy's transition: `jump_law` for tcd, otherwise `transition_law`."""
    if policy.transition == "tcd":
        return jump_law(schedule, x0, x_t, t, t_next, policy.eta or 0.0)
    return transition_law(schedule, x0, x_t, t, t_next, policy.transition_eta)


def step_to(
    schedule: Schedule, policy: RolloutPolicy, x0: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, draw: Draw
) -> Tensor:
    """The policy's step from (x_t, x0 prediction) to the lower level t_next. draw() is its fresh noise, if any."""
    if policy.transition == "tcd":
        mean, std = policy_law(schedule, policy, x0, x_t, t, t_next)
        return mean + std * draw()
    fresh = draw() if policy.transition_eta else None
    return transition(schedule, x0, x_t, t, t_next, fresh, policy.transition_eta)


def sample(student: Denoiser, policy: RolloutPolicy, cond: Conditioning, noise: Noise) -> Tensor:
    """Runs the student from noise("initial") through all its steps. Returns clean samples [B, ...], or for a
    TeacherPolicy samples at its final level.

    noise(name) draws [B, ...] standard normal. The fresh noise of the step to timesteps[i] is named "step<i>"."""
    x = noise("initial")
    if isinstance(policy, TeacherPolicy):
        x = policy.initial_scale * x
    for i, level in enumerate(policy.timesteps):
        t = x.new_full((len(x),), level)
        t_next = torch.full_like(t, (*policy.timesteps, 0.0)[i + 1])
        x0 = predict_x0(student, x, t, cond, policy, t_next)
        if i + 1 < policy.num_steps:
            x = step_to(student.schedule, policy, x0, x, t, t_next, partial(noise, f"step{i + 1}"))
    if isinstance(policy, TeacherPolicy) and policy.final_level:
        return transition(student.schedule, x0, x, t, torch.full_like(t, policy.final_level), None)
    return x0


def backward_simulation(
    student: Denoiser, policy: RolloutPolicy, batch: Batch, stop: Tensor, grad: bool = True, to: Tensor | None = None
) -> Rollout:
    """DMD2's backward simulation: the student is trained on inputs that it made itself   (arXiv 2405.14867 Sec. 4.4)

    For each sample i, runs the sampler without gradient up to step stop[i], then executes that step, with gradient if
    `grad` is set.
    stop: [B] int64 in [0, num_steps). A sample that has reached its stop leaves the batch, so that mixed stops cost no
    more network evaluations than a shared stop of the same mean. With renoise, the noise in the input of the executed
    step is independent of the initial noise, as in DMD2.
    to: [B], the level that the executed step goes to, by the policy's transition with noise of its own ("exit"); x is
    then x_s at s = to. None: x is the clean prediction, and s = 0."""
    x_in = batch.normal("initial")
    with torch.no_grad():
        for i in range(farthest(student, stop)):
            reached = stop > i
            # a process without samples left still calls a sharded network, on row 0, and drops the result
            active = reached.nonzero().squeeze(1) if bool(reached.any()) else stop.new_zeros(1)
            x_t, t = x_in[active], x_in.new_full((len(active),), policy.timesteps[i])
            t_next = torch.full_like(t, policy.timesteps[i + 1])
            x0 = predict_x0(student, x_t, t, batch.cond.select(active), policy, t_next).to(x_in.dtype)
            draw = partial(batch.normal, f"step{i + 1}", rows=active)
            x_next = step_to(student.schedule, policy, x0, x_t, t, t_next, draw)
            if bool(reached.any()):
                x_in = x_in.index_copy(0, active, x_next.to(x_in.dtype))
    t_stop = torch.tensor(policy.timesteps, device=x_in.device, dtype=x_in.dtype)[stop]
    with torch.set_grad_enabled(grad):
        x0 = predict_x0(student, x_in, t_stop, batch.cond, policy, to)
        x = x0 if to is None else step_to(student.schedule, policy, x0, x_in, t_stop, to, lambda: batch.normal("exit"))
    executed = Step(x_t=x_in, t=t_stop, x0=x0, x_next=x)
    return Rollout(x=x, s=torch.zeros_like(t_stop) if to is None else to, stop=stop, steps=(executed,))


def next_levels(policy: RolloutPolicy, stop: Tensor, like: Tensor) -> Tensor:
    """[B]: the level that step stop[i] goes to; 0 for the last step."""
    return like.new_tensor((*policy.timesteps[1:], 0.0))[stop]


def step_log_prob(
    schedule: Schedule, policy: RolloutPolicy, step: int, x0: Tensor, x_t: Tensor, x_next: Tensor
) -> Tensor:
    """[B]: the log-probability of x_next under the policy's stochastic step from timesteps[step], given the clean
    prediction x0, which alone carries gradient. The unit is that of `signals.transition_log_prob` by default."""
    t, t_next = (x0.new_full((len(x0),), level) for level in policy.timesteps[step : step + 2])
    return transition_log_prob(x_next, *policy_law(schedule, policy, x0, x_t, t, t_next))


def trajectory(
    student: Denoiser, policy: RolloutPolicy, batch: Batch, shared_steps: Collection[int] = (), log_prob: bool = True
) -> Rollout:
    """Runs the whole sampler and keeps every step: x is the clean sample, and steps[i] is the step at timesteps[i].

    shared_steps: indices i of the steps whose transition noise is shared by all samples of a prompt group (SubGRPO,
    arXiv 2605.26108). Differences within a group are then due to the other steps. The initial noise is never shared.
    log_prob: whether each stochastic step carries the log-probability of its draw, `signals.transition_log_prob` with
    its defaults. The last step is deterministic and has none. Call this under no_grad; it is not meant for gradient.
    """
    x, steps = batch.normal("initial"), list[Step]()
    for i, level in enumerate(policy.timesteps):
        t = x.new_full((len(x),), level)
        t_next = torch.full_like(t, (*policy.timesteps, 0.0)[i + 1])
        x0 = predict_x0(student, x, t, batch.cond, policy, t_next).to(x.dtype)
        if i + 1 == policy.num_steps:
            steps.append(Step(x, t, x0, x0))
            break
        fresh = batch.normal(f"step{i + 1}", by_group=i in shared_steps)
        mean, std = policy_law(student.schedule, policy, x0, x, t, t_next)
        x_next = mean + std * fresh
        scored = transition_log_prob(x_next, mean, std) if log_prob and policy.transition != "ode" else None
        steps.append(Step(x, t, x0, x_next, scored))
        x = x_next
    last = steps[-1]
    return Rollout(last.x0, torch.zeros_like(last.t), torch.full_like(batch.ids, len(steps) - 1), tuple(steps))


def farthest(student: Denoiser, stop: Tensor) -> int:
    """The largest stop index; over all processes if the network is sharded, as they must call it equally often."""
    last = stop.max()
    if student.is_sharded:
        dist.all_reduce(last, dist.ReduceOp.MAX)
    return int(last)


def draw_stops(batch: Batch, num_steps: int, shared: bool, by_group: bool = False) -> Tensor:
    """[B] int64 stop indices: one for the whole update (DMD2), or one per sample, keyed by the sample's id, or one per
    prompt group."""
    if shared:
        return torch.full_like(batch.ids, batch.integer("stop", num_steps))
    return (batch.uniform("stop", by_group) * num_steps).long().clamp(max=num_steps - 1)
