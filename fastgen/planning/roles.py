"""The bytes of one role: weights, gradients, what its optimizer holds, and what it gathers where it is sharded."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgen.backbones.base import Backbone
from fastgen.backbones.pipeline import PipelineBackbone
from fastgen.denoiser import Denoiser
from fastgen.modules.float8 import store_float8
from fastgen.modules.lora import LoraDenoiser
from fastgen.modules.sharding import units
from fastgen.planning.weightless import size, tensors
from fastgen.recipe import Recipe
from fastgen.run.distributed import gathered_dtype
from fastgen.run.optimizers import BLOCK, PAGED, SMALLEST


@dataclasses.dataclass(frozen=True)
class Role:
    """One network. Bytes are before sharding. parameters: the network's own; for an adapter, without the base."""

    name: str
    kind: str  # trained, adapter, frozen, average, "average, on the host"
    parameters: int
    dtype: str
    held: int
    gradients: int = 0
    moments: int = 0
    temporary: int = 0  # bytes that an optimizer step makes and frees, see `step_bytes`
    outside: int = 0  # bytes of the layers outside the blocks, as they are gathered
    block: int = 0  # bytes of the largest block, as it is gathered
    visiting: int = 0  # bytes that are on the host, and on the GPU only where the role is sampled


def keep_float32(module: nn.Module) -> None:
    """Converts to float32 what from_pretrained keeps in float32: Wan's time embedder, norms and positions. Not for
    sharded networks, which have one dtype."""
    for network in module.modules():
        kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
        for name, tensor in (*network.named_parameters(), *network.named_buffers()) if kept else ():
            if kept & set(name.split(".")) and tensor.dtype in (torch.bfloat16, torch.float16):
                tensor.data = tensor.data.float()


def moment_bytes(kind: str, parameters: Sequence[Tensor], gpu: bool) -> int:
    """Bytes of AdamW's two moments on the device. In 8 bits, large tensors take a byte for each number and a scale for
    each block; of paged moments, the large ones may leave a GPU and are not counted."""
    if not kind.endswith("8bit"):
        return 2 * size(parameters)
    counts = [p.numel() for p in parameters]
    paged = gpu and kind.startswith("paged")
    eighths = sum((0 if paged and n >= PAGED else n) + 4 * -(-n // BLOCK) for n in counts if n >= SMALLEST)
    return 2 * (eighths + sum(4 * n for n in counts if n < SMALLEST))


def step_bytes(kind: str, parameters: Sequence[Tensor], gpu: bool) -> int:
    """Bytes that a step of AdamW makes and frees: on a GPU as many as the second moments (`foreach`), on a CPU as many
    as the largest parameter has, and none where it is fused. Paged moments visit the GPU one tensor at a time."""
    if kind == "paged_adamw_8bit" and gpu:
        return max((2 * p.numel() for p in parameters if p.numel() >= PAGED), default=0)
    if kind != "adamw":
        return 0
    return size(parameters) if gpu else max((size([p]) for p in parameters), default=0)


def role_of(name: str, module: nn.Module, recipe: Recipe, backbone: Backbone, gpu: bool) -> Role:
    """The numbers of one role. The base that adapters share counts under a role that uses it without an adapter."""
    view = isinstance(module, LoraDenoiser)  # a view of the shared base, with or without an adapter
    adapter = isinstance(module, LoraDenoiser) and module.is_adapter
    network = backbone.shared.denoiser if view and backbone.shared else module
    if view and not adapter:
        own = [t for n, t in (*network.named_parameters(), *network.named_buffers()) if ".lora_" not in n]
    else:
        own = tensors(module)
    if name == "teacher" and recipe.train.frozen_dtype == "float8":
        own = tensors(float8_sizes(backbone))
    trained = name in recipe.optimizers
    parameters = list(module.parameters()) if adapter or trained else own
    *blocks, outside = gathers(network, gathered_dtype(recipe)) if isinstance(network, Denoiser) else [0]
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in parameters if t.is_floating_point()})
    return Role(
        name=name,
        kind="adapter" if adapter else "trained" if trained else "frozen",
        parameters=sum(p.numel() for p in parameters),
        dtype=", ".join(dtypes) or "-",
        held=size(own),
        gradients=size(parameters) if trained else 0,
        moments=moment_bytes(recipe.optimizers[name].kind, parameters, gpu) if trained else 0,
        temporary=step_bytes(recipe.optimizers[name].kind, parameters, gpu) if trained else 0,
        outside=outside if blocks else 0,
        block=max(blocks, default=0),
    )


def float8_sizes(backbone: Backbone) -> nn.Module:
    """A network without weights, stored as a teacher in float8."""
    assert isinstance(backbone, PipelineBackbone)
    denoiser = backbone.make_empty(torch.bfloat16)
    store_float8(denoiser)
    return denoiser


def average_of(module: Denoiser, recipe: Recipe, backbone: Backbone, gpu: bool) -> Role:
    """The numbers of the student's moving average; on the host it holds nothing of the GPU."""
    role = dataclasses.replace(role_of("average", module, recipe, backbone, gpu), kind="average")
    if recipe.train.ema_device == "cpu":
        return dataclasses.replace(role, kind="average, on the host", held=0, visiting=role.held)
    return role


def gathers(network: Denoiser, dtype: torch.dtype | None) -> list[int]:
    """Bytes of what a sharded network gathers at once: of every block with what lies around it inside a larger block,
    and last, of the layers outside all blocks."""
    found = {
        part: sum(p.numel() * (dtype or p.dtype).itemsize for p in own)
        for part, own in units(network, network.shard_modules)
    }
    around = {
        inner: size
        for part, size in found.items()
        if part is not network
        for inner in part.modules()
        if inner is not part
    }
    return [size + around.get(part, 0) for part, size in found.items()]
