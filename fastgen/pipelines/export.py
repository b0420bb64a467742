"""A finished student as a folder: weights, scheduler, recipe, and a card that says how to call it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

import fastgen
from fastgen import checkpoint
from fastgen.backbones.base import Backbone
from fastgen.config import Recipe, dump_recipe, load_recipe, to_dict
from fastgen.denoiser import Denoiser
from fastgen.pipelines.sampler import METADATA

CALL = """```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder")
torch.manual_seed(0)  # the scheduler draws its fresh noise from the global generator, not from `generator=`
image = pipeline("a prompt", num_inference_steps={num_steps}, guidance_scale=1).images[0]
```

The step list is stored in the scheduler: `num_inference_steps={num_steps}` gives the noise levels the student was
trained at, {timesteps}. Other numbers of steps, or a guidance scale above 1, are not what it was trained for. With
`transition: renoise` every step adds fresh noise, which diffusers draws from torch's global generator: seed that."""

OWN_CALL = """```python
from pathlib import Path

from fastgen.pipelines.sampler import load_sampler

points = load_sampler(Path("path/to/this/folder")).sample(prompts=[""] * 8, seeds=range(8))
```"""


def export(student: Denoiser, backbone: Backbone, recipe: Recipe, folder: Path, step: int,
           rows: Mapping[str, Mapping[str, float]]) -> None:  # fmt: skip
    """Writes the folder beside itself and renames it when it is complete; an earlier export is replaced only then.

    step: student updates made. rows: name -> metrics, of the student and of the teacher it is compared with; may be
    empty."""
    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    for stale in (partial, old):
        if stale.exists():
            shutil.rmtree(stale)
    backbone.save_pipeline(student, recipe.rollout, partial)
    metadata = {
        "fastgen": fastgen.__version__,
        "backbone": to_dict(recipe.backbone),
        "policy": to_dict(recipe.rollout),
    }
    (partial / METADATA).write_text(json.dumps(metadata, indent=2) + "\n")
    (partial / "recipe.yaml").write_text(dump_recipe(recipe))
    (partial / "README.md").write_text(model_card(backbone, recipe, step, rows))
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    if old.exists():
        shutil.rmtree(old)


def model_card(backbone: Backbone, recipe: Recipe, step: int, rows: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: what it is, how to call it, the numbers, the recipe."""
    teacher = to_dict(recipe.backbone)
    call = CALL if backbone.output == "pixels" else OWN_CALL
    call = call.replace("{num_steps}", str(recipe.rollout.num_steps))
    call = call.replace("{timesteps}", str([round(t, 6) for t in recipe.rollout.timesteps]))
    source = teacher.get("path", "an analytic mixture of Gaussians")
    return f"""---
library_name: {"diffusers" if backbone.output == "pixels" else "fastgen"}
tags: [distillation, few-step, {recipe.objective.name}]
---

# A {recipe.rollout.num_steps}-step student of {source}

Distilled with fastgen {fastgen.__version__}, objective `{recipe.objective.name}`, in {step} student updates. The
weights are the moving average of the student's.

## How to call it

{call}

## Numbers

{number_table(recipe, rows)}

## Recipe

```yaml
{dump_recipe(recipe)}```
"""


def number_table(recipe: Recipe, rows: Mapping[str, Mapping[str, float]]) -> str:
    """How they were measured, then one line a row, one column a metric."""
    if not rows:
        return "Not measured at this checkpoint; `fastgen eval` does."
    columns = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    head = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    body = [f"| {name} | " + " | ".join(f"{m[c]:.4g}" for c in columns) + " |" for name, m in rows.items()]
    scale = recipe.eval.teacher_guidance_scale
    said = f"{recipe.eval.quick_num_samples} samples; the teacher at guidance scale {scale:g}."
    return "\n".join([said, "", *head, *body])


def export_run(run: Path, output: Path | None = None) -> Path:
    """Exports the moving average in the last complete checkpoint of a run. Raises ValueError if there is none, or if
    `output` exists and is not an export."""
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"{run} is not a run folder: it has no recipe.yaml")
    checkpoints = checkpoint.complete(run / "checkpoints")
    if not checkpoints:
        raise ValueError(f"{run} has no complete checkpoint; continue the run, with train.checkpoint_every above 0")
    folder = output or run / "export"
    if folder.exists() and not (folder / METADATA).is_file():
        raise ValueError(f"{folder} exists and is not an export; choose another folder")
    recipe = load_recipe(run / "recipe.yaml")
    backbone = recipe.backbone.build(torch.device("cpu"), torch.float32, recipe.seed)
    student = backbone.load("student")
    student.load_state_dict(load_file(checkpoints[-1] / "ema.safetensors"))
    export(student, backbone, recipe, folder, int(checkpoints[-1].name.removeprefix(checkpoint.PREFIX)), {})
    return folder
