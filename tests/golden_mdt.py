"""mdt beside the authors' code."""

from typing import Any

from golden_mean_flow import both, phi
from golden_rows import Golden, GoldenDenoiser, GoldenNetwork, comparison, given_batch
from torch import Tensor

from fastgen.networks import Networks
from fastgen.objectives.mdt import MDT
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import TimeSampler

SCALES = "the scale is w + 1; their sigma_min of 1e-5 is 0"


def compared(golden: Golden, **settings: Any) -> tuple[Tensor, Tensor]:
    """The loss and gradient with guidance 3 and 5, which are their 2 and 4."""
    draws = {"noise": golden["noise"], "initial": golden["initial"], "time": phi(golden["time"])}
    batch = given_batch(draws, golden["cond"], golden["uncond"].expand_as(golden["cond"]), golden["x"])
    student, teacher = GoldenDenoiser(GoldenNetwork()), GoldenDenoiser(GoldenNetwork(1))
    networks = Networks({"student": student, "teacher": teacher}, RolloutPolicy((1.0,)))
    objective = MDT(guidance_scale=3.0, distillation_guidance_scale=5.0, **settings)
    total = objective.loss(objective.turns(0, {})[0], networks, batch, {}).total  # type: ignore[union-attr]
    total.backward()
    return both(total, student.network.flat()), both(golden["loss"], golden["gradient"])  # type: ignore[operator]


@comparison("mdt_matching", "mdt", "loss and gradient of velocity matching alone, guided and normalised", SCALES)
def matching(golden: Golden) -> tuple[Tensor, Tensor]:
    return compared(golden, distillation_weight=0.0)


@comparison("mdt_distillation", "mdt", "loss and gradient of both losses, guided and normalised", SCALES)
def distillation(golden: Golden) -> tuple[Tensor, Tensor]:
    return compared(golden)


@comparison("mdt_continuous", "mdt", "loss and gradient of both losses with a JVP (distill_type: continuous)", SCALES)
def continuous(golden: Golden) -> tuple[Tensor, Tensor]:
    law = TimeSampler("logit_normal", 0.0, 1.0, mean=1.0, std=1.0)
    return compared(golden, derivative="jvp", time=law, normalise=False)
