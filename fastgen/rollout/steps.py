"""One step of the sampler: the clean prediction, and the laws of the step to the next noise level."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.batch import Conditioning
from fastgen.denoiser import Denoiser, Inputs
from fastgen.policy import RolloutPolicy
from fastgen.schedule import Schedule
from fastgen.signals import transition_log_prob
from fastgen.streaming.context import Context

Draw = Callable[[], Tensor]


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


def network_inputs(policy: RolloutPolicy, t: Tensor, t_next: Tensor | None = None) -> Inputs:
    """The inputs that a policy gives the student at level t [B]. t_next: [B], the level that it jumps to for ode and
    tcd; None: 0."""

    def filled(value: float | None) -> Tensor | None:
        return None if value is None else torch.full_like(t, value)

    jumps = policy.transition in ("ode", "tcd")
    end = torch.zeros_like(t) if t_next is None or not jumps else t_next
    return Inputs(
        time=filled(policy.conditioning_time),
        s=end if policy.two_time else None,
        guidance=filled(policy.embedded_guidance),
        num_steps=filled(policy.num_steps if policy.embedded_steps else None),
    )


def predict_x0(
    student: Denoiser,
    x_t: Tensor,
    t: Tensor,
    cond: Conditioning,
    policy: RolloutPolicy,
    t_next: Tensor | None = None,
    context: Context | None = None,
    inner: Tensor | None = None,
) -> Tensor:
    """The student's clean prediction, with the conditioning time and the inputs of the policy. t_next: [B], the level
    that the policy's step goes to from here; None: 0, or a prediction that is used on its own. context: where x_t is a
    chunk of a video, the memory of the frames before it. inner: for a student with an inner flow, its noise."""
    if t_next is not None and policy.transition == "tcd":
        t_next = student.schedule.lowered(t_next, policy.eta or 0.0)
    inputs = replace(network_inputs(policy, t, t_next), inner=inner)
    return student(x_t, t, cond, inputs if context is None else replace(inputs, context=context))


def inner_noise(policy: RolloutPolicy, draw: Callable[[str], Tensor], step: int) -> Tensor | None:
    """The noise [B, ...] of the inner flow in this step of the sampler, named "inner<step>"; None without one."""
    return None if policy.inner is None else draw(f"inner{step}")


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

    This is TCD's step (arXiv 2402.19159). The law of x_{t_next} is right if the step to r gives the law of x_r, as the
    jump of a flow map does, which is told r. CTM's gamma sampler (arXiv 2310.02279) is this step with another r:
    sqrt(1 - gamma^2) is the ratio of r / (1 - r) to t_next / (1 - t_next) (derived)."""
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
