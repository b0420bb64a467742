"""The AR(1) video in closed form: what a perfect teacher predicts, and where each way of training a student ends.

A frame is one complex number z_k = m + u_k. With rho = a e^{i theta}, |rho| < 1, and s^2 = 1 - |rho|^2,

    u_1 ~ CN(0, 1),   u_{k+1} = rho u_k + s w_k,   w_k ~ CN(0, 1):    every frame has variance 1, and over frames
    Sigma_jk = E[u_j conj(u_k)] = rho^{j-k} for j >= k, and its conjugate for j < k.

Real latents hold a frame as two channels, each of variance 1 (CN(0, 2)), and their noise has variance 1 in each
channel too. Gains and variances relative to 1 are the same for both; expectations of products (F6, F10) are twice as
large there. Noise is added as in flow matching, alpha = 1 - t and sigma = t. Everything is float64 or complex128.

All formulas are derived here: they are the theory of Gaussian processes applied to distillation.
`tests/test_ar1_formulas.py` compares each with a regression, a simulation, or another formula."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Levels = float | Sequence[float] | Tensor


# --- the law


def powers(rho: complex, exponents: Tensor) -> Tensor:
    """rho^n for integers n >= 0; 0^0 is 1."""
    return torch.tensor(rho, dtype=torch.complex128) ** exponents.to(torch.complex128)


def covariance(rho: complex, positions: int | Sequence[int]) -> Tensor:
    """Sigma [F, F] of the frames at these positions in time, or of the first F frames."""
    k = torch.as_tensor(range(positions) if isinstance(positions, int) else list(positions))
    lag = k[:, None] - k
    forward = powers(rho, lag.abs())
    return torch.where(lag >= 0, forward, forward.conj())


def innovation(rho: complex) -> float:
    """s^2 = 1 - |rho|^2: the variance of a frame when the frame before it is known."""
    return 1 - abs(rho) ** 2


def level_matrices(levels: Tensor) -> tuple[Tensor, Tensor]:
    """D = diag(1 - t_k) and T = diag(t_k^2), [..., F, F] complex128, for levels [..., F]."""
    levels = levels.double()
    return tuple(torch.diag_embed(v).to(torch.complex128) for v in (1 - levels, levels**2))  # type: ignore[return-value]


def gains(cov: Tensor, levels: Tensor) -> Tensor:
    """F1: G = Sigma D (D Sigma D + T)^-1, so that E[u | y] = G (y - D m) for y = D z + sqrt(T) noise.

    cov: Sigma [F, F], positive definite.  levels: [..., F] in [0, 1], a level per frame. A level of 0 is exact: that
    frame is known. One formula for a bidirectional denoiser (equal levels), for diffusion forcing (a level per chunk),
    for a causal one (0 before the chunk) and for noisy context (tau before the chunk). Returns [..., F, F]."""
    d, noise = level_matrices(levels)
    cov = cov.to(d)
    return torch.linalg.solve(d @ cov @ d + noise, cov @ d, left=False)


def prediction_error(cov: Tensor, levels: Sequence[float]) -> float:
    """The variance of the last frame when the frames before it are observed at these levels: F8 with
    cov = covariance(rho, W + 1) and levels = [tau] * W, and the same for any other law, such as an AR(2)."""
    d, noise = level_matrices(torch.tensor([*levels, 1.0], dtype=torch.float64))
    error = cov - cov @ d @ torch.linalg.solve(d @ cov @ d + noise, d @ cov)
    return float(error[-1, -1].real)


def conditional(rho: complex, frames: int) -> tuple[Tensor, Tensor]:
    """F2: the law of a chunk of C frames when the frames before it are known. Only the last of them, u_p, matters:

        mean_i = rho^i u_p,   S_ij = rho^{i-j} (1 - |rho|^{2 min(i, j)}) for i >= j,   i, j = 1 ... C.

    Returns (rho^i) [C] and S [C, C]."""
    i = torch.arange(1, frames + 1)
    shorter = torch.minimum(i[:, None], i)
    return powers(rho, i), covariance(rho, frames) * (1 - abs(rho) ** (2 * shorter.double()))


# --- flow maps


def function_of(matrix: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of a Hermitian matrix, through its eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * function(values.clamp_min(0)).to(vectors.dtype)) @ vectors.mH


def flow_map(cov: Tensor, t: float, target: float = 0.0) -> Tensor:
    """F3: the matrix of the probability-flow ODE of N(mean, cov) from level t to a lower one,

        x' - alpha' mean = M (x - alpha mean),   M = (alpha'^2 Sigma + sigma'^2)^{1/2} (alpha^2 Sigma +
        sigma^2)^{-1/2}.

    With S of `conditional` it is the causal flow map of a chunk; with `covariance`, that of the whole video. From pure
    noise to data it is Sigma^{1/2}."""
    return function_of(cov, lambda v: (((1 - target) ** 2 * v + target**2) / ((1 - t) ** 2 * v + t**2)).sqrt())


def denoiser_gain(t: Levels, variance: float) -> Tensor:
    """k(t) = (1 - t) v / ((1 - t)^2 v + t^2): the optimal denoiser of N(0, v). With v = s^2 it is what teacher forcing
    learns for chunks of one frame: x0 = mu + k(t) (x_t - (1 - t) mu), mu = m + rho u_p."""
    t = torch.as_tensor(t, dtype=torch.float64)
    return (1 - t) * variance / ((1 - t) ** 2 * variance + t**2)


def flow_map_gain(t: Levels, variance: float) -> Tensor:
    """F5: kappa(t) = s / sqrt((1 - t)^2 s^2 + t^2), s^2 = v: the flow map of N(0, v) from level t to 0.

    It is the fixed point of Self Forcing with renoising, chunks of one frame, and every exit matched: the gain of the
    step at t becomes kappa(t), the coefficient of the last frame rho, and the variance 1 in every frame for ever.
    kappa(t) = k(t) sqrt((1 - t)^2 s^2 + t^2) / ((1 - t) s): Self Forcing turns denoiser gains into flow-map gains."""
    t = torch.as_tensor(t, dtype=torch.float64)
    return math.sqrt(variance) / ((1 - t) ** 2 * variance + t**2).sqrt()


# --- where few-step students end


def sampled_variance(
    timesteps: Sequence[float], step_gains: Sequence[float] | Tensor, transition: Literal["ode", "renoise"]
) -> float:
    """F4: g^2, the variance around mu of a frame sampled with x0 = mu + gain (x_t - (1 - t) mu) at each step.

    With V the variance of x_t - (1 - t) mu, which is 1 at the first step (pure noise, timesteps[0] = 1):
        renoise:  V' = (1 - t')^2 gain^2 V + t'^2
        ode:      V' = ((1 - t') gain + t' (1 - (1 - t) gain) / t)^2 V
        g^2 = gain_n^2 V_n, the variance after the last step, from t_n to 0.
    Raises ValueError if the first timestep is not 1, as there is signal in x_t then and none in the noise."""
    if timesteps[0] != 1:
        raise ValueError(f"sampling starts from pure noise, at timestep 1; got {timesteps[0]}")
    variance = 1.0
    rows = [float(g) for g in step_gains]
    for (t, t_next), gain in zip(itertools.pairwise((*timesteps, 0.0)), rows, strict=True):
        kept = t_next * (1 - (1 - t) * gain) / t if transition == "ode" else 0.0
        fresh = t_next if transition == "renoise" else 0.0
        variance = ((1 - t_next) * gain + kept) ** 2 * variance + fresh**2
    return variance


def rollout_variance(first: float, innovation_variance: float, lag: complex, frames: int) -> Tensor:
    """F4: [frames], V_{k+1} = |lag|^2 V_k + g^2 from V_1 = first, where g^2 is what sampling puts in instead of s^2:

        V_k = |lag|^{2(k-1)} V_1 + g^2 (1 - |lag|^{2(k-1)}) / (1 - |lag|^2),   V_inf = g^2 / s^2 for lag = rho.

    This is the drift of few-step teacher forcing: videos fade, although every conditional is the exact one."""
    decay = abs(lag) ** (2 * torch.arange(frames, dtype=torch.float64))
    geometric = (1 - decay) / (1 - abs(lag) ** 2) if abs(lag) != 1 else torch.arange(frames, dtype=torch.float64)
    return decay * first + innovation_variance * geometric


def mean_drift(error: complex, rho: complex, chunks: int) -> complex:
    """F9: where the mean is after n chunks, if each adds a constant error b: b (1 - rho^n) / (1 - rho)."""
    return error * (1 - rho**chunks) / (1 - rho)


# --- the gradient of distribution matching


def rollout_map(lag: complex | Tensor, frame_gains: Tensor) -> Tensor:
    """K [F, F] of the linear one-step student u_1 = g_1 e_1, u_k = c u_{k-1} + g_k e_k, so that u = K e:
    K_jk = c^{j-k} g_k for j >= k, and 0 above the diagonal. lag: c.  frame_gains: [F] complex."""
    lag = torch.as_tensor(lag, dtype=torch.complex128)
    k = torch.arange(len(frame_gains))
    steps = (k[:, None] - k).clamp_min(0)
    return torch.tril(lag ** steps.to(torch.complex128)) * frame_gains


def score_gap(cov: Tensor, student_cov: Tensor, t: float) -> Tensor:
    """F6: M [F, F], so that fake(x_t) - teacher(x_t) = M (x_t - alpha m), as x0 predictions, where the fake score is
    the exact denoiser of the student's own law. It is sigma^2 / alpha [(alpha^2 Sigma + sigma^2)^-1 - (alpha^2 Sigma_q
    + sigma^2)^-1], written without the division by alpha."""
    levels = torch.full((len(cov),), t, dtype=torch.float64)
    return gains(student_cov, levels) - gains(cov, levels)


def dmd_gradient(
    rho: complex, lag: complex, frame_gains: Tensor, t: float, attached: bool = False
) -> tuple[Tensor, Tensor]:
    """F6: the expectation of the gradient of `signals.surrogate` with respect to c and g of `rollout_map`, for
    renoising to level t, without normaliser: E Re sum_k conj(g_k) x_k(c, g), with g = M x_t held constant and summed
    over frames.

    As E[g conj(e)] = alpha M K, the gradient of an entry K_jk is N_jk = alpha (M K)_jk. attached: gradient flows from
    a frame to the earlier ones. Otherwise the frame before is a constant, and with Sigma_q = K K^H
        d/dc = alpha sum_k (M Sigma_q)_{k,k-1},   d/dg_k = alpha (M K)_kk.
    Returns complex d/dc and d/dg [F]: the real and imaginary parts are the derivatives with respect to those of c,
    g."""
    cov, student_map = covariance(rho, len(frame_gains)), rollout_map(lag, frame_gains)
    gap = (1 - t) * score_gap(cov, student_map @ student_map.mH, t)
    if not attached:
        return torch.diagonal(gap @ student_map @ student_map.mH, -1).sum(), torch.diagonal(gap @ student_map)
    with torch.enable_grad():
        leaf = torch.tensor(lag, dtype=torch.complex128, requires_grad=True)
        leaves = frame_gains.to(torch.complex128).detach().requires_grad_()
        inner = ((gap @ student_map).conj() * rollout_map(leaf, leaves)).sum().real
        return torch.autograd.grad(inner, (leaf, leaves))  # type: ignore[return-value]


# --- initialisation from the teacher's ODE


def ode_initialisation_loss(rho: complex, frames: int) -> Tensor:
    """F7: [F], the share of a frame's conditional variance that a causal student cannot explain when it regresses the
    bidirectional teacher's ODE x = Sigma^{1/2} e, seeing its own noise e_i and the frames before it:

        R_i = 1 - c C^-1 c^H,   C = Cov(x_<i, e_i),   c = Cov(x_i, (x_<i, e_i)),   share R_i / s^2 (R_1 for the first).

    Pairs of the causal flow map (`flow_map` of `conditional`) lose nothing: x_i = rho x_{i-1} + s e_i is a function of
    what the student sees. This is Causal Forcing's argument (arXiv 2602.02214) in numbers."""
    cov = covariance(rho, frames)
    root = function_of(cov, torch.sqrt)
    shares = []
    for i in range(frames):
        seen = torch.zeros(i + 1, i + 1, dtype=torch.complex128)
        seen[:i, :i], seen[:i, i], seen[i, :i], seen[i, i] = cov[:i, :i], root[:i, i], root[:i, i].conj(), 1
        row = torch.cat([cov[i, :i], root[i, i : i + 1]])
        residual = 1 - (row @ torch.linalg.solve(seen, row.conj())).real
        shares.append(residual / (innovation(rho) if i else 1))
    return torch.stack(shares)


