"""The negative prompt, with the real encoders of tiny pipelines: guidance leads away from it wherever the teacher is
guided, and every path notices when it is left out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tiny_pipelines import tiny_sd, tiny_sdxl
from tiny_wan import tiny_wan
from torch import Tensor

from fastgen import noise
from fastgen.backbones.base import Backbone
from fastgen.backbones.sd import SDConfig
from fastgen.backbones.sd3 import SD3Config
from fastgen.backbones.wan import WanConfig
from fastgen.config import load_recipe
from fastgen.data import make_batch
from fastgen.data.pairs import PairSettings
from fastgen.evaluation.evaluate import evaluate
from fastgen.evaluation.folders import evaluate_path
from fastgen.planning.plan import components_of, prompt_rows
from fastgen.recipe import EvalConfig, Recipe
from fastgen.registry import RecipeError
from fastgen.run.build import build_backbone
from fastgen.run.export import export
from fastgen.run.prepare import prepare
from fastgen.sampling.folder import sample_folder
from fastgen.sampling.sampler import load_sampler, teacher_sampler

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "assets/teachers/digits"
CPU = torch.device("cpu")
NEGATIVE = "red cat, a seven"  # words that the tiny tokenizers know, so that it is no other way to say nothing
PROMPTS, SEEDS = ["a blue dog", "the digit three"], [3, 1]
VIDEO = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16}
FAMILIES: dict[str, tuple[Callable[[Path], Path], type, dict[str, Any]]] = {
    "sd": (tiny_sd, SDConfig, {}),
    "sdxl": (tiny_sdxl, SDConfig, {}),
    "sd3": (lambda _: TEACHER, SD3Config, {}),
    "wan": (tiny_wan, WanConfig, VIDEO),
    "wan, two experts": (lambda folder: tiny_wan(folder, experts=2), WanConfig, VIDEO),
}


def stock_samples(folder: Path, backbone: Backbone, call: dict[str, Any]) -> Tensor:
    """What a user's own call with the negative prompt gives, in our layout."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    start = noise.normal(torch.tensor(SEEDS), backbone.latent_shape, noise.make_key("sample", "initial"))
    start = start.transpose(1, 2) if start.dim() == 5 else start
    out = pipeline(
        PROMPTS,
        negative_prompt=[NEGATIVE] * len(PROMPTS),
        num_inference_steps=4,
        guidance_scale=4.0,
        latents=start,
        output_type="np",
        **call,
    )
    return torch.from_numpy(out.frames if hasattr(out, "frames") else out.images).movedim(-1, -3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_guided_teacher_is_the_stock_pipeline_with_the_same_negative_prompt(family: str, tmp_path: Path) -> None:
    make, config, size = FAMILIES[family]
    folder = make(tmp_path / "pipeline")
    samples = {}
    for negative in ("", NEGATIVE):
        backbone = config(path=str(folder), negative_prompt=negative, **size).build(CPU, torch.float32, 0)
        samples[negative] = teacher_sampler(backbone, 4, 4.0).sample(PROMPTS, SEEDS)
    call = {k: v for k, v in size.items() if family.startswith("wan")}
    theirs = stock_samples(folder, backbone, call)
    error = (samples[NEGATIVE] - theirs).abs().max().item()
    without = (samples[""] - theirs).abs().max().item()
    print(f"{family}: largest difference {error:.2g}, and {without:.2g} without the negative prompt")
    assert error < 1e-4 and without > 1e-2


def recipe_of(*overrides: str) -> Recipe:
    prompts = "data={name: prompts, prompts: [a six, the digit two, an eight]}"
    few = ["eval.reference=null", "eval.metrics=[throughput]", "eval.prompts=[a six]"]
    return load_recipe(ROOT / "recipes/digits_dmd2_4step.yaml", [prompts, *few, *overrides])


def negative(text: str = NEGATIVE) -> str:
    return f"backbone.negative_prompt={text!r}"


def test_a_batch_carries_it_and_a_prepared_folder_has_it_without_encoders(tmp_path: Path) -> None:
    recipe = recipe_of(negative())
    backbone = build_backbone(recipe, CPU, dtype=torch.float32)
    positions = torch.arange(3)
    batch = make_batch(recipe.data.open(backbone, 0), backbone, positions, 0, frozenset())
    away, nothing = (backbone.encode_prompts([text] * 3)["pooled"] for text in (NEGATIVE, ""))
    assert torch.equal(batch.uncond["pooled"], away) and not torch.equal(away, nothing)

    prepare(recipe, tmp_path / "folder")
    stored = recipe_of(negative(), f"data={{name: prepared, folder: {tmp_path / 'folder'}}}")
    backbone = build_backbone(stored, CPU, dtype=torch.float32)
    read = make_batch(stored.data.open(backbone, 0), backbone, positions, 0, frozenset())
    assert "text_pipeline" not in vars(backbone)  # the encoders were not loaded
    for key in ("pooled", "prompt_embeds"):
        torch.testing.assert_close(read.uncond[key], batch.uncond[key], rtol=0, atol=1e-5)  # it is encoded in a batch


@pytest.mark.parametrize(
    ("made", "used", "words"),
    [
        (NEGATIVE, "", "negative_prompt .red cat, a seven in the folder, none in the recipe"),
        ("", NEGATIVE, "negative_prompt .none in the folder, red cat, a seven in the recipe"),
    ],
)
def test_a_folder_prepared_with_another_one_is_refused(made: str, used: str, words: str, tmp_path: Path) -> None:
    prepare(recipe_of(negative(made)), tmp_path / "folder")
    with pytest.raises(RecipeError, match=words):
        recipe_of(negative(used), f"data={{name: prepared, folder: {tmp_path / 'folder'}}}")
    with pytest.raises(ValueError, match=words):
        prepare(recipe_of(negative(used)), tmp_path / "folder")


def test_without_it_a_prepared_folder_is_what_it_was(tmp_path: Path) -> None:
    prepare(recipe_of(), tmp_path / "folder")
    assert "negative_prompt" not in json.loads((tmp_path / "folder/manifest.json").read_text())["identity"]["backbone"]
    assert (tmp_path / "folder/prompts.jsonl").read_text().splitlines()[0] == '""'


def test_ode_pairs_are_guided_away_from_it(tmp_path: Path) -> None:
    pairs = {}
    for text in ("", NEGATIVE):
        prepare(
            recipe_of(negative(text)), tmp_path / f"folder {text}", pairs=PairSettings(2, steps=2, guidance_scale=4.0)
        )
        pairs[text] = load_file(tmp_path / f"folder {text}" / "pairs-00000.safetensors")["x0"]
    assert (pairs[""] - pairs[NEGATIVE]).abs().max() > 1e-2


def test_evaluation_samples_the_guided_teacher_with_it_and_says_so() -> None:
    config = EvalConfig(metrics=("diversity",), num_samples=8, prompts=("a six", "the digit two"), batch_size=8)
    rows = {}
    for text in ("", NEGATIVE):
        backbone = build_backbone(recipe_of(negative(text)), CPU, dtype=torch.float32)
        rows[text] = evaluate(teacher_sampler(backbone, 2, 4.0), config, progress=False)
    assert rows[NEGATIVE]["negative_prompt"] == NEGATIVE and "negative_prompt" not in rows[""]
    assert rows[NEGATIVE]["metrics"] != rows[""]["metrics"]
    unguided = evaluate(teacher_sampler(backbone, 2, 1.0), config, progress=False)
    assert "negative_prompt" not in unguided  # nothing leads away from it


def test_sample_and_eval_take_it_for_a_guided_pipeline_alone(tmp_path: Path) -> None:
    folder = tiny_sd(tmp_path / "pipeline")
    pictures = {}
    for text in (None, NEGATIVE):
        out = tmp_path / f"samples {text}"
        sample_folder(folder, ["a blue dog"], None, 1, 0, out, 2, 4.0, 1, text)
        pictures[text] = (out / "00000.png").read_bytes()
    assert pictures[None] != pictures[NEGATIVE]
    measured = {"metrics": "throughput", "num_samples": 2, "num_steps": 1, "batch_size": 1, "prompts": ("a",)}
    row = evaluate_path(folder, negative_prompt=NEGATIVE, guidance_scale=3.0, progress=False, **measured)
    assert row["negative_prompt"] == NEGATIVE
    with pytest.raises(ValueError, match="give a guidance scale other than 1"):
        load_sampler(folder, guidance_scale=1.0, negative_prompt=NEGATIVE)
    with pytest.raises(ValueError, match="is a folder of images, and nothing is sampled"):
        evaluate_path(tmp_path / f"samples {NEGATIVE}", metrics="diversity", negative_prompt=NEGATIVE)


def test_an_export_says_it_and_takes_no_other(tmp_path: Path) -> None:
    cards = {}
    for text in ("", NEGATIVE):
        recipe = recipe_of(negative(text))
        backbone = build_backbone(recipe, CPU, dtype=torch.float32)
        export(backbone.load("student"), backbone, recipe, tmp_path / text / "export", 0)
        cards[text] = (tmp_path / text / "export/README.md").read_text()
    assert f'guidance leads away from the negative prompt "{NEGATIVE}".' in cards[NEGATIVE]
    assert "leads away" not in cards[""]
    with pytest.raises(ValueError, match=r"distilled to 4 steps without guidance; leave out .* the negative prompt"):
        load_sampler(tmp_path / NEGATIVE / "export", negative_prompt=NEGATIVE)


def test_the_plan_counts_its_tokens() -> None:
    """Prompts of small local encoders are counted as long as they are, with the repeated tokens of SD3 folded."""
    lengths = []
    for text in ("", NEGATIVE * 4):
        recipe = recipe_of(negative(text))
        backbone = build_backbone(recipe, CPU, dtype=torch.float32)
        lengths.append(prompt_rows(recipe, backbone, components_of(recipe, backbone))(2)["prompt_embeds"].shape[1])
    assert lengths[1] > lengths[0], lengths


@pytest.mark.parametrize("recipe", ["mixture_dmd2_4step", "ar1_teacher_forcing"])
def test_a_backbone_of_labels_refuses_it(recipe: str) -> None:
    with pytest.raises(RecipeError, match=r"^unknown key backbone\.negative_prompt"):
        load_recipe(ROOT / f"recipes/{recipe}.yaml", [negative()])
