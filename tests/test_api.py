"""The Python interface: each function does what its command does, on the objects that people have."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from PIL import Image

import fastgen
from fastgen import noise
from fastgen.api import as_pixels
from fastgen.data.digits import load_digits
from fastgen.pipelines.flow_map import FlowMapStableDiffusion3Pipeline
from fastgen.recipe import Recipe
from fastgen.registry import OBJECTIVES, RecipeError
from fastgen.run.build import build_backbone
from fastgen.run.export import export
from fastgen.sampling.sampler import Sampler, load_sampler

QUICK = {
    "train.steps": 2,
    "train.batch_size": 16,
    "train.sample_every": 0,
    "train.eval_every": 0,
    "eval.num_samples": 20,
    "eval.quick_num_samples": 20,
    "health.every": 0,
    "backbone.fit_steps": 2,
}
PROMPTS, SEEDS = ["a three", "a seven"], [3, 1]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import fastgen, sys; print(sorted({'torch', 'diffusers', 'pydantic'} & set(sys.modules)), dir(fastgen))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ") and "distill" in done.stdout
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        fastgen.distil  # noqa: B018


def test_a_recipe_is_a_file_or_its_sections(mixture_recipe: Path) -> None:
    raw = yaml.safe_load(mixture_recipe.read_text())
    one = fastgen.load_recipe(mixture_recipe, {"train.steps": 7, "rollout.timesteps": [1.0, 0.5], "seed": 2})
    other = fastgen.load_recipe(
        raw, {"train": {**raw["train"], "steps": 7}, "rollout.timesteps": [1.0, 0.5], "seed": 2}
    )
    assert isinstance(one, Recipe) and one == other and one.train.steps == 7 and one.rollout.num_steps == 2
    assert raw["train"]["steps"] != 7
    before = copy.deepcopy(raw)
    assert fastgen.load_recipe(raw, {"optimizers.student.lr": 0.5}).optimizers["student"].lr == 0.5
    assert raw == before and fastgen.load_recipe(raw).optimizers["student"].lr != 0.5
    with pytest.raises(RecipeError, match="did you mean 'steps'"):
        fastgen.load_recipe(raw, {"train.stps": 7})


def test_a_student_of_points_from_start_to_end(mixture_recipe: Path, tmp_path: Path) -> None:
    run = fastgen.distill(mixture_recipe, {**QUICK, "output_dir": tmp_path / "run"})
    student = fastgen.load(run)
    assert isinstance(student, Sampler)
    assert torch.equal(student.sample([""] * 2, SEEDS), load_sampler(run).sample([""] * 2, SEEDS))
    row = fastgen.evaluate(run, metrics="mean_error", num_samples=20)
    assert set(row["metrics"]) == {"mean_error"}
    with pytest.raises(ValueError, match="changes belong to load_recipe"):
        fastgen.distill(fastgen.load_recipe(mixture_recipe), {"seed": 1})
    with pytest.raises(ValueError, match="neither a run"):
        fastgen.load(tmp_path)


def exported(folder: Path, recipe: Path, **changes: Any) -> Path:
    """An export of the digits teacher as if it were a student, with changed weights."""
    loaded = fastgen.load_recipe(recipe, {"output_dir": folder, **changes})
    backbone = build_backbone(loaded, torch.device("cpu"))
    student = loaded.objective.make_student(backbone, loaded.rollout)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.02 * torch.randn_like(p))
    export(student, backbone, loaded, folder / "export", step=0)
    return folder


@pytest.mark.parametrize("lora", [False, True])
def test_a_student_is_loaded_as_its_card_says(lora: bool, project: Path, tmp_path: Path) -> None:
    """As a whole pipeline, and as an adapter in its original one."""
    changes: dict[str, Any] = {"rollout.transition": "ode", "objective.condition_on_stop": False}
    run = exported(
        tmp_path,
        project / "recipes/digits_dmd2_4step.yaml",
        **changes,
        **({"lora.student": {"rank": 2}} if lora else {}),
    )
    pipeline, initial = (
        fastgen.load(run),
        noise.normal(torch.tensor(SEEDS), (2, 8, 8), noise.make_key("sample", "initial")),
    )
    assert type(pipeline) is StableDiffusion3Pipeline
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(PROMPTS, num_inference_steps=4, guidance_scale=1.0, latents=initial, output_type="np").images
    ours = load_sampler(run).sample(PROMPTS, SEEDS)
    assert float((torch.from_numpy(theirs).permute(0, 3, 1, 2) - ours).abs().max()) < 1e-4


def test_other_pipelines_are_loaded_in_their_own_classes(project: Path, tmp_path: Path) -> None:
    run = exported(tmp_path, project / "recipes/digits_flow_map_4step.yaml")
    assert type(fastgen.load(run)) is FlowMapStableDiffusion3Pipeline
    teacher = fastgen.load(project / "assets/teachers/digits", torch_dtype=torch.float64)
    assert teacher.transformer.dtype == torch.float64


def test_one_picture_in_every_form_has_one_score(tmp_path: Path) -> None:
    pixels = load_digits("test", 32)[0][:3]
    arrays = (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(a) for a in arrays]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    tensors = [torch.from_numpy(a).permute(2, 0, 1).float() / 255 for a in arrays]
    forms: list[list[Any]] = [
        pictures,
        list(arrays),
        [a.astype(np.float32) / 255 for a in arrays],
        tensors,
        sorted(tmp_path.glob("*.png")),
        [str(f) for f in sorted(tmp_path.glob("*.png"))],
    ]
    expected = fastgen.score(forms[0], "a three", "digit_stroke", device="cpu")
    assert expected == pytest.approx([float(t.mean()) for t in tensors])
    for images in forms[1:]:
        assert fastgen.score(images, ["a three"] * 3, "digit_stroke", device="cpu") == pytest.approx(expected)
    assert fastgen.score(pictures[0], "a three", "digit_stroke") == pytest.approx(expected[:1])
    larger = Image.fromarray(arrays[0]).resize((48, 40))
    assert len(fastgen.score([pictures[1], larger, pictures[2]], "a three", "jpeg_size", quality=50)) == 3
    for wrong, words in (
        ([torch.zeros(1, 8, 8)], r"picture \[3, H, W\]"),
        ([2 * tensors[0] + 1], r"must lie in \[0, 1\]"),
        ([np.zeros((8, 8))], r"picture \[H, W, 3\]"),
    ):
        with pytest.raises(ValueError, match=words):
            fastgen.score(wrong, "a three", "digit_stroke")
    with pytest.raises(ValueError, match="no scorer"):
        fastgen.score(pictures, "a three", "digit_strok")
    with pytest.raises(ValueError, match="2 prompts for 3 images"):
        fastgen.score(pictures, ["a three", "a four"], "digit_stroke")


def test_an_opened_picture_has_the_score_of_its_file(tmp_path: Path) -> None:
    """Transparency shows white, 16 bits are scaled, and EXIF turns, as where a file is read."""
    wide = Image.fromarray((np.arange(8 * 16 * 4).reshape(8, 16, 4) % 251).astype(np.uint8), "RGBA")
    grey, turned = Image.fromarray(np.linspace(0, 65535, 128).reshape(8, 16).astype(np.uint16)), Image.Exif()
    turned[0x0112] = 6
    wide.save(tmp_path / "alpha.png")
    grey.save(tmp_path / "grey.png")
    wide.convert("RGB").save(tmp_path / "turned.png", exif=turned)
    for file in tmp_path.iterdir():
        with Image.open(file) as picture:
            assert torch.equal(as_pixels(picture), as_pixels(file)), file
    assert as_pixels(tmp_path / "turned.png").shape == (1, 3, 16, 8)
    with pytest.raises(ValueError, match="its mode is F, whose scale is not known"):
        fastgen.score(Image.fromarray(np.full((8, 8), 0.5, np.float32)), "a three", "digit_stroke")


def test_every_objective_says_what_it_does() -> None:
    listed = fastgen.list_objectives()
    assert listed.keys() == OBJECTIVES.keys()
    assert all(len(line) > 20 for line in listed.values()), listed
