"""Tensors that are stored whole in one safetensors file, or in parts in several.

The header of a file of parts says where each begins in its whole tensor, by the key that torch's
`HuggingFaceStorageWriter` writes and its reader understands: DCP_SHARDING_INFO = {name: {"saved_offsets": [...]}}.
Without that key, the tensors of a file are whole."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from fastgen.modules.tensor_file import TYPES, TensorFile

OFFSETS = "DCP_SHARDING_INFO"
Box = tuple[slice, ...]  # a part of a tensor: of every axis, from where to where


def offsets_entry(starts: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """The metadata of a file whose tensors are parts that begin at these indices of the whole ones."""
    return {OFFSETS: json.dumps({name: {"saved_offsets": list(start)} for name, start in starts.items()})}


class Part(NamedTuple):
    """A part of a tensor: the file it is in, as opened by safetensors and as ours, and the box it is of the whole."""

    opened: Any
    file: TensorFile
    box: Box


class Stored:
    """The tensors of some files. shapes: of whole tensors, by name. dtypes: by name, as safetensors calls them."""

    def __init__(self, paths: Iterable[Path]):
        """Raises OSError or SafetensorError for a file that cannot be read, and OSError if parts are missing."""
        self.shapes, self.dtypes = dict[str, tuple[int, ...]](), dict[str, str]()
        self._parts = dict[str, list[Part]]()
        for path in paths:
            opened, file = safe_open(path, framework="pt"), TensorFile(path)
            starts = json.loads((opened.metadata() or {}).get(OFFSETS, "{}"))
            for name in opened.keys():  # noqa: SIM118
                stored = opened.get_slice(name)
                size = stored.get_shape()
                start = starts[name]["saved_offsets"] if name in starts else [0] * len(size)
                box = tuple(slice(o, o + n) for o, n in zip(start, size, strict=True))
                self._parts.setdefault(name, []).append(Part(opened, file, box))
                self.dtypes[name] = stored.get_dtype()
                known = self.shapes.get(name, (0,) * len(box))
                self.shapes[name] = tuple(max(n, s.stop) for n, s in zip(known, box, strict=True))
        for name, parts in self._parts.items():
            if sum(math.prod(s.stop - s.start for s in part.box) for part in parts) != math.prod(self.shapes[name]):
                raise OSError(f"parts of {name} are missing")

    def whole(self, name: str) -> Tensor:
        """A tensor on the CPU. Nothing but this tensor comes into memory."""
        first, *more = self._parts[name]
        if not more:
            return first.file.read(name)
        value = torch.empty(self.shapes[name], dtype=TYPES[self.dtypes[name]])
        for part in (first, *more):
            value[part.box] = part.file.read(name)
        return value

    def box(self, name: str, box: Box) -> Tensor:
        """A box of a tensor, on the CPU. Of the parts, only what lies in the box is read."""
        if not box:  # safetensors cuts no tensor without axes
            return self._parts[name][0].opened.get_tensor(name)
        value = torch.empty([s.stop - s.start for s in box], dtype=TYPES[self.dtypes[name]])
        for part in self._parts[name]:
            common = tuple(
                slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(box, part.box, strict=True)
            )
            if all(s.start < s.stop for s in common):
                found = part.opened.get_slice(name)[inside(common, part.box)]
                if common == box:
                    return found
                value[inside(common, box)] = found
        return value


def inside(box: Box, frame: Box) -> Box:
    """The box, counted from where the frame around it begins."""
    return tuple(slice(s.start - f.start, s.stop - f.start) for s, f in zip(box, frame, strict=True))
