"""A finished student as a folder: weights, scheduler, recipe, and a card that says how to call it."""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

import fastgen
from fastgen.backbones.base import Backbone
from fastgen.backbones.pipeline import PipelineBackbone
from fastgen.config import dump_recipe, load_recipe, to_dict
from fastgen.denoiser import Denoiser
from fastgen.modules.lora import LoraDenoiser
from fastgen.pipelines import few_step, flow_map
from fastgen.recipe import Recipe
from fastgen.run import checkpoint
from fastgen.sampling.sampler import METADATA

CALL = """```python
import torch
from diffusers import DiffusionPipeline

{load}
{call}
```

The step list is stored in the scheduler: `num_inference_steps={num_steps}` gives the noise levels the student was
trained at, {timesteps}. Other numbers of steps, or a guidance scale above 1, are not what it was trained for. With
`transition: renoise`, `cps` or `tcd` every step adds fresh noise; the seed above decides it."""

OWN_PARTS = """

This student needs fastgen installed, and the import above: diffusers has no class for its {parts}, and loads another
package's only once that has been imported, and from a local folder. From the hub, download the folder first, with
`huggingface_hub.snapshot_download`."""

TOLD = """

Its network is told more than its time, which plain diffusers cannot do: sample it with the class above, of fastgen,
from a local folder."""

ANY_STEP = """ It is a flow map: other numbers of steps work, too, on the same grid."""

OWN_CALL = """```python
from pathlib import Path

from fastgen.sampling.sampler import load_sampler

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
    whole = bool(recipe.rollout.inputs) or not isinstance(backbone, PipelineBackbone)  # adapters go into the weights
    if isinstance(student, LoraDenoiser) and whole:
        backbone.save_pipeline(student.shared.unload(student.role or ""), recipe.rollout, partial)
    else:
        backbone.save_pipeline(student, recipe.rollout, partial)
    metadata = {
        "lora": isinstance(student, LoraDenoiser) and not whole,
        "fastgen": fastgen.__version__,
        "backbone": to_dict(recipe.backbone),
        "policy": to_dict(recipe.rollout),
    }
    (partial / METADATA).write_text(json.dumps(metadata, indent=2) + "\n")
    (partial / "recipe.yaml").write_text(dump_recipe(recipe))
    (partial / "README.md").write_text(model_card(backbone, recipe, step, rows, own_parts(partial)))
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    if old.exists():
        shutil.rmtree(old)


def own_parts(folder: Path) -> list[str]:
    """The components of an exported pipeline whose class is fastgen's own."""
    index = folder / "model_index.json"
    parts = json.loads(index.read_text()).items() if index.is_file() else ()
    return [name for name, entry in parts if isinstance(entry, list) and entry[0] == few_step.__name__]


def model_card(
    backbone: Backbone, recipe: Recipe, step: int, rows: Mapping[str, Mapping[str, float]], own: Sequence[str] = ()
) -> str:
    """Markdown: what it is, how to call it, the numbers, the recipe. own: components of a class of fastgen's."""
    teacher = to_dict(recipe.backbone)
    call = CALL.replace("{call}", backbone.call) if isinstance(backbone, PipelineBackbone) else OWN_CALL
    load = loading(backbone, recipe)
    if own and not recipe.rollout.inputs:
        load = f"import {few_step.__name__}\n\n{load}"
        call += OWN_PARTS.replace("{parts}", " and its ".join(own))
    call = call.replace("{load}", load)
    if recipe.rollout.inputs:
        call += TOLD + (ANY_STEP if recipe.rollout.any_step else "")
    eta = f", eta={recipe.rollout.eta:g}" if recipe.rollout.transition == "tcd" else ""
    call = call.replace("{num_steps}", str(recipe.rollout.num_steps)).replace("{eta}", eta)
    call = call.replace("{timesteps}", str([round(t, 6) for t in recipe.rollout.timesteps]))
    source = teacher.get("path", "an analytic mixture of Gaussians")
    return f"""---
library_name: {"diffusers" if isinstance(backbone, PipelineBackbone) else "fastgen"}
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


def loading(backbone: Backbone, recipe: Recipe) -> str:
    """The lines that load the export: a whole pipeline, or an adapter for the original one."""
    if isinstance(backbone, PipelineBackbone) and recipe.rollout.inputs:
        name = flow_map.PREFIX + backbone.parts["_class_name"]
        return f'from {flow_map.__name__} import {name}\n\npipeline = {name}.from_pretrained("path/to/this/folder")'
    if not isinstance(backbone, PipelineBackbone) or "student" not in recipe.lora:
        return 'pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder")'
    lines = [f'pipeline = DiffusionPipeline.from_pretrained("{backbone.config.path}")']
    for i, file in enumerate(backbone.lora_files):
        more = f', load_into_transformer_2=True, adapter_name="few_step_{i + 1}"' if i else ""
        lines.append(f'pipeline.load_lora_weights("path/to/this/folder", weight_name="{file}"{more})')
    scheduler = type(backbone.student_scheduler(recipe.rollout))
    kind, module = scheduler.__name__, scheduler.__module__
    lines[0] = f"from {'diffusers' if module.startswith('diffusers.') else module} import {kind}\n\n{lines[0]}"
    lines.append(f'pipeline.scheduler = {kind}.from_pretrained("path/to/this/folder", subfolder="scheduler")')
    return "\n".join(lines)


def number_table(recipe: Recipe, rows: Mapping[str, Mapping[str, float]]) -> str:
    """How they were measured, then one line a row, one column a metric."""
    if not rows:
        return "Not measured at this checkpoint; `fastgen eval` does."
    columns = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    head = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    body = [f"| {name} | " + " | ".join(f"{m[c]:.4g}" for c in columns) + " |" for name, m in rows.items()]
    scale = recipe.eval.teacher_guidance_scale
    said = f"{recipe.eval.quick_num_samples} samples; the teacher at guidance scale {scale}."
    return "\n".join([said, "", *head, *body])


def export_run(
    run: Path, output: Path | None = None, merge: bool = False, rows: Mapping[str, Mapping[str, float]] | None = None
) -> Path:
    """Exports the moving average in the last complete checkpoint of a run. merge: a LoRA run's adapter is added into
    the weights, and the export is a whole pipeline.

    Raises ValueError if there is no checkpoint, or if `output` exists and is not an export."""
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
    backbone.adapters = recipe.lora
    student = recipe.objective.make_student(backbone, recipe.rollout)
    student.load_state_dict(load_file(checkpoints[-1] / "ema.safetensors"))
    step = int(checkpoints[-1].name.removeprefix(checkpoint.PREFIX))
    if merge and isinstance(student, LoraDenoiser):
        student = student.shared.unload(student.role or "")
        recipe = dataclasses.replace(recipe, lora={r: c for r, c in recipe.lora.items() if r != "student"})
    export(student, backbone, recipe, folder, step, rows or {})
    return folder
