"""The model card of an export: what the student is, how to call it, its pictures, its numbers and its recipe."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

import fastgen
from fastgen.backbones.base import Backbone
from fastgen.backbones.folder import local_folder
from fastgen.config.stored import dump_recipe, to_dict
from fastgen.data.files import replace_file
from fastgen.evaluation.numbers import numbers_section
from fastgen.recipe import Recipe
from fastgen.run.licence import licence_of
from fastgen.sampling.sampler import METADATA

PICTURES = {"teacher.png": "The teacher", "student.png": "The student"}  # in samples/ of the export
STEP = re.compile(r"step_\d{8}\.png")  # the picture of a step in samples/ of the run
TAGS = {("pixels", False): "text-to-image", ("frames", False): "text-to-video", ("frames", True): "image-to-video"}


def write_card(backbone: Backbone, recipe: Recipe, folder: Path, step: int) -> None:
    """Writes the model card of an export, without numbers, which `evaluation.numbers` adds. Its pictures are those in
    `samples/`."""
    adapter = json.loads((folder / METADATA).read_text())["lora"]
    usage = backbone.usage(recipe.rollout, folder, adapter)
    shown = [name for name in PICTURES if (folder / "samples" / name).is_file()]
    text = model_card(backbone, recipe, step, usage, shown)
    card = ModelCard(f"---\n{card_data(backbone, recipe, adapter).to_yaml()}\n---\n\n{text}")
    replace_file(folder / "README.md", str(card))


def copy_pictures(run: Path, folder: Path, step: int) -> None:
    """Copies the run's picture of the teacher and the last one of the student up to this step into an export. There
    may be later ones, of a checkpoint that was set aside."""
    samples = run / "samples"
    last = f"step_{step:08d}.png"  # whose name is in the order of the steps
    made = [file for file in samples.glob("step_*.png") if STEP.fullmatch(file.name) and file.name <= last]
    found = {"teacher.png": samples / "teacher.png", "student.png": max(made, default=None)}
    for name, source in found.items():
        if source is not None and source.is_file():
            (folder / "samples").mkdir(exist_ok=True)
            shutil.copyfile(source, folder / "samples" / name)


def card_data(backbone: Backbone, recipe: Recipe, adapter: bool) -> ModelCardData:
    """What a hub reads: the teacher, if it has a hub id, and its licence, as far as its folder says it."""
    source = source_of(recipe)
    base: dict[str, Any] = {}
    if source and local_folder(source) is None:
        base = {"base_model": source, "base_model_relation": "adapter" if adapter else "finetune"}
    return ModelCardData(
        library_name=backbone.library,
        pipeline_tag=TAGS.get((backbone.output, backbone.takes_image)),
        tags=["distillation", "few-step", recipe.objective.name],
        **(licence_of(source).metadata if source else {}),
        **base,
    )


def source_of(recipe: Recipe) -> str:
    """The teacher's pipeline, a folder or a hub id; "" for an analytic teacher."""
    return str(to_dict(recipe.backbone).get("path", ""))


def model_card(backbone: Backbone, recipe: Recipe, step: int, usage: str, shown: list[str]) -> str:
    """The model card in Markdown, without its metadata."""
    source = source_of(recipe)
    licence = f"## Licence\n\n{licence_of(source).said}\n\n" if source else ""
    negative = json.dumps(backbone.negative_prompt, ensure_ascii=False)
    away = f" The teacher's guidance leads away from the negative prompt {negative}." if negative != '""' else ""
    plain = backbone.plain_call(recipe.rollout, "student" in recipe.lora)
    warning = f"{plain}\n\n" if plain else ""
    pictures = "".join(f"{PICTURES[name]}:\n\n![{PICTURES[name]}](samples/{name})\n\n" for name in shown)
    return f"""# A {recipe.rollout.num_steps}-step student of {source or "an analytic teacher"}

{warning}Distilled with fastgen {fastgen.__version__}, objective `{recipe.objective.name}`, in {step} student updates.
The weights are the moving average of the student's weights.{away}

## How to call it

{usage}

{f"## Pictures{chr(10)}{chr(10)}{pictures}" if pictures else ""}{numbers_section([])}{licence}## Recipe

```yaml
{dump_recipe(recipe)}```
"""
