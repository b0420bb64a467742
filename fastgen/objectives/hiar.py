"""HiAR's training: DMD2 with a forward-KL term on the first step (formulas from the released code,
github.com/Jacky-hate/HiAR).

    released code          here              what it is
    timestep-first order   chunks.order      step: each step is a pass over the video (see docs/streaming.md)
    pd_loss                kl_weight         weight of the regression at step 0
    pd_x0_target_mode      target            gt_x0 is pairs: the end of the teacher's ODE.  pred_x0 is path: where the
                                             chord of the ODE from t_0 = 1 to t_1 would end
    single_forward         attention         causal: the frames of a chunk see those before it, as noisy as they are.
                                             bidirectional: all frames see all others, as in the paper
    exit step              stop              that of distribution matching, from 1 on

Distribution matching is a reverse KL, and videos that move little satisfy it. The first step, which decides how a
video moves, is therefore taught by the teacher's ODE, in bidirectional mode: one call on the whole video, without
chunks. All other steps are left to distribution matching:
    student <- DMD2's loss at a step drawn from 1 ... n - 1
               + kl_weight mean |G(x_1, 1) - sg x0|^2,   x_1 the noise that the teacher's ODE takes to x0
The second term is 0 if the student's first step, on a whole video, is the teacher's map (derived). With `attention:
causal` it cannot be, as the map of a bidirectional teacher also depends on later noise
(`ar1_formulas.ode_initialisation_loss` says by how much). The term reaches the chunks of a rollout only through the
weights that all modes share.

`target: path` makes the targets during the update, with path_steps guided steps of the teacher, and needs no pairs:
    x0 = (x_{t_1} - t_1 x_1) / (1 - t_1),   for flow matching
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.batch import Batch
from fastgen.networks import Networks
from fastgen.objectives.base import Loss, State, Turn
from fastgen.objectives.dmd2 import DMD2
from fastgen.objectives.ode_regression import ode_state
from fastgen.registry import MOST_STEPS
from fastgen.rollout import Rollout, RolloutPolicy, backward_simulation, draw_stops, network_inputs


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class HiAR(DMD2):
    takes_inputs = False

    page = "docs/streaming_methods.md"

    takes_inner = False  # its first step on whole videos calls the student without the noise of an inner flow
    name: Literal["hiar"] = "hiar"  # type: ignore[assignment]
    # of a mean square without a half, beside DMD2's half of one: the released config
    kl_weight: float = Field(default=0.1, gt=0)
    attention: Literal["bidirectional", "causal"] = "bidirectional"  # the paper; causal in the released code
    target: Literal["pairs", "path"] = "pairs"  # ours: pairs are cheaper; path in the released config
    path_steps: int = Field(default=12, ge=1, le=MOST_STEPS)  # of the teacher, to t_1: the released config's 12 of 48

    def check(self, policy: RolloutPolicy) -> None:
        super().check(policy)
        if policy.num_steps < 2:
            raise ValueError(
                "hiar leaves the first step to the forward KL and needs another one for distribution matching: give "
                "rollout.timesteps at least two"
            )
        if policy.timesteps[0] != 1:
            raise ValueError(
                f"hiar's first step starts from the noise of the teacher's ODE, at level 1, and rollout.timesteps "
                f"starts at {policy.timesteps[0]:g}: let it start at 1"
            )
        if self.attention == "causal" and policy.chunks is None:
            raise ValueError("attention: causal is for the chunks of a video, and there are none: leave it out")
        if self.student_input == "data":
            raise ValueError("student_input: data has no rollout to leave the first step out of: leave it out")

    @property
    def unmasked(self) -> str | None:
        return "attention: bidirectional" if self.attention == "causal" else None

    @property
    def takes_first_timesteps(self) -> bool:
        return False  # a list of its own has another first step, which the term would not reach

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({"pairs"} if self.target == "pairs" else frozenset())

    def rollout(self, networks: Networks, batch: Batch, grad: bool) -> Rollout:
        stop = 1 + draw_stops(batch, networks.policy.num_steps - 1, shared=self.stops == "shared")
        return backward_simulation(networks.student, networks.policy, batch, stop, grad)

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        loss = super().loss(turn, networks, batch, state)
        if turn.name != "student":
            return loss
        forward = self.forward_kl(networks, batch)
        total = loss.total + self.kl_weight * forward
        return Loss(total, loss.terms | {"forward_kl": forward.detach(), "loss": total.detach()})

    def forward_kl(self, networks: Networks, batch: Batch) -> Tensor:
        """mean |G(x_1, 1) - sg x0|^2 over samples and their elements, on whole videos."""
        x1, x0 = self.ends(networks, batch)
        t = x1.new_ones(len(x1))
        inputs = network_inputs(networks.policy, t)
        if self.attention == "causal":
            inputs = replace(inputs, causal=networks.policy.chunks)
        return (networks.student(x1, t, batch.cond, inputs) - x0).square().mean()

    @torch.no_grad()
    def ends(self, networks: Networks, batch: Batch) -> tuple[Tensor, Tensor]:
        """x_1, and the x0 that the first step is to predict."""
        if self.target == "pairs":
            assert batch.pairs is not None
            return batch.pairs
        x1, level = batch.normal("forward_kl"), networks.policy.timesteps[1]
        t = x1.new_full((len(x1),), level)
        x_t = ode_state(networks.teacher, x1, t, batch.cond, batch.uncond, self.guidance_scale, self.path_steps)
        schedule = networks.teacher.schedule
        return x1, schedule.to_sample(x1, x_t, t, "epsilon").to(x1.dtype)
