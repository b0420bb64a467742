"""Each closed form of the AR(1) video against a regression, a simulation, an ODE solver or another formula.

Simulations use the recursion u_{k+1} = rho u_k + s w_k alone. Their bounds are four standard errors."""

import cmath
import math

import pytest
import torch
from torch import Tensor

from fastgen.backbones import ar1_formulas as f

RHO = cmath.rect(0.9, 0.5)
S2 = f.innovation(RHO)
FOUR = (1.0, 0.9375, 0.8333333333333334, 0.625)  # four steps with shift 5
UNSHIFTED = (1.0, 0.75, 0.5, 0.25)


def eye(count: int) -> Tensor:
    return torch.eye(count, dtype=torch.float64)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """CN(0, 1)."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.complex128)


def video(count: int, frames: int, rho: complex = RHO, seed: int = 1) -> Tensor:
    """[count, frames] by the recursion."""
    w = noise(count, frames, seed=seed)
    rows = [w[:, 0]]
    for k in range(1, frames):
        rows.append(rho * rows[-1] + math.sqrt(f.innovation(rho)) * w[:, k])
    return torch.stack(rows, dim=1)


def regression(target: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients A [T, S] of target = A seen, their standard errors, and the residuals, complex least squares."""
    solution = torch.linalg.lstsq(seen, target).solution
    residual = target - seen @ solution
    inverse = torch.linalg.inv(seen.mH @ seen).diagonal().real
    errors = (inverse[:, None] * residual.abs().square().mean(0)).sqrt()
    return solution.T, errors.T, residual


def worst(got: Tensor, expected: Tensor, error: Tensor) -> float:
    """The largest difference in standard errors."""
    return ((got - expected).abs() / error.clamp_min(1e-300)).max().item()


@pytest.mark.parametrize("levels", [(0.4,) * 4, (0.0, 0.0, 0.7, 0.7), (0.05, 0.3, 0.9, 1.0)])
def test_f1_the_gains_are_those_of_a_regression(levels: tuple[float, ...]) -> None:
    """The bidirectional denoiser, a chunk after clean frames, and a level for each frame."""
    u, t = video(100_000, 4), torch.tensor(levels, dtype=torch.float64)
    y = (1 - t) * u + t * noise(*u.shape, seed=2)
    gains = f.gains(f.covariance(RHO, 4), t)
    noisy = t > 0
    got, error, _ = regression(u[:, noisy], y)
    z = worst(got, gains[noisy], error)
    print(f"{z:.2f} standard errors")
    assert z < 4.5  # the largest of up to 16
    assert torch.allclose(gains[~noisy], eye(4)[~noisy].to(gains), atol=1e-12)


def test_f1_of_a_known_past_is_f2() -> None:
    """With two chunks: the gains on the past and the covariance of the chunk are those of the conditional; only the
    last frame of the past counts, so that a window of one frame is exact and a sink, wherever it is put, changes
    nothing."""
    t = 0.6
    powers, s = f.conditional(RHO, 3)
    shrink = (1 - t) * s @ torch.linalg.inv((1 - t) ** 2 * s + t**2 * eye(3))
    lag = (eye(3) - (1 - t) * shrink) @ powers
    for positions in (range(7), (3, 4, 5, 6), (0, 1, 3, 4, 5, 6), (-2, 0, 1, 3, 4, 5, 6)):
        past = len(positions) - 3
        levels = torch.tensor([0.0] * past + [t] * 3, dtype=torch.float64)
        gains = f.gains(f.covariance(RHO, positions), levels)[past:]
        assert (gains[:, past:] - shrink).abs().max() < 1e-12
        assert (gains[:, past - 1] - lag).abs().max() < 1e-12
        assert past == 1 or gains[:, : past - 1].abs().max() < 1e-12
    alone = f.gains(f.covariance(RHO, 3), torch.full((3,), t, dtype=torch.float64))
    marginal = f.covariance(RHO, 3)
    assert (alone - (1 - t) * marginal @ torch.linalg.inv((1 - t) ** 2 * marginal + t**2 * eye(3))).abs().max() < 1e-12


def test_f2_is_the_conditional_law_of_the_simulation() -> None:
    u = video(100_000, 5)
    powers, s = f.conditional(RHO, 3)
    got, error, residual = regression(u[:, 2:], u[:, :2])
    expected = torch.stack([torch.zeros_like(powers), powers], dim=1)
    cov = residual.T @ residual.conj() / len(u)
    z = max(worst(got, expected, error), ((cov - s).abs() * math.sqrt(len(u))).max().item())
    print(f"{z:.2f} standard errors")
    assert z < 4.5


