"""How a few-step student turns noise into samples: the same code trains, evaluates and exports."""

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
    """The student's sampler. It is stored with the weights: what trains is what samples.

    timesteps: noise levels at which the network is called, strictly decreasing in (0, 1]; the end point 0 is implied.
    transition: renoise = x0 plus fresh noise at the next level (DMD2, consistency models);
                ode = x0 and the network's own noise prediction (DDIM, which for flow matching is Euler);
                cps = a mixture of the two that keeps the coefficients, see `transition_law` (RTDMD, Flow-CPS);
                tcd = an ode step to below the next level, then noise up to it, see `jump_law` (TCD, CTM).
    eta: of cps and tcd only, strictly between 0 (which is ode) and 1 (which is renoise).
    conditioning_time: one-step students only: the level the network is told while it is fed pure noise
               (DMD2's SDXL one-step student is told 399 of 1000).
    two_time: the network is also told the level s its step ends at (a flow map): that of the next call for ode, 0 for
               renoise. Its prediction x0 = x_t - t u then makes the ode step the jump x_t - (t - s) u.
    embedded_guidance: the network has the guidance scale as an input, and is told this one when it samples."""

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
                "conditioning_time is for one-step students: give one timestep or remove conditioning_time"
            )
        if (self.eta is not None) != (self.transition in ("cps", "tcd")):
            raise ValueError(
                "eta belongs to transition: cps, which needs it (0.9 in RTDMD), and to tcd (0.3 in TCD); "
                "give both or neither"
            )
        if self.two_time and (self.transition in ("cps", "tcd") or self.conditioning_time is not None):
            raise ValueError(
                "two_time goes with transition: ode (or renoise, each step to 0), without conditioning_time"
            )
        return self

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @property
    def transition_eta(self) -> float:
        """eta of `transition_law`: 0 for ode, 1 for renoise. Raises ValueError for tcd, which is none of these."""
        if self.transition == "tcd":
            raise ValueError(
                "the share of fresh noise in transition: tcd differs from step to step, which this "
                "objective does not follow; use cps, renoise or ode"
            )
        return {"ode": 0.0, "renoise": 1.0}.get(self.transition, self.eta or 0.0)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The continuous inputs a student of this policy has beside its time, by `denoiser.LEVELS`."""
        return ("s",) * self.two_time + ("guidance",) * (self.embedded_guidance is not None)

    def network_inputs(self, t: Tensor, t_next: Tensor | None = None) -> Inputs:
        """What the student is told at level t [B] by this policy. t_next: as in `predict_x0`."""

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
        """Whether the student samples with any number of steps: a flow map's jumps."""
        return self.two_time and self.transition == "ode"

    def with_steps(self, num_steps: int) -> "RolloutPolicy":
        """The same sampler with another number of steps, on the grid k u / (1 + (k - 1) u), u = 1, ..., 1 / n, whose
        shift k is that of the first two of its timesteps (1, which is uniform, if it has one). The same policy for its
        own number. Raises ValueError for a student that has one number of steps."""
        if num_steps == self.num_steps:
            return self
        if not self.any_step or self.timesteps[0] != 1:
            raise ValueError(f"this student was distilled to {self.num_steps} steps; leave out the number of steps")
        shift = 1.0
        if self.num_steps > 1:
            u, t = 1 - 1 / self.num_steps, self.timesteps[1]
            shift = t * (1 - u) / (u * (1 - t))
        grid = (1 - i / num_steps for i in range(num_steps))
        return replace(self, timesteps=tuple(shift * u / (1 + (shift - 1) * u) for u in grid))


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class TeacherPolicy(RolloutPolicy):
    """A stock scheduler's deterministic sampling, which may begin beside the law of x_t and end short of clean data.

    initial_scale: factor of the first noise; sigma(timesteps[0]) where EulerDiscreteScheduler starts from sigma_max.
    final_level: the level the last step goes to; that of step 0 where DDIMScheduler has set_alpha_to_one: false."""

    initial_scale: float = Field(default=1.0, gt=0)
    final_level: float = Field(default=0.0, ge=0, le=1)


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class Step:
    """One executed step: input x_t [B, ...] at level t [B], clean prediction x0, next state x_next.
    log_prob [B] only where the transition is stochastic and was asked to be scored."""

    x_t: Tensor
    t: Tensor
    x0: Tensor
    x_next: Tensor
    log_prob: Tensor | None = None


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class Rollout:
    """x [B, ...] at noise level s [B] (0 for a clean sample), and the steps that were kept, the executed one last.
    stop: [B], the index into policy.timesteps of the step that made each sample."""

    x: Tensor
    s: Tensor
    stop: Tensor
    steps: tuple[Step, ...] = ()


def predict_x0(
    student: Denoiser, x_t: Tensor, t: Tensor, cond: Conditioning, policy: RolloutPolicy, t_next: Tensor | None = None
) -> Tensor:
    """The student's clean prediction, with the policy's told time and inputs. t_next: [B], the level the policy's step
    goes to from here; None: 0, or a prediction that is used by itself."""
    return student(x_t, t, cond, policy.network_inputs(t, t_next))


