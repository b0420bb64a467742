"""Networks sharded over processes with FSDP2's `fully_shard`, and access to their tensors, by shard or as a whole.

No process ever holds a whole network. Parameters are made on the meta device, sharded, and then filled: each process
reads its own slice of the weight files. While a checkpoint is written, one tensor at a time exists as a whole copy.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fastgen.modules.kept_heads import Width, cut, kept_width


class WeightsError(ValueError):
    """Stored weights are not those of the network that is to have them; the message names the file or the tensor."""


WeightMap = Mapping[str, tuple[Path, str]]  # parameter name -> (file, name in the file)


def shard(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: Any,
    device: torch.device,
    weights: WeightMap,
    stored_name: Callable[[nn.Module, str], str],
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Shards a module's parameters over the mesh, with one gather for each of its `units`.

    mesh: one axis, the processes that share the module; or two, (copies, processes that share a copy). Between copies
    gradients are averaged.
    dtype: of what is gathered and computed with; None: as it is stored. Gradients are reduced in the stored dtype.
    Inputs are not converted, because noise levels need their precision: the forwards run under autocast.
    Parameters on the meta device are filled from `weights`, which is looked up by the name that `stored_name` gives
    them; others keep their values.
    Raises ValueError if a parameter on the meta device has no weights."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not any(True for _ in module.parameters()):
        return module.to(device)
    width = kept_width(module)
    held = {n: t.detach().clone() for n, t in named_tensors(module).items() if not t.is_meta}
    for part, own in units(module, blocks):
        stored = next((p.dtype for p in own if p.requires_grad), None)
        policy = MixedPrecisionPolicy(dtype, stored if dtype else None, cast_forward_inputs=False)
        fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    module.to_empty(device=device)
    with torch.no_grad():
        for name, tensor in named_tensors(module).items():
            if name in held:
                local(tensor).copy_(own_slice(held[name], tensor))
            elif ".lora_" in name:
                local(tensor).zero_()  # LoraDenoiser.reset sets it later
            else:
                fill(tensor, stored_name(module, name), weights, width)
    return module


def units(module: nn.Module, blocks: Sequence[nn.Module]) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """The modules whose parameters are gathered one at a time, each with these parameters: of a block, those that no
    block inside it gathers; of the module itself, which comes last, the rest.

    blocks: those inside another one come before it."""
    taken, found = set[nn.Parameter](), list[tuple[nn.Module, list[nn.Parameter]]]()
    for part in (*blocks, module):
        own = [p for p in part.parameters() if p not in taken]
        taken.update(own)
        if own or part is module:
            found.append((part, own))
    return found


@torch.no_grad()
def refill(
    module: nn.Module, fresh: nn.Module, weights: WeightMap, stored_name: Callable[[nn.Module, str], str]
) -> None:
    """Sets a module's parameters and buffers, sharded or whole, to those of a freshly made one, in place. Where these
    are on the meta device, the values are read from `weights`, as `shard` does."""
    values, width = named_tensors(fresh), kept_width(module)
    for name, tensor in named_tensors(module).items():
        if values[name].is_meta:
            fill(tensor, stored_name(module, name), weights, width)
        else:
            local(tensor).copy_(own_slice(values[name], tensor))


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def fill(tensor: Tensor, name: str, weights: WeightMap, width: Width | None = None) -> None:
    """Copies this process's slice of a stored tensor. If one network is stored, every expert is filled from it. width:
    of a network that is narrower than the stored one, for which the stored tensor is read as a whole and cut."""
    if name not in weights:
        name = re.sub(r"^experts\.\d+\.", "", name)
    if name not in weights:
        raise WeightsError(f"the pretrained weights have no tensor {name}")
    path, key = weights[name]
    with safe_open(path, framework="pt") as file:
        stored = file.get_slice(key)
        if width is not None:
            stored = narrower(file.get_tensor(key), tensor.shape, width, f"{path}: {key}")
        elif tuple(stored.get_shape()) != tuple(tensor.shape):
            raise WeightsError(
                f"{path}: {key} has shape {tuple(stored.get_shape())}, {name} needs {tuple(tensor.shape)}"
            )
        part = stored[slices(tensor)] if tensor.dim() else file.get_tensor(key)
    local(tensor).copy_(part)


def narrower(stored: Tensor, shape: Sequence[int], width: Width, source: str) -> Tensor:
    """What `cut` keeps of a stored tensor. Raises WeightsError, naming the source, where it raises ValueError."""
    try:
        return cut(stored, shape, width)
    except ValueError as error:
        raise WeightsError(f"{source}: {error}") from None


# torch.distributed's tensors and modules take seconds to import. Where nothing has imported them, nothing is sharded.


def is_sharded_tensor(tensor: Tensor) -> bool:
    """Whether this is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to this module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def slices(tensor: Any) -> tuple[slice, ...]:
    """The slices of the whole tensor that this process holds."""
    if not is_sharded_tensor(tensor):
        return tuple(slice(0, n) for n in tensor.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(o, o + n) for n, o in zip(shape, offset, strict=True))


def own_slice(whole: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process holds in `like`."""
    return whole[slices(like)] if whole.dim() else whole


def local(tensor: Any) -> Tensor:
    """This process's shard of a tensor, or the tensor itself if it is not sharded. Shares memory."""
    return tensor.to_local() if is_sharded_tensor(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """The whole tensor, on every process; all of them must call it."""
    return tensor.full_tensor() if is_sharded_tensor(tensor) else tensor


def gathered(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a module's state_dict by name, one whole tensor at a time. If the module is sharded, all
    processes must go through them together, to the end."""
    return ((name, whole(tensor)) for name, tensor in module.state_dict().items())
