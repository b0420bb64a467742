"""Objectives by name. A new one is a file beside this and a line here, or out of tree: `name:
my_module:MyObjective`."""

from fastgen.objectives.base import Loss, Objective, State, Turn
from fastgen.objectives.dmd2 import DMD2

OBJECTIVES: dict[str, type[Objective]] = {"dmd2": DMD2}

__all__ = ["DMD2", "OBJECTIVES", "Loss", "Objective", "State", "Turn"]
