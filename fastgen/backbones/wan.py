"""Wan 2.1 and 2.2 text-to-video: flow matching, a DiT on video tokens, a UMT5 text encoder, a causal video VAE.

Wan 2.1 and Wan 2.2 TI2V-5B have one network. Wan 2.2 A14B has two experts: `transformer` for t >= boundary_ratio and
`transformer_2` below. Latents are [B, F, C, H, W] here and [B, C, F, H, W] inside diffusers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.backbones.base import DEFAULT_ROLES, Output, RoleOptions, check_head
from fastgen.backbones.folder import read_index, read_json, read_scheduler
from fastgen.backbones.pipeline import diffusers_class, read_component, read_network
from fastgen.backbones.pipeline_config import PipelineConfig
from fastgen.backbones.video import Video, latent_grid
from fastgen.backbones.wan_network import WanDenoiser
from fastgen.batch import Conditioning
from fastgen.denoiser import Denoiser
from fastgen.modules.experts import Experts
from fastgen.pipelines.schedulers import check_flow_scheduler, flow_match_scheduler
from fastgen.policy import InnerFlow
from fastgen.registry import MOST_STEPS, MOST_WIDTH
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.video import check_writer
from fastgen.schedule import FlowSchedule
from fastgen.streaming.actions import Actions, add_actions, split_prompt
from fastgen.streaming.causal_wan import check_causal
from fastgen.streaming.schedule import ChunkSchedule
from fastgen.streaming.sound import Sound, Strip, add_sound, by_frame, heard, laid, strip_of

# keys that a streaming export stores
TRAINED = ("height", "width", "num_frames", "fps", "max_sequence_length", "actions", "sound")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class WanConfig(PipelineConfig):
    """height, width: in pixels. num_frames: 4 k + 1. The defaults, 480, 832 and 81, are those of the stock pipeline.
    max_sequence_length: number of UMT5 tokens. fps: frames per second of written videos; Wan 2.1 and A14B are trained
    at 16, TI2V-5B at 24. actions: words after a prompt by which the view moves (`streaming.actions`). sound: a second
    stream, made with the video or given (`streaming.sound`). The pipeline's own network knows neither, so its student
    learns them from videos (teacher_forcing), or from a student that did (context_forcing)."""

    name: Literal["wan"] = "wan"
    height: int = Field(default=480, ge=16, le=MOST_WIDTH, multiple_of=16)
    width: int = Field(default=832, ge=16, le=MOST_WIDTH, multiple_of=16)
    num_frames: int = Field(default=81, ge=1, le=MOST_STEPS)
    max_sequence_length: int = Field(default=512, ge=1, le=512)
    fps: int = Field(default=16, ge=1, le=MOST_STEPS)
    actions: Actions | None = None
    sound: Sound | None = None

    output: ClassVar[Output] = "frames"
    pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline",)

    @property
    def prompt_keys(self) -> tuple[str, ...]:  # type: ignore[override]
        return super().prompt_keys + (() if self.actions is None else ("actions",))

    @property
    def given(self) -> frozenset[str]:
        return super().given | (frozenset({"sound"}) if self.sound is not None and self.sound.given else frozenset())

    @property
    def made_sound(self) -> Sound | None:
        """The sound that its networks make."""
        return None if self.sound is None or self.sound.given else self.sound

    def check(self) -> None:
        """Also raises ValueError for a size, a set of experts or a scheduler that does not fit, and if videos cannot
        be written. For a hub id, only what does not depend on its files is checked here, and the rest when it loads.
        """
        super().check()
        check_writer()
        folder = self.local_folder()
        if folder is None:
            latent_size(self, {}, {})
            return
        find_experts(read_index(folder))
        vae, network = read_json(folder / "vae/config.json"), read_json(folder / "transformer/config.json")
        width = latent_size(self, vae, network)[2]
        if self.sound is not None:
            strip_of(network, width).check(self.sound)
        check_flow_scheduler(read_scheduler(folder))

    def check_prompts(self, prompts: Sequence[str]) -> None:
        if self.actions is not None:
            for prompt in prompts:
                self.actions.listed(prompt)

    def check_export(self, policy: RolloutPolicy) -> None:
        super().check_export(policy)
        if policy.chunks is not None:
            return
        scheduler = flow_match_scheduler(policy)
        for boundary in self.own_boundaries() or ():
            check_boundary(policy, scheduler, boundary)

    def check_chunks(self, policy: RolloutPolicy) -> None:
        """The latent frames are whole chunks, each patch is of one frame, and the text is the only condition."""
        assert policy.chunks is not None
        self.check_parts(policy.chunks)
        folder = self.known_folder()
        if folder is None:
            return
        vae, network = read_json(folder / "vae/config.json"), read_json(folder / "transformer/config.json")
        check_causal(network)
        if policy.chunks.order == "rolling" and self.own_boundaries():
            raise ValueError(
                "chunks.order: rolling makes chunks of several levels in one call, and this pipeline's experts have a "
                "level each; use order: chunk"
            )
        try:
            policy.chunks.split(latent_size(self, vae, network)[0])
        except ValueError as error:
            step = vae.get("scale_factor_temporal", 4)
            raise ValueError(f"chunks: {error}; n latent frames are backbone.num_frames: {step} (n - 1) + 1") from None

    def check_parts(self, chunks: ChunkSchedule) -> None:
        """Raises ValueError for chunks that do not go with the actions and the sound."""
        if chunks.recall and self.actions is None:
            raise ValueError(
                "chunks.recall fetches frames by where they are seen from, which actions say: give backbone.actions, "
                "or leave recall out"
            )
        if self.sound is None:
            return
        if self.sound.sinks and chunks.attention.backend == "sdpa":
            raise ValueError(
                "sound.sinks are merged with attention by its log-sum-exp, which chunks.attention.backend: sdpa "
                "does not give; use auto, or no sinks"
            )
        if self.sound.given and chunks.order == "rolling":
            raise ValueError(
                "chunks.order: rolling sketches chunks beyond the end of a video, for which no sound is given; use "
                "order: chunk"
            )

    def known_folder(self) -> Path | None:
        """The pipeline's folder or, of a well-known hub id, that of its configs; None where none is known yet."""
        try:
            return self.unloaded().local_folder()
        except ValueError:
            return None

    def latent_frames(self) -> int | None:
        """Of its videos; None for a pipeline that is not known yet."""
        folder = self.known_folder()
        if folder is None:
            return None
        vae, network = read_json(folder / "vae/config.json"), read_json(folder / "transformer/config.json")
        return latent_size(self, vae, network)[0]

    def check_mask(self, chunks: ChunkSchedule) -> None:
        if (frames := self.latent_frames()) is not None:
            chunks.check_mask(frames)

    def check_inner(self, flow: InnerFlow) -> None:
        if self.own_boundaries():
            raise ValueError("inner: the inner flow of two experts is not tried; use a pipeline of one network")
        if (folder := self.local_folder()) is not None:
            check_head(flow, read_json(folder / "transformer/config.json").get("num_layers", 40))

    def own_boundaries(self) -> tuple[float, ...] | None:
        folder = self.known_folder()
        if folder is None:
            return None
        boundary = find_experts(read_index(folder))[1]
        return () if boundary is None else (boundary,)

    def check_experts(self, boundaries: Sequence[float]) -> None:
        """The stock pipeline has a place for two experts, transformer and transformer_2, and for boundary_ratio."""
        if len(boundaries) != 1:
            raise ValueError(f"a WanPipeline can store two experts, not {len(boundaries) + 1}")

    def build(self, device: torch.device, dtype: torch.dtype, seed: int, roles: RoleOptions = DEFAULT_ROLES) -> "Wan":
        return Wan(self, device, dtype, roles)


