"""CRD: centred reward distillation (arXiv 2603.14128), which needs samples of the forward process only.

    paper            here                   what it is
    v_theta          networks.student       the trained network, here expressed as a velocity; see below
    v_old            networks["reference"]  moving average of the student; the implicit reward is measured against it
    sampling policy  networks["sampler"]    another moving average, which makes the samples; at first a student's copy
    v_ref^CFG        networks.teacher       the anchor: frozen, guided
    x0               x0                     clean samples of the sampler, group_size of each prompt
    A                advantage              rewards standardised within the prompt, clipped
    R                reward                 A / (2 clip) + 1/2, in [0, 1]; A / 10 + 1/2 by default
    r_theta          implicit               implicit reward: how much better the student explains x0 than the reference

The algorithm, for every student update:
    x0 = samples of the sampler, without gradient;  R from their rewards
    for several (t, noise), the same for all samples of a prompt:
        x_t = x0 noised;  v* = noise - x0
        r_theta = -(mean|v_theta - v*|^2 / w_theta - mean|v_old - v*|^2 / w_old),   w = sg(mean|v - v*|), or 1
        student <- clip / beta * mean (beta (r_theta - sg(mean_g r_theta)) - (R - mean_g R))^2
                   + kl * mean (c_min + R (1 - c_min)) |v_theta - v_ref^CFG|^2
    reference and sampler are moved towards the student, each at its own decay
    the average of the student's weights is updated once.

Why it works. At the optimum of E[r] - beta KL(p || p_old), r = beta log(p / p_old) + beta log Z(prompt). Centring
within a prompt removes log Z. On a finite set the loss is zero only at p = p_old exp(r / beta) / Z, however the
samples are drawn.

Levels. t is a level at which the student is called when it samples, times 1 +- `jitter`, so a few-step student is
trained at the levels that sampling visits (Flow-Factory takes t from the sampler's steps too). v_theta is the velocity
noise_hat - x0_hat that the student's x0 prediction implies; for flow matching |v - v*|^2 = |x0_hat - x0|^2 / t^2. For
a student that has learned the posterior mean (the teacher, or one with many ode steps) r_theta is then a term of its
log-likelihood ratio at x0. The prediction of a distilled student, in contrast, is a sample. Its r_theta is the
log-ratio of two Gaussian kernels around two predictions, not the log-ratio of two laws.

What a run converges to (derived). Every (t, noise) has its own square, and each square must vanish by itself; it is
not enough that their sum is the log-ratio. Take w = 1, no anchor, a fixed reference
(`reference_decay: {first: 1.0}`), a Gaussian N(m, S) in D dimensions, the reward a'x and flow matching. The student
then has zero loss exactly at
    x0_hat = x0_hat_old + D V_t a / (4 clip beta std(a'x)),   V_t = alpha^2 S + sigma^2
For p_old exp(R / beta) the shift would have to be sigma^2 S a / (2 clip beta std(a'x) V_t). So there is a fixed point,
but it is not that tilt. With a reference that follows the student, beta drops out and the tilts compound. Only the
anchor then stops them, where (w = 1)
    x0_hat = x0_hat_ref + Cov(A, x0 | x_t) / (kl c),   c the mean of the anchor's strength at x_t
for a student that is the posterior mean of its own samples. To first order this is p_ref exp(A / (kl c)); it is exact
for a Gaussian and c_min = 1. For a few-step student the anchor blurs, because at t = 1 the teacher's prediction is a
mean.
"""

from collections.abc import Iterator
from dataclasses import dataclass as plain_dataclass
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.denoiser import Denoiser
from fastgen.networks import Networks, move
from fastgen.objectives import collected
from fastgen.objectives.base import Guidance, Loss, Objective, State, Turn
from fastgen.registry import MOST_BATCH, MOST_STEPS, MOST_UPDATES
from fastgen.rewards import Score
from fastgen.rollout import RolloutPolicy, predict_x0, sample
from fastgen.signals import group_mean, per_sample_mean

COPIES = ("reference", "sampler")
SAMPLES = "samples"  # in Batch.shared


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Decay:
    """The decay of a moving average after n updates.

    It is `first` up to n = delay, and then min(first + slope (n - delay), last). A decay of 1 leaves the average
    unchanged; 0 copies the network. Raises ValueError if last is below first."""

    first: float = Field(default=0.0, ge=0, le=1)
    slope: float = Field(default=0.0, ge=0)
    delay: int = Field(default=0, ge=0, le=MOST_UPDATES)
    last: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> "Decay":
        if self.last < self.first:
            raise ValueError(
                f"a decay rises from first to last, so last must not be below first; got first {self.first:g} and "
                f"last {self.last:g}"
            )
        return self

    def __call__(self, n: int) -> float:
        return min(self.first + self.slope * max(n - self.delay, 0), self.last)


