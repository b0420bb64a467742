"""A transformer in the layout of its authors: tensors renamed, and fused where diffusers has split them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.backbones.folder import read_json
from fastgen.exporting.files import Entry, read_component
from fastgen.exporting.layouts import Place, original_layout


def original_entries(folder: Path) -> Iterator[Entry]:
    """The network in this folder of a pipeline, in its original layout. Raises ValueError if none is known for it."""
    return in_original_layout(read_component(folder), read_json(folder / "config.json"))


def in_original_layout(entries: Iterable[Entry], network: Mapping[str, Any]) -> Iterator[Entry]:
    """network: its config.json. Raises ValueError if a part of a fused tensor is missing."""
    layout = original_layout(network)
    fused: dict[str, dict[int, Entry]] = {}
    for entry in entries:
        place = layout.place(entry.name)
        if place.parts == 1:
            yield placed(entry, place)
            continue
        parts = fused.setdefault(place.name, {})
        parts[place.part] = entry
        if len(parts) == place.parts:
            yield joined(place.name, [parts[i] for i in range(place.parts)])
            del fused[place.name]
    if fused:
        name, parts = next(iter(fused.items()))
        raise ValueError(f"{name} is fused of several tensors, of which only {parts[min(parts)].name} is there")


def placed(entry: Entry, place: Place) -> Entry:
    return entry.changed(swap_halves, entry.shape, place.name) if place.swapped else entry.renamed(place.name)


def swap_halves(rows: Tensor) -> Tensor:
    first, second = rows.chunk(2)
    return torch.cat([second, first])


def joined(name: str, parts: Sequence[Entry]) -> Entry:
    """The parts below each other."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Entry(name, shape, parts[0].dtype, lambda: torch.cat([part.read() for part in parts]))