# --- rewards


def motion_form(frames: int, phase: float) -> Tensor:
    """B [F, F] Hermitian of the reward r = Re sum_k e^{-i phase} z_{k+1} conj(z_k) = z^H B z: motion by that angle."""
    upper = torch.diag(torch.full((frames - 1,), 0.5, dtype=torch.complex128), 1)
    turned = upper * complex(math.cos(phase), -math.sin(phase))
    return turned + turned.mH


def tilted_precision(rho: complex, form: Tensor, strength: float) -> Tensor:
    """F10: the precision of the law of CN(0, Sigma) tilted by exp(strength r), r = z^H B z: Sigma^-1 - strength B.

    Raises ValueError if it is not positive: the tilted law does not exist then."""
    precision = torch.linalg.inv(covariance(rho, len(form))) - strength * form
    least = float(torch.linalg.eigvalsh(precision).min())
    if least <= 0:
        raise ValueError(f"a tilt of {strength} has no law: the least eigenvalue of its precision is {least:.3g}")
    return precision


def tilted_weights(rhos: Sequence[complex], form: Tensor, strength: float) -> Tensor:
    """F10: the probabilities of the motions in an even mixture after the tilt, p'_k proportional to
    det(Sigma_k^-1) / det(Sigma_k^-1 - strength B). Means are 0."""
    logs = [
        torch.logdet(torch.linalg.inv(covariance(rho, len(form)))).real
        - torch.logdet(tilted_precision(rho, form, strength)).real
        for rho in rhos
    ]
    return torch.stack(logs).softmax(0)
