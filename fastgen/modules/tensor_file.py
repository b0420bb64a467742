"""Files of tensors, read and written one tensor at a time (https://huggingface.co/docs/safetensors, "Format").

Nothing is mapped into memory: of a file of any size, only the tensor at hand is held."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}  # as safetensors names them
TYPES = {name: dtype for dtype, name in DTYPES.items()}


class Spec(NamedTuple):
    """A tensor without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def head(specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None) -> tuple[bytes, dict[str, int]]:
    """The bytes before the values in a file that holds these tensors in this order, and where each tensor begins."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    starts, offset = dict[str, int](), 0
    for name, spec in specs.items():
        starts[name], end = offset, offset + spec.nbytes
        entries[name] = {"dtype": DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + start for name, start in starts.items()}


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's values, as they are stored."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class TensorFile:
    """A file of tensors that was checked before (`backbones.folder.check_weights`). specs: its tensors by name."""

    def __init__(self, path: Path):
        """Raises ValueError for a dtype that torch has no name for here."""
        self.path = path
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries: dict[str, Any] = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        if unknown := sorted({entry["dtype"] for entry in entries.values()} - TYPES.keys()):
            raise ValueError(f"{path} stores tensors as {', '.join(unknown)}, which is not supported")
        self.specs = {name: Spec(TYPES[e["dtype"]], tuple(e["shape"])) for name, e in entries.items()}
        self._starts = {name: 8 + length + entry["data_offsets"][0] for name, entry in entries.items()}

    def read(self, name: str) -> Tensor:
        """A tensor of the file, on the CPU. Raises KeyError if there is none of this name."""
        spec = self.specs[name]
        if not spec.nbytes:
            return torch.empty(spec.shape, dtype=spec.dtype)
        data = bytearray(spec.nbytes)
        with self.path.open("rb") as file:
            file.seek(self._starts[name])
            if file.readinto(data) != spec.nbytes:
                raise OSError(f"{self.path} is cut short")
        return torch.frombuffer(data, dtype=spec.dtype).reshape(spec.shape)


class TensorWriter:
    """A new file of tensors, which come in any order, for a `with` block. specs: what it will hold."""

    def __init__(self, path: Path, specs: Mapping[str, Spec]):
        self.path, self.specs = path, specs
        self.missing = set(specs)
        start, self._starts = head(specs, {"format": "pt"})
        self._file = path.open("xb")
        self._file.write(start)

    def put(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor, in the dtype that its spec says. Raises ValueError for a tensor of another shape."""
        spec = self.specs[name]
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, and {self.path.name} needs {list(spec.shape)}")
        self._file.seek(self._starts[name])
        self._file.write(raw(tensor.detach().cpu().to(spec.dtype)))
        self.missing.discard(name)

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes the file. Raises ValueError if a tensor was not written, unless another error is on its way."""
        self._file.close()
        if self.missing and kind is None:
            raise ValueError(f"{self.path.name} lacks the tensors {', '.join(sorted(self.missing)[:4])}")
