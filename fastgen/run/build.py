"""What a recipe becomes: networks, optimizers, state and data, and the run folder they begin or go on in."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from fastgen.backbones.base import Backbone, BackboneConfig, RoleOptions
from fastgen.config import changed_keys, dump_recipe, load_stored
from fastgen.data.base import Stream
from fastgen.denoiser import Denoiser
from fastgen.modules.inputs import carried_names
from fastgen.modules.lora import LoraDenoiser
from fastgen.networks import Ema, Networks
from fastgen.recipe import Recipe
from fastgen.registry import RecipeError
from fastgen.rewards import Scorer
from fastgen.run import checkpoint
from fastgen.run.distributed import Strategy, shard_roles, strategy_of
from fastgen.run.health import Watch
from fastgen.sampling.sampler import Sampler, teacher_sampler

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TrainingError(RuntimeError):
    """The run cannot go on; the message says what was seen and what to try."""


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """What a recipe became. The loop's functions take it whole; only its modules, tensors and watch change."""

    recipe: Recipe
    accelerator: Accelerator
    strategy: Strategy
    backbone: Backbone
    networks: Networks
    optimizers: dict[str, torch.optim.Optimizer]
    state: dict[str, Tensor]
    ema: Ema
    stream: Stream
    prompts: list[str]  # the first of the stream, for pictures and the watch
    watch: Watch

    @property
    def saved(self) -> dict[str, nn.Module]:
        """What a checkpoint holds: every role but the frozen teacher, and the average."""
        return {role: self.networks[role] for role in self.networks if role != "teacher"} | {"ema": self.ema.module}

    @property
    def student(self) -> Sampler:
        """The average of the student, sampling as it will be exported."""
        return Sampler(self.backbone, self.ema.module, self.recipe.rollout)

    def teacher(self, num_steps: int) -> Sampler:
        """The teacher as its stock pipeline samples it."""
        scale = self.recipe.eval.teacher_guidance_scale
        return teacher_sampler(self.backbone, num_steps, scale, self.networks.teacher)

    @property
    def samples_here(self) -> bool:
        """Whether this process samples: the first one does, and all do where networks are sharded."""
        return self.accelerator.is_main_process or self.strategy == "fsdp"


@dataclasses.dataclass(frozen=True)
class RunNetworks:
    """All networks of a recipe. modules: by role, student and teacher among them. average: the place of the student's
    moving average."""

    backbone: Backbone
    modules: dict[str, nn.Module]
    average: Denoiser

    @property
    def wholes(self) -> list[nn.Module]:
        """Every module that holds parameters of its own: roles and average, or the base that adapters share."""
        shared = self.backbone.shared
        own = [m for m in (*self.modules.values(), self.average) if not isinstance(m, LoraDenoiser)]
        return own if shared is None else [*own, shared.denoiser]


def build_backbone(
    recipe: Recipe,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    deferred: bool = False,
    section: BackboneConfig | None = None,
) -> Backbone:
    """The backbone of a recipe. dtype: None is that of the training. deferred: networks get their weights later.
    section: instead of the recipe's own, for planning without the network."""
    frozen = recipe.train.frozen_dtype
    roles = RoleOptions(recipe.lora, DTYPES[frozen] if frozen else None, deferred)
    return (section or recipe.backbone).build(device, dtype or DTYPES[recipe.train.dtype], recipe.seed, roles)


def build_networks(recipe: Recipe, backbone: Backbone) -> RunNetworks:
    """The networks of a recipe, in the order in which random initialisations are drawn: student, teacher, and those of
    the objective. Training, planning and the benchmarks all build them here.

    Raises RecipeError for an adapter on a role that is not a copy of the teacher."""
    modules: dict[str, nn.Module] = {
        "student": recipe.objective.make_student(backbone, recipe.rollout),
        "teacher": backbone.load("teacher"),
        **recipe.objective.auxiliary(backbone, recipe.rollout),
    }
    for role in recipe.lora:
        if not isinstance(modules[role], LoraDenoiser):
            raise RecipeError(f"lora.{role}: this objective's {role} is not a copy of the teacher")
    modules = {role: m if role == "teacher" else m.to(backbone.dtype) for role, m in modules.items()}
    return RunNetworks(backbone, modules, modules["student"].average())  # type: ignore[operator]


def start_networks(recipe: Recipe, networks: RunNetworks) -> None:
    """What follows once every network has its weights: adapters are initialised from the recipe's seed, and activation
    checkpointing is switched on where the recipe asks for it."""
    for module in networks.modules.values():
        if isinstance(module, LoraDenoiser) and module.role:
            module.reset(recipe.seed)
        if recipe.train.gradient_checkpointing and isinstance(module, Denoiser):
            module.enable_checkpointing()


