"""The geometry of a streamed video: which frames form a chunk, and which earlier frames a chunk sees.

Frames are latent frames, counted from 0. Everything here is a Python integer and is decided once per chunk, so that no
network call has to read a counter from a device. Training and sampling read the same object."""

import itertools
from collections.abc import Iterator
from typing import Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

MOST_FRAMES = 1 << 16  # of a chunk, a window and a sink


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ChunkAttention:
    """How self-attention over the visible past and the own chunk is computed (`ops.block_sparse_attention`).

    backend: as in `attention`. auto takes the sparse kernels where they are faster than dense attention.
    layout: dense, or top_k, which keeps for each tile of queries the tiles of keys with the largest product of means.
    density: for top_k, the share of the visible tiles that is kept. The sink, the last frames before the chunk and the
    chunk itself are always kept and count towards it; a first chunk is dense.
    tile: the largest number of tokens in a tile."""

    backend: Literal["auto", "triton", "flex_attention", "sdpa", "naive"] = "auto"
    layout: Literal["dense", "top_k"] = "dense"
    density: float | None = Field(default=None, gt=0, le=1)
    tile: Literal[16, 32, 64, 128] = 64

    @model_validator(mode="after")
    def _density(self) -> "ChunkAttention":
        if (self.density is not None) != (self.layout == "top_k"):
            raise ValueError(
                "layout: top_k needs a density, such as 0.25, and layout: dense takes none; got "
                f"layout: {self.layout} and density: {self.density}"
            )
        return self


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ChunkSchedule:
    """How a causal student makes a video: chunk by chunk, each one from noise, given the clean frames before it.

    A chunk that ends before frame e sees itself, the frames from e - (W - S) on, and the first S frames.

    frames: of a chunk.  first: of the first chunk; None: as many.
    window: W, the number of frames that a chunk sees: sink, slow memory, past and itself. None: the whole past.
    sink: S, the number of first frames that stay visible for ever. Without a window, the past includes them.
    sink_decay: a. When a chunk leaves the window, sink <- a sink + (1 - a) chunk, keys and values token by token
        (Reward Forcing's EMA sink, arXiv 2512.04678). 1 is a frozen sink; 0 is a plain window of the same W.
    slow: L, the number of frames of a slow memory between the sink and the last frames (Context Forcing, arXiv
        2602.06028, whose abstract names it; the rule is ours, `streaming.retention.renewed`). The first L frames that
        leave fill it. Later ones take the place of its oldest, if they are new to it.
    slow_similarity: c. A frame is new if the cosine between its keys and those of the newest frame in the slow memory
        is below c. 1 takes every frame, which is a plain window of the same W; -1 takes none, which is a longer sink.
    recall: R, the number of earlier frames that a chunk fetches from an archive of those that left: the ones that were
        seen from nearest to where the chunk is seen from (`streaming.retention.nearest`; after Matrix-Game 3, arXiv
        2604.08995). They stand between the sink and the last frames, in order, and count towards W. It needs a network
        that is told actions (`backbone.actions`).
    archive: how many of the frames that left are kept for it; the oldest go.
    linear: whether the frames that leave the window are summed into a state of one size, which later chunks read by
        linear attention (`streaming.linear_state`; Hybrid Forcing's memory). What is read is added to the output of
        each self-attention, through a projection that starts at zero and is trained and exported with the student.
    positions: relative counts the visible frames from 0 in every chunk, which is exact at any length: without a sink,
        it equals absolute positions, because rotary attention depends on differences only. absolute keeps the sink at
        the position that it had, ever farther away.
    context_noise: the level to which finished frames are renoised before later chunks see them. It is the same in
        training and in sampling.
    order: chunk finishes a chunk before the next one begins, which sees it clean. With step, a chunk sees the earlier
        ones at the level that its own step goes to: every step is a pass over the video with a context of its own, and
        the last pass sees clean frames (HiAR, https://github.com/Jacky-hate/HiAR). With rolling, as many chunks as
        there are steps are in the making, each one step behind the one before it, and one call of the network sees
        and moves them all (`rollout.rolling`; Rolling Forcing, arXiv 2509.25161). One step is the same in all.
    cache_dtype: int8 keeps what finished frames leave behind in 8 bits, with a scale for each token and head
        (`streaming.precision`), in training and in sampling. None: as it was computed. An averaged sink is kept in at
        least float32.
    first_timesteps: the first chunk's own list of levels, usually a longer one (ASD's first-frame enhancement).
    replay: whether training holds the graph of one chunk at a time. The gradient is the same; the student's last step
        and the commits are computed twice. Not for sharded networks.
    attention: see `ChunkAttention`."""

    frames: int = Field(default=3, ge=1, le=MOST_FRAMES)
    first: int | None = Field(default=None, ge=1, le=MOST_FRAMES)
    window: int | None = Field(default=None, ge=1, le=MOST_FRAMES)
    sink: int = Field(default=0, ge=0, le=MOST_FRAMES)
    sink_decay: float | None = Field(default=None, ge=0, le=1)
    slow: int = Field(default=0, ge=0, le=MOST_FRAMES)
    slow_similarity: float = Field(default=0.95, ge=-1, le=1)
    recall: int = Field(default=0, ge=0, le=MOST_FRAMES)
    archive: int = Field(default=256, ge=1, le=MOST_FRAMES)
    linear: bool = False
    positions: Literal["relative", "absolute"] = "relative"
    context_noise: float = Field(default=0.0, ge=0, lt=1)
    cache_dtype: Literal["int8"] | None = None
    order: Literal["chunk", "step", "rolling"] = "chunk"
    first_timesteps: tuple[float, ...] | None = Field(default=None, min_length=1)
    replay: bool = False
    attention: ChunkAttention = ChunkAttention()

    @model_validator(mode="after")
    def _window(self) -> "ChunkSchedule":
        largest = max(self.frames, self.first or 0)
        least = self.sink + self.slow + self.recall + largest
        if self.window is not None and self.window < least:
            memory = f", a slow memory of {self.slow}" if self.slow else ""
            memory += f", {self.recall} recalled" if self.recall else ""
            raise ValueError(
                f"window: {self.window} frames cannot hold a sink of {self.sink}{memory} and a chunk of {largest}; "
                f"set window to at least {least}"
            )
        return self

    @model_validator(mode="after")
    def _slow(self) -> "ChunkSchedule":
        if self.slow and self.window is None:
            raise ValueError("slow keeps some of what leaves the window, and there is none: give a window")
        if self.slow and (self.sink_decay is not None or self.positions == "absolute"):
            raise ValueError(
                "slow keeps frames that differ from sample to sample, at positions relative to the chunk: leave out "
                "sink_decay, and positions: absolute"
            )
        return self

    @model_validator(mode="after")
    def _recall(self) -> "ChunkSchedule":
        if not self.recall:
            return self
        if self.window is None:
            raise ValueError("recall fetches some of what left the window, and there is none: give a window")
        if self.sink_decay is not None or self.positions == "absolute":
            raise ValueError(
                "recall fetches frames that differ from sample to sample, at positions relative to the chunk: leave "
                "out sink_decay, and positions: absolute"
            )
        if self.order != "chunk":
            raise ValueError(f"recall is for one chunk at a time: set order: chunk, and not {self.order}")
        if self.archive < self.recall:
            raise ValueError(f"an archive of {self.archive} frames cannot give {self.recall}: give archive more")
        return self

    @model_validator(mode="after")
    def _linear(self) -> "ChunkSchedule":
        if self.linear and self.window is None:
            raise ValueError("linear sums what leaves the window, and there is none: give a window")
        if (self.slow > 0) + (self.recall > 0) + (self.sink_decay is not None) + self.linear > 1:
            raise ValueError(
                "what leaves the window has one place to go: give one of linear, slow, recall and sink_decay"
            )
        return self

    @model_validator(mode="after")
    def _order(self) -> "ChunkSchedule":
        if self.order != "chunk" and self.first_timesteps is not None:
            raise ValueError(
                f"with order: {self.order} several chunks are in the making at once, and all have the same levels: "
                "leave out first_timesteps, or set order: chunk"
            )
        if self.order == "rolling" and self.replay:
            raise ValueError("order: rolling makes several chunks in one call, which replay cannot take apart")
        return self

    @model_validator(mode="after")
    def _sink(self) -> "ChunkSchedule":
        if self.sink_decay is None:
            return self
        if self.window is None:
            raise ValueError("sink_decay averages what leaves the window, and there is none: give a window")
        if not self.sink == self.frames == (self.first or self.frames) or self.window % self.frames:
            raise ValueError(
                "sink_decay averages a chunk into the sink, token by token: it needs sink = frames = first, and a "
                f"window that is a multiple of them; got sink {self.sink}, frames {self.frames}, first "
                f"{self.first or self.frames}, window {self.window}"
            )
        return self

    def check_recache(self) -> None:
        """Raises ValueError if what a context holds cannot be computed again from the frames that are still there."""
        kinds = {
            "an averaged sink (chunks.sink_decay)": self.sink_decay is not None,
            "a slow memory (chunks.slow)": self.slow > 0,
            "an archive (chunks.recall)": self.recall > 0,
            "a linear memory (chunks.linear)": self.linear,
        }
        for what, there in kinds.items():
            if there:
                raise ValueError(
                    f"{what} is made of frames that are gone, so it cannot be computed again with "
                    "another prompt; change the prompt without recache"
                )

    def check_mask(self, num_frames: int) -> None:
        """Raises ValueError if no mask over a whole video of this length shows each chunk what it sees: for a schedule
        whose sink or slow memory changes or, in relative positions, moves, and for one that keeps its past in another
        form."""
        stays = self.sink + self.slow + self.recall > 0 and self.evicts(num_frames)
        if stays and (self.sink_decay is not None or self.positions == "relative"):
            raise ValueError(
                f"{num_frames} frames are more than the window of {self.window}, and then what stays of this schedule "
                "moves or changes from chunk to chunk, which no mask expresses; go chunk by chunk"
            )
        if self.cache_dtype is not None:
            raise ValueError("a mask over whole videos keeps nothing in 8 bits; go chunk by chunk")
        if self.linear and self.evicts(num_frames):
            raise ValueError("a mask over whole videos has no linear memory; go chunk by chunk")
        if self.attention.layout != "dense":
            raise ValueError("a mask over whole videos is dense, and chunks.attention is top_k; go chunk by chunk")

    def chunk_at(self, start: int) -> range:
        """The frames of the chunk that begins at frame `start`. A stream has no end, so any chunk exists."""
        return range(start, start + (self.frames if start else self.first or self.frames))

    def following(self, start: int, count: int) -> tuple[range, ...]:
        """The next chunks after the first `start` frames."""
        found = list[range]()
        for _ in range(count):
            found.append(self.chunk_at(found[-1].stop if found else start))
        return tuple(found)

    def chunks(self) -> Iterator[range]:
        """All chunks, without end."""
        start = 0
        while True:
            yield self.chunk_at(start)
            start = self.chunk_at(start).stop

    def split(self, num_frames: int) -> tuple[range, ...]:
        """The chunks of a video. Raises ValueError, with the nearest lengths, if it does not end with a chunk."""
        chunks = tuple(itertools.takewhile(lambda chunk: chunk.start < num_frames, self.chunks()))
        if not chunks or chunks[-1].stop != num_frames:
            below, above = (chunks[-1].start, chunks[-1].stop) if chunks else (0, self.chunk_at(0).stop)
            near = f"{below} or {above}" if below else str(above)
            raise ValueError(
                f"{num_frames} latent frames do not divide into a first chunk of {self.first or self.frames} and "
                f"chunks of {self.frames}; the nearest lengths are {near}"
            )
        return chunks

    def past(self, chunk: range) -> tuple[range, ...]:
        """The earlier frames that a chunk sees, in order: those that stay and the window, or one range if they touch.
        The slow memory goes by the numbers of the frames that filled it first."""
        gone = self.gone(chunk)
        parts = (range(gone.start), range(gone.stop, chunk.start)) if gone else (range(chunk.start),)
        return tuple(frames for frames in parts if frames)

    def gone(self, chunk: range) -> range:
        """The earlier frames that a chunk does not see, or sees only if it recalls them."""
        if self.window is None:
            return range(0)
        old = min(self.sink + self.slow, chunk.start)
        return range(old, max(chunk.stop - (self.window - self.sink - self.slow - self.recall), old))

    def archived(self, chunk: range) -> range:
        """The frames that a chunk can recall."""
        gone = self.gone(chunk) if self.recall else range(0)
        return gone[max(0, len(gone) - self.archive) :]

    def after(self, start: int, num_frames: int) -> tuple[range, ...]:
        """The chunks of the next `num_frames` frames after the first `start`. Raises ValueError as `split` does."""
        if not start:
            return self.split(num_frames)
        rest = ChunkSchedule(frames=self.frames).split(num_frames)
        return tuple(range(start + chunk.start, start + chunk.stop) for chunk in rest)

    def held(self, start: int) -> tuple[range, ...]:
        """The frames that a context holds after `start` frames, in order and chunk by chunk."""
        chunks = itertools.takewhile(lambda chunk: chunk.start < start, self.chunks())
        past, every = self.past(self.chunk_at(start)), tuple(chunks)
        parts = (range(max(c.start, p.start), min(c.stop, p.stop)) for p in past for c in every)
        return tuple(part for part in parts if part)

    def evicts(self, num_frames: int) -> bool:
        """Whether a video of this length is longer than the window."""
        return self.window is not None and num_frames > self.window

    def positions_of(self, chunk: range, past: tuple[range, ...] | None = None) -> tuple[tuple[range, ...], range]:
        """The temporal positions of the earlier frames that are seen, and of the chunk itself. past: these frames, by
        default `past(chunk)`."""
        past = self.past(chunk) if past is None else past
        if self.positions == "absolute":
            return past, chunk
        ends = list(itertools.accumulate((len(frames) for frames in past), initial=0))
        return tuple(itertools.starmap(range, itertools.pairwise(ends))), range(ends[-1], ends[-1] + len(chunk))
