"""How several processes share a run: how they start, how networks are sharded, and how gradients are averaged."""

import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastgen.backbones.base import Backbone
from fastgen.denoiser import Denoiser
from fastgen.modules.lora import LoraDenoiser
from fastgen.modules.sharding import is_sharded, shard
from fastgen.modules.stored_name import stored_name
from fastgen.recipe import Recipe
from fastgen.registry import RecipeError
from fastgen.run.launcher import check_launcher

Strategy = Literal["single", "ddp", "fsdp"]
LONGEST = timedelta(hours=2)  # ours; that processes wait for what the first one does alone, such as an export
COMPILERS = (os.environ.get("CXX", "g++"), "c++", "clang++")


def start(recipe: Recipe) -> Accelerator:
    """Starts accelerate with all processes that this program was launched with, on the device the recipe asks for.

    Without a GPU, accelerate must be given cpu=True: otherwise it would treat a torchrun of two processes as two
    separate runs. Mixed precision is the recipe's, and applied in the training loop.
    Raises RecipeError for a device, a number of processes or a launcher setting that is not available."""
    config = recipe.train
    if config.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("train.device is cuda, but there is no GPU here; set it to auto or cpu")
    check_launcher(config)
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    if config.tf32 and cpu:
        raise RecipeError("train.tf32 is a mode of GPUs, and this run is on a CPU; leave it out")
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    if config.compile and not any(map(shutil.which, COMPILERS)):
        raise RecipeError(
            f"train.compile: torch.compile needs a compiler of C++, and there is none of {', '.join(COMPILERS)} here; "
            "install one, or set it to false"
        )
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST)])
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    for count, source in ((launched, "the launcher's WORLD_SIZE"), (config.num_processes, "train.num_processes")):
        if count not in (None, accelerator.num_processes):
            raise RecipeError(
                f"{source} asks for {count} processes, but accelerate started {accelerator.num_processes}; on a CPU "
                "use torchrun --nproc_per_node, because accelerate launch --cpu starts only one"
            )
    chunks = recipe.rollout.chunks
    if strategy_of(recipe, accelerator) == "fsdp" and chunks is not None and chunks.replay:
        raise RecipeError(
            "rollout.chunks.replay: sharded networks cannot replay, as FSDP reduces gradients once per backward pass; "
            "leave replay out and set train.gradient_checkpointing: true, or set train.strategy: ddp"
        )
    if strategy_of(recipe, accelerator) == "fsdp" and accelerator.num_processes == 1:
        raise RecipeError(
            "train.strategy: fsdp shards networks over processes, but there is only one process; launch more, or set "
            "it to auto"
        )
    check_shard_group(recipe, accelerator)
    check_optimizers(recipe, accelerator)
    if strategy_of(recipe, accelerator) == "fsdp" and config.frozen_dtype == "float8":
        raise RecipeError("train.frozen_dtype: float8 is not possible, as fsdp shards the teacher; choose bfloat16")
    if strategy_of(recipe, accelerator) == "fsdp" and config.ema_device == "cpu":
        raise RecipeError("train.ema_device: the moving average is sharded like the networks; leave ema_device out")
    return accelerator


def check_optimizers(recipe: Recipe, accelerator: Accelerator) -> None:
    """Raises RecipeError for 8-bit optimizers that cannot work with these processes, or on this device."""
    for role, config in recipe.optimizers.items():
        if config.is_8bit and strategy_of(recipe, accelerator) == "fsdp":
            raise RecipeError(
                f"optimizers.{role}.kind: {config.kind} cannot step sharded tensors, and the launcher is configured "
                "for FSDP; choose adamw, which fsdp shards"
            )
        if config.kind == "paged_adamw_8bit" and accelerator.device.type == "cpu":
            raise RecipeError(
                f"optimizers.{role}.kind: paged_adamw_8bit moves moments between the memory of a GPU and of its host, "
                "and this run is on a CPU; choose adamw_8bit"
            )