@plain_dataclass(frozen=True)
class Shares:
    """The shares of the whole update's samples, scalars, over which the matching and the anchor are means."""

    matched: Tensor
    anchored: Tensor


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class CRD(Objective):
    """Defaults without a comment on their source are those of the paper's runs in Flow-Factory. They are for losses
    that are means over samples and elements, without a half, and for A that is clipped at 5 and R in [0, 1]. Golden
    rows: crd_update (beta, clip, w, the anchor's weight, guidance and floor), crd_decays."""

    page = "docs/rewards.md"
    needs_whole_videos = (
        "its implicit reward and its anchor compare predictions at a whole noised video, and a causal student "
        "predicts a chunk from noise and clean earlier frames"
    )
    trained_roles = ("student",)
    reward_use = "score"
    rewards_required = True

    name: Literal["crd"] = "crd"
    group_size: int = Field(default=24, ge=2, le=MOST_BATCH)  # K
    beta: float = Field(default=1.0, gt=0)
    clip: float = Field(default=5.0, gt=0)  # the largest |A|
    # what the centred reward is divided by (`signals.advantages`). Flow-Factory: group by default (its gdpo, for one
    # reward); batch, over all samples of the update, in its recipe for SD3.5. within_groups is ours
    std: Literal["group", "batch", "within_groups"] = "group"
    loss_type: Literal["mse", "bce"] = "mse"
    self_normalised: bool = True  # w = sg(mean|v - v*|); False: w = 1
    # tau of the centring weights softmax(+-R / tau), for R in [0, 1]: Flow-Factory's weight_temp. For A it is
    # 2 clip tau, so that 0.5 is 5. None (Flow-Factory: -1, its default): uniform weights
    temperature: float | None = Field(default=None, ge=0)
    # number of (t, noise) per update; None: one per timestep of the student, ours
    draws: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    jitter: float = Field(default=0.0, ge=0, lt=1)  # ours
    anchor_weight: float = Field(default=0.1, ge=0)  # kl; 0 is off
    anchor_guidance_scale: Guidance = 4.5
    anchor_floor: float | None = Field(default=None, ge=0, le=1)  # c_min; None: 1e-4 / kl; 1: equal for all rewards
    reference_decay: Decay = Decay(first=0.25, slope=0.005, last=0.999)
    sampler_decay: Decay = Decay(slope=0.0075, delay=75, last=0.999)

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        """Two networks of the student's kind, which are adapters where the student is one. The first update copies the
        student's weights into them."""
        adapter = backbone.roles.adapters.get("student")
        if adapter is None:
            return {role: backbone.load("student").requires_grad_(False).eval() for role in COPIES}
        assert backbone.shared is not None  # the base on which the student is an adapter
        return {role: backbone.shared.role(role, adapter) for role in COPIES}

    def init_state(self) -> State:
        return {"updates": torch.zeros((), dtype=torch.int64)}

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        return (Turn("student", ("student",), collects=True),)

    def collect(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> None:
        """The samples, and the rewards that the advantages and means of the whole update are made from."""
        assert batch.shared is not None
        x0, score = self.samples(networks, batch, state)
        batch.shared[SAMPLES] = (x0, score)
        collected.add(state, self.compared(batch, score))

    @torch.no_grad()
    def samples(self, networks: Networks, batch: Batch, state: State) -> tuple[Tensor, Score]:
        """x0 [B, ...] of the sampler, and its rewards."""
        if state["updates"] == 0:
            for role in COPIES:
                move(networks[role], networks.student, 0.0)  # not earlier, as `init_from` may load the student
        x0 = sample(networks["sampler"], networks.policy, batch.cond, batch.normal)  # type: ignore[arg-type]
        return x0, networks.rewards(x0, batch)

    def compared(self, batch: Batch, score: Score) -> dict[str, Tensor]:
        """What the advantages are made from, by name: one row for each sample."""
        assert batch.group is not None
        return {"group": batch.group, "valid": score.valid.to(torch.uint8), "reward": score.value}

    def advantage(self, batch: Batch, score: Score, state: State) -> tuple[Tensor, Shares]:
        """A, [B]; where `std` is not of the group, over all samples of the update. And which shares of the update's
        samples are matched and anchored."""
        rows = collected.of_update(state, self.compared(batch, score))
        valid = rows["valid"] > 0
        every = signals.advantages(rows["reward"], rows["group"], valid, self.std, self.clip)
        shares = Shares(is_matched(every, rows["group"], valid).double().mean(), valid.double().mean())
        return collected.of_samples(every, batch.ids), shares

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Iterator[Loss]:
        made = (batch.shared or {}).get(SAMPLES) or self.samples(networks, batch, state)
        x0, score = cast(tuple[Tensor, Score], made)
        advantage, shares = self.advantage(batch, score, state)
        assert batch.group is not None
        group_terms = signals.group_terms(score.own, batch.group, score.valid, advantage, self.clip)
        draws = self.draws or networks.policy.num_steps
        first = batch.integer("first_level", networks.policy.num_steps)
        for k in range(draws):
            level = networks.policy.timesteps[(first + k) % networks.policy.num_steps]
            loss = self.draw_loss(networks, batch, x0, advantage, score, level, str(k), shares)
            terms = {name: value / draws for name, value in (loss.terms | score.terms() | group_terms).items()}
            yield Loss(loss.total / draws, terms)

    def finish(self, turn: Turn, networks: Networks, state: State) -> None:
        collected.drop(state)
        n = int(state["updates"].add_(1))
        move(networks["reference"], networks.student, self.reference_decay(n))
        move(networks["sampler"], networks.student, self.sampler_decay(n))

    def draw_loss(
        self,
        networks: Networks,
        batch: Batch,
        x0: Tensor,
        advantage: Tensor,
        score: Score,
        level: float,
        name: str,
        shares: Shares | None = None,
    ) -> Loss:
        """The loss at one (t, noise), with t within the jitter of `level`. name: names its random draws. shares: of
        the whole update's samples that are matched and anchored; None: these samples are the whole update."""
        assert batch.group is not None
        offset = 2 * batch.uniform(f"level{name}", by_group=True).to(x0.dtype) - 1
        t = (level * (1 + self.jitter * offset)).clamp(max=1.0)
        noise = batch.normal(f"noise{name}", by_group=True)
        x_t = networks.teacher.schedule.add_noise(x0, noise, t).to(x0.dtype)
        v = velocity(networks.student, x_t, t, batch, networks.policy)
        with torch.no_grad():
            v_old = velocity(networks["reference"], x_t, t, batch, networks.policy)  # type: ignore[arg-type]
        implicit = implicit_reward(v, v_old, noise - x0, self.self_normalised)
        used = is_matched(advantage, batch.group, score.valid)
        shares = shares or Shares(used.double().mean(), score.valid.double().mean())
        reward = advantage / (2 * self.clip) + 0.5
        temperature = None if self.temperature is None else 2 * self.clip * self.temperature
        weights = centring_weights(advantage, batch.group, used, temperature)
        matching = matching_loss(
            implicit, reward, batch.group, used, self.beta, weights, self.loss_type, shares.matched
        )
        total = matching * self.clip / self.beta
        gain = self.gain(implicit.detach(), reward, batch.group, used)
        terms = {"matching": total.detach(), "gain": gain, "matched": used.float().mean()}
        if self.anchor_weight:
            teacher = partial(networks.teacher, predict="flow_prediction")
            scale = networks.teacher.per_expert(self.anchor_guidance_scale, t)
            with torch.no_grad():
                v_ref = signals.guided(teacher, x_t, t, batch.cond, batch.uncond, scale)
            distance = per_sample_mean((v - v_ref).square())
            terms["anchor"] = mean_over(distance.detach(), score.valid, shares.anchored)
            pull = mean_over(self.anchor_strength(reward) * distance, score.valid, shares.anchored)
            total = total + self.anchor_weight * pull
        return Loss(total, terms | {"loss": total.detach()})

    def anchor_strength(self, reward: Tensor) -> Tensor:
        """c_min + R (1 - c_min), [B]: the anchor's weight, which is largest for samples of high reward."""
        floor = min(1e-4 / self.anchor_weight, 1.0) if self.anchor_floor is None else self.anchor_floor
        return floor + reward * (1 - floor)

    def gain(self, implicit: Tensor, reward: Tensor, group: Tensor, used: Tensor) -> Tensor:
        """The slope of beta r_theta against R within prompts: 0 where student and reference agree, 1 at zero loss."""
        target = torch.where(used, reward - group_mean(reward, group, used), 0.0)
        return self.beta * (implicit * target).sum() / target.square().sum().clamp_min(1e-12)


def is_matched(advantage: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """[B] bool: the samples that are matched, which are the valid ones of prompts whose rewards are not all equal."""
    return valid & (group_mean(advantage.square(), group, valid) > 0)


def velocity(denoiser: Denoiser, x_t: Tensor, t: Tensor, batch: Batch, policy: RolloutPolicy) -> Tensor:
    """noise_hat - x0_hat, [B, ...], for the prediction that the network would make at x_t when it samples."""
    x0 = predict_x0(denoiser, x_t, t, batch.cond, policy)
    return denoiser.schedule.from_sample(x0, x_t, t, "flow_prediction")


def implicit_reward(v: Tensor, v_old: Tensor, v_star: Tensor, self_normalised: bool) -> Tensor:
    """r_theta = -(mean|v - v*|^2 / w - mean|v_old - v*|^2 / w_old),   w = sg(mean|v - v*|) or 1

    v, v_old, v_star: [B, ...]. Returns [B]. Means are over a sample's elements. Gradient flows to v alone."""

    def error(velocity: Tensor) -> Tensor:
        squared = per_sample_mean((velocity - v_star).square())
        if not self_normalised:
            return squared
        weight = per_sample_mean((velocity - v_star).abs())
        return squared / weight.detach().clamp_min(1e-5)

    return -(error(v) - error(v_old.detach()))


def centring_weights(advantage: Tensor, group: Tensor, used: Tensor, temperature: float | None) -> tuple[Tensor, ...]:
    """The weights of the group means that are subtracted: one or two sets of [B]. With two sets, `matching_loss`
    averages the two losses.

    temperature (tau): None gives uniform weights. tau > 0 gives exp(A / tau) and exp(-A / tau); tau is 2 clip times
    CRD.temperature, with which A / tau differs from R / CRD.temperature by a constant. tau = 0 gives uniform weights
    over the samples with A > 0, and over those with A < 0 (Flow-Factory takes the sign of R, which is never
    negative). The weights are not normalised, and are 0 where `used` is False."""
    if temperature is None:
        return (used.to(advantage),)
    if temperature == 0:
        return tuple((used & (sign * advantage > 0)).to(advantage) for sign in (1, -1))
    _, index = group.unique(return_inverse=True)
    sets = []
    for logit in (advantage / temperature, -advantage / temperature):
        logit = torch.where(used, logit, -torch.inf)
        top = torch.full_like(logit, -torch.inf).scatter_reduce(0, index, logit, "amax")[index]
        sets.append(torch.where(used, (logit - top).exp(), 0.0))
    return tuple(sets)


def matching_loss(
    implicit: Tensor,
    reward: Tensor,
    group: Tensor,
    used: Tensor,
    beta: float,
    weights: tuple[Tensor, ...],
    loss_type: Literal["mse", "bce"] = "mse",
    share: Tensor | None = None,
) -> Tensor:
    """Scalar: compares centred implicit rewards with centred rewards, over the samples that are used.

        mse: mean (beta (r_theta - sg(mean_g r_theta)) - (R - mean_g R))^2
        bce: mean BCE(sigmoid(beta (r_theta - sg(mean_g r_theta))), sigmoid(R - mean_g R))

    implicit, reward: [B]. mean_g: the mean over the prompt's samples, weighted with each set of weights [B] in turn;
    the losses of the sets are averaged. share: of samples that are used in the whole update, as in `mean_over`.
    Returns 0 if no sample is used. Gradient flows to `implicit`."""
    losses = []
    for weight in weights:
        total = group_mean(weight, group, used).clamp_min(1e-12)
        target = reward - group_mean(weight * reward, group, used) / total
        centred = beta * (implicit - group_mean(weight * implicit.detach(), group, used) / total)
        if loss_type == "bce":
            each = F.binary_cross_entropy_with_logits(centred, target.sigmoid(), reduction="none")
        else:
            each = (centred - target).square()
        losses.append(mean_over(each, used, share))
    return torch.stack(losses).mean()


def mean_over(value: Tensor, mask: Tensor, share: Tensor | None = None) -> Tensor:
    """The mean of value [B] over the samples in mask [B] bool; 0 if there are none.

    share: a scalar, the share of the whole update's samples that are in its mask, of which these are a part. The mean
    of the micro-batches' results is then that over the update. None: the share of these samples."""
    number = mask.sum() if share is None else share * len(mask)
    return torch.where(mask, value, 0.0).sum() / number.to(value).clamp_min(1e-12)
