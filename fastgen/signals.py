"""The building blocks of objectives, as pure functions: guidance, score differences, surrogates, denoising and GAN
losses, group statistics, transition log-probabilities."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.batch import Conditioning
from fastgen.schedule import PredictionType, Schedule, expand

Predictor = Callable[[Tensor, Tensor, Conditioning], Tensor]
Guide = Callable[..., Tensor]  # of on, off, scale, x_t and t, and `predict`, as `Denoiser.guide`


def per_sample_mean(x: Tensor) -> Tensor:
    """[B]: the mean over all axes but the first."""
    return x.flatten(1).mean(1)


def affine(on: Tensor, off: Tensor, scale: Tensor, *_: Tensor, **__: str) -> Tensor:
    """off + scale (on - off), for predictions with and without a prompt."""
    return off + scale * (on - off)


def rule_of(predict: Predictor) -> Guide:
    """The rule by which a predictor is guided: that of the denoiser that it is, or is a partial call of
    (`Denoiser.guide`); for any other function `affine`."""
    if isinstance(predict, partial):
        return partial(rule_of(predict.func), predict=predict.keywords.get("predict", "sample"))
    return getattr(predict, "guide", affine)


def guided(
    predict: Predictor,
    x_t: Tensor,
    t: Tensor,
    cond: Conditioning,
    uncond: Conditioning,
    scale: float | Tensor,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> Tensor:
    """Classifier-free guidance in diffusers' convention: uncond + scale (cond - uncond)          (arXiv 2207.12598)

    predict: an x0 (or velocity) predictor. The result is a prediction of the same kind, [B, ...]. A denoiser, or a
             partial call of one, is guided by its family's own rule where that is another (`Denoiser.guide`).
    scale: one number, or one per sample, [B] (`Denoiser.per_expert`).
    interval: guidance acts where interval[0] < t <= interval[1]; elsewhere the scale is 1       (arXiv 2404.07724)
    rescale: phi in [0, 1], the share by which the guided prediction's per-sample std is moved back to that of the
             conditional prediction (arXiv 2305.08891 eq. 15-16; diffusers' guidance_rescale)."""
    if not isinstance(scale, Tensor) and scale == 1.0:
        return predict(x_t, t, cond)
    both = predict(torch.cat([x_t, x_t]), torch.cat([t, t]), Conditioning.cat([cond, uncond]))
    on, off = both.chunk(2)
    inside = (t > interval[0]) & (t <= interval[1])
    scale = expand(scale, t) if isinstance(scale, Tensor) else scale
    result = rule_of(predict)(on, off, expand(torch.where(inside, scale, 1.0).to(on.dtype), on), x_t, t)
    if rescale:
        std_on, std_guided = on.flatten(1).std(1), result.flatten(1).std(1)
        result = result * expand(1 - rescale + rescale * std_on / std_guided.clamp_min(1e-8), result)
    return result


def score_difference(
    x0: Tensor, fake_x0: Tensor, real_x0: Tensor, floor: float = 1e-6, group: Tensor | None = None
) -> Tensor:
    """The normalised distribution-matching gradient with respect to a student sample.

        g = (fake_x0 - real_x0) / max(mean|x0 - real_x0|, floor)         (DMD eq. 7-8, arXiv 2311.18828; DMD2's code)

    Both predictions are made at the same x_t, renoised from x0; the real one is guided. The mean is over each sample
    or, with group [B], over all samples of a prompt group (GNDM). x0, fake_x0, real_x0: [B, ...]. Returns [B, ...],
    detached; NaN and infinities become zero."""
    with torch.no_grad():
        distance = per_sample_mean((x0 - real_x0).abs())
        normaliser = (distance if group is None else group_mean(distance, group)).clamp_min(floor)
        return torch.nan_to_num((fake_x0 - real_x0) / expand(normaliser, x0), posinf=0.0, neginf=0.0)


def surrogate(x: Tensor, grad: Tensor) -> Tensor:
    """A scalar whose gradient with respect to x is grad / numel(x).

    L = 1/2 mean (x - sg(x - g))^2                                        (DMD2's code, tianweiy/DMD2)"""
    return 0.5 * F.mse_loss(x, (x - grad).detach())


def denoising_loss(
    prediction: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    schedule: Schedule,
    space: PredictionType,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean squared error of an x0 prediction, measured in the space of a prediction type.

    The optimum is E[x0 | x_t] in every space. The spaces differ by a weight that depends only on t: 1 for sample,
    (alpha / sigma)^2 for epsilon, ((alpha + sigma) / sigma)^2 for flow_prediction, 1 / sigma^2 for v_prediction (VP).
    weight: [B], multiplies each sample's error. Gradient flows to `prediction`."""
    error = schedule.from_sample(prediction, x_t, t, space) - schedule.from_sample(x0, x_t, t, space)
    squared = error.square()
    return squared.mean() if weight is None else (expand(weight, squared) * squared).mean()


def renoised_target(schedule: Schedule, x_s: Tensor, noise: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """An unbiased x0 target for a fake score whose samples x_s are not clean but at a level s above 0.

        x_s / alpha_s - alpha_ts sigma_s^2 / (alpha_s sigma_ts) noise,   x_t = alpha_ts x_s + sigma_ts noise
                                       (derived: Phased DMD's v target, arXiv 2510.27684, written as an x0 target)

    The score of x_t is E[-noise / sigma_ts | x_t], and the mean of the target given x_t is the E[x0 | x_t] that goes
    with this score. As a velocity, the target is Phased DMD's. At s = 0 it is x_s. Regressing on the sample itself
    (the naive target) is biased. The target grows like 1 / sigma_ts as t approaches s; use `renoised_weight`, which
    clamps its error. x_s, noise: [B, ...]; s < t: [B]."""
    (alpha_s, sigma_s), (ratio, sigma_ts) = schedule.coefficients(s, x_s), schedule.renoise_coefficients(s, t, x_s)
    return x_s / alpha_s - ratio * sigma_s**2 / (alpha_s * sigma_ts) * noise


def renoised_weight(schedule: Schedule, s: Tensor, t: Tensor, clamp: float = 10.0) -> Tensor:
    """[B]: min(1, clamp sigma_ts^2), the weight of a squared velocity error whose target is `renoised_target`.

    The weighted error is min(1 / sigma_ts^2, clamp) |sigma_ts (v - v_target)|^2, with Phased DMD's clamp; RTDMD's code
    has clamp 10."""
    return (clamp * schedule.renoise_coefficients(s, t, t)[1] ** 2).clamp_max(1.0)


def log_ratio_rate(schedule: Schedule, x0: Tensor, t: Tensor, fake_x0: Tensor, real_x0: Tensor) -> Tensor:
    """[B]: the log-ratio of two models at x0 is an integral over t; this is its integrand, estimated from one x_t.

        log p_real(x0) - log p_fake(x0) = int_0^1 E_noise[rate] dt,
        rate = -1/2 dSNR/dt (|x0 - fake_x0|^2 - |x0 - real_x0|^2),   SNR = (alpha / sigma)^2

    (derived, from the denoising form of the likelihood, arXiv 2107.00630). For flow matching the rate is (1 - t) / t
    times the gap between the squared velocity errors. Both predictions are made at the same x_t, renoised from x0. The
    squares are summed over a sample's elements, so the integral is in nats. x0, fake_x0, real_x0: [B, ...]; t: [B] in
    (0, 1)."""
    with torch.enable_grad():
        level = t.detach().double().clone().requires_grad_()
        (slope,) = torch.autograd.grad(((schedule.alpha(level) / schedule.sigma(level)) ** 2).sum(), level)
    gap = ((x0 - fake_x0).square() - (x0 - real_x0).square()).flatten(1).sum(1)
    return -0.5 * slope.to(gap.dtype) * gap


def gan_generator_loss(fake_logits: Tensor) -> Tensor:
    """The non-saturating loss: mean softplus(-D(fake))."""
    return F.softplus(-fake_logits).mean()


def gan_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """mean softplus(D(fake)) + mean softplus(-D(real)); at its optimum D = log(p_real / p_fake)."""
    return F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """-mean D(fake): the generator's side of the hinge GAN                                       (arXiv 1802.05957)"""
    return -fake_logits.mean()


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """mean max(0, 1 - D(real)) + mean max(0, 1 + D(fake)); its minimum is 2 (1 - TV(real, fake))."""
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


Divergence = Literal["rkl", "kl", "js", "sf", "sh", "jf", "neyman"]


def divergence_weight(name: Divergence, ratio: Tensor) -> Tensor:
    """h(r) = f''(r) r^2: D_f(p | q) = E_q[f(p / q)] has the gradient -E_q[h(r) (s_p - s_q) dx], r = p / q.

        rkl 1   kl r   js r / (1 + r)   sf 1 / (1 + r)   sh sqrt(r) / 4   jf 1 + r   neyman 1 / r
                                                                                    (f-distill, arXiv 2502.15681)

    rkl: reverse KL, which is DMD; kl: forward KL; js: twice Jensen-Shannon; sf: softened reverse KL; sh: squared
    Hellinger; jf: Jeffreys. p is the data, q the student. ratio: any shape, above 0."""
    weights: dict[Divergence, Callable[[Tensor], Tensor]] = {
        "rkl": torch.ones_like,
        "kl": lambda r: r,
        "js": lambda r: r / (1 + r),
        "sf": lambda r: 1 / (1 + r),
        "sh": lambda r: r.sqrt() / 4,
        "jf": lambda r: 1 + r,
        "neyman": lambda r: 1 / r,
    }
    return weights[name](ratio)


def density_ratio(logits: Tensor) -> Tensor:
    """[B]: p / q from a discriminator's logits [B, heads], as the exponential of their mean, detached.

    The mean is clamped to +-10 and the ratio to [0.1, 20], as in f-distill's code. The ratio is exact where the logits
    are optimal for `gan_discriminator_loss` and within the clamps."""
    return logits.detach().float().mean(1).clamp(-10, 10).exp().clamp(0.1, 20)


def effective_share(weight: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2) in (0, 1]: Kish's effective number of samples for weights [n] >= 0, as a share of n."""
    return weight.sum().square() / (len(weight) * weight.square().sum()).clamp_min(1e-12)


def lag_terms(x0: Tensor, fake_x0: Tensor, real_x0: Tensor) -> dict[str, Tensor]:
    """How far the fake score is from the student it should describe, as a fraction of the score difference.

        lag = mean <x0 - fake_x0, d> / mean <d, d>,   d = fake_x0 - real_x0  (derived, from SiD's identity, 2404.04057)

    The two means are terms to log, `fake_error` and `score_gap`: scalars, detached. `RunLog` divides their means over
    all updates and processes since its last row, and writes the quotient as `fake_lag`. A quotient of one batch would
    have an expectation that depends on the batch's size, and on how it is divided over processes.

    A converged fake score is the conditional mean of x0. Its residual is then orthogonal to every function of x_t, and
    the lag averages 0. Otherwise fake_x0 = mean + e, and the lag averages -<e, d> / <d, d>.
    A negative lag means that part of the gradient is the fake score's own error e (at -0.4, four tenths of the
    gradient's energy, if e is unrelated to the true difference), or that the student has come closer to the teacher
    than the fake score predicts. A positive lag means that the fake score does not show yet how far the student is
    from the teacher."""
    with torch.no_grad():
        d = fake_x0 - real_x0
        return {"fake_error": ((x0 - fake_x0) * d).mean(), "score_gap": d.square().mean()}


def group_mean(value: Tensor, group: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B]: for each sample, the mean of value [B] over the samples with the same group id [B]. mask: [B] bool, the
    samples that count; a group without any has mean 0."""
    _, index = group.unique(return_inverse=True)
    keep = torch.ones_like(value) if mask is None else mask.to(value)
    total = value.new_zeros(int(index.max()) + 1).index_add(0, index, torch.where(keep > 0, value, 0.0))
    count = value.new_zeros(len(total)).index_add(0, index, keep)
    return (total / count.clamp_min(1))[index]


def group_moments(value: Tensor, group: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (dividing by the count) of each sample's group, over `mask`: [B] float64 each.

    They are computed in float64, where the mean of equal float32 numbers is that number. A standard deviation that is
    no more than rounding, 1e-6 of the group's root mean square, is set to 0."""
    value = value.double()
    mean = group_mean(value, group, mask)
    std, size = (group_mean(v.square(), group, mask).sqrt() for v in (value - mean, value))
    return mean, torch.where(std > 1e-6 * size, std, 0.0)


# What centred rewards are divided by: their group's standard deviation, that of all rewards of the update, that of all
# centred rewards of the update, or 1.
Spread = Literal["group", "batch", "within_groups", "none"]


def advantages(
    reward: Tensor,
    group: Tensor,
    valid: Tensor | None = None,
    std: Spread = "group",
    clip: float = 5.0,
    floor: float = 1e-4,
) -> Tensor:
    """Rewards compared within their prompt group: [B] float32, detached, in [-clip, clip].

        A = (r - mean_g r) / (s + floor)                                          (GRPO; Flow-GRPO, arXiv 2505.05470)

    std says what s is, over the valid samples that are given; where it is of a batch, give the samples of the whole
    update (`objectives.collected`):
        group           the standard deviation of the sample's group
        batch           that of all rewards, with the differences between prompts: Flow-GRPO's global std, RTDMD's code
        within_groups   that of all r - mean_g r (ours). A function of the prompt that is added to r changes nothing
        none            1 - floor; A is r - mean_g r
    Invalid samples get 0. So do all samples of a group whose valid rewards are all equal or fewer than two."""
    with torch.no_grad():
        valid = torch.ones_like(reward, dtype=torch.bool) if valid is None else valid
        mean, group_std = group_moments(reward, group, valid)
        centred = torch.where(valid & (group_std > 0), reward.double() - mean, 0.0)
        if std == "batch":
            spread = group_moments(reward, torch.zeros_like(group), valid)[1]
        else:
            spread = group_std if std == "group" else rms(centred, valid)
        return (centred if std == "none" else centred / (spread + floor)).clamp(-clip, clip).float()


def rms(value: Tensor, mask: Tensor) -> Tensor:
    """The root mean square of value [B] over the samples in mask [B] bool; 0 if there are none."""
    return (torch.where(mask, value, 0.0).square().sum() / mask.sum().clamp_min(1)).sqrt()


def gdpo_advantages(
    parts: Mapping[str, Tensor],
    weights: Mapping[str, float],
    group: Tensor,
    valid: Tensor,
    std: Spread = "batch",
    clip: float = 5.0,
) -> Tensor:
    """Decoupled advantages of several rewards, [B] float32: each is standardised alone, and their weighted sum again.

        A = T / (rms T + 1e-4),   T = sum_k w_k A_k,   A_k = `advantages` of reward k with this std
                                                                           (GDPO as in RTDMD's code, arXiv 2605.26108)

    With std: batch, the released code's, a reward that differs more between prompts than within them has little
    influence: it is divided by its whole spread. With within_groups (ours; here the A_k are clipped, too) rewards with
    equal weights have equal influence. The mean of T is 0, as that of every group is."""
    inner = clip if std == "within_groups" else math.inf
    total = sum(weights[k] * advantages(r, group, valid, std, inner) for k, r in parts.items())
    assert isinstance(total, Tensor)
    return (total / (rms(total, valid) + 1e-4)).clamp(-clip, clip)


def group_terms(
    parts: Mapping[str, Tensor], group: Tensor, valid: Tensor, advantage: Tensor, clip: float = 5.0
) -> dict[str, Tensor]:
    """Two entries for Loss.terms. `zero_groups`: the share of prompt groups in which no reward [B] differs between the
    valid samples, so that their advantages are 0. `clipped`: the share of valid samples whose advantage is at +-clip.
    """
    spread = torch.stack([group_moments(reward, group, valid)[1] for reward in parts.values()]).amax(0)
    _, index = group.unique(return_inverse=True)
    of_groups = spread.new_zeros(int(index.max()) + 1).scatter(0, index, spread)  # equal within a group
    at_clip = (advantage.abs() >= clip) & valid
    return {
        "zero_groups": (of_groups == 0).float().mean(),
        "clipped": at_clip.sum().float() / valid.sum().clamp_min(1),
    }


def transition_log_prob(
    x: Tensor, mean: Tensor, std: Tensor, reduction: Literal["mean", "sum"] = "mean", scaled: bool = False
) -> Tensor:
    """[B]: the log-probability of x under N(mean, std^2), without the terms that depend on std alone.

        scaled: -|x - mean|^2 / (2 std^2), a log-probability in nats;   else -|x - mean|^2, RTDMD's unit
        reduction: over the d elements of a sample. Published code takes the mean, so that its "ratio" is the true one
        to the power 1 / d. This is why its clip ranges look like 1e-5.

    x is detached: gradient flows only through the mean. Raises ValueError where std is 0, as a deterministic step has
    no log-probability."""
    if bool((std == 0).any()):
        raise ValueError("a deterministic step (std 0) has no log-probability; leave out the last step")
    dtype = torch.promote_types(mean.dtype, torch.float32)
    error = (x.detach().to(dtype) - mean.to(dtype)).square()
    error = error / (2 * std.to(dtype) ** 2) if scaled else error
    return -(error.flatten(1).mean(1) if reduction == "mean" else error.flatten(1).sum(1))


def policy_loss(log_ratio: Tensor, advantage: Tensor, clip: float, used: Tensor | None = None) -> Tensor:
    """Scalar PPO loss. log_ratio: [B], log pi / pi_old; advantage: [B]. Samples with advantage 0 do not count.

        mean max(-A rho, -A clip(rho, 1 - clip, 1 + clip)),   rho = exp(log_ratio)          (PPO, arXiv 1707.06347)

    used: a scalar, the share of samples with an advantage in the whole update, of which these are a part; 1 for a mean
    over all samples. None: the share of these samples."""
    ratio, counts = log_ratio.exp(), advantage != 0
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    number = counts.sum().to(ratio) if used is None else used * len(counts)
    return torch.where(counts, loss, 0.0).sum() / number.clamp_min(1e-12)
