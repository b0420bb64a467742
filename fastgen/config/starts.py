"""Whether a recipe's student can begin with what `init_from` names. Reads only small files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgen.backbones.folder import read_json
from fastgen.config.text import read_recipe
from fastgen.modules.lora_config import LoraConfig
from fastgen.policy import RolloutPolicy
from fastgen.recipe import Recipe
from fastgen.registry import RecipeError, current_names, validated
from fastgen.run import checkpoint


def check_init(recipe: Recipe) -> None:
    """Checks that init_from is a run with a complete checkpoint, an export or a pipeline folder, and that its student
    is of this kind."""
    if recipe.init_from is None or checkpoint.complete(recipe.output_dir / "checkpoints"):
        return  # a run that continues has the weights in its own checkpoint
    path = Path(recipe.init_from)
    stored, checkpoints = path / "recipe.yaml", checkpoint.complete(path / "checkpoints")
    if not stored.is_file() and (path / "model_index.json").is_file():
        check_pipeline_start(recipe, path)
        return
    if not stored.is_file() or not (checkpoints or (path / "fastgen.json").is_file()):
        raise RecipeError(
            f"init_from: {path} is neither a run with a complete checkpoint, nor an export, nor the folder of a "
            "diffusers pipeline; give one"
        )
    if (about := path / "fastgen.json").is_file() and "router" in read_json(about):
        raise RecipeError(f"init_from: {path} holds several students; name the run or export of one of them")
    raw = read_recipe(stored, stored)  # its objective is not needed, and may be a module that is not installed here
    rollout = validated(RolloutPolicy, current_names("rollout", raw.get("rollout") or {}), "rollout.")
    if missing := set(rollout.inputs) - set(recipe.rollout.inputs):
        raise RecipeError(
            f"init_from: the student of {path} has the inputs {', '.join(sorted(missing))}, and the student of this "
            "recipe does not; set rollout.two_time as there, and rollout.embedded_guidance and embedded_steps if they "
            "are set there"
        )
    check_network(recipe, rollout, raw.get("backbone") or {}, path)
    adapter = (raw.get("lora") or {}).get("student")
    before = None if adapter is None else validated(LoraConfig, adapter, "lora.student.")
    now = recipe.lora.get("student")
    if before != now:
        raise RecipeError(
            f"init_from: lora.student is {before or 'not set'} in {path} and {now or 'not set'} in this recipe; make "
            "them the same, or export that run with --merge"
        )
    if now and not checkpoints:
        raise RecipeError(f"init_from: {path} is an exported adapter; name the run that it came from")


def check_network(recipe: Recipe, rollout: RolloutPolicy, section: Mapping[str, Any], path: Path) -> None:
    """Checks that the network of the student in `path`, with this policy and backbone section, has the layers that
    this recipe's student has, or fewer, if it then begins with all that it has."""
    own = recipe.backbone
    kept = {"student_blocks": own.kept_blocks or None, "student_heads": own.kept_heads}
    for key, value in kept.items():
        if (given := section.get(key) or None) != value:
            raise RecipeError(
                f"init_from: the student of {path} keeps {given or 'all'} by backbone.{key}, and that of this recipe "
                f"{value or 'all'}; make backbone.{key} the same"
            )
    before, now = (None if p.segment is None else (p.segment.kind, p.segment.size) for p in (rollout, recipe.rollout))
    if before not in (None, now):
        raise RecipeError(
            f"init_from: the student of {path} predicts segments as a {before[0]} of {before[1]}; make "
            "rollout.segment.kind and size the same"
        )
    if rollout.inner is not None and recipe.rollout.inner is None:
        raise RecipeError(f"init_from: the student of {path} has an inner flow; set rollout.inner as there")


def check_pipeline_start(recipe: Recipe, folder: Path) -> None:
    """Checks that init_from, a pipeline folder that others have made, has the networks of this recipe's student."""
    if "student" in recipe.lora:
        raise RecipeError(
            f"init_from: {folder} has a whole network, and lora.student trains an adapter on that of backbone.path; "
            "leave out lora.student"
        )
    try:
        recipe.backbone.check_start(folder)
    except ValueError as error:
        raise RecipeError(f"init_from: {str(error).removeprefix('path: ')}") from None
