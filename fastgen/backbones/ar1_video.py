"""The analytic teacher of streaming: AR(1) videos, whose every conditional, flow map and drift is known in closed
form.

A frame is one complex number (two channels), z_k = m + u_k with u_{k+1} = rho u_k + s w_k and rho = damping e^{i
angle}: the prompt says how a frame turns into the next (the angle is the motion) and about which number (the mean is
the content). `ar1_formulas` derives what this implies, `ar1_law` puts it on latents, `ar1_network` is the small
network of students and fake scores, and `ar1_denoisers` puts both behind the contract."""

import cmath
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgen.backbones.ar1_denoisers import AR1Denoiser, FrameDenoiser
from fastgen.backbones.ar1_law import AR1Law
from fastgen.backbones.ar1_network import FrameMap
from fastgen.backbones.base import DEFAULT_ROLES, Backbone, BackboneConfig, Output, RoleOptions
from fastgen.batch import Conditioning
from fastgen.denoiser import Denoiser
from fastgen.registry import MOST_WIDTH
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import FlowSchedule
from fastgen.streaming.schedule import ChunkAttention, ChunkSchedule

WEIGHTS = "model.safetensors"

VIDEOS = """```python
from pathlib import Path

from fastgen.sampling.sampler import load_sampler

videos = load_sampler(Path("path/to/this/folder")).sample(prompts=["0"] * 8, seeds=range(8))
```"""

Complex = float | tuple[float, float]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class AR1VideoConfig(BackboneConfig):
    """damping: |rho|, how much of a frame stays in the next one, for every label.  angles: of rho in radians, the
    motion of each label.  means: the content of each label, a real number or [real, imaginary].  Prompts are the
    labels, "0" to "L-1", and the empty prompt is a label at random. num_frames: of a video.  copies: independent
    videos of the same label in each sample: latents are [num_frames, 2, 1, copies]. memory: how many of the earlier
    frames the networks read; one is enough, unless the context is noisy. knots: noise levels between which their
    coefficients are interpolated. pretrained: what the networks start as. bidirectional: the teacher, which knows
    nothing of earlier chunks. causal: the exact denoiser of each chunk given its past, where teacher forcing ends."""

    damping: Annotated[float, Field(ge=0, lt=1)]
    angles: Annotated[tuple[float, ...], Field(min_length=1)]
    means: Annotated[tuple[Complex, ...], Field(min_length=1)]
    name: Literal["ar1_video"] = "ar1_video"
    output: ClassVar[Output] = "points"
    can_checkpoint: ClassVar[bool] = False
    has_features: ClassVar[bool] = False
    has_exact_law: ClassVar[bool] = True
    num_frames: int = Field(default=7, ge=1, le=64)
    copies: int = Field(default=1, ge=1, le=MOST_WIDTH)
    memory: int = Field(default=1, ge=1, le=64)
    knots: int = Field(default=65, ge=2, le=MOST_WIDTH)
    pretrained: Literal["bidirectional", "causal"] = "bidirectional"

    @model_validator(mode="after")
    def _labels(self) -> "AR1VideoConfig":
        if len(self.angles) != len(self.means):
            raise ValueError(
                f"angles has {len(self.angles)} entries and means has {len(self.means)}; give one of each per label"
            )
        return self

    @property
    def num_dims(self) -> int:
        return self.num_frames * 2 * self.copies

    @property
    def law(self) -> AR1Law:
        rhos = [cmath.rect(self.damping, angle) for angle in self.angles]
        means = [complex(*m) if isinstance(m, tuple) else complex(m) for m in self.means]
        return AR1Law(rhos, means, self.num_frames, self.copies)

    def check(self) -> None:
        """Passes always: nothing outside the recipe is needed."""

    def check_export(self, policy: RolloutPolicy) -> None:
        """Passes always: our own folder format can store any policy."""

    def check_chunks(self, policy: RolloutPolicy) -> None:
        """The frames are whole chunks. There is no attention, and what is seen are frames, not averages of them."""
        assert policy.chunks is not None
        try:
            policy.chunks.split(self.num_frames)
        except ValueError as error:
            raise ValueError(f"chunks: {error}; change backbone.num_frames or the chunks") from None
        if policy.chunks.sink_decay is not None:
            raise ValueError("chunks.sink_decay: the average of two frames is no frame of an ar1_video; leave it out")
        if policy.chunks.linear:
            raise ValueError("chunks.linear: the networks of ar1_video have no attention; leave it out")
        if policy.chunks.recall:
            raise ValueError(
                "chunks.recall fetches frames by where they are seen from, which nothing says of an ar1_video; leave "
                "it out"
            )
        if policy.chunks.order == "rolling":
            raise ValueError(
                "chunks.order: the networks of ar1_video take one level for all frames; rolling has several"
            )
        if policy.chunks.attention != ChunkAttention():
            raise ValueError("chunks.attention: the networks of ar1_video have no attention; leave it out")

    def check_mask(self, chunks: ChunkSchedule) -> None:
        """Its networks are told no positions, so that a sink may move."""
        still = chunks if chunks.slow else replace(chunks, positions="absolute")
        still.check_mask(self.num_frames)

    def build(
        self, device: torch.device, dtype: torch.dtype, seed: int, roles: RoleOptions = DEFAULT_ROLES
    ) -> "AR1Video":
        return AR1Video(self, device, dtype, roles)


