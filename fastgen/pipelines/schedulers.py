"""Step lists as parameters of diffusers schedulers, of stock ones where possible, so that plain diffusers samples a
student as it was trained."""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from scipy.optimize import brentq

from fastgen.rollout import RolloutPolicy, TeacherPolicy

TOLERANCE = 1e-6


def flow_match_sigmas(num_steps: int, config: dict[str, Any]) -> list[float]:
    """The sigmas FlowMatchEulerDiscreteScheduler(**config) uses for num_steps, without the final 0."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(num_steps)
    return scheduler.sigmas[:-1].tolist()


def flow_match_scheduler(policy: RolloutPolicy) -> Any:
    """The scheduler with which a flow-matching pipeline samples the policy at num_inference_steps = K: the stock one,
    or for cps and flow maps fastgen's own. Raises ValueError if neither can."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from fastgen.pipelines.few_step import FlowMatchCPSScheduler

    if policy.any_step:
        return FlowMatchCPSScheduler(list(policy.timesteps), 0.0, any_step=True)
    if policy.transition != "cps":
        return FlowMatchEulerDiscreteScheduler(**flow_match_config(policy))
    if policy.conditioning_time is not None:
        raise ValueError(
            "conditioning_time with transition: cps cannot be stored; a single step is the same as ode, use that"
        )
    assert policy.eta is not None
    return FlowMatchCPSScheduler(list(policy.timesteps), policy.eta)


def flow_match_config(policy: RolloutPolicy) -> dict[str, Any]:
    """Parameters of FlowMatchEulerDiscreteScheduler for which num_inference_steps = K gives exactly the policy's list.

    The scheduler takes K values u_i from 1 down to sigma_min(shift), evenly, shifts them, sigma = shift u / (1 +
    (shift - 1) u), and stretches 1 - sigma linearly so that the last one is shift_terminal. With the end points right,
    `shift` is the one number left, and it is solved for; every list of the form sigma = a u' / (1 + (a - 1) u'), u' =
    1, (K-1)/K, ..., 1/K, is held exactly. A told time becomes num_train_timesteps, as the network is given sigma *
    num_train_timesteps. Raises ValueError if the list cannot be held to 1e-6."""
    if policy.transition in ("cps", "tcd"):
        raise ValueError(f"the stock scheduler has no transition: {policy.transition}; use renoise or ode")
    times = policy.timesteps
    config: dict[str, Any] = {"num_train_timesteps": 1000, "shift": 1.0, "shift_terminal": None}
    config["stochastic_sampling"] = policy.transition == "renoise"
    if abs(times[0] - 1) > TOLERANCE:
        raise ValueError(
            f"timesteps must start at 1.0 to be exported, got {times[0]}: the stock scheduler's first sigma is 1"
        )
    if len(times) == 1:
        told = 1000 * (policy.conditioning_time or 1.0)
        if abs(told - round(told)) > 1e-9 or told < 1:
            raise ValueError(
                f"conditioning_time must be a multiple of 0.001 to be exported, got {policy.conditioning_time}"
            )
        return config | {"num_train_timesteps": round(told)}
    config["shift_terminal"] = times[-1]
    if len(times) > 2:
        config["shift"] = solve_shift(times)
    held = flow_match_sigmas(len(times), config)
    worst = max(abs(a - b) for a, b in zip(held, times, strict=True))
    if worst > TOLERANCE:
        near = [round(s, 6) for s in held]
        raise ValueError(
            f"timesteps {list(times)} cannot be stored in the stock scheduler (off by {worst:.2g}); a list it holds "
            f"is {near}; use a shifted uniform list, s u / (1 + (s - 1) u)"
        )
    return config


def solve_shift(times: tuple[float, ...]) -> float:
    """The shift whose stretched list goes through times[1]; the end points hold for any shift."""

    def second(shift: float) -> float:
        smallest = shift * 1e-3 / (1 + (shift - 1) * 1e-3)
        rise = [(1 - u) / (1 + (shift - 1) * u) for u in (1 + (smallest - 1) / (len(times) - 1), smallest)]
        return 1 - rise[0] / rise[1] * (1 - times[-1]) - times[1]

    grid = [10 ** (k / 20) for k in range(-60, 61)]
    brackets = [(a, b) for a, b in itertools.pairwise(grid) if second(a) * second(b) <= 0]
    if not brackets:
        return 1.0
    low, high = min(brackets, key=lambda pair: abs(math.log(pair[0])))
    return float(brentq(second, low, high, xtol=1e-13))


