"""Threads that read and decode pictures and videos."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

READERS = 4  # threads, if a recipe does not say (`train.readers`)

Item = TypeVar("Item")
Value = TypeVar("Value")


class Readers:
    """Several threads that read at the same time. They help because decoders of pictures and videos leave Python to
    other threads while they work."""

    def __init__(self, count: int = READERS):
        self._count, self._threads = count, ThreadPoolExecutor(count, "pictures")

    def each(self, read: Callable[[Item], Value], items: Iterable[Item]) -> Iterator[Value]:
        """read(item) for every item, in order. What is read waits until it is taken: at most two values for each
        thread, so that memory is bounded however many items there are. An error in reading an item is raised in its
        place, and the items after it are then not begun."""
        waiting = deque[Future[Value]]()
        try:
            for item in items:
                waiting.append(self._threads.submit(read, item))
                if len(waiting) == 2 * self._count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
