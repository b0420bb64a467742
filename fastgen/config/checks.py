"""Whether the sections of a recipe fit each other."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from fastgen.config.problems import Problems
from fastgen.config.starts import check_init
from fastgen.data.controls import KINDS, controls_like, kind_of, named_kinds
from fastgen.data.prompts import PromptData, read_prompts
from fastgen.data.sounds import check_whole
from fastgen.data.videos import check_lengths
from fastgen.metrics import METRICS
from fastgen.metrics.reference import given_files, open_reference
from fastgen.objectives.base import Objective
from fastgen.policy import INPUT_KEYS
from fastgen.recipe import Recipe
from fastgen.registry import OBJECTIVES, REWARDS, RecipeError, imported, nearest


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
    """Checks the prompts of an evaluation, as far as files say them: one of several students has some, metrics can
    read them, and those which compare the samples of a prompt find two, at the end of training and during it."""
    config, part, metrics = recipe.eval, recipe.part, [METRICS[name] for name in recipe.eval.metrics]
    compares = any(metric.compares_within_prompts for metric in metrics)
    if config.prompts is not None:
        prompts: Sequence[str] = read_prompts(config.prompts)
    elif (compares or part is not None) and config.reference is not None and config.images is None:
        prompts = open_reference(config.reference).prompts
    else:
        return
    kept = [prompt for prompt in prompts if part is None or part.has(prompt)]
    if not kept:
        raise ValueError(f"prompts: none of the {len(prompts)} is for student {part.index if part else 0} (part)")
    for metric in metrics:
        metric.check_prompts(kept)
    for each in (config.quick(), config) if compares else ():
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
