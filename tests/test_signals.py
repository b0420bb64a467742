"""Guidance, score differences, surrogates, denoising and GAN losses against what they should be on paper."""

import math

import pytest
import torch
from torch import Tensor

from fastgen import signals
from fastgen.batch import Conditioning
from fastgen.schedule import FlowSchedule, VPSchedule

KINDS = ["sample", "epsilon", "v_prediction", "flow_prediction"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TablePredictor:
    """Predicts value * x_t, the value read from the condition; remembers the rows of every call."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self.rows.append(len(x_t))
        assert len(t) == len(x_t) == len(cond["value"])
        return cond["value"] * x_t.flatten(1).sin().reshape(x_t.shape) + cond["value"] ** 2


def pair(batch: int) -> tuple[Conditioning, Conditioning]:
    return (
        Conditioning({"value": randn(batch, 1, 1, seed=1)}),
        Conditioning({"value": randn(batch, 1, 1, seed=2)}),
    )


def test_surrogate_gradient_times_numel_is_the_field() -> None:
    """d surrogate / dx * numel(x) == g to machine precision."""
    x, g = randn(5, 3, 4).requires_grad_(), randn(5, 3, 4, seed=1)
    signals.surrogate(x, g).backward()
    assert x.grad is not None
    error = (x.grad * x.numel() - g).abs().max().item()
    print(f"{error:.1e}")
    assert error < 1e-14


def test_surrogate_leaves_nothing_on_detached_branches() -> None:
    """The field is a constant: neither it nor the networks behind it receive a gradient; x receives one only through
    its own graph."""
    weight, field_weight = randn(4).requires_grad_(), randn(4, seed=1).requires_grad_()
    x, field = weight * randn(3, 4, seed=2), field_weight * randn(3, 4, seed=3)
    signals.surrogate(x, field).backward()
    expected = (field.detach() * randn(3, 4, seed=2)).sum(0) / x.numel()
    assert field_weight.grad is None
    assert weight.grad is not None and torch.allclose(weight.grad, expected, atol=1e-15)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.75, 7.0])
def test_guidance_is_uncond_plus_scale_times_difference(scale: float) -> None:
    """uncond + w (cond - uncond), in one call of twice the rows; equal to cond + (w - 1)(cond - uncond)."""
    predict, (cond, uncond) = TablePredictor(), pair(6)
    x, t = randn(6, 3, 2), torch.linspace(0.1, 0.9, 6)
    on, off = predict(x, t, cond), predict(x, t, uncond)
    predict.rows.clear()
    result = signals.guided(predict, x, t, cond, uncond, scale)
    error = (result - (on + (scale - 1) * (on - off))).abs().max().item()
    print(f"scale {scale}: {error:.1e}")
    assert error < 1e-13 and predict.rows == [12]


def test_scale_one_makes_no_unconditional_call() -> None:
    """w = 1 is the conditional prediction itself, at the price of one."""
    predict, (cond, uncond) = TablePredictor(), pair(6)
    x, t = randn(6, 3, 2), torch.linspace(0.1, 0.9, 6)
    result = signals.guided(predict, x, t, cond, uncond, 1.0, (0.2, 0.5), 0.7)
    assert predict.rows == [6]
    assert torch.equal(result, predict(x, t, cond))


def test_guidance_interval_is_open_below_and_closed_above() -> None:
    """Guided where low < t <= high; elsewhere the conditional prediction. The full interval guides t = 1."""
    predict, (cond, uncond) = TablePredictor(), pair(6)
    x, t = randn(6, 3, 2), torch.tensor([0.0, 0.25, 0.250001, 0.5, 0.500001, 1.0])
    on, off = predict(x, t, cond), predict(x, t, uncond)
    for interval, inside in (
        ((0.25, 0.5), [False, False, True, True, False, False]),
        ((0.0, 1.0), [False, True, True, True, True, True]),
    ):
        expected = torch.where(torch.tensor(inside)[:, None, None], off + 3 * (on - off), on)
        result = signals.guided(predict, x, t, cond, uncond, 3.0, interval)
        assert (result - expected).abs().max() < 1e-13


def test_rescale_restores_the_conditional_std() -> None:
    """phi = 1: every sample has the std of its conditional prediction, and the direction of the guided one; phi
    between interpolates the factor; phi = 0 changes nothing. Equals diffusers' rescale_noise_cfg."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    predict, (cond, uncond) = TablePredictor(), pair(6)
    x, t = randn(6, 3, 20), torch.full((6,), 0.5)
    on, plain = predict(x, t, cond), signals.guided(predict, x, t, cond, uncond, 5.0)
    full = signals.guided(predict, x, t, cond, uncond, 5.0, rescale=1.0)
    error = (full.flatten(1).std(1) - on.flatten(1).std(1)).abs().max().item()
    print(f"std off by {error:.1e}")
    assert error < 1e-13
    for phi in (0.0, 0.3, 0.7, 1.0):
        ours = signals.guided(predict, x, t, cond, uncond, 5.0, rescale=phi)
        assert (ours - rescale_noise_cfg(plain, on, phi)).abs().max() < 1e-12


def test_score_difference_is_normalised_by_each_sample() -> None:
    """g = (fake - real) / mean|x0 - real|, the mean over each sample: scaling one sample's three tensors leaves its
    g."""
    x0, fake, real = randn(4, 3, 2), randn(4, 3, 2, seed=1), randn(4, 3, 2, seed=2)
    g = signals.score_difference(x0, fake, real)
    by_hand = torch.stack([(f - r) / (x - r).abs().mean() for x, f, r in zip(x0, fake, real, strict=True)])
    scale = torch.tensor([1.0, 10.0, 0.01, 3.0])[:, None, None]
    assert (g - by_hand).abs().max() < 1e-14
    assert (signals.score_difference(scale * x0, scale * fake, scale * real) - g).abs().max() < 1e-12


def test_score_difference_floor_and_no_gradient() -> None:
    """Where the student sits on the teacher's prediction the floor divides; nothing carries gradient."""
    x0, fake = randn(4, 3).requires_grad_(), randn(4, 3, seed=1).requires_grad_()
    g = signals.score_difference(x0, fake, x0.detach().clone(), floor=0.1)
    assert not g.requires_grad
    assert (g - (fake - x0).detach() / 0.1).abs().max() < 1e-14


def test_score_difference_silences_what_is_not_finite() -> None:
    """A NaN in a teacher's prediction silences its sample, an infinite fake entry that entry; the others are
    untouched."""
    x0, fake, real = randn(4, 3), randn(4, 3, seed=1), randn(4, 3, seed=2)
    clean = signals.score_difference(x0, fake, real)
    real[1, 2], fake[2, 0], fake[3, 1] = math.nan, math.inf, -math.inf
    g = signals.score_difference(x0, fake, real)
    assert g.isfinite().all()
    assert (g[1] == 0).all() and g[2, 0] == 0 and g[3, 1] == 0
    assert torch.equal(g[0], clean[0]) and torch.equal(g[2, 1:], clean[2, 1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["flow", "vp"])
def test_denoising_loss_has_one_minimiser_and_the_stated_weights(
    kind: str, which: str, vp_schedule: VPSchedule
) -> None:
    """At a fixed (x_t, t) the loss over a conditional law of x0 is least at its mean in every space, and is the plain
    squared error times 1, (alpha / sigma)^2, ((alpha + sigma) / sigma)^2 or (alpha^2 + sigma^2)^2 / sigma^2, which is
    1 / sigma^2 where the schedule is variance preserving."""
    schedule = FlowSchedule() if which == "flow" else vp_schedule
    x0, x_t = randn(500, 2), randn(1, 2, seed=1).expand(500, 2)
    for level in (0.03, 0.4, 0.97):
        t = torch.full((500,), level, dtype=torch.float64)
        alpha, sigma = schedule.alpha(t[:1]).item(), schedule.sigma(t[:1]).item()
        weight = {
            "sample": 1.0,
            "epsilon": (alpha / sigma) ** 2,
            "flow_prediction": ((alpha + sigma) / sigma) ** 2,
            "v_prediction": (alpha**2 + sigma**2) ** 2 / sigma**2,
        }[kind]
        if which == "vp" and kind == "v_prediction":
            assert abs(weight * sigma**2 - 1) < 1e-12
        guess = randn(1, 2, seed=2).requires_grad_()
        loss = signals.denoising_loss(guess.expand(500, 2), x0, x_t, t, schedule, kind)
        (slope,) = torch.autograd.grad(loss, guess)
        ratio = loss.item() / (guess - x0).square().mean().item() / weight
        newton = (guess - slope / weight).detach()  # the loss is quadratic, a mean over two entries: slope is the step
        error = (newton - x0.mean(0)).abs().max().item()
        print(f"{which} {kind} t={level}: weight off by {ratio - 1:.1e}, minimiser by {error:.1e}")
        assert abs(ratio - 1) < 1e-10 and error < 1e-10


def test_gan_losses_at_equality() -> None:
    """With D = 0 everywhere: 2 log 2 for the discriminator, log 2 for the generator; any shape of logits."""
    for shape in ((7,), (7, 3)):
        zero = torch.zeros(shape, dtype=torch.float64)
        assert abs(signals.gan_discriminator_loss(zero, zero).item() - 2 * math.log(2)) < 1e-15
        assert abs(signals.gan_generator_loss(zero).item() - math.log(2)) < 1e-15
    lean = torch.tensor([[-30.0, 30.0]])
    assert signals.gan_discriminator_loss(lean[:, 1:], lean[:, :1]) < 1e-12 < signals.gan_generator_loss(lean[:, :1])


def test_hinge_losses_are_those_of_their_formulas() -> None:
    real, fake = torch.tensor([0.3, 2.0]), torch.tensor([-0.5, 0.7])
    assert float(signals.hinge_discriminator_loss(real, fake)) == pytest.approx((0.7 + 0.0) / 2 + (0.5 + 1.7) / 2)
    assert float(signals.hinge_generator_loss(fake)) == pytest.approx(-0.1)


@pytest.mark.parametrize("scaled", [False, True])
def test_log_probabilities_are_sums_or_means_over_a_samples_elements(scaled: bool) -> None:
    x, mean, std = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0]])
    squares = (1 + 4) / (8 if scaled else 1)
    for reduction, count in (("sum", 1), ("mean", 2)):
        found = signals.transition_log_prob(x, mean, std, reduction, scaled)  # type: ignore[arg-type]
        assert found.tolist() == pytest.approx([-squares / count])


