"""Converts step lists to parameters of diffusers schedulers, of stock ones where possible, so that plain diffusers
samples a student as it was trained."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fastgen.rollout import RolloutPolicy, TeacherPolicy

TOLERANCE = 1e-6


def check_flow_scheduler(config: Mapping[str, Any], dynamic: bool = False, multistep: bool = True) -> None:
    """Raises ValueError if the scheduler's sigmas are not levels of flow matching that the pipeline can ask for, or if
    our sampler would take other steps than the stock pipeline.

    dynamic: whether the pipeline gives its scheduler the shift of use_dynamic_shifting. multistep: whether Euler steps
    at the levels of a multi-step solver are meant, as where the published pipelines have one."""
    name = config["_class_name"]
    if name == "FlowMatchCPSScheduler":  # fastgen's own, of an export
        return
    if name == "FlowMatchEulerDiscreteScheduler":
        if config.get("invert_sigmas"):
            raise ValueError("path: its scheduler counts levels from 0 at noise (invert_sigmas); set that to false")
        fits = dynamic or not config.get("use_dynamic_shifting")
    else:
        flow = config.get("use_flow_sigmas", False) and config.get("prediction_type") == "flow_prediction"
        fits = multistep and flow
    if not fits:
        other = ", or one with use_flow_sigmas and flow_prediction" if multistep else ""
        shift = "" if dynamic else " with a fixed shift"
        raise ValueError(
            f"path: its scheduler, {name}, does not give noise levels of flow matching that this pipeline is sampled "
            f"at here; use a FlowMatchEulerDiscreteScheduler{shift}{other}"
        )


def passed_levels(num_steps: int) -> list[float]:
    """1, (K-1)/K, ..., 1/K: the levels that the pipelines of FLUX, Qwen-Image and others give their scheduler, which
    shifts them. Those of SD3 and Wan leave the levels to the scheduler."""
    return [(num_steps - i) / num_steps for i in range(num_steps)]


def flow_match_sigmas(num_steps: int, config: dict[str, Any], passed: bool = False) -> list[float]:
    """The sigmas that FlowMatchEulerDiscreteScheduler(**config) uses for num_steps, without the final 0. passed:
    whether the pipeline gives it `passed_levels`."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(num_steps, sigmas=passed_levels(num_steps) if passed else None)
    return scheduler.sigmas[:-1].tolist()


def flow_match_scheduler(policy: RolloutPolicy, passed: bool = False) -> Any:
    """The scheduler with which a flow-matching pipeline samples the policy at num_inference_steps = K: the stock one,
    or fastgen's own for cps, flow maps and students of several numbers of steps. passed: whether the pipeline gives it
    `passed_levels`, which it then shifts instead of its own. Raises ValueError if neither can represent the policy."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from fastgen.pipelines.few_step import FlowMatchCPSScheduler

    if policy.any_step:
        lowered = policy.transition == "tcd"
        return FlowMatchCPSScheduler(list(policy.timesteps), policy.eta or 0.0, any_step=True, lowered=lowered)
    if policy.step_counts:
        return FlowMatchCPSScheduler(list(policy.timesteps), 0.0, step_counts=list(policy.step_counts))
    if policy.transition != "cps":
        return FlowMatchEulerDiscreteScheduler(**flow_match_config(policy, passed))
    if policy.conditioning_time is not None:
        raise ValueError(
            "conditioning_time with transition: cps cannot be stored in a scheduler; use transition: ode, which for a "
            "single step is the same"
        )
    assert policy.eta is not None
    return FlowMatchCPSScheduler(list(policy.timesteps), policy.eta)


def flow_match_config(policy: RolloutPolicy, passed: bool = False) -> dict[str, Any]:
    """Parameters of FlowMatchEulerDiscreteScheduler for which num_inference_steps = K gives exactly the policy's list.

    The scheduler takes K evenly spaced values u_i from 1 down to sigma_min(shift), or down to 1 / K if the pipeline
    gives them (`passed`). It shifts them, sigma = shift u / (1 + (shift - 1) u), and stretches 1 - sigma linearly so
    that the last sigma is shift_terminal.
    This fixes the end points. Only `shift` is left, and it is solved for. Every list of the form
    sigma = a u' / (1 + (a - 1) u'), u' = 1, (K-1)/K, ..., 1/K, is represented exactly. A conditioning time becomes
    num_train_timesteps, because the network is given sigma * num_train_timesteps. Raises ValueError if the list cannot
    be represented to within 1e-6."""
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
        total = 1000 * (policy.conditioning_time or 1.0)
        if abs(total - round(total)) > 1e-9 or total < 1:
            raise ValueError(
                f"conditioning_time must be a multiple of 0.001 to be exported, got {policy.conditioning_time}"
            )
        return config | {"num_train_timesteps": round(total)}
    config["shift_terminal"] = times[-1]
    if len(times) > 2:
        config["shift"] = solve_shift(times, passed)
    stored = flow_match_sigmas(len(times), config, passed)
    worst = max(abs(a - b) for a, b in zip(stored, times, strict=True))
    if worst > TOLERANCE:
        near = [round(s, 6) for s in stored]
        raise ValueError(
            f"timesteps {list(times)} cannot be stored in the stock scheduler (off by {worst:.2g}); it can store "
            f"{near}, and any shifted uniform list, s u / (1 + (s - 1) u)"
        )
    return config


def solve_shift(times: tuple[float, ...], passed: bool = False) -> float:
    """The shift whose stretched list goes through times[1]. The end points are right for any shift."""

    def second(shift: float) -> float:
        smallest = 1 / len(times) if passed else shift * 1e-3 / (1 + (shift - 1) * 1e-3)
        rise = [(1 - u) / (1 + (shift - 1) * u) for u in (1 + (smallest - 1) / (len(times) - 1), smallest)]
        return 1 - rise[0] / rise[1] * (1 - times[-1]) - times[1]

    grid = [10 ** (k / 20) for k in range(-60, 61)]
    brackets = [(a, b) for a, b in itertools.pairwise(grid) if second(a) * second(b) <= 0]
    if not brackets:
        return 1.0
    low, high = min(brackets, key=lambda pair: abs(math.log(pair[0])))
    return root(second, low, high)


def root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that changes its sign between low and high is 0, by bisection, to the last bits of a float."""
    below = function(low)
    for _ in range(64):
        middle = (low + high) / 2
        value = function(middle)
        low, high = (middle, high) if value * below > 0 else (low, middle)
    return (low + high) / 2


