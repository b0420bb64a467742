"""VDOT: distribution matching by optimal transport, with a GAN. Only notes on the paper (CVPR 2026) are public; what
they leave open is ours, and said so.

    paper      here                  what it is
    a_i, b_j   tokens(fake, real)    the tokens of mu_fake and of mu_real^w at x_t: spatial positions, frame by frame
    T*         sinkhorn              entropic transport plan between the two sets, with uniform marginals
    L_OTD      field                 surrogate of the gradient of the transport cost with respect to a
    lambda     dmd_weight            of DMD2's own field
    D          discriminator         DMD2's heads on the fake score's features (the paper: register tokens with
                                     cross-attention to three of its blocks)

    W = min_T <C, T> + eps <T, log T>,  C_ij = |a_i - b_j|^2;   the field of token i is a_i - n sum_j T*_ij b_j

This is n / 2 times the gradient of W, where 1 / n is the marginal, and has the size of a - b. (The plan is at its
optimum, so its own derivative does not count.) As eps -> 0, T is the cheapest matching of tokens. Two predictions
whose tokens are permutations of each other then have the field 0, where DMD2's is not 0. As eps -> infinity, every
token is drawn to the mean of b. `epsilon` is eps divided by the mean of C.

The algorithm, for every student update:
    fake_updates times:  fake_score <- denoising loss of x,  D <- relative loss D(x_t) - D(real_t) + R1 penalty
    once, in even updates:  student <- surrogate of ot_weight * OT field + dmd_weight * DMD2's field
    once, in odd updates (turn "adversarial"):  student <- -gan_weight * D(x_t), the part of the relative loss
                            -(D(x_t) - D(real_t)) that has gradient
    the average of the student's weights is updated once.
Without a GAN (gan_weight 0) every update is an even one, and no real data are needed.

A linear loss does not bound D: `r1_weight`, the approximate R1 penalty of adm.py, does (ours). Points, which have one
token, have the plan 1, and the OT field is mu_fake - mu_real^w, DMD2's without its normaliser.
"""