def test_the_optimal_logit_is_the_log_ratio_of_the_laws() -> None:
    """Laws on four points: the discriminator loss over a table of logits is least at log(p_real / p_fake), where it is
    2 log 2 - 2 JS(p_real, p_fake)."""
    real, fake = torch.tensor([1, 2, 3, 14]), torch.tensor([10, 4, 3, 3])  # twentieths
    points = torch.arange(4)
    at_real, at_fake = points.repeat_interleave(real), points.repeat_interleave(fake)
    table = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [table], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = signals.gan_discriminator_loss(table[at_real], table[at_fake])
        loss.backward()
        return loss

    optimizer.step(closure)
    p, q = real.double() / 20, fake.double() / 20
    m = (p + q) / 2
    divergence = ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()).item() / 2
    error = (table - (p / q).log()).abs().max().item()
    value = closure().item() - (2 * math.log(2) - 2 * divergence)
    print(f"logits off by {error:.1e}, value by {value:.1e}")
    assert error < 1e-5 and abs(value) < 1e-9


def test_the_generator_loss_pushes_samples_towards_higher_logits() -> None:
    """Its derivative is -sigmoid(-D) / n: never zero where the discriminator is sure (non-saturating)."""
    logits = torch.tensor([-8.0, 0.0, 8.0], dtype=torch.float64, requires_grad=True)
    signals.gan_generator_loss(logits).backward()
    assert logits.grad is not None
    assert torch.allclose(logits.grad, -torch.sigmoid(-logits.detach()) / 3, atol=1e-15)
    assert logits.grad[0] < -0.33


