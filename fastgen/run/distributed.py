"""How several processes share a run: how they start, how networks are sharded, and how gradients are averaged."""

import os
from collections.abc import Iterable
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from fastgen.backbones.base import Backbone
from fastgen.denoiser import Denoiser
from fastgen.modules.inputs import ExtraInputs
from fastgen.modules.lora import LoraDenoiser, is_adapter_layer
from fastgen.modules.sharding import shard
from fastgen.recipe import Recipe
from fastgen.registry import RecipeError
from fastgen.run.launcher import check_launcher

Strategy = Literal["single", "ddp", "fsdp"]
BUCKET_BYTES = 25 << 20  # of gradients, averaged by one all-reduce


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
    accelerator = Accelerator(cpu=cpu, mixed_precision="no")
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
    return accelerator


def strategy_of(recipe: Recipe, accelerator: Accelerator) -> Strategy:
    """The strategy of this run. `auto` is fsdp if accelerate was configured for FSDP, else ddp; ddp on one process is
    "single"."""
    strategy = recipe.train.strategy
    if strategy == "auto":
        strategy = "fsdp" if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" else "ddp"
    return "single" if strategy == "ddp" and accelerator.num_processes == 1 else strategy


def shard_roles(modules: dict[str, nn.Module], backbone: Backbone, accelerator: Accelerator) -> None:
    """Applies `fully_shard` to every role in place, frozen ones included. A base that roles share is sharded once."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    weights = backbone.weights()
    for module in modules.values():
        if not isinstance(module, LoraDenoiser):
            blocks = module.shard_modules if isinstance(module, Denoiser) else ()
            shard(module, blocks, mesh, accelerator.device, weights, stored_name)
    if backbone.shared is not None:
        base = backbone.shared.denoiser
        shard(base, base.shard_modules, mesh, accelerator.device, weights, stored_name)
        backbone.shared.refresh()


def stored_name(module: nn.Module, name: str) -> str:
    """The name of a tensor in the pretrained weights: without the wrappers around its layer (added inputs, LoRA)."""
    *path, last = name.split(".")
    kept = []
    for part in path:
        wrapped = (isinstance(module, ExtraInputs) and part == "embedding") or (
            is_adapter_layer(module) and part == "base_layer"
        )
        if not wrapped:
            kept.append(part)
        module = module.get_submodule(part)
    return ".".join([*kept, last])


def average_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Replaces gradients by their mean over processes, in buckets. Gradients of sharded networks are averaged already
    and are left as they are. A gradient that a process lacks (of an expert that it did not call) counts as zero there.

    This is done by hand rather than by a DDP wrapper, because one module is called several times per update, by
    several players."""
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    used = torch.tensor([p.grad is not None for p in whole], dtype=torch.uint8, device=accelerator.device)
    if not len(used):
        return
    dist.all_reduce(used, dist.ReduceOp.MAX)
    bucket: list[Tensor] = []
    for p, somewhere in zip(whole, used.tolist(), strict=True):
        if not somewhere:
            continue
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if bucket and (sum(g.nbytes for g in bucket) > BUCKET_BYTES or bucket[0].dtype != p.grad.dtype):
            average(bucket, accelerator.num_processes)
            bucket = []
        bucket.append(p.grad)
    if bucket:
        average(bucket, accelerator.num_processes)


def average(gradients: list[Tensor], num_processes: int) -> None:
    """Averages several gradients over processes in place, with one all-reduce."""
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    parts = (flat / num_processes).split([g.numel() for g in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
