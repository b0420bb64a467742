"""SC-DMD: self-consistent distribution matching distillation (Salt, arXiv 2604.03118; formulas from its code).

    paper      here                 what it is
    v_1        steps[-1].x0         the executed step's prediction at (x, t_s); a velocity in the paper
    t_m, t_e   middle, end          levels of the policy below it: t_s > t_m > t_e
    lambda     semigroup_weight     of the semigroup term

DMD2 constrains where single steps end; composed steps may still drift apart. One long jump is therefore compared with
two short ones, all by the deterministic step (Euler for flow matching):
    x_e(1) = x + (t_e - t_s) v_1
    x_e(2): x_m = x + (t_m - t_s) sg(v_1), then x_m + (t_e - t_m) v(x_m, t_m), no gradient
    student <- DMD2's loss + lambda (1 - t_s) mean |x_e(1) - sg x_e(2)|^2
The gradient reaches the student through v_1 alone. A straight velocity field has no such loss.

t_e is one of the two levels that follow the next one, t_m any between; the last two levels end at 0. The paper trains
on lists of 8, 4 and 2 steps mixed, and t_e is every second level of the longest; here there is one list, all of whose
levels count. It reports that without mixed lists the term does not help autoregressive video. At t_s = 1 its weight
is 0.
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
from fastgen.objectives.dmd2 import DMD2
from fastgen.rollout import Rollout, RolloutPolicy, predict_x0, transition


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class SCDMD(DMD2):
    name: Literal["sc_dmd"] = "sc_dmd"  # type: ignore[assignment]
    semigroup_weight: float = Field(default=0.2, gt=0)  # lambda, the released code

    def check(self, policy: RolloutPolicy) -> None:
        super().check(policy)
        if all(t == 1 for t in policy.timesteps[:-1]):
            raise ValueError(
                "sc_dmd compares jumps from levels below 1 over at least one level: "
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
        """mean (1 - t_s) |x_e(1) - sg x_e(2)|^2, over samples and their elements."""
        student, policy, step = networks.student, networks.policy, rollout.steps[-1]
        levels = step.t.new_tensor((*policy.timesteps, 0.0))
        middle, end = (levels[i] for i in self.jumps(batch, rollout.stop, policy.num_steps))
        direct = transition(student.schedule, step.x0, step.x_t, step.t, end, None)
        with torch.no_grad():
            x_m = transition(student.schedule, step.x0, step.x_t, step.t, middle, None)
            x0_m = predict_x0(student, x_m, middle, batch.cond, policy)
            composed = transition(student.schedule, x0_m, x_m, middle, end, None)
        return ((1 - step.t) * signals.per_sample_mean((direct - composed).square())).mean()

    def jumps(self, batch: Batch, stop: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        """Indices [B] of t_m and t_e among the levels and 0. The last step has none below: it stays where it is, and
        the student is still called, as often on every process."""
        end = (stop + 2 + (batch.uniform("semigroup_end") < 0.5).long()).clamp(max=num_steps)
        between = end - stop - 1
        middle = stop + 1 + (batch.uniform("semigroup_middle") * between).long().clamp(max=(between - 1).clamp_min(0))
        last = stop == num_steps - 1
        return torch.where(last, stop, middle), torch.where(last, stop, end)