def gaussian_mean(x_t: Tensor, alpha: float, sigma: float, mean: float, variance: float) -> Tensor:
    """E[x0 | x_t] for data N(mean, variance)."""
    return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x_t - alpha * mean)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_score_lag_is_zero_in_expectation_for_a_converged_fake(t: float) -> None:
    """For the exact conditional mean of the student's N(1, 0.5^2), against a teacher of another mean and variance: the
    lag of 400,000 samples is within 4 of its standard errors of 0."""
    n, alpha, sigma = 400_000, 1 - t, t
    x0 = 1 + 0.5 * randn(n, 1, seed=3)
    x_t = alpha * x0 + sigma * randn(n, 1, seed=4)
    fake, real = gaussian_mean(x_t, alpha, sigma, 1, 0.25), gaussian_mean(x_t, alpha, sigma, -0.3, 1.7)
    terms = signals.lag_terms(x0, fake, real)
    lag = (terms["fake_error"] / terms["score_gap"]).item()
    d = fake - real
    standard_error = ((x0 - fake) * d).std().item() / math.sqrt(n) / d.square().mean().item()
    print(f"t={t}: lag {lag:.2e}, standard error {standard_error:.1e}")
    assert abs(lag) < 4 * standard_error < 0.05


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("student", "expected"), [(1.0, 0.25), (0.8, 0.0), (0.5, -0.375), (0.0, -1.0)])
def test_score_lag_is_the_fraction_by_which_a_fake_lags(t: float, student: float, expected: float) -> None:
    """Student N(a, S), fake N(0.8, S), teacher N(0, S): the lag is (a - 0.8) / 0.8 at every level. Positive where the
    student is further from the teacher than the fake believes; -1 where it has arrived. Noise in antithetic pairs
    makes the expectation exact."""
    alpha, sigma, variance = 1 - t, t, 0.49
    z, e = randn(100, 1, seed=5), randn(100, 1, seed=6)
    z, e = torch.cat([z, -z]), torch.cat([e, -e])
    x0 = student + math.sqrt(variance) * z
    x_t = alpha * x0 + sigma * e
    fake, real = (gaussian_mean(x_t, alpha, sigma, m, variance) for m in (0.8, 0.0))
    terms = signals.lag_terms(x0.requires_grad_(), fake, real)
    lag = terms["fake_error"] / terms["score_gap"]
    print(f"lag {lag.item():.12f}, expected {expected}")
    assert not lag.requires_grad
    assert abs(lag.item() - expected) < 1e-11
