"""The objectives by name.

To add one, put a file into this folder and a line into OBJECTIVES. A recipe can also name an objective that lies
outside this package, as `name: my_module:MyObjective`."""

from fastgen.objectives.adm import ADM
from fastgen.objectives.adp import ADP
from fastgen.objectives.base import Loss, Objective, State, Turn
from fastgen.objectives.consistency import Consistency
from fastgen.objectives.crd import CRD
from fastgen.objectives.disback import DisBack
from fastgen.objectives.dmd2 import DMD2
from fastgen.objectives.f_distill import FDistill
from fastgen.objectives.flow_map import FlowMap
from fastgen.objectives.gndm import GNDM
from fastgen.objectives.mean_flow import MeanFlow
from fastgen.objectives.ode_regression import ODERegression
from fastgen.objectives.phased_dmd import PhasedDMD
from fastgen.objectives.re_dmd import ReDMD
from fastgen.objectives.rtdmd import RTDMD
from fastgen.objectives.sc_dmd import SCDMD
from fastgen.objectives.scm import SCM
from fastgen.objectives.teacher_forcing import TeacherForcing

OBJECTIVES: dict[str, type[Objective]] = {
    "adm": ADM,
    "adp": ADP,
    "dmd2": DMD2,
    "f_distill": FDistill,
    "re_dmd": ReDMD,
    "sc_dmd": SCDMD,
    "disback": DisBack,
    "gndm": GNDM,
    "rtdmd": RTDMD,
    "crd": CRD,
    "phased_dmd": PhasedDMD,
    "ode_regression": ODERegression,
    "flow_map": FlowMap,
    "mean_flow": MeanFlow,
    "consistency": Consistency,
    "scm": SCM,
    "teacher_forcing": TeacherForcing,
}

__all__ = [
    "ADM",
    "ADP",
    "CRD",
    "DMD2",
    "GNDM",
    "OBJECTIVES",
    "RTDMD",
    "SCDMD",
    "SCM",
    "Consistency",
    "DisBack",
    "FDistill",
    "FlowMap",
    "Loss",
    "MeanFlow",
    "ODERegression",
    "Objective",
    "PhasedDMD",
    "ReDMD",
    "State",
    "TeacherForcing",
    "Turn",
]
