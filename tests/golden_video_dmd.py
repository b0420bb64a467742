"""Distribution matching of videos against the authors' code: Self-Forcing, CausVid and SC-DMD.

Frames take the place of the GoldenNetwork's channels."""

import torch
from dmd_rows import ADDED_GUIDANCE, SHIFTED, beside, gradient, make_networks
from golden_rows import Golden, comparison, given_batch
from torch import Tensor

from fastgen.objectives import DMD2, SCDMD
from fastgen.objectives.fake_score import denoising_loss
from fastgen.rollout import Rollout, RolloutPolicy, Step
from fastgen.schedule import TimeSampler

SELF_FORCING_STEPS = RolloutPolicy(timesteps=(1.0, 0.9375, 5 / 6, 0.625))


def self_forcing_generator(golden: Golden) -> tuple[Tensor, Tensor]:
    names = ("initial", "step1", "step2", "step3")
    low, high = golden["range"].double()
    given = dict(zip(names, golden["rollout"], strict=False)) | {"stop": golden["stop"], "renoise": golden["noise"]}
    given["renoise_time"] = (golden["drawn"] - low) / (high - low)
    networks = make_networks(SELF_FORCING_STEPS)
    objective = DMD2(guidance_scale=4.0, renoise_time=SHIFTED, renoise_range="all" if high == 1000 else "step")
    loss = objective.student_loss(networks, given_batch(given, golden["cond"], golden["uncond"])).total
    return beside(loss, gradient(networks.student, loss), golden)


comparison(
    "self_forcing_generator", "dmd2", "rollout and matching loss of the student", f"{ADDED_GUIDANCE}; ends: clamp"
)(self_forcing_generator)
comparison(
    "self_forcing_generator_ts_schedule",
    "dmd2",
    "the same with renoise_range: step",
    f"{ADDED_GUIDANCE}; ends: clamp; ts_schedule with ts_schedule_max",
)(self_forcing_generator)


@comparison("self_forcing_critic", "dmd2", "loss of the fake score and its gradient", "ends: clamp")
def self_forcing_critic(golden: Golden) -> tuple[Tensor, Tensor]:
    networks = make_networks(SELF_FORCING_STEPS)
    given = {"fake_time": golden["drawn"].double() / 1000, "fake_noise": golden["noise"]}
    loss = denoising_loss(networks, given_batch(given, golden["cond"]), golden["x"], SHIFTED)
    return beside(loss, gradient(networks.fake_score, loss), golden)


@comparison(
    "self_forcing_levels", "dmd2", "levels of renoising, by shift 5 and the clamp", "ends: clamp; level x 1000"
)
def self_forcing_levels(golden: Golden) -> tuple[Tensor, Tensor]:
    return 1000 * SHIFTED(golden["drawn"].double() / 1000), golden["timestep"]


@comparison(
    "causvid_generator_from_data", "dmd2", "student_input: data, and the matching loss of the student", ADDED_GUIDANCE
)
def causvid_generator(golden: Golden) -> tuple[Tensor, Tensor]:
    networks = make_networks(
        RolloutPolicy(timesteps=tuple((golden["timesteps"].double() / 1000).tolist())), None, "sample"
    )
    given = {"initial": golden["initial"], "stop": (golden["stop"] + 0.5) / 3, "renoise": golden["noise"]}
    given["renoise_time"] = golden["drawn"].double() / 1000
    batch = given_batch(given, golden["cond"], golden["uncond"], golden["real"])
    law = TimeSampler(low=0.02, high=0.98, shift=8.0, ends="clamp")
    objective = DMD2(guidance_scale=4.5, renoise_time=law, student_input="data", stops="per_sample")
    loss = objective.student_loss(networks, batch).total
    return beside(loss, gradient(networks.student, loss), golden)


# --- SC-DMD


@comparison("sc_dmd_semigroup", "sc_dmd", "the semigroup term, without lambda, and its gradient")
def sc_dmd_semigroup(golden: Golden) -> tuple[Tensor, Tensor]:
    policy = RolloutPolicy(timesteps=(1.0, 0.75, 0.5, 0.25))
    networks, x = make_networks(policy), golden["x"]
    start, middle, end = golden["levels"].double() / 1000
    levels = torch.tensor([*policy.timesteps, 0.0], dtype=torch.float64)
    assert (levels[1], levels[2], levels[3]) == (start, middle, end)
    t = start.expand(len(x))
    x0 = networks.student(x, t, given_batch({"x": x}, golden["cond"]).cond)
    rollout = Rollout(x0, 0 * t, torch.ones(len(x), dtype=torch.int64), (Step(x, t, x0, x0),))
    draws = {"semigroup_end": torch.full_like(t, 0.9), "semigroup_middle": torch.full_like(t, 0.1)}
    loss = SCDMD().semigroup_loss(networks, given_batch({"x": x} | draws, golden["cond"]), rollout)
    return beside(loss, gradient(networks.student, loss), golden)
