"""What stands beside the numbers of a student: those of its teacher, its samples, and the metrics during training."""

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fastgen.evaluation.charts import TEACHER
from fastgen.evaluation.evaluate import draw_samples, evaluate_with_samples, facts_of, find_images, find_reference
from fastgen.evaluation.numbers import known_numbers, row_name
from fastgen.evaluation.results import Row
from fastgen.metrics import DIRECTIONS
from fastgen.metrics.reference import Reference
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
    return teacher_sampler(sampler.backbone, steps, scale, sampler.denoiser, sampler.weights_folder)


def teacher_settings(config: EvalConfig) -> tuple[int, float | tuple[float, ...] | None]:
    """The teacher's number of steps and guidance scale; None for the scale of the run's recipe."""
    return max(config.teacher_steps, default=50), config.teacher_guidance_scale


def teacher_rows(
    teacher: Sampler,
    config: EvalConfig,
    known: Sequence[Row],
    partial: Path | None = None,
    progress: bool = True,
    reference: Reference | None = None,
) -> list[Row]:
    """The teacher's results at each of `eval.teacher_steps`, measured as its student is. known: rows of an earlier
    evaluation, which are taken where they were measured in the same way. partial: of the student; the teacher's, which
    the caller must remove too, are `partial_of` it."""
    rows, reference = list[Row](), reference or find_reference(teacher.backbone.output, config, teacher.part)
    for steps in config.teacher_steps:
        sampler = teacher.with_policy(teacher.backbone.teacher_policy(steps))
        facts = facts_of(sampler, config, reference)
        values = known_numbers(known, facts, config.metrics)
        if values is None:
            print(f"measuring the teacher at {steps} steps", flush=True)
            unfinished = partial and partial_of(partial, steps)
            result = evaluate_with_samples(sampler, config, progress, unfinished, reference)[0]
        else:
            print(f"the teacher at {steps} steps was measured in the same way before, and is not measured again")
            result = {"metrics": values, **facts}
        rows.append({"name": teacher_name(sampler), **result})
    return rows


def partial_of(partial: Path, steps: int) -> Path:
    """The file for what an interrupted evaluation of the teacher has gathered."""
    return partial.with_name(f"teacher_{steps}.{partial.name}")


def teacher_samples(teacher: Sampler, config: EvalConfig, prompts: Sequence[str]) -> dict[str, Tensor]:
    """The teacher's samples of the first prompts, with the student's seeds, by the name that the page gives them; {}
    for points."""
    if teacher.backbone.output == "points":
        return {}
    images = find_images(teacher, config)
    pixels = draw_samples(teacher, config.seed, prompts, images, 0, min(PICTURES, len(prompts)))
    return {teacher_name(teacher): stills(pixels) if pixels.dim() == 5 else pixels}


def teacher_name(teacher: Sampler) -> str:
    return row_name(TEACHER, len(teacher.policy.timesteps))


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