@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_f3_the_flow_map_solves_the_ode(kind: str) -> None:
    """dx/dt = (x_t - E[x0 | x_t]) / t, by 400 Runge-Kutta steps from t = 1 to 0.02, for mean 0."""
    cov = f.conditional(RHO, 3)[1] if kind == "causal" else f.covariance(RHO, 3)
    x = start = noise(20, 3)

    def velocity(x: Tensor, t: float) -> Tensor:
        gains = (1 - t) * cov @ torch.linalg.inv((1 - t) ** 2 * cov + t**2 * eye(3))
        return (x - x @ gains.T) / t

    steps, end = 400, 0.02
    h = (end - 1) / steps
    for i in range(steps):
        t = 1 + i * h
        k1 = velocity(x, t)
        k2 = velocity(x + h / 2 * k1, t + h / 2)
        k3 = velocity(x + h / 2 * k2, t + h / 2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + velocity(x + h * k3, t + h))
    error = (start @ f.flow_map(cov, 1.0, end).T - x).abs().max().item()
    print(f"{kind}: {error:.1e}")
    assert error < 1e-7
    legs = f.flow_map(cov, 0.4) @ f.flow_map(cov, 1.0, 0.4)
    assert (legs - f.flow_map(cov, 1.0)).abs().max() < 1e-12
    assert (legs @ legs.mH - cov).abs().max() < 1e-12  # from noise to data it is a root of the covariance


@pytest.mark.parametrize(
    ("timesteps", "transition", "published"),
    [(FOUR, "renoise", 0.060), (UNSHIFTED, "renoise", 0.287), (UNSHIFTED, "ode", 0.440)],
)
def test_f4_few_step_teacher_forcing_fades_as_computed(
    timesteps: tuple[float, ...], transition: str, published: float
) -> None:
    """A rollout of 12 frames with the exact denoiser of each frame given the one before; and the limit of the
    design."""
    gains = f.denoiser_gain(timesteps, S2)
    g2 = f.sampled_variance(timesteps, gains, transition)  # type: ignore[arg-type]
    assert g2 / S2 == pytest.approx(published, abs=0.001)
    n, seed = 40_000, 10
    u = noise(n)
    found = [1.0]
    for _ in range(11):
        mu, x = RHO * u, noise(n, seed=seed)
        for i, (t, k) in enumerate(zip(timesteps, gains.tolist(), strict=True)):
            x0 = mu + k * (x - (1 - t) * mu)
            t_next = (*timesteps, 0.0)[i + 1]
            seed += 1
            fresh = noise(n, seed=seed) if transition == "renoise" else (x - (1 - t) * x0) / t
            x = (1 - t_next) * x0 + t_next * fresh
        u, seed = x, seed + 1
        found.append(u.abs().square().mean().item())
    expected = f.rollout_variance(1.0, g2, RHO, 12)
    z = ((torch.tensor(found[1:], dtype=torch.float64) / expected[1:] - 1).abs() * math.sqrt(n)).max().item()
    print(f"{transition}: {found[-1]:.4f}, computed {expected[-1]:.4f}; {z:.2f} standard errors")
    assert z < 4


def test_f4_more_steps_fade_less() -> None:
    """The limits for 50 steps with shift 5 by ode and renoise are those of the design, 0.817 and 0.401."""
    for transition, published in (("ode", 0.817), ("renoise", 0.401)):
        u = [1 - i / 50 for i in range(50)]
        timesteps = [5 * v / (1 + 4 * v) for v in u]
        limit = f.sampled_variance(timesteps, f.denoiser_gain(timesteps, S2), transition) / S2  # type: ignore[arg-type]
        print(f"{transition}: {limit:.4f}")
        assert limit == pytest.approx(published, abs=0.001)
    with pytest.raises(ValueError, match="timestep 1"):
        f.sampled_variance((0.9, 0.5), (1, 1), "ode")


def test_f5_flow_map_gains_are_self_forcings_fixed_point() -> None:
    """Every exit of every list has variance s^2, so that every frame has variance 1 for ever. They are the denoiser's
    gains times sqrt((1 - t)^2 s^2 + t^2) / ((1 - t) s)."""
    for timesteps in (FOUR, UNSHIFTED, (1.0,), (1.0, 0.3)):
        kappa = f.flow_map_gain(timesteps, S2)
        for exit_ in range(1, len(timesteps) + 1):
            # an exit ends the list: what is done after it does not matter
            assert f.sampled_variance(timesteps[:exit_], kappa[:exit_], "renoise") == pytest.approx(S2, abs=1e-12)
        t = torch.tensor(timesteps, dtype=torch.float64)[1:]
        factor = ((1 - t) ** 2 * S2 + t**2).sqrt() / ((1 - t) * math.sqrt(S2))
        assert torch.allclose(f.denoiser_gain(t, S2) * factor, kappa[1:], rtol=1e-12)
    assert (f.rollout_variance(1.0, S2, RHO, 1000) - 1).abs().max() < 1e-12
    published = [0.436, 0.465, 0.521, 0.675]
    assert f.flow_map_gain(FOUR, S2).tolist() == pytest.approx(published, abs=0.001)


