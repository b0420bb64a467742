"""Flash-DMD: distribution matching at high noise, a GAN on pictures at low noise (arXiv 2511.20549).

    paper          here                 what it is
    G_theta        networks.student     few-step generator, initialised from the teacher
    psi            networks.fake_score  denoiser of the samples of high-noise steps, trained online
    D              discriminator        heads on a frozen image network (SAM in the paper), on decoded pictures
    t_split        split                steps from levels above it are matched, the others are sharpened
    lambda         ida_decay            of psi <- lambda psi + (1 - lambda) theta after each student update

The algorithm, for every student update:
    fake_updates times:
        x = rollout to a random step from above the split;  fake_score <- denoising loss on x renoised
    gan.discriminator_updates times:
        x = rollout to a random step from below it;  D <- real pictures against x, decoded
    once:
        x = rollout to a random step, with gradient through it alone
        t_k > split       student <- DMD2's surrogate of (mu_fake - mu_real) / mean|x - mu_real|
        t_k <= split      student <- sharpening_weight * the sum over heads of mean softplus(-D(x))
    the average of the student's weights is updated once.

Each step has one task. High-noise steps decide the layout, for which a distribution has to be matched, and low-noise
steps the texture, for which pictures can be compared directly. The fake score shares nothing with D and sees none of
the sharpened samples. With `ida_decay`, it needs fewer updates than DMD2's five (the paper).

The formulas are those of third-party notes on the paper, whose training code is not public. `gan` has the fields of
`gdd`, which says what D sees without a pixel_network. The paper's second stage, reinforcement while distilling, is not
here; rtdmd and re_dmd train with rewards.
"""

from typing import Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import nn

from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.networks import Networks
from fastgen.objectives.base import Loss, State, Turn
from fastgen.objectives.dmd2 import DMD2
from fastgen.objectives.gdd import GDD
from fastgen.recipe import Recipe
from fastgen.registry import MOST_STEPS
from fastgen.rollout import Rollout, RolloutPolicy, backward_simulation


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class FlashDMD(DMD2):
    examples = ({},)
    takes_chunks = False
    needs_whole_videos = (
        "it routes whole samples by the level of their step, and its discriminator of pictures would tell the chunks "
        "of a video apart by how they continue each other"
    )

    name: Literal["flash_dmd"] = "flash_dmd"  # type: ignore[assignment]
    split: float = Field(default=0.5, gt=0, lt=1)  # a level; ours, the paper's is not known to us
    gan: GDD = GDD(r1_weight=0.0)  # its weight of R1 is ours
    sharpening_weight: float = Field(default=1.0, gt=0)  # of the GAN's term, in the updates that have it; ours
    fake_updates: int = Field(default=2, ge=1, le=MOST_STEPS)  # 2 for SD3, the paper

    @model_validator(mode="after")
    def _routed(self) -> "FlashDMD":
        if self.stops != "shared" or self.student_input != "simulated":
            raise ValueError(
                "flash_dmd chooses the loss of an update by the step that all its samples stop at, in the student's "
                "own simulation: leave out stops and student_input"
            )
        if self.gan_weight:
            raise ValueError(
                "gan_weight is for DMD2's discriminator, on the fake score's features; leave it out, and use gan and "
                "sharpening_weight"
            )
        if self.gan.freeze:
            raise ValueError("gan.freeze is for objective gdd, whose student may stay frozen in part; leave it out")
        return self

    def check(self, policy: RolloutPolicy) -> None:
        super().check(policy)
        high = self.num_high(policy)
        if not 0 < high < policy.num_steps:
            raise ValueError(
                f"split: {self.split:g} leaves no step of rollout.timesteps {list(policy.timesteps)} "
                f"{'above' if not high else 'below'} it; move it between two of them"
            )

    def check_recipe(self, recipe: Recipe) -> None:
        super().check_recipe(recipe)
        self.gan.check_recipe(recipe)

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return ("student", "fake_score", "discriminator")

    @property
    def full_roles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*super().full_roles, "discriminator")))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"latents"})

    def num_high(self, policy: RolloutPolicy) -> int:
        """The number of steps from levels above the split, which come first."""
        return sum(t > self.split for t in policy.timesteps)

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        fake_score = super().auxiliary(backbone, policy)["fake_score"]
        return {"fake_score": fake_score} | self.gan.auxiliary(backbone, policy)

    def init_state(self) -> State:
        return self.gan.init_state()

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        return (
            Turn("fake_score", ("fake_score",), self.fake_updates, one_rollout=self.share_rollout),
            Turn("discriminator", ("discriminator",), self.gan.discriminator_updates),
            Turn("student", ("student",)),
        )

    def finish(self, turn: Turn, networks: Networks, state: State) -> None:
        super().finish(turn, networks, state)
        self.gan.finish(turn, networks, state)

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        high, count = self.num_high(networks.policy), networks.policy.num_steps
        if turn.name == "fake_score":
            return self.fake_loss(networks, batch)
        if turn.name == "discriminator":
            stop = high + batch.integer("stop", count - high)
            x = self.rollout_to(networks, batch, stop, False).x
            return self.gan.critic_loss(networks, batch, x, self.gan.is_due(state))
        stop = batch.integer("stop", count)
        rollout = self.rollout_to(networks, batch, stop, True)
        if stop < high:
            return self.matching_loss(networks, batch, rollout)
        sharpening = self.gan.generator_loss(networks, batch, rollout.x).total
        return Loss(self.sharpening_weight * sharpening, {"sharpening": sharpening.detach()})

    def rollout(self, networks: Networks, batch: Batch, grad: bool) -> Rollout:
        """What the fake score is trained on: samples of a random step from above the split."""
        return self.rollout_to(networks, batch, batch.integer("stop", self.num_high(networks.policy)), grad)

    def rollout_to(self, networks: Networks, batch: Batch, stop: int, grad: bool) -> Rollout:
        """The backward simulation to step `stop` of all samples."""
        stops = torch.full_like(batch.ids, stop)
        return backward_simulation(networks.student, networks.policy, batch, stops, grad)
