"""DisBack: distribution backtracking (Zhang et al., arXiv 2408.15991).

    paper          here                          what it is
    G_stu          networks.student              generator
    s_theta        networks.teacher = path[0]    the teacher
    path[i]        networks["path<i>"]           the teacher, degraded by i * path_every updates; i = 1 .. N - 1
    s_phi          networks.fake_score           is path[N] when the student's training starts

Where the student is far from the teacher, the teacher's score carries little information. The teacher is therefore
first degraded until it matches the student, and the student then follows the same path backwards:
    degradation   N * path_every updates. A copy of the teacher is trained to denoise samples of the untrained student,
                  and is stored every path_every updates. The copy is the fake score, so it ends as path[N].
    backtracking  DMD2 with path[N - 1], ..., path[1], path[0] in turn as the real score, for `interval` student
                  updates each. The rest of the run uses the teacher itself.

A degradation update counts as one of train.steps, although the student and its average do not change in it. The path
consists of N - 1 frozen networks (adapters would be smaller, but are not supported). The README of the released code
writes the switch as `idx // interval == 0`; its algorithm uses one target after the other.
"""

import dataclasses
from typing import Literal

from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass
from torch import nn

from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.networks import Networks, move
from fastgen.objectives.base import Loss, State, Turn
from fastgen.objectives.dmd2 import DMD2
from fastgen.recipe import Recipe
from fastgen.registry import MOST_UPDATES
from fastgen.rollout import RolloutPolicy


@dataclasses.dataclass(frozen=True)
class PathTurn(Turn):
    """point: an index on the path. In a degradation turn, it is the point stored after the update (0: none). In a
    student turn, it is the point used as the real score."""

    point: int = 0


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class DisBack(DMD2):
    name: Literal["disback"] = "disback"  # type: ignore[assignment]
    path_length: int = Field(default=5, ge=2, le=1000)  # N; ours
    # degradation updates between two points, the released code. Counts: no row. Its losses are DMD2's, unchanged
    path_every: int = Field(default=100, ge=1, le=MOST_UPDATES)
    interval: int = Field(default=1000, ge=1, le=MOST_UPDATES)  # student updates per target, the released code

    @field_validator("condition_on_stop")
    @classmethod
    def _without_stop(cls, value: bool) -> bool:
        if value:
            raise ValueError(
                "set condition_on_stop to false: points of the path take the teacher's place, and the teacher has no "
                "stop input"
            )
        return value

    def check_recipe(self, recipe: Recipe) -> None:
        super().check_recipe(recipe)
        if recipe.train.steps <= self.degradation:
            raise ValueError(
                f"train.steps is {recipe.train.steps}, but the first {self.degradation} updates, "
                "path_length * path_every, only degrade the teacher; raise train.steps"
            )

    @property
    def full_roles(self) -> tuple[str, ...]:
        return (*super().full_roles, "fake_score")

    @property
    def degradation(self) -> int:
        """The number of updates before the student's first."""
        return self.path_length * self.path_every

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        """Also the path, whose points stand in for the teacher and are in evaluation mode as it is."""
        points = (f"path{i}" for i in range(1, self.path_length))
        path = {point: backbone.load(point).requires_grad_(False).eval() for point in points}
        return super().auxiliary(backbone, policy) | path

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        if step < self.degradation:
            point, remainder = divmod(step + 1, self.path_every)
            return (PathTurn("degrade", self.trained_roles[1:], point=0 if remainder else point),)
        fake_turn, _ = super().turns(step, state)
        return fake_turn, PathTurn("student", ("student",), point=self.target(step - self.degradation))

    def target(self, update: int) -> int:
        """The index on the path of the real score in student update `update` (0-based)."""
        return max(0, self.path_length - 1 - update // self.interval)

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        if isinstance(turn, PathTurn) and turn.name == "student" and turn.point:
            with_target = {**networks, "teacher": networks[f"path{turn.point}"]}
            networks = Networks(with_target, networks.policy, networks.scorer)
        return super().loss(turn, networks, batch, state)

    def finish(self, turn: Turn, networks: Networks, state: State) -> None:
        super().finish(turn, networks, state)
        if isinstance(turn, PathTurn) and turn.name == "degrade" and 0 < turn.point < self.path_length:
            move(networks[f"path{turn.point}"], networks.fake_score, 0.0)