def transition_law(
    schedule: Schedule, x0: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, eta: float
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x_{t_next} given (x_t, x0 prediction), t_next < t: the few-step Gaussian policy.

        mean = alpha' x0 + sigma' cos(eta pi / 2) noise_hat,   std = sigma' sin(eta pi / 2)   (CPS, arXiv 2605.26108)

    noise_hat is the noise that x_t and x0 imply. The two noises add to sigma' for every eta, so that with the true
    (x0, noise) pair the law of x_{t_next} is exact. eta = 0 is the DDIM step (Euler for flow matching), 1 is
    renoising. x0, x_t: [B, ...]; t, t_next: [B]. Returns the mean [B, ...], which carries gradient, and the std
    [B, 1, ...]."""
    alpha, sigma = schedule.coefficients(t_next, x0)
    if eta == 1:
        return alpha * x0, sigma
    mean = schedule.add_noise(x0, math.cos(eta * math.pi / 2) * schedule.from_sample(x0, x_t, t, "epsilon"), t_next)
    return mean, math.sin(eta * math.pi / 2) * sigma


def transition(
    schedule: Schedule, x0: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, fresh: Tensor | None, eta: float = 1.0
) -> Tensor:
    """A draw of `transition_law`. fresh: [B, ...] standard normal; None: the DDIM step, whatever eta."""
    if fresh is None:
        return transition_law(schedule, x0, x_t, t, t_next, 0.0)[0]
    mean, std = transition_law(schedule, x0, x_t, t, t_next, eta)
    return mean + std * fresh


def jump_law(
    schedule: Schedule, x0: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, eta: float
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x_{t_next} by an ode step to r below it, then noise up  (TCD, arXiv 2402.19159)

        mean = alpha_{t_next|r} (alpha_r x0 + sigma_r noise_hat),   std = sigma_{t_next|r},   r = (1 - eta) t_next

    which keeps the law of x_{t_next} if the step to r does (CTM's gamma sampler is of this kind)."""
    r = schedule.lowered(t_next, eta)
    ratio, std = schedule.renoise_coefficients(r, t_next, x0)
    return ratio * transition(schedule, x0, x_t, t, r, None), std


def policy_law(
    schedule: Schedule, policy: RolloutPolicy, x0: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor
) -> tuple[Tensor, Tensor]:
    """The law of the policy's own transition."""
    if policy.transition == "tcd":
        return jump_law(schedule, x0, x_t, t, t_next, policy.eta or 0.0)
    return transition_law(schedule, x0, x_t, t, t_next, policy.transition_eta)


def step_to(
    schedule: Schedule, policy: RolloutPolicy, x0: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, draw: Draw
) -> Tensor:
    """The policy's own step from (x_t, x0 prediction) to a level below; draw() is its fresh noise, if it has any."""
    if policy.transition == "tcd":
        mean, std = policy_law(schedule, policy, x0, x_t, t, t_next)
        return mean + std * draw()
    fresh = draw() if policy.transition_eta else None
    return transition(schedule, x0, x_t, t, t_next, fresh, policy.transition_eta)


def sample(student: Denoiser, policy: RolloutPolicy, cond: Conditioning, noise: Noise) -> Tensor:
    """Runs the student from noise("initial") through all its steps: clean samples [B, ...], or a TeacherPolicy's at
    its final level.

    noise(name) draws [B, ...] standard normal; fresh noise for the step into index i is named "step<i>"."""
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
    """DMD2's backward simulation: the student is trained on inputs it made itself    (arXiv 2405.14867 Sec. 4.4)

    Runs the sampler without gradient up to step stop[i] of sample i and executes that step, with gradient if asked.
    stop: [B] int64 in [0, num_steps). A sample whose stop is reached leaves the batch, so that mixed stops cost no
    more network evaluations than a shared one of the same mean. renoise draws noise independent of the initial one for
    the stopping input, as DMD2 does.
    to: [B], the level the executed step goes to, by the policy's transition with noise of its own ("exit"): x is then
    x_s at s = to. None: the clean prediction, s = 0."""
    x_in = batch.normal("initial")
    with torch.no_grad():
        for i in range(farthest(student, stop)):
            reached = stop > i
            active = reached.nonzero().squeeze(1) if bool(reached.any()) else stop.new_zeros(1)  # called, not kept
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
    """[B]: the level the step stop[i] goes to, 0 after the last."""
    return like.new_tensor((*policy.timesteps[1:], 0.0))[stop]


def step_log_prob(
    schedule: Schedule, policy: RolloutPolicy, step: int, x0: Tensor, x_t: Tensor, x_next: Tensor
) -> Tensor:
    """[B]: the log-probability of x_next under the policy's stochastic step from timesteps[step], given its clean
    prediction x0, which alone carries gradient; in the unit of `signals.transition_log_prob`'s defaults."""
    t, t_next = (x0.new_full((len(x0),), level) for level in policy.timesteps[step : step + 2])
    return transition_log_prob(x_next, *policy_law(schedule, policy, x0, x_t, t, t_next))


def trajectory(
    student: Denoiser, policy: RolloutPolicy, batch: Batch, shared_steps: Collection[int] = (), log_prob: bool = True
) -> Rollout:
    """The whole sampler, every step kept: x is the clean sample, steps[i] the step at timesteps[i].

    shared_steps: indices i of steps whose transition noise all samples of a prompt group share (SubGRPO, arXiv
    2605.26108): what then differs within a group is owed to the other steps. The initial noise is never shared.
    log_prob: each stochastic step carries the log-probability of what it drew, `signals.transition_log_prob` with its
    defaults; the last one, which is deterministic, has none. No gradient: call it under no_grad."""
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
    """The last stop; of all processes, where they hold the network together and must call it equally often."""
    last = stop.max()
    if student.is_sharded:
        dist.all_reduce(last, dist.ReduceOp.MAX)
    return int(last)


def draw_stops(batch: Batch, num_steps: int, shared: bool, by_group: bool = False) -> Tensor:
    """[B] int64 stop indices: one for the whole update (DMD2), or one a sample, keyed by the sample's id, or one a
    prompt group."""
    if shared:
        return torch.full_like(batch.ids, batch.integer("stop", num_steps))
    return (batch.uniform("stop", by_group) * num_steps).long().clamp(max=num_steps - 1)
