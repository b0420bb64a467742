"""SiD and SIM against closed forms: the gradients that the score identity stands for, their fixed points, guidance in
the fake score, the adversarial term; and who gets gradient.

Fields are those of one-dimensional Gaussians at one level t. The teacher is N(0.7, 1.3^2), and the student's samples
are x = a + b z. Where both denoisers are exact, the difference delta = mu_real - mu_fake is linear in x_t, so that
expectations over z and the noise are exact by Gauss-Hermite quadrature."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import (
    MEAN,
    ONE_STEP,
    STD,
    AffineStudent,
    ExactFake,
    Recorder,
    affine_networks,
    gaussian,
    guided_pair,
    mixed_teacher,
    point_batch,
    posterior_mean,
    reached,
    tiny_batch,
    tiny_networks,
    touched,
)
from torch import Tensor

from fastgen.batch import Conditioning
from fastgen.config import load_recipe
from fastgen.denoiser import Inputs
from fastgen.objectives import SIM, SiD, Turn
from fastgen.objectives.sid import identity_loss
from fastgen.registry import RecipeError
from fastgen.rollout import Rollout, RolloutPolicy

THREE = RolloutPolicy(timesteps=(1.0, 0.6, 0.3))
NODES, WEIGHTS = (torch.as_tensor(v) for v in np.polynomial.hermite_e.hermegauss(40))


def at(x: Tensor) -> Rollout:
    zero = torch.zeros(len(x), dtype=x.dtype)
    return Rollout(x=x, s=zero, stop=zero.long())


def parameters(a: float, b: float) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (a, b))  # type: ignore[return-value]


def grid(a: Tensor, b: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, x_t and t [N], and the weights [N] of a quadrature over z and the noise."""
    z, noise = (v.flatten() for v in torch.meshgrid(NODES, NODES, indexing="ij"))
    weight = torch.outer(WEIGHTS, WEIGHTS).flatten() / WEIGHTS.sum() ** 2
    x = a + b * z
    return x[:, None], ((1 - t) * x + t * noise)[:, None], torch.full_like(z, t), weight


def fields(x_t: Tensor, t: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The exact predictions of fake score and teacher."""
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (MEAN, STD))
    return posterior_mean(x_t, t, a, b**2), posterior_mean(x_t, t, mean, std**2)


def identity_gradient(a: float, b: float, t: float, alpha: float) -> list[float]:
    """Of the expected loss, in (a, b), with the fake score's weights (which are a and b, too) held fixed."""
    student = parameters(a, b)
    x, x_t, level, weight = grid(*student, t)
    fake, real = fields(x_t, level, *(p.detach() for p in student))
    loss = (weight * identity_loss(x, fake, real, alpha)).sum()
    return [g.item() for g in torch.autograd.grad(loss, student)]


def divergence_gradient(a: float, b: float, t: float, sampling: bool) -> list[float]:
    """Of half of E delta^2, in (a, b), by the fake score and, with `sampling`, by the law of x_t, too."""
    student = parameters(a, b)
    _, x_t, level, weight = grid(*(student if sampling else [p.detach() for p in student]), t)
    fake, real = fields(x_t, level, *student)
    loss = 0.5 * (weight[:, None] * (real - fake).square()).sum()
    return [g.item() for g in torch.autograd.grad(loss, student)]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_between_equal_covariances_the_gradient_of_the_mean_is_the_same_for_every_alpha(
    t: float, alpha: float
) -> None:
    """rho^2 (m_fake - m_real), rho = t^2 / V."""
    rho = t**2 / ((1 - t) ** 2 * STD**2 + t**2)
    found = identity_gradient(-0.4, STD, t, alpha)[0]
    assert abs(found - rho**2 * (-0.4 - MEAN)) < 1e-12


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_alpha_one_half_is_half_the_fisher_divergence(t: float) -> None:
    ours, theirs = identity_gradient(-0.4, 0.5, t, 0.5), divergence_gradient(-0.4, 0.5, t, sampling=True)
    assert max(abs(o - d) for o, d in zip(ours, theirs, strict=True)) < 1e-12


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_alpha_one_holds_the_law_of_x_t_fixed(t: float) -> None:
    ours, theirs = identity_gradient(-0.4, 0.5, t, 1.0), divergence_gradient(-0.4, 0.5, t, sampling=False)
    whole = divergence_gradient(-0.4, 0.5, t, sampling=True)
    assert max(abs(o - d) for o, d in zip(ours, theirs, strict=True)) < 1e-12
    assert abs(ours[1] - whole[1]) > 1e-4


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2])
def test_the_value_is_one_minus_alpha_times_the_divergence(alpha: float) -> None:
    """By the score identity E[delta . (mu_fake - x)] = 0 at the fake score's optimum."""
    a, b = (torch.tensor(v, dtype=torch.float64) for v in (-0.4, 0.5))
    x, x_t, t, weight = grid(a, b, 0.4)
    fake, real = fields(x_t, t, a, b)
    value = (weight * identity_loss(x, fake, real, alpha)).sum()
    assert abs(value - (1 - alpha) * (weight[:, None] * (real - fake).square()).sum()) < 1e-12


