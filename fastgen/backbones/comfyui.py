"""What ComfyUI has to be told to sample a student as it was trained: a sampler by name, and its sigmas."""

from dataclasses import dataclass
from typing import Any

import torch

from fastgen.rollout import RolloutPolicy
from fastgen.schedule import VPSchedule

# the backbones that `fastgen export --form` writes for it
FAMILIES = ("sd", "sd3", "flux", "flux2", "qwen_image", "z_image", "wan")
SAMPLERS = {"renoise": "lcm", "ode": "euler"}  # our transitions, which are these samplers at cfg 1
STEPS = 1000


@dataclass(frozen=True)
class Sampling:
    """sigmas: what ComfyUI calls the noise level, from first to last, with 0 at the end. It is t for flow matching,
    and sigma / alpha for a variance-preserving diffusion."""

    sampler: str
    sigmas: tuple[float, ...]

    @property
    def text(self) -> str:
        """As the node ManualSigmas reads them, which knows no exponents."""
        return ", ".join(f"{sigma:.8f}".rstrip("0").rstrip(".") for sigma in self.sigmas)


def comfyui_sampling(backbone: Any, policy: RolloutPolicy) -> Sampling:
    """Raises ValueError, in words, if no stock sampler of ComfyUI does what the policy says."""
    if policy.transition not in SAMPLERS:
        raise ValueError(f"ComfyUI has no sampler whose steps are transition: {policy.transition}")
    if policy.conditioning_time is not None:
        raise ValueError("ComfyUI tells the network the level of its input, and this student is told another one")
    if policy.timesteps[0] < 1:
        raise ValueError(
            f"this student starts at level {policy.timesteps[0]} from noise of full size, and ComfyUI starts there "
            "from noise of the size that belongs to that level"
        )
    schedule = backbone.schedule
    if not isinstance(schedule, VPSchedule):
        return Sampling(SAMPLERS[policy.transition], (*policy.timesteps, 0.0))
    levels = torch.arange(1, STEPS + 1) / STEPS
    noise = sigma_over_alpha(schedule, levels)
    if len(schedule.table) != STEPS + 1 or not torch.allclose(noise, stable_diffusion_sigmas(), rtol=1e-3):
        raise ValueError("ComfyUI knows the noise schedule of Stable Diffusion, and this pipeline has another one")
    sigmas = sigma_over_alpha(schedule, torch.tensor(policy.timesteps))
    return Sampling(SAMPLERS[policy.transition], (*sigmas.tolist(), 0.0))


def sigma_over_alpha(schedule: VPSchedule, levels: torch.Tensor) -> torch.Tensor:
    levels = levels.double()
    return (schedule.sigma(levels) / schedule.alpha(levels)).double()


def stable_diffusion_sigmas() -> torch.Tensor:
    """[1000], increasing. beta_i is the square of what rises linearly from sqrt(0.00085) to sqrt(0.012)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64) ** 2
    left = (1 - betas).cumprod(0)
    return ((1 - left) / left).sqrt()
