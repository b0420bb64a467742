"""Salt: SC-DMD with mixed lists of steps and an alignment of features across caches (arXiv 2604.03118; formulas from
its code, github.com/XingtongGe/Salt).

    released code           here                     what it is
    step lists 8, 4, 2      lists, shares            each update trains with one of them
    lambda_scfm             semigroup_weight         weight of the semigroup term of sc_dmd, for the longest list
    mmd_weight, trd_margin  align_weight, margin     weight and margin of the alignment, for the shortest list

What a chunk sees of the chunks before it is as good as the steps that made them: the fewer the steps, the poorer the
cache. A student that is trained with lists of several lengths sees caches of several qualities, and each kind of
update has a term of its own beside DMD2's loss:
    longest list:   + semigroup_weight (1 - t_s) mean |x_e(1) - sg x_e(2)|^2           (sc_dmd.py)
    shortest list:  + align_weight mean max(0, |R(x) - sg R(x_ref)| - margin)          from update align_start on
x is the student's rollout, stopped at any step but the first. x_ref are all steps of the next longer list, on caches
of its own, from the same noise and without gradient. R(x) are the relations of the tokens of a frame, that is, the
cosines between the features that the frozen teacher has of them, at x renoised to a low level. What must agree is the
layout of each frame, not its pixels. The term is 0 where the two rollouts agree (derived).

Departures. The released t_e are every second level of the longest list; here, as in sc_dmd, t_e is one of the two
levels after the next one. Features are those of all depths that the family offers, where the code reads block 20.
Images and videos that are made as a whole have the same terms, without caches.
"""

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.modules.expert_levels import draw_levels
from fastgen.networks import Networks, frozen
from fastgen.objectives.base import Loss, State, Turn, feature_network
from fastgen.objectives.dmd2 import DMD2
from fastgen.objectives.sc_dmd import SCDMD
from fastgen.objectives.step_lists import StepLists, check_lists, drawn_list, levels_of, policies
from fastgen.recipe import Recipe
from fastgen.registry import MOST_UPDATES
from fastgen.rollout import Rollout, RolloutPolicy, backward_simulation
from fastgen.schedule import TimeSampler


@dataclasses.dataclass(frozen=True)
class AlignTurn(Turn):
    """aligns: whether the alignment has begun."""

    aligns: bool = False


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Salt(SCDMD):
    """lists: from many steps to few; rollout.timesteps, with which the student is exported, is one of them.
    shares: how often each is drawn."""

    examples = ({"lists": [[1.0, 0.9, 0.75, 0.6, 0.5, 0.35, 0.25, 0.1], [1.0, 0.75, 0.5, 0.25]]},)
    page = "docs/streaming_methods.md"

    name: Literal["salt"] = "salt"  # type: ignore[assignment]
    lists: StepLists = ()
    shares: tuple[float, ...] | None = None  # None: equal; .4, .4, .2 of 8, 4 and 2 steps in the released configs
    align_weight: float = Field(default=0.1, ge=0)  # of a mean over pairs of tokens: the released configs; 0 is off
    align_start: int = Field(default=700, ge=0, le=MOST_UPDATES)  # updates: the paper; 1000 in the released configs
    margin: float = Field(default=0.1, ge=0, lt=2)  # of a difference of cosines: the released configs
    feature_time: TimeSampler = TimeSampler(low=0.0, high=0.2)  # U{0..200} of 1000: the released configs

    @model_validator(mode="after")
    def _lists(self) -> "Salt":
        if len(self.lists) < 2:
            raise ValueError(
                "lists must have at least two lists of timesteps, from many steps to few, such as "
                "[[1.0, 0.8, 0.6, 0.3], [1.0, 0.6]]; with one list use sc_dmd"
            )
        if self.shares is not None and (
            len(self.shares) != len(self.lists) or min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-6
        ):
            raise ValueError(
                f"shares must give each of the {len(self.lists)} lists a share above 0, and add up to 1; got "
                f"{list(self.shares)}"
            )
        if self.student_input == "data":
            raise ValueError("student_input: data has no caches of the student's own: leave it out")
        return self

    def check(self, policy: RolloutPolicy) -> None:
        check_lists(self, policy)
        longest, *others = policies(policy, self.lists)
        super().check(longest)
        for own in others:
            DMD2.check(self, own)

    def check_recipe(self, recipe: Recipe) -> None:
        super().check_recipe(recipe)
        if self.align_weight and not recipe.backbone.has_features:
            raise ValueError(
                f"objective.align_weight: the networks of backbone {recipe.backbone.name} have no features to align; "
                "set it to 0"
            )

    @property
    def learned_levels(self) -> tuple[float, ...]:
        return levels_of(self.lists)

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        return super().auxiliary(backbone, policy) | (feature_network(backbone) if self.align_weight else {})

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        fake_turn, student_turn = super().turns(step, state)
        aligns = self.align_weight > 0 and step >= self.align_start
        return fake_turn, AlignTurn(student_turn.name, student_turn.roles, aligns=aligns)

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        count = len(self.lists)
        index = drawn_list(batch, self.shares or (1 / count,) * count)
        own = networks.with_policy(policies(networks.policy, self.lists)[index])
        if turn.name != "student" or index == 0:
            return super().loss(turn, own, batch, state)
        rollout = self.rollout(own, batch, grad=True)
        matching = self.matching_loss(own, batch, rollout)
        if index < count - 1 or not (isinstance(turn, AlignTurn) and turn.aligns):
            return matching
        alignment = self.alignment(networks, batch, rollout, self.reference(networks, batch, index - 1))
        total = matching.total + self.align_weight * alignment
        return Loss(total, matching.terms | {"alignment": alignment.detach(), "loss": total.detach()})

    def reference(self, networks: Networks, batch: Batch, index: int) -> Tensor:
        """x_ref: all steps of list `index`."""
        policy = policies(networks.policy, self.lists)[index]
        last = torch.full_like(batch.ids, policy.num_steps - 1)
        whole = dataclasses.replace(batch, shared=None)  # not the shared rollout of a turn
        return backward_simulation(networks.student, policy, whole, last, grad=False).x

    def alignment(self, networks: Networks, batch: Batch, rollout: Rollout, reference: Tensor) -> Tensor:
        """The mean of max(0, |R(x) - sg R(x_ref)| - margin), which counts as 0 for samples whose stop is the first;
        both are renoised with the same draws."""
        t = draw_levels(batch, "feature_time", self.feature_time, networks.critic)
        noise, frames = batch.normal("feature_noise"), rollout.x.shape[1] if rollout.x.dim() == 5 else 1
        found = list[list[Tensor]]()
        with frozen(networks.critic):
            for x in (rollout.x, reference.to(rollout.x)):
                with networks.critic.capture() as features:
                    networks.critic(networks.teacher.schedule.add_noise(x, noise, t), t, batch.cond)
                found.append([relations(f, frames) for f in features])
        gaps = [(a - b.detach()).abs().sub(self.margin).relu().flatten(1).mean(1) for a, b in zip(*found, strict=True)]
        later = (rollout.stop > 0).to(gaps[0])
        return (later * torch.stack(gaps).mean(0)).mean()


def relations(features: Tensor, frames: int) -> Tensor:
    """R, [B, frames, S, S]: the cosines between the S tokens of each frame. features: [B, frames x S, D]."""
    unit = F.normalize(features.float().unflatten(1, (frames, -1)), dim=-1)
    return unit @ unit.mT
