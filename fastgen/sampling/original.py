"""What an export was distilled from."""

from collections.abc import Sequence
from pathlib import Path

from fastgen.backbones import BACKBONES
from fastgen.backbones.base import BackboneConfig
from fastgen.backbones.pipeline_config import PipelineConfig
from fastgen.config import load_stored
from fastgen.recipe import Recipe
from fastgen.registry import build_section
from fastgen.sampling.sampler import METADATA, Sampler, read_metadata, teacher_sampler
from fastgen.sampling.teacher_first import TeacherFirst, check_first


def export_folder(path: Path) -> Path | None:
    """The export of a run, or the export that `path` is; None for anything else."""
    return next((folder for folder in (path / "export", path) if (folder / METADATA).is_file()), None)


def original(folder: Path, several: bool = False) -> tuple[BackboneConfig, Recipe]:
    """The backbone section of an export's teacher, and the recipe of its run. several: as in `read_metadata`. Raises
    ValueError if the teacher's files are gone."""
    config = build_section("backbone", read_metadata(folder, several)["backbone"], BACKBONES, BackboneConfig)
    config.check()
    return config, load_stored(folder / "recipe.yaml")


def original_teacher(
    folder: Path, student: Sampler, num_steps: int | None = None, guidance_scale: float | Sequence[float] | None = None
) -> Sampler:
    """The teacher of an export, as its stock pipeline samples, on the student's device and in its dtype. num_steps,
    guidance_scale: by default the most of `eval.teacher_steps` (or 50), and the scale of the run's recipe."""
    section, recipe = original(folder, several=True)
    backbone = section.build(student.backbone.device, student.backbone.dtype, 0)
    steps = num_steps or max(recipe.eval.teacher_steps, default=50)
    scale = recipe.teacher_guidance if guidance_scale is None else guidance_scale
    weights = section.local_folder() if isinstance(section, PipelineConfig) else None
    return teacher_sampler(backbone, steps, scale, weights=weights, part=student.part)


def with_teacher_first(
    path: Path, student: Sampler, first: int, num_steps: int | None, guidance_scale: float | Sequence[float] | None
) -> Sampler:
    """The sampler in which the teacher makes the student's first steps; the student's own for first = 0. num_steps,
    guidance_scale: of the teacher, as in `original_teacher`. Raises ValueError for them without a first step, and for
    a pipeline that was not distilled."""
    if not first:
        if (num_steps, guidance_scale) != (None, None):
            raise ValueError("the teacher's steps and guidance are for its first steps: say how many it makes")
        return student
    folder = export_folder(path)
    if folder is None:
        raise ValueError(f"{path} was not distilled, so that it has no teacher to make the first steps")
    check_first(student.policy, first)  # before the teacher's weights load
    return TeacherFirst(student, original_teacher(folder, student, num_steps, guidance_scale), first)
