"""Step lists as parameters of stock diffusers schedulers, so that plain diffusers samples a student as it was
trained."""

import itertools
import math
from typing import Any

from scipy.optimize import brentq

from fastgen.rollout import RolloutPolicy

TOLERANCE = 1e-6


def flow_match_sigmas(num_steps: int, config: dict[str, Any]) -> list[float]:
    """The sigmas FlowMatchEulerDiscreteScheduler(**config) uses for num_steps, without the final 0."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(num_steps)
    return scheduler.sigmas[:-1].tolist()


def flow_match_config(policy: RolloutPolicy) -> dict[str, Any]:
    """Parameters of FlowMatchEulerDiscreteScheduler for which num_inference_steps = K gives exactly the policy's list.

    The scheduler takes K values u_i from 1 down to sigma_min(shift), evenly, shifts them, sigma = shift u / (1 +
    (shift - 1) u), and stretches 1 - sigma linearly so that the last one is shift_terminal. With the end points right,
    `shift` is the one number left, and it is solved for; every list of the form sigma = a u' / (1 + (a - 1) u'), u' =
    1, (K-1)/K, ..., 1/K, is held exactly. A told time becomes num_train_timesteps, as the network is given sigma *
    num_train_timesteps. Raises ValueError if the list cannot be held to 1e-6."""
    times = policy.timesteps
    config: dict[str, Any] = {"num_train_timesteps": 1000, "shift": 1.0, "shift_terminal": None}
    config["stochastic_sampling"] = policy.transition == "renoise"
    if abs(times[0] - 1) > TOLERANCE:
        raise ValueError(
            f"timesteps must start at 1.0 to be exported, got {times[0]}: the stock scheduler's first sigma is 1"
        )
    if len(times) == 1:
        told = 1000 * (policy.told_time or 1.0)
        if abs(told - round(told)) > 1e-9 or told < 1:
            raise ValueError(f"told_time must be a multiple of 0.001 to be exported, got {policy.told_time}")
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
