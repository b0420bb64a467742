"""What a model family has to provide."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastgen.batch import Conditioning
from fastgen.denoiser import Denoiser
from fastgen.modules.lora import LoraConfig, LoraDenoiser, SharedBase
from fastgen.modules.sharding import WeightMap
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import Schedule

# What decode returns: pixels [B, 3, H, W] or frames [B, F, 3, H, W] in [0, 1], or points [B, D].
Output = Literal["pixels", "frames", "points"]


@dataclass(frozen=True)
class RoleOptions:
    """How a run's networks are made.

    adapters: role -> its LoRA adapter, on a base that these roles share with the teacher; other roles are whole.
    frozen_dtype: of the teacher or the shared base; None is the backbone's own dtype.
    deferred: networks are made without their weights, which are read when the networks have been sharded."""

    adapters: Mapping[str, LoraConfig] = field(default_factory=dict)
    frozen_dtype: torch.dtype | None = None
    deferred: bool = False


DEFAULT_ROLES = RoleOptions()


class BackboneConfig(ABC):
    """The recipe's `backbone:` section; subclasses are frozen pydantic dataclasses."""

    name: str
    output: ClassVar[Output]
    can_checkpoint: ClassVar[bool] = True  # whether its networks can recompute activations in the backward pass
    flow_matching: ClassVar[bool] = True  # whether x_t = (1 - t) x0 + t noise; else another noise schedule
    has_exact_law: ClassVar[bool] = False  # whether the teacher is a formula, whose samples and scores are exact

    @property
    def num_dims(self) -> int | None:
        """The number of coordinates of a point; None for pictures and videos."""
        return None

    @abstractmethod
    def check(self) -> None:
        """Raises ValueError if what the section names is not there. Loads no weights."""

    @abstractmethod
    def check_export(self, policy: RolloutPolicy) -> None:
        """Raises ValueError if the exported folder could not hold this sampler. Loads no weights."""

    @abstractmethod
    def build(
        self, device: torch.device, dtype: torch.dtype, seed: int, roles: RoleOptions = DEFAULT_ROLES
    ) -> "Backbone":
        """The backbone; weights load when they are first needed. dtype: of everything but frozen networks, if `roles`
        gives those another."""

    def own_boundaries(self) -> tuple[float, ...] | None:
        """Levels between the experts of this pipeline; () where it has one network, None where that is only known when
        it loads."""
        return ()

    def check_experts(self, boundaries: Sequence[float]) -> None:
        """Raises ValueError if an export could not hold a student of several experts, made from copies of this
        pipeline's one network. Loads no weights."""
        raise ValueError(f"backbone {self.name} exports a single network, no experts")

    def unloaded(self) -> "BackboneConfig":
        """The section for planning: its sizes are known without weights and without the network. Raises ValueError if
        they are not."""
        return self


class Backbone(ABC):
    """A pretrained pipeline: networks by role, prompts and images to tensors and back, and export."""

    schedule: Schedule
    latent_shape: tuple[int, ...]
    image_size: int | None  # pixels of a side, for images to be read at; None for points and frames
    fps: int | None = None  # frames a second, for videos to be written at; None for points and pixels
    time_dim: int  # width of the time embedding, for extra inputs

    lora_targets: ClassVar[tuple[str, ...]]  # endings of the names of the layers adapters go on by default
    teacher_is_base: ClassVar[bool] = True  # whether the teacher is the network that adapters share
    mixture: Any = None  # the exact law of the data, where it is known
    stores_adapters: ClassVar[bool] = True  # whether an export may be an adapter for the original pipeline

    def __init__(self, config: Any, device: torch.device, dtype: torch.dtype, roles: RoleOptions = DEFAULT_ROLES):
        self.config, self.device, self.dtype, self.roles = config, device, dtype, roles
        self.shared: SharedBase | None = None  # what adapters share, once one has been loaded

    @property
    def output(self) -> Output:
        return self.config.output

    @abstractmethod
    def make(self, role: str, dtype: torch.dtype) -> Denoiser:
        """A new module with the pretrained weights. role: student, teacher, fake_score, or an objective's own name."""

    def load(self, role: str) -> Denoiser:
        """The same, the teacher frozen and in evaluation mode, the others trainable; or, for a role with an adapter
        (and then the teacher), a view of the one shared base."""
        frozen_dtype, adapters = self.roles.frozen_dtype or self.dtype, self.roles.adapters
        is_base = role == "teacher" and self.teacher_is_base and adapters
        if is_base or role in adapters:
            if self.shared is None:
                base = self.make("teacher" if self.teacher_is_base else "base", frozen_dtype)
                self.shared = SharedBase(base, self.lora_targets, self.dtype)
            return LoraDenoiser(self.shared, None) if is_base else self.shared.role(role, adapters[role])
        if role == "teacher":
            return self.make(role, frozen_dtype).requires_grad_(False).eval()
        return self.make(role, self.dtype).requires_grad_(True).train()

    def make_empty(self) -> Denoiser:
        """A denoiser for its sizes alone: without memory for its parameters, where the family can."""
        return self.make("sizes", self.dtype)

    def weights(self) -> WeightMap:
        """Where the pretrained weights of a denoiser's parameters lie, for networks made without them."""
        return {}

    def warnings(self) -> list[str]:
        """What the user should know about this pipeline before it is trained."""
        return []

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of batch size len(prompts); the empty prompt is the unconditional one."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Data to normalised latents (the space x_t lives in)."""

    @abstractmethod
    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        """Normalised latents to what `output` says: pixels or frames in [0, 1], or points. Gradient flows to latents.
        clamp: False leaves out the clamp, which has no gradient outside [0, 1]; pixels may then lie beyond."""

    @abstractmethod
    def load_exported(self, folder: Path) -> Denoiser:
        """The network that save_pipeline wrote into this folder, frozen and in evaluation mode."""

    @abstractmethod
    def teacher_policy(self, num_steps: int) -> RolloutPolicy:
        """The timesteps at which the stock scheduler calls the teacher for this many steps, as an ode policy."""

    @property
    def library(self) -> str:
        """The package that loads its exports, as a model card names it."""
        return "fastgen"

    @abstractmethod
    def usage(self, policy: RolloutPolicy, folder: Path, adapter: bool) -> str:
        """Markdown for the model card: how the student exported to `folder` is loaded and called. adapter: whether the
        export is a LoRA adapter."""

    @abstractmethod
    def save_pipeline(self, student: Denoiser, policy: RolloutPolicy, folder: Path) -> None:
        """Writes a folder that loads and samples without this package where the family has a public pipeline."""
