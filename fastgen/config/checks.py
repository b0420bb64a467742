"""Whether the sections of a recipe fit each other."""

from importlib.util import find_spec

from fastgen.config.evaluation_checks import check_data_part, check_evaluation, check_given, check_measured, check_part
from fastgen.config.problems import Problems
from fastgen.config.rollout_checks import check_chunks, check_inner, check_inputs, check_segment, check_smaller
from fastgen.config.starts import check_init
from fastgen.data.prompts import read_prompts
from fastgen.objectives.base import Objective
from fastgen.recipe import Recipe
from fastgen.registry import REWARDS, RecipeError, nearest


def check_recipe(recipe: Recipe, files: bool = True) -> None:
    """Checks that the sections fit each other: roles, data, export, evaluation. Reads only small files, and no
    weights. files: whether the files that training needs must be there. Raises RecipeError with all that is wrong."""
    objective, problems = recipe.objective, Problems()
    for check in (
        check_roles,
        check_optimizers,
        check_lora,
        check_training,
        check_compilation,
        check_float8,
        check_rewards,
        check_inputs,
        check_chunks,
        check_inner,
        check_segment,
        check_smaller,
        check_evaluation,
        check_part,
    ):
        with problems.noting():
            check(recipe)
    with problems.noting("objective"):
        objective.check(recipe.rollout)
    with problems.noting("backbone"):
        recipe.backbone.check()
    if files:
        with problems.noting():
            check_init(recipe)
        with problems.noting():
            check_trackers(recipe)
        with problems.noting("data"):
            recipe.data.check(recipe.backbone)
            check_data_part(recipe)
        with problems.noting("eval"):
            recipe.eval.check()
            check_given(recipe)
            check_measured(recipe)
        if recipe.eval.prompts is not None:
            with problems.noting("eval.prompts"):
                recipe.backbone.check_prompts(read_prompts(recipe.eval.prompts))
    problems.refuse()  # what follows needs a backbone whose files are there
    with problems.noting("rollout"):
        recipe.backbone.check_export(recipe.rollout)
    if recipe.rollout.chunks is not None:
        with problems.noting("rollout"):
            recipe.backbone.check_chunks(recipe.rollout)
    if recipe.rollout.inner is not None:
        with problems.noting("rollout"):
            recipe.backbone.check_inner(recipe.rollout.inner)
    if recipe.rollout.segment is not None:
        with problems.noting("rollout"):
            recipe.backbone.check_segment(recipe.rollout.segment)
    with problems.noting("objective"):
        objective.check_recipe(recipe)
    problems.refuse()


def check_trackers(recipe: Recipe) -> None:
    """Checks that the packages of the trackers are installed."""
    for name in recipe.train.trackers:
        if find_spec(name) is None:
            raise RecipeError(f"train.trackers: {name} is not installed; pip install {name}, or leave it out")


def check_roles(recipe: Recipe) -> None:
    """Checks that every trained role, and no other, has an optimizer."""
    objective: Objective = recipe.objective
    for role in recipe.optimizers:
        if role not in objective.trained_roles:
            raise RecipeError(
                f"optimizers.{role}: this objective trains only {', '.join(objective.trained_roles)}"
                f"{nearest(role, objective.trained_roles)}"
            )
    for role in objective.trained_roles:
        if role not in recipe.optimizers:
            raise RecipeError(f"missing key optimizers.{role}: this objective trains {role}; give at least its lr")


def check_optimizers(recipe: Recipe) -> None:
    """Checks that 8-bit optimizers are installed, and fit the networks."""
    for role, config in recipe.optimizers.items():
        if not config.is_8bit:
            continue
        key = f"optimizers.{role}.kind"
        if find_spec("bitsandbytes") is None:
            raise RecipeError(
                f"{key}: {config.kind} is of the package bitsandbytes; pip install 'fastgen-distill[bitsandbytes]'"
            )
        if recipe.train.dtype == "float64":
            raise RecipeError(f"{key}: {config.kind} steps float32 weights, and train.dtype is float64; choose adamw")
        if recipe.train.strategy == "fsdp":
            raise RecipeError(f"{key}: {config.kind} cannot step sharded tensors; choose adamw, which fsdp shards")


