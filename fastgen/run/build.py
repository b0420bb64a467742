"""Builds a run from a recipe: networks, optimizers, state and data, and the run folder that it starts or continues."""

import dataclasses
import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn

from fastgen.backbones.base import Backbone, BackboneConfig, RoleOptions
from fastgen.backbones.pipeline_config import PipelineConfig
from fastgen.batch import Batch, Conditioning
from fastgen.config import load_stored
from fastgen.config.stored import changed_keys, dump_recipe
from fastgen.data.ahead import Ahead
from fastgen.data.base import Stream, make_batch
from fastgen.data.files import replace_file
from fastgen.data.part import PartStream
from fastgen.denoiser import Denoiser
from fastgen.evaluation.evaluate import teacher_reference
from fastgen.metrics.reference import TEACHER, Reference
from fastgen.modules.compilation import compile_blocks
from fastgen.modules.float8 import store_float8
from fastgen.modules.inputs import carried_names
from fastgen.modules.lora import LoraDenoiser
from fastgen.modules.sharding import is_sharded, local, own_slice
from fastgen.networks import Ema, Networks
from fastgen.recipe import Recipe
from fastgen.registry import RecipeError
from fastgen.rewards import Scorer
from fastgen.run import checkpoint
from fastgen.run.checkpoint import CheckpointError
from fastgen.run.distributed import Strategy, shard_roles, strategy_of
from fastgen.run.health import Watch
from fastgen.run.leftovers import clean, leftovers
from fastgen.run.lock import LOCK
from fastgen.run.optimizers import adamw
from fastgen.sampling.sampler import Sampler, teacher_sampler

