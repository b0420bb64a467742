"""The family of distribution matching against its authors' code: DMD2, Self-Forcing, CausVid and what follows them.

Students, teachers and fake scores are GoldenNetworks with the seeds 0, 1 and 2 unless a row says otherwise."""

import dataclasses

import torch
from golden_rows import GivenBatch, Golden, GoldenDenoiser, GoldenNetwork, comparison, given_batch
from torch import Tensor, nn

from fastgen.batch import Batch
from fastgen.networks import Networks
from fastgen.objectives import ADM, DMD2, SCDMD, FDistill, PhasedDMD, ReDMD, Turn
from fastgen.objectives.ac_dmd import ACDMD
from fastgen.objectives.base import State
from fastgen.objectives.fake_score import denoising_loss
from fastgen.objectives.phased_dmd import Phase
from fastgen.rewards import Score
from fastgen.rollout import Rollout, RolloutPolicy, Step, transition
from fastgen.schedule import PredictionType, Schedule, TimeSampler, VPSchedule

WHOLE = TimeSampler(low=0.0, high=1.0)  # the level of a uniform draw is the draw itself
DMD2_STEPS = RolloutPolicy(timesteps=(1.0, 0.75, 0.5, 0.25))


class Tapped(GoldenNetwork):
    """A GoldenNetwork whose features pass through a module, where hooks find them."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.tap = nn.Identity()

    def hidden(self, x: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None) -> Tensor:
        return self.tap(super().hidden(x, t, cond, s))


class Tappable(GoldenDenoiser):
    @property
    def feature_modules(self) -> list[nn.Module]:
        return [self.network.tap]  # type: ignore[list-item]


class MeanHead(nn.Module):
    """Logits [B, 1]: a linear map of the mean feature."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, features: list[Tensor]) -> Tensor:
        return (features[0].mean(1) @ self.weight)[:, None]


def make_networks(
    policy: RolloutPolicy,
    schedule: Schedule | None = None,
    kind: PredictionType = "flow_prediction",
    head: Tensor | None = None,
    seeds: tuple[int, int, int] = (0, 1, 2),
) -> Networks:
    roles = ("student", "teacher", "fake_score")
    modules: dict[str, nn.Module] = {
        role: Tappable(Tapped(seed), kind, schedule) for role, seed in zip(roles, seeds, strict=True)
    }
    if head is not None:
        modules["discriminator"] = MeanHead(head)
    return Networks(modules, policy)


def gradient(module: nn.Module, loss: Tensor) -> Tensor:
    loss.backward()
    assert isinstance(module, GoldenDenoiser)
    return module.network.flat()  # type: ignore[operator]


def beside(loss: Tensor, gradient: Tensor, golden: Golden) -> tuple[Tensor, Tensor]:
    """Ours and theirs: the loss and the gradient, each divided by the size of theirs so that both count."""
    ours, theirs = ((loss, gradient), (golden["loss"], golden["gradient"]))
    scales = [value.norm() for value in theirs]
    pair = [torch.cat([v.reshape(-1) / s for v, s in zip(side, scales, strict=True)]) for side in (ours, theirs)]
    return pair[0], pair[1]


# --- DMD2


def dmd2_networks(golden: Golden) -> Networks:
    head = golden.tensors.get("head")
    return make_networks(DMD2_STEPS, VPSchedule(golden["alphas_cumprod"]), "epsilon", head)


def level(step: Tensor) -> Tensor:
    """Discrete step i is the level (i + 1) / 1000."""
    return (step.double() + 1) / 1000


def finished(x: Tensor, stop: int = 0, t: float = 1.0) -> Rollout:
    """A rollout that ended with these clean samples."""
    level, stops = torch.full((len(x),), t, dtype=x.dtype), torch.full((len(x),), stop)
    return Rollout(x, torch.zeros_like(level), stops, (Step(x, level, x, x),))


@comparison("dmd2_distribution_matching", "dmd2", "gradient of the matching loss, of the samples")
def dmd2_distribution_matching(golden: Golden) -> tuple[Tensor, Tensor]:
    x = golden["x"].clone().requires_grad_()
    batch = given_batch(
        {"renoise_time": level(golden["step"]), "renoise": golden["noise"]}, golden["cond"], golden["uncond"]
    )
    objective = DMD2(guidance_scale=1.75, renoise_time=WHOLE)
    objective.matching_loss(dmd2_networks(golden), batch, finished(x)).total.backward()
    assert x.grad is not None
    return x.grad, golden["gradient"]


@comparison("dmd2_fake_score", "dmd2", "loss of the fake score and its gradient")
def dmd2_fake_score(golden: Golden) -> tuple[Tensor, Tensor]:
    networks = dmd2_networks(golden)
    batch = given_batch({"fake_time": level(golden["step"]), "fake_noise": golden["noise"]}, golden["cond"])
    loss = denoising_loss(networks, batch, golden["x"], WHOLE)
    return beside(loss, gradient(networks.fake_score, loss), golden)


