"""`fastgen eval`: measures what lies in a folder, be it a run, an export, a pipeline or pictures."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from fastgen import noise
from fastgen.backbones.base import Backbone
from fastgen.data.controls import references_of
from fastgen.data.digits import label_of
from fastgen.data.files import check_output, write_json
from fastgen.data.prompts import prompt_file, read_prompts
from fastgen.evaluation.beside import (
    partial_of,
    teacher_of,
    teacher_rows,
    teacher_samples,
    teacher_settings,
    training_curves,
)
from fastgen.evaluation.config import merged_scorers
from fastgen.evaluation.evaluate import (
    evaluate_images_with_samples,
    evaluate_with_samples,
    find_prompts,
    find_reference,
    image_prompts,
    teacher_reference,
)
from fastgen.evaluation.measure import KEPT
from fastgen.evaluation.numbers import row_name, store_numbers, stored_numbers
from fastgen.evaluation.results import Row, print_results, write_page
from fastgen.metrics import METRICS
from fastgen.metrics.points import labels_of
from fastgen.metrics.reference import TEACHER, Reference, given_files, sample_files
from fastgen.recipe import EvalConfig
from fastgen.registry import here_or_shipped
from fastgen.rewards import SCORERS
from fastgen.sampling.adapters import Adapter, with_adapters
from fastgen.sampling.original import export_folder, with_teacher_first
from fastgen.sampling.sampler import METADATA, Routed, Sampler, load_sampler, pipeline_config, source_of
from fastgen.sampling.views import views

VIEWED, MOST_STEPS_SHOWN = 4, 16  # samples, and steps, that a page shows from noise on


def exact_points(backbone: Backbone, config: EvalConfig, sampler: Sampler) -> Tensor:
    """Exact samples with the labels of the first evaluated samples, which are drawn behind those."""
    prompts = find_prompts(sampler, config, None)[: KEPT[2]]
    key = noise.make_key(config.seed, "exact", 0)
    labels = labels_of(backbone.law, prompts)
    return backbone.law.sample(torch.arange(len(prompts)), labels, key).flatten(1).float()


@dataclasses.dataclass
class Found:
    """What was measured. rows: the folder's own result, and those of its teacher. samples, captions: of a page, by the
    name that it gives them. views: see `first_views`."""

    rows: list[Row]
    samples: dict[str, Tensor]
    captions: dict[str, list[str]]
    views: Tensor | None = None


def evaluate_path(
    path: Path,
    *,
    output: Path | None = None,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    teacher_first: int = 0,
    adapters: Sequence[Adapter] = (),
    student_only: bool = False,
    progress: bool = True,
    overwrite: bool = True,
    **options: Any,
) -> Row:
    """`fastgen eval`: measures a run folder, an export, a diffusers pipeline folder or a folder of images.

    options: fields of EvalConfig; None means not given. metrics may be one text, "a,b". If the folder has a
    recipe.yaml, the fields that are not given come from its `eval:` section. Without a recipe, all images of a folder
    are measured, and compared with the held-out digits where the features are those of digits, unless reference or
    prompts say otherwise; and a pipeline has the prompts of `with_own_prompts`.
    device: by default a GPU if there is one. teacher_first: how many of a student's first steps its teacher makes
    instead (`sampling.teacher_first`), with the most of eval.teacher_steps and eval.teacher_guidance_scale. adapters:
    see `sampling.adapters`.

    With eval.teacher_steps, the teacher of a run or an export is measured in the same way, at each of these numbers of
    steps; numbers that the export has from such a measurement are taken instead. The result has the teacher's rows in
    "teachers". The numbers of a student as it is exported also go into the model card of the export, with the
    teacher's, in place of earlier ones. With adapters, the teacher is only shown. student_only: none of these.

    Prints a table. output: a JSON file, which is written together with an HTML page of the same stem. With
    teacher_steps, the page of a student also shows samples of its teacher, of the same prompts and seeds. An
    interrupted evaluation leaves <stem>.partial.safetensors there; the same call continues from it and gives the same
    result.
    Raises ValueError for anything that does not fit."""
    given_path, path = path, here_or_shipped(path)
    if output is not None:
        check_outputs(Path(output), overwrite)
    if not path.is_dir():
        raise ValueError(f"there is no folder {given_path}")
    given = {k: str(v) if isinstance(v, Path) else v for k, v in options.items() if v is not None}
    config, own = path_config(path, given)
    config.check()
    name, started = path.resolve().name, time.perf_counter()
    partial = None if output is None else Path(output).with_suffix(".partial.safetensors")
    chosen, export = device or ("cuda" if torch.cuda.is_available() else "cpu"), None
    if is_image_folder(path):
        if (num_steps, guidance_scale, negative_prompt) != (None, None, None) or teacher_first or adapters:
            raise ValueError(
                f"{path} is a folder of images, and nothing is sampled; leave out the number of steps, the guidance "
                "scale, the negative prompt, adapters and the teacher's first steps"
            )
        result, kept = evaluate_images_with_samples(path, config, progress, partial, chosen)
        prompts = image_prompts(sample_files(path), config)
        found = Found([{"name": name, **result}], {name: kept}, {name: prompts})
    else:
        if not own:
            config = with_own_prompts(path, config)
        sampler = load_sampler(
            path,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            image=config.images is not None,
            references=None if config.images is None else references_of(given_files(config.images)),
            device=chosen,
            dtype=dtype,
        )
        if teacher_first:
            sampler = with_teacher_first(path, sampler, teacher_first, *teacher_settings(config))
            name = f"{name}, teacher first {teacher_first}"
        sampler = with_adapters(sampler, adapters)
        found = measure_sampler(path, name, sampler, config, not student_only, not adapters, partial, progress)
        as_exported = not (student_only or adapters or teacher_first or num_steps or dtype)
        export = export_folder(path) if as_exported and len(found.rows) > len(config.teacher_steps) else None
    print_results(found.rows)
    counted = "; images_per_second leaves out loading and the first batch" if "throughput" in config.metrics else ""
    print(f"{config.num_samples} samples in {time.perf_counter() - started:.0f} seconds, with loading{counted}")
    first, *teachers = found.rows
    if output is not None:
        write_json(Path(output), first | ({"teachers": teachers} if teachers else {}))
        write_page(Path(output).with_suffix(".html"), found.rows, found.samples, found.captions, found.views)
        print(f"{output} has the results, and {Path(output).with_suffix('.html')} the page")
    if export is not None:
        tell_card(export, found.rows)
    if partial is not None:
        for file in (partial, *(partial_of(partial, steps) for steps in config.teacher_steps)):
            file.unlink(missing_ok=True)
    return first | ({"teachers": teachers} if teachers else {})


def check_outputs(output: Path, overwrite: bool) -> None:
    """Raises ValueError if the results file or its page cannot be written, or must not be replaced."""
    if output.suffix == ".html":
        raise ValueError(f"--output is the results file, such as {output.with_suffix('.json')}; the page is made")
    for file in (output, output.with_suffix(".html")):
        check_output(file, overwrite)


def measure_sampler(
    path: Path,
    name: str,
    sampler: Sampler,
    config: EvalConfig,
    beside: bool,
    measured: bool,
    partial: Path | None,
    progress: bool,
) -> Found:
    """What is measured of samples that are made here. beside: whether a student stands beside its teacher, if there
    are eval.teacher_steps. measured: whether the teacher is measured at them, too, and not only shown on the page.
    partial: where a page is wanted, the file for what an interrupted call has gathered."""
    teacher = cache(lambda: teacher_of(path, sampler, config))
    if config.reference == TEACHER:
        reference: Reference | None = teacher_reference(teacher(), config)
    else:
        reference = find_reference(sampler.backbone.output, config, sampler.part)
    result, kept = evaluate_with_samples(sampler, config, progress, partial, reference)
    prompts = find_prompts(sampler, config, reference)
    curves = training_curves(path)
    found = Found([{"name": name, **result, **({"curves": curves} if curves else {})}], {name: kept}, {name: prompts})
    export = export_folder(path)
    if beside and config.teacher_steps and export is not None and (measured or partial is not None):
        try:
            original = teacher()
        except (ValueError, OSError) as error:
            print(f"there are no numbers and no samples of the teacher: {error}")
        else:
            if measured:
                found.rows += teacher_rows(original, config, stored_numbers(export), partial, progress, reference)
            if partial is not None:
                shown = teacher_samples(original, config, prompts)
                found.samples, found.captions = found.samples | shown, found.captions | dict.fromkeys(shown, prompts)
    if partial is not None:
        found.views = first_views(sampler, prompts, config.seed)
    if sampler.backbone.law is not None:
        found.samples["exact"] = exact_points(sampler.backbone, config, sampler)
    return found


def tell_card(export: Path, rows: Sequence[Row]) -> None:
    """Writes the newest numbers of a student and its teacher into the export, and says so."""
    student, *teachers = ({key: value for key, value in row.items() if key != "curves"} for row in rows)
    student["name"] = row_name("student", len(student["policy"]["timesteps"]))
    try:
        shown = store_numbers(export, [student, *(t | {"name": t["name"].removeprefix("its ")} for t in teachers)])
    except OSError as error:
        print(f"the numbers could not be written into {export}: {error}")
        return
    if shown:
        print(f"{export / 'README.md'}, the model card, has these numbers")


def first_views(sampler: Sampler, prompts: Sequence[str], seed: int) -> Tensor | None:
    """The clean predictions of the first samples after each step, of a sampler of a few steps whose samples are
    pictures made from prompts; else None."""
    few = 1 < sampler.policy.num_steps <= MOST_STEPS_SHOWN and sampler.policy.chunks is None
    pictures = sampler.backbone.output == "pixels" and not sampler.backbone.takes_given
    if not (few and pictures) or isinstance(sampler, Routed):
        return None
    first = list(prompts[:VIEWED])
    return views(sampler, first, [seed + i for i in range(len(first))])[1]


def with_own_prompts(path: Path, config: EvalConfig) -> EvalConfig:
    """The config for a plain pipeline of images: if neither a reference nor prompts are given, with the prompts that
    it knows (`prompt_file`), and compared with the held-out digits if these are digits. Raises ValueError, before
    weights load, if it knows none."""
    folder = source_of(path)
    given = {config.reference, config.prompts, config.images} != {None}
    if given or (folder / METADATA).is_file() or (section := pipeline_config(folder)).output != "pixels":
        return config
    if not section.takes_prompts:
        return dataclasses.replace(config, prompts=("",))
    file = prompt_file(str(path))
    if file is None:
        raise ValueError(
            f"{path} has no prompts.txt, in it or beside it; give --prompts, or --reference with captions"
        )
    if names_digits(read_prompts(file)):
        return dataclasses.replace(config, reference="digits")
    print(f"the prompts are those of {file}; --prompts gives others")
    return dataclasses.replace(config, prompts=file)


def names_digits(prompts: Sequence[str]) -> bool:
    try:
        return all(label_of(prompt) >= 0 for prompt in prompts)
    except ValueError:
        return False


def is_image_folder(path: Path) -> bool:
    return not any((path / name).is_file() for name in ("model_index.json", "fastgen.json", "recipe.yaml"))


def path_config(path: Path, given: Mapping[str, Any]) -> tuple[EvalConfig, bool]:
    """The evaluation config of a folder, and whether the folder has a recipe.yaml."""
    values: dict[str, Any] = {}
    own = (path / "recipe.yaml").is_file()
    if own:
        # Only this section is read, because files that only training needs may be missing.
        values = (yaml.safe_load((path / "recipe.yaml").read_text()) or {}).get("eval") or {}
    elif is_image_folder(path):
        values = {"num_samples": len(sample_files(path))}
    values |= {**given, "scorers": merged_scorers(values.get("scorers", {}), given.get("scorers", {}))}
    if isinstance(values.get("metrics"), str):
        values["metrics"] = tuple(name.strip() for name in values["metrics"].split(",") if name.strip())
    compared = not set(values.get("metrics", ())) <= set(SCORERS) and values.get("features", "digits") == "digits"
    if not own and is_image_folder(path) and compared:
        values = {"reference": "digits"} | values
    if "metrics" not in values:
        raise ValueError(
            f"no metrics are given, neither as --metrics a,b nor by a recipe.yaml in {path}; choose from "
            f"{', '.join(METRICS)}"
        )
    try:
        return TypeAdapter(EvalConfig).validate_python(values), own
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise ValueError("\n".join(line.removeprefix(": ") for line in lines)) from None