# --- variance-preserving families: integer steps i of N, at level (i + 1) / N


def discrete_steps(policy: RolloutPolicy, total: int) -> tuple[int, int]:
    """(S, k) for which DDIMScheduler (ode, S = K) or LCMScheduler (renoise) calls the network at the K levels of the
    policy. TCDScheduler (tcd) takes the same steps as LCMScheduler.

    LCMScheduler keeps the steps k, 2k, ..., S k (one-based; S is its original_inference_steps) and calls the network
    at K of them, (S - floor(i S / K)) k for i = 0, ..., K - 1. DDIMScheduler with trailing spacing is the case S = K.
    So any evenly spaced list can be stored, for renoise also one that is rounded to multiples of k, and any list of
    one step. total: the number of steps of the diffusion. Raises ValueError for any other list. The message gives the
    nearest list that can be stored and starts at the same level."""
    if policy.transition == "cps":
        raise ValueError(
            "transition: cps cannot be stored in a stock scheduler of this family; use renoise, ode or tcd"
        )
    if policy.conditioning_time is not None:
        raise ValueError(
            f"conditioning_time {policy.conditioning_time} cannot be stored: a stock scheduler converts a prediction "
            "at the same step that it gives the network, as DMD2's one-step SDXL does at step 399; give timesteps: "
            f"[{policy.conditioning_time}] instead"
        )
    if policy.num_steps >= total:
        raise ValueError(f"a scheduler of {total} steps cannot store {policy.num_steps} timesteps; give fewer")

    def rank(candidate: tuple[int, int]) -> tuple[float, float, bool]:
        steps = lcm_steps(*candidate, policy.num_steps)
        off = [abs(step / total - t) for step, t in zip(steps, policy.timesteps, strict=True)]
        return round(off[0], 9), max(off), total // candidate[0] != candidate[1]

    best = min(step_candidates(policy, total), key=rank)
    if rank(best)[1] > TOLERANCE:
        near = [round(step / total, 6) for step in lcm_steps(*best, policy.num_steps)]
        scheduler = {"renoise": "LCMScheduler", "tcd": "TCDScheduler"}.get(policy.transition, "DDIMScheduler")
        raise ValueError(
            f"timesteps {list(policy.timesteps)} cannot be stored in {scheduler}, which takes evenly spaced multiples "
            f"of 1/{total}; the nearest list is {near}"
        )
    if policy.transition == "tcd":
        steps = [step - 1 for step in lcm_steps(*best, policy.num_steps)[1:]]
        if lowest := [step for step in steps if int((1 - (policy.eta or 0.0)) * step) < 1]:
            raise ValueError(
                f"with transition: tcd, the step to step {lowest[0]} of {total} would go through step 0, which "
                "TCDScheduler treats as clean; lower rollout.eta or raise that timestep"
            )
    return best