# --- variance-preserving families: integer steps i of N, at level (i + 1) / N


def discrete_steps(policy: RolloutPolicy, total: int) -> tuple[int, int]:
    """(S, k) for which DDIMScheduler (ode, S = K) or LCMScheduler (renoise) calls the network at the policy's levels;
    TCDScheduler (tcd) takes LCMScheduler's steps.

    LCMScheduler keeps the steps k, 2k, ..., S k (one-based; S is its original_inference_steps) and calls the network
    at K of them, (S - floor(i S / K)) k for i = 0, ..., K - 1. DDIMScheduler with trailing spacing is the case S = K.
    So every evenly spaced list is held, for renoise also one rounded to multiples of k, and every list of one step.
    total: the steps of the diffusion. Raises ValueError for any other list, naming the nearest that is held and begins
    at the same level."""
    if policy.transition == "cps":
        raise ValueError(
            "transition: cps cannot be stored in a stock scheduler of this family; use renoise, ode or tcd"
        )
    if policy.conditioning_time is not None:
        raise ValueError(
            f"conditioning_time {policy.conditioning_time} cannot be stored: the stock schedulers convert at the step "
            "they tell the network, as DMD2's one-step SDXL (told step 399) does; for that, give timesteps: "
            f"[{policy.conditioning_time}]"
        )
    if policy.num_steps >= total:
        raise ValueError(f"a scheduler of {total} steps cannot hold {policy.num_steps} timesteps")

    def rank(candidate: tuple[int, int]) -> tuple[float, float, bool]:
        steps = lcm_steps(*candidate, policy.num_steps)
        off = [abs(step / total - t) for step, t in zip(steps, policy.timesteps, strict=True)]
        return round(off[0], 9), max(off), total // candidate[0] != candidate[1]

    best = min(step_candidates(policy, total), key=rank)
    if rank(best)[1] > TOLERANCE:
        near = [round(step / total, 6) for step in lcm_steps(*best, policy.num_steps)]
        scheduler = {"renoise": "LCMScheduler", "tcd": "TCDScheduler"}.get(policy.transition, "DDIMScheduler")
        raise ValueError(
            f"timesteps {list(policy.timesteps)} cannot be stored in {scheduler}, which holds evenly spaced multiples "
            f"of 1/{total}; the nearest list is {near}"
        )
    if policy.transition == "tcd":
        steps = [step - 1 for step in lcm_steps(*best, policy.num_steps)[1:]]
        if lowest := [step for step in steps if int((1 - (policy.eta or 0.0)) * step) < 1]:
            raise ValueError(
                f"a step of transition: tcd to step {lowest[0]} of {total} would pass by step 0, which "
                "TCDScheduler takes for clean; lower rollout.eta or raise the timestep"
            )
    return best


