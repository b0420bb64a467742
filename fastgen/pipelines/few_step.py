"""diffusers components for students that stock ones cannot represent: a scheduler with CPS transitions, one that says
how a video is made chunk by chunk, and a transformer made of several experts.

An export that contains one of them names this module in its model_index.json. diffusers does not import the module
itself, and loads the component only if it has been imported before:

    import fastgen.pipelines.few_step
    pipeline = DiffusionPipeline.from_pretrained(folder)
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from fastgen.rollout import RolloutPolicy


class FlowMatchCPSScheduler(SchedulerMixin, ConfigMixin):
    """CPS sampling of a flow-matching network along a stored list of noise levels, with one call per level.

        x' = (1 - s') x0 + s' (cos(eta pi / 2) noise_hat + sin(eta pi / 2) fresh)               (arXiv 2605.26108)

    The velocity v gives x0 = x - s v and noise_hat = x + (1 - s) v. The last step goes to level 0.

    lowered: TCD's step instead, for a flow map (CTM's gamma sampler): an Euler step to r = (1 - eta) s', then fresh
    noise up to s',

        x' = k (x - (s - r) v) + sqrt(s'^2 - k^2 r^2) fresh,    k = (1 - s') / (1 - r)

    levels: decreasing in (0, 1]; any such list is stored exactly. eta: between 0 (Euler) and 1 (renoising). any_step:
    for a flow map, which can take other numbers of steps on the same grid (`RolloutPolicy.with_steps`). step_counts:
    the numbers of steps that another student was trained for."""

    order = 1

    @register_to_config
    def __init__(
        self,
        levels: Sequence[float] = (1.0,),
        eta: float = 0.9,
        num_train_timesteps: int = 1000,
        any_step: bool = False,
        step_counts: Sequence[int] = (),
        lowered: bool = False,
    ):
        self.set_timesteps(len(levels))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """sigmas, mu: what pipelines like FLUX's give every scheduler for their number of steps; only the number
        counts, because the stored levels are those that the student was trained at. Raises ValueError for a number of
        steps that the student was not trained for."""
        if num_inference_steps is None:
            num_inference_steps = len(self.config.levels) if sigmas is None else len(sigmas)
        levels = self.config.levels
        any_step, counts = self.config.any_step, tuple(self.config.step_counts)
        if any_step or num_inference_steps in counts:
            policy = RolloutPolicy(tuple(levels), "ode", two_time=any_step, step_counts=counts)
            levels = policy.with_steps(num_inference_steps).timesteps
        elif num_inference_steps != len(levels):
            raise ValueError(
                f"this student has {' or '.join(map(str, counts or (len(levels),)))} steps, at {list(levels)}; set "
                f"num_inference_steps to that, got {num_inference_steps}"
            )
        self.sigmas = torch.tensor([*levels, 0.0], dtype=torch.float32, device=device)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        self.num_inference_steps = num_inference_steps
        self.set_begin_index(0)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Sets the index of the first step. Pipelines call this."""
        self._step_index = begin_index

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Steps from one level to the next. Call it once per timestep, in order. Computes in float32."""
        sigma, sigma_next = self.sigmas[self._step_index], self.sigmas[self._step_index + 1]
        self._step_index += 1
        x, v = sample.float(), model_output.float()
        fresh = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        if self.config.lowered:
            r = (1 - self.config.eta) * sigma_next
            kept = (1 - sigma_next) / (1 - r)
            x_next = kept * (x - (sigma - r) * v) + (sigma_next**2 - (kept * r) ** 2).sqrt() * fresh
            x_next = x_next.to(model_output.dtype)
            return SchedulerOutput(prev_sample=x_next) if return_dict else (x_next,)
        angle = self.config.eta * math.pi / 2
        noise = math.cos(angle) * (x + (1 - sigma) * v) + math.sin(angle) * fresh
        x_next = ((1 - sigma_next) * (x - sigma * v) + sigma_next * noise).to(model_output.dtype)
        return SchedulerOutput(prev_sample=x_next) if return_dict else (x_next,)


class ChunkScheduler(SchedulerMixin, ConfigMixin):
    """Stores how a causal student makes a video chunk by chunk, for `fastgen.pipelines.streaming`. It takes no steps
    itself, so that a stock pipeline refuses such a student instead of sampling it with attention in both directions.

    policy: a `RolloutPolicy` with chunks, as a dict. height, width, num_frames, fps, max_sequence_length: of training,
    and the defaults of the pipeline. actions, sound: those that it knows (`streaming.actions.Actions`,
    `streaming.sound.Sound`), as dicts."""

    order = 1

    @register_to_config
    def __init__(
        self,
        policy: dict[str, Any],
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        fps: int = 16,
        max_sequence_length: int = 512,
        actions: dict[str, Any] | None = None,
        sound: dict[str, Any] | None = None,
    ):
        pass

    def set_timesteps(self, *_: Any, **__: Any) -> None:
        """Raises ValueError."""
        raise ValueError(
            "this student makes a video chunk by chunk, which the stock pipeline cannot do; load it with "
            "fastgen.pipelines.streaming.StreamingWanPipeline"
        )


class SD3Experts(SD3Transformer2DModel):
    """SD3 transformers, each for its own range of noise levels, as in `fastgen.modules.experts.Experts`: expert 0 for
    t >= boundaries[0], expert i for boundaries[i] <= t < boundaries[i - 1], the last one for t below all boundaries.

    It is called like a single SD3Transformer2DModel, so that StableDiffusion3Pipeline works unchanged. The other
    arguments are those of each expert."""

    @register_to_config
    def __init__(
        self,
        boundaries: Sequence[float] = (0.5,),
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: Sequence[int] = (),
        qk_norm: str | None = None,
    ):
        ModelMixin.__init__(self)
        one = {k: v for k, v in self.config.items() if k != "boundaries" and not k.startswith("_")}
        self.experts = nn.ModuleList(SD3Transformer2DModel(**one) for _ in range(len(boundaries) + 1))

    @classmethod
    def of(cls, networks: Sequence[SD3Transformer2DModel], boundaries: Sequence[float]) -> "SD3Experts":
        """Joins the given networks, from high noise to low, without copying them."""
        with torch.device("meta"):
            joined = cls.from_config({**networks[0].config, "boundaries": list(boundaries)})
        joined.experts = nn.ModuleList(networks)
        return joined

    def forward(self, hidden_states: Tensor, *args: Any, timestep: Tensor, **kwargs: Any) -> Any:
        """The forward of the expert chosen by timestep [B] = 1000 t. Raises ValueError if the rows need several."""
        index = torch.stack([timestep < 1000 * b for b in self.config.boundaries]).sum(0)
        if bool((index != index[0]).any()):
            raise ValueError(f"one call needs levels of one expert; the boundaries are {list(self.config.boundaries)}")
        return self.experts[int(index[0])](hidden_states, *args, timestep=timestep, **kwargs)
