"""Re-DMD: rewarded distribution matching distillation (Reward Forcing; formulas from its released code).

    paper      here                       what it is
    G_theta    networks.student           few-step generator
    r(x, c)    networks.rewards           any reward of the clean sample; no gradient through it
    beta       beta                       sharpness of the weights
    -          state["reward"]            [2]: decayed sums of rewards and of ones, for the running mean of r (ours)

This is DMD2, where each sample's score difference is multiplied by a weight w (mu_real^guided is the guided teacher):
    w = exp(beta (r - mean r)),   the exponent clamped to +-clip
    g = w (mu_fake - mu_real^guided) / mean|x - mu_real^guided|
The fake score's loss is not weighted. Without the running mean, which the released code does not have, a constant
added to the reward would scale the loss. Guidance 3 of that code, in cond + s (cond - uncond), is guidance_scale: 4.

The weight is positive, and it multiplies a score difference that vanishes where student and teacher agree. The optimum
is therefore the *teacher's* law, whatever the reward (derived). Samples with a high reward are corrected first and
most strongly. They gain only because a student of limited capacity, or one that is stopped early, makes its errors
elsewhere. To learn a law that is tilted by the reward, use an objective whose optimum is tilted.
"""

from typing import Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen import signals
from fastgen.batch import Batch
from fastgen.modules.processes import summed
from fastgen.networks import Networks
from fastgen.objectives.base import Loss, State, Turn
from fastgen.objectives.dmd2 import DMD2
from fastgen.rewards import Score


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ReDMD(DMD2):
    reward_use = "score"
    rewards_required = True
    name: Literal["re_dmd"] = "re_dmd"  # type: ignore[assignment]
    # the released code's, for VideoAlign's motion quality (video_reward with axes: [MQ], already standardised).
    # Golden row: re_dmd_student
    beta: float = Field(default=2.0, gt=0)
    clip: float = Field(default=4.0, gt=0)  # the largest |beta (r - mean r)|; ours
    reward_memory: float = Field(default=0.9, ge=0, lt=1)  # fraction of the sums that each update keeps; ours

    def init_state(self) -> State:
        return {"reward": torch.zeros(2), "seen": torch.zeros(2)}

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        if turn.name != "student":
            return self.fake_loss(networks, batch)
        rollout = self.rollout(networks, batch, grad=True)
        weight, terms = self.reward_weight(networks, batch, rollout.x, state)
        loss = self.matching_loss(networks, batch, rollout, weight)
        return Loss(loss.total, loss.terms | terms)

    def finish(self, turn: Turn, networks: Networks, state: State) -> None:
        super().finish(turn, networks, state)
        if turn.name == "student":
            state["reward"].mul_(self.reward_memory).add_(state["seen"])
            state["seen"].zero_()

    @torch.no_grad()
    def reward_weight(
        self, networks: Networks, batch: Batch, x0: Tensor, state: State
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """w [B], and the terms to log. w is 1 in the first update, before a mean is known.

        Invalid samples get the weight 0, and count in the mean of the loss: over the valid samples of a micro-batch
        alone, the mean would depend on how an update is divided."""
        return self.weight_of(networks.rewards(x0, batch), state)

    def weight_of(self, score: Score, state: State, penalty: Tensor | float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
        """The same for given scores. penalty: scalar, what the whole update's rewards are lowered by."""
        valid = score.valid.to(score.value)
        total, count = state["reward"]
        centred = torch.where(count > 0, score.value - total / count.clamp_min(1e-12), 0.0)
        weight = (self.beta * (centred - penalty)).clamp(-self.clip, self.clip).exp()
        sums = torch.stack([(valid * score.value).sum(), valid.sum()])
        state["seen"] += summed(sums)  # over processes
        terms = score.terms() | {"effective_share": signals.effective_share(weight * valid)}
        return weight * valid, terms