LAG, GAINS = 0.7 + 0.1j, torch.tensor([0.9, 0.3 + 0.1j, 0.3, 0.4, 0.2j, 0.3], dtype=torch.complex128)


@pytest.mark.parametrize("attached", [False, True])
def test_f6_the_expected_gradient_is_that_of_a_simulation(attached: bool) -> None:
    """Autograd through a rollout of the linear student, with g of the exact scores, against the closed form."""
    n, t = 40_000, 0.6
    lag = (
        torch.tensor(LAG, dtype=torch.complex128).expand(n).clone().requires_grad_()
    )  # one each, so that their spread is the standard error
    gains = GAINS.expand(n, -1).clone().requires_grad_()
    e, frames = noise(n, 6), []
    for k in range(6):
        before = 0 if not frames else lag * (frames[-1] if attached else frames[-1].detach())
        frames.append(before + gains[:, k] * e[:, k])
    x = torch.stack(frames, dim=1)
    student_map = f.rollout_map(LAG, GAINS)
    assert (e @ student_map.T - x).abs().max() < 1e-12
    gap = f.score_gap(f.covariance(RHO, 6), student_map @ student_map.mH, t)
    g = ((1 - t) * x + t * noise(n, 6, seed=3)) @ gap.T
    (g.detach().conj() * x).sum().real.backward()
    assert lag.grad is not None and gains.grad is not None
    for found, expected in zip(
        (lag.grad[:, None], gains.grad), f.dmd_gradient(RHO, LAG, GAINS, t, attached), strict=True
    ):
        z = worst(found.mean(0), expected, found.std(0) / math.sqrt(n))
        print(f"{z:.2f} standard errors, of a gradient of {expected.abs().max():.3f}")
        assert z < 4


def test_f6_is_the_gradient_of_the_divergence() -> None:
    """Attached, it is sigma^2 / alpha^2 times the derivative of KL(q_t | p_t) of the two Gaussians, by autograd of log
    det and trace; and it vanishes at the law itself, c = rho and g = (1, s, s, ...)."""
    t, p = 0.6, f.covariance(RHO, 6)
    lag, gains = torch.tensor(LAG, dtype=torch.complex128, requires_grad=True), GAINS.clone().requires_grad_()
    student_map = f.rollout_map(lag, gains)
    p_t, q_t = ((1 - t) ** 2 * c + t**2 * eye(6) for c in (p, student_map @ student_map.mH))
    divergence = torch.linalg.solve(p_t, q_t).diagonal().sum().real - torch.linalg.slogdet(q_t).logabsdet
    # for CN(0, .) the divergence has no factor 1/2; its derivative in the real coordinates is twice the inner product
    expected = torch.autograd.grad(divergence, (lag, gains))
    for got, want in zip(f.dmd_gradient(RHO, LAG, GAINS, t, attached=True), expected, strict=True):
        assert (2 * got * (1 - t) ** 2 / t**2 - want).abs().max() < 1e-10
    exact = torch.tensor([1.0, *[math.sqrt(S2)] * 5], dtype=torch.complex128)
    for attached in (False, True):
        assert all(v.abs().max() < 1e-12 for v in f.dmd_gradient(RHO, RHO, exact, t, attached))


def test_f7_what_bidirectional_pairs_lose() -> None:
    """Residuals of a regression on (earlier frames, own noise) over x = Sigma^{1/2} e, in 8 frames, and the shares of
    the design; with pairs of the causal flow map nothing is left."""
    n, share = 50_000, f.ode_initialisation_loss(RHO, 8)
    assert [round(100 * v) for v in share.tolist()] == [42, 39, 36, 34, 33, 31, 25, 0]
    slow = f.ode_initialisation_loss(cmath.rect(0.97, 0.5), 8)
    assert slow[[0, 6, 7]].tolist() == pytest.approx([0.63, 0.31, 0], abs=0.01)
    e = noise(n, 8)
    for name, root in (
        ("bidirectional", f.flow_map(f.covariance(RHO, 8), 1.0)),
        ("causal", torch.linalg.cholesky(f.covariance(RHO, 8))),
    ):
        x = e @ root.T
        for i in range(8):
            residual = regression(x[:, i : i + 1], torch.cat([x[:, :i], e[:, i : i + 1]], dim=1))[2].abs().square()
            lost = residual.mean().item() / (S2 if i else 1)
            expected = share[i].item() if name == "bidirectional" else 0.0
            assert abs(lost - expected) < 4 * expected / math.sqrt(n) + 1e-9, (name, i)


