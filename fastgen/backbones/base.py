"""What a model family has to provide."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastgen.batch import Conditioning
from fastgen.denoiser import Denoiser
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import Schedule

Output = Literal["pixels", "points"]


class BackboneConfig(ABC):
    """The recipe's `backbone:` section; subclasses are frozen pydantic dataclasses."""

    name: str

    @abstractmethod
    def check(self) -> None:
        """Raises ValueError if what the section names is not there. Loads no weights."""

    @abstractmethod
    def check_export(self, policy: RolloutPolicy) -> None:
        """Raises ValueError if the exported folder could not hold this sampler. Loads no weights."""

    @abstractmethod
    def build(self, device: torch.device, dtype: torch.dtype, seed: int) -> "Backbone":
        """The backbone; weights load when they are first needed."""


class Backbone(ABC):
    """A pretrained pipeline: networks by role, prompts and images to tensors and back, and export."""

    config: Any

    output: Output  # what decode returns: pixels [B, 3, H, W] in [0, 1] or points [B, D]
    schedule: Schedule
    latent_shape: tuple[int, ...]
    image_size: int | None  # pixels of a side, for images to be read at; None for points
    time_dim: int  # width of the time embedding, for extra inputs
    device: torch.device
    dtype: torch.dtype

    @abstractmethod
    def make(self, role: str) -> Denoiser:
        """A new module with the pretrained weights. role: student, teacher, fake_score, or an objective's own name."""

    def load(self, role: str) -> Denoiser:
        """The same, the teacher frozen and in evaluation mode, the others trainable."""
        trained = role != "teacher"
        return self.make(role).requires_grad_(trained).train(trained)

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of batch size len(prompts); the empty prompt is the unconditional one."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Data to normalised latents (the space x_t lives in)."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents to pixels [B, 3, H, W] in [0, 1], or to points [B, D]."""

    @abstractmethod
    def load_exported(self, folder: Path) -> Denoiser:
        """The network that save_pipeline wrote into this folder, frozen and in evaluation mode."""

    @abstractmethod
    def teacher_policy(self, num_steps: int) -> RolloutPolicy:
        """The timesteps at which the stock scheduler calls the teacher for this many steps, as an ode policy."""

    @abstractmethod
    def save_pipeline(self, student: Denoiser, policy: RolloutPolicy, folder: Path) -> None:
        """Writes a folder that loads and samples without this package where the family has a public pipeline."""
