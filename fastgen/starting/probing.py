"""What an objective is seen to do: the samplers that it accepts, and the networks that its turns call.

It is run with the smallest teachers that there are, a mixture of points or videos of points, and without weights."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from pydantic import ValidationError

from fastgen.config.sections import SECTIONS, build_rewards
from fastgen.denoiser import Denoiser
from fastgen.modules.experts import Experts
from fastgen.networks import Networks
from fastgen.objectives.base import Objective
from fastgen.planning.plan import DRAWS, StandInScorer, evaluations, prompt_rows
from fastgen.policy import InnerFlow, RolloutPolicy, SegmentFlow
from fastgen.recipe import EvalConfig, Recipe, TrainConfig
from fastgen.registry import build_section
from fastgen.run.build import RunNetworks, build_backbone, build_networks
from fastgen.streaming.schedule import ChunkSchedule

LEVELS = (1.0, 0.75, 0.5, 0.25)
STEPWISE = {
    "renoise": RolloutPolicy(LEVELS),
    "ode": RolloutPolicy(LEVELS, "ode"),
    "cps": RolloutPolicy(LEVELS, "cps", eta=0.9),
    "tcd": RolloutPolicy(LEVELS, "tcd", eta=0.3),
}
JUMPS = RolloutPolicy(LEVELS, "ode", two_time=True)
ONE_STEP = (RolloutPolicy((1.0,)), RolloutPolicy((1.0,), "ode", two_time=True))
INNER = InnerFlow(blocks=1)
SEGMENT = SegmentFlow(size=2, substeps=2)
CHUNKS = RolloutPolicy(LEVELS, chunks=ChunkSchedule(frames=1))
JUMPING_CHUNKS = dataclasses.replace(JUMPS, chunks=CHUNKS.chunks)
FEATURES = "features"  # stands in for the teacher, where that is a formula and has no features
UPDATES = 1_000_000  # of the planned run, whose last update comes after every warm-up
GUIDANCE = 4.0  # with which the teacher is called twice

POINTS = {
    "name": "gaussian_mixture",
    "means": [[-1.0, 0.0], [1.0, 0.0]],
    "stds": [0.2, 0.2],
    "width": 8,
    "fit_steps": 1,
}
VIDEOS = {"name": "ar1_video", "damping": 0.9, "angles": [0.5], "means": [1.0], "num_frames": 4}
REWARD = {"name": "linear", "direction": [1.0, 0.0]}


def fitting(objective: Objective, policy: RolloutPolicy) -> RolloutPolicy:
    """The policy; with an inner flow or a segment flow, where the objective trains no other students and the policy
    can have one."""
    plain = policy.chunks is None and not policy.inputs
    if objective.needs_inner and plain:
        return dataclasses.replace(policy, inner=INNER)
    if objective.takes_segment and plain and policy.transition == "ode":
        return dataclasses.replace(policy, segment=SEGMENT)
    return policy


def accepts(objective: Objective, policy: RolloutPolicy) -> bool:
    """Whether the objective can train a student that samples with this policy (`fitting`)."""
    policy = fitting(objective, policy)
    if (policy.inputs and not objective.takes_inputs) or (policy.chunks is not None and not objective.takes_chunks):
        return False
    try:
        objective.check(policy)
    except ValueError:
        return False
    return True


def samplers(objective: Objective) -> tuple[str, ...]:
    """The transitions of a student that is not told where its step ends, of a whole sample or of a chunk, and `jumps`
    for one that is; one call for a student that can only have one step."""
    found = []
    for name, policy in STEPWISE.items():
        if any(accepts(objective, dataclasses.replace(policy, chunks=chunks)) for chunks in (None, CHUNKS.chunks)):
            found.append(name)
    return (*found, *(["jumps"] if jumps(objective) else [])) or ("one call",)


def jumps(objective: Objective) -> bool:
    return any(accepts(objective, policy) for policy in (JUMPS, JUMPING_CHUNKS))


def steps(objectives: Sequence[Objective]) -> str:
    """How many steps a student can have, and whether that is decided before it is trained. objectives: instances of
    one class, the usual one first."""
    usual = objectives[0]
    stepwise = any(accepts(usual, policy) for policy in STEPWISE.values())
    if not stepwise and not accepts(usual, CHUNKS) and jumps(usual):
        return "any number"
    if stepwise and usual.learned_levels != ():
        return "any of its levels"
    if not stepwise:
        return "fixed, of a chunk" if accepts(usual, CHUNKS) else "one"
    one_step = any(accepts(objective, policy) for objective in objectives for policy in ONE_STEP)
    return f"fixed, from {1 if one_step else 2}"


@dataclasses.dataclass(frozen=True)
class Probe:
    """An objective with the networks of a run that trains a student of four steps or, where it trains no such, of
    one."""

    objective: Objective

    @cached_property
    def policy(self) -> RolloutPolicy:
        every = (*STEPWISE.values(), JUMPS, CHUNKS, JUMPING_CHUNKS, *ONE_STEP)
        return next(fitting(self.objective, policy) for policy in every if accepts(self.objective, policy))

    @cached_property
    def recipe(self) -> Recipe:
        section = POINTS if self.policy.chunks is None else VIDEOS
        data = {"name": "mixture" if self.policy.chunks is None else "ar1_video"}
        return Recipe(
            output_dir=Path("unused"),
            backbone=build_section("backbone", section, *SECTIONS["backbone"]),
            objective=guided(self.objective),
            rollout=self.policy,
            data=build_section("data", data, *SECTIONS["data"]),
            optimizers={},
            train=TrainConfig(steps=UPDATES, batch_size=max(4, self.objective.group_size)),
            eval=EvalConfig(metrics=("energy_distance",)),
            rewards=build_rewards({"parts": [REWARD]}) if self.objective.reward_use != "none" else None,
        )

    @cached_property
    def built(self) -> RunNetworks:
        return build_networks(self.recipe, build_backbone(self.recipe, torch.device("cpu"), deferred=True))

    @property
    def networks_held(self) -> int:
        """The networks of the teacher's size in a run, with the student's moving average."""
        roles = {role: m for role, m in self.built.modules.items() if role != FEATURES} | {"ema": self.built.average}
        return sum(count(m) for m in roles.values() if isinstance(m, Denoiser))

    @property
    def experts(self) -> int:
        """The networks of the student."""
        return count(self.built.modules["student"])

    @cached_property
    def evaluations(self) -> dict[str, float]:
        """Network evaluations of a sample in an update after every warm-up, by role, with a guided teacher: the mean
        over the draws of the update, as `fastgen plan` counts them."""
        recipe, backbone, objective = self.recipe, self.built.backbone, self.recipe.objective
        scorer = StandInScorer(recipe.rewards, backbone.decode) if recipe.rewards else None
        networks = Networks(self.built.modules, recipe.rollout, scorer)
        prompt, total = prompt_rows(recipe, backbone, ()), dict[str, float]()
        for turn in objective.turns(UPDATES - 1, objective.init_state()):
            for key in range(DRAWS):
                found = evaluations(turn, recipe, backbone, networks, prompt, objective.init_state(), key)
                for called, rows in found.items():
                    role = "teacher" if called == FEATURES else called
                    share = rows * turn.updates / recipe.train.batch_size / DRAWS
                    total[role] = total.get(role, 0.0) + share
        return {role: n for role, n in total.items() if n}


def guided(objective: Objective) -> Objective:
    """The objective with a guided teacher, if it takes one."""
    if "guidance_scale" not in {field.name for field in dataclasses.fields(objective)}:  # type: ignore[arg-type]
        return objective
    try:
        return dataclasses.replace(objective, guidance_scale=GUIDANCE)  # type: ignore[type-var]
    except ValidationError:
        return objective


def count(module: torch.nn.Module) -> int:
    return len(module.experts) if isinstance(module, Experts) else 1