# float8: as it is made, before its matrices are converted
DTYPES = {
    "float8": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

MARKED = 16  # prompts that tell the data of a run from others


class TrainingError(RuntimeError):
    """The run cannot continue. The message says what was observed and what to try."""


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """Everything that was built from a recipe. The functions of the training loop take it as a whole. Its fields are
    never reassigned; only the modules, optimizers, tensors and the watch in them change."""

    recipe: Recipe
    accelerator: Accelerator
    strategy: Strategy
    backbone: Backbone
    networks: Networks
    optimizers: dict[str, torch.optim.Optimizer]
    state: dict[str, Tensor]
    ema: Ema
    stream: Stream
    batches: Ahead
    prompts: list[str]  # the first prompts of the stream, for pictures and the watch
    data_mark: str  # the hash of the first MARKED prompts, whose order depends on all of the data
    images: Conditioning | None  # what is told of their images, if the backbone takes some
    watch: Watch

    @property
    def saved(self) -> dict[str, nn.Module]:
        """The modules that a checkpoint stores: every role except the frozen teacher, and the moving average."""
        return {role: self.networks[role] for role in self.networks if role != "teacher"} | {"ema": self.ema.module}

    def first_images(self, rows: range) -> Conditioning | None:
        """Those of the first prompts with these numbers."""
        return None if self.images is None else self.images.select(slice(rows.start, rows.stop))

    @property
    def student(self) -> Sampler:
        """The student's moving average, sampled as its export will be."""
        return Sampler(self.backbone, self.ema.module, self.recipe.rollout, part=self.recipe.part)

    def teacher(self, num_steps: int) -> Sampler:
        """The teacher, sampled as its stock pipeline does, at the evaluation's guidance scale. It names the files
        of its weights, if it computes with what is stored there, and else says in which way it does not."""
        section, scale, frozen = self.recipe.backbone, self.recipe.teacher_guidance, self.recipe.train.frozen_dtype
        said: dict[str, Any] = {} if frozen is None else {"frozen_dtype": frozen}
        said |= {"strategy": self.strategy} if self.strategy == "fsdp" else {}
        weights = section.local_folder() if not said and isinstance(section, PipelineConfig) else None
        teacher, part = self.networks.teacher, self.recipe.part
        return teacher_sampler(self.backbone, num_steps, scale, teacher, weights, part, said)

    @cached_property
    def teacher_reference(self) -> Reference | None:
        """The teacher's samples, if the evaluation compares with them; they are made once."""
        config = self.recipe.eval.quick()
        if config.reference != TEACHER:
            return None
        steps = max(config.teacher_steps, default=50)
        return teacher_reference(self.teacher(steps), config)

    @property
    def sharded(self) -> list[nn.Module]:
        """The modules that are sharded by themselves: roles, or the base that they share."""
        shared = self.backbone.shared
        whole = [*self.networks.values(), self.ema.module]
        return [m for m in (whole if shared is None else [*whole, shared.denoiser]) if is_sharded(m)]

    @property
    def samples_here(self) -> bool:
        """Whether this process samples. The first process always does; all of them do where networks are sharded."""
        return self.accelerator.is_main_process or self.strategy == "fsdp"


@dataclasses.dataclass(frozen=True)
class RunNetworks:
    """All networks of a recipe. modules: role -> network, including student and teacher. average: the module that
    holds the student's moving average."""

    backbone: Backbone
    modules: dict[str, nn.Module]
    average: Denoiser

    @property
    def wholes(self) -> list[nn.Module]:
        """The modules that own their parameters: roles and average unless they are adapters, and the shared base."""
        shared = self.backbone.shared
        networks = dict.fromkeys((*self.modules.values(), self.average))
        own = [m for m in networks if not isinstance(m, LoraDenoiser)]
        return own if shared is None else [*own, shared.denoiser]


def build_backbone(
    recipe: Recipe,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    deferred: bool = False,
    section: BackboneConfig | None = None,
) -> Backbone:
    """Builds the backbone of a recipe. dtype: the training dtype by default. deferred: networks are made without
    weights, which are filled in later. section: replaces the recipe's backbone section, for planning offline."""
    frozen = recipe.train.frozen_dtype
    kept = {"student": recipe.backbone.kept_blocks}  # also of an objective's copies of the student
    heads = {} if recipe.backbone.kept_heads is None else {"student": recipe.backbone.kept_heads}
    roles = RoleOptions(recipe.lora, DTYPES[frozen] if frozen else None, deferred, kept, heads)
    return (section or recipe.backbone).build(device, dtype or DTYPES[recipe.train.dtype], recipe.seed, roles)


def build_networks(recipe: Recipe, backbone: Backbone, sizes: bool = False) -> RunNetworks:
    """Builds the networks of a recipe in the order in which random initialisations are drawn: student, teacher, then
    the objective's auxiliary networks. Training, planning and the benchmarks all build them here. sizes: only the
    sizes are needed, so that a whole student, instead of a copy, stands for its moving average.

    Raises RecipeError for an adapter on a role that is not a copy of the teacher."""
    modules: dict[str, nn.Module] = {
        "student": recipe.objective.make_student(backbone, recipe.rollout),
        "teacher": backbone.load("teacher"),
        **recipe.objective.auxiliary(backbone, recipe.rollout),
    }
    for role in recipe.lora:
        if not isinstance(modules[role], LoraDenoiser):
            raise RecipeError(
                f"lora.{role}: this objective's {role} is not a copy of the teacher and cannot be an adapter"
            )
    modules = {role: m if role == "teacher" else m.to(backbone.dtype) for role, m in modules.items()}
    student: Any = modules["student"]
    copied = isinstance(student, LoraDenoiser) or not sizes
    return RunNetworks(backbone, modules, student.average() if copied else student)


def start_networks(recipe: Recipe, networks: RunNetworks) -> None:
    """To be called once every network has its weights. Initialises adapters from the recipe's seed, and switches on
    activation checkpointing, compilation and storage in float8 if the recipe asks for them."""
    for module in networks.modules.values():
        if isinstance(module, LoraDenoiser) and module.role:
            module.reset(recipe.seed)
    start_checkpointing(recipe, networks)
    if recipe.train.frozen_dtype == "float8":
        store_float8(networks.modules["teacher"])  # type: ignore[arg-type]
    if recipe.train.compile:
        roots = {m.root for m in networks.modules.values() if isinstance(m, Denoiser)}
        for root in roots:
            compile_blocks(root.shard_modules)


def start_checkpointing(recipe: Recipe, networks: RunNetworks) -> None:
    for module in networks.modules.values():
        if recipe.train.gradient_checkpointing and isinstance(module, Denoiser):
            module.enable_checkpointing()


def build(recipe: Recipe, accelerator: Accelerator) -> TrainingRun:
    """Builds networks, optimizers, state and data. Random initialisations are drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    strategy = strategy_of(recipe, accelerator)
    backbone = build_backbone(recipe, accelerator.device, deferred=strategy == "fsdp")
    built = build_networks(recipe, backbone)
    if strategy == "fsdp":
        shard_roles(built.modules | {"average": built.average}, backbone, recipe, accelerator)
    else:
        for module in built.modules.values():
            module.to(accelerator.device)
        built.average.to("cpu" if recipe.train.ema_device == "cpu" else accelerator.device)
    start_networks(recipe, built)
    scorer = Scorer(recipe.rewards, backbone.decode) if recipe.rewards else None
    networks = Networks(built.modules, recipe.rollout, scorer, backbone.restart)
    roles = recipe.objective.trained_roles
    per_update = recipe.train.batch_size * recipe.train.accumulate * accelerator.num_processes
    unit = per_update // recipe.objective.group_size
    stream = recipe.data.open(backbone, recipe.seed, unit, recipe.train.readers)
    if recipe.part is not None:
        stream = PartStream(stream, recipe.part)
    shown = 2000 if backbone.output == "points" else max(recipe.train.num_samples, recipe.health.num_samples)
    prompts = stream.prompts(torch.arange(max(shown, MARKED)))
    return TrainingRun(
        recipe=recipe,
        accelerator=accelerator,
        strategy=strategy,
        backbone=backbone,
        networks=networks,
        optimizers={role: adamw(recipe.optimizers[role], networks[role].parameters()) for role in roles},
        state=send_to_device(recipe.objective.init_state(), accelerator.device),
        ema=Ema(built.average, networks.student, recipe.train.ema_decay),
        stream=stream,
        batches=batches(recipe, accelerator, backbone, stream),
        prompts=prompts[:shown],
        data_mark=hashlib.sha256("\n".join(prompts[:MARKED]).encode()).hexdigest(),
        images=stream.images(torch.arange(shown)),
        watch=Watch(recipe.health),
    )


def batches(recipe: Recipe, accelerator: Accelerator, backbone: Backbone, stream: Stream) -> Ahead:
    """This process's batches, with key 0, by the position of their first sample. ODE pairs are not made ahead, because
    a teacher may make them, whose calls are counted.

    Real data are read and encoded in a thread of their own while prompts are, but not in the first batch: it loads the
    VAE and the text encoders, and whatever loads a network changes torch's defaults for all threads meanwhile."""
    size, objective = recipe.train.batch_size, recipe.objective
    other, loaded = ThreadPoolExecutor(1, "real data"), threading.Event()

    def make(first: int) -> Batch:
        positions, beside = torch.arange(first, first + size), other if loaded.is_set() else None
        batch = make_batch(stream, backbone, positions, 0, objective.needs, objective.group_size, beside)
        loaded.set()
        return batch

    ahead = 0 if "pairs" in objective.needs else recipe.train.prefetch
    return Ahead(make, size * accelerator.num_processes, ahead)


def open_run(recipe: Recipe, accelerator: Accelerator) -> Path:
    """Creates or reopens the run folder, writes the resolved recipe into it, and returns it. An existing run must
    have been started with the same recipe, except for the keys that a continued run may change.

    Raises RecipeError for a run of another recipe, for a finished run without checkpoints, and for a folder that is
    not empty and holds no run."""
    folder = recipe.output_dir
    path = folder / "recipe.yaml"
    if path.is_file():
        if changed := changed_keys(load_stored(path), recipe):
            raise RecipeError(
                f"{folder} was started with different values of {', '.join(changed)}; choose another output_dir, or "
                "undo the change to continue the run"
            )
        if (folder / "export").exists() and not checkpoint.complete(folder / "checkpoints"):
            raise RecipeError(
                f"{folder} is a finished run without checkpoints to continue from; choose another output_dir"
            )
    elif folder.is_dir() and {f.name for f in folder.iterdir()} - {LOCK, *(f.name for f in leftovers(folder))}:
        raise RecipeError(f"output_dir {folder} is not empty and holds no run; choose another folder")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        clean(folder)
        replace_file(path, dump_recipe(recipe))
    accelerator.wait_for_everyone()
    return folder


def samples_per_update(recipe: Recipe, accelerator: Accelerator) -> int:
    return recipe.train.batch_size * recipe.train.accumulate * accelerator.num_processes


def checkpoint_to_resume(recipe: Recipe, accelerator: Accelerator) -> Path | None:
    """The newest complete checkpoint, or None if there is none. With `train.resume_from`, the one that it names; but
    still the newest, if that was saved since a start with the same `train.resume_from`, so that the same command
    continues the run. Nothing on disk is changed.

    Raises, before any weights load, RecipeError if the named checkpoint does not exist, or if the run cannot be
    continued from it with this recipe, and CheckpointError if the checkpoint is damaged."""
    folder, name = recipe.output_dir / "checkpoints", recipe.train.resume_from
    complete = checkpoint.complete(folder)
    if name is not None and name not in [c.name for c in complete] and not comes_from(complete, name):
        names = ", ".join(c.name for c in complete)
        choice = f"the complete ones are {names}" if complete else "there is no complete one"
        raise RecipeError(f"train.resume_from: {folder} has no checkpoint {name}; {choice}")
    if not complete:
        return None
    chosen = complete[-1] if name is None or comes_from(complete, name) else folder / name
    counters, per_update = checkpoint.counters_of(chosen), samples_per_update(recipe, accelerator)
    if counters["samples_per_update"] != per_update:
        raise RecipeError(
            f"train.batch_size x train.accumulate x processes is {per_update}, but the run was started with "
            f"{counters['samples_per_update']} samples per update; keep the product as it was"
        )
    if counters["step"] > recipe.train.steps:
        raise RecipeError(
            f"train.steps is {recipe.train.steps}, and {chosen} was saved after update {counters['step']}; raise "
            "train.steps, or continue from an earlier checkpoint (train.resume_from)"
        )
    for later in later_checkpoints(recipe, chosen):
        if (aside := recipe.output_dir / "set_aside" / later.name).exists():
            raise RecipeError(
                f"train.resume_from: the later checkpoint {later.name} cannot be set aside, because {aside} already "
                "exists; move or remove that folder"
            )
    return chosen


def comes_from(complete: list[Path], name: str) -> bool:
    """Whether the newest checkpoint was saved after a start with this `train.resume_from`. Not if it is damaged."""
    try:
        return bool(complete) and checkpoint.counters_of(complete[-1]).get("resumed_from") == name
    except CheckpointError:
        return False


def later_checkpoints(recipe: Recipe, resumed: Path) -> list[Path]:
    """The complete checkpoints after the one that `train.resume_from` goes back to."""
    complete = checkpoint.complete(recipe.output_dir / "checkpoints")
    return complete[complete.index(resumed) + 1 :] if recipe.train.resume_from else []


def set_aside(recipe: Recipe, resumed: Path) -> None:
    """Moves later checkpoints to the folder set_aside, once the run is ready to continue from this one."""
    for later in later_checkpoints(recipe, resumed):
        (recipe.output_dir / "set_aside").mkdir(exist_ok=True)
        later.rename(recipe.output_dir / "set_aside" / later.name)


def start_from(run: TrainingRun) -> list[str]:
    """Loads the weights of `init_from` into the student: from an export or a pipeline folder, or from the moving
    average of a run's last checkpoint. A run also gives the other roles that this recipe trains, as far as its
    checkpoint has them. Returns the trained roles that started from the pretrained weights instead.

    Raises CheckpointError if the weights are those of another network."""
    if run.recipe.init_from is None:
        return []
    path, networks, missing = Path(run.recipe.init_from), run.networks, list[str]()
    if checkpoints := checkpoint.complete(path / "checkpoints"):
        verify_once(run.accelerator, checkpoints[-1])
        checkpoint.read_student(checkpoints[-1], networks.student.state_dict())
        for role in run.recipe.objective.trained_roles:
            if role == "student":
                continue
            if checkpoint.holds(checkpoints[-1], role):
                checkpoint.read_into(checkpoints[-1], role, networks[role].state_dict())
            else:
                missing.append(role)
    else:
        copy_student(run.backbone.load_start(path), networks.student, path)
        missing = [role for role in run.recipe.objective.trained_roles if role != "student"]
    run.ema.move(networks.student, 0.0)
    return missing


@torch.no_grad()
def copy_student(given: nn.Module, student: nn.Module, path: Path) -> None:
    """Sets the student's weights, sharded or whole, to those of another student, which may have fewer inputs. Raises
    CheckpointError, naming the path, if it is another network."""
    own, values = student.state_dict(), given.state_dict()
    try:
        for name, stored in carried_names(own, values).items():
            if own[name].shape != values[stored].shape:
                raise ValueError(f"{name} has shape {list(values[stored].shape)} instead of {list(own[name].shape)}")
            local(own[name]).copy_(own_slice(values[stored], own[name]))
    except ValueError as error:
        raise CheckpointError(f"init_from: {path} does not fit this recipe's student: {error}") from None


def verify_once(accelerator: Accelerator, path: Path) -> None:
    """Compares the files of a checkpoint with their hashes. Every process reads some of them, and all processes raise
    the CheckpointError of any."""
    failed = ""
    try:
        checkpoint.verify(path, share=(accelerator.process_index, accelerator.num_processes))
    except CheckpointError as error:
        failed = str(error)
    if failed := next(filter(None, gather_object([failed])), ""):
        raise CheckpointError(failed)


def resume(run: TrainingRun, path: Path) -> dict[str, Any]:
    """Restores everything that a checkpoint holds into the run, and returns its counters."""
    counters = checkpoint.counters_of(path)
    verify_once(run.accelerator, path)
    checkpoint.load(path, run.saved, run.optimizers, run.state, run.accelerator.device, verified=True)
    run.ema.updates = counters["ema_updates"]
    run.watch.recall(counters["watch"])
    return counters
