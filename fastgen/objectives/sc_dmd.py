"""SC-DMD: self-consistent distribution matching distillation (Salt, arXiv 2604.03118; formulas from its code).

    paper      here                 what it is
    v_1        steps[-1].x0         the executed step's prediction at (x, t_s); a velocity in the paper
    t_m, t_e   middle, end          lower levels of the policy: t_s > t_m > t_e
    lambda     semigroup_weight     weight of the semigroup term

DMD2 constrains where single steps end, but composed steps may still drift apart. One long jump is therefore compared
with two short ones. All jumps are deterministic steps (Euler for flow matching):
    x_e(1) = x + (t_e - t_s) v_1
    x_e(2): x_m = x + (t_m - t_s) sg(v_1), then x_m + (t_e - t_m) v(x_m, t_m), without gradient
    student <- DMD2's loss + lambda (1 - t_s) mean |x_e(1) - sg x_e(2)|^2
The gradient reaches the student through v_1 alone. For a straight velocity field the term is 0, and at t_s = 1 its
weight is 0. In a video that is made chunk by chunk, every chunk makes both jumps with the context that it had.

t_e is drawn from the two levels after the next one, and t_m from the levels between t_s and t_e. From the last level
but one the jump ends at 0, and from the last level there is no jump. The paper trains on a mixture of lists of 8, 4
and 2 steps, which is objective `salt`, and its t_e are every second level of the longest list. Here there is one list,
and every level of it may be drawn. The paper reports that without mixed lists the term does not help autoregressive
video.
"""

from typing import Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen import signals
from fastgen.batch import Batch
from fastgen.networks import Networks
from fastgen.objectives.base import Loss, State, Turn
from fastgen.objectives.causal import check_order, predict_beside
from fastgen.objectives.dmd2 import DMD2
from fastgen.rollout import Rollout, RolloutPolicy, transition


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class SCDMD(DMD2):
    takes_inner = False  # its jumps call the student without the noise of an inner flow
    name: Literal["sc_dmd"] = "sc_dmd"  # type: ignore[assignment]
    # lambda, of a mean square without a half against DMD2's half of one: the released configs (row sc_dmd_semigroup)
    semigroup_weight: float = Field(default=0.2, gt=0)

    @property
    def takes_first_timesteps(self) -> bool:
        return False  # the jumps of all chunks are between the levels of one list

    def check(self, policy: RolloutPolicy) -> None:
        super().check(policy)
        check_order(policy)
        if all(t == 1 for t in policy.timesteps[:-1]):
            raise ValueError(
                "sc_dmd needs a timestep below 1 that is not the last one, and rollout.timesteps "
                f"{list(policy.timesteps)} has none; give three timesteps, or use dmd2"
            )

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        if turn.name != "student":
            return self.fake_loss(networks, batch)
        rollout = self.rollout(networks, batch, grad=True)
        matching = self.matching_loss(networks, batch, rollout)
        semigroup = self.semigroup_loss(networks, batch, rollout)
        total = matching.total + self.semigroup_weight * semigroup
        return Loss(total, matching.terms | {"semigroup": semigroup.detach(), "loss": total.detach()})

    def semigroup_loss(self, networks: Networks, batch: Batch, rollout: Rollout) -> Tensor:
        """mean (1 - t_s) |x_e(1) - sg x_e(2)|^2, the mean over samples and their elements."""
        student = networks.student
        policy = networks.policy
        step = rollout.steps[-1]
        levels = step.t.new_tensor((*policy.timesteps, 0.0))
        middle_index, end_index = self.jump_indices(batch, rollout.stop, policy.num_steps)
        middle, end = levels[middle_index], levels[end_index]
        direct = transition(student.schedule, step.x0, step.x_t, step.t, end, None)
        with torch.no_grad():
            x_m = transition(student.schedule, step.x0, step.x_t, step.t, middle, None)
            x0_m = predict_beside(student, policy, batch, rollout, x_m, middle)
            composed = transition(student.schedule, x0_m, x_m, middle, end, None)
        return ((1 - step.t) * signals.per_sample_mean((direct - composed).square())).mean()

    def jump_indices(self, batch: Batch, stop: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        """The indices [B] of t_m and t_e in the list of timesteps followed by 0.

        No timestep lies below the last one, so there both indices are the stop itself. The student is called
        nevertheless, so that every process calls it equally often."""
        end = (stop + 2 + (batch.uniform("semigroup_end") < 0.5).long()).clamp(max=num_steps)
        between = end - stop - 1  # the number of levels between t_s and t_e
        offset = (batch.uniform("semigroup_middle") * between).long().clamp(max=(between - 1).clamp_min(0))
        middle = stop + 1 + offset
        last = stop == num_steps - 1
        return torch.where(last, stop, middle), torch.where(last, stop, end)
