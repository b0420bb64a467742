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

    def alone(self) -> "Block":
        """The same block, in memory of its own where it shares that of frames beside it, so that they can be freed."""
        if self.keys.untyped_storage().nbytes() == self.keys.nbytes:
            return self
        return Block(self.frames, self.keys.clone(), self.values.clone())
