"""The rows of prepared shards: safetensors files with one tensor [n, ...] per key, and a checksum of every row.

A row is read by itself from the memory-mapped file, so hashing whole files would read much more than a run needs."""

import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastgen.batch import Conditioning
from fastgen.data.base import DataError

CHECKSUMS = "crc32"  # the key of the checksums [n], int64


class ShardRows:
    """Access to the rows of one kind of shard. Row i is in shard i // size. lengths: the number of tokens of a key
    whose padding is folded. checked: whether every shard must hold checksums, which those of version 0.1 do not."""

    def __init__(self, folder: Path, kind: str, size: int, lengths: Mapping[str, int], checked: bool):
        self._folder, self._kind, self._size, self._lengths, self._checked = folder, kind, size, lengths, checked
        self._shard = lru_cache(maxsize=64)(self._open)

    def _open(self, number: int) -> Any:
        return safe_open(self._folder / shard_name(self._kind, number), framework="pt")

    def read(self, rows: Sequence[int]) -> Conditioning:
        """The rows, on the CPU. Raises DataError, naming the shard, if one of them is damaged."""
        parts = [self.read_row(*divmod(row, self._size)) for row in rows]
        return Conditioning.cat(
            [Conditioning({k: unfold(v, self._lengths.get(k)) for k, v in part.items()}) for part in parts]
        )

    def read_row(self, number: int, place: int) -> dict[str, Tensor]:
        """Each tensor of one row of a shard, [1, ...]."""
        try:
            file = self._shard(number)
            row = {key: file.get_slice(key)[place : place + 1] for key in file.keys()}  # noqa: SIM118
            stored = row.pop(CHECKSUMS, None)
            if self._checked if stored is None else int(stored) != checksum(row):
                raise ValueError(f"row {place} is not what was written")
        except (SafetensorError, OSError, ValueError) as error:
            path = self._folder / shard_name(self._kind, number)
            raise DataError(
                f"{path} is damaged: {error}; run the same fastgen prepare command again to rebuild it"
            ) from None
        return row


def shard_name(kind: str, number: int) -> str:
    return f"{kind}-{number:05d}.safetensors"


def latents_of(size: tuple[int, int]) -> str:
    """The kind of shard that has the latents of pictures of this size (H, W), where there are several."""
    return f"latents-{size[0]}x{size[1]}"


def packed(rows: Mapping[str, Tensor]) -> bytes:
    """The bytes of a shard: the rows, one tensor [n, ...] per key, and their checksums."""
    count = len(next(iter(rows.values())))
    sums = [checksum({key: value[i : i + 1] for key, value in rows.items()}) for i in range(count)]
    return save({**rows, CHECKSUMS: torch.tensor(sums)})


def checksum(row: Mapping[str, Tensor]) -> int:
    """The CRC-32 of the keys, dtypes, shapes and bytes of a row."""
    result = 0
    for key, value in sorted(row.items()):
        result = zlib.crc32(f"{key} {value.dtype} {list(value.shape)} ".encode(), result)
        result = zlib.crc32(value.contiguous().reshape(-1).view(torch.uint8).numpy().data, result)
    return result


def fold(rows: Tensor) -> Tensor:
    """Removes padding from tokens [n, L, D]: trailing tokens that equal the last token, in every row, are dropped
    except for the first of them. Tensors of other shapes are returned unchanged. `unfold` restores the padding."""
    if rows.dim() != 3:
        return rows
    same = (rows == rows[:, -1:]).all(dim=-1).all(dim=0)
    run = int(same.flip(0).to(torch.int64).cumprod(0).sum())
    return rows[:, : rows.shape[1] - run + 1]


def unfold(rows: Tensor, length: int | None) -> Tensor:
    """Repeats the last token until there are `length` tokens."""
    if length is None or length == rows.shape[1]:
        return rows
    return torch.cat([rows, rows[:, -1:].expand(-1, length - rows.shape[1], -1)], dim=1)
