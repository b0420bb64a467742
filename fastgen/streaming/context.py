"""What a causal network remembers of the frames before a chunk: immutable snapshots that share their blocks."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgen.streaming import precision, retention
from fastgen.streaming.block import Block
from fastgen.streaming.linear_state import LinearState
from fastgen.streaming.schedule import ChunkSchedule


@dataclass(frozen=True, eq=False)
class Context:
    """The memory of the frames that the next chunk sees. No forward changes it: `committed` returns a new one.

    chunks: the schedule that decides what is kept.  blocks: what is kept, in order.  frames: how many were committed.
    absorbed: of every layer, the sums over the frames that left the window, with `linear`; None before any did.
    archive: with `recall`, the frames that left the window and can be fetched again; None before any did.
    What is stored has no gradient, unless `Denoiser.commit` was asked for it.
    memo: layer -> what it computes of this context for every step of a chunk alike (`memoised`); None: it is computed
    anew. No other context shares it."""

    chunks: ChunkSchedule
    blocks: tuple[Block, ...] = ()
    frames: int = 0
    absorbed: LinearState | None = None
    archive: Block | None = None
    memo: dict[int | str, Any] | None = dataclasses.field(default=None, init=False, repr=False)

    @property
    def chunk(self) -> range:
        """The frames of the next chunk."""
        return self.chunks.chunk_at(self.frames)

    def called(self, frames: int) -> range:
        """The frames of a call of the network with so many frames: those of the next chunk or, with `order: rolling`,
        of all chunks in the making. Raises ValueError if they are no such number."""
        chunk = self.chunk
        most = self.chunks.following(chunk.start, 1 + frames // self.chunks.frames)
        ends = [part.stop for part in (most if self.chunks.order == "rolling" else (chunk,))]
        if chunk.start + frames not in ends:
            raise ValueError(f"the next chunk has {len(chunk)} frames, frames {chunk}, and x has {frames}")
        return range(chunk.start, chunk.start + frames)

    @property
    def stored(self) -> tuple[Block, ...]:
        """All blocks: those that the next chunk sees, and the archive."""
        return self.blocks if self.archive is None else (*self.blocks, self.archive)

    @property
    def nbytes(self) -> int:
        """The size of what is kept, in bytes. Snapshots that share blocks share this memory."""
        tensors = [t for block in self.stored for t in (block.keys, block.values)]
        return sum(t.numel() * t.element_size() for t in (*tensors, *(self.absorbed or ())))

    def memoised(self) -> "Context":
        """The same context for the steps of one chunk without gradient. What layers compute of it once is freed with
        it."""
        twin = dataclasses.replace(self)
        object.__setattr__(twin, "memo", {})
        return twin

    def recalled(self, views: Tensor, frames: int) -> "Context":
        """What the next `frames` frames see, with those that they recall of the archive between the sink and the rest.

        views: [B, F, D], where the frames of the video are seen from, of these and of all before them."""
        if self.archive is None:
            return self
        if self.memo is not None and "recalled" in self.memo and not torch.is_grad_enabled():
            return self.memo["recalled"]
        archive, sink, count = self.archive, self.chunks.sink, self.chunks.recall
        rows = retention.nearest(views, archive.frames, self.called(frames), count)
        found = retention.picked(archive, rows, sink)
        stay = [block for block in self.blocks if block.frames.stop <= sink]
        twin = dataclasses.replace(self, blocks=(*stay, found, *self.blocks[len(stay) :]))
        object.__setattr__(twin, "memo", self.memo)
        if self.memo is not None and not torch.is_grad_enabled():
            self.memo["recalled"] = twin
        return twin

    def past(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values [B, tokens, heads, D] of all visible frames, in order, in the dtype of the newest ones: an
        averaged sink is kept in a wider one. None if there are none."""
        if not self.blocks:
            return None

        def read(kept: Sequence[Tensor]) -> Tensor:
            parts = [precision.unpack(block[layer]) for block in kept]
            return torch.cat([part.to(parts[-1].dtype) for part in parts], dim=1)

        return read([block.keys for block in self.blocks]), read([block.values for block in self.blocks])

    def committed(self, memory: Sequence[tuple[Tensor, Tensor]], passes: int = 1) -> "Context":
        """The context after the next chunk. memory: the chunk's keys and values, [B, tokens, heads, D], per layer.
        passes: how many passes over a video these layers are of, see `layers`.

        What the chunk after it does not see leaves, or goes into what stays of it (`streaming.retention`)."""
        pack = precision.packed_as(self.chunks.cache_dtype)
        keys, values = (torch.stack([pack(pair[i]) for pair in memory]) for i in (0, 1))
        blocks = [*self.blocks, Block(self.chunk, keys, values)]
        following = self.chunks.chunk_at(self.chunk.stop)
        absorbed = self.absorbed
        if self.chunks.linear and (leaving := retention.leaving(self.chunks, blocks, following)) is not None:
            absorbed = leaving if absorbed is None else absorbed + leaving
        archive = retention.archived(self.chunks, self.archive, blocks, following)
        kept = retention.kept(self.chunks, blocks, following, passes)
        return Context(self.chunks, kept, self.chunk.stop, absorbed, archive)

    def select(self, rows: Tensor | slice) -> "Context":
        """The context of some rows of the batch."""
        return self.each(lambda kept: kept[:, rows])

    def each(self, change: Callable[[Tensor], Tensor]) -> "Context":
        """The context with every tensor [layers, B, ...] changed."""
        blocks = tuple(Block(b.frames, change(b.keys), change(b.values)) for b in self.blocks)
        absorbed = self.absorbed and LinearState(*map(change, self.absorbed))
        old = self.archive
        archive = old and Block(old.frames, change(old.keys), change(old.values))
        return dataclasses.replace(self, blocks=blocks, absorbed=absorbed, archive=archive)

    def layers(self, part: int | Tensor, parts: int) -> "Context":
        """One of several contexts of equal depth that are kept together: those of experts (`modules.experts.Experts`)
        or, with `order: step`, of the passes over a video. part: an index, or one for each row of the batch, [B]."""

        def own(kept: Tensor) -> Tensor:
            split = kept.unflatten(0, (parts, -1))
            if not isinstance(part, Tensor):
                return split[part]
            return split[part, :, torch.arange(len(part), device=part.device)].movedim(0, 1)

        return self.each(own)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything but the schedule, as tensors for safetensors."""
        state = {"frames": torch.tensor(self.frames)}
        names = [*map(str, range(len(self.blocks))), "archive"]
        for i, block in zip(names, self.stored, strict=False):
            state[f"{i}.frames"] = torch.tensor([block.frames.start, block.frames.stop])
            state[f"{i}.keys"], state[f"{i}.values"] = block.keys.contiguous(), block.values.contiguous()
        if self.absorbed is not None:
            state |= {f"absorbed.{name}": kept.contiguous() for name, kept in self.absorbed._asdict().items()}
        return state

    @classmethod
    def load(cls, chunks: ChunkSchedule, state: Mapping[str, Tensor]) -> "Context":
        """The inverse of `state_dict`. Raises ValueError if it is not the state of such a context."""
        try:
            names = [name.removesuffix(".values") for name in state if name.endswith(".values")]
            read = {
                i: Block(range(*state[f"{i}.frames"].tolist()), state[f"{i}.keys"], state[f"{i}.values"])
                for i in names
            }
            archive = read.pop("archive", None)
            blocks = tuple(read[str(i)] for i in range(len(read)))
            sums = [state.get(f"absorbed.{name}") for name in LinearState._fields]
            absorbed = None if sums[0] is None or sums[1] is None else LinearState(sums[0], sums[1])
            context = cls(chunks, blocks, int(state["frames"]), absorbed, archive)
        except KeyError as error:
            raise ValueError(f"this is no context of a stream: {error} is missing") from None
        held = [frame for block in blocks for frame in block.frames]
        there = (held, [] if archive is None else [*archive.frames], absorbed is not None)
        past = [frame for frames in chunks.past(context.chunk) for frame in frames]
        summed = chunks.linear and bool(chunks.gone(context.chunk))
        if there != (past, [*chunks.archived(context.chunk)], summed):
            raise ValueError("the stored frames are not those that this schedule keeps; it was saved with another one")
        return context
