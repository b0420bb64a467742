"""Whether a recipe's rollout fits its objective, its backbone and its student."""

from fastgen.policy import INPUT_KEYS
from fastgen.recipe import Recipe
from fastgen.registry import OBJECTIVES, RecipeError, imported


def check_inputs(recipe: Recipe) -> None:
    """Checks that the objective can train the student's inputs, and that the data provides what it needs."""
    objective = recipe.objective
    if getattr(objective, "condition_on_stop", False) and not recipe.backbone.takes_added_inputs:
        raise RecipeError(
            f"objective.condition_on_stop: the networks of backbone {recipe.backbone.name} take no added inputs; "
            "set it to false"
        )
    if recipe.rollout.inputs and not objective.takes_inputs:
        keys = " and ".join(INPUT_KEYS[name] for name in recipe.rollout.inputs)
        raise RecipeError(f"rollout: objective {objective.name} cannot train a student with {keys}; leave out {keys}")
    if recipe.rollout.step_counts and not objective.takes_step_counts:
        raise RecipeError(
            f"rollout.step_counts: objective {objective.name} trains a student for the steps of rollout.timesteps "
            "alone; leave it out, or choose tdm or cdm"
        )
    given = recipe.data.fills(recipe.backbone)
    for kind in recipe.backbone.given - given:
        remedy = {
            "images": "choose data with pictures, such as images",
            "controls": "choose data videos and set data.controls, a folder of control videos",
            "sound": "choose videos with data.sounds, or moving_digits",
        }[kind]
        raise RecipeError(
            f"data.name: backbone {recipe.backbone.name} makes its samples from {kind}, which data {recipe.data.name} "
            f"does not provide; {remedy}"
        )
    if missing := objective.needs - given:
        as_images = " but as images to make samples from" if missing <= recipe.data.provides else ""
        raise RecipeError(
            f"data.name: objective {objective.name} needs {', '.join(sorted(missing))}, which data "
            f"{recipe.data.name} does not provide{as_images}; choose other data"
        )


def chunked() -> list[str]:
    """The objectives that can train a student that works chunk by chunk, some of them depending on their options."""
    return [name for name, path in OBJECTIVES.items() if imported(path).takes_chunks is not False]


def check_chunks(recipe: Recipe) -> None:
    """Checks that the objective can train a student that works chunk by chunk, if the policy asks for one, and one
    that is told actions or makes sound."""
    objective, chunks = recipe.objective, recipe.rollout.chunks
    for part in ("actions", "sound"):
        if getattr(recipe.backbone, part, None) is not None:
            check_taught(recipe, part)
    if chunks is None:
        return
    if not objective.takes_chunks:
        raise RecipeError(
            f"rollout.chunks: objective {objective.name} cannot train a student that works chunk by chunk: "
            f"{objective.needs_whole_videos}. These can, some of them with the right options: {', '.join(chunked())}"
        )
    if objective.unmasked is not None:
        try:
            recipe.backbone.check_mask(chunks)
        except ValueError as error:
            raise RecipeError(f"rollout.chunks: {error}; set objective.{objective.unmasked}") from None
    if chunks.first_timesteps is not None and not objective.takes_first_timesteps:
        raise RecipeError(
            f"rollout.chunks.first_timesteps: objective {objective.name}, with these options, needs one list of "
            "levels for all chunks; leave it out"
        )
    if chunks.linear and "student" in recipe.lora:
        raise RecipeError(
            "rollout.chunks.linear: the student gets weights that no adapter has; leave lora.student out, or linear"
        )
    if chunks.order == "rolling" and not objective.takes_rolling:
        raise RecipeError(
            "rollout.chunks.order: with rolling the chunks of a video stop at different steps, and objective "
            f"{objective.name}, with these options, needs one step for all; use order: chunk, or dmd2 with "
            "stops: shared"
        )


def check_taught(recipe: Recipe, part: str) -> None:
    """Checks that the objective does not learn actions or sound (`part`) from a network that knows none, and that
    videos to learn sound from have some."""
    if not recipe.objective.takes_taught:
        raise RecipeError(
            f"backbone.{part}: objective {recipe.objective.name} learns from the pipeline's own network, which knows "
            f"no {part}; use teacher_forcing on videos with {part}, then context_forcing with teacher_from"
        )
    if recipe.lora:
        raise RecipeError(f"backbone.{part}: the networks get weights that no adapter has; leave lora out")
    made = getattr(recipe.backbone, "made_sound", None) is not None
    if part == "sound" and made and "latents" in recipe.objective.needs and "sound" not in recipe.data.provides:
        raise RecipeError(
            f"backbone.sound: objective {recipe.objective.name} learns from videos with their sound, and data "
            f"{recipe.data.name} has none; choose videos with data.sounds, moving_digits, or a folder prepared from "
            "these"
        )


def check_segment(recipe: Recipe) -> None:
    """Checks that the objective and the ways of training fit a student that predicts segments, if the policy asks for
    one."""
    if recipe.rollout.segment is None:
        return
    if not recipe.objective.takes_segment:
        raise RecipeError(
            f"rollout.segment: objective {recipe.objective.name} cannot train a student that predicts whole segments; "
            "leave it out, or use pi_flow"
        )
    reasons = {
        "the student gets weights that no adapter has (lora.student)": "student" in recipe.lora,
        "it is not tried with networks that are sharded (train.strategy: fsdp)": recipe.train.strategy == "fsdp",
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise RecipeError(f"rollout.segment is not possible: {'; '.join(found)}; leave it out, or leave these out")


def with_inner() -> list[str]:
    """The objectives that can train a student with an inner flow."""
    return [name for name, path in OBJECTIVES.items() if imported(path).takes_inner]


def check_inner(recipe: Recipe) -> None:
    """Checks that the objective and the ways of training can have a student with an inner flow, if the policy asks for
    one."""
    if recipe.rollout.inner is None:
        return
    if not recipe.objective.takes_inner:
        raise RecipeError(
            f"rollout.inner: objective {recipe.objective.name} cannot train a student with an inner flow, because it "
            f"calls the student without the noise of one; leave it out, or use one of {', '.join(with_inner())}"
        )
    reasons = {
        "the student gets weights that no adapter has (lora.student)": "student" in recipe.lora,
        "it is not tried with networks that are sharded (train.strategy: fsdp)": recipe.train.strategy == "fsdp",
        "its blocks are called with different neighbours (train.compile)": recipe.train.compile,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise RecipeError(f"rollout.inner is not possible: {'; '.join(found)}; leave it out, or leave these out")


def check_smaller(recipe: Recipe) -> None:
    """Checks that the student can have fewer blocks or heads than its teacher, if `backbone.student_blocks` or
    `backbone.student_heads` says so."""
    given = {"student_blocks": recipe.backbone.kept_blocks, "student_heads": recipe.backbone.kept_heads}
    keys = [f"backbone.{key}" for key, value in given.items() if value]
    if not keys:
        return
    reasons = {
        "an adapter is on all of its base (lora.student)": "student" in recipe.lora,
        "the blocks of an inner flow's head are those of a whole network (rollout.inner)": (
            recipe.rollout.inner is not None
        ),
        "the student's weights are blended with those of the fake score (objective.ida_decay)": (
            vars(recipe.objective).get("ida_decay") is not None
        ),
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise RecipeError(
            f"{' with '.join(keys)} is not possible: {'; '.join(found)}; leave it out, or leave these out"
        )
