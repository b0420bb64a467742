"""CDM's student against the authors' code."""

import torch
from dmd_rows import gradient, make_networks
from golden_rows import Golden, comparison, given_batch
from torch import Tensor

from fastgen.batch import Batch
from fastgen.objectives import CDM
from fastgen.objectives.cdm import CDMTurn
from fastgen.rollout import RolloutPolicy


class GivenLevels(CDM):
    def drawn_policy(self, batch: Batch, policy: RolloutPolicy) -> RolloutPolicy:
        return policy


@comparison(
    "cdm_student",
    "cdm",
    "rollout, the guidance and matching terms on the trajectory and the term off it: gradient of the student",
    "their losses have no half: their gradient is twice ours; their guidance is w - 1; given levels of the trajectory",
)
def cdm_student(golden: Golden) -> tuple[Tensor, Tensor]:
    names = {"ca_time": "ca_u", "renoise_time": "dm_u", "off_time": "off_u", "off_renoise_time": "off_dm_u"}
    names |= {"ca_noise": "ca_noise", "renoise": "dm_noise", "off_renoise": "off_dm_noise", "initial": "x"}
    given = {ours: golden[theirs] for ours, theirs in names.items()}
    given["stop"] = (torch.arange(4) + 0.5) / 4
    networks = make_networks(RolloutPolicy(tuple(golden["levels"].tolist()), "ode"))
    batch = given_batch(given, golden["cond"], golden["uncond"])
    loss = GivenLevels().loss(CDMTurn("student", ("student",)), networks, batch, {}).total
    return 2 * gradient(networks.student, loss), golden["gradient"]
