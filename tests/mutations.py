"""Damage for the fuzz tests: what a bad disk, a broken copy or a slip of the hand makes of a file."""

import os
import random
import time
from collections.abc import Iterator

SECTOR = 512  # bytes, the least that a disk loses


def draws(seconds: float = 60, seed: int = 0) -> Iterator[random.Random]:
    """A source of random choices, again and again, until this much CPU time has passed. The environment variable
    FUZZ_SECONDS, if it is set, says how much."""
    draw, end = random.Random(seed), time.process_time() + float(os.environ.get("FUZZ_SECONDS", seconds))
    while time.process_time() < end:
        yield draw


def mutated(draw: random.Random, data: bytes, within: int | None = None) -> bytes:
    """The data with one to four changes. Most are changes of a single byte, which are the hardest to notice; others
    lose, repeat or blank a part. within: only the first so many bytes are changed."""
    result = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        size = min(len(result), within or len(result))
        if not size:
            break
        place = draw.randrange(size)
        kind = draw.choices(("byte", "bit", "cut", "lost", "twice", "blank"), (8, 4, 1, 1, 1, 1))[0]
        span = slice(place, place + draw.choice((1, 7, SECTOR)))
        if kind == "byte":
            result[place] = draw.randrange(256)
        elif kind == "bit":
            result[place] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del result[place:]
        elif kind == "lost":
            del result[span]
        elif kind == "twice":
            result[place:place] = result[span]
        else:
            result[span] = bytes(len(result[span]))
    return bytes(result)
