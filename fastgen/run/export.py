"""Exports a student as a folder: weights, scheduler, recipe, and a model card that says how to call it."""

import dataclasses
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

import fastgen
from fastgen.backbones.base import Backbone
from fastgen.config import load_stored
from fastgen.config.stored import dump_recipe, to_dict
from fastgen.data.files import check_place, unused_sibling
from fastgen.denoiser import Denoiser
from fastgen.modules.sharding import gathered
from fastgen.recipe import Recipe
from fastgen.run import checkpoint
from fastgen.run.card import copy_pictures, source_of, write_card
from fastgen.run.leftovers import REPLACED, restore
from fastgen.run.licence import copy_licence_texts
from fastgen.sampling.sampler import METADATA


def export(
    student: Denoiser,
    backbone: Backbone,
    recipe: Recipe,
    folder: Path,
    step: int,
    values: Iterable[tuple[str, Tensor]] | None = None,
    merge: bool = False,
    dtype: torch.dtype | None = None,
    run: Path | None = None,
) -> None:
    """Writes an export folder. It is written under a name that nothing else has and takes its place when it is
    complete; an earlier export is removed only then, and put back if that fails. A folder in its place that is no
    export is kept, as NAME.kept-<random>.

    step: student updates made. values: name in the student's state_dict -> tensor, instead of the student's own.
    merge, dtype: see `export_run`. run: the run's folder, for its pictures."""
    restore(folder)
    partial, old = unused_sibling(folder, "partial"), unused_sibling(folder, REPLACED)
    if stranger := folder.exists() and not (folder / METADATA).is_file():
        old = old.with_name(old.name.replace(REPLACED, "kept").removeprefix("."))
    try:
        whole = recipe.rollout.inputs or recipe.rollout.chunks is not None  # what an adapter could not say
        adapter = student.is_adapter and backbone.stores_adapters and not (whole or merge)
        backbone.save_values(student, values or gathered(student), recipe.rollout, partial, not adapter, dtype)
        metadata = {
            "lora": adapter,
            "fastgen": fastgen.__version__,
            "backbone": to_dict(recipe.backbone),
            "policy": to_dict(recipe.rollout),
            **({} if recipe.part is None else {"part": to_dict(recipe.part)}),
        }
        (partial / METADATA).write_text(json.dumps(metadata, indent=2) + "\n")
        (partial / "recipe.yaml").write_text(dump_recipe(recipe))
        if run is not None:
            copy_pictures(run, partial, step)
        copy_licence_texts(source_of(recipe), partial)
        write_card(backbone, recipe, partial, step)
        if folder.exists():
            folder.rename(old)
        try:
            partial.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        if not stranger:
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def export_run(
    run: Path,
    output: Path | None = None,
    merge: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """Exports the moving average from the last complete checkpoint of a run. Of the weights, one tensor at a time is
    in memory. merge: adds the adapter of a LoRA run into the weights, so that the export is a whole pipeline. dtype:
    of the student's networks, by default that of the stored teacher, and of an adapter its own.

    Raises ValueError if `run` is not a run folder or has no complete checkpoint, or if `output` exists and is not an
    export. Raises CheckpointError if the checkpoint is damaged."""
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"{run} is not a run folder: it has no recipe.yaml")
    checkpoints = checkpoint.complete(run / "checkpoints")
    if not checkpoints:
        raise ValueError(f"{run} has no complete checkpoint; continue the run, with train.checkpoint_every above 0")
    folder = output or run / "export"
    if folder.exists() and not (folder / METADATA).is_file():
        raise ValueError(f"{folder} exists and is not an export; choose another folder")
    check_place(folder)
    recipe = load_stored(run / "recipe.yaml")
    checkpoint.verify(checkpoints[-1], only="ema")
    step = int(checkpoints[-1].name.removeprefix(checkpoint.PREFIX))
    student, backbone = empty_student(recipe)
    values = checkpoint.stored_tensors(checkpoints[-1], "ema", student.state_dict())
    if merge and student.is_adapter:
        recipe = dataclasses.replace(recipe, lora={r: c for r, c in recipe.lora.items() if r != "student"})
    export(student, backbone, recipe, folder, step, values, merge, dtype, run)
    return folder


def export_sharded(
    average: Denoiser, recipe: Recipe, folder: Path, step: int, writer: bool, run: Path | None = None
) -> None:
    """Exports an average that is sharded over processes. All of them call this and gather one tensor at a time; the
    `writer` writes it."""
    values = gathered(average)
    try:
        if writer:
            student, backbone = empty_student(recipe)
            export(student, backbone, recipe, folder, step, values=values, run=run)
    finally:
        for _ in values:  # gathering needs every process, even one that does not write or whose write failed
            pass


def empty_student(recipe: Recipe) -> tuple[Denoiser, Backbone]:
    """The student of a recipe, to be given values: a pipeline's takes no memory."""
    from fastgen.run.build import build_backbone  # accelerate takes seconds to import

    backbone = build_backbone(recipe, torch.device("cpu"), dtype=torch.float32, deferred=True)
    return recipe.objective.make_student(backbone, recipe.rollout), backbone