@pytest.mark.parametrize("c", [0.3, 1.0])
def test_sim_is_the_gradient_of_its_divergence(c: float) -> None:
    """E sqrt(delta^2 + c^2) with the law of x_t fixed, by the derivative of the fake score in (a, b). The integrand is
    not a polynomial, so that the quadrature has an error, the larger the smaller c is."""
    student, t = parameters(-0.4, 0.5), 0.4
    objective = SIM(huber=c)
    x, x_t, level, weight = grid(*student, t)
    fake, real = fields(x_t, level, *(p.detach() for p in student))
    loss = (weight * objective.sample_weight(x, fake, real) * identity_loss(x, fake, real, 1.0)).sum()
    ours = torch.autograd.grad(loss, student)
    _, x_t, level, weight = grid(*(p.detach() for p in student), t)
    fake, real = fields(x_t, level, *student)
    distance = (weight[:, None] * ((real - fake).square() + c**2).sqrt()).sum()
    theirs = torch.autograd.grad(distance, student)
    errors = [abs((o - d) / d).item() for o, d in zip(ours, theirs, strict=True)]
    print(errors)
    assert max(errors) < (1e-2 if c < 1 else 1e-5)


def test_the_students_loss_is_the_identitys_through_both_denoisers() -> None:
    """The objective's gradient in (a, b) is that of the formula with x_t, mu_real and mu_fake attached and omega
    detached. It changes where either prediction, or x_t, is detached."""
    student, batch = AffineStudent(-1.0, 0.4), point_batch(300, dim=1)
    fake, teacher = ExactFake(student), gaussian()
    objective = SiD(alpha=1.2)
    loss = objective.student_loss(affine_networks(student, teacher, fake), batch)
    ours = torch.autograd.grad(loss.total, [student.a, student.b])

    def formula(keep_fake: bool = True, keep_real: bool = True) -> tuple[Tensor, ...]:
        x = student.a + student.b * batch.normal("initial")
        t = objective.renoise_time(batch.uniform("renoise_time"))
        x_t = teacher.schedule.add_noise(x, batch.normal("renoise"), t)
        f, r = fake(x_t, t, batch.cond), teacher(x_t, t, batch.cond)
        f, r = f if keep_fake else f.detach(), r if keep_real else r.detach()
        omega = 1 / (x - r).abs().mean(1).clamp_min(1e-5).detach()
        total = (omega * ((r - f) * ((r - x) - 1.2 * (r - f))).mean(1)).mean()
        return torch.autograd.grad(total, [student.a, student.b])

    assert all(torch.allclose(o, e, rtol=1e-12) for o, e in zip(ours, formula(), strict=True))
    for detached in (formula(keep_fake=False), formula(keep_real=False)):
        assert any(abs(o - d) > 1e-3 for o, d in zip(ours, detached, strict=True))
    assert not any(v.requires_grad for v in loss.terms.values())


@pytest.mark.parametrize(
    "objective",
    [
        SiD(guidance_scale=2.5, normaliser_floor=0.1),
        pytest.param(SiD(alpha=1.2, guidance_scale=2.5, normaliser_floor=0.1), marks=pytest.mark.slow),
        pytest.param(SIM(guidance_scale=2.5, huber=0.3), marks=pytest.mark.slow),
    ],
    ids=["sid", "alpha 1.2", "sim"],
)
def test_an_affine_student_converges_to_the_guided_gaussian(objective: SiD) -> None:
    """x = a + b z ends at the mean 0.7 + 1.5 * 0.8 = 1.9 and the standard deviation 1.3. The floor, and c, do not move
    the fixed point; in one dimension |x - mu| is often almost 0, which slows Adam down."""
    student = AffineStudent(-1.0, 0.4)
    networks = affine_networks(student, guided_pair(0.7, -0.1))
    optimizer = torch.optim.Adam(student.parameters(), 0.04)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=400)
    for step in range(400):
        batch = point_batch(torch.arange(512) + 512 * step, key=step, dim=1, uncond=2)
        optimizer.zero_grad()
        objective.student_loss(networks, batch).total.backward()
        optimizer.step()
        decay.step()
    a, b = student.a.item(), abs(student.b.item())
    print(f"mean off by {a - 1.9:+.1e}, standard deviation by {b - 1.3:+.1e}")
    assert abs(a - 1.9) < 0.03 and abs(b - 1.3) < 0.03


