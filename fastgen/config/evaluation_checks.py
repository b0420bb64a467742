"""Whether a recipe's evaluation can be made: one that cannot would be found only after the last update."""

from collections.abc import Sequence
from typing import Any

from fastgen.data.controls import KINDS, controls_like, kind_of, named_kinds
from fastgen.data.prompts import PromptData, read_prompts
from fastgen.data.sounds import check_whole
from fastgen.data.videos import check_lengths
from fastgen.metrics import METRICS
from fastgen.metrics.reference import TEACHER, given_files, need_captions, open_reference
from fastgen.recipe import Recipe
from fastgen.registry import RecipeError


def check_evaluation(recipe: Recipe) -> None:
    """Checks that the metrics fit the samples of this backbone, and have prompts and the reference that they need: an
    evaluation that cannot be made would be found only after the last update."""
    config, output, backbone = recipe.eval, recipe.backbone.output, recipe.backbone.name
    for name in config.metrics:
        metric = METRICS[name]
        if not metric.fits(output, backbone):
            other = metric.output not in (output, "any")
            measured = metric.output if other else f"the law of {' or '.join(metric.backbones)}"
            raise RecipeError(
                f"eval.metrics: {name} measures {measured}, and backbone {backbone} gives {output}; choose from "
                f"{', '.join(n for n, m in METRICS.items() if m.fits(output, backbone))}"
            )
        if metric.needs_reference and config.reference is None:
            raise RecipeError(
                f"eval.reference: {name} compares with other images; set it to their folder, to teacher or to digits"
            )
    if config.reference is not None and output != "pixels":
        raise RecipeError(
            f"eval.reference: it is for images, and backbone {recipe.backbone.name} gives {output}; leave it out"
        )
    if (config.images is not None) != recipe.backbone.takes_given:
        raise RecipeError(
            f"eval.images: backbone {backbone} makes its samples from {', '.join(recipe.backbone.given)}; give a "
            f"folder of {named_kinds(recipe.backbone.given)}"
            if recipe.backbone.takes_given
            else f"eval.images: backbone {backbone} makes its samples from prompts alone; leave it out"
        )
    if {config.prompts, config.reference, config.images} == {None} and not recipe.backbone.has_exact_law:
        raise RecipeError(
            "eval.prompts: there are no prompts to sample; give a file or a list of prompts, or give "
            "eval.reference, whose prompts are then used"
        )
    fewest = max(METRICS[name].fewest_samples for name in config.metrics)
    if config.quick().num_samples < fewest:
        raise RecipeError(f"eval.num_samples and eval.quick_num_samples must be at least {fewest} for these metrics")


def check_part(recipe: Recipe) -> None:
    """Checks that the data and the evaluation of one of several students can be divided by prompt."""
    if recipe.part is None:
        return
    if recipe.data.sizes:
        raise ValueError("part: pictures of several sizes cannot be divided by prompt; leave out data.buckets")
    if recipe.eval.images is not None:
        raise ValueError("part: the pictures of eval.images cannot be divided by prompt; leave them out")


def check_data_part(recipe: Recipe) -> None:
    """Checks that a file or a list of prompts has some for one of several students."""
    data, part = recipe.data, recipe.part
    if part is not None and isinstance(data, PromptData):
        prompts = read_prompts(data.prompts, data.column)
        if not any(part.has(prompt) for prompt in prompts):
            raise ValueError(f"prompts: none of the {len(prompts)} is for student {part.index} (part)")


def check_measured(recipe: Recipe) -> None:
    """Checks the prompts of an evaluation, as far as files say them: there are some, one of several students has some,
    metrics can read them, and those which compare the samples of a prompt find two, at the end of training and during
    it."""
    config, part, metrics = recipe.eval, recipe.part, [METRICS[name] for name in recipe.eval.metrics]
    if config.prompts is not None:
        prompts: Sequence[str] = read_prompts(config.prompts)
    elif config.reference not in (None, TEACHER) and config.images is None:
        assert config.reference is not None
        prompts = open_reference(config.reference).prompts
        if recipe.backbone.takes_prompts:
            need_captions(prompts, config.reference)
    else:
        return
    kept = [prompt for prompt in prompts if part is None or part.has(prompt)]
    if part is not None and not kept:
        raise ValueError(f"prompts: none of the {len(prompts)} is for student {part.index} (part)")
    for metric in metrics:
        metric.check_prompts(kept)
    for each in (config.quick(), config):
        each.check_repeats(kept)


def check_given(recipe: Recipe) -> None:
    """Checks that the files which the samples of an evaluation are made from are of the backbone's kind, and that
    control videos and sounds are long enough."""
    config: Any = recipe.backbone
    if recipe.eval.images is None or not config.takes_given:
        return
    files, (wanted,) = given_files(recipe.eval.images), config.given
    if kind_of(files[0]) != wanted:
        found = f"{recipe.eval.images} has {KINDS[kind_of(files[0])]}"
        raise RecipeError(f"images: backbone {config.name} makes its samples from {KINDS[wanted]} here, and {found}")
    if wanted == "sound" and (frames := config.latent_frames()) is not None:
        for file in files:
            check_whole(file, config.sound, frames)
    if wanted == "controls":
        controls = controls_like(files[0].parent, [file.stem for file in files], config.references)
        headers = [(str(control.video), control.header()) for control in controls]
        check_lengths(headers, config.num_frames, config.fps)
