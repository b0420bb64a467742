"""RTDMD: Reward-Tilted Distribution Matching Distillation                            (arXiv 2605.26108, and its code).

Stage 1 is AC-DMD (ac_dmd.py, whose symbols are used here): a few-step student with stochastic steps, without rewards.
Stage 2 starts from stage 1 by `init_from`, which also takes over the fake score, and adds the reward:

    paper            here              what it is
    pi(x' | x)       transition_law    a stochastic step, a Gaussian; the last step is deterministic and has no density
    K                group_size        samples per prompt
    m                selected_steps    stochastic steps that the policy gradient trains in an update (SubGRPO)
    A                advantage         rewards compared within their group, each reward standardised by itself (GDPO),
                                       over all samples of the update, from all micro-batches and processes
    r_k, w_k         rewards.parts     rewards and their weights

The algorithm, for every student update:
    fake_updates times (1 in this stage):
        fake_score <- as in stage 1, on rollouts of the current student
    once:
        make trajectories of K samples per prompt, without gradient, for all micro-batches, and their rewards. On steps
        that are not selected the samples of a group share their noise, so that the spread of a group's rewards comes
        from the selected steps (and from the initial noise, which is not shared)
        for every selected step: student <- PPO's loss of the step's log-probability with A
        student    <- dm_weight (stage 1's surrogate) + reward_weight mean ReLU(reward_hinge - sum_k w_k r_k(x_0)),
                      x_0 the deterministic last step from a detached x_t; only differentiable rewards r_k are used
    These losses are added. The released code takes their mean over the m + 1 steps that are trained, and leaves
    samples without an advantage out of the last line, too.

The two reward terms together are one gradient (hybrid identity, derived): for x_1 = mu(x_2) + rho eps, x_0 = f(x_1),
    grad E r(x_0) = E[r grad log pi(x_1 | x_2)] + E[grad r . grad_theta f(sg x_1)]
As published, the two terms have different scales: A is standardised, and the log-probability is a mean over elements
without its factor 1 / (2 rho^2). For the gradient of E r itself set normalise_advantages: false, log_prob: nats and
policy_weight equal to reward_weight, and select every stochastic step.

What it converges to (derived). The tilt p exp(r / beta) minimises KL - E r / beta at t = 0, but the matching term
averages over levels. With normalise: false and data in D dimensions the last step's output minimises
    E_t[(sigma_t / alpha_t)^2 KL_t] - E[r] / beta,   1 / beta = D reward_weight / dm_weight
Where `stops` draws one of several steps, 1 / beta is multiplied by the number of steps. For N(m, S) and r = a . x the
minimum is a Gaussian with the mean
    m + a / (beta E_t[rho_t]),   rho_t = sigma_t^2 / (alpha_t^2 S + sigma_t^2)
whereas the tilt has the mean m + S a / beta. `critic_weight: inverse_tilt` (stage 1) reaches p exp(r / beta) itself.

A student that makes videos chunk by chunk trains in stage 2 with selected_steps: 0. The reward of the whole video then
acts through the last step of each chunk, and not through the context on later chunks, as everywhere in Self Forcing.
For a student that sees its whole past and can be any function of what it is given, this leaves the minimum where it is
(derived): a later chunk changes with an earlier one by a function of what its own step is given, and given that, the
mean of its own gradient is 0 at a stationary point.

With stops: last, as published, the matching term constrains only the last step. The policy gradient moves the earlier
steps for as long as that raises the reward; only a small learning rate and the shared weights limit this. Our recipes
set stops: per_sample, and more updates of the fake score, which then has to know all steps.

std: batch, the released code's, divides each reward by its standard deviation over the whole update, with the
differences between prompts, so that a reward whose mean varies from prompt to prompt has less influence than its
weight says. It is the default because the other published numbers are for it. within_groups (ours) divides by the
standard deviation of what is compared, r - mean_g r: equal weights are equal influence, and a function of the prompt
that is added to a reward changes nothing.

An update makes one optimizer step from its own samples. PPO's ratio is therefore 1 and its clip has no effect, unless
the two forward passes of a step differ. `log_ratio` logs by how much they differ.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen import signals
from fastgen.batch import Batch
from fastgen.networks import Networks
from fastgen.objectives import collected
from fastgen.objectives.ac_dmd import ACDMD
from fastgen.objectives.base import Loss, State, Turn
from fastgen.registry import MOST_BATCH, MOST_STEPS
from fastgen.rewards import Score
from fastgen.rollout import (
    Rollout,
    RolloutPolicy,
    Step,
    backward_simulation,
    next_levels,
    predict_x0,
    step_to,
    trajectory,
    transition_law,
)

STAGE_2 = (
    "selected_steps",
    "policy_weight",
    "log_prob",
    "ratio_clip",
    "advantage_clip",
    "normalise_advantages",
    "std",
    "dm_weight",
    "reward_weight",
    "reward_hinge",
)


STAGE_2_DEFAULTS = {"fake_updates": 1, "stops": "last", "group_size": 16}  # the released code's configs/rtdmd
TRAJECTORIES = "trajectories"  # in Batch.shared
NOTHING: Mapping[str, Tensor] = {}


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class RTDMD(ACDMD):
    examples = ({}, {"stage": 2}, {"critic_weight": "inverse_tilt", "reward_temperature": 1.0})
    page = "docs/rewards.md"
    name: Literal["rtdmd"] = "rtdmd"
    stage: Literal[1, 2] = 1
    group_size: int = Field(default=1, ge=1, le=MOST_BATCH)  # K; 16 in stage 2
    # The next weights are the released code's, for losses that are means over samples and elements (the matching term
    # with its factor 1/2), and for log-probabilities that are -mean|x - mu|^2. Golden row: rtdmd_stage_2_student
    selected_steps: int = Field(default=2, ge=0, le=MOST_STEPS)  # m; the paper: 2 of the three stochastic steps
    policy_weight: float = Field(default=1.0, ge=0)
    log_prob: Literal["mean_square", "nats"] = "mean_square"  # the released code's unit; nats: the true one (ours)
    ratio_clip: float = Field(default=1e-5, gt=0)  # PPO's clip, for ratios in the unit of log_prob
    advantage_clip: float = Field(default=5.0, gt=0)  # in standard deviations; golden row: rtdmd_advantages
    normalise_advantages: bool = True  # false: the reward minus the mean of the group's other samples (ours)
    # what each reward is divided by, see `signals.gdpo_advantages`: batch is the released code's, within_groups ours
    std: Literal["batch", "within_groups"] = "batch"
    dm_weight: float = Field(default=1e-3, gt=0)
    reward_weight: float = Field(default=1e-4, ge=0)  # weight of the reward's gradient through the last step
    # sum_k w_k r_k above this has no gradient. The released code's, for rewards in its units (CLIP and HPSv2 cosines,
    # PickScore / 26), weights 1. null: no hinge (ours)
    reward_hinge: float | None = 3.0

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, given: Any) -> Any:
        """Stage 2 has some defaults of its own."""
        values = given if isinstance(given, dict) else given.kwargs or {}
        return STAGE_2_DEFAULTS | values if values.get("stage") == 2 else given

    @model_validator(mode="after")
    def _stages(self) -> "RTDMD":
        if self.stage == 1:
            defaults = type(self).__pydantic_fields__  # type: ignore[attr-defined]
            if given := [name for name in STAGE_2 if getattr(self, name) != defaults[name].default]:
                raise ValueError(
                    f"{', '.join(given)}: only for stage 2; set stage: 2, or leave out {', '.join(given)}"
                )
            if self.stops == "last":
                raise ValueError("stops: last leaves the other steps untrained; in stage 1 use stops: shared")
        elif self.critic_weight != "none":
            raise ValueError(
                f"critic_weight: {self.critic_weight} already tilts by the reward; set stage: 1, or "
                "critic_weight: none"
            )
        elif not (self.selected_steps or self.reward_weight):
            raise ValueError(
                "selected_steps and reward_weight are both 0, so no reward is used; raise one of them, or set stage: 1"
            )
        elif self.selected_steps and self.group_size == 1:
            raise ValueError(
                "group_size: 1 leaves no other sample to compare a reward with; raise group_size, or set "
                "selected_steps: 0"
            )
        return self

    @property
    def takes_chunks(self) -> bool:  # type: ignore[override]
        return self.stage == 1 or not self.selected_steps

    @property
    def needs_whole_videos(self) -> str:  # type: ignore[override]
        return (
            "the policy gradient of stage 2 compares the steps of whole videos, and a step of a chunk also acts on "
            "the chunks after it, through contexts without gradient; set selected_steps: 0"
        )

    @property
    def rewards_required(self) -> bool:  # type: ignore[override]
        return self.stage == 2 or super().rewards_required

    @property
    def reward_use(self) -> Literal["none", "score", "gradient"]:  # type: ignore[override]
        if self.stage == 1:
            return super().reward_use
        return "gradient" if self.reward_weight else "score"

    def check(self, policy: RolloutPolicy) -> None:
        super().check(policy)
        if self.stage == 2 and self.selected_steps > policy.num_steps - 1:
            raise ValueError(
                f"selected_steps is {self.selected_steps}, but with {policy.num_steps} rollout.timesteps only "
                f"{policy.num_steps - 1} steps are stochastic, all but the last; lower selected_steps"
            )

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        fake_turn, student_turn = super().turns(step, state)
        collects = self.stage == 2 and self.selected_steps > 0 and self.normalise_advantages
        return fake_turn, replace(student_turn, collects=collects)

    def collect(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> None:
        """The trajectories, and the rewards that the advantages of the whole update are made from."""
        assert batch.shared is not None
        rollout, score = self.trajectories(networks, batch)
        batch.shared[TRAJECTORIES] = (rollout, score)
        collected.add(state, self.compared(networks, batch, score))

    def finish(self, turn: Turn, networks: Networks, state: State) -> None:
        collected.drop(state)

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss | Iterator[Loss]:
        if self.stage == 2 and turn.name == "student":
            return self.stage_2_losses(networks, batch, state)
        return super().loss(turn, networks, batch, state)

    def stage_2_losses(self, networks: Networks, batch: Batch, state: State) -> Iterator[Loss]:
        """One loss per selected step, then the loss of the matching term and of the rewards' gradient."""
        if networks.policy.chunks is not None:
            yield self.matching_and_reward_loss(networks, batch, partial(self.simulate_step, networks, batch))
            return
        made = (batch.shared or {}).get(TRAJECTORIES) or self.trajectories(networks, batch)
        rollout, score = cast(tuple[Rollout, Score], made)
        advantage, used = self.advantage(networks, batch, score, state)
        for i in self.select_steps(batch, networks.policy):
            yield self.policy_step_loss(networks, batch, rollout.steps[i], rollout.steps[i + 1].t, advantage, used)
        step = partial(self.repeat_step, networks, batch, rollout)
        loss = self.matching_and_reward_loss(networks, batch, step)
        assert batch.group is not None
        group_terms = signals.group_terms(score.own, batch.group, score.valid, advantage, self.advantage_clip)
        yield Loss(loss.total, loss.terms | score.terms() | group_terms)

    @torch.no_grad()
    def trajectories(self, networks: Networks, batch: Batch) -> tuple[Rollout, Score]:
        """All steps of the student's sampler, and the rewards of its samples."""
        shared = set(range(networks.policy.num_steps - 1)).difference(self.select_steps(batch, networks.policy))
        rollout = trajectory(networks.student, networks.policy, batch, shared, log_prob=False)
        return rollout, networks.rewards(rollout.x, batch)

    def select_steps(self, batch: Batch, policy: RolloutPolicy) -> list[int]:
        """Draws m of the stochastic steps, the same ones in all micro-batches and processes of an update."""
        remaining = list(range(policy.num_steps - 1))
        selected = []
        for i in range(self.selected_steps):
            index = batch.integer(f"selected{i}", len(remaining))
            selected.append(remaining.pop(index))
        return sorted(selected)

    def advantage(
        self, networks: Networks, batch: Batch, score: Score, state: Mapping[str, Tensor] = NOTHING
    ) -> tuple[Tensor, Tensor]:
        """The advantages, [B], and the share of the update's samples over which the policy's loss is a mean.

        By default they are GDPO's, from the scores of the single rewards, each standardised over all samples of the
        update, and the mean is over the samples that have one. A composite that is not a sum counts as one reward.
        With normalise_advantages: false they are the reward minus the mean of the group's other samples,
        K / (K - 1) (r - mean), whose policy gradient is unbiased over all samples (derived): the share is 1."""
        assert batch.group is not None
        if not self.normalise_advantages:
            centred = signals.advantages(score.value, batch.group, score.valid, "none", clip=math.inf)
            count = self.group_size * signals.group_mean(score.valid.float(), batch.group)
            raw = (centred * count / (count - 1).clamp_min(1)).clamp(-self.advantage_clip, self.advantage_clip)
            return raw, torch.ones((), dtype=torch.float64, device=raw.device)
        rows = collected.of_update(state, self.compared(networks, batch, score))
        weights = self.weights(networks)
        parts = {name: rows[f"reward.{name}"] for name in weights}
        every = signals.gdpo_advantages(
            parts, weights, rows["group"], rows["valid"] > 0, self.std, self.advantage_clip
        )
        return collected.of_samples(every, batch.ids), (every != 0).double().mean()

    def weights(self, networks: Networks) -> dict[str, float]:
        """The weight of each reward that is standardised by itself."""
        assert networks.scorer is not None
        composite = networks.scorer.composite
        if composite.aggregate == "sum":
            return {name: part.weight for name, part in composite.used(grad=False).items()}
        return {"value": 1.0}

    def compared(self, networks: Networks, batch: Batch, score: Score) -> dict[str, Tensor]:
        """What the advantages are made from, by name: one row for each sample."""
        assert batch.group is not None
        rewards = {f"reward.{name}": score.parts.get(name, score.value) for name in self.weights(networks)}
        return {"group": batch.group, "valid": score.valid.to(torch.uint8), **rewards}

    def policy_step_loss(
        self,
        networks: Networks,
        batch: Batch,
        step: Step,
        t_next: Tensor,
        advantage: Tensor,
        used: Tensor | None = None,
    ) -> Loss:
        """PPO's loss of one stochastic step of the trajectory, whose input x_t and outcome x_next are held fixed."""
        x0 = predict_x0(networks.student, step.x_t, step.t, batch.cond, networks.policy)
        log_prob = self.log_density(networks, step, x0, t_next)
        old_log_prob = self.log_density(networks, step, step.x0, t_next)
        log_ratio = log_prob - old_log_prob
        total = self.policy_weight * signals.policy_loss(log_ratio, advantage, self.ratio_clip, used)
        return Loss(total, {"loss": total.detach(), "log_ratio": log_ratio.detach().abs().mean()})

    def log_density(self, networks: Networks, step: Step, x0: Tensor, t_next: Tensor) -> Tensor:
        """log pi(x_next | x_t) of the student that predicts x0, [B], in the unit of `log_prob`."""
        schedule = networks.student.schedule
        eta = networks.policy.transition_eta
        mean, std = transition_law(schedule, x0, step.x_t, step.t, t_next, eta)
        if self.log_prob == "nats":
            return signals.transition_log_prob(step.x_next, mean, std, "sum", scaled=True)
        return signals.transition_log_prob(step.x_next, mean, std, "mean", scaled=False)

    def matching_and_reward_loss(self, networks: Networks, batch: Batch, step: Callable[[Tensor], Rollout]) -> Loss:
        """The matching term at the drawn step, plus the rewards' gradient through the last step. Both are means over
        all samples, among which those without a reward count as 0.

        step: makes x at the level that step stop[i] of sample i goes to, with gradient through this step alone."""
        last_step = step(torch.full_like(batch.ids, networks.policy.num_steps - 1))
        matched_step = last_step if self.stops == "last" else step(self.draw_stop(networks.policy, batch))
        grad, terms = self.score_gradient(networks, batch, matched_step)
        total = self.dm_weight * signals.surrogate(matched_step.x, grad)
        if self.reward_weight:
            reward = networks.rewards(last_step.x, batch, grad=True)
            shortfall = -reward.value if self.reward_hinge is None else torch.relu(self.reward_hinge - reward.value)
            total = total + self.reward_weight * torch.where(reward.valid, shortfall, 0).mean()
            terms = reward.terms() | terms
        return Loss(total, terms | {"loss": total.detach()})

    def simulate_step(self, networks: Networks, batch: Batch, stop: Tensor) -> Rollout:
        """The same for a video that is made chunk by chunk: every chunk executes step stop[i], given the chunks that
        the student made before it."""
        s = next_levels(networks.policy, stop, batch.ids.to(batch.dtype))
        return backward_simulation(networks.student, networks.policy, batch, stop, to=s)

    def repeat_step(self, networks: Networks, batch: Batch, rollout: Rollout, stop: Tensor) -> Rollout:
        """Repeats step stop[i] of sample i from its recorded input, with gradient. Returns x at the level it goes to.

        stop: [B]."""
        policy = networks.policy
        rows = torch.arange(len(stop), device=stop.device)
        x_t = torch.stack([step.x_t for step in rollout.steps])[stop, rows]
        t = torch.stack([step.t for step in rollout.steps])[stop, rows]
        s = next_levels(policy, stop, t)
        x0 = predict_x0(networks.student, x_t, t, batch.cond, policy)
        x = step_to(networks.student.schedule, policy, x0, x_t, t, s, lambda: batch.normal("exit"))
        return Rollout(x, s, stop)
