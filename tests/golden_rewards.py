"""Rewards and policy gradients beside the code of Flow-GRPO, RTDMD, Flow-Factory (CRD) and Reward Forcing (Re-DMD)."""

import math
from functools import partial
from typing import Any

import torch
from golden_rows import Golden, GoldenDenoiser, GoldenNetwork, comparison, given_batch
from torch import Tensor

from fastgen import signals
from fastgen.networks import Networks
from fastgen.objectives import CRD, RTDMD, Loss, ReDMD, Turn
from fastgen.rewards import Composite, Score, Scorer, images, qwen
from fastgen.rewards.function import FunctionReward
from fastgen.rollout import Rollout, RolloutPolicy, Step, step_log_prob, transition
from fastgen.schedule import FlowSchedule, TimeSampler

FLOW = FlowSchedule()
POLICY = RolloutPolicy((1.0, 0.9, 0.75, 0.5), "cps", 0.9)
STUDENT, FAKE = Turn("student", ("student",)), Turn("fake_score", ("fake_score",))


def flat(*parts: Tensor) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def gradient(value: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(value, leaf)[0]


# --- Flow-GRPO


@comparison(
    "flow_grpo_log_prob",
    "rtdmd, gndm",
    "log-probability of an SDE step, and its gradient",
    "`transition_log_prob(scaled=True)` leaves out what depends on std alone, which the comparison adds",
)
def flow_grpo_log_prob(golden: Golden) -> tuple[Tensor, Tensor]:
    mean, std = golden["mean"].requires_grad_(), golden["std"]
    log_prob = signals.transition_log_prob(golden["x_next"], mean, std, "mean", scaled=True)
    whole = log_prob - std.flatten().log() - 0.5 * math.log(2 * math.pi)
    return flat(whole, gradient(log_prob.sum(), mean)), flat(golden["log_prob"], golden["grad"])


@comparison(
    "flow_grpo_advantages_batch", "rtdmd, crd", "advantages with the standard deviation of the batch (std: batch)"
)
def flow_grpo_advantages_batch(golden: Golden) -> tuple[Tensor, Tensor]:
    return signals.advantages(golden["reward"], golden["group"], std="batch"), golden["advantage"]


@comparison(
    "flow_grpo_advantages_group", "gndm, crd", "advantages with the standard deviation of the group (std: group)"
)
def flow_grpo_advantages_group(golden: Golden) -> tuple[Tensor, Tensor]:
    return signals.advantages(golden["reward"], golden["group"], std="group"), golden["advantage"]


@comparison("flow_grpo_policy_loss", "rtdmd, gndm", "clipped loss of a step, and its gradient")
def flow_grpo_policy_loss(golden: Golden) -> tuple[Tensor, Tensor]:
    log_ratio = golden["log_ratio"].requires_grad_()
    loss = signals.policy_loss(log_ratio, golden["advantage"].clamp(-5, 5), 1e-4)
    return flat(loss, gradient(loss, log_ratio)), flat(golden["loss"], golden["grad"])


# --- RTDMD


@comparison(
    "rtdmd_cps_step",
    "rtdmd",
    "a CPS step, its log-probability (log_prob: mean_square), and its gradient",
)
def rtdmd_cps_step(golden: Golden) -> tuple[Tensor, Tensor]:
    x_t, t, t_next, velocity = golden["x_t"], golden["t"], golden["t_next"], golden["velocity"].requires_grad_()
    x0 = FLOW.to_sample(velocity, x_t, t, "flow_prediction")
    x_next = transition(FLOW, x0, x_t, t, t_next, golden["noise"], 0.9)
    log_prob = torch.cat(
        [step_log_prob(FLOW, POLICY, i, x0[i : i + 1], x_t[i : i + 1], golden["seen"][i : i + 1]) for i in range(3)]
    )
    ours = flat(x_next, log_prob, gradient(log_prob.sum(), velocity))
    return ours, flat(golden["x_next"], golden["log_prob"], golden["grad"])


@comparison(
    "rtdmd_advantages",
    "rtdmd",
    "GDPO's advantages of two rewards with weights 1 and 2.5 (std: batch)",
    "ours are clipped here, theirs in the loss; the comparison clips theirs",
)
def rtdmd_advantages(golden: Golden) -> tuple[Tensor, Tensor]:
    parts = {"a": golden["reward_a"], "b": golden["reward_b"]}
    valid = torch.ones_like(golden["group"], dtype=torch.bool)
    ours = signals.gdpo_advantages(parts, {"a": 1.0, "b": 2.5}, golden["group"], valid)
    assert golden["advantage"].abs().max() > 5
    return ours, golden["advantage"].clamp(-5, 5)


def networks(*rewards: Any) -> Networks:
    """The student, the fake score and the teacher of tools/golden/rtdmd.py, in its order of seeds."""
    roles = {
        name: GoldenDenoiser(GoldenNetwork(seed)) for seed, name in enumerate(("student", "fake_score", "teacher"))
    }
    scorer = Scorer(Composite(rewards), lambda x, clamp=True: x) if rewards else None
    return Networks(dict(roles), POLICY, scorer)


def stage_1(golden: Golden, turn: Turn) -> tuple[Tensor, Tensor]:
    made = networks()
    given = {name: golden[name] for name in golden.tensors}
    given |= {"renoise_time": golden["u"], "fake_time": golden["u"], "fake_noise": golden["renoise"]}
    given |= {"consistency_step": (golden["steps"].double() / 1000 - 0.001) / 0.199}
    loss = RTDMD().loss(turn, made, given_batch(given, golden["cond"]), {})
    assert isinstance(loss, Loss)
    loss.total.backward()
    return made[turn.name].network.flat(), golden["grad"]  # type: ignore[operator, union-attr]


@comparison("rtdmd_stage_1_student", "rtdmd", "stage 1, AC-DMD: gradient of the student at s = 0.5, guidance 7")
def rtdmd_stage_1_student(golden: Golden) -> tuple[Tensor, Tensor]:
    return stage_1(golden, STUDENT)


@comparison("rtdmd_stage_1_fake", "rtdmd", "stage 1: gradient of the fake score, with the consistency term")
def rtdmd_stage_1_fake(golden: Golden) -> tuple[Tensor, Tensor]:
    return stage_1(golden, FAKE)


def two_rewards(x: Tensor, _: Any) -> Tensor:
    return 3 + 1.5 * x.flatten(1)[:, 0] - x.square().flatten(1).mean(1)


@comparison(
    "rtdmd_stage_2_student",
    "rtdmd",
    "stage 2: gradient of PPO at two steps, matching and reward at the last, with all published weights",
    "ours is the sum over the steps that are trained, theirs the mean: a factor of 3",
)
def rtdmd_stage_2_student(golden: Golden) -> tuple[Tensor, Tensor]:
    objective, made = (
        RTDMD(stage=2),
        networks(FunctionReward(function=two_rewards, input="points", differentiable=True)),
    )
    given = {"renoise_time": golden["u"], "renoise": golden["renoise"], "back": golden["back"]}
    given["exit"] = golden["renoise"]  # the last step has no noise
    batch = given_batch(given, golden["cond"], prompts=("",) * len(golden["cond"]))
    levels = golden["u"].new_tensor((*POLICY.timesteps, 0.0)).expand(len(batch.ids), 5).unbind(1)
    x, x_next, v_old = (golden[name].unbind(1) for name in ("x", "x_next", "v_old"))
    x0 = [FLOW.to_sample(v, x_t, t, "flow_prediction") for v, x_t, t in zip(v_old, x, levels, strict=False)]
    steps = tuple(Step(*step) for step in zip(x, levels, x0, x_next, strict=False))
    rollout = Rollout(x0[3], levels[4], batch.ids, steps)
    advantage = golden["advantage"].clamp(-5, 5)
    for i in (0, 2):
        objective.policy_step_loss(made, batch, steps[i], levels[i + 1], advantage).total.backward()
    network = made.student.network
    policy = network.flat().clone()  # type: ignore[operator]
    step = partial(objective.repeat_step, made, batch, rollout)
    objective.matching_and_reward_loss(made, batch, step).total.backward()
    whole = network.flat()  # type: ignore[operator]
    last, theirs = golden["grad_last"].norm(), golden["grad"].norm()
    return flat(whole / 3 / theirs, (whole - policy) / last), flat(golden["grad"] / theirs, golden["grad_last"] / last)


@comparison("rtdmd_stage_2_fake", "rtdmd", "stage 2: gradient of the fake score at the last step")
def rtdmd_stage_2_fake(golden: Golden) -> tuple[Tensor, Tensor]:
    made, x0 = networks(), golden["x0"]
    given = {name: golden[name] for name in ("fake_noise", "consistency1", "consistency2")}
    given |= {"fake_time": golden["u"], "consistency_step": (golden["steps"].double() / 1000 - 0.001) / 0.199}
    ids = torch.arange(len(x0))
    rollout = Rollout(x0, torch.zeros_like(golden["u"]), torch.full_like(ids, 3), ())
    batch = given_batch(given, golden["cond"], shared={"rollout": rollout})
    RTDMD(stage=2).fake_loss(made, batch).total.backward()
    return made.fake_score.network.flat(), golden["grad"]  # type: ignore[operator]


# --- CRD


def crd_update(golden: Golden, objective: CRD) -> tuple[Tensor, Tensor]:
    """One prompt's samples at the level 0.6, of a student that samples there."""
    seeds = {"student": 0, "reference": 1, "teacher": 2}
    roles = {name: GoldenDenoiser(GoldenNetwork(seed)) for name, seed in seeds.items()}
    made = Networks(dict(roles), RolloutPolicy((1.0, 0.6), "ode"))
    advantage = golden["advantage"]
    assert advantage.abs().max() > 5
    cond = golden["cond"].expand(len(advantage), 4)
    batch = given_batch(
        {"levelx": torch.full_like(advantage, 0.5), "noisex": golden["noise"]}, cond, group=torch.zeros_like(advantage)
    )
    score = Score(advantage, torch.ones_like(advantage, dtype=torch.bool))
    clipped = advantage.clamp(-objective.clip, objective.clip)
    loss = objective.draw_loss(made, batch, golden["x0"], clipped, score, 0.6, "x")
    loss.total.backward()
    return flat(loss.total, roles["student"].network.flat()), flat(golden["loss"], golden["grad"])  # type: ignore[operator]


@comparison("crd_update", "crd", "loss and gradient of a draw with all defaults, guided and adaptive anchor")
def crd_update_default(golden: Golden) -> tuple[Tensor, Tensor]:
    return crd_update(golden, CRD())


@comparison("crd_update_temperature", "crd", "the same with centring weights softmax(+-R / 0.5)")
def crd_update_temperature(golden: Golden) -> tuple[Tensor, Tensor]:
    return crd_update(golden, CRD(temperature=0.5))


@comparison(
    "crd_update_bce", "crd", "the same with loss_type: bce, beta 0.5, w = 1 and an anchor that is not adaptive"
)
def crd_update_bce(golden: Golden) -> tuple[Tensor, Tensor]:
    return crd_update(golden, CRD(loss_type="bce", beta=0.5, self_normalised=False, anchor_floor=1.0))


@comparison("crd_decays", "crd", "the decays of reference and sampler at update 1 to 400")
def crd_decays(golden: Golden) -> tuple[Tensor, Tensor]:
    objective = CRD()
    decays = (objective.reference_decay, objective.sampler_decay)
    ours = [[decay(int(n)) for n in golden["steps"]] for decay in decays]
    return torch.tensor(ours, dtype=torch.float64).flatten(), flat(golden["reference"], golden["sampler"])


FLOOR = "ours adds Flow-GRPO's 1e-4 to the standard deviation, which the comparison sets to 0"


@comparison("crd_advantages_batch", "crd", "advantages of Flow-Factory's recipe for SD3.5 (std: batch)", FLOOR)
def crd_advantages_batch(golden: Golden) -> tuple[Tensor, Tensor]:
    ours = signals.advantages(golden["reward"], golden["group"], std="batch", clip=math.inf, floor=0.0)
    return ours, golden["advantage"]


@comparison(
    "crd_advantages_group", "crd", "advantages of Flow-Factory's default, gdpo, for one reward (std: group)", FLOOR
)
def crd_advantages_group(golden: Golden) -> tuple[Tensor, Tensor]:
    ours = signals.advantages(golden["reward"], golden["group"], std="group", clip=math.inf, floor=0.0)
    return ours, golden["advantage"]


# --- Re-DMD


@comparison(
    "re_dmd_student",
    "re_dmd",
    "gradient of the student for one video, weight exp(2 r)",
    "guidance 3 of cond + s (cond - uncond) is 4 here; the running mean of r, which is ours, is set to 0",
)
def re_dmd_student(golden: Golden) -> tuple[Tensor, Tensor]:
    objective = ReDMD(guidance_scale=4.0, renoise_time=TimeSampler(low=0.0, high=1.0))
    roles = {
        name: GoldenDenoiser(GoldenNetwork(seed)) for seed, name in enumerate(("student", "fake_score", "teacher"))
    }
    motion = FunctionReward(function=lambda x, _: x.flatten(1)[:, 0], input="points", differentiable=False)
    made = Networks(dict(roles), RolloutPolicy((1.0,)), Scorer(Composite((motion,)), lambda x, clamp=True: x))
    given = {"initial": golden["initial"], "renoise": golden["renoise"], "renoise_time": golden["level"]}
    batch = given_batch({**given, "stop": torch.tensor(0)}, golden["cond"], prompts=("",))
    state = {"reward": torch.tensor([0.0, 1.0]), "seen": torch.zeros(2)}
    objective.loss(STUDENT, made, batch, state).total.backward()
    return roles["student"].network.flat(), golden["grad"]  # type: ignore[operator]


# --- scorers


@comparison("hpsv2_input", "rewards", "HPSv2's input: resize of the longer side, padding, normalisation")
def hpsv2_input(golden: Golden) -> tuple[Tensor, Tensor]:
    ours = [images.normalise(images.longest_side_padded(golden[name], 14)) for name in ("tall", "wide")]
    return flat(*ours), flat(golden["tall_input"], golden["wide_input"])


@comparison("judge_sizes", "rewards", "the size at which hpsv3's and video_reward's Qwen2-VL sees a picture")
def judge_sizes(golden: Golden) -> tuple[Tensor, Tensor]:
    ours = [qwen.smart_size(int(h), int(w), 16 * 28**2, 256 * 28**2) for h, w in golden["sizes"]]
    return torch.tensor(ours), golden["resized"]
