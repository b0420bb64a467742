"""The families of image and video pipelines at tiny sizes, with what their tests need to know of each."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import Flux2Pipeline
from tiny_cogvideox import tiny_cogvideox
from tiny_flux import tiny_flux
from tiny_flux2 import tiny_flux2_dev, tiny_flux2_klein
from tiny_hunyuan import tiny_hunyuan
from tiny_ltx import tiny_ltx
from tiny_pixart import tiny_pixart
from tiny_qwen import tiny_qwen
from tiny_sana import tiny_sana, tiny_sana_sprint
from tiny_z_image import tiny_z_image
from torch import Tensor

from fastgen import noise
from fastgen.backbones.cogvideox import CogVideoXConfig
from fastgen.backbones.discrete import Discrete
from fastgen.backbones.flow_image import to_tokens
from fastgen.backbones.flux import FluxConfig
from fastgen.backbones.flux2 import Flux2Config
from fastgen.backbones.hunyuan_video15 import HunyuanVideo15Config
from fastgen.backbones.ltx import LTXConfig
from fastgen.backbones.pipeline_config import PipelineConfig
from fastgen.backbones.pixart_sigma import PixArtSigmaConfig
from fastgen.backbones.qwen_image import QwenImageConfig
from fastgen.backbones.sana import SanaConfig
from fastgen.backbones.sana_sprint import SanaSprintConfig, sprint_levels
from fastgen.backbones.z_image import ZImageConfig

PROMPTS = ["a red cat", "two green dogs"]
SEEDS = [3, 1]
SIDE, LENGTH = 32, 12
Stored = tuple[tuple[float, ...], dict[str, Any]]
LISTS: tuple[Stored, ...] = (
    ((1.0, 0.9, 0.75, 0.5), {}),
    ((1.0, 0.7, 0.3), {"transition": "ode"}),
    ((1.0,), {}),
    ((1.0, 0.8, 0.33, 0.1), {"transition": "cps", "eta": 0.5}),
)


@dataclass(frozen=True)
class Family:
    """folder: writes a tiny pipeline. config: its backbone section. pipeline: the stock class. num_frames: of its
    videos; 0 if it makes images. takes_length: whether the number of text tokens is a key of its section. packed: our
    latents, [B, C, H, W] or [B, F, C, H, W], as the stock pipeline takes them; drawn: as its scheduler draws noise
    like them, if differently. guided: the arguments of its call for guidance by two network calls; two_calls: whether
    it has any. level: the noise level, from the arguments that the network is called with. arranged: the VAE's code as
    latents. video: whether the VAE is one of videos. fewest_steps: the smallest number that its own scheduler can
    make. call: other arguments of its call, by the number of steps. set_up: sets what is an attribute of the pipeline
    instead of an argument of its call, and returns the others. length: the number of text tokens. lists: samplers that
    its export can store."""

    folder: Callable[[Path], Path]
    config: type[PipelineConfig]
    pipeline: str
    num_frames: int = 0
    takes_length: bool = True
    packed: Callable[[Tensor], Tensor] = lambda latents: latents
    drawn: Callable[[Tensor], Tensor] | None = None
    guided: Callable[[float], dict[str, Any]] = lambda scale: {"guidance_scale": scale}
    call: Callable[[int], dict[str, Any]] = lambda steps: {}
    set_up: Callable[[Any, dict[str, Any]], dict[str, Any]] = lambda pipeline, call: call
    level: Callable[[dict[str, Any]], float] = lambda given: float(given["timestep"][0]) / 1000
    arranged: Callable[[Tensor], Tensor] = lambda z: z
    video: bool = False
    two_calls: bool = True
    fewest_steps: int = 1
    length: int = LENGTH
    lists: Sequence[Stored] = LISTS

    def make(self, folder: Path, **options: Any) -> Any:
        size = self.sizes if self.num_frames else {"resolution": SIDE}
        lengths = self.lengths if self.takes_length else {}
        config = self.config(**{"path": str(folder)} | size | lengths | options)  # type: ignore[arg-type]
        config.check()
        return config.build(torch.device("cpu"), torch.float32, 0)

    @property
    def lengths(self) -> dict[str, int]:
        return {"max_sequence_length": self.length}

    @property
    def sizes(self) -> dict[str, int]:
        return {"height": SIDE, "width": SIDE} | ({"num_frames": self.num_frames} if self.num_frames else {})

    def plain_pixels(
        self, folder: Path, backbone: Any, steps: int, prompts: list[str] = PROMPTS, **call: Any
    ) -> tuple[Tensor, list[float]]:
        """What a user's own call gives for our initial noise, and the levels at which it called the network. A
        pipeline whose own scheduler is a multi-step one makes Euler or DDIM steps instead. backbone: one whose text
        encoders, the same as the folder's, are loaded already."""
        components = backbone.text_pipeline.components.items()
        encoders = {name: part for name, part in components if name.startswith("text_encoder")}
        pipeline = getattr(diffusers, self.pipeline).from_pretrained(folder, **encoders)
        pipeline.set_progress_bar_config(disable=True)
        if isinstance(backbone, Discrete) and folder == Path(backbone.source):
            pipeline.scheduler = backbone.teacher_scheduler()
        elif isinstance(pipeline.scheduler, diffusers.DPMSolverMultistepScheduler):
            pipeline.scheduler.set_timesteps(steps)
            call["sigmas"] = pipeline.scheduler.sigmas[:-1].tolist()
            pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        visited: list[float] = []

        names = inspect.signature(pipeline.transformer.forward).parameters

        def note(_module: object, arguments: tuple[Any, ...], given: dict[str, Any]) -> None:
            visited.append(self.level(dict(zip(names, arguments, strict=False)) | given))

        pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
        size = self.sizes | self.lengths
        out = pipeline(
            prompt=prompts,
            num_inference_steps=steps,
            latents=self.packed(draws(backbone, "initial")),
            output_type="np",
            **self.set_up(pipeline, size | self.call(steps) | call),
        )
        return torch.from_numpy(out.frames if self.num_frames else out.images).movedim(-1, -3), visited


