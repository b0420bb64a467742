"""Recipes: each is one complete YAML file, which is checked before anything heavy loads.

Sections are frozen pydantic dataclasses. `backbone`, `objective`, `data` and each entry of `rewards.parts` name their
class, and the fields of that class are their keys.
Every refusal gives the full path of the key and, if the key is misspelt, the nearest valid spelling.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from fastgen.backbones import BACKBONES
from fastgen.backbones.base import BackboneConfig
from fastgen.data import DATA
from fastgen.data.base import DataSource
from fastgen.metrics import METRICS
from fastgen.modules.lora import LoraConfig
from fastgen.objectives import OBJECTIVES
from fastgen.objectives.base import Objective
from fastgen.recipe import Recipe
from fastgen.registry import (
    RecipeError,
    build_section,
    check_keys,
    current_names,
    flatten,
    import_name,
    nearest,
    shipped,
    validated,
)
from fastgen.rewards import REWARDS
from fastgen.rewards.base import Reward
from fastgen.rollout import RolloutPolicy
from fastgen.run import checkpoint

SECTIONS: dict[str, tuple[Mapping[str, Any], type]] = {  # section -> its registry and base class
    "backbone": (BACKBONES, BackboneConfig),
    "data": (DATA, DataSource),
    "objective": (OBJECTIVES, Objective),
    "rewards": (REWARDS, Reward),
}

# Keys that may change when a run is continued, because they do not alter what has already been computed.
MUTABLE_KEYS = (
    "output_dir",
    "train.steps",
    "train.log_every",
    "train.sample_every",
    "train.num_samples",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.resume_from",
    "train.strategy",
    "train.num_processes",
    "train.device",
    "train.batch_size",
    "train.accumulate",
    "train.gradient_checkpointing",
    "health",
    "eval",
    "init_from",  # a folder that may have moved; the checkpoint holds what came from it
    "data.folder",
    "data.shards",
)


MOST_BYTES = 1 << 20  # of a recipe; the shipped ones have two thousand
MOST_VALUES = 20_000  # the shipped ones have a hundred; more take seconds to read


class RecipeLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, of which YAML itself would silently keep the last one, and a text
    of more than MOST_VALUES values. Those behind an alias count wherever it stands: a few lines of aliases of aliases
    would fill the memory.

    Only true and false are booleans, as in YAML 1.2: `mixed_precision: no` is the text "no"."""

    def __init__(self, text: str):
        super().__init__(text)
        self._count, self._sizes = 0, dict[int, int]()  # of values so far; of values in each node that is complete

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        before, alias = self._count, self.check_event(yaml.AliasEvent)  # type: ignore[no-untyped-call]
        self._count += 1
        node = super().compose_node(parent, index)
        if not alias:
            self._sizes[id(node)] = self._count - before
        elif (size := self._sizes.get(id(node))) is None:
            raise RecipeError("has a value that contains itself")
        else:
            self._count += size
        if self._count > MOST_VALUES:
            raise RecipeError(f"has more than {MOST_VALUES:,} values; keep long lists, such as prompts, in a file")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[Any]()
        for key in (key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"):
            name = self.construct_object(key, deep=True)  # type: ignore[no-untyped-call]
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name!r} is given twice", node.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


RecipeLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool" or letter in "tTfF"]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, what: str) -> Any:
    """The value of a YAML text. Raises RecipeError, which begins with `what`, for one that is not valid."""
    try:
        return yaml.load(text, RecipeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{what} is not valid YAML: {error}") from None
    except RecipeError as error:
        raise RecipeError(f"{what} {error}") from None
    except (ValueError, TypeError) as error:  # such as 2024-13-45, which looks like a date, or a list as a key
        raise RecipeError(f"{what} is not valid YAML: {error}") from None
    except RecursionError:
        raise RecipeError(f"{what} is nested too deeply to be a recipe") from None


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, overrides and checks a recipe. overrides: "dotted.key=value", where the value is read as YAML.

    If there is nothing at the path, for example at recipes/digits_dmd2_4step.yaml in an empty folder, this reads the
    recipe with that path that ships with fastgen. Raises RecipeError for anything that is wrong with the recipe."""
    raw = read_recipe(Path(path) if os.path.exists(path) else shipped(path), path)
    for text in overrides:
        apply_override(raw, text)
    return build_recipe(raw)


def load_stored(path: Path) -> Recipe:
    """The recipe stored in a run or an export. Keys that had another name in an earlier version are renamed. Files
    that only training needs, such as images or `init_from`, may have moved since."""
    raw = read_recipe(path, path)
    for section, values in raw.items():
        if isinstance(values, dict):
            raw[section] = current_names(section, values)
    return build_recipe(raw, files=False)


def read_recipe(file: Path, name: str | Path) -> dict[str, Any]:
    """The YAML of a recipe, not checked yet. name: the path as the user gave it, for messages."""
    try:
        if file.exists() and not file.is_file():
            raise RecipeError(f"{name} is not a file; give the recipe's YAML file")
        if file.stat().st_size > MOST_BYTES:
            raise RecipeError(f"{name} has {file.stat().st_size:,} bytes, which is no recipe; give a YAML file")
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {name}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path, or a text that is not UTF-8
        raise RecipeError(f"cannot read the recipe {name}: {error}") from None
    raw = parse_yaml(text, str(name))
    if not isinstance(raw, dict):
        raise RecipeError(f"{name} must hold a mapping of sections, got {type(raw).__name__}")
    return raw


def apply_override(raw: dict[str, Any], text: str) -> None:
    """Sets one dotted key in place. Raises RecipeError if the text is no override, or if a parent is not a section."""
    key, equals, value = text.partition("=")
    if not equals or not key or any(not part for part in key.split(".")):
        raise RecipeError(f"{text!r} is not an override; write dotted.key=value")
    *parents, last = key.split(".")
    node = raw
    for i, part in enumerate(parents):
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise RecipeError(f"cannot set {key}: {'.'.join(parents[: i + 1])} is not a section")
    node[last] = parse_yaml(value, f"the value of {key}")


def home_expanded(value: Any) -> Any:
    """The same values, with a leading ~/ of a text replaced by the user's home folder, as a shell does it."""
    if isinstance(value, dict):
        return {key: home_expanded(sub) for key, sub in value.items()}
    if isinstance(value, list):
        return [home_expanded(sub) for sub in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


class Problems:
    """Collects what is wrong with a recipe, so that all of it is said at once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def noting(self, section: str = "") -> Iterator[None]:
        """Notes a refusal inside the block, and goes on after it. section: what a ValueError's message begins with."""
        try:
            yield
        except RecipeError as error:
            self.lines += str(error).splitlines()
        except ValueError as error:
            self.lines += [f"{section}: {line}" for line in str(error).splitlines()]
        except OSError as error:  # such as a name that is too long for a file
            self.lines.append(f"{section}: cannot read {error.filename}: {error.strerror}".removeprefix(": "))

    def refuse(self) -> None:
        """Raises RecipeError if anything was noted. A message that nobody would read to its end is cut."""
        lines = [line if len(line) <= 2000 else f"{line[:2000]}..." for line in dict.fromkeys(self.lines)]
        if len(lines) > 50:
            lines[50:] = [f"and {len(lines) - 50:,} more mistakes"]
        if lines:
            raise RecipeError("\n".join(lines))


def build_recipe(raw: Mapping[str, Any], files: bool = True) -> Recipe:
    """Checks the keys, then types and ranges, then whether the sections fit each other. files: whether the files that
    training needs must be there. Each of these stages names all mistakes that it finds."""
    values, problems = home_expanded(dict(raw)), Problems()
    with problems.noting():
        check_keys(values, Recipe, "")
    for section in ("backbone", "data", "objective"):
        registry, base = SECTIONS[section]
        with problems.noting():
            if section not in values:
                raise RecipeError(f"missing key {section}: add it with a name, one of {', '.join(registry)}")
            values[section] = build_section(section, values[section], registry, base)
    if isinstance(values.get("rewards"), dict):
        given = values["rewards"]
        with problems.noting():
            values["rewards"] = given | {"parts": build_parts(given.get("parts"))}
            if given.get("held_out"):
                values["rewards"]["held_out"] = build_parts(given["held_out"], "held_out")
    known = {field.name for field in dataclasses.fields(Recipe)}
    with problems.noting():
        recipe = validated(Recipe, {key: value for key, value in values.items() if key in known}, "")
    if any(line.startswith("unknown key") for line in problems.lines):  # pydantic says that too, in worse words
        problems.lines = [line for line in problems.lines if ": Unexpected keyword argument" not in line]
    problems.refuse()
    check_recipe(recipe, files)
    return recipe


def build_parts(value: Any, key: str = "parts") -> tuple[Reward, ...]:
    """The rewards of `rewards.parts` or `rewards.held_out`. A name that imports a function, or another callable that
    is no class, gives a FunctionReward of it."""
    if not isinstance(value, list) or not value:
        raise RecipeError(f"rewards.{key} must be a list of rewards, each with a name, one of {', '.join(REWARDS)}")
    parts = []
    for i, part in enumerate(value):
        section = f"rewards.{key}.{i}"
        name = part.get("name") if isinstance(part, dict) else None
        if isinstance(name, str) and ":" in name and not isinstance(import_name(section, name), type):
            if "function" in part:
                raise RecipeError(f"{section}.function: the name, {name}, is already the function; leave this key out")
            part = part | {"name": "function", "function": name}
        parts.append(build_section(section, part, REWARDS, Reward))
    return tuple(parts)


def check_recipe(recipe: Recipe, files: bool = True) -> None:
    """Checks that the sections fit each other: roles, data, export, evaluation. Reads only small files, and no
    weights. files: whether the files that training needs must be there. Raises RecipeError with all that is wrong."""
    objective, problems = recipe.objective, Problems()
    for check in (
        check_roles,
        check_lora,
        check_training,
        check_rewards,
        check_inputs,
        check_chunks,
        check_evaluation,
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
        with problems.noting("data"):
            recipe.data.check(recipe.backbone)
        with problems.noting("eval"):
            recipe.eval.check()
    problems.refuse()  # what follows needs a backbone whose files are there
    with problems.noting("rollout"):
        recipe.backbone.check_export(recipe.rollout)
    if recipe.rollout.chunks is not None:
        with problems.noting("rollout"):
            recipe.backbone.check_chunks(recipe.rollout)
    with problems.noting("objective"):
        objective.check_recipe(recipe)
    problems.refuse()


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


def check_training(recipe: Recipe) -> None:
    """Checks what the section `train` asks of backbone and objective."""
    train, objective = recipe.train, recipe.objective
    if train.gradient_checkpointing and not recipe.backbone.can_checkpoint:
        raise RecipeError(
            f"train.gradient_checkpointing: backbone {recipe.backbone.name} is too small to need it; set it to false"
        )
    if train.frozen_dtype in ("bfloat16", "float16") and train.mixed_precision == "no":
        raise RecipeError(
            f"train.frozen_dtype: {train.frozen_dtype} weights together with {train.dtype} ones "
            "need train.mixed_precision: bf16"
        )
    if train.batch_size % objective.group_size:
        raise RecipeError(
            f"train.batch_size: {train.batch_size} does not hold whole groups of "
            f"objective.group_size {objective.group_size}; make it a multiple of that"
        )


def check_inputs(recipe: Recipe) -> None:
    """Checks that the objective can train the student's inputs, and that the data provides what it needs."""
    objective = recipe.objective
    if recipe.rollout.inputs and not objective.takes_inputs:
        keys = " and ".join({"s": "two_time", "guidance": "embedded_guidance"}[name] for name in recipe.rollout.inputs)
        raise RecipeError(f"rollout: objective {objective.name} cannot train a student with {keys}; leave out {keys}")
    if missing := objective.needs - recipe.data.provides:
        raise RecipeError(
            f"data.name: objective {objective.name} needs {', '.join(sorted(missing))}, which data "
            f"{recipe.data.name} does not provide; choose other data"
        )


def check_chunks(recipe: Recipe) -> None:
    """Checks that the objective can train a student that works chunk by chunk, if the policy asks for one."""
    objective, chunks = recipe.objective, recipe.rollout.chunks
    if chunks is None:
        return
    if not objective.takes_chunks:
        raise RecipeError(
            f"rollout.chunks: objective {objective.name} cannot train a student that works chunk by chunk: "
            f"{objective.needs_whole_videos}. dmd2, f_distill, re_dmd, disback, adm, phased_dmd, rtdmd (stage: 1, or "
            "selected_steps: 0), gndm (form: path), teacher_forcing, ode_regression (states: line) and consistency "
            "(teach: data) can"
        )
    if chunks.first_timesteps is not None and not objective.takes_first_timesteps:
        raise RecipeError(
            f"rollout.chunks.first_timesteps: objective {objective.name}, with these options, needs one list of "
            "levels for all chunks; leave it out"
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
                f"eval.reference: {name} compares with real images; set it to digits or to a folder of images"
            )
    if config.reference is not None and output != "pixels":
        raise RecipeError(
            f"eval.reference: it is for images, and backbone {recipe.backbone.name} gives {output}; leave it out"
        )
    if config.prompts is None and config.reference is None and not recipe.backbone.has_exact_law:
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
    raw = read_recipe(stored, stored)  # its objective is not needed, and may be a module that is not installed here
    rollout = validated(RolloutPolicy, current_names("rollout", raw.get("rollout") or {}), "rollout.")
    if missing := set(rollout.inputs) - set(recipe.rollout.inputs):
        raise RecipeError(
            f"init_from: the student of {path} has the inputs {', '.join(sorted(missing))}, and the student of this "
            "recipe does not; set rollout.two_time as there, and rollout.embedded_guidance if it is set there"
        )
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


def to_dict(value: Any) -> Any:
    """A recipe or a section as plain YAML types, with all defaults. Classes from elsewhere are named by their path."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, tuple(base for _, base in SECTIONS.values())):
            result["name"] = registered_name(type(value))
        return result
    if isinstance(value, Mapping):
        return {str(k): to_dict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def registered_name(cls: type) -> str:
    """The name by which a recipe chooses this class."""
    path = f"{cls.__module__}:{cls.__qualname__}"
    entries = [item for registry, _ in SECTIONS.values() for item in registry.items()]
    return next((name for name, entry in entries if entry is cls or entry == path), path)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML. load_recipe reads it back to an equal recipe."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, default_flow_style=None, width=119)


def changed_keys(before: Recipe, after: Recipe) -> list[str]:
    """The dotted keys that differ between a run's first recipe and the one it is continued with, but must not."""
    a, b = flatten(to_dict(before)), flatten(to_dict(after))
    differing = [k for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)]
    return [k for k in differing if not any(k == m or k.startswith(m + ".") for m in MUTABLE_KEYS)]