def find_experts(index: Mapping[str, Any]) -> tuple[tuple[str, ...], float | None]:
    """The networks in a WanPipeline's index, from high noise to low, and the boundary between them, if there are two.

    Raises ValueError for a set of networks of which the stock pipeline would not use all."""
    names = tuple(n for n in ("transformer", "transformer_2") if (index.get(n) or [None])[0] is not None)
    boundary = index.get("boundary_ratio")
    if (names, boundary is None) in ((("transformer",), True), (("transformer", "transformer_2"), False)):
        return names, boundary
    raise ValueError(
        f"path: a WanPipeline needs transformer alone, or transformer, transformer_2 and boundary_ratio; this one has "
        f"{', '.join(names) or 'neither'} and boundary_ratio {boundary}"
    )


def latent_size(config: WanConfig, vae: Mapping[str, Any], network: Mapping[str, Any]) -> tuple[int, int, int]:
    """The number of frames, the height and the width of the latents. vae, network: their config.json, in which values
    that are defaults may be missing.

    Raises ValueError for sizes that cannot be divided into the VAE's latents and the network's patches."""
    temporal, spatial = vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)
    return latent_grid(config, temporal, spatial, network.get("patch_size", (1, 2, 2))[1:])


def check_boundary(policy: RolloutPolicy, scheduler: Any, boundary: float) -> None:
    """Raises ValueError if rounding in the exported list of timesteps would move one of them to the other expert."""
    scheduler.set_timesteps(policy.num_steps)
    stored = scheduler.timesteps >= boundary * scheduler.config.num_train_timesteps  # the stock pipeline's rule
    for t, high in zip(policy.timesteps, stored.tolist(), strict=True):
        if (t >= boundary) != high:
            raise ValueError(
                f"timestep {t} is too close to the boundary of the experts, {boundary}, to be exported; "
                "move it by 0.001"
            )


