"""Flow maps: where the probability-flow ODE carries a point, and the identities from which networks learn it.

Time runs from t = 1 (noise) to t = 0 (data). A network gives the average velocity u over [s, t],

    X_{t,s}(x) = x - (t - s) u(x, t, s),    u(x, t, t) = v(x, t),

where v is the velocity of the ODE dx/dt = v. On the flow-matching path x_t = (1 - t) x0 + t noise, v is
E[noise - x0 | x_t]. There are four identities. Each of the first three, together with the last one, holds only for the
exact map:

    Lagrangian (the end moves)    u - (t - s) d_s u = v(X_{t,s}(x), s)
    Eulerian (the start moves)    u + (t - s) (d_t u + grad u . v) = v(x, t)           (MeanFlow's)
    semigroup                     (t - s) u(x, t, s) = (t - m) u(x, t, m) + (m - s) u(X_{t,m}(x), m, s),  s <= m <= t
    diagonal                      u(x, t, t) = v(x, t)

All functions take callables: a network, or the exact map of a Gaussian. x: [B, ...]; t, s, m: [B], s <= m <= t.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fastgen import signals
from fastgen.batch import Conditioning
from fastgen.denoiser import NO_INPUTS, Denoiser, Inputs
from fastgen.flow.tangents import live_tangent, tangent
from fastgen.schedule import FlowSchedule, expand

AverageVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # u(x, t, s)
Velocity = Callable[[Tensor, Tensor], Tensor]  # v(x, t)
Tangent = Callable[..., tuple[Tensor, Tensor]]
Distance = Literal["huber", "elementwise_huber", "square"]

SHORTEST = 1e-3  # the lowest level at which a velocity is evaluated: towards 0 it is 0 / 0


def average_velocity(student: Denoiser, cond: Conditioning, inputs: Inputs = NO_INPUTS) -> AverageVelocity:
    """The u of a two-time network. inputs: its other inputs, such as guidance. Raises ValueError if the network is not
    a flow-matching model."""
    require_flow(student)
    return lambda x, t, s: student(x, t, cond, replace(inputs, s=s), predict="flow_prediction")


def require_flow(denoiser: Denoiser) -> None:
    if not isinstance(denoiser.schedule, FlowSchedule):
        raise ValueError("flow maps need a flow-matching model; this one has another noise schedule")


def check_backbone(backbone: Any) -> None:
    """The same check on the backbone section of a recipe, before weights load."""
    if not backbone.flow_matching:
        raise ValueError(
            f"backbone {backbone.name} is a variance-preserving diffusion, and flow maps need a flow-matching model; "
            "use sd3 or wan"
        )


def rows_of(mask: Tensor, denoiser: Denoiser) -> Tensor:
    """The indices of the rows where mask [B] is true. If there are none and the network is sharded, row 0, because all
    processes have to call it together; the caller must not use the result of that row."""
    rows = mask.nonzero().squeeze(1)
    return rows.new_zeros(1) if denoiser.is_sharded and not len(rows) else rows


def diagonal(u: AverageVelocity) -> Velocity:
    """The network's own velocity, u(x, t, t)."""
    return lambda x, t: u(x, t, t)


def clamped(velocity: Velocity) -> Velocity:
    """The same velocity, with lower levels raised to SHORTEST."""
    return lambda x, t: velocity(x, t.clamp_min(SHORTEST))


