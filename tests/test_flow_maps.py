"""The identities of flow maps on exact maps: a Gaussian in closed form, a mixture by a fine ODE solve."""

import functools
import math

import pytest
import torch
from oracles import M, S, average_velocity, consistency_networks, gaussian_batch, spread
from torch import Tensor

from fastgen.backbones.gaussian_mixture import Mixture
from fastgen.flow import flow_maps
from fastgen.flow.flow_maps import (
    adaptive_loss,
    diagonal,
    discrete_target,
    eulerian_derivative,
    eulerian_residual,
    eulerian_target,
    jump,
    lagrangian_residual,
    lagrangian_target,
)
from fastgen.schedule import FlowSchedule, expand, flow_to_trig_velocity, trig_to_flow

F64 = torch.float64


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """Of N(0.7, 0.25), closed form."""
    t = expand(t, x)
    return -M + (t - (1 - t) * S**2) / spread(t) ** 2 * (x - (1 - t) * M)


def number(*values: float) -> list[Tensor]:
    return [torch.tensor([v], dtype=F64) for v in values]


def draws(n: int = 64, dim: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    t, s = (torch.rand(n, generator=generator, dtype=F64) for _ in range(2))
    t, s = torch.maximum(t, s).clamp_min(0.05), torch.minimum(t, s)
    x0 = M + S * torch.randn(n, dim, generator=generator, dtype=F64)
    return FlowSchedule().add_noise(x0, torch.randn(n, dim, generator=generator, dtype=F64), t), t, s


def perturbed(size: float):  # type: ignore[no-untyped-def]
    """The exact map off by size times a smooth function of everything, the diagonal included."""
    return lambda x, t, s: average_velocity(x, t, s) + size * torch.sin(2 * x + expand(3 * t - 2 * s, x))


# --- golden numbers (m = 0.7, s = 0.5, x = 1)


def test_golden_numbers_of_the_gaussian() -> None:
    x, t, s, m = number(1.0, 0.6, 0.3, 0.4)
    _, du = eulerian_derivative(average_velocity, x, t, s, velocity(x, t))
    partial = [flow_maps.tangent(average_velocity, (x, t, s), d)[1] for d in (number(0, 1, 0), number(0, 0, 1))]
    found = {
        "v": velocity(x, t),
        "X": jump(average_velocity, x, t, s),
        "u": average_velocity(x, t, s),
        "f": jump(average_velocity, x, t, 0 * s),
        "D": x - t * velocity(x, t),
        "Du": du,
        "d_t u": partial[0],
        "d_s u": partial[1],
        "v(X)": velocity(jump(average_velocity, x, t, s), s),
        "X to m": jump(average_velocity, x, t, m),
        "u to m": average_velocity(x, t, m),
        "u from m": average_velocity(jump(average_velocity, x, t, m), m, s),
        "discrete": discrete_target(average_velocity, x, t, m, s, velocity(x, t)),
    }
    wanted = [
        0.2,
        1.014786,
        -0.049286,
        1.269210,
        0.88,
        0.830952,
        0.650198,
        1.140057,
        -0.391303,
        0.989210,
        0.053950,
        -0.255757,
        0.040482,
    ]
    for (name, value), number_wanted in zip(found.items(), wanted, strict=True):
        print(name, value.item())
        assert value.item() == pytest.approx(number_wanted, abs=1e-6), name


def test_golden_numbers_of_trigflow() -> None:
    x, a = number(1.0, 0.8)
    x_flow, t = trig_to_flow(x, a)
    v = velocity(x_flow, t)
    rate = flow_to_trig_velocity(v, x, a)
    variance = torch.cos(a) ** 2 * S**2 + torch.sin(a) ** 2
    exact = -torch.sin(a) * M + torch.sin(a) * torch.cos(a) * (1 - S**2) / variance * (x - torch.cos(a) * M)
    assert rate.item() == pytest.approx(-0.200187, abs=1e-6) and torch.allclose(rate, exact, atol=1e-14)
    assert [t.item(), x_flow.item(), v.item()] == pytest.approx([0.507301, 0.707182, -0.262428], abs=1e-6)
    consistency = jump(average_velocity, x_flow, t, 0 * t)
    assert consistency.item() == pytest.approx(1.021209, abs=1e-6)
    # sCM's F for its consistency function f = cos a x - sin a F
    assert ((torch.cos(a) * x - consistency) / torch.sin(a)).item() == pytest.approx(-0.452358, abs=1e-6)


@pytest.mark.parametrize("sigma_data", [1.0, 0.5, 2.0])
def test_trigflow_is_the_flow_path_on_another_clock(sigma_data: float) -> None:
    """The conversion between the two states keeps x0 and noise; the converted conditional velocity is d x_a / da."""
    generator = torch.Generator().manual_seed(1)
    x0, noise = (torch.randn(20, 3, generator=generator, dtype=F64) for _ in range(2))
    a = torch.linspace(0.0, math.pi / 2, 20, dtype=F64)
    x = expand(torch.cos(a), x0) * x0 + expand(sigma_data * torch.sin(a), x0) * noise
    x_flow, t = trig_to_flow(x, a, sigma_data)
    assert torch.allclose(x_flow, FlowSchedule().add_noise(x0, noise, t), atol=1e-14)
    rate = flow_to_trig_velocity(noise - x0, x, a, sigma_data)
    wanted = expand(sigma_data * torch.cos(a), x0) * noise - expand(torch.sin(a), x0) * x0
    assert torch.allclose(rate, wanted, atol=1e-13)


# --- the four identities


def losses(u, v) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """The mean square of each loss; v None: the network's own diagonal."""
    x, t, s = draws()
    own = diagonal(u) if v is None else v
    m = (s + t) / 2
    errors = {
        "lagrangian": lagrangian_residual(u, own, x, t, s),
        "semigradient": u(x, t, s) - lagrangian_target(u, own, x, t, s),
        "eulerian": eulerian_residual(u, own, x, t, s),
        "eulerian, full": eulerian_residual(u, own, x, t, s, space=False),
        "mean flow": u(x, t, s) - eulerian_target(u, x, t, s, own(x, t)),
        "progressive": u(x, t, s) - discrete_target(u, x, t, m, s, u(x, t, m)),
        "diagonal": u(x, t, t) - velocity(x, t),
    }
    return {name: error.square().mean() for name, error in errors.items()}


@pytest.mark.parametrize("v", [velocity, None], ids=["teacher", "self"])
def test_the_exact_map_has_no_loss_and_a_perturbed_one_grows_as_its_square(v) -> None:  # type: ignore[no-untyped-def]
    exact = losses(average_velocity, v)
    small, large = losses(perturbed(1e-3), v), losses(perturbed(1e-2), v)
    for name in exact:
        ratio = float(large[name] / small[name])
        print(f"{name}: {exact[name]:.1e}, perturbed {small[name]:.2e}, ratio {ratio:.1f}")
        assert exact[name] < 1e-20 and small[name] > 1e-8
        assert 90 < ratio < 110, name


def test_zero_solves_the_semigroup_alone() -> None:
    """u = 0 has no progressive loss: without the diagonal there is nothing about v in it."""
    found = losses(lambda x, t, s: torch.zeros_like(x), None)
    assert found["progressive"] == 0 and found["diagonal"] > 0.1


def test_the_mixtures_map_by_an_ode_solve_has_no_loss() -> None:
    """Three components are not affine, and catch what a Gaussian hides. u by 24 steps of RK4 from each point; its
    derivatives by forward mode through the solve."""
    mixture = Mixture(
        torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.3, -1.2]], dtype=F64),
        torch.tensor([[0.3, 0.4], [0.5, 0.3], [0.4, 0.4]], dtype=F64),
        torch.log(torch.tensor([[0.2, 0.5, 0.3]], dtype=F64)),
    )
    label = torch.zeros(6, dtype=torch.int64)

    def v(x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None]
        return (x - mixture.posterior_mean(x, 1 - t, t, label)) / t

    def u(x: Tensor, t: Tensor, s: Tensor, steps: int = 24) -> Tensor:
        h, y = (s - t) / steps, x
        for i in range(steps):
            at = t + i * h
            k1 = v(y, at)
            k2 = v(y + h[:, None] / 2 * k1, at + h / 2)
            k3 = v(y + h[:, None] / 2 * k2, at + h / 2)
            k4 = v(y + h[:, None] * k3, at + h)
            y = y + h[:, None] / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return (x - y) / (t - s)[:, None]

    x, t, s = draws(6, 2)
    t, s = t.clamp_min(0.3), torch.minimum(s, t.clamp_min(0.3) - 0.1).clamp_min(0.1)
    m = (t + s) / 2
    errors = {
        "semigradient": u(x, t, s) - lagrangian_target(u, v, x, t, s),
        "mean flow": u(x, t, s) - eulerian_target(u, x, t, s, v(x, t)),
        "progressive": u(x, t, s) - discrete_target(u, x, t, m, s, u(x, t, m)),
    }
    for name, error in errors.items():
        print(name, error.abs().max().item())
        assert error.abs().max() < 2e-5, name