def check_training(recipe: Recipe) -> None:
    """Checks what the section `train` asks of backbone and objective."""
    train, objective = recipe.train, recipe.objective
    if train.gradient_checkpointing and not recipe.backbone.can_checkpoint:
        raise RecipeError(
            f"train.gradient_checkpointing: backbone {recipe.backbone.name} is too small to need it; set it to false"
        )
    if train.frozen_dtype in ("bfloat16", "float16", "float8") and train.mixed_precision == "no":
        raise RecipeError(
            f"train.frozen_dtype: {train.frozen_dtype} weights together with {train.dtype} ones "
            "need train.mixed_precision: bf16"
        )
    if train.ema_device == "cpu" and (train.strategy == "fsdp" or "student" in recipe.lora):
        small = "sharded like the networks" if train.strategy == "fsdp" else "an adapter on the base that roles share"
        raise RecipeError(f"train.ema_device: the moving average of this run is {small}; leave ema_device out")
    if train.batch_size % objective.group_size:
        raise RecipeError(
            f"train.batch_size: {train.batch_size} does not hold whole groups of "
            f"objective.group_size {objective.group_size}; make it a multiple of that"
        )


def check_float8(recipe: Recipe) -> None:
    """Checks that the teacher is a whole network of its own whose layers can be converted as they run."""
    train = recipe.train
    if train.frozen_dtype != "float8":
        return
    reasons = {
        f"backbone {recipe.backbone.name} has no network of diffusers": not recipe.backbone.can_checkpoint,
        "fsdp shards the teacher instead": train.strategy == "fsdp",
        "a backward pass would hold bfloat16 copies of the base that adapters share (lora)": recipe.lora,
        "layers that are converted as they run cannot be compiled (train.compile)": train.compile,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise RecipeError(f"train.frozen_dtype: float8 is not possible: {'; '.join(found)}; choose bfloat16")


def check_compilation(recipe: Recipe) -> None:
    """Checks that torch.compile can make of this recipe's networks what the objective asks of them."""
    if not recipe.train.compile:
        return
    if not recipe.backbone.can_checkpoint:
        raise RecipeError(
            f"train.compile: the networks of backbone {recipe.backbone.name} have no repeated blocks; set it to false"
        )
    if recipe.objective.takes_derivatives:
        raise RecipeError(
            f"train.compile: objective {recipe.objective.name} differentiates networks along directions, which "
            "compiled blocks cannot do; set it to false"
        )
    if recipe.rollout.chunks is not None:
        raise RecipeError(
            "train.compile: with rollout.chunks the blocks see a past of changing length, and would be compiled anew "
            "for each; set it to false"
        )


def check_lora(recipe: Recipe) -> None:
    """Checks that adapters are only on roles that are trained copies of the teacher."""
    objective = recipe.objective
    possible = [role for role in objective.trained_roles if role not in objective.full_roles]
    for role in recipe.lora:
        if role not in possible:
            allowed = ", ".join(possible) or "none"
            raise RecipeError(
                f"lora.{role}: with this objective, the roles that can be adapters are {allowed}"
                f"{nearest(role, possible) if possible else ''}"
            )


def check_rewards(recipe: Recipe) -> None:
    """Checks that an objective that needs rewards has some, and that they fit the objective and the backbone."""
    objective, rewards = recipe.objective, recipe.rewards
    if rewards is None:
        if objective.rewards_required:
            raise RecipeError(
                f"missing key rewards: objective {objective.name} needs a reward; give rewards.parts, "
                f"each with a name, one of {', '.join(REWARDS)}"
            )
        return
    if objective.reward_use == "none":
        raise RecipeError(f"rewards: objective {objective.name} uses none; leave the section out")
    if objective.reward_use == "gradient" and not rewards.used(grad=True):
        raise RecipeError(
            f"rewards.parts: objective {objective.name} backpropagates through rewards, and "
            f"none of {', '.join(rewards.used(grad=False))} is differentiable; add one that is"
        )
    if rewards.calibration == "group" and objective.group_size == 1:
        raise RecipeError(
            f"rewards.calibration: group compares the samples of a prompt, and objective "
            f"{objective.name} makes one sample per prompt; choose none or zscore, or raise "
            "objective.group_size if the objective has it"
        )
    if rewards.held_out and not recipe.health.every:
        raise RecipeError(
            "rewards.held_out: only the watch uses it, and health.every: 0 switches the watch off; set health.every "
            "above 0"
        )
    for key, parts in (("parts", rewards.parts), ("held_out", rewards.held_out)):
        for i, part in enumerate(parts):
            try:
                part.check(recipe.backbone)
            except ValueError as error:
                raise RecipeError(f"rewards.{key}.{i}: {error}") from None