import dataclasses
import math
from typing import Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.batch import Batch
from fastgen.modules.expert_levels import draw_levels
from fastgen.networks import Networks, frozen
from fastgen.objectives.base import Loss, State, Turn
from fastgen.objectives.dmd2 import DMD2
from fastgen.registry import MOST_STEPS
from fastgen.rollout import Rollout


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class VDOT(DMD2):
    name: Literal["vdot"] = "vdot"  # type: ignore[assignment]
    ot_weight: float = Field(default=1.0, ge=0)
    dmd_weight: float = Field(default=1.0, ge=0)  # lambda; no public value
    epsilon: float = Field(default=0.05, gt=0)  # of the mean cost; no public value
    sinkhorn_steps: int = Field(default=100, ge=1, le=MOST_STEPS)  # ours
    # ours. Of D's loss D(fake) - D(real) alone, which has no least value
    r1_weight: float = Field(default=1.0, gt=0)
    # standard deviation in units of x_t, in a mean square without a half: FastGen's (row fastgen_r1)
    r1_noise: float = Field(default=0.1, gt=0)

    @model_validator(mode="after")
    def _matched(self) -> "VDOT":
        if not self.ot_weight and not self.dmd_weight:
            raise ValueError("ot_weight and dmd_weight are both 0, so nothing is matched: give one of them")
        if self.ca_time is not None:
            raise ValueError("ca_time takes guidance out of DMD2's field, and vdot has two fields: leave it out")
        return self

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        fake_turn, student_turn = super().turns(step, state)
        return fake_turn, Turn("adversarial", ("student",)) if self.gan_weight and step % 2 else student_turn

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        if turn.name == "fake_score":
            return self.fake_loss(networks, batch)
        if turn.name == "student":
            return dataclasses.replace(self, gan_weight=0.0).student_loss(networks, batch)
        gan = self.generator_gan(networks, batch, self.rollout(networks, batch, grad=True))
        return Loss(self.gan_weight * gan, {"loss": self.gan_weight * gan.detach()})

    def field(self, x: Tensor, fake: Tensor, real: Tensor) -> Tensor:
        """g [B, ...]: both fields, weighted. The OT field has no normaliser, as in the paper."""
        transport = transport_field(fake, real, self.epsilon, self.sinkhorn_steps)
        return self.ot_weight * transport + self.dmd_weight * super().field(x, fake, real)

    def generator_gan(self, networks: Networks, batch: Batch, rollout: Rollout) -> Tensor:
        """-mean D at the samples. Gradient flows to the samples alone."""
        with frozen(networks.fake_score, networks["discriminator"]):
            return -self.logits(networks, batch, rollout.x, rollout.stop, "gan").mean()

    def discriminator_gan(
        self, networks: Networks, batch: Batch, rollout: Rollout
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """mean [D(x_t) - D(real_t)] + r1_weight mean [D(real_t + r1_noise n) - D(real_t)]^2, at one t and noise."""
        assert batch.latents is not None
        t = draw_levels(batch, "gan_time", self.gan_time, networks.fake_score)
        x_t, real_t = (
            networks.teacher.schedule.add_noise(x, batch.normal("gan_noise"), t) for x in (rollout.x, batch.latents)
        )
        moved = real_t + self.r1_noise * batch.normal("r1")
        fake, real, near = (
            self.discriminator_logits(networks, batch, x, t, rollout.stop) for x in (x_t, real_t, moved)
        )
        gap, penalty = (real - fake).mean(), (near - real).square().mean()
        terms = {"gan": -gap.detach(), "logit_gap": gap.detach(), "r1": penalty.detach()}
        return self.r1_weight * penalty - gap, terms


def tokens(x: Tensor) -> Tensor:
    """[B, sets, n, channels]: the spatial positions of latents [B, C, H, W], or of each frame of videos
    [B, F, C, H, W]. A point [B, D] is one token."""
    if x.dim() == 2:
        return x[:, None, None]
    frames = x if x.dim() == 5 else x[:, None]
    return frames.flatten(3).mT


def transport_field(fake: Tensor, real: Tensor, epsilon: float, steps: int) -> Tensor:
    """[B, ...]: a_i - n sum_j T*_ij b_j at every token a_i of fake, b_j of real; detached, in float32 or above.

    epsilon: in units of the mean cost of a set of tokens. steps: of Sinkhorn's iteration. Under autocast, too: in
    bfloat16 the rounding of b would be as large as the field."""
    with torch.no_grad(), torch.autocast(fake.device.type, enabled=False):
        a, b = (tokens(v.to(torch.promote_types(v.dtype, torch.float32))) for v in (fake, real))
        cost = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
        mean = cost.mean((-2, -1), keepdim=True).clamp_min(1e-12)
        plan = sinkhorn(cost / mean, epsilon, steps)
        field = a - plan.shape[-1] * plan @ b
        return torch.nan_to_num(field.mT.reshape(fake.shape), posinf=0.0, neginf=0.0)


def sinkhorn(cost: Tensor, epsilon: float, steps: int) -> Tensor:
    """T [..., n, m]: the minimum of <C, T> + epsilon <T, log T> over plans with marginals 1 / n and 1 / m.

    cost: [..., n, m]. steps: updates of both potentials, in the log domain. The last one makes the sums of rows exact;
    the error of the sums of columns falls geometrically, the slower the smaller epsilon is. In the first half of the
    steps epsilon falls from the largest cost to its value (epsilon scaling)."""
    n, m = cost.shape[-2:]
    f, g = cost.new_zeros(cost.shape[:-1]), cost.new_zeros(*cost.shape[:-2], m)
    top = (cost.amax() / epsilon).clamp_min(1.0)
    for i in range(steps):
        e = epsilon * top ** max(0.0, 1 - 2 * (i + 1) / steps)
        g = -e * (torch.logsumexp((f[..., None] - cost) / e, -2) + math.log(m))
        f = -e * (torch.logsumexp((g[..., None, :] - cost) / e, -1) + math.log(n))
    return ((f[..., None] + g[..., None, :] - cost) / epsilon).exp()
