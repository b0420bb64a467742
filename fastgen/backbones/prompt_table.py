"""A table of encoded prompts. Each is encoded once and kept, or read if it was stored before the run."""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from fastgen.batch import Conditioning

TABLE_BYTES = 1 << 30  # limit on prompt embeddings in memory; beyond it the table is emptied


class PromptRows(Protocol):
    """Prompts that were encoded before, as `fastgen prepare` stores them."""

    def __contains__(self, prompt: str) -> bool: ...

    def read(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning that encoding these prompts would give, on the CPU."""


class PromptTable:
    """The conditioning of prompts seen so far, those that were asked for last, up to a gigabyte.

    Each prompt is encoded alone, because the last bits of an embedding depend on the other prompts in its batch, and a
    run that is continued sees its prompts in other batches. Several threads may ask it.
    encode: turns a few prompts into their rows. finish: turns the rows of a batch into what networks are given.
    encoding: what `encode` is called inside of."""

    def __init__(
        self,
        encode: Callable[[list[str]], Conditioning],
        finish: Callable[[Conditioning], Conditioning],
        device: torch.device,
        dtype: torch.dtype,
        encoding: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self.encode, self.finish, self.device, self.dtype, self.encoding = encode, finish, device, dtype, encoding
        self.stored: PromptRows | None = None  # prompts found here are read instead of encoded
        self._lock = threading.Lock()
        self._kept: dict[str, Conditioning] = {}  # one row each; the prompt that was asked for last is the last one
        self._bytes = 0

    @torch.no_grad()
    def rows(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of these prompts, batch size len(prompts). It depends on these prompts alone."""
        with self._lock:
            found = self.found(list(dict.fromkeys(prompts)))
        return self.finish(Conditioning.cat([found[p] for p in prompts]))

    def found(self, prompts: list[str]) -> dict[str, Conditioning]:
        """The row of each of these prompts. New ones are kept, and the oldest leave if the table grows too large."""
        fresh = self.made([p for p in prompts if p not in self._kept])
        self._bytes += sum(row.nbytes for row in fresh.values())
        found = {p: fresh[p] if p in fresh else self._kept.pop(p) for p in prompts}
        self._kept |= found
        while self._bytes > TABLE_BYTES:
            self._bytes -= self._kept.pop(next(iter(self._kept))).nbytes
        return found

    def made(self, prompts: list[str]) -> dict[str, Conditioning]:
        """The rows of prompts that are not in the table, read or encoded one by one."""
        stored = [p for p in prompts if self.stored is not None and p in self.stored]
        rows = {p: self.read(p) for p in stored}
        if unread := [p for p in prompts if p not in rows]:
            with self.encoding():
                rows |= {p: self.placed(self.encode([p])) for p in unread}
        return rows

    def read(self, prompt: str) -> Conditioning:
        """The row of a stored prompt."""
        assert self.stored is not None
        return self.placed(self.stored.read([prompt]))

    def placed(self, rows: Conditioning) -> Conditioning:
        """Rows in this table's precision, on its device."""
        return Conditioning(
            {k: v.to(self.device, self.dtype if v.is_floating_point() else v.dtype) for k, v in rows.items()}
        )