@comparison("dmd2_discriminator", "dmd2", "GAN loss of the discriminator, and its gradient in features and head")
def dmd2_discriminator(golden: Golden) -> tuple[Tensor, Tensor]:
    networks = dmd2_networks(golden)
    given = {f"gan_{kind}_time": level(golden[f"{kind}_step"]) for kind in ("real", "fake")}
    given |= {f"gan_{kind}_noise": golden[f"{kind}_noise"] for kind in ("real", "fake")}
    given |= {"fake_time": level(golden["fake_step"]), "fake_noise": golden["fake_noise"]}  # of the other part
    batch = given_batch(given, golden["cond"], latents=golden["real"], shared={"rollout": finished(golden["x"])})
    batch = dataclasses.replace(batch, given=given | {"stop": torch.tensor(0)})
    objective = DMD2(gan_weight=5e-3, gan_time=WHOLE, fake_time=WHOLE, discriminator_weight=1.0)
    both = objective.fake_loss(networks, batch)
    denoising = denoising_loss(networks, batch, golden["x"], WHOLE)
    loss = both.total - denoising
    parts = [gradient(networks.fake_score, loss), networks["discriminator"].weight.grad]
    return beside(loss, torch.cat(parts), golden)  # type: ignore[arg-type]


def dmd2_generator(golden: Golden) -> tuple[Tensor, Tensor]:
    """The backward simulation with its random stop, the matching loss and the generator's GAN loss."""
    names = ("initial", "step1", "step2", "step3")
    given = dict(zip(names, golden["rollout"], strict=False))
    given |= {"stop": golden["stop"], "renoise_time": level(golden["step"]), "renoise": golden["noise"]}
    given |= {"gan_time": level(golden["gan_step"]), "gan_noise": golden["gan_noise"]}
    networks = dmd2_networks(golden)
    batch = given_batch(given, golden["cond"])
    objective = DMD2(guidance_scale=1.75, renoise_time=WHOLE, gan_time=WHOLE, gan_weight=5e-3)
    loss = objective.student_loss(networks, batch).total
    return beside(loss, gradient(networks.student, loss), golden)


for stop in (0, 2):
    comparison(f"dmd2_generator_stop{stop}", "dmd2", "backward simulation, matching and GAN loss of the student")(
        dmd2_generator
    )


# --- videos: Self-Forcing and CausVid. Frames take the place of the GoldenNetwork's channels


SHIFTED = TimeSampler(low=0.02, high=0.98, shift=5.0, ends="clamp")
SELF_FORCING_STEPS = RolloutPolicy(timesteps=(1.0, 0.9375, 5 / 6, 0.625))
ADDED_GUIDANCE = "their guidance is cond + w (cond - uncond); our scale is w + 1"


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


# --- Phased DMD


PHASES = (Phase(first=0, last=2, updates=1), Phase(first=2, last=4, updates=1))
PHASED_STEPS = RolloutPolicy(timesteps=(1.0, 0.8, 0.5, 0.25), transition="ode")


def in_phase(t: Tensor, s: float = 0.5) -> Tensor:
    """The uniform draw whose level, between s and 1, is t."""
    return (t - s) / (1 - s)


@comparison("phased_dmd_generator", "phased_dmd", "rollout of a phase, gradient: normalised, loss of the student")
def phased_dmd_generator(golden: Golden) -> tuple[Tensor, Tensor]:
    given = {"initial": golden["initial"], "stop": golden["stop"], "renoise": golden["noise"]}
    given["renoise_time"] = in_phase(golden["t"])
    networks = make_networks(PHASED_STEPS)
    objective = PhasedDMD(phases=PHASES, experts=False, guidance_scale=4.0, renoise_time=WHOLE)
    loss = objective.student_loss(networks, given_batch(given, golden["cond"], golden["uncond"]), PHASES[0]).total
    return beside(loss, gradient(networks.student, loss), golden)


@comparison(
    "phased_dmd_fake_score",
    "phased_dmd",
    "loss of the fake score with the sub-interval target, and its gradient",
    "theirs has no clamp near s (fake_clamp)",
)
def phased_dmd_fake_score(golden: Golden) -> tuple[Tensor, Tensor]:
    given = {"fake_time": in_phase(golden["t"]), "fake_noise": golden["noise"]}
    rollout = finished(golden["x_s"])
    rollout = dataclasses.replace(rollout, s=torch.full_like(golden["t"], 0.5))
    batch = given_batch(given | {"stop": torch.tensor(0)}, golden["cond"], shared={"rollout": rollout})
    networks = make_networks(PHASED_STEPS)
    objective = PhasedDMD(phases=PHASES, experts=False, fake_time=WHOLE, fake_clamp=1e6)
    loss = objective.fake_loss(networks, batch, PHASES[0]).total
    return beside(loss, gradient(networks.fake_score, loss), golden)