def test_f8_what_noisy_context_costs() -> None:
    """The figures of the design, and a regression of a frame on noisy ones."""
    errors = {
        (tau, w): f.prediction_error(f.covariance(RHO, w + 1), [tau] * w)
        for tau in (0.05, 0.1, 0.2, 0.4)
        for w in (1, 2, 3, 9)
    }
    print({k: round(v, 4) for k, v in errors.items()})
    for (tau, w), published in {
        (0.05, 1): 0.1922,
        (0.05, 9): 0.1922,
        (0.1, 1): 0.1999,
        (0.1, 9): 0.1994,
        (0.2, 1): 0.2376,
        (0.2, 3): 0.2298,
        (0.4, 1): 0.4392,
        (0.4, 2): 0.3689,
        (0.4, 3): 0.3533,
        (0.4, 9): 0.3481,
    }.items():
        assert errors[tau, w] == pytest.approx(published, abs=2e-4), (tau, w)
    u = video(100_000, 4)
    residual = regression(u[:, 3:], 0.6 * u[:, :3] + 0.4 * noise(100_000, 3, seed=4))[2].abs().square()
    assert abs(residual.mean().item() - errors[0.4, 3]) < 4 * residual.std().item() / math.sqrt(len(u))


def test_f8_a_window_shorter_than_the_order_costs_too() -> None:
    """An AR(2) with coefficients 1.2 and -0.5, scaled to innovations of 0.27: 0.36 with one frame, 0.27 with more."""
    first, second = 1.2, -0.5
    rho = [1.0, first / (1 - second)]
    for _ in range(8):
        rho.append(first * rho[-1] + second * rho[-2])
    innovation = 1 - first * rho[1] - second * rho[2]
    for past, published in ((1, 0.36), (2, 0.27), (5, 0.27)):
        lags = (torch.arange(past + 1)[:, None] - torch.arange(past + 1)).abs()
        error = f.prediction_error(torch.tensor(rho, dtype=torch.complex128)[lags], [0.0] * past)
        print(f"{past} past frames: {error:.4f}")
        assert error == pytest.approx(published, abs=0.005)
        assert past == 1 or error == pytest.approx(innovation, abs=1e-9)


def test_f9_a_constant_error_adds_up() -> None:
    """The recursion of the mean, and the factors of the design for a real rho: 5.2 after 7 chunks, 26 after 50."""
    mean, error = 0j, 0.1 - 0.2j
    for _ in range(9):
        mean = RHO * mean + error
    assert f.mean_drift(error, RHO, 9) == pytest.approx(mean, abs=1e-12)
    assert abs(f.mean_drift(1, 0.9, 7)) == pytest.approx(5.2, abs=0.05)
    assert abs(f.mean_drift(1, 0.97, 50)) == pytest.approx(26, abs=0.5)


def test_f10_the_tilted_law_by_importance_sampling() -> None:
    """Weights exp(strength r): the covariance of a stated motion, and the probabilities of two motions."""
    n, strength, phase = 200_000, 0.1, 0.2
    rhos, form = (cmath.rect(0.9, 0.5), cmath.rect(0.9, -0.5)), f.motion_form(5, phase)
    evidence = []
    for rho in rhos:
        u = video(n, 5, rho)
        r = torch.einsum("nj,jk,nk->n", u.conj(), form, u).real
        assert (r - (u[:, 1:] * u[:, :-1].conj() * cmath.exp(-1j * phase)).sum(1).real).abs().max() < 1e-10
        weight = (strength * r).exp()
        expected = torch.linalg.inv(f.tilted_precision(rho, form, strength))
        for j, k in ((1, 1), (2, 1), (3, 0)):
            ratio = weight * (u[:, j] * u[:, k].conj() - expected[j, k])
            z = abs(ratio.mean()) / ratio.abs().std() * math.sqrt(n)
            print(f"motion {rho:.2f}, entry {j}{k}: {expected[j, k]:.3f}, {z:.2f} standard errors")
            assert z < 4
        evidence.append(weight)
    p = f.tilted_weights(rhos, form, strength)
    first, second = evidence
    gap = p[1] * first.mean() - p[0] * second.mean()
    error = ((p[1] * first.std()) ** 2 + (p[0] * second.std()) ** 2).sqrt() / math.sqrt(n)
    print(f"probabilities {p.tolist()}, {abs(gap / error):.2f} standard errors")
    assert abs(gap) < 4 * error and p[0] > 0.5
    with pytest.raises(ValueError, match="no law"):
        f.tilted_precision(RHO, form, 10.0)