def lcm_steps(original: int, stride: int, count: int) -> list[int]:
    """The one-based steps LCMScheduler takes."""
    return [(original - i * original // count) * stride for i in range(count)]


def step_candidates(policy: RolloutPolicy, total: int) -> Iterator[tuple[int, int]]:
    """All (S, k) with S k <= total. LCMScheduler's boundary scaling drops the prediction at step 0, so not that."""
    count, ode = policy.num_steps, policy.transition == "ode"
    for original in range(count, (count if ode or count == 1 else total) + 1):
        for stride in range(1, total // original + 1):
            if ode or lcm_steps(original, stride, count)[-1] > 1:
                yield original, stride


def few_step_scheduler(policy: RolloutPolicy, config: Mapping[str, Any]) -> Any:
    """LCMScheduler (renoise), DDIMScheduler (ode) or TCDScheduler (tcd) that samples the policy with
    num_inference_steps = K. A pipeline with a TCDScheduler must also be given the policy's eta in its call.

    config: of the pipeline's own scheduler, for its noise and prediction type. LCMScheduler mixes x_t into its
    predictions by 1 / (1 + (2 timestep timestep_scaling)^2), at most 2.5e-9 with the timestep_scaling written here.
    TCDScheduler ends at step 0 instead of at clean data: the betas written here make that step clean, and all others
    what they were.
    Where no list that begins at the last step fits, num_train_timesteps, by which the stock schedulers count, is the
    list's first step; the noise is still that of all the steps."""
    from diffusers import DDIMScheduler, LCMScheduler, TCDScheduler

    noise = stock_noise(config)
    betas = DDIMScheduler(**noise).betas.tolist()
    original, stride = discrete_steps(policy, len(betas))
    if policy.transition == "tcd":
        betas = [0.0, 1 - (1 - betas[0]) * (1 - betas[1]), *betas[2:]]
        noise |= {"trained_betas": betas, "rescale_betas_zero_snr": False}
    if len(betas) // original != stride:
        noise |= {"trained_betas": betas, "rescale_betas_zero_snr": False}
        betas = betas[: original * stride]
    options: dict[str, Any] = noise | {
        "num_train_timesteps": len(betas),
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 1,  # without effect here; StableDiffusionPipeline insists on it
    }
    if policy.transition == "ode":
        return DDIMScheduler(**options, timestep_spacing="trailing")
    if policy.transition == "tcd":
        return TCDScheduler(**options, original_inference_steps=original)
    return LCMScheduler(**options, original_inference_steps=original, timestep_scaling=1e4)


def stock_noise(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a scheduler's config another class must be told, as their defaults differ."""
    keys = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
        "rescale_betas_zero_snr",
    )
    return {key: config[key] for key in keys if key in config}


def is_plain_euler(scheduler: Any) -> bool:
    """Whether this is an EulerDiscreteScheduler whose steps are DDIM's: unaltered sigmas of training steps, then 0."""
    config = scheduler.config
    return (
        type(scheduler).__name__ == "EulerDiscreteScheduler"
        and config.interpolation_type == "linear"
        and config.final_sigmas_type == "zero"
        and not (config.use_karras_sigmas or config.use_exponential_sigmas or config.use_beta_sigmas)
        and not config.rescale_betas_zero_snr
    )


def deterministic_policy(scheduler: Any, num_steps: int) -> TeacherPolicy:
    """How DDIMScheduler, or an EulerDiscreteScheduler with plain sigmas, samples with num_inference_steps = num_steps.

    An Euler step in x / alpha is the DDIM step. It starts from sigma_max noise instead of sqrt(sigma_max^2 + 1) unless
    the spacing is leading: then the first x_t is sigma(t) noise. Raises ValueError where the scheduler's steps do not
    land where it next calls the network, or fall between training steps."""
    total = scheduler.config.num_train_timesteps
    scheduler.set_timesteps(num_steps)
    steps = scheduler.timesteps.tolist()
    name, spacing = type(scheduler).__name__, scheduler.config.timestep_spacing
    if any(step != int(step) or not 0 <= step < total for step in steps):
        raise ValueError(
            f"{num_steps} steps with timestep_spacing {spacing} are not whole steps below {total}, first {steps[0]}; "
            "choose another number"
        )
    if is_plain_euler(scheduler):
        sigma = float(scheduler.sigmas[0])
        scale, final = 1.0 if spacing == "leading" else sigma / math.hypot(sigma, 1), 0.0
    else:
        if scheduler.config.clip_sample or scheduler.config.thresholding:
            raise ValueError(
                f"{name} clips its clean predictions, which latents do not survive; set clip_sample and "
                "thresholding to false in scheduler/scheduler_config.json"
            )
        targets = [step - total // num_steps for step in steps]
        for target, after in zip(targets, steps[1:], strict=False):
            if target != after:
                raise ValueError(
                    f"{name} with timestep_spacing {spacing} steps to {target} and then calls the network at {after}; "
                    f"choose a number of steps that divides {total}, or the spacing leading or trailing"
                )
        ends_clean = targets[-1] < 0 and scheduler.config.set_alpha_to_one
        scale, final = 1.0, 0.0 if ends_clean else (max(targets[-1], 0) + 1) / total
    return TeacherPolicy(
        tuple((int(step) + 1) / total for step in steps), "ode", initial_scale=scale, final_level=final
    )
