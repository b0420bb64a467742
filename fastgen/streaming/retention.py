"""What stays of the frames that leave the window of a context."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen.streaming.block import Block
from fastgen.streaming.linear_state import LinearState, linear_state
from fastgen.streaming.precision import unpack
from fastgen.streaming.schedule import ChunkSchedule


def kept(chunks: ChunkSchedule, blocks: Sequence[Block], following: range, passes: int = 1) -> tuple[Block, ...]:
    """The blocks that the following chunk sees, in order, of those that there are.

    A frame that leaves goes into the averaged sink or the slow memory, if the schedule has one. passes: how many
    contexts are kept together, as layers of one (`Context.layers`)."""
    ranges, gone = chunks.past(following), chunks.gone(following)
    if chunks.sink_decay is not None:
        sink, *rest = blocks
        for block in rest:
            if all(block.part(frames) is None for frames in ranges):
                sink = averaged(sink, block, chunks.sink_decay)
        blocks = [sink, *rest]
    if chunks.slow and gone:
        blocks = absorbed(chunks, blocks, gone, passes)
    parts = [block.cut(frames) for frames in ranges for block in blocks]
    return tuple(part for part in parts if part is not None)


def leaving(chunks: ChunkSchedule, blocks: Sequence[Block], following: range) -> LinearState | None:
    """The sums over the frames that the following chunk no longer sees, [layers, B, ...]; None if there are none."""
    gone = joined(blocks, chunks.gone(following))
    if gone is None:
        return None
    keys, values = (unpack(kept) for kept in (gone.keys, gone.values))
    state = linear_state(keys.flatten(0, 1), values.flatten(0, 1))
    return LinearState(*(kept.unflatten(0, keys.shape[:2]) for kept in state))


def averaged(sink: Block, chunk: Block, decay: float) -> Block:
    """decay sink + (1 - decay) chunk, in the sink's place, in at least float32. 1 and 0 are exact. In fewer bits,
    changes as small as those of a decay near 1 would be rounded away."""

    def mean(sink: Tensor, chunk: Tensor) -> Tensor:
        a, b = unpack(sink), unpack(chunk)
        wide = torch.promote_types(a.dtype, torch.float32)
        return decay * a.to(wide) + (1 - decay) * b.to(wide)

    return Block(sink.frames, mean(sink.keys, chunk.keys), mean(sink.values, chunk.values))


def absorbed(chunks: ChunkSchedule, blocks: Sequence[Block], gone: range, passes: int) -> list[Block]:
    """The blocks [sink, slow memory, window], where the frames in `gone` have been offered to the slow memory."""
    parts = (range(chunks.sink), range(chunks.sink, gone.start), gone)
    sink, slow, left = (joined(blocks, frames) for frames in parts)
    assert slow is not None
    if left is not None:
        for frame in left.frames:
            part = left.part(range(frame, frame + 1))
            assert part is not None
            slow = renewed(slow, part, chunks.slow_similarity, passes)
    rest = (block.cut(range(gone.stop, block.frames.stop)) for block in blocks)
    return [block for block in (sink, slow, *rest) if block is not None]


def joined(blocks: Sequence[Block], frames: range) -> Block | None:
    """One block of those of these frames that there are; None if there are none."""
    parts = [part for block in blocks if (part := block.part(frames)) is not None]
    if not parts:
        return None
    keys, values = (torch.cat(tensors, dim=2) for tensors in ([p.keys for p in parts], [p.values for p in parts]))
    return Block(range(parts[0].frames.start, parts[-1].frames.stop), keys, values)


def renewed(slow: Block, frame: Block, similarity: float, passes: int) -> Block:
    """The slow memory after a frame has left the window, [layers, B, tokens of all frames, heads, D].

    In samples where the frame is new, it becomes the newest of the memory, whose oldest leaves. It is new if the mean
    over layers of cos(keys of the frame, keys of the newest in the memory), each taken as one vector, is below
    `similarity`. Of several passes over a video, each decides for itself. (Ours. Context Forcing, arXiv 2602.06028,
    moves what is surprising from a fast to a slow memory.)"""
    tokens = frame.keys.shape[2]
    newest = unpack(slow.keys[:, :, -tokens:]).flatten(2)
    cosine = torch.cosine_similarity(unpack(frame.keys).flatten(2).float(), newest.float(), dim=2)
    by_pass = cosine.unflatten(0, (passes, -1))  # [passes, layers, B]
    new = (by_pass.mean(1, keepdim=True) < similarity).expand_as(by_pass).flatten(0, 1)[..., None, None, None]

    def shifted(old: Tensor, latest: Tensor) -> Tensor:
        return torch.where(new, torch.cat([old[:, :, tokens:], latest], dim=2), old)

    return Block(slow.frames, shifted(slow.keys, frame.keys), shifted(slow.values, frame.values))


def archived(chunks: ChunkSchedule, archive: Block | None, blocks: Sequence[Block], following: range) -> Block | None:
    """The frames that the following chunk can recall: those of the archive, and those that leave now."""
    parts = [block for block in (archive, *blocks) if block is not None]
    return joined(parts, chunks.archived(following))


def nearest(views: Tensor, frames: range, chunk: range, count: int) -> Tensor:
    """Which of `frames` were seen from nearest to where a chunk is seen from: indices into them, [B, count], in order.

    views: [B, F, D], where each frame of the video is seen from (`streaming.actions`). The distance of a frame is the
    mean of the squared distances of its view to those of the chunk's frames. Of frames at one distance, to 1e-4, the
    latest is the nearest."""
    there, here = views[:, frames.start : frames.stop, None], views[:, None, chunk.start : chunk.stop]
    distance = (there - here).square().sum(-1).mean(-1).round(decimals=4)
    order = distance.flip(1).argsort(dim=1, stable=True)[:, :count]
    return (len(frames) - 1 - order).sort(dim=1).values


def picked(archive: Block, rows: Tensor, first: int) -> Block:
    """The frames of these indices [B, R], which differ from sample to sample, by the numbers from `first` on."""
    samples = torch.arange(len(rows), device=rows.device)[:, None]
    keys, values = (
        kept.unflatten(2, (len(archive.frames), -1))[:, samples, rows].flatten(2, 3)
        for kept in (archive.keys, archive.values)
    )
    return Block(range(first, first + rows.shape[1]), keys, values)
