"""A student with fewer blocks than its teacher, which begins with the weights of those that it keeps."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

Kept = Mapping[str, Sequence[int]]  # list of blocks in a network -> the places of those that are kept


class KeptBlocks(nn.ModuleList):
    """Some of the blocks of a list. places: where each of them was in that list."""

    def __init__(self, blocks: Iterable[nn.Module] = (), places: Sequence[int] = ()):
        super().__init__(blocks)
        self.places = tuple(places)


def keep_blocks(network: Any, kept: Kept, settings: Mapping[str, Any], keeps_last: bool) -> None:
    """Removes the blocks that are not kept from a network of diffusers, in place, and enters the new settings into its
    config. Raises ValueError as `check_places` does."""
    for name, places in kept.items():
        blocks = getattr(network, name)
        check_places(name, places, len(blocks), keeps_last)
        setattr(network, name, KeptBlocks([blocks[i] for i in places], places))
    network.register_to_config(**settings)


def check_places(name: str, places: Sequence[int], count: int, keeps_last: bool) -> None:
    """Raises ValueError unless these are places in a list of `count` blocks, in order, and not all of them.
    keeps_last: whether the last block differs from the others, so that the student's last has to be that one."""
    if list(places) != sorted(set(places)) or not 0 <= places[0] <= places[-1] < count:
        raise ValueError(
            f"student_blocks.{name}: give places between 0 and {count - 1}, each once and in order, got {list(places)}"
        )
    if len(places) == count:
        raise ValueError(f"student_blocks.{name}: these are all {count} blocks of the network; leave it out")
    if keeps_last and places[-1] != count - 1:
        raise ValueError(
            f"student_blocks.{name}: the last block of this network differs from the others, so keep block {count - 1}"
        )