# --- AC-DMD


AC_STEPS = RolloutPolicy(timesteps=(1.0, 0.75, 0.5, 0.25), transition="cps", eta=0.9)


class GivenRollout(ACDMD):
    """Step 1 of the student, from 0.75 to 0.5, from a given x_t."""

    def rollout(self, networks: Networks, batch: Batch, grad: bool) -> Rollout:
        x_t = batch.normal("x_t")
        t, s = (torch.full((len(x_t),), level, dtype=x_t.dtype) for level in AC_STEPS.timesteps[1:3])
        with torch.set_grad_enabled(grad):
            x0 = networks.student(x_t, t, batch.cond)
            x_s = transition(networks.student.schedule, x0, x_t, t, s, batch.normal("exit"), AC_STEPS.transition_eta)
        return Rollout(x_s, s, torch.ones_like(batch.ids), (Step(x_t, t, x0, x_s),))


def ac_dmd_batch(golden: Golden, **given: Tensor) -> GivenBatch:
    given |= {"x_t": golden["x_t"], "exit": golden["exit"]}
    return given_batch(given, golden["cond"], golden["uncond"])


@comparison("ac_dmd_generator", "rtdmd", "matching loss of the student at x_s and its gradient (AC-DMD)")
def ac_dmd_generator(golden: Golden) -> tuple[Tensor, Tensor]:
    networks = make_networks(AC_STEPS)
    batch = ac_dmd_batch(golden, renoise_time=golden["u"], renoise=golden["noise"], back=golden["back"])
    loss = GivenRollout(guidance_scale=7.0).student_loss(networks, batch).total
    return beside(loss, gradient(networks.student, loss), golden)


@comparison(
    "ac_dmd_fake_score", "rtdmd", "loss of the fake score with the martingale product, and its gradient (AC-DMD)"
)
def ac_dmd_fake_score(golden: Golden) -> tuple[Tensor, Tensor]:
    networks = make_networks(AC_STEPS)
    law = TimeSampler(low=0.001, high=0.2)
    steps = (golden["steps"].double() / 1000 - law.low) / (law.high - law.low)
    draws = {name: golden[name] for name in ("consistency1", "consistency2")}
    batch = ac_dmd_batch(golden, fake_time=golden["u"], fake_noise=golden["noise"], consistency_step=steps, **draws)
    loss = GivenRollout().fake_loss(networks, batch).total
    return beside(loss, gradient(networks.fake_score, loss), golden)


# --- f-distill and FastGen's R1


FASTGEN_STEPS = RolloutPolicy(timesteps=(1.0,))
UPDATE_MEANS = "theirs divides by means of the update itself; ours by those of earlier ones: the same update again"


class GivenLogits(FDistill):
    def discriminator_logits(self, networks: Networks, batch: Batch, x_t: Tensor, t: Tensor, stop: Tensor) -> Tensor:
        return batch.normal("logits")


def settled(objective: FDistill, networks: Networks, batch: Batch, rollout: Rollout) -> State:
    """The state in which the means of earlier updates are those of this one."""
    state = {name: value.double() for name, value in objective.init_state().items()}
    for _ in range(3):
        objective.ratio_weight(networks, batch, rollout, state)
        state["ratio"].copy_(state["seen"])
        state["seen"].zero_()
    return state


@comparison("f_distill_weights", "f_distill", "weights h(r) / mean h of six divergences", UPDATE_MEANS)
def f_distill_weights(golden: Golden) -> tuple[Tensor, Tensor]:
    x = torch.zeros(len(golden["t"]), 4, 2, 2, dtype=torch.float64)
    given = {"logits": golden["logits"], "renoise_time": golden["t"], "renoise": x}
    batch, networks, found = given_batch(given, golden["cond"]), make_networks(FASTGEN_STEPS), []
    for name in ("kl", "js", "sf", "neyman", "sh", "jf"):
        objective = GivenLogits(f_divergence=name, renoise_time=WHOLE, ratio_memory=0.0)
        state = settled(objective, networks, batch, finished(x))
        found.append(objective.ratio_weight(networks, batch, finished(x), state)[0])
    return torch.stack(found), golden["weights"]