def guided_velocity(
    teacher: Denoiser,
    cond: Conditioning,
    uncond: Conditioning,
    scale: float | Sequence[float] | Tensor,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
    """A frozen teacher's velocity under guidance (`signals.guided`), without gradient. Lower levels are raised to
    SHORTEST. scale: one number, one per expert, or one per sample, [B]. Raises ValueError if the teacher is not a
    flow-matching model."""
    require_flow(teacher)

    @torch.no_grad()
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        predict = partial(teacher, predict="flow_prediction")
        strength = scale if isinstance(scale, Tensor) else teacher.per_expert(scale, t)
        return signals.guided(predict, x, t, cond, uncond, strength, interval)

    return clamped(velocity)


def jump(u: AverageVelocity, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """X_{t,s}(x) = x - (t - s) u(x, t, s)."""
    return x - expand(t - s, x) * u(x, t, s)


# --- targets for u(x, t, s), without gradient


@torch.no_grad()
def discrete_target(u: AverageVelocity, x: Tensor, t: Tensor, middle: Tensor, s: Tensor, velocity: Tensor) -> Tensor:
    """The target from a step to `middle`, m, along a velocity [B, ...], and the network's jump from there to s:

        l velocity + (1 - l) u(x - (t - m) velocity, m, s),    l = (t - m) / (t - s),    s <= m < t

    The formula is the same for several methods (derived), which differ in the velocity: that of the conditional path
    (consistency training, alpha-Flow), of a teacher (consistency distillation, where s is the edge of a phase),
    u(x, t, m) itself (progressive, shortcut), or the mean of two steps of a teacher (progressive distillation). At
    m = s, and at t = s, the target is the velocity."""
    gap = t - s
    share = expand(torch.where(gap > 0, (t - middle) / gap.clamp_min(torch.finfo(t.dtype).tiny), 1.0), x)
    moved = x - expand(t - middle, x) * velocity
    return share * velocity + (1 - share) * u(moved, middle.clamp_min(SHORTEST), s)


@torch.no_grad()
def eulerian_target(
    u: AverageVelocity,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    velocity: Tensor,
    along: Tensor | None = None,
    warmup: float = 1.0,
    differentiate: Tangent = tangent,
) -> Tensor:
    """velocity - warmup (t - s) D u,    D u = d_t u + grad u . along                    (MeanFlow, arXiv 2505.13447)

    This is the limit m -> t of `discrete_target`. along: the velocity the point moves with, by default `velocity`.
    warmup: a value below 1 reduces the influence of the derivative early in training."""
    _, derivative = eulerian_derivative(u, x, t, s, velocity if along is None else along, differentiate)
    return velocity - warmup * expand(t - s, x) * derivative


def eulerian_derivative(
    u: AverageVelocity, x: Tensor, t: Tensor, s: Tensor, along: Tensor, differentiate: Tangent = tangent
) -> tuple[Tensor, Tensor]:
    """u(x, t, s) and D u = d_t u + grad u . along, with s fixed, both without gradient."""
    directions = (along, torch.ones_like(t), torch.zeros_like(s))
    return differentiate(u, (x, t, s), directions, room=(1 - t, t - torch.maximum(s, torch.full_like(s, SHORTEST))))


def lagrangian_target(
    u: AverageVelocity, velocity: Velocity, x: Tensor, t: Tensor, s: Tensor, differentiate: Tangent = tangent
) -> Tensor:
    """v(X_{t,s}(x), s) + (t - s) d_s u(x, t, s): the Lagrangian identity, without gradient through its derivative.

    It is a semigradient target: AYF's LMD, arXiv 2506.14603, and at t = 1 FreeFlow's L_pred, 2511.19428."""
    directions = (torch.zeros_like(x), torch.zeros_like(t), torch.ones_like(s))
    value, derivative = differentiate(u, (x, t, s), directions, room=(t - s, s))
    with torch.no_grad():
        return velocity(x - expand(t - s, x) * value, s) + expand(t - s, x) * derivative


@torch.no_grad()
def heun_step(velocity: Velocity, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """x_s from x_t, by the mean of the velocities at both ends of an Euler step."""
    first, gap = velocity(x, t), expand(t - s, x)
    return x - gap * (first + velocity(x - gap * first, s)) / 2


@torch.no_grad()
def edm_heun_step(velocity: Velocity, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Heun's step in sigma = t / (1 - t), by the mean of the predicted noises at both ends   (EDM, arXiv 2206.00364)

        x_s / (1 - s) = x_t / (1 - t) + (sigma_s - sigma_t) (noise(x_t, t) + noise(x_s', s)) / 2

    x_s': the Euler step, which is the same in t and in sigma. From t = 1, where sigma is infinite, the step is Euler's
    (ours; CM's paths begin at sigma = 80)."""
    first = velocity(x, t)
    euler = x - expand(t - s, x) * first
    noise = x + expand(1 - t, x) * first
    later = euler + expand(1 - s, x) * velocity(euler, s)
    gap = torch.where(t < 1, (t - s) / (1 - t), 0.0)
    return euler + expand(gap, x) * (noise - later) / 2


@torch.no_grad()
def euler_path(velocity: Velocity, x: Tensor, levels: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(x, t, velocity) at each of the decreasing levels [B], along Euler steps from noise x [B, ...] at t = 1."""
    t, path = torch.ones_like(levels[0]), list[tuple[Tensor, Tensor, Tensor]]()
    v = velocity(x, t)
    for level in levels:
        x, t = x - expand(t - level, x) * v, level
        v = velocity(x, t)
        path.append((x, t, v))
    return path


def trig_tangent(
    rate: Velocity,
    x: Tensor,
    angle: Tensor,
    along: Tensor,
    warmup: float = 1.0,
    differentiate: Tangent = tangent,
    whole_derivative: bool = False,
) -> tuple[Tensor, Tensor]:
    """sigma_d F(x / sigma_d, a), and the tangent g of sCM's squared loss, both without gradient:

        g = cos a df/da = -cos^2 a (sigma_d F - dx/da) - r (cos a sin a x + sigma_d dF/da cos a sin a),
        f = cos a x - sin a sigma_d F,  with d along dx/da                   (sCM, arXiv 2410.11081, Alg. 1)

    rate: (x [B, ...], a [B]) -> sigma_d F, as `schedule.flow_to_trig_velocity` gives it. along: dx/da. r: the warm-up;
    the exact F has g = 0 only at r = 1. The derivative is taken along (cos a sin a dx/da, cos a sin a) in one piece.
    Nothing is then divided by a factor that vanishes at the ends (sCM Sec. 4.1).
    whole_derivative: another warm-up, that of rCM's code (arXiv 2510.08431). It keeps dF/da whole from the start:
        g = -cos a sqrt(1 - r^2 sin^2 a) (sigma_d F - dx/da) - r cos a sin a x - sigma_d dF/da cos a sin a"""
    cos, sin = torch.cos(angle), torch.sin(angle)
    both = expand(cos * sin, x)
    value, derivative = differentiate(rate, (x, angle), (both * along, cos * sin))
    if whole_derivative:
        pull = cos * (1 - (warmup * sin) ** 2).clamp_min(0).sqrt()
        return value, -expand(pull, x) * (value - along) - warmup * both * x - derivative
    return value, -expand(cos**2, x) * (value - along) - warmup * (both * x + derivative)


# --- residuals with gradient through the derivative


def lagrangian_residual(u: AverageVelocity, velocity: Velocity, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """u - (t - s) d_s u - sg v(sg X_{t,s}(x), s)                 (LSD, arXiv 2505.18825, the authors' "convex" form)

    Gradient flows through u and its derivative in s."""
    value, derivative = live_tangent(lambda end: u(x, t, end), (s,), (torch.ones_like(s),))
    with torch.no_grad():
        target = velocity(x - expand(t - s, x) * value, s)
    return value - expand(t - s, x) * derivative - target


def eulerian_residual(
    u: AverageVelocity, velocity: Velocity, x: Tensor, t: Tensor, s: Tensor, space: bool = True
) -> Tensor:
    """u + (t - s) (d_t u + grad u . v) - v,   v = sg v(x, t)                                  (ESD, arXiv 2505.18825)

    Gradient flows through u and its whole derivative: the authors' "convex" form. space: False detaches grad u . v,
    which is their "full" form. It is for velocities of single samples, whose noise would otherwise enter squared. Its
    gradient is not the gradient of any squared error."""
    with torch.no_grad():
        v = velocity(x, t)
    zeros, ones = torch.zeros_like(t), torch.ones_like(t)
    if space:
        value, derivative = live_tangent(lambda point, start: u(point, start, s), (x, t), (v, ones))
        return value + expand(t - s, x) * derivative - v
    _, spatial = tangent(u, (x, t, s), (v, zeros, zeros))
    value, derivative = live_tangent(lambda start: u(x, start, s), (t,), (ones,))
    return value + expand(t - s, x) * (derivative + spatial) - v


# --- weights


def mean_squares(residual: Tensor, on: Tensor) -> dict[str, Tensor]:
    """The mean square of a residual off the diagonal and on it, for the log. residual: [B, ...]; on: [B] bool."""
    square = signals.per_sample_mean(residual.detach().square())
    return {
        name: (square * rows).sum() / rows.sum().clamp_min(1)
        for name, rows in (("map", (~on).to(square)), ("diagonal", on.to(square)))
    }


def adaptive_loss(residual: Tensor, power: float, floor: float, weight: Tensor | None = None) -> Tensor:
    """mean w |r|^2 / sg(|r|^2 + floor)^power,    |r|^2 the sum over a sample's elements   (MeanFlow, arXiv 2505.13447)

    power 0 gives the plain square; power 1 keeps little more than the direction. weight: [B]. With noisy targets, a
    power above 0 also weights samples by their noise. If the noise is skewed, the optimum is then not exactly the mean
    of the targets (derived)."""
    square = residual.flatten(1).square().sum(1)
    scaled = square / (square.detach() + floor) ** power
    return (scaled if weight is None else weight * scaled).mean()


def weighted_distance(error: Tensor, distance: Distance, c: float, weight: Tensor) -> Tensor:
    """mean w d(e): the mean square of a sample's elements, or one of the two forms of `pseudo_huber` with its c.

    error: [B, ...]; weight: [B]."""
    if distance == "square":
        return (weight * signals.per_sample_mean(error.square())).mean()
    return pseudo_huber(error, c, weight, distance == "elementwise_huber")


def pseudo_huber(error: Tensor, c: float, weight: Tensor, elementwise: bool = False) -> Tensor:
    """mean w (sqrt(|e|^2 + c^2 d) - c sqrt(d)),  |e|^2 the sum over a sample's d elements   (iCT, arXiv 2310.14189)

    elementwise: mean w (sqrt(e^2 + c^2) - c), over samples and elements (LCM's and PCM's code). For large errors its
    gradient is a sign over d, which has norm 1 / sqrt(d); that of a sample's norm has norm 1. c = 0 gives the norm
    |e|, or the mean of the elements' sizes. weight: [B]."""
    flat = error.flatten(1)
    if elementwise:
        floor = c
        distance = (flat.square() + max(floor, 1e-12) ** 2).sqrt().mean(1)
    else:
        floor = c * flat.shape[1] ** 0.5
        distance = (flat.square().sum(1) + max(floor, 1e-12) ** 2).sqrt()
    return (weight * (distance - floor)).mean()
