"""What is said of sampling beside a student: the workflow for ComfyUI, the card's first line."""

import copy
import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from comfyui_reader import check_graph, parse_sigmas, sample
from exported_students import CASES, SD, SEEDS, Written
from tiny_families import FAMILIES
from tiny_pipelines import tiny_sd, with_scheduler
from torch import Tensor

from fastgen import noise
from fastgen.backbones.comfyui import comfyui_sampling
from fastgen.backbones.sd import SDConfig
from fastgen.exporting.comfyui import workflow
from fastgen.exporting.reading import Student
from fastgen.exporting.usage import write_usage
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.sampler import Sampler
from fastgen.schedule import VPSchedule


@pytest.mark.parametrize("form", ["lora", "whole"])
@pytest.mark.parametrize("name", CASES)
def test_the_workflow_samples_what_our_sampler_samples(
    name: str, form: str, written: Callable[[str], Written]
) -> None:
    """The graph is well formed and at cfg 1; its sampler at its sigmas gives our latents, network by network."""
    case = written(name)
    whole = "checkpoint" if case.backbone.subfolder == "unet" else "diffusion_model"
    folder = case.form("lora" if form == "lora" else whole)
    nodes = json.loads((folder / "workflow.json").read_text())
    check_graph(nodes)
    stages = [node["inputs"] for node in nodes.values() if node["class_type"] == "SamplerCustomAdvanced"]
    assert all(nodes[stage["guider"][0]]["inputs"]["cfg"] == 1 for stage in stages)
    names = {nodes[stage["sampler"][0]]["inputs"]["sampler_name"] for stage in stages}
    parts = [parse_sigmas(nodes[stage["sigmas"][0]]["inputs"]["sigmas"]) for stage in stages]
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(parts)) and parts[-1][-1] == 0
    sigmas = [*(sigma for part in parts for sigma in part[:-1]), 0.0]
    backbone, denoiser = case.backbone, case.student
    cond, flow = backbone.encode_prompts(case.spec.prompts), backbone.config.flow_matching

    def predict(x: Tensor, sigma: float) -> Tensor:
        t = sigma if flow else float((comfyui_levels() - sigma).abs().argmin() + 1) / 1000
        x_t = x if flow else x / (1 + sigma**2) ** 0.5
        with torch.no_grad():
            return denoiser(x_t, torch.full((len(x),), t), cond)

    def draw(i: int) -> Tensor:
        key = noise.make_key("sample", f"step{i}" if i else "initial")
        return noise.normal(torch.tensor(SEEDS), backbone.latent_shape, key)

    theirs = sample(predict, names.pop(), sigmas, draw, flow)
    ours = Sampler(backbone, denoiser, case.spec.policy).latents(case.spec.prompts, SEEDS)
    assert float((theirs - ours).abs().max()) < 1e-4
    page = (folder / "README.md").read_text()
    assert nodes[stages[0]["sigmas"][0]]["inputs"]["sigmas"].split(", ")[0] in page and "| cfg | 1 |" in page


def comfyui_levels() -> Tensor:
    """Its sigmas of Stable Diffusion's 1000 steps, of which it takes the nearest."""
    left = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2).cumprod(0)
    return ((1 - left) / left).sqrt()


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (RolloutPolicy((1.0, 0.5), "cps", 0.5), "transition: cps"),
        (RolloutPolicy((1.0,), conditioning_time=0.5), "is told another one"),
    ],
)
def test_what_comfyui_cannot_sample_is_said_in_place_of_a_workflow(
    policy: RolloutPolicy, words: str, written: Callable[[str], Written], tmp_path: Path
) -> None:
    case = written("sd3")
    write_usage(Student(case.folder / "merged", case.backbone, policy, False), "diffusion_model", ["x"], tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "There is no workflow for ComfyUI" in page and words in page and "from_single_file" in page
    assert not (tmp_path / "workflow.json").exists()


def test_another_noise_schedule_than_stable_diffusions_has_no_workflow(written: Callable[[str], Written]) -> None:
    backbone = copy.copy(written("sd").backbone)
    backbone.schedule = VPSchedule(diffusers.DDIMScheduler(beta_schedule="linear").alphas_cumprod)
    with pytest.raises(ValueError, match="the noise schedule of Stable Diffusion"):
        comfyui_sampling(backbone, SD)


def test_the_workflow_of_an_adapter_names_its_base_and_its_prediction(tmp_path: Path) -> None:
    """FLUX.1 schnell is another file than dev, and ComfyUI takes Stable Diffusion for an epsilon model."""
    schnell = FAMILIES["flux-schnell"]
    velocity = with_scheduler(tiny_sd(tmp_path / "sd"), tmp_path / "v", "DDIMScheduler", "v_prediction")
    for config, words in (
        (schnell.make(schnell.folder(tmp_path / "schnell")).config, "flux1-schnell.safetensors"),
        (SDConfig(str(velocity)), "v_prediction"),
    ):
        backbone: Any = config.build(torch.device("cpu"), torch.float32, 0)
        nodes = workflow(Student(tmp_path / "none", backbone, SD, True), "lora", ["mine.safetensors"])
        check_graph(nodes)
        assert any(words in map(str, node["inputs"].values()) for node in nodes.values())
        assert "FluxGuidance" not in {node["class_type"] for node in nodes.values()}


def test_a_student_that_starts_below_the_last_step_has_no_workflow(written: Callable[[str], Written]) -> None:
    with pytest.raises(ValueError, match=r"starts at level 0\.4 from noise of full size"):
        comfyui_sampling(written("sd").backbone, RolloutPolicy((0.4,)))


PLAIN = {"sd": "50 steps instead of 2 and guidance scale 7.5", "sdxl": "scale 5 instead", "sd3": "scale 7 instead"}
PLAIN |= {
    "flux-dev": "use 28 steps instead of 2.",
    "qwen-image": "use 50 steps instead of 2.",
    "wan": "scale 5 instead",
    "flux2-klein": "use 50 steps instead of 2.",
    "z-image": "guidance scale 5 instead of 0",
}


@pytest.mark.parametrize(("name", "words"), PLAIN.items())
def test_the_card_begins_with_what_a_plain_call_would_do(
    name: str, words: str, written: Callable[[str], Written]
) -> None:
    case = written(name)
    assert words in case.backbone.plain_call(case.spec.policy, False)
    steps = case.backbone.stock_call[0]
    same = dataclasses.replace(case.spec.policy, timesteps=tuple((steps - i) / steps for i in range(steps)))
    assert "steps instead" not in case.backbone.plain_call(same, False)


@pytest.mark.parametrize(
    ("name", "form"),
    [("sd", "checkpoint"), ("sdxl", "lora"), ("sd3", "diffusion_model"), ("wan-experts", "lora"), ("z-image", "lora")],
)
def test_the_lines_on_the_page_beside_a_form_run_as_they_are(
    name: str, form: str, written: Callable[[str], Written], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(name).form(form)
    block = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert block is not None
    monkeypatch.chdir(tmp_path)  # where the lines of videos write one
    made: dict[str, Any] = {}
    exec(block[1].replace("path/to/this/folder", str(folder)), made)
    assert "image" in made or (tmp_path / "video.mp4").stat().st_size > 100