def lcm_steps(original: int, stride: int, count: int) -> list[int]:
    """The one-based steps that LCMScheduler takes."""
    return [(original - i * original // count) * stride for i in range(count)]


def step_candidates(policy: RolloutPolicy, total: int) -> Iterator[tuple[int, int]]:
    """All (S, k) with S k <= total. Unless the transition is ode, lists with step 0 are left out, because
    LCMScheduler's boundary scaling drops the prediction there."""
    count, ode = policy.num_steps, policy.transition == "ode"
    for original in range(count, (count if ode or count == 1 else total) + 1):
        for stride in range(1, total // original + 1):
            if ode or lcm_steps(original, stride, count)[-1] > 1:
                yield original, stride


def few_step_scheduler(policy: RolloutPolicy, config: Mapping[str, Any]) -> Any:
    """LCMScheduler (renoise), DDIMScheduler (ode) or TCDScheduler (tcd) that samples the policy with
    num_inference_steps = K. A pipeline with a TCDScheduler must also be given the policy's eta in its call.

    config: that of the pipeline's own scheduler, for its noise and prediction type. LCMScheduler mixes x_t into its
    predictions with weight 1 / (1 + (2 timestep timestep_scaling)^2), at most 2.5e-9 with the timestep_scaling that is
    set here. TCDScheduler ends at step 0 instead of at clean data. The betas set here make that step clean, and leave
    all other steps as they were.
    If no list that starts at the last step fits, num_train_timesteps, from which the stock schedulers count, is set to
    the list's first step. The noise at each step stays the same."""
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
        "steps_offset": 1,  # without effect here, but StableDiffusionPipeline requires it
    }
    if policy.transition == "ode":
        return DDIMScheduler(**options, timestep_spacing="trailing")
    if policy.transition == "tcd":
        return TCDScheduler(**options, original_inference_steps=original)
    return LCMScheduler(**options, original_inference_steps=original, timestep_scaling=1e4)


def stock_noise(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a scheduler's config that another class must be given, because the defaults of classes differ."""
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


def table_noise(alphas_cumprod: Any, prediction_type: str) -> dict[str, Any]:
    """The config of a stock scheduler with this noise, alphas_cumprod [N], whatever made it: its betas are
    1 - alphas_cumprod_i / alphas_cumprod_(i - 1). The last alpha may be 0."""
    table = [1.0, *alphas_cumprod.double().tolist()]
    betas = [1 - after / before for before, after in itertools.pairwise(table)]
    return {
        "num_train_timesteps": len(betas),
        "trained_betas": betas,
        "prediction_type": prediction_type,
        "rescale_betas_zero_snr": False,
    }


def is_plain_euler(scheduler: Any) -> bool:
    """Whether this is an EulerDiscreteScheduler with the steps of DDIM: the sigmas of training steps, then 0."""
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

    An Euler step in x / alpha is the DDIM step. EulerDiscreteScheduler starts from noise of size sqrt(sigma_max^2 + 1)
    if its spacing is leading. Otherwise it starts from noise of size sigma_max, so that the first x_t is sigma(t)
    noise. Raises ValueError if the scheduler's steps do not end where it calls the network next, or if they fall
    between training steps."""
    total = scheduler.config.num_train_timesteps
    scheduler.set_timesteps(num_steps)
    steps = scheduler.timesteps.tolist()
    name, spacing = type(scheduler).__name__, scheduler.config.timestep_spacing
    if any(step != int(step) or not 0 <= step < total for step in steps):
        raise ValueError(
            f"{num_steps} steps with timestep_spacing {spacing} are not whole steps below {total}: the first is "
            f"{steps[0]}; choose another number of steps"
        )
    if is_plain_euler(scheduler):
        sigma = float(scheduler.sigmas[0])
        scale, final = 1.0 if spacing == "leading" else sigma / math.hypot(sigma, 1), 0.0
    else:
        if scheduler.config.clip_sample or scheduler.config.thresholding:
            raise ValueError(
                f"{name} clips its clean predictions, which destroys latents; set clip_sample and thresholding to "
                "false in scheduler/scheduler_config.json"
            )
        targets = [step - total // num_steps for step in steps]
        for target, after in zip(targets, steps[1:], strict=False):
            if target != after:
                raise ValueError(
                    f"{name} with timestep_spacing {spacing} steps to {target} and then calls the network at {after}; "
                    f"choose a number of steps that divides {total}, or timestep_spacing leading or trailing"
                )
        ends_clean = targets[-1] < 0 and scheduler.config.set_alpha_to_one
        scale, final = 1.0, 0.0 if ends_clean else (max(targets[-1], 0) + 1) / total
    return TeacherPolicy(
        tuple((int(step) + 1) / total for step in steps), "ode", initial_scale=scale, final_level=final
    )