def build(recipe: Recipe, accelerator: Accelerator) -> TrainingRun:
    """Networks, optimizers, state and data of a recipe; random initialisations come from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    strategy = strategy_of(recipe, accelerator)
    backbone = build_backbone(recipe, accelerator.device, deferred=strategy == "fsdp")
    built = build_networks(recipe, backbone)
    if strategy == "fsdp":
        shard_roles(built.modules | {"average": built.average}, backbone, accelerator)
    else:
        for module in (*built.modules.values(), built.average):
            module.to(accelerator.device)
    start_networks(recipe, built)
    scorer = Scorer(recipe.rewards, backbone.decode) if recipe.rewards else None
    networks = Networks(built.modules, recipe.rollout, scorer)
    roles = recipe.objective.trained_roles
    stream = recipe.data.open(backbone, recipe.seed)
    shown = 2000 if backbone.output == "points" else max(recipe.train.num_samples, recipe.health.num_samples)
    return TrainingRun(
        recipe=recipe,
        accelerator=accelerator,
        strategy=strategy,
        backbone=backbone,
        networks=networks,
        optimizers={role: recipe.optimizers[role].build(networks[role].parameters()) for role in roles},
        state=send_to_device(recipe.objective.init_state(), accelerator.device),
        ema=Ema(built.average, networks.student, recipe.train.ema_decay),
        stream=stream,
        prompts=stream.prompts(torch.arange(shown)),
        watch=Watch(recipe.health),
    )


def open_run(recipe: Recipe, accelerator: Accelerator) -> Path:
    """The run folder. A new one gets the resolved recipe; an existing one must have been started with the same."""
    folder = recipe.output_dir
    path = folder / "recipe.yaml"
    if path.is_file():
        if changed := changed_keys(load_stored(path), recipe):
            raise RecipeError(
                f"{folder} was started with other values of {', '.join(changed)}; choose another output_dir, or undo "
                "the change to continue the run"
            )
        if (folder / "export").exists() and not checkpoint.complete(folder / "checkpoints"):
            raise RecipeError(
                f"{folder} is a finished run without checkpoints to continue from; choose another output_dir"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise RecipeError(f"output_dir {folder} is not empty and holds no run; choose another")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(dump_recipe(recipe))
    accelerator.wait_for_everyone()
    return folder


def checkpoint_to_resume(recipe: Recipe, accelerator: Accelerator) -> Path | None:
    """The checkpoint `train.resume_from` names, later ones set aside; else the newest complete one, if there is any.

    Raises RecipeError if the named one is not there, CheckpointError if it is damaged; before weights load."""
    folder, name = recipe.output_dir / "checkpoints", recipe.train.resume_from
    found = checkpoint.complete(folder)
    if name is None:
        if found:
            checkpoint.counters_of(found[-1])
        return found[-1] if found else None
    if name not in [c.name for c in found]:
        have = f"complete there are {', '.join(c.name for c in found)}" if found else "there is no complete one"
        raise RecipeError(f"train.resume_from: {folder} has no checkpoint {name}; {have}")
    checkpoint.counters_of(folder / name)
    later = [c for c in found if c.name > name]
    if later and accelerator.is_main_process:
        aside = recipe.output_dir / "set_aside"
        aside.mkdir(exist_ok=True)
        for c in later:
            if (aside / c.name).exists():
                raise RecipeError(f"train.resume_from: {aside / c.name} is in the way of a later checkpoint; move it")
            c.rename(aside / c.name)
    accelerator.wait_for_everyone()
    return folder / name


def start_from(run: TrainingRun) -> None:
    """The student of `init_from`, and its fake score and other trained roles where a run has them."""
    if run.recipe.init_from is None:
        return
    path, networks = Path(run.recipe.init_from), run.networks
    if checkpoints := checkpoint.complete(path / "checkpoints"):
        checkpoint.read_student(checkpoints[-1] / "ema.safetensors", networks.student.state_dict())
        for role in run.recipe.objective.trained_roles:
            if role != "student" and (checkpoints[-1] / f"{role}.safetensors").is_file():
                checkpoint.read_into(checkpoints[-1] / f"{role}.safetensors", networks[role].state_dict())
    else:
        own, given = networks.student.state_dict(), run.backbone.load_exported(path).state_dict()
        networks.student.load_state_dict(own | {n: given[g] for n, g in carried_names(own, given).items()})
    run.ema.move(networks.student, 0.0)


def resume(run: TrainingRun, path: Path, per_update: int) -> dict[str, Any]:
    """Everything a checkpoint holds, into the run. Raises RecipeError if an update would be of another size."""
    counters = checkpoint.counters_of(path)
    if counters["samples_per_update"] != per_update:
        raise RecipeError(
            f"train.batch_size x train.accumulate x processes is {per_update}, and the run was started with "
            f"{counters['samples_per_update']} samples an update; keep the product"
        )
    checkpoint.load(path, run.saved, run.optimizers, run.state, run.accelerator.device)
    run.ema.updates = counters["ema_updates"]
    run.watch.recall(counters["watch"])
    return counters
