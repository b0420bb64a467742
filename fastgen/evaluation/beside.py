"""What the page of a run shows beside its numbers: the teacher's samples, and the metrics during training."""

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fastgen.evaluation.charts import TEACHER
from fastgen.evaluation.evaluate import draw_samples, find_images
from fastgen.metrics import DIRECTIONS
from fastgen.recipe import EvalConfig
from fastgen.sampling.original import export_folder, original_teacher
from fastgen.sampling.sampler import Sampler, teacher_sampler
from fastgen.sampling.teacher_first import TeacherFirst
from fastgen.sampling.video import stills

PICTURES = 8  # of the teacher on a page; each takes all of its steps
QUICK = "eval/"  # of the keys of log.jsonl that were measured during training


def teacher_of(path: Path, sampler: Sampler, config: EvalConfig) -> Sampler:
    """The teacher of a run or an export, as its stock pipeline samples. Any other pipeline is its own teacher."""
    steps, given = teacher_settings(config)
    if isinstance(sampler, TeacherFirst):
        return sampler.original
    folder = export_folder(path)
    if folder is not None:
        return original_teacher(folder, sampler, steps, given)
    scale = sampler.guidance_scale if given is None else given
    return teacher_sampler(sampler.backbone, steps, scale, sampler.denoiser)


def teacher_settings(config: EvalConfig) -> tuple[int, float | tuple[float, ...] | None]:
    """The teacher's number of steps and guidance scale; None for the scale of the run's recipe."""
    return max(config.teacher_steps, default=50), config.teacher_guidance_scale


def teacher_samples(path: Path, sampler: Sampler, config: EvalConfig, prompts: Sequence[str]) -> dict[str, Tensor]:
    """The teacher's samples of the first prompts, with the student's seeds, by the name that the page gives them. {}
    for a folder that is no student's, for points, and where the teacher's files are gone."""
    if export_folder(path) is None or sampler.backbone.output == "points":
        return {}
    try:
        teacher = teacher_of(path, sampler, config)
    except (ValueError, OSError) as error:
        print(f"the page shows no samples of the teacher: {error}")
        return {}
    images = find_images(sampler, config)
    pixels = draw_samples(teacher, config.seed, prompts, images, 0, min(PICTURES, len(prompts)))
    return {teacher_name(teacher): stills(pixels) if pixels.dim() == 5 else pixels}


def teacher_name(teacher: Sampler) -> str:
    return f"{TEACHER}{len(teacher.policy.timesteps)} steps"


def training_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The metrics that a run has in its log, name -> [(update, value)], in the order of the updates. A run that went
    back to an earlier checkpoint has measured some updates twice: the last value counts."""
    log, found = path / "log.jsonl", dict[str, dict[int, float]]()
    for line in log.read_text().splitlines() if log.is_file() else ():
        row = json.loads(line)
        for key, value in row.items():
            name = key.removeprefix(QUICK)
            if key != name and name in DIRECTIONS:
                found.setdefault(name, {})[row["step"]] = value
    return {name: sorted(values.items()) for name, values in found.items()}
