"""A student's tensors as a stream: one whole tensor at a time, under the names that its pipeline stores them by.

What an export writes is a function of such a stream. So its form (folders of shards, an adapter, a single file) does
not matter to where the tensors come from: a running student, one that is sharded over processes, or a checkpoint."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastgen.denoiser import Denoiser
from fastgen.modules.inputs import plain_names
from fastgen.modules.lora import LoraDenoiser
from fastgen.modules.sharding import WeightMap
from fastgen.modules.tensor_file import TensorFile

PLACE = re.compile(r"(?:experts\.(\d+)\.)?network\.(.+)")  # of a tensor in a denoiser: its expert, and its name there
TABLES = re.compile(r"(?:.*\.tables|memory)\.(.+)")  # of the weights of added inputs, and of a linear memory
TAUGHT = re.compile(r"((?:actions|sound)\..+)")  # of the weights of what tells of actions, and of a sound stream


class Named(NamedTuple):
    """A tensor of an export. component: the folder that it belongs to, such as "unet". name: its name there."""

    component: str
    name: str
    tensor: Tensor


def whole_tensors(
    student: Denoiser,
    values: Iterable[tuple[str, Tensor]],
    components: Mapping[str, Any],
    weights: WeightMap,
    tables: dict[str, Tensor],
) -> Iterator[Named]:
    """The tensors of a student's networks, of an adapter those of its base with the adapter added.

    values: name in `student.state_dict()` -> tensor, in any order. student: says which networks there are; its own
    values are not read. components: what the student replaces in its pipeline (`student_components`). weights: where
    the pretrained tensors are stored. tables: takes the weights of added inputs, of a linear memory, of actions or
    sound, "<expert>.<name>", which no stock network has; it is complete when the stream ends."""
    places = places_of(components, [part.network for part in base_of(student).members])
    stream = merged(student, values, weights, tables) if isinstance(student, LoraDenoiser) else plain(student, values)
    for name, tensor in stream:
        place = PLACE.fullmatch(name)
        assert place is not None, name
        expert, rest = int(place[1] or 0), place[2]
        if table := TABLES.fullmatch(rest) or TAUGHT.fullmatch(rest):
            tables[f"{expert}.{table[1]}"] = tensor
        else:
            component, prefix = places[expert]
            yield Named(component, prefix + rest, tensor)


def base_of(student: Denoiser) -> Denoiser:
    """The denoiser whose networks a student calls: itself, or the base of its adapter."""
    return student.shared.denoiser if isinstance(student, LoraDenoiser) else student


def places_of(components: Mapping[str, Any], networks: Sequence[nn.Module]) -> list[tuple[str, str]]:
    """For each network, the component that it is or lies in, and how its tensors' names begin there."""
    found = {
        id(module): (name, f"{path}." if path else "")
        for name, component in components.items()
        if isinstance(component, nn.Module)
        for path, module in component.named_modules()
    }
    return [found[id(network)] for network in networks]


def plain(student: Denoiser, values: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The values by the names that they have without the wrapper around an extended time embedder."""
    names = {own: name for name, own in plain_names(student.state_dict()).items()}
    return ((names[name], tensor) for name, tensor in values)


def merged(
    student: LoraDenoiser, values: Iterable[tuple[str, Tensor]], weights: WeightMap, tables: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an adapter's base, read one by one from the pretrained files, with the adapter added:

        W + alpha / rank B A,  in float32                                          (LoRA, arXiv 2106.09685, Sec. 4.1)

    Only the adapter is held. Raises ValueError if it has a layer that the files do not have."""
    assert student.role is not None
    config, adapter = student.shared.configs[student.role], dict(values)
    expert = "" if student.boundaries else "0."  # experts are in the names
    for name in [name for name in adapter if name.startswith("inputs.")]:
        tables[expert + name.removeprefix("inputs.")] = adapter.pop(name)
    factor, files = (config.alpha or config.rank) / config.rank, dict[Any, TensorFile]()
    for name, (path, key) in weights.items():
        files[path] = files.get(path) or TensorFile(path)
        tensor, layer = files[path].read(key), name.removesuffix(".weight")
        down = adapter.pop(f"{layer}.lora_A.weight", None)
        if down is not None:
            up = adapter.pop(f"{layer}.lora_B.weight")
            change = up.float().cpu().flatten(1) @ down.float().cpu().flatten(1)
            tensor = tensor.float() + factor * change.view(tensor.shape)
        yield name, tensor
    if adapter:
        raise ValueError(f"the pretrained weights lack the layers of {', '.join(sorted(adapter)[:4])}")