@comparison(
    "f_distill_generator",
    "f_distill",
    "weighted matching loss and GAN loss of the student",
    f"{UPDATE_MEANS}; the discriminator reads the fake score; one draw for both parts",
)
def f_distill_generator(golden: Golden) -> tuple[Tensor, Tensor]:
    given = {f"{name}_time": golden["t"] for name in ("renoise", "gan")}
    given |= {"renoise": golden["noise"], "gan_noise": golden["noise"], "initial": golden["initial"]}
    given["stop"] = torch.tensor(0)
    networks = make_networks(FASTGEN_STEPS, head=golden["head"])
    batch = given_batch(given, golden["cond"], golden["uncond"])
    objective = FDistill(guidance_scale=3.0, renoise_time=WHOLE, gan_time=WHOLE, ratio_memory=0.0)
    state = settled(objective, networks, batch, objective.rollout(networks, batch, grad=False))
    loss = objective.loss(Turn("student", ("student",)), networks, batch, state).total
    return beside(loss, gradient(networks.student, loss), golden)


class MeanHeadOfStop(MeanHead):
    def forward(self, features: list[Tensor], stop: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(features)


@comparison("fastgen_r1", "adm", "approximate R1 penalty of the discriminator, and its gradient in the head")
def fastgen_r1(golden: Golden) -> tuple[Tensor, Tensor]:
    networks = make_networks(FASTGEN_STEPS)
    networks.modules["discriminator"] = MeanHeadOfStop(golden["head"])
    given = {"renoise_time": golden["t"], "renoise": golden["noise"], "r1": golden["r1"], "stop": torch.tensor(0)}
    batch = given_batch(given, golden["cond"], shared={"rollout": finished(golden["x"])})
    law = TimeSampler(low=0.02, high=1.0, ends="clamp")
    losses = [
        ADM(guidance_scale=1.0, renoise_time=law, r1_weight=weight).discriminator_loss(networks, batch).total
        for weight in (1.0, 0.0)
    ]
    penalty = losses[0] - losses[1]
    penalty.backward()
    return beside(penalty, networks["discriminator"].weight.grad, golden)  # type: ignore[arg-type]


# --- Re-DMD, and the two terms of Decoupled DMD


@comparison(
    "re_dmd_generator",
    "re_dmd",
    "gradient of the rewarded matching loss of the student",
    f"ours subtracts a running mean of the reward, here 0; {ADDED_GUIDANCE}; ends: clamp",
)
def re_dmd_generator(golden: Golden) -> tuple[Tensor, Tensor]:
    given = {"initial": golden["initial"], "renoise": golden["noise"], "stop": torch.tensor(0)}
    given["renoise_time"] = golden["drawn"].double() / 1000
    networks = make_networks(RolloutPolicy(timesteps=(1.0,)))
    reward = golden["reward"][None]
    networks.scorer = lambda *_: Score(reward, torch.ones(1, dtype=torch.bool))  # type: ignore[assignment]
    state = {"reward": torch.tensor([0.0, 1.0]), "seen": torch.zeros(2)}
    batch = given_batch(given, golden["cond"], golden["uncond"])
    objective = ReDMD(guidance_scale=4.0, renoise_time=SHIFTED)
    loss = objective.loss(Turn("student", ("student",)), networks, batch, state).total
    return gradient(networks.student, loss), golden["gradient"]


class OneStep(DMD2):
    """One step of the student to its clean prediction, from a given x_t at level 0.75."""

    def rollout(self, networks: Networks, batch: Batch, grad: bool) -> Rollout:
        x_t = batch.normal("x_t")
        t = torch.full((len(x_t),), 0.75, dtype=x_t.dtype)
        x0 = networks.student(x_t, t, batch.cond)
        return Rollout(x0, torch.zeros_like(t), torch.zeros_like(batch.ids), (Step(x_t, t, x0, x0),))


@comparison(
    "decoupled_dmd_generator",
    "dmd2",
    "ca_time: gradient of both terms, with their own levels and normalisers",
    "their losses have no half: their gradient is twice ours; their guidance is w - 1",
)
def decoupled_dmd_generator(golden: Golden) -> tuple[Tensor, Tensor]:
    names = {"renoise_time": "dm_time", "renoise": "dm_noise", "ca_noise": "ca_noise", "x_t": "x_t"}
    given = {ours: golden[theirs] for ours, theirs in names.items()} | {"ca_time": golden["ca_time"] / 0.75}
    networks = make_networks(RolloutPolicy(timesteps=(0.75,)))
    objective = OneStep(guidance_scale=4.5, renoise_time=WHOLE, ca_time=WHOLE)
    loss = objective.student_loss(networks, given_batch(given, golden["cond"], golden["uncond"])).total
    return 2 * gradient(networks.student, loss), golden["gradient"]


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


# --- implicit distribution alignment


@comparison("senseflow_ida", "dmd2", "ida_decay: the fake score's weights after a student update")
def senseflow_ida(golden: Golden) -> tuple[Tensor, Tensor]:
    networks = make_networks(DMD2_STEPS)
    DMD2(ida_decay=float(golden["decay"])).finish(Turn("student", ("student",)), networks, {})
    return torch.cat([p.detach().flatten() for p in networks.fake_score.parameters()]), golden["weights"]
