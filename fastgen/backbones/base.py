"""What a model family has to provide."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastgen.backbones.given import Control
from fastgen.batch import Conditioning
from fastgen.denoiser import Denoiser
from fastgen.modules.kept_blocks import Kept
from fastgen.modules.lora import LoraConfig, LoraDenoiser, SharedBase
from fastgen.modules.sharding import WeightMap
from fastgen.policy import InnerFlow, SegmentFlow
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import Schedule
from fastgen.streaming.schedule import ChunkSchedule

# What decode returns: pixels [B, 3, H, W] or frames [B, F, 3, H, W] in [0, 1], or points [B, D].
Output = Literal["pixels", "frames", "points"]


@dataclass(frozen=True)
class RoleOptions:
    """How a run's networks are made.

    adapters: role -> its LoRA adapter, on a base that these roles share with the teacher. Other roles have whole
    networks.
    frozen_dtype: dtype of the teacher or of the shared base; None means the backbone's own dtype.
    deferred: whether networks are made without their weights, which are then read after sharding.
    kept: role -> the blocks that its network keeps (`BackboneConfig.kept_blocks`); other roles have all.
    heads: role -> the number of attention heads that its network keeps; other roles have all."""

    adapters: Mapping[str, LoraConfig] = field(default_factory=dict)
    frozen_dtype: torch.dtype | None = None
    deferred: bool = False
    kept: Mapping[str, Kept] = field(default_factory=dict)
    heads: Mapping[str, int] = field(default_factory=dict)


DEFAULT_ROLES = RoleOptions()


class BackboneConfig(ABC):
    """The recipe's `backbone:` section; subclasses are frozen pydantic dataclasses."""

    name: str
    output: ClassVar[Output]
    can_checkpoint: ClassVar[bool] = True  # whether its networks can recompute activations in the backward pass
    flow_matching: ClassVar[bool] = True  # whether x_t = (1 - t) x0 + t noise; else another noise schedule
    encodes_data: ClassVar[bool] = True  # whether real data have all that its latents hold
    has_features: ClassVar[bool] = True  # whether its networks have features for a discriminator to read
    has_exact_law: ClassVar[bool] = False  # whether the teacher is a formula, whose samples and scores are exact
    takes_image: ClassVar[bool] = False  # whether every sample is made from a given image, besides its prompt

    takes_prompts: ClassVar[bool] = True  # whether its networks are told anything of a prompt
    takes_added_inputs: ClassVar[bool] = True  # whether inputs can be added to its networks

    @property
    def takes_control(self) -> bool:
        """Whether the given image is instead a control video, with its mask and reference pictures."""
        return False

    @property
    def given(self) -> frozenset[str]:
        """What data give, besides prompts, for every sample to be made from: images, controls, sound, or nothing."""
        return frozenset({"controls" if self.takes_control else "images"} if self.takes_image else ())

    @property
    def takes_given(self) -> bool:
        """Whether samples are made from something besides their prompts."""
        return bool(self.given)

    def with_control(self, references: int) -> "BackboneConfig":
        """This section for samples that are made from control videos with this number of reference pictures."""
        raise ValueError(f"backbone {self.name} takes no control videos")

    @property
    def num_dims(self) -> int | None:
        """The number of coordinates of a point; None for pictures and videos."""
        return None

    @abstractmethod
    def check(self) -> None:
        """Raises ValueError if something that the section names does not exist. Loads no weights."""

    @abstractmethod
    def check_export(self, policy: RolloutPolicy) -> None:
        """Raises ValueError if an exported folder cannot store this sampler. Loads no weights."""

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises ValueError for a prompt that the pipeline does not know, where it does not take any text."""
        return None

    @abstractmethod
    def build(
        self, device: torch.device, dtype: torch.dtype, seed: int, roles: RoleOptions = DEFAULT_ROLES
    ) -> "Backbone":
        """The backbone. Weights load when they are first needed. dtype: of everything, except frozen networks if
        `roles` gives them another dtype."""

    def check_start(self, folder: Path) -> None:
        """Raises ValueError if a student cannot take its weights from this folder, which has a model_index.json and is
        no export of fastgen: its networks must be those of this pipeline. Loads no weights."""
        raise ValueError(f"{folder} is a diffusers pipeline, and backbone {self.name} loads none")

    def own_boundaries(self) -> tuple[float, ...] | None:
        """The levels between the experts of this pipeline: () if it has one network, None if that is not known before
        it is loaded."""
        return ()

    def check_experts(self, boundaries: Sequence[float]) -> None:
        """Raises ValueError if an export cannot store a student whose experts are copies of this pipeline's single
        network. Loads no weights."""
        raise ValueError(f"backbone {self.name} exports a single network, no experts")

    def check_chunks(self, policy: RolloutPolicy) -> None:
        """Raises ValueError if a student of this pipeline cannot work chunk by chunk, as `policy.chunks` says. Loads
        no weights."""
        raise ValueError(f"backbone {self.name} has no causal student; leave out rollout.chunks")

    def check_mask(self, chunks: ChunkSchedule) -> None:
        """Raises ValueError if one call on whole videos cannot show each chunk what it sees. Loads no weights."""
        return None

    @property
    def kept_blocks(self) -> Kept:
        """The blocks of the pretrained network that the student has; {} for all of them."""
        return {}

    @property
    def kept_heads(self) -> int | None:
        """The number of attention heads of the pretrained network that the student has; None for all of them."""
        return None

    def check_inner(self, flow: InnerFlow) -> None:
        """Raises ValueError if the student's network cannot have this inner flow (`RolloutPolicy.inner`). Loads no
        weights."""
        raise ValueError(
            f"backbone {self.name} has no student with an inner flow; leave out rollout.inner, or use one of the "
            "backbones sd3, wan and gaussian_mixture"
        )

    def check_segment(self, flow: SegmentFlow) -> None:
        """Raises ValueError if the student's network cannot predict segments (`RolloutPolicy.segment`). Loads no
        weights."""
        raise ValueError(
            f"backbone {self.name} has no student that predicts segments; leave out rollout.segment, or use one of "
            "the backbones sd3 and gaussian_mixture"
        )

    def unloaded(self) -> "BackboneConfig":
        """The section in a form for planning: its sizes can be read without weights and without network access. Raises
        ValueError if they are not known."""
        return self


def check_head(flow: InnerFlow, layers: int) -> None:
    """Raises ValueError unless something is left of this number of blocks for the trunk."""
    if flow.blocks >= layers:
        raise ValueError(
            f"inner.blocks: the head has {flow.blocks} of the network's {layers} blocks, and none is left for the "
            f"trunk; give at most {layers - 1}"
        )


class Backbone(ABC):
    """A pretrained pipeline: makes networks by role, converts prompts and images to tensors and back, and exports."""

    schedule: Schedule
    latent_shape: tuple[int, ...]
    image_size: int | None  # side in pixels at which images are read; None for points and frames
    fps: int | None = None  # frames per second of written videos; None for points and pixels
    time_dim: int  # width of the time embedding, for extra inputs

    lora_targets: ClassVar[tuple[str, ...]]  # default name endings of the layers that get adapters
    teacher_is_base: ClassVar[bool] = True  # whether the teacher is the network that adapters share
    law: Any = None  # the exact law of the data, where it is known
    stores_adapters: ClassVar[bool] = True  # whether an export may be an adapter for the original pipeline

    def __init__(self, config: Any, device: torch.device, dtype: torch.dtype, roles: RoleOptions = DEFAULT_ROLES):
        self.config, self.device, self.dtype, self.roles = config, device, dtype, roles
        self.shared: SharedBase | None = None  # the base that adapters share, once one is loaded

    def time_dim_of(self, denoiser: Denoiser) -> int:
        """The width of the time embedding of this denoiser, whose network may be narrower than the pretrained one."""
        return self.time_dim

    @property
    def output(self) -> Output:
        return self.config.output

    @property
    def takes_image(self) -> bool:
        return self.config.takes_image

    @property
    def takes_given(self) -> bool:
        return self.config.takes_given

    @property
    def picture_size(self) -> tuple[int, int] | None:
        """Height and width in pixels at which pictures are read: the given images, if the backbone takes such, and
        else real data. None if it has no use for pictures."""
        return None if self.image_size is None else (self.image_size, self.image_size)

    def latent_shape_of(self, size: tuple[int, int]) -> tuple[int, ...]:
        """The shape of the latents of pictures of another size, (height, width). Raises ValueError if the networks do
        not take it."""
        raise ValueError(f"the networks of backbone {self.config.name} take pictures of one size")

    def told_size(self, cond: Conditioning, size: tuple[int, int]) -> Conditioning:
        """The conditioning of prompts for pictures of another size, where networks are told the size."""
        return cond

    @abstractmethod
    def make(self, role: str, dtype: torch.dtype) -> Denoiser:
        """A new module with the pretrained weights. role: student, teacher, fake_score, or an objective's own name."""

    def guidance_told(self, role: str) -> float | None:
        """The guidance scale that this role's network is told, where the pipeline was distilled from guidance; None
        where its networks are told none."""
        return None

    def load(self, role: str) -> Denoiser:
        """Like `make`, with the teacher frozen and in evaluation mode, and the other roles trainable. A role with an
        adapter is a view of one shared base instead, and so is the teacher if any role has an adapter. Each is told
        its role's guidance scale."""
        denoiser = self.load_untold(role)
        denoiser.tell(self.guidance_told(role))
        return denoiser

    def load_untold(self, role: str) -> Denoiser:
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
        """A denoiser to read sizes from. If the family allows it, its parameters take no memory."""
        return self.make("sizes", self.dtype)

    def weights(self) -> WeightMap:
        """Where the pretrained weights of a denoiser's parameters are stored, for networks made without them."""
        return {}

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype in which the pretrained network is stored."""
        return torch.float32

    def warnings(self) -> list[str]:
        """What the user should know about this pipeline before training starts."""
        return []

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of batch size len(prompts); the empty prompt is the unconditional one."""

    @property
    def negative_prompt(self) -> str:
        """The prompt that guidance leads away from."""
        return ""

    def encode_image(self, pixels: Tensor) -> Conditioning:
        """What networks are told of a given image [3, H, W] in [0, 1] of `picture_size`: one row, whose keys begin
        with image_."""
        raise ValueError(f"backbone {self.config.name} takes no images")

    def encode_control(self, control: Control) -> Conditioning:
        """What networks are told of a given control video, as `encode_image` of an image. Its frames have the size of
        the backbone's videos."""
        raise ValueError(f"backbone {self.config.name} takes no control videos")

    def encode_sound(self, sound: Tensor) -> Conditioning:
        """What networks are told of a given sound [moments, bins] (`streaming.sound`): one row."""
        raise ValueError(f"backbone {self.config.name} takes no sound")

    def encode_images(self, pictures: Sequence[Tensor]) -> Conditioning:
        """One row for each picture. Each is encoded alone, so that its bits do not depend on the others."""
        return Conditioning.cat([self.encode_image(pixels) for pixels in pictures])

    def encode_given(self, prompts: Sequence[str], images: Conditioning) -> Conditioning:
        """The conditioning of prompts with the given images, whose rows are those of `encode_images`."""
        return Conditioning({**self.encode_prompts(prompts), **images})

    def encode_both(
        self, prompts: Sequence[str], images: Conditioning | None = None
    ) -> tuple[Conditioning, Conditioning]:
        """What guidance leads to and away from: the conditioning of these prompts, and that of the negative prompt in
        the same batch size. images: one row for each prompt of what samples are made from (`encode_images`,
        `encode_sound`); both halves are given it. Raises ValueError unless there are such rows exactly where the
        backbone takes them."""
        if (images is not None) != self.takes_given:
            raise ValueError(
                f"backbone {self.config.name} makes every sample from given {', '.join(self.config.given)}: give one "
                "for each prompt"
                if self.takes_given
                else f"backbone {self.config.name} takes no images"
            )
        texts = [*prompts, *[self.negative_prompt] * len(prompts)]
        if images is None:
            both = self.encode_prompts(texts)
        else:
            both = self.encode_given(texts, Conditioning.cat([images, images]).to(self.device))
        return both.select(slice(0, len(prompts))), both.select(slice(len(prompts), None))

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Data to normalised latents (the space x_t lives in)."""

    @abstractmethod
    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        """Normalised latents to what `output` says: pixels or frames in [0, 1], or points. Gradient flows to latents.
        clamp: False leaves out the clamp, which has no gradient outside [0, 1]; pixels may then be outside."""

    def restart(self, latents: Tensor) -> Tensor:
        """The last picture of a video [B, F, ...], as the first latent frame [B, 1, ...] of a video that goes on from
        there. The first latent frame of a video VAE stands for one picture, and later ones for several."""
        return latents[:, -1:]

    def with_sound(self, latents: Tensor, sound: Tensor) -> Tensor:
        """The latents of videos together with those of their sound [B, moments, bins] (`streaming.sound`). Raises
        ValueError if the networks make no sound."""
        raise ValueError(f"the networks of backbone {self.config.name} make no sound")

    def sound_of(self, latents: Tensor) -> Tensor | None:
        """The sound that latents hold beside the pictures: waveforms [B, channels, samples] in [-1, 1], of
        `sound_rate` samples per second, or, where that is None, moments [B, moments, bins] (`streaming.sound`). None
        if the networks make none."""
        return None

    @property
    def sound_rate(self) -> int | None:
        """Samples per second of the waveforms of `sound_of`; None if they are none."""
        return None

    @abstractmethod
    def load_exported(self, folder: Path) -> Denoiser:
        """The network that save_pipeline wrote into this folder, frozen and in evaluation mode."""

    def load_start(self, folder: Path) -> Denoiser:
        """The network of an export, or of a folder that `check_start` lets pass, to start a student from. Raises
        WeightsError if its settings are not those of this pipeline's network."""
        return self.load_exported(folder)

    @abstractmethod
    def teacher_policy(self, num_steps: int) -> RolloutPolicy:
        """The timesteps at which the stock scheduler calls the teacher for this many steps, as an ode policy."""

    @property
    def library(self) -> str:
        """The package that loads its exports, by the name that model cards use."""
        return "fastgen"

    def plain_call(self, policy: RolloutPolicy, adapter: bool) -> str:
        """What a call with a prompt alone would do instead of what the student was trained for, in Markdown; "" if
        that is the same. adapter: whether the export is a LoRA adapter."""
        return ""

    @abstractmethod
    def usage(self, policy: RolloutPolicy, folder: Path, adapter: bool) -> str:
        """Markdown for the model card: how the student exported to `folder` is loaded and called. adapter: whether the
        export is a LoRA adapter."""

    @abstractmethod
    def save_pipeline(self, student: Denoiser, policy: RolloutPolicy, folder: Path) -> None:
        """Writes a folder. If the family has a public pipeline, the folder loads and samples without this package."""

    def save_values(
        self,
        student: Denoiser,
        values: Iterable[tuple[str, Tensor]],
        policy: RolloutPolicy,
        folder: Path,
        whole: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Writes the folder of a student whose values come one at a time, from a checkpoint or from other processes.
        Here they are copied into the student, which is small; pipelines write them as they come.

        values: name in `student.state_dict()` -> tensor. whole: an adapter is added into the weights of its base.
        dtype: of the written networks, by default that of the pretrained ones."""
        own = student.state_dict()
        for name, value in values:
            own[name].copy_(value)
        student = student.merged() if whole else student
        self.save_pipeline(student if dtype is None else student.to(dtype), policy, folder)
