"""ASD: adversarial self-distillation (Towards One-step Causal Video Generation, arXiv 2511.01419).

    paper                  here                       what it is
    n- and (n+1)-step      two neighbours of `lists`  the student's whole sampler with fewer and with more steps
    D                      discriminator              heads on the fake score's features, a set for each n
    FFE                    chunks.first_timesteps     more steps for the first chunk (first-frame enhancement)

The gap between a one-step student and a teacher of many steps is wide. Between the student's own n-step videos and
its (n+1)-step videos it is narrow. A GAN closes it, beside distribution matching with the teacher:
    fake_updates times:  fake_score <- denoising loss on a rollout of a drawn list, stopped at a drawn step (dmd2.py)
    once:                student    <- DMD2's loss on such a rollout
                                       + asd_weight softplus(-D_n(x_n)),   x_n: all steps of the list
    once:                D_n        <- softplus(D_n(x_n)) + softplus(-D_n(x_{n+1})),   without gradient to the student
The longest list has no second term. D sees x_n and x_{n+1} renoised to the same level. It is told n: one D for all
would only see the sum over n, in which all lists but the first and the last cancel (derived). At D's optimum, which is
log p_{n+1} / p_n at that level, the student's gradient is 0 where the two laws are the same (derived). They are the
same if the student has reached the teacher with each list.

The paper compares n steps with n + 1; here the next longer list of `lists` takes the place of n + 1, so that a student
of 4, 2 and 1 steps has two pairs. The form of the GAN (softplus, renoised inputs), its weight and its heads are
DMD2's and ours: the released repository has no training code.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.modules.expert_levels import draw_levels
from fastgen.modules.heads import StopHeads
from fastgen.networks import Networks, frozen
from fastgen.objectives.base import Loss, State, Turn
from fastgen.objectives.dmd2 import DMD2
from fastgen.objectives.step_lists import StepLists, check_lists, drawn_list, levels_of, policies
from fastgen.recipe import Recipe
from fastgen.registry import MOST_STEPS, MOST_WIDTH
from fastgen.rollout import Rollout, RolloutPolicy, backward_simulation


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ASD(DMD2):
    """lists: from many steps to few; rollout.timesteps, with which the student is exported, is one of them."""

    examples = ({"lists": [[1.0, 0.75, 0.5, 0.25], [1.0, 0.5]]},)
    page = "docs/streaming_methods.md"

    name: Literal["asd"] = "asd"  # type: ignore[assignment]
    lists: StepLists = ()
    asd_weight: float = Field(default=1e-2, gt=0)  # of a mean softplus, beside half a mean square; ours
    discriminator_updates: int = Field(default=1, ge=1, le=MOST_STEPS)  # ours, as in adm
    head_width: int = Field(default=64, ge=1, le=MOST_WIDTH)  # ours

    @model_validator(mode="after")
    def _itself(self) -> "ASD":
        if self.gan_weight:
            raise ValueError(
                "gan_weight compares the student with real data, and asd compares it with itself: leave gan_weight "
                "out; asd_weight is the weight of its GAN"
            )
        if self.student_input == "data":
            raise ValueError("student_input: data has no whole samples of the student to compare: leave it out")
        if len(self.lists) < 2:
            raise ValueError(
                "lists must have at least two lists of timesteps, from many steps to few, such as [[1.0, 0.6], [1.0]]"
            )
        return self

    def check(self, policy: RolloutPolicy) -> None:
        check_lists(self, policy)
        for own in policies(policy, self.lists):
            super().check(own)

    def check_recipe(self, recipe: Recipe) -> None:
        super().check_recipe(recipe)
        if not recipe.backbone.has_features:
            raise ValueError(
                f"objective: the discriminator of asd reads features, and the networks of backbone "
                f"{recipe.backbone.name} have none; choose dmd2"
            )

    @property
    def takes_rolling(self) -> bool:
        """The discriminator compares whole samples, in which every chunk has made its last step."""
        return False

    @property
    def learned_levels(self) -> tuple[float, ...]:
        return levels_of(self.lists)

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return ("student", "fake_score", "discriminator")

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        modules = super().auxiliary(backbone, policy)
        fake_score = modules["fake_score"]
        width, depths = fake_score.feature_dim, len(fake_score.feature_modules)  # type: ignore[arg-type]
        heads = StopHeads(width, depths, self.head_width, len(self.lists) - 1)  # type: ignore[arg-type]
        return modules | {"discriminator": heads}

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        return (
            Turn("fake_score", ("fake_score",), self.fake_updates, one_rollout=self.share_rollout),
            Turn("student", ("student",)),
            Turn("discriminator", ("discriminator",), self.discriminator_updates),
        )

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        if turn.name == "discriminator":
            return self.discriminator_loss(networks, batch)
        count = len(self.lists)
        index = drawn_list(batch, (1 / count,) * count)
        own = networks.with_policy(policies(networks.policy, self.lists)[index])
        if turn.name == "fake_score":
            return self.fake_loss(own, batch)
        matching = self.student_loss(own, batch)
        if not index:  # the longest list has nothing to follow
            return matching
        x = self.whole(networks, batch, index, grad=True).x
        with frozen(networks.fake_score, networks["discriminator"]):
            gan = signals.gan_generator_loss(self.step_logits(networks, batch, x, index))
        total = matching.total + self.asd_weight * gan
        return Loss(total, matching.terms | {"gan": gan.detach(), "loss": total.detach()})

    def discriminator_loss(self, networks: Networks, batch: Batch) -> Loss:
        """Both samples are made from the same draws, so that D sees what the added step changes."""
        index = 1 + batch.integer("pair", len(self.lists) - 1)
        fewer, more = (self.whole(networks, batch, i, grad=False).x for i in (index, index - 1))
        with frozen(networks.fake_score):
            logits = [self.step_logits(networks, batch, x, index) for x in (fewer, more)]
        total = signals.gan_discriminator_loss(logits[1], logits[0])
        return Loss(total, {"loss": total.detach(), "logit_gap": (logits[1] - logits[0]).mean().detach()})

    def whole(self, networks: Networks, batch: Batch, index: int, grad: bool) -> Rollout:
        """All steps of list `index`, with gradient through the last one. It is never the shared rollout of a turn."""
        policy = policies(networks.policy, self.lists)[index]
        last = torch.full_like(batch.ids, policy.num_steps - 1)
        return backward_simulation(networks.student, policy, replace(batch, shared=None), last, grad)

    def step_logits(self, networks: Networks, batch: Batch, x0: Tensor, index: int) -> Tensor:
        """D_n(x_t) [B, depths] for n steps of list `index`, at x0 renoised with the draws "gan"."""
        t = draw_levels(batch, "gan_time", self.gan_time, networks.fake_score)
        x_t = networks.teacher.schedule.add_noise(x0, batch.normal("gan_noise"), t)
        with networks.fake_score.capture() as features:
            networks.fake_score(x_t, t, batch.cond)
        return networks["discriminator"](features, torch.full_like(batch.ids, index - 1))
