"""The objectives by name. The file of an objective is imported only when a recipe chooses it, or a program names its
class, as in `from fastgen.objectives import DMD2`.

To add one, put a file into this folder and a line into OBJECTIVES in registry.py. A recipe can also name an objective
that lies outside this package, as `name: my_module:MyObjective`."""

from fastgen.objectives.base import Loss, Objective, State, Turn
from fastgen.registry import OBJECTIVES, imported


def __getattr__(name: str) -> type[Objective]:
    """The class of this name."""
    for path in OBJECTIVES.values():
        if path.partition(":")[2] == name:
            return imported(path)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["OBJECTIVES", "Loss", "Objective", "State", "Turn"]
