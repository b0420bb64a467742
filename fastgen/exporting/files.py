"""Tensors on their way from one safetensors file to another, one at a time, so that memory holds no whole network."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from fastgen.backbones.folder import weight_files
from fastgen.backbones.names_read import names_read
from fastgen.data.files import replacing

DTYPES = {  # safetensors' names
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.uint8: "U8",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor that is read when it is wanted."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        count = 1
        for side in self.shape:
            count *= side
        return count * self.dtype.itemsize

    def renamed(self, name: str) -> "Entry":
        return Entry(name, self.shape, self.dtype, self.read)

    def changed(self, change: Callable[[Tensor], Tensor], shape: tuple[int, ...], name: str | None = None) -> "Entry":
        """With another shape, and values that `change` makes when they are wanted."""
        return Entry(name or self.name, shape, self.dtype, lambda: change(self.read()))


def read_component(folder: Path, library: str = "diffusers") -> Iterator[Entry]:
    """The weights of a pipeline's component, from its one file or its shards, named as the library reads them."""
    for path in weight_files(folder, library):
        entries = {entry.name: entry for entry in read_file(path)}
        names = names_read(folder, entries) if library == "diffusers" else {name: name for name in entries}
        yield from (entries[stored].renamed(name) for name, stored in names.items())


def read_file(path: Path) -> Iterator[Entry]:
    """The tensors of a safetensors file, of which only the header is read."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            yield Entry(name, tuple(part.get_shape()), TORCH_DTYPES[part.get_dtype()], tensor_reader(path, name))


def tensor_reader(path: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    return read


def of_tensors(tensors: Mapping[str, Tensor]) -> list[Entry]:
    """Tensors that are in memory, such as an adapter's."""
    return [Entry(k, tuple(v.shape), v.dtype, lambda value=v: value) for k, v in tensors.items()]  # type: ignore[misc]


def write_file(path: Path, entries: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file. The tensors are read, written and forgotten one by one. Raises ValueError if two have
    the same name."""
    listed = list(entries)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    start = 0
    for entry in listed:
        if entry.name in header:
            raise ValueError(f"two tensors are named {entry.name}")
        end = start + entry.num_bytes
        header[entry.name] = {"dtype": DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in listed:
            tensor = entry.read()
            if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
                raise ValueError(
                    f"{entry.name} is {tensor.dtype} {list(tensor.shape)}, not {entry.dtype} {entry.shape}"
                )
            file.write(data_of(tensor))


def data_of(tensor: Tensor) -> bytes:
    """The values as they lie in a safetensors file."""
    whole = to_safetensors({"x": tensor.detach().cpu().contiguous()})
    return whole[8 + int.from_bytes(whole[:8], "little") :]