def test_the_eulerian_target_is_the_limit_of_the_discrete_one() -> None:
    """(discrete - eulerian) falls in proportion to the gap, and the error that alpha-Flow makes at alpha,
    (target - u) / alpha, falls with alpha: 1.27, 0.125, 0.012 of a unit at 0.1, 0.01, 0.001, in proportion."""
    x, t, s = draws()
    t, s = t.clamp_min(0.4), torch.minimum(s, t - 0.2).clamp_min(0.05)
    v = velocity(x, t)
    limit = eulerian_target(average_velocity, x, t, s, v)
    off = []
    for alpha in (0.1, 0.01, 0.001):
        target = discrete_target(average_velocity, x, t, alpha * s + (1 - alpha) * t, s, v)
        off.append(float(((target - limit) / alpha).abs().mean()))
    print(off)
    assert off[0] > 5 * off[1] > 25 * off[2] > 0
    secant = discrete_target(average_velocity, x, t, (s + t) / 2, s, average_velocity(x, t, (s + t) / 2))
    assert torch.allclose(secant, average_velocity(x, t, s), atol=1e-12)


@pytest.mark.parametrize("identity", ["eulerian", "lagrangian"])
def test_finite_differences_ask_the_map_for_no_time_outside_its_triangle(identity: str) -> None:
    """0 <= s <= t <= 1 whatever the step, and the differences near the edges are those of the derivative."""
    asked: list[tuple[Tensor, Tensor]] = []

    def u(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        asked.append((t, s))
        return average_velocity(x, t, s)

    t, s = torch.tensor([[1.0, 0.0], [0.995, 0.99], [0.4, 0.002], [0.7, 0.3]], dtype=F64).T
    x = torch.linspace(-1, 2, 4, dtype=F64)[:, None]
    coarse = functools.partial(flow_maps.tangent, backend="difference", step=0.01)
    for differentiate in (coarse, flow_maps.tangent):
        if identity == "eulerian":
            found = eulerian_derivative(u, x, t, s, velocity(x, t), differentiate)[1]
        else:
            found = lagrangian_target(u, velocity, x, t, s, differentiate)
        if differentiate is coarse:
            rough = found
            assert len(asked) == 3
            assert all((s >= 0).all() and (s <= t).all() and (t <= 1).all() for t, s in asked)
    assert torch.allclose(rough, found, atol=0.03)


def test_the_conditional_velocity_has_no_mean_gradient_at_the_exact_map() -> None:
    """Per sample the MeanFlow residual is of order one with noise - x0 for v; its mean given x_t is 0, against any
    probe function of x_t. Here: 400,000 samples at one (t, s), four probes, errors within 4 standard errors."""
    n = 400_000
    generator = torch.Generator().manual_seed(2)
    x0 = M + S * torch.randn(n, 1, generator=generator, dtype=F64)
    noise = torch.randn(n, 1, generator=generator, dtype=F64)
    t, s = torch.full((n,), 0.6, dtype=F64), torch.full((n,), 0.3, dtype=F64)
    x = FlowSchedule().add_noise(x0, noise, t)
    residual = average_velocity(x, t, s) - eulerian_target(average_velocity, x, t, s, noise - x0)
    assert residual.square().mean() > 0.1
    for probe in (torch.ones_like(x), x, x.sin(), (x > 0.5).to(F64)):
        product = residual * probe
        error = float(product.mean().abs() / (product.std() / n**0.5))
        print(f"{error:.2f} standard errors")
        assert error < 4


# --- where gradient goes


def test_gradient_reaches_the_live_branch_alone() -> None:
    """Against hand-written versions in which everything else is detached."""
    x, t, s = draws(32, 2)
    weight = torch.tensor(0.3, dtype=F64, requires_grad=True)

    def u(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return average_velocity(x, t, s) + weight * torch.sin(x + expand(t - s, x))

    def gradient(loss: Tensor) -> float:
        return float(torch.autograd.grad(loss, weight)[0])

    own, gap = diagonal(u), expand(t - s, x)
    phase, w = x + gap, weight.detach()
    value, d_end = u(x, t, s).detach(), flow_maps.tangent(u, (x, t, s), (0 * x, 0 * t, torch.ones_like(s)))[1]
    target = own(x - gap * value, s).detach()
    live = torch.sin(phase) + gap * torch.cos(phase)  # d residual / d weight, by hand
    wanted = float((2 * (value - gap * d_end - target) * live).mean())
    assert gradient(lagrangian_residual(u, own, x, t, s).square().mean()) == pytest.approx(wanted, rel=1e-9)

    v = own(x, t).detach()
    d_along = flow_maps.tangent(u, (x, t, s), (v, torch.ones_like(t), 0 * s))[1]
    for space in (True, False):
        live = torch.sin(phase) + gap * torch.cos(phase) * (1 + space * v)
        wanted = float((2 * (value + gap * d_along - v) * live).mean())
        found = gradient(eulerian_residual(u, own, x, t, s, space).square().mean())
        assert found == pytest.approx(wanted, rel=1e-9)

    for target in (
        lagrangian_target(u, own, x, t, s),
        eulerian_target(u, x, t, s, own(x, t)),
        discrete_target(u, x, t, (t + s) / 2, s, own(x, t)),
    ):
        assert not target.requires_grad
    assert w > 0


def test_the_lagrangian_gradients_are_those_of_ayf() -> None:
    """AYF's EMD gradient, X^T sg[dX/dt], is (t - s) / 2 times that of MeanFlow's square, for any network."""
    x, t, s = draws(32, 2)
    weight = torch.tensor(0.3, dtype=F64, requires_grad=True)

    def u(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return average_velocity(x, t, s) + weight * torch.sin(x + expand(2 * t - s, x))

    v = velocity(x, t)
    error = (u(x, t, s) - eulerian_target(u, x, t, s, v)).flatten(1).square().sum(1)
    _, total = flow_maps.tangent(lambda x, t, s: jump(u, x, t, s), (x, t, s), (v, torch.ones_like(t), 0 * s))
    for i in range(3):
        mean_flow = torch.autograd.grad(error[i], weight, retain_graph=True)[0]
        emd = torch.autograd.grad((jump(u, x, t, s)[i] * total[i]).sum(), weight, retain_graph=True)[0]
        assert torch.allclose(emd, (t - s)[i] / 2 * mean_flow, rtol=1e-9)


# --- weights, jumps


def test_the_adaptive_loss_is_the_square_at_power_zero_and_a_direction_at_one() -> None:
    residual = torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=F64, requires_grad=True)
    assert adaptive_loss(residual, 0.0, 1.0).item() == pytest.approx((25 + 0.25) / 2)
    (grad,) = torch.autograd.grad(adaptive_loss(residual, 1.0, 1e-9), residual)
    assert torch.allclose(grad, residual.detach() / torch.tensor([[25.0], [0.25]], dtype=F64))
    weighted = adaptive_loss(residual, 0.0, 1.0, torch.tensor([1.0, 0.0], dtype=F64))
    assert weighted.item() == pytest.approx(12.5)


def test_one_euler_step_of_the_exact_velocity_gives_the_mean() -> None:
    """Why naive one-step sampling fails; and an exact map does not."""
    x, t = torch.randn(100, 2, dtype=F64), torch.ones(100, dtype=F64)
    assert torch.allclose(x - velocity(x, t), torch.full_like(x, M), atol=1e-12)
    assert torch.allclose(jump(average_velocity, x, t, 0 * t), M + S * x, atol=1e-12)


def test_the_teachers_velocity_carries_no_gradient() -> None:
    teacher, batch = consistency_networks().student, gaussian_batch(4)
    velocity = flow_maps.guided_velocity(teacher, batch.cond, batch.uncond, 2.0)
    assert not velocity(batch.normal("x").requires_grad_(), batch.uniform("t")).requires_grad