class Wan(Video):
    """The backbone of recipes with `backbone: {name: wan, path: ...}`.

    A folder's own UniPC scheduler is a multi-step method, which our sampler does not have. Instead, the teacher is
    sampled with Euler steps at the same levels. Students are exported with a FlowMatchEulerDiscreteScheduler. The VAE
    itself clamps what it decodes, so that there is no gradient at saturated pixels, whatever `decode` is asked."""

    config: WanConfig
    network_class = "WanTransformer3DModel"
    block_lists: ClassVar[Mapping[str, str]] = {"blocks": "num_layers"}
    width_keys = ("added_kv_proj_dim",)
    vae_class = "AutoencoderKLWan"

    def __init__(
        self, config: WanConfig, device: torch.device, dtype: torch.dtype, roles: RoleOptions = DEFAULT_ROLES
    ):
        super().__init__(config, device, dtype, roles)
        self.schedule = FlowSchedule()

    @property
    def call(self) -> str:  # type: ignore[override]
        config = self.config
        text = "" if config.max_sequence_length == 512 else f" max_sequence_length={config.max_sequence_length},"
        return f"""from diffusers.utils import export_to_video

torch.manual_seed(0)  # the scheduler draws from the global generator, not from `generator=`
video = pipeline(
    "a prompt", {self.call_sizes},{text}
    num_inference_steps={{num_steps}}, guidance_scale=1,
).frames[0]
export_to_video(video, "video.mp4", fps={config.fps})"""

    @property
    def subfolders(self) -> tuple[str, ...]:
        return find_experts(self.components)[0]

    @property
    def boundary(self) -> float | None:
        """The level from which on `transformer` is called, if there are two experts; None for one network."""
        return find_experts(self.components)[1]

    def wrap(self, network: Any) -> WanDenoiser:
        return WanDenoiser(network)

    def join(self, parts: list[Denoiser]) -> Denoiser:
        return parts[0] if self.boundary is None else Experts(parts, (self.boundary,))

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """With a sound that is made, a row of patches more than the pictures have."""
        frames, height, width = latent_size(self.config, self.vae_config, self.network_config)
        more = 0 if self.config.made_sound is None else self.strip.high
        return (frames, self.network_config["out_channels"], height + more, width)

    @property
    def strip(self) -> Strip:
        """The place of the sound."""
        width = latent_size(self.config, self.vae_config, self.network_config)[2]
        return strip_of(self.network_config, width)

    def with_sound(self, latents: Tensor, sound: Tensor) -> Tensor:
        """The state of videos [B, F, C, h, W] with their sound [B, 1 + m (F - 1), bins]."""
        assert self.config.made_sound is not None
        return torch.cat([latents, laid(self.config.made_sound, self.strip, sound.to(latents))], dim=-2)

    def encode_sound(self, sound: Tensor) -> Conditioning:
        """sound [1, F, m, bins] of its moments [1 + m (F - 1), bins], normalised. Raises ValueError for too few."""
        assert self.config.sound is not None
        wanted = self.config.sound.length(self.latent_shape[0])
        if len(sound) < wanted:
            raise ValueError(f"a sound has {len(sound)} moments, and a video of this backbone {wanted}")
        return Conditioning({"sound": by_frame(self.config.sound, sound[None, :wanted].float())})

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        """The pictures; the sound is what `sound_of` makes of the same latents."""
        if self.config.made_sound is not None:
            latents = latents[..., : -self.strip.high, :]
        return super().decode(latents, clamp)

    def sound_of(self, latents: Tensor) -> Tensor | None:
        """The sound [B, 1 + m (F - 1), bins], if one is made."""
        sound = self.config.made_sound
        return None if sound is None else heard(sound, self.strip, latents)

    @cached_property
    def vae(self) -> Any:
        """The VAE, in float32, as the stock pipeline asks for."""
        options = self.options | {"torch_dtype": torch.float32}
        vae = read_component(diffusers_class(self.vae_class), self.source, "vae", options)
        self.set_up_vae(vae)
        return vae.to(self.device).requires_grad_(False).eval()

    def latent_moments(self) -> tuple[Tensor, Tensor]:
        """Each [C, 1, 1] float32, from the config of the VAE."""
        values = self.vae.config.latents_mean, self.vae.config.latents_std
        mean, std = (torch.tensor(value, device=self.device)[:, None, None] for value in values)
        return mean, std

    def encode_chunk(self, prompts: list[str]) -> Conditioning:
        """prompt_embeds [B, max_sequence_length, D], zero after the last token, of the prompts without actions."""
        told = self.config.actions is not None
        embeds, _ = self.text_pipeline.encode_prompt(
            prompt=[split_prompt(prompt)[0] for prompt in prompts] if told else prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.config.max_sequence_length,
        )
        return Conditioning({"prompt_embeds": embeds})

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """With actions, also their moves, actions [B, F, axes], in float32 whatever the dtype of the embeddings."""
        cond, actions = super().encode_prompts(prompts), self.config.actions
        if actions is not None:
            frames = self.latent_shape[0]
            cond["actions"] = torch.stack([actions.moves(prompt, frames) for prompt in prompts]).to(self.device)
        return cond

    def encode_both(
        self, prompts: Sequence[str], images: Conditioning | None = None
    ) -> tuple[Conditioning, Conditioning]:
        """Guidance is away from another prompt, and not from other actions."""
        cond, uncond = super().encode_both(prompts, images)
        if "actions" in cond:
            uncond["actions"] = cond["actions"]
        return cond, uncond

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        actions = self.config.actions
        shapes: dict[str, tuple[int, ...]] = {
            "prompt_embeds": (self.config.max_sequence_length, self.network_config["text_dim"])
        }
        if actions is not None:
            shapes["actions"] = (self.latent_shape[0], actions.axes)
        return shapes

    def image_shapes(self) -> dict[str, tuple[int, ...]]:
        sound = self.config.sound
        if sound is None or not sound.given:
            return super().image_shapes()
        return {"sound": (self.latent_shape[0], sound.moments, sound.bins)}

    def teacher_policy(self, num_steps: int) -> RolloutPolicy:
        """The stock scheduler's levels. UniPC's first one is 1 - 1e-6, and it gives the network whole numbers."""
        scheduler = self.scheduler()
        check_flow_scheduler({"_class_name": type(scheduler).__name__, **scheduler.config})
        scheduler.set_timesteps(num_steps)
        transition: Literal["renoise", "ode"] = "renoise" if scheduler.config.get("stochastic_sampling") else "ode"
        time = scheduler.config.num_train_timesteps / 1000
        time = time if num_steps == 1 and time != 1 else None
        return RolloutPolicy(tuple(scheduler.sigmas[:-1].tolist()), transition, time)

    def make(self, role: str, dtype: torch.dtype) -> Denoiser:
        """With actions, the networks are told of them, at first to no effect; with sound, they get what it needs,
        but for the teacher, which is the stock network and makes none."""
        made, actions, sound = super().make(role, dtype), self.config.actions, self.config.sound
        for part in made.members:
            if actions is not None:
                add_actions(part.network, actions.period, self.time_dim_of(made))
            if sound is None:
                continue
            if role != "teacher":
                add_sound(part.network, sound.sinks, sound.bins if sound.given else None)
            elif not sound.given:
                part.silent_rows = self.strip.high
        return made

    def read_networks(self, source: str | Path, **options: Any) -> Denoiser:
        """The denoiser of this pipeline, or of an export of it, which may be a student of two experts."""
        own = str(source) == self.source or not Path(source).is_dir()
        names, boundary = find_experts(self.components if own else read_index(Path(source)))
        networks = [read_network(self.network_class, source, name, options) for name in names]
        parts = [self.wrap(network) for network in networks]
        return (parts[0] if boundary is None else Experts(parts, (boundary,))).to(self.device)

    def student_components(self, student: Denoiser) -> dict[str, Any]:
        """Experts made from this pipeline's one network become transformer and transformer_2, with their boundary."""
        if not student.boundaries or self.boundary is not None:
            return super().student_components(student)
        high, low = (part.network for part in student.members)
        return {"transformer": high, "transformer_2": low, "boundary_ratio": student.boundaries[0]}

    def student_scheduler(self, policy: RolloutPolicy) -> Any:
        if policy.chunks is not None:
            from fastgen.pipelines.few_step import ChunkScheduler  # with diffusers

            trained = asdict(self.config)
            return ChunkScheduler(asdict(policy), **{name: trained[name] for name in TRAINED})
        scheduler = flow_match_scheduler(policy)
        if self.boundary is not None:
            check_boundary(policy, scheduler, self.boundary)
        return scheduler
