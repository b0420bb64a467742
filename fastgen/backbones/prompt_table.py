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
    """The conditioning of every prompt seen so far, up to a gigabyte.

    Each prompt is encoded alone, because the last bits of an embedding depend on the other prompts in its batch, and a
    run that is continued sees its prompts in other batches. Several threads may ask it.
    encode: turns a few prompts into their rows. finish: turns the rows of all prompts into what networks are given.
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
        self._index: dict[str, int] = {}
        self._encoded: Conditioning | None = None
        self._finished: Conditioning | None = None

    @torch.no_grad()
    def rows(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of these prompts, batch size len(prompts)."""
        with self._lock:
            new = [p for p in dict.fromkeys(prompts) if p not in self._index]
            if new:
                self.extend(new, set(prompts))
            assert self._finished is not None
            return self._finished.select(torch.tensor([self._index[p] for p in prompts], device=self.device))

    def extend(self, new: list[str], wanted: set[str]) -> None:
        """Encodes prompts and appends them to the table, which is emptied first if it has grown too large."""
        if self._encoded is not None and sum(v.nbytes for v in self._encoded.values()) > TABLE_BYTES:
            new, self._index, self._encoded = sorted(wanted), {}, None
        stored = [p for p in new if self.stored is not None and p in self.stored]
        new = list(dict.fromkeys([*stored, *new]))
        chunks = [self.read(stored)] if stored else []
        if unread := new[len(stored) :]:
            with self.encoding():
                chunks += [self.placed(self.encode([prompt])) for prompt in unread]
        self._encoded = Conditioning.cat([*([self._encoded] if self._encoded else []), *chunks])
        self._finished = self.finish(self._encoded)
        for prompt in new:
            self._index[prompt] = len(self._index)

    def read(self, prompts: list[str]) -> Conditioning:
        """The rows of stored prompts."""
        assert self.stored is not None
        return self.placed(self.stored.read(prompts))

    def placed(self, rows: Conditioning) -> Conditioning:
        """Rows in this table's precision, on its device."""
        return Conditioning(
            {k: v.to(self.device, self.dtype if v.is_floating_point() else v.dtype) for k, v in rows.items()}
        )
