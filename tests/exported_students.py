"""Students of every family as exports and in other forms, made once for all tests."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_families import FAMILIES
from tiny_pipelines import tiny_sd, tiny_sdxl, tiny_vae
from tiny_wan import tiny_wan
from torch import Tensor

from fastgen.backbones.base import RoleOptions
from fastgen.backbones.pipeline_config import PipelineConfig
from fastgen.backbones.sd import SDConfig
from fastgen.backbones.sd3 import SD3Config
from fastgen.backbones.wan import WanConfig
from fastgen.exporting.forms import write_form
from fastgen.exporting.reading import Student
from fastgen.modules.lora import LoraConfig
from fastgen.rollout import RolloutPolicy

ROOT = Path(__file__).parents[1]
SEEDS = [3, 1]


@dataclass(frozen=True)
class Case:
    """folder: writes a tiny pipeline, or finds one. config: its backbone section. call: of the stock pipeline.
    targets: of the adapter."""

    folder: Callable[[Path], Path]
    config: Callable[[Path], PipelineConfig]
    prompts: list[str]
    policy: RolloutPolicy = field(default_factory=lambda: RolloutPolicy((1.0, 0.6), "ode"))
    call: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] | None = None


def of_family(name: str) -> Case:
    family = FAMILIES[name]
    size = {"height": 32, "width": 32, **family.lengths, **family.call(2)}
    return Case(family.folder, lambda folder: family.make(folder).config, ["a red cat", "two green dogs"], call=size)


def with_attention(folder: Path) -> Path:
    """A Stable Diffusion whose VAE has attention, as the published one has."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tiny_vae(scaling_factor=0.18215, mid_block_add_attention=True).save_pretrained(tiny_sd(folder) / "vae")
    return folder


def wan_config(folder: Path) -> WanConfig:
    return WanConfig(str(folder), height=32, width=32, num_frames=5, max_sequence_length=8)


WAN = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 8, "guidance_scale": 1.0}
SD = RolloutPolicy((1.0, 0.5), "renoise")
DMD2 = (  # the layers of DMD2's adapter of SDXL (tianweiy/DMD2, main/sd_unified_model.py)
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"),
    *("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
CASES = {
    "sd": Case(with_attention, lambda folder: SDConfig(str(folder)), ["a red cat", "b"], SD),
    "sdxl": Case(
        lambda folder: tiny_sdxl(folder, second=24), lambda folder: SDConfig(str(folder)), ["a red cat", "b"], SD
    ),
    "sdxl-dmd2": Case(tiny_sdxl, lambda folder: SDConfig(str(folder)), ["a red cat", "b"], SD, targets=DMD2),
    "sd3": Case(lambda _: ROOT / "assets/teachers/digits", lambda folder: SD3Config(str(folder)), ["a three", "b"]),
    "flux-dev": of_family("flux-dev"),
    "flux2-dev": of_family("flux2-dev"),
    "flux2-klein": of_family("flux2-klein"),
    "qwen-image": of_family("qwen-image"),
    "z-image": of_family("z-image"),
    "wan": Case(tiny_wan, wan_config, ["a cat runs", "a dog"], call=WAN),
    "wan-experts": Case(lambda f: tiny_wan(f, experts=2), wan_config, ["a cat runs", "a dog"], call=WAN),
}
TRANSFORMERS = [name for name in CASES if name not in ("sd", "sdxl", "sdxl-dmd2")]


class Written:
    """An adapter that is no longer at its start, as an export, merged as another, and in other forms."""

    def __init__(self, case: Case, folder: Path):
        self.spec, self.folder = case, folder
        self.base = case.folder(folder / "base")
        config = case.config(self.base)
        self.backbone: Any = config.build(
            torch.device("cpu"), torch.float32, 0, RoleOptions({"student": LoraConfig(4, 8, case.targets)})
        )
        self.student = self.backbone.load("student")
        for i, p in enumerate(self.student.parameters()):
            torch.nn.init.normal_(p, std=0.1 if p.dim() < 4 else 0.03, generator=torch.Generator().manual_seed(i))
        self.backbone.save_pipeline(self.student, case.policy, folder / "adapter")
        self.backbone.save_pipeline(self.student.merged(), case.policy, folder / "merged")
        self.pixels = self.stock_pixels(self.pipeline(folder / "merged"))

    def form(self, form: str) -> Path:
        """The folder of the student in this form."""
        path = self.folder / form
        if not path.exists():
            source = self.folder / ("adapter" if form == "lora" else "merged")
            write_form(Student(source, self.backbone, self.spec.policy, form == "lora"), form, path, "tiny")
        return path

    def files(self, form: str) -> list[Path]:
        return [self.form(form) / name for name in json.loads((self.form(form) / "form.json").read_text())["files"]]

    def pipeline(self, folder: Path, **given: Any) -> Any:
        """The stock pipeline. The schedulers of students draw noise; all calls here make Euler steps instead."""
        pipeline = getattr(diffusers, self.backbone.components["_class_name"]).from_pretrained(folder, **given)
        return self.with_euler(pipeline)

    def with_euler(self, pipeline: Any) -> Any:
        vp = "UNet" in self.backbone.network_class
        pipeline.scheduler = diffusers.DDIMScheduler() if vp else diffusers.FlowMatchEulerDiscreteScheduler()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def stock_pixels(self, pipeline: Any) -> Tensor:
        out = pipeline(
            prompt=self.spec.prompts[0],
            num_inference_steps=2,
            output_type="np",
            generator=torch.Generator().manual_seed(0),
            **{"guidance_scale": 1.0} | self.spec.call,
        )
        return torch.from_numpy(out.frames if hasattr(out, "frames") else out.images)

    def network_config(self, part: str) -> dict[str, Any]:
        return {"config": str(self.base), "subfolder": part}


KNOWN: dict[str, Written] = {}


def find(folders: pytest.TempPathFactory, name: str) -> Written:
    """The student of this case."""
    if name not in KNOWN:
        KNOWN[name] = Written(CASES[name], folders.mktemp(name))
    return KNOWN[name]
