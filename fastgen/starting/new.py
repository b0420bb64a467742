"""`fastgen new`: a complete recipe for a pipeline, with a comment for every choice.

The pipeline gives its guidance, its numbers of steps and the shift of its noise levels (facts.py); the other values
come from shipped recipes and published ones (values.py); `fastgen plan`'s own count gives the batch size."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastgen.config import build_recipe
from fastgen.config.sections import SECTIONS
from fastgen.config.text import apply_override
from fastgen.data.prompts import read_prompts
from fastgen.planning.plan import CONTEXT, Plan, plan
from fastgen.planning.report import HEADROOM, advise
from fastgen.recipe import Recipe
from fastgen.registry import RecipeError, build_section
from fastgen.starting.comments import written
from fastgen.starting.facts import Wishes, look_at
from fastgen.starting.values import IMAGES, first_values

PROMPTED = ("dmd2", "sid", "vdot", "phased_dmd", "gndm", "adm", "rtdmd")  # objectives that need no data but prompts
# those that have a recipe for the digits; ode_regression is left out, whose pairs `fastgen prepare` makes first
TEMPLATES = (*PROMPTED, "consistency", "scm", "flow_map", "mean_flow")
MEMORY = 80.0  # GB, assumed for a large network where there is no GPU


def first_recipe(wishes: Wishes) -> tuple[str, Plan]:
    """The text of the recipe, and its plan. Raises ValueError, in words, for a pipeline or an objective that is not
    supported, and RecipeError for a combination that is not."""
    if wishes.objective not in TEMPLATES:
        raise ValueError(f"objective {wishes.objective}: `fastgen new` writes recipes for {', '.join(TEMPLATES)}")
    facts = look_at(wishes.pipeline)
    if wishes.guidance is not None:
        facts = replace(facts, guidance=wishes.guidance)
    values = first_values(wishes, facts)
    check_data(wishes, values)
    memory = wishes.memory or memory_here() or (MEMORY if facts.large else None)
    found = plan(built(values), wishes.gpus, gpu=memory is not None)
    if memory is not None:
        values, found = fitted(values, found, memory, wishes.gpus, facts.large)
    return written(wishes, facts, values, found.peak), found


def check_data(wishes: Wishes, values: Mapping[str, Any]) -> None:
    """Raises ValueError for an objective that trains on pictures, if none are given."""
    objective = build_section("objective", values["objective"], *SECTIONS["objective"])
    if objective.needs & {"latents", "pixels"} and wishes.images is None:
        raise ValueError(f"objective {wishes.objective} trains on pictures: give --images FOLDER, or choose dmd2")


def built(values: Mapping[str, Any]) -> Recipe:
    try:
        return build_recipe(values)
    except RecipeError as error:
        raise RecipeError(f"the recipe would not run: {error}") from None


def memory_here() -> float | None:
    """GB of the first GPU; None without one."""
    return torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else None


def fitted(
    values: dict[str, Any], found: Plan, gigabytes: float, gpus: int, large: bool
) -> tuple[dict[str, Any], Plan]:
    """The values with the fewest lines that make them fit; those of a large network that fits as it is, with the
    largest batch size that still does. Raises ValueError if nothing makes them fit."""
    memory = gigabytes * 1e9 * (1 - HEADROOM) - CONTEXT
    if found.peak > memory:
        advice = advise(found, memory)
        if advice.lines is None:
            enough = f"; {advice.gpus} GPUs would hold it, sharded" if advice.gpus else ""
            raise ValueError(
                f"with every change that saves memory it takes {advice.peak / 1e9:.1f} GB on each GPU, and "
                f"{gigabytes:g} GB leave {max(memory, 0) / 1e9:.1f}{enough}"
            )
        for line in advice.lines:
            apply_override(values, line)
        return values, plan(built(values), gpus, gpu=True)
    least = values["train"]["batch_size"]
    most = max(least, IMAGES // gpus)
    if not large or 2 * least > most:
        return values, found
    twice = plan(built(with_batch(values, 2 * least, most)), gpus)
    each = max(1, twice.peak - found.peak)  # activations grow in proportion to the batch
    times = 1 << (min(most // least, 1 + int((memory - found.peak) / each)).bit_length() - 1)
    while times > 1:
        chosen = with_batch(values, times * least, most)
        tried = twice if times == 2 else plan(built(chosen), gpus)
        if tried.peak <= memory:
            return chosen, tried
        times //= 2
    return values, found


def with_batch(values: Mapping[str, Any], size: int, images: int) -> dict[str, Any]:
    """The values with this batch size, and as many micro-batches as make an update of `images` on each GPU."""
    return {**values, "train": {**values["train"], "batch_size": size, "accumulate": max(1, images // size)}}


def next_commands(output: Path, recipe: Recipe) -> Sequence[str]:
    """What to run next, with a prompt of the evaluation."""
    run, prompt = shlex.quote(str(recipe.output_dir)), read_prompts(recipe.eval.prompts or "neutral")[0]
    return (
        f"fastgen train {shlex.quote(str(output))}",
        f"fastgen sample {run} --prompt {shlex.quote(prompt)} --num-images 4 --output pictures",
        f"fastgen eval {run}",
        f"fastgen demo {run}",
    )