def check_shard_group(recipe: Recipe, accelerator: Accelerator) -> None:
    """Raises RecipeError unless the processes are whole groups that each share a copy of sharded networks."""
    group, count = recipe.train.shard_group, accelerator.num_processes
    if group is None:
        return
    if strategy_of(recipe, accelerator) != "fsdp":
        raise RecipeError(
            "train.shard_group says how many processes share one copy of sharded networks, but networks are sharded "
            "only with train.strategy: fsdp; leave shard_group out, or set strategy to fsdp"
        )
    if count % group:
        raise RecipeError(
            f"train.shard_group is {group}, but {count} processes are no whole groups of {group}; choose a divisor of "
            f"{count}"
        )


def strategy_of(recipe: Recipe, accelerator: Accelerator) -> Strategy:
    """The strategy of this run. `auto` is fsdp if accelerate was configured for FSDP, else ddp; ddp on one process is
    "single"."""
    strategy = recipe.train.strategy
    if strategy == "auto":
        strategy = "fsdp" if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" else "ddp"
    return "single" if strategy == "ddp" and accelerator.num_processes == 1 else strategy


def shard_roles(modules: dict[str, nn.Module], backbone: Backbone, recipe: Recipe, accelerator: Accelerator) -> None:
    """Applies `fully_shard` to every role in place, frozen ones included. A base that roles share is sharded once."""
    mesh, dtype = mesh_of(recipe, accelerator), gathered_dtype(recipe)
    weights = backbone.weights()
    shared = backbone.shared
    roots = [module for module in modules.values() if not isinstance(module, LoraDenoiser)]
    with nullcontext() if shared is None else shared.with_tables():
        for module in roots if shared is None else (*roots, shared.denoiser):
            if isinstance(module, Denoiser):
                shard(module, module.shard_modules, mesh, accelerator.device, weights, stored_name, dtype)
                module.gathered_dtype = dtype
            else:
                shard(module, (), mesh, accelerator.device, weights, stored_name)


def mesh_of(recipe: Recipe, accelerator: Accelerator) -> DeviceMesh:
    """The processes that share a copy of the networks, or with `train.shard_group` (copies, processes of a copy)."""
    group, count, kind = recipe.train.shard_group, accelerator.num_processes, accelerator.device.type
    if group is None or group == count:
        return init_device_mesh(kind, (count,))
    return init_device_mesh(kind, (count // group, group), mesh_dim_names=("copies", "shards"))


def gathered_dtype(recipe: Recipe) -> torch.dtype | None:
    """The dtype in which sharded networks are gathered: that of autocast. None, as stored, without mixed precision and
    for objectives that differentiate networks along directions, which they do in float32."""
    mixed = recipe.train.mixed_precision == "bf16" and not recipe.objective.takes_derivatives
    return torch.bfloat16 if mixed else None


def reduce_in_backward(modules: Iterable[nn.Module], enabled: bool) -> None:
    """Whether the backward pass reduces the gradients of these networks to shards, as far as they are sharded.
    Otherwise they are kept whole, and enter the next reduction."""
    for module in modules:
        if is_sharded(module):
            module.set_requires_gradient_sync(enabled)  # type: ignore[operator]


def forget_forwards(modules: Iterable[nn.Module]) -> None:
    """To be called between updates. FSDP remembers the order of the forwards until a backward pass, and would remember
    all those of a network that has none (the teacher)."""
    for module in modules:
        if getattr(module._get_fsdp_state(), "_is_root", None) and hasattr(module, "reset_iter_state"):  # type: ignore[operator]
            module.reset_iter_state()  # type: ignore[operator]


def mean_terms(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logged scalars of all processes, which have the same names, as means over processes, by one all-reduce."""
    values = torch.stack([value.float() for value in terms.values()])
    dist.all_reduce(values)
    return dict(zip(terms, values / dist.get_world_size(), strict=True))
