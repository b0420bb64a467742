"""What objectives are made of, as pure functions: guidance, score differences, surrogates, denoising and GAN
losses."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.batch import Conditioning
from fastgen.schedule import PredictionType, Schedule, expand

Predictor = Callable[[Tensor, Tensor, Conditioning], Tensor]


def per_sample_mean(x: Tensor) -> Tensor:
    """Mean over all axes but the first: [B]."""
    return x.flatten(1).mean(1)


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

    predict: an x0 (or velocity) predictor; the result is of the same kind, shape [B, ...].
    scale: one number, or one a sample, [B] (`Denoiser.per_expert`).
    interval: guidance acts where interval[0] < t <= interval[1], elsewhere the scale is 1        (arXiv 2404.07724)
    rescale: phi in [0, 1]; moves the guided prediction's per-sample std that far back to the conditional one's
             (arXiv 2305.08891 eq. 15-16; diffusers' guidance_rescale)."""
    if not isinstance(scale, Tensor) and scale == 1.0:
        return predict(x_t, t, cond)
    both = predict(torch.cat([x_t, x_t]), torch.cat([t, t]), Conditioning.cat([cond, uncond]))
    on, off = both.chunk(2)
    inside = (t > interval[0]) & (t <= interval[1])
    scale = expand(scale, t) if isinstance(scale, Tensor) else scale
    result = off + expand(torch.where(inside, scale, 1.0).to(on.dtype), on) * (on - off)
    if rescale:
        std_on, std_guided = on.flatten(1).std(1), result.flatten(1).std(1)
        result = result * expand(1 - rescale + rescale * std_on / std_guided.clamp_min(1e-8), result)
    return result


def score_difference(x0: Tensor, fake_x0: Tensor, real_x0: Tensor, floor: float = 1e-6) -> Tensor:
    """The normalised distribution-matching gradient with respect to a student sample.

        g = (fake_x0 - real_x0) / max(mean|x0 - real_x0|, floor)         (DMD eq. 7-8, arXiv 2311.18828; DMD2's code)

    Both predictions are made at the same x_t renoised from x0, the real one guided. The mean is over each sample.
    All [B, ...]. Returns [B, ...], detached; NaN and infinities become zero."""
    with torch.no_grad():
        normaliser = per_sample_mean((x0 - real_x0).abs()).clamp_min(floor)
        return torch.nan_to_num((fake_x0 - real_x0) / expand(normaliser, x0), posinf=0.0, neginf=0.0)


def surrogate(x: Tensor, grad: Tensor) -> Tensor:
    """A scalar whose gradient with respect to x is grad / numel(x).

    L = 1/2 mean (x - sg(x - g))^2                                        (DMD2's code, tianweiy/DMD2)"""
    return 0.5 * F.mse_loss(x, (x - grad).detach())


def denoising_loss(
    prediction: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule, space: PredictionType
) -> Tensor:
    """Mean squared error of an x0 prediction, measured as an error of the named prediction type.

    In every space the optimum is E[x0 | x_t]; the spaces differ by a weight that depends on t alone: 1 for sample,
    (alpha / sigma)^2 for epsilon, ((alpha + sigma) / sigma)^2 for flow_prediction, 1 / sigma^2 for v_prediction (VP).
    Gradient flows to `prediction`."""
    error = schedule.from_sample(prediction, x_t, t, space) - schedule.from_sample(x0, x_t, t, space)
    return error.square().mean()


def gan_generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating: mean softplus(-D(fake))."""
    return F.softplus(-fake_logits).mean()


def gan_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """mean softplus(D(fake)) + mean softplus(-D(real)): at the optimum D = log(p_real / p_fake)."""
    return F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()


def score_lag(x0: Tensor, fake_x0: Tensor, real_x0: Tensor) -> Tensor:
    """How far the fake score is from the student it should describe, as a fraction of the score difference.

        lag = <x0 - fake_x0, d> / <d, d>,   d = fake_x0 - real_x0       (derived, from the identity of SiD, 2404.04057)

    A fake score that has converged is the conditional mean of x0: its residual is orthogonal to every function of x_t
    and the lag averages 0. Otherwise fake_x0 = mean + e and the lag averages -<e, d> / <d, d>. Negative: part of the
    gradient is the fake's own error e (at -0.4, four tenths of its energy, when e is unrelated to the true
    difference), or the student has come closer to the teacher than the fake believes. Positive: the fake does not yet
    see how far the student is off. One batch is noisy; read the running mean. Returns a detached scalar."""
    with torch.no_grad():
        d = fake_x0 - real_x0
        return ((x0 - fake_x0) * d).sum() / d.square().sum().clamp_min(1e-12)
