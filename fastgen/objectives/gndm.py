"""GNDM: distribution matching as a reward, normalised within prompt groups (arXiv 2603.28460).

We know only the abstract of the paper: R_dm as a reward, group normalisation (GNDM), other rewards (GNDMR), and
samples that are reused by importance sampling. Every formula here is derived, and every default is ours: nothing
public pins them. docs/faithfulness.md has rows for the log-probability, the advantages and the clipped loss it calls.

    paper     here                 what it is
    pi_theta  networks.student     few-step generator; its stochastic steps are Gaussian policies
    p_real    networks.teacher     frozen denoiser, guided
    p_fake    networks.fake_score  denoiser of the student's own samples, trained online as in DMD2
    R_dm      log_ratio            log p_real(x_t) - log p_fake(x_t) in nats, x renoised to levels t ~ renoise_time
    group     batch.group          group_size samples of one prompt, evaluated at the same levels with the same noises
    r         networks.rewards     the recipe's rewards, one number per sample (GNDMR)

E[R_dm] is -KL(student | teacher), averaged over levels. For x_t = (1 - t) x + t eps its two gradients agree (Stein):
    E[R_dm(x_t) eps] (1 - t) / t  =  (1 - t) E[grad R_dm],      grad R_dm = s_real - s_fake, DMD's direction

form: path, after fake_updates updates of the fake score:
    x = rollout of the student, with gradient through the last executed step;  one stop, t and noise per group
    student <- surrogate of g = (mu_fake - mu_real) / mean_group mean|x - mu_real|  at x renoised
    With group_size 1 this is DMD2. The mean *vector* of a group is never subtracted, because then a student that is
    off by a shift would receive no gradient.
    With rewards: g <- g - w dr/dx,   w = reward_weight |g| / |dr/dx|, averaged over past updates (decay 0.9).

form: score, after fake_updates updates of the fake score:
    x_1 ... x_K are the inputs of the K steps of the stochastic sampler, and x is its clean sample
    A = (R_dm - mean_group R_dm) / (std_group R_dm + std_floor)  + reward_weight times the same expression for r
    student <- PPO on log pi(x_k+1 | x_k), k < K, against the log-probabilities recorded with the trajectory,
               and the path form on x = f(x_K), weighted by the trajectory's likelihood ratio, at most 1 + clip
    Log-probabilities are in RTDMD's unit, 2 std^2 / d of a nat, so that steps at all levels have a similar influence.
    The last step is deterministic and has no log-probability. With x_K detached in both terms,
        grad E[R(x)] = E[R grad log pi(x_1 ... x_K)] + E[grad R . df/dtheta]
    so the path form supplies the part of the gradient that the score form cannot. Rewards act through A alone, and
    need no gradient. With R_dm at t = 0 alone, a student of two modes in two steps ended at energy distances of .06 to
    .22 instead of .01.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.denoiser import NO_INPUTS, Inputs
from fastgen.modules.expert_levels import draw_levels
from fastgen.modules.processes import summed
from fastgen.networks import Networks
from fastgen.objectives import replay
from fastgen.objectives.base import Guidance, Loss, Objective, State, Turn
from fastgen.objectives.fake_score import denoising_loss, make_fake_score, stop_input
from fastgen.recipe import Recipe
from fastgen.registry import MOST_BATCH, MOST_STEPS
from fastgen.rollout import Rollout, RolloutPolicy, backward_simulation, draw_stops, step_log_prob, trajectory
from fastgen.schedule import PredictionType, TimeSampler, expand

FIELDS_OF_FORM = {
    "path": ("stops", "condition_on_stop"),
    "score": ("num_pairs", "std_floor", "clip", "replay_updates", "last_step_weight"),
}


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class GNDM(Objective):
    examples = ({}, {"reward_weight": 1.0}, {"reward_weight": 1.0, "form": "score"})
    page = "docs/rewards.md"
    name: Literal["gndm"] = "gndm"
    form: Literal["path", "score"] = "path"
    group_size: int = Field(default=8, ge=1, le=MOST_BATCH)
    guidance_scale: Guidance = 1.0  # this and the next three defaults are as in DMD2
    fake_updates: int = Field(default=5, ge=1, le=MOST_STEPS)
    # the fake updates of a student update share one rollout, where rollouts are what takes the time; ours
    share_rollout: bool = False
    renoise_time: TimeSampler = TimeSampler(low=0.02, high=0.98)
    fake_time: TimeSampler = TimeSampler(low=0.001, high=0.999)
    fake_space: PredictionType | None = None  # the space of the fake score's loss; None: its own prediction type
    reward_weight: float = Field(default=0.0, ge=0)  # 0: no rewards; 1: as much weight as R_dm
    # form: path
    stops: Literal["shared", "per_group", "per_sample"] = "per_group"  # which samples share a stop of the rollout
    condition_on_stop: bool = False  # conditions the fake score on the stop index, see dmd2.py
    # form: score
    num_pairs: int = Field(default=4, ge=1, le=MOST_STEPS)  # number of (t, noise) in an estimate of R_dm
    std_floor: float = Field(default=0.1, gt=0)  # nats; a smaller spread of R_dm is noise, and is not scaled up to 1
    clip: float = Field(default=0.2, gt=0, lt=1)  # PPO's clip, of the likelihood ratio to the power 2 std^2 / d
    replay_updates: int = Field(default=1, ge=1, le=MOST_STEPS)  # number of student updates that use each trajectory
    last_step_weight: float = Field(default=1.0, gt=0)  # weight of the path form on the last step

    @model_validator(mode="after")
    def _one_form(self) -> "GNDM":
        other = "score" if self.form == "path" else "path"
        defaults = type(self).__pydantic_fields__  # type: ignore[attr-defined]
        for name in FIELDS_OF_FORM[other]:
            if getattr(self, name) != defaults[name].default:
                raise ValueError(f"{name} belongs to form: {other}, and this is form: {self.form}; leave {name} out")
        if self.form == "score" and self.group_size == 1:
            raise ValueError("group_size: form: score compares the samples of one prompt; give at least 2")
        return self

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return ("student", "fake_score")

    @property
    def rewards_required(self) -> bool:  # type: ignore[override]
        return self.reward_weight > 0

    @property
    def reward_use(self) -> Literal["none", "score", "gradient"]:  # type: ignore[override]
        if not self.reward_weight:
            return "none"
        return "gradient" if self.form == "path" else "score"

    @property
    def takes_chunks(self) -> bool:  # type: ignore[override]
        return self.form == "path"

    @property
    def needs_whole_videos(self) -> str:  # type: ignore[override]
        return "form: score replays the steps of whole videos, without the frames that a chunk was given"

    @property
    def takes_first_timesteps(self) -> bool:
        return not self.condition_on_stop

    def check(self, policy: RolloutPolicy) -> None:
        if self.form == "score" and (policy.num_steps == 1 or not policy.transition_eta):
            raise ValueError("form: score needs stochastic steps: several timesteps, transition renoise or cps")

    def check_recipe(self, recipe: Recipe) -> None:
        if recipe.data.sizes and self.replay_updates > 1:
            raise ValueError(
                "replay_updates: trajectories are replayed in updates whose pictures have other sizes (data.buckets); "
                "set it to 1, or leave out the buckets"
            )

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        return {"fake_score": make_fake_score(backbone, policy, self.condition_on_stop)}

    def init_state(self) -> State:
        """path: the reward's weight w, and the sums of |g|^2 and |dr/dx|^2 over this update.

        score: the age of the trajectories. `trajectories` adds replay.x [N, K, ...], replay.log_prob [N, K - 1],
        replay.advantage [N], replay.cond.<key> and replay.uncond.<key>."""
        if self.form == "path":
            return {"reward.weight": torch.zeros(()), "reward.squares": torch.zeros(2)}
        return replay.empty()

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        fake_turn = Turn("fake_score", ("fake_score",), self.fake_updates, one_rollout=self.share_rollout)
        return (fake_turn, Turn("student", ("student",)))

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss | Iterator[Loss]:
        if turn.name == "fake_score":
            return self.fake_loss(networks, batch)
        if self.form == "path":
            return self.path_loss(networks, batch, state)
        return self.score_loss(networks, batch, state)

    def finish(self, turn: Turn, networks: Networks, state: State) -> None:
        """After the student's step: updates the reward's weight, or counts one use of the trajectories."""
        if turn.name != "student":
            return
        if self.form == "score":
            replay.count_use(state, self.replay_updates)
            return
        weight = state["reward.weight"]
        matching_norm, reward_norm = state["reward.squares"].sqrt()
        if reward_norm > 0:
            current = self.reward_weight * matching_norm / reward_norm
            weight.copy_(torch.where(weight > 0, 0.9 * weight + 0.1 * current, current))
        state["reward.squares"].zero_()

    def fake_loss(self, networks: Networks, batch: Batch) -> Loss:
        """The denoising loss on the student's samples."""
        rollout = self.rollout(networks, batch, grad=False)
        inputs = stop_input(rollout.stop, self.condition_on_stop)
        loss = denoising_loss(networks, batch, rollout.x, self.fake_time, self.fake_space, inputs)
        return Loss(loss, {"loss": loss.detach()})

    def path_loss(self, networks: Networks, batch: Batch, state: State) -> Loss:
        """The surrogate of the score difference and, where there are rewards, of the reward's gradient."""
        rollout = self.rollout(networks, batch, grad=True)
        grad, terms = self.score_gradient(networks, batch, rollout.x, rollout.stop)
        if self.reward_weight:
            with torch.enable_grad():
                x = rollout.x.detach().requires_grad_()
                score = networks.rewards(x, batch, grad=True)
                reward_grad = torch.autograd.grad(score.value.sum(), x)[0]
            squares = torch.stack([grad.square().sum(), reward_grad.square().sum()]).to(state["reward.squares"])
            state["reward.squares"] += summed(squares)
            weight = state["reward.weight"].clone()
            grad = grad - weight.to(grad) * reward_grad
            terms = terms | score.terms() | {"reward_weight": weight}
        total = signals.surrogate(rollout.x, grad)
        return Loss(total, terms | {"loss": total.detach()})

    def score_loss(self, networks: Networks, batch: Batch, state: State) -> Iterator[Loss]:
        """PPO's loss for every stochastic step, then the path form on the last step."""
        paths, path_terms = self.trajectories(networks, batch, state)
        batch = replay.conditioned(batch, paths)
        x = paths["x"].unbind(1)
        last = networks.policy.num_steps - 1
        total_log_ratio = torch.zeros_like(paths["advantage"])
        for k, level in enumerate(networks.policy.timesteps):
            x0 = networks.student(x[k], x[k].new_full((len(x[k]),), level), batch.cond)
            if k == last:
                break
            log_prob = step_log_prob(networks.student.schedule, networks.policy, k, x0, x[k], x[k + 1])
            log_ratio = log_prob - paths["log_prob"][:, k]
            total = signals.policy_loss(log_ratio, paths["advantage"], self.clip, paths["advantage"].new_ones(()))
            total_log_ratio = total_log_ratio + log_ratio.detach()
            yield Loss(total, {"loss": total.detach()})
        grad, grad_terms = self.score_gradient(networks, batch, x0, torch.full_like(batch.ids, last))
        importance = total_log_ratio.exp()
        weight = expand(importance.clamp(max=1 + self.clip), grad).to(grad)
        total = self.last_step_weight * signals.surrogate(x0, weight * grad)
        yield Loss(total, path_terms | grad_terms | {"loss": total.detach(), "importance": importance.mean()})

    @torch.no_grad()
    def trajectories(self, networks: Networks, batch: Batch, state: State) -> tuple[State, State]:
        """The trajectories of this micro-batch, and the terms to log for new ones.

        A trajectory is x [B, K, ...], log_prob [B, K - 1], advantage [B] and its conditionings, cond.<key> and
        uncond.<key>. New ones are made with this batch; while trajectories are replayed, the stored rows of this
        batch's ids are returned."""
        if not replay.needs_samples(state):
            return replay.recall(state, batch.ids), {}
        assert batch.group is not None
        group = batch.group
        rollout = trajectory(networks.student, networks.policy, batch)
        r_dm = self.log_ratio(networks, batch, rollout.x)
        advantage = signals.advantages(r_dm, group, floor=self.std_floor)
        spread = r_dm - signals.group_mean(r_dm, group)
        terms = {"r_dm": r_dm.mean(), "r_dm_std": spread.square().mean().sqrt()}
        if self.reward_weight:
            score = networks.rewards(rollout.x, batch)
            reward_advantage = signals.advantages(score.value, group, score.valid)
            advantage = advantage + self.reward_weight * reward_advantage
            terms |= score.terms() | signals.group_terms(score.own, group, score.valid, reward_advantage)
        paths = {
            "x": torch.stack([step.x_t for step in rollout.steps], 1),
            "log_prob": torch.stack([step.log_prob for step in rollout.steps if step.log_prob is not None], 1),
            "advantage": advantage,
        }
        paths |= replay.conditioning(batch)
        if self.replay_updates > 1:
            replay.store(state, paths)
        return paths, terms

    def log_ratio(self, networks: Networks, batch: Batch, x: Tensor) -> Tensor:
        """An estimate of R_dm [B], the mean over num_pairs pairs of draws that a group shares.

        The first draw of a pair is the level t of R_dm, stratified over renoise_time. R_dm at t is the integral of
        `signals.log_ratio_rate` from t to 1. It is estimated at one level, log-uniform in (t, 1), with one noise."""
        total = x.new_zeros(len(x))
        for i in range(self.num_pairs):
            t = self.renoise_time((i + batch.uniform(f"ratio_from{i}", by_group=True)) / self.num_pairs)
            level = t ** batch.uniform(f"ratio_time{i}", by_group=True)
            fake, real = self.predictions(networks, batch, x, level, f"ratio_noise{i}", NO_INPUTS)
            rate = signals.log_ratio_rate(networks.teacher.schedule, x, level, fake, real)
            total = total - t.log() * level * rate / self.num_pairs  # d level = level d(log level)
        return total

    @torch.no_grad()
    def score_gradient(self, networks: Networks, batch: Batch, x: Tensor, stop: Tensor) -> tuple[Tensor, State]:
        """g [B, ...] at clean samples x that were made at these stops [B], and the terms to log."""
        t = draw_levels(batch, "renoise_time", self.renoise_time, networks.teacher, by_group=True)
        inputs = stop_input(stop, self.condition_on_stop)
        fake, real = self.predictions(networks, batch, x, t, "renoise", inputs)
        grad = signals.score_difference(x, fake, real, group=batch.group)
        return grad, {"dm_grad": grad.abs().mean()} | signals.lag_terms(x, fake, real)

    def predictions(
        self, networks: Networks, batch: Batch, x: Tensor, t: Tensor, noise: str, inputs: Inputs
    ) -> tuple[Tensor, Tensor]:
        """mu_fake and the guided mu_real at x renoised to t, with one noise of this name per group."""
        x_t = networks.teacher.schedule.add_noise(x, batch.normal(noise, by_group=True), t)
        scale = networks.teacher.per_expert(self.guidance_scale, t)
        real = signals.guided(networks.teacher, x_t, t, batch.cond, batch.uncond, scale)
        return networks.fake_score(x_t, t, batch.cond, inputs), real

    def rollout(self, networks: Networks, batch: Batch, grad: bool) -> Rollout:
        """Samples of the student. path: at random stops. score: of the whole sampler."""
        stop = draw_stops(batch, networks.policy.num_steps, self.stops == "shared", self.stops == "per_group")
        if self.form == "score":
            stop = torch.full_like(stop, networks.policy.num_steps - 1)
        return backward_simulation(networks.student, networks.policy, batch, stop, grad)