# --- guidance in the fake score


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.0, 3.0])
def test_the_fake_score_is_guided_with_kappa_2(scale: float) -> None:
    """As a Gaussian at m_c + (kappa_2 - 1)(m_c - m_u), at the cost of one evaluation for 0 and 1."""
    fake = Recorder(guided_pair(0.7, -0.1))
    student = AffineStudent(0.0, 1.0)
    batch = point_batch(50, dim=1, uncond=2)
    objective = SiD(fake_guidance=scale, prompt_dropout=0.1)
    networks = affine_networks(student, gaussian(), fake)
    x_t, t = 2 * batch.normal("x"), batch.uniform("t")
    found = objective.fake_prediction(networks, batch, torch.zeros_like(batch.ids), x_t, t)
    expected = gaussian(0.7 + (scale - 1) * 0.8)(x_t, t, Conditioning({"label": torch.zeros_like(batch.ids)}))
    assert (found - expected).abs().max() < 1e-12
    assert sum(len(call.x_t) for call in fake.calls) == (50 if scale in (0, 1) else 100)


def test_the_fake_scores_guided_prediction_is_what_denoises() -> None:
    """kappa_1 = 2: least where m_c + (m_c - m_u) is the mean of the samples, not where m_c is."""
    student, batch = AffineStudent(0.7, 1.3), point_batch(20_000, dim=1, uncond=2)
    objective = SiD(fake_guidance=2.0, fake_training_guidance=2.0)

    def loss(mean: float, other: float) -> float:
        networks = affine_networks(student, gaussian(), guided_pair(mean, other))
        return objective.fake_loss(networks, batch).total.item()

    best = loss(0.3, -0.1)  # 0.3 + 0.4 is the samples' mean
    assert best < min(loss(0.7, -0.1), loss(0.4, -0.1), loss(0.2, -0.1))


def test_prompts_are_left_out_at_random() -> None:
    """The share of samples that the fake score sees with the empty prompt, and no other change."""
    seen = []

    class Labels(Recorder):
        def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
            seen.append(cond["label"])
            return super().call_network(x_t, t, cond, inputs)

    batch = point_batch(4000, dim=1, uncond=2)
    for dropout in (0.0, 0.25):
        networks = affine_networks(AffineStudent(0.0, 1.0), gaussian(), Labels(guided_pair(0.7, -0.1)))
        SiD(prompt_dropout=dropout).fake_loss(networks, batch)
    assert set(seen[0].tolist()) == {0} and set(seen[1].tolist()) == {0, 2}
    assert abs((seen[1] == 2).double().mean() - 0.25) < 0.03


def test_a_prompt_less_fake_score_guides_with_the_students_own_classifier() -> None:
    """(alpha / sigma^2) (mu(x | c) - mu(x)) = grad log p(c | x_t), for a student of two modes."""
    mixed, batch = mixed_teacher(), point_batch(40, uncond=2)
    t = 0.2 + 0.6 * batch.uniform("t")
    x_t = batch.normal("x").requires_grad_()
    alpha, sigma = mixed.schedule.coefficients(t, x_t)
    label, other = batch.cond["label"], batch.uncond["label"]
    law = mixed.mixture
    ratio = law.log_density(x_t, alpha, sigma, label) - law.log_density(x_t, alpha, sigma, other)
    (expected,) = torch.autograd.grad(ratio.sum(), x_t)
    networks = affine_networks(AffineStudent((0.0, 0.0), (1.0, 1.0)), gaussian(), mixed)
    stop = torch.zeros_like(batch.ids)
    plain, zero, anti = (
        SiD(fake_guidance=k, prompt_dropout=0.1).fake_prediction(networks, batch, stop, x_t, t) for k in (1, 0, -1)
    )
    for prediction, weight in ((zero, 1), (anti, 2)):
        found = alpha / sigma**2 * (plain - prediction)
        assert (found - weight * expected).abs().max() < 1e-9


# --- few steps, SiDA, and who gets gradient


def test_a_sample_comes_from_a_step_of_its_own_that_the_fake_score_is_not_told() -> None:
    student, batch = AffineStudent((0.5, 0.1, 0.2), (0.4, 0.3, 0.5), THREE), point_batch(300, dim=1)
    rollout = SiD(stops="per_sample").rollout(affine_networks(student, gaussian()), batch, grad=True)
    counts = torch.bincount(rollout.stop, minlength=3)
    assert counts.min() > 70
    fake = Recorder(gaussian())
    objective = SiD(stops="per_sample")
    objective.student_loss(affine_networks(student, gaussian(), fake), batch)
    assert fake.calls[0].inputs.stop is None and fake.calls[0].grad


GAN: dict[str, Any] = {"gan_weight": 0.3, "guidance_scale": 2.0, "stops": "per_sample", "condition_on_stop": True}


