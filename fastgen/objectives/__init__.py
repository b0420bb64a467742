"""The objectives by name. The file of an objective is imported only when a recipe chooses it, or a program names its
class, as in `from fastgen.objectives import DMD2`.

To add one, put a file into this folder and a line into OBJECTIVES. A recipe can also name an objective that lies
outside this package, as `name: my_module:MyObjective`."""

import importlib

from fastgen.objectives.base import Loss, Objective, State, Turn

OBJECTIVES: dict[str, str] = {
    "adm": "fastgen.objectives.adm:ADM",
    "adp": "fastgen.objectives.adp:ADP",
    "dmd2": "fastgen.objectives.dmd2:DMD2",
    "f_distill": "fastgen.objectives.f_distill:FDistill",
    "re_dmd": "fastgen.objectives.re_dmd:ReDMD",
    "sc_dmd": "fastgen.objectives.sc_dmd:SCDMD",
    "disback": "fastgen.objectives.disback:DisBack",
    "gndm": "fastgen.objectives.gndm:GNDM",
    "rtdmd": "fastgen.objectives.rtdmd:RTDMD",
    "crd": "fastgen.objectives.crd:CRD",
    "phased_dmd": "fastgen.objectives.phased_dmd:PhasedDMD",
    "ode_regression": "fastgen.objectives.ode_regression:ODERegression",
    "flow_map": "fastgen.objectives.flow_map:FlowMap",
    "mean_flow": "fastgen.objectives.mean_flow:MeanFlow",
    "consistency": "fastgen.objectives.consistency:Consistency",
    "scm": "fastgen.objectives.scm:SCM",
    "teacher_forcing": "fastgen.objectives.teacher_forcing:TeacherForcing",
}


def __getattr__(name: str) -> type[Objective]:
    """The class of this name."""
    for path in OBJECTIVES.values():
        module, _, attribute = path.partition(":")
        if attribute == name:
            return vars(importlib.import_module(module))[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["OBJECTIVES", "Loss", "Objective", "State", "Turn"]