class AR1Video(Backbone):
    """The backbone of recipes with `backbone: {name: ar1_video, ...}`. Latents are frames [B, F, 2, 1, copies];
    decoded, they are points [B, F x 2 x copies]."""

    config: AR1VideoConfig
    image_size = None
    stores_adapters = False
    teacher_is_base = False  # the teacher is a formula; the base is a network that computes the same

    def __init__(
        self, config: AR1VideoConfig, device: torch.device, dtype: torch.dtype, roles: RoleOptions = DEFAULT_ROLES
    ):
        super().__init__(config, device, dtype, roles)
        self.law = config.law
        self.schedule = FlowSchedule()
        self.latent_shape = self.law.shape
        self.time_dim = config.knots
        self.lora_targets = tuple(self.network().network.tables)  # type: ignore[misc]

    @property
    def num_classes(self) -> int:
        return self.law.num_labels

    def network(self) -> FrameDenoiser:
        config = self.config
        network = FrameMap(config.num_frames, config.memory, self.law.num_labels + 1, config.knots)
        return FrameDenoiser(network, self.schedule)

    def make(self, role: str, dtype: torch.dtype) -> Denoiser:
        if role == "teacher":
            return AR1Denoiser(self.law, self.schedule)
        denoiser = self.network().to(dtype)
        denoiser.network.set_exact(self.law, causal=self.config.pretrained == "causal")
        return denoiser.to(self.device)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning({"label": self.law.labels_of(prompts).to(self.device)})

    def encode(self, pixels: Tensor) -> Tensor:
        """Points [B, F x 2 x copies] to latents."""
        return pixels.unflatten(1, (-1, *self.latent_shape[1:]))

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        return latents.flatten(1)

    def teacher_policy(self, num_steps: int) -> RolloutPolicy:
        return RolloutPolicy(timesteps=tuple(1 - i / num_steps for i in range(num_steps)), transition="ode")

    def save_pipeline(self, student: Denoiser, policy: RolloutPolicy, folder: Path) -> None:
        """Writes model.safetensors, config.json (the configuration of the law) and, if the student has any,
        inputs.json (the names of its extra inputs)."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {k: v.contiguous().cpu() for k, v in student.network.state_dict().items()}
        save_file(weights, folder / WEIGHTS)
        if policy.inputs:
            (folder / "inputs.json").write_text(json.dumps(policy.inputs) + "\n")
        config = {k: v for k, v in vars(self.config).items() if not k.startswith("_")}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def load_exported(self, folder: Path) -> Denoiser:
        """The student that save_pipeline wrote, frozen."""
        denoiser, inputs = self.network().to(self.dtype), folder / "inputs.json"
        if inputs.is_file():
            denoiser.add_inputs({}, self.time_dim, json.loads(inputs.read_text()))
        denoiser.network.load_state_dict(load_file(folder / WEIGHTS))
        return denoiser.to(self.device, self.dtype).requires_grad_(False).eval()

    def usage(self, policy: RolloutPolicy, folder: Path, adapter: bool) -> str:
        return VIDEOS
