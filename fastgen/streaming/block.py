"""Keys and values of some frames, as a context keeps them."""

from typing import NamedTuple

from torch import Tensor


class Block(NamedTuple):
    """Keys and values of some consecutive frames, [layers, B, frames x tokens, heads, D]. Keys are normalised but not
    rotated: their position is decided anew for each chunk."""

    frames: range
    keys: Tensor
    values: Tensor

    def part(self, frames: range) -> "Block | None":
        """The block of those of its frames that are in the given range, sharing its memory; None if there are none."""
        first, last = max(self.frames.start, frames.start), min(self.frames.stop, frames.stop)
        if first >= last:
            return None
        tokens = self.keys.shape[2] // len(self.frames)
        begin, count = (first - self.frames.start) * tokens, (last - first) * tokens
        return Block(range(first, last), self.keys.narrow(2, begin, count), self.values.narrow(2, begin, count))

    def cut(self, frames: range) -> "Block | None":
        """As `part`, but a part that is not the whole block has memory of its own, so that the rest can be freed."""
        part = self.part(frames)
        if part is None or part.frames == self.frames:
            return part
        return Block(part.frames, part.keys.clone(), part.values.clone())
