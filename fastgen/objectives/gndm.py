"""GNDM: distribution matching as a reward, normalised within prompt groups (arXiv 2603.28460).

Of the paper we know the abstract alone: R_dm as a reward, group normalisation (GNDM), other rewards (GNDMR), samples
re-used by importance sampling. Every formula here is derived, every default ours.

    paper     here                 what it is
    pi_theta  networks.student     few-step generator; its stochastic steps are Gaussian policies
    p_real    networks.teacher     frozen denoiser, guided
    p_fake    networks.fake_score  denoiser of the student's own samples, trained online as in DMD2
    R_dm      log_ratio            log p_real(x_t) - log p_fake(x_t) in nats, x renoised to levels t ~ renoise_time
    group     batch.group          group_size samples of one prompt, judged at the same levels, with the same noises
    r         networks.rewards     the recipe's rewards, one number a sample (GNDMR)

E[R_dm] is -KL(student | teacher), averaged over levels. For x_t = (1 - t) x + t eps its two gradients agree (Stein):
    E[R_dm(x_t) eps] (1 - t) / t  =  (1 - t) E[grad R_dm],      grad R_dm = s_real - s_fake, DMD's direction

form: path, after fake_updates of the fake score:
    x = rollout of the student, gradient through the last executed step;  stop, t and noise: one a group
    student <- surrogate of g = (mu_fake - mu_real) / mean_group mean|x - mu_real|  at x renoised
    With group_size 1 this is DMD2. A group's mean *vector* is never subtracted: a student off by a shift would stay.
    With rewards: g <- g - w dr/dx,   w = reward_weight |g| / |dr/dx|, averaged over past updates (decay 0.9).

form: score, after fake_updates of the fake score:
    x_1 ... x_K, x = the inputs of the K steps of the stochastic sampler, and its clean sample
    A = (R_dm - mean_group R_dm) / (std_group R_dm + std_floor)  + reward_weight times the same of r
    student <- PPO on log pi(x_k+1 | x_k), k < K, against the log-probabilities of when the trajectory was made,
               and the path form on x = f(x_K), weighted by the trajectory's likelihood ratio, at most 1 + clip
    Log-probabilities are in RTDMD's unit, 2 std^2 / d of a nat, so that steps of all levels pull alike.
    The last step, deterministic, has none. With x_K detached in both terms,
        grad E[R(x)] = E[R grad log pi(x_1 ... x_K)] + E[grad R . df/dtheta]
    so the path form supplies what the score form cannot reach. Rewards act through A alone, and need no gradient.
    With R_dm at t = 0 alone a student of two modes in two steps ended at energy distances of .06 to .22, not .01.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import torch
from accelerate.utils import reduce
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones.base import Backbone
from fastgen.batch import Batch, Conditioning
from fastgen.denoiser import NO_INPUTS, Inputs
from fastgen.networks import Networks
from fastgen.objectives import replay
from fastgen.objectives.base import Guidance, Loss, Objective, State, Turn
from fastgen.objectives.fake_score import denoising_loss, make_fake_score, stop_input
from fastgen.rollout import Rollout, RolloutPolicy, backward_simulation, draw_stops, step_log_prob, trajectory
from fastgen.schedule import PredictionType, TimeSampler, expand

FIELDS_OF_FORM = {
    "path": ("stops", "condition_on_stop"),
    "score": ("num_pairs", "std_floor", "clip", "replay_updates", "last_step_weight"),
}


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class GNDM(Objective):
    name: Literal["gndm"] = "gndm"
    form: Literal["path", "score"] = "path"
    group_size: int = Field(default=8, ge=1)
    guidance_scale: Guidance = 1.0  # this, the times and the five updates: as DMD2's
    fake_updates: int = Field(default=5, ge=1)
    renoise_time: TimeSampler = TimeSampler(low=0.02, high=0.98)
    fake_time: TimeSampler = TimeSampler(low=0.001, high=0.999)
    fake_space: PredictionType | None = None  # space of the fake score's loss; None: its own prediction type
    reward_weight: float = Field(default=0.0, ge=0)  # 0: no rewards; 1: they weigh as much as R_dm
    # form: path
    stops: Literal["shared", "per_group", "per_sample"] = "per_group"  # who shares a stop of the rollout
    condition_on_stop: bool = False  # the fake score is told the stop index, see DMD2
    # form: score
    num_pairs: int = Field(default=4, ge=1)  # (t, noise) in an estimate of R_dm
    std_floor: float = Field(default=0.1, gt=0)  # nats; below it R_dm differs by noise, not to be blown up to 1
    clip: float = Field(default=0.2, gt=0, lt=1)  # PPO's; of the ratio to the power 2 std^2 / d
    replay_updates: int = Field(default=1, ge=1)  # student updates that trajectories are used for
    last_step_weight: float = Field(default=1.0, gt=0)  # of the path form on the last step

    @model_validator(mode="after")
    def _one_form(self) -> "GNDM":
        other = "score" if self.form == "path" else "path"
        defaults = type(self).__pydantic_fields__  # type: ignore[attr-defined]
        for name in FIELDS_OF_FORM[other]:
            if getattr(self, name) != defaults[name].default:
                raise ValueError(f"{name} belongs to form: {other}; this is form: {self.form}, leave it out")
        if self.form == "score" and self.group_size == 1:
            raise ValueError("group_size: form: score compares the samples of a prompt; give at least 2")
        return self

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return ("student", "fake_score")

    @property
    def rewards_required(self) -> bool:  # type: ignore[override]
        return self.reward_weight > 0

    @property
    def reward_use(self) -> Literal["none", "score", "gradient"]:  # type: ignore[override]
        return "none" if not self.reward_weight else "gradient" if self.form == "path" else "score"

    def check(self, policy: RolloutPolicy) -> None:
        if self.form == "score" and (policy.num_steps == 1 or not policy.transition_eta):
            raise ValueError("form: score needs stochastic steps: several timesteps, transition renoise or cps")

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        return {"fake_score": make_fake_score(backbone, policy, self.condition_on_stop)}

    def init_state(self) -> State:
        """path: the reward's weight, and sums of |g|^2 and |dr/dx|^2 over this update. score: the age of the
        trajectories, which join it: replay.x [N, K, ...], .log_prob [N, K - 1], .advantage [N], .cond.<key>."""
        if self.form == "path":
            return {"reward.weight": torch.zeros(()), "reward.squares": torch.zeros(2)}
        return replay.empty()

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        return (Turn("fake_score", ("fake_score",), self.fake_updates), Turn("student", ("student",)))

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss | Iterator[Loss]:
        if turn.name == "fake_score":
            return self.fake_loss(networks, batch)
        return (self.path_loss if self.form == "path" else self.score_loss)(networks, batch, state)

    def finish(self, turn: Turn, networks: Networks, state: State) -> None:
        """After the student's step: the weight of the reward moves; trajectories age, and are dropped when used up."""
        if turn.name == "student" and self.form == "path":
            weight, (ours, rewards) = state["reward.weight"], state["reward.squares"].sqrt()
            if rewards > 0:
                now = self.reward_weight * ours / rewards
                weight.copy_(torch.where(weight > 0, 0.9 * weight + 0.1 * now, now))
            state["reward.squares"].zero_()
        elif turn.name == "student":
            replay.grow_older(state, self.replay_updates)

    def fake_loss(self, networks: Networks, batch: Batch) -> Loss:
        """Denoising of the student's samples."""
        made = self.rollout(networks, batch, grad=False)
        inputs = stop_input(made.stop, self.condition_on_stop)
        loss = denoising_loss(networks, batch, made.x, self.fake_time, self.fake_space, inputs)
        return Loss(loss, {"loss": loss.detach()})

    def path_loss(self, networks: Networks, batch: Batch, state: State) -> Loss:
        """Surrogate of the score difference, and of the reward's gradient where there are rewards."""
        made = self.rollout(networks, batch, grad=True)
        grad, terms = self.score_gradient(networks, batch, made.x, made.stop)
        if self.reward_weight:
            with torch.enable_grad():
                leaf = made.x.detach().requires_grad_()
                score = networks.rewards(leaf, batch, grad=True)
                ascent = torch.autograd.grad(score.value.sum(), leaf)[0]
            squares = torch.stack([grad.square().sum(), ascent.square().sum()]).to(state["reward.squares"])
            state["reward.squares"] += reduce(squares, "sum")
            weight = state["reward.weight"].clone()
            grad, terms = grad - weight.to(grad) * ascent, terms | score.terms() | {"reward_weight": weight}
        total = signals.surrogate(made.x, grad)
        return Loss(total, terms | {"loss": total.detach()})

    def score_loss(self, networks: Networks, batch: Batch, state: State) -> Iterator[Loss]:
        """PPO's loss for every stochastic step, and the path form on the last."""
        used, terms = self.trajectories(networks, batch, state)
        cond = {key.removeprefix("cond."): value for key, value in used.items() if key.startswith("cond.")}
        batch = dataclasses.replace(batch, cond=Conditioning(cond))
        x, last = used["x"].unbind(1), networks.policy.num_steps - 1
        total_ratio = torch.zeros_like(used["advantage"])
        for k, level in enumerate(networks.policy.timesteps):
            x0 = networks.student(x[k], x[k].new_full((len(x[k]),), level), batch.cond)
            if k == last:
                break
            log_prob = step_log_prob(networks.student.schedule, networks.policy, k, x0, x[k], x[k + 1])
            log_ratio = log_prob - used["log_prob"][:, k]
            total = signals.policy_loss(log_ratio, used["advantage"], self.clip)
            total_ratio = total_ratio + log_ratio.detach()
            yield Loss(total, {"loss": total.detach()})
        grad, more = self.score_gradient(networks, batch, x0, torch.full_like(batch.ids, last))
        importance = total_ratio.exp()
        weight = expand(importance.clamp(max=1 + self.clip), grad).to(grad)
        total = self.last_step_weight * signals.surrogate(x0, weight * grad)
        yield Loss(total, terms | more | {"loss": total.detach(), "importance": importance.mean()})

    @torch.no_grad()
    def trajectories(self, networks: Networks, batch: Batch, state: State) -> tuple[State, State]:
        """x [B, K, ...], log_prob [B, K - 1], advantage [B] and the conditioning: this batch's own, or, while they
        are replayed, its rows of the stored ones. And what is logged of new ones."""
        if not replay.is_fresh(state):
            return replay.recall(state, batch.ids), {}
        assert batch.group is not None
        made, group = trajectory(networks.student, networks.policy, batch), batch.group
        r_dm = self.log_ratio(networks, batch, made.x)
        advantage = signals.advantages(r_dm, group, floor=self.std_floor)
        spread = r_dm - signals.group_mean(r_dm, group)
        terms = {"r_dm": r_dm.mean(), "r_dm_std": spread.square().mean().sqrt()}
        if self.reward_weight:
            score = networks.rewards(made.x, batch)
            rewarded = signals.advantages(score.value, group, score.valid)
            advantage = advantage + self.reward_weight * rewarded
            terms |= score.terms() | signals.group_terms(score.own, group, score.valid, rewarded)
        log_prob = torch.stack([step.log_prob for step in made.steps if step.log_prob is not None], 1)
        new = {"x": torch.stack([step.x_t for step in made.steps], 1), "log_prob": log_prob, "advantage": advantage}
        new |= {f"cond.{key}": value for key, value in batch.cond.items()}
        if self.replay_updates > 1:
            replay.store(state, new)
        return new, terms

    @torch.no_grad()
    def log_ratio(self, networks: Networks, batch: Batch, x: Tensor) -> Tensor:
        """R_dm [B], from num_pairs draws a group of a level t, stratified over renoise_time, and of the integral of
        `signals.log_ratio_rate` from t up, at one level, log-uniform in (t, 1), with one noise."""
        total = x.new_zeros(len(x))
        for i in range(self.num_pairs):
            t = self.renoise_time((i + batch.uniform(f"ratio_from{i}", by_group=True)) / self.num_pairs)
            above = t ** batch.uniform(f"ratio_time{i}", by_group=True)
            fake, real = self.predictions(networks, batch, x, above, f"ratio_noise{i}", NO_INPUTS)
            rate = signals.log_ratio_rate(networks.teacher.schedule, x, above, fake, real)
            total = total - t.log() * above * rate / self.num_pairs  # d above = above d(log above)
        return total

    @torch.no_grad()
    def score_gradient(self, networks: Networks, batch: Batch, x: Tensor, stop: Tensor) -> tuple[Tensor, State]:
        """g at clean samples x [B, ...] made at these stops, and what is logged of it."""
        t = self.renoise_time(batch.uniform("renoise_time", by_group=True))
        inputs = stop_input(stop, self.condition_on_stop)
        fake, real = self.predictions(networks, batch, x, t, "renoise", inputs)
        grad = signals.score_difference(x, fake, real, group=batch.group)
        return grad, {"dm_grad": grad.abs().mean(), "fake_lag": signals.score_lag(x, fake, real)}

    def predictions(
        self, networks: Networks, batch: Batch, x: Tensor, t: Tensor, noise: str, inputs: Inputs
    ) -> tuple[Tensor, Tensor]:
        """mu_fake and the guided mu_real at x renoised, with one noise of this name a group."""
        x_t = networks.teacher.schedule.add_noise(x, batch.normal(noise, by_group=True), t)
        scale = networks.teacher.per_expert(self.guidance_scale, t)
        real = signals.guided(networks.teacher, x_t, t, batch.cond, batch.uncond, scale)
        return networks.fake_score(x_t, t, batch.cond, inputs), real

    def rollout(self, networks: Networks, batch: Batch, grad: bool) -> Rollout:
        """path: a sample at a random stop. score: one of the whole sampler."""
        stop = draw_stops(batch, networks.policy.num_steps, self.stops == "shared", self.stops == "per_group")
        if self.form == "score":
            stop = torch.full_like(stop, networks.policy.num_steps - 1)
        return backward_simulation(networks.student, networks.policy, batch, stop, grad)
