"""The part of a data set whose prompts belong to one of several students."""

from itertools import count

import torch
from torch import Tensor

from fastgen.batch import Conditioning
from fastgen.data.base import DataError, Stream
from fastgen.pipelines.router import Part

BLOCK = 256  # positions that are looked at together
LONGEST_SEARCH = 1 << 18  # positions without a prompt of the part after which the search for one ends


class PartStream(Stream):
    """The positions of another stream whose prompts belong to a part, counted 0, 1, 2, ... in their order.

    So the sample at a position still depends on the seed and the position alone. Of the others, only the prompts are
    looked up. A stream of pictures of several sizes cannot be divided, because an update would mix them. Raises
    DataError if no prompt is of the part, and for one that the router does not know."""

    def __init__(self, stream: Stream, part: Part):
        self._stream, self._part = stream, part
        self._kept, self._seen = list[int](), 0

    def inner(self, positions: Tensor) -> Tensor:
        """The positions in the other stream, [B] int64."""
        wanted = int(positions.max())
        while len(self._kept) <= wanted:
            self._look_further()
        return torch.tensor([self._kept[p] for p in positions.tolist()], dtype=torch.int64)

    def _look_further(self) -> None:
        """Looks at blocks of positions until one has prompts of the part."""
        began = self._seen
        for first in count(began, BLOCK):
            if first - began >= LONGEST_SEARCH:
                raise DataError(
                    f"none of {LONGEST_SEARCH} prompts belongs to student {self._part.index} of "
                    f"{self._part.num_parts}; change part: or the data"
                )
            block = range(first, first + BLOCK)
            prompts = self._stream.prompts(torch.tensor(block))
            try:
                found = [p for p, prompt in zip(block, prompts, strict=True) if self._part.has(prompt)]
            except ValueError as error:
                raise DataError(f"part: {error}") from None
            self._kept += found
            self._seen = block.stop
            if found:
                return

    def prompts(self, positions: Tensor) -> list[str]:
        return self._stream.prompts(self.inner(positions))

    def images(self, positions: Tensor) -> Conditioning | None:
        return self._stream.images(self.inner(positions))

    def latents(self, positions: Tensor) -> Tensor | None:
        return self._stream.latents(self.inner(positions))

    def pixels(self, positions: Tensor) -> Tensor | None:
        return self._stream.pixels(self.inner(positions))

    def pairs(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        return self._stream.pairs(self.inner(positions))