def draws(backbone: Any, name: str) -> Tensor:
    """What our sampler draws for SEEDS under this name."""
    return noise.normal(torch.tensor(SEEDS), backbone.latent_shape, noise.make_key("sample", name))


def true_guidance(scale: float) -> dict[str, Any]:
    return {"true_cfg_scale": scale, "negative_prompt": [""] * len(PROMPTS)} if scale > 1 else {}


def flux(guided: bool) -> Family:
    return Family(
        folder=lambda folder: tiny_flux(folder, guided),
        config=FluxConfig,
        pipeline="FluxPipeline",
        packed=to_tokens,
        guided=true_guidance,
        level=lambda given: float(given["timestep"][0]),
    )


def flux2(folder: Callable[[Path], Path], pipeline: str) -> Family:
    """dev tells its network the scale of its call, 4 by default; klein is guided by it, without a negative prompt."""
    klein = pipeline == "Flux2KleinPipeline"
    return Family(
        folder=folder,
        config=Flux2Config,
        pipeline=pipeline,
        drawn=lambda latents: latents.flatten(2).mT,
        arranged=Flux2Pipeline._patchify_latents,
        guided=lambda scale: {"guidance_scale": scale} if klein else {},
        two_calls=klein,
        level=lambda given: float(given["timestep"][0]),
    )


SANA = Family(
    folder=tiny_sana,
    config=SanaConfig,
    pipeline="SanaPipeline",
    call=lambda steps: {"use_resolution_binning": False},
)

SANA_SPRINT = Family(
    folder=tiny_sana_sprint,
    config=SanaSprintConfig,
    pipeline="SanaSprintPipeline",
    guided=lambda scale: {},
    two_calls=False,
    call=lambda steps: {"use_resolution_binning": False} | ({} if steps == 2 else {"intermediate_timesteps": None}),
    level=lambda given: min(1.0, float(given["timestep"][0])),  # its first angle, 1.5708, is more than pi / 2
    lists=tuple((sprint_levels(steps), {}) for steps in (1, 2, 4)),
)

QWEN_IMAGE = Family(
    folder=tiny_qwen,
    config=QwenImageConfig,
    pipeline="QwenImagePipeline",
    packed=to_tokens,
    guided=true_guidance,
    level=lambda given: float(given["timestep"][0]),
    video=True,
    fewest_steps=2,
)

Z_IMAGE = Family(
    folder=tiny_z_image,
    config=ZImageConfig,
    pipeline="ZImagePipeline",
    guided=lambda scale: {"guidance_scale": scale - 1},
    level=lambda given: 1 - float(given["t"][0]),
)

EVENLY: tuple[Stored, ...] = (
    ((1.0, 0.75, 0.5, 0.25), {}),
    ((1.0, 0.75, 0.5, 0.25), {"transition": "ode"}),
    ((0.4,), {}),
)

PIXART_SIGMA = Family(
    folder=tiny_pixart,
    config=PixArtSigmaConfig,
    pipeline="PixArtSigmaPipeline",
    call=lambda steps: {"use_resolution_binning": False},
    level=lambda given: float(given["timestep"][0] + 1) / 1000,
    lists=EVENLY,
)

COGVIDEOX = Family(
    folder=tiny_cogvideox,
    config=CogVideoXConfig,
    pipeline="CogVideoXPipeline",
    num_frames=9,
    takes_length=False,
    level=lambda given: float(given["timestep"][0] + 1) / 1000,
    lists=EVENLY,
)


def set_up_hunyuan(pipeline: Any, call: dict[str, Any]) -> dict[str, Any]:
    """The number of tokens is an attribute, and so is the guider. The VAE decodes several videos only one by one."""
    pipeline.vae.enable_slicing()
    pipeline.vision_num_semantic_tokens = 4  # of an image, all masked; test_video_families has the stock 729
    pipeline.tokenizer_max_length = call.pop("max_sequence_length")
    if "guidance_scale" in call:
        pipeline.guider = pipeline.guider.new(guidance_scale=call.pop("guidance_scale"))
    return call


HUNYUAN_VIDEO15 = Family(
    folder=tiny_hunyuan,
    config=HunyuanVideo15Config,
    pipeline="HunyuanVideo15Pipeline",
    num_frames=5,
    packed=lambda latents: latents.transpose(1, 2),
    set_up=set_up_hunyuan,
    length=24,
)

LTX = Family(
    folder=tiny_ltx,
    config=LTXConfig,
    pipeline="LTXPipeline",
    num_frames=9,
    packed=lambda latents: latents.movedim(2, -1).flatten(1, 3),
    fewest_steps=2,
)

FAMILIES = {
    "cogvideox": COGVIDEOX,
    "flux-dev": flux(True),
    "flux-schnell": flux(False),
    "flux2-dev": flux2(tiny_flux2_dev, "Flux2Pipeline"),
    "flux2-klein": flux2(tiny_flux2_klein, "Flux2KleinPipeline"),
    "hunyuan-video15": HUNYUAN_VIDEO15,
    "ltx": LTX,
    "pixart-sigma": PIXART_SIGMA,
    "qwen-image": QWEN_IMAGE,
    "sana": SANA,
    "sana-sprint": SANA_SPRINT,
    "z-image": Z_IMAGE,
}
