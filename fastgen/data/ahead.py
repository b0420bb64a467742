"""Batches in the order of a run, the next of which are read and encoded while the networks work on the present one."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from fastgen.batch import Batch


class Ahead:
    """Batches by the position of their first sample. What `make` gives depends on the position alone, so a batch has
    the same bits whether it was made ahead or when it was asked for, and a run that is continued sees the same ones.

    One thread makes all batches, one after another: sources may be read in order, and text encoders and VAEs are
    called by one batch at a time. An error in making a batch is raised where that batch is asked for.

    make: position -> batch. stride: the distance of two batches. count: how many are made ahead; 0: none, and those
    that are asked for are made in the caller's thread."""

    def __init__(self, make: Callable[[int], Batch], stride: int, count: int):
        self._make, self._stride, self._count = make, stride, count
        self._made = dict[int, Future[Batch]]()
        self._thread = ThreadPoolExecutor(1, "batches") if count else None

    def batch(self, first: int, keep: int) -> Batch:
        """The batch whose samples begin at `first`. Those that begin before `keep` will not be asked for again."""
        if self._thread is None:
            return self._make(first)
        for position in [p for p in self._made if p < keep]:
            self._made.pop(position).cancel()
        for position in range(first, first + (self._count + 1) * self._stride, self._stride):
            if position not in self._made:
                self._made[position] = self._thread.submit(self._make, position)
        return self._made[first].result()

    def close(self) -> None:
        """Ends the thread once the batch that it is making is complete."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
