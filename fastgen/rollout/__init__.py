"""How a few-step student turns noise into samples, whole or chunk by chunk.

steps.py       one step: the clean prediction, and the laws of the transitions
passes.py      what chunks see of those before them, and leave for those after them
simulation.py  the loops over steps and chunks, for sampling and for training
rolling.py     several chunks in the making at once
data.py        one step from noised data, in the place of a simulated input"""

from fastgen.policy import RolloutPolicy, TeacherPolicy
from fastgen.rollout.data import step_from_data
from fastgen.rollout.passes import commit, recommitted
from fastgen.rollout.simulation import (
    backward_simulation,
    draw_stops,
    sample,
    sample_chunks,
    trajectory,
)
from fastgen.rollout.steps import (
    Rollout,
    Step,
    jump_law,
    network_inputs,
    next_levels,
    policy_law,
    predict_x0,
    step_log_prob,
    step_to,
    transition,
    transition_law,
)

__all__ = [
    "Rollout",
    "RolloutPolicy",
    "Step",
    "TeacherPolicy",
    "backward_simulation",
    "commit",
    "draw_stops",
    "jump_law",
    "network_inputs",
    "next_levels",
    "policy_law",
    "predict_x0",
    "recommitted",
    "sample",
    "sample_chunks",
    "step_from_data",
    "step_log_prob",
    "step_to",
    "trajectory",
    "transition",
    "transition_law",
]