@pytest.mark.parametrize("objective", [SiD(**GAN), SIM(**GAN), SiD()], ids=["SiDA", "sim", "sid"])
def test_each_turn_reaches_its_own_roles(objective: SiD) -> None:
    """Both networks are trainable again after the student's turn, which leaves no gradient on the fake score."""
    networks = tiny_networks(objective, THREE)
    assert set(networks) == {"student", "teacher", "fake_score"}
    for turn in objective.turns(0, {}):
        objective.loss(turn, networks, tiny_batch(), {}).total.backward()
        assert touched(networks) == set(turn.roles)
        if turn.name == "student":
            assert all(reached(networks.student).values())
        for module in networks.values():
            module.zero_grad()
        assert all(p.requires_grad for p in networks.fake_score.parameters())


def test_sidas_discriminator_is_a_mean_over_channels_of_the_fake_score() -> None:
    """Its logits are one per token, and its loss changes no more of the fake score than what lies before them."""
    objective = SiD(**GAN)
    networks, batch = tiny_networks(objective, THREE), tiny_batch()
    assert batch.latents is not None
    stop, t = torch.zeros_like(batch.ids), batch.uniform("t")
    with networks.fake_score.capture() as features:
        networks.fake_score(batch.latents, t, batch.cond, Inputs(stop=stop))
    logits = objective.discriminator_logits(networks, batch, batch.latents, t, stop)
    assert logits.shape == (32, 1) and torch.allclose(logits, features[1].mean(2))
    loss, _ = objective.discriminator_gan(networks, batch, objective.rollout(networks, batch, grad=False))
    loss.backward()
    touched = reached(networks.fake_score)
    assert touched["network.inlet.weight"] and not touched["network.outlet.2.weight"]


def test_the_students_gan_is_clamped_and_weighted_by_sample() -> None:
    """gan_weight times mean omega softplus(-D), D within +-10."""
    objective = SiD(gan_weight=0.3)
    networks, batch = tiny_networks(objective, ONE_STEP), tiny_batch()

    class Large(SiD):
        def logits(self, networks: Any, batch: Any, x0: Tensor, stop: Tensor, name: str) -> Tensor:
            return torch.full((len(x0), 4), -50.0, dtype=x0.dtype)

    plain = SiD().student_loss(networks, batch)
    loss = Large(gan_weight=0.3).student_loss(networks, batch)
    rollout = objective.rollout(networks, batch, grad=False)
    x_t, t = objective.renoised(networks, batch, rollout)
    real = objective.real_prediction(networks, batch, x_t, t)
    omega = 1 / (rollout.x - real).abs().mean(1)
    expected = (omega * torch.nn.functional.softplus(torch.tensor(10.0))).mean()
    assert torch.allclose(loss.terms["gan"], expected, rtol=1e-6)
    assert torch.allclose(loss.total, plain.total + 0.3 * loss.terms["gan"])


def test_the_gan_begins_at_its_update() -> None:
    objective = SiD(gan_weight=0.3, gan_start=2)
    networks, batch = tiny_networks(objective, ONE_STEP), tiny_batch()
    seen = []
    for step in range(3):
        fake, student = objective.turns(step, {})
        assert student.roles == ("student",) and fake == Turn("fake_score", ("fake_score",), 1)
        assert "gan" in objective.loss(fake, networks, batch, {}).terms  # the discriminator learns from the start
        seen.append((student.name, "gan" in objective.loss(student, networks, batch, {}).terms))
    assert seen == [("warm_up", False), ("warm_up", False), ("student", True)]


def test_needs() -> None:
    assert SiD().needs == frozenset() and SiD(gan_weight=0.1).needs == {"latents"}
    assert SiD(gan_weight=0.1).trained_roles == ("student", "fake_score")
    weighted = dataclasses.replace(SiD(), alpha=1.2)
    assert weighted.alpha == 1.2 and weighted.takes_chunks


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective.fake_guidance=2"], "is not the scale 1 .*prompt_dropout: 0.1"),
        (["objective.fake_training_guidance=2"], "prompt_dropout: 0.1"),
        (["objective.prompt_dropout=1.0"], "prompt_dropout"),
        (["objective.gan_start=5"], "gan_weight is 0"),
        (["objective.ca_time={}", "objective.guidance_scale=2"], "leave ca_time out, or use dmd2"),
        (["objective.alpha=-1"], "alpha"),
        (["objective.name=sim", "objective.alpha=1.2"], "use sid"),
        (["objective.name=sim", "objective.normaliser_floor=0.1"], "leave normaliser_floor out"),
        (["objective.name=sim", "objective.huber=0"], "huber"),
    ],
)
def test_wrong_combinations_are_refused_before_anything_loads(
    mixture_recipe: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(mixture_recipe, ["objective.name=sid", *overrides])
