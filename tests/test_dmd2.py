"""DMD2 against closed forms: its field for Gaussians, its fixed points with and without guidance; and who gets
gradient.

For data N(m, S) let V = alpha^2 S + sigma^2 and rho = sigma^2 / V. Two Gaussians with the same S have
E_f[x0 | x_t] - E_r[x0 | x_t] = rho (m_f - m_r) everywhere, and guidance between them is the Gaussian at
m_c + (w - 1)(m_c - m_u)."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from oracles import (
    ONE_STEP,
    TINY,
    AffineStudent,
    ExactFake,
    Recorder,
    affine_networks,
    gaussian,
    guided_pair,
    point_batch,
    reached,
    tiny_backbone,
    tiny_batch,
    tiny_networks,
    touched,
)
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones.gaussian_mixture import AnalyticDenoiser, GaussianMixtureConfig, build_mixture
from fastgen.batch import Conditioning
from fastgen.denoiser import Denoiser, Inputs
from fastgen.networks import Networks
from fastgen.objectives import DMD2, Turn
from fastgen.rollout import Rollout, RolloutPolicy
from fastgen.schedule import PredictionType, Schedule, VPSchedule

STDS = (1.3, 0.4)


def at(x: Tensor) -> Rollout:
    zero = torch.zeros(len(x), dtype=x.dtype)
    return Rollout(x=x, s=zero, stop=zero.long())


def test_the_field_between_equal_covariance_gaussians_is_closed_form() -> None:
    """Guidance off: fake - real = rho_t (m_f - m_r) with rho_t = sigma_t^2 / V_t, and score_gradient is that divided
    by each sample's mean|x - E_r[x0 | x_t]|. Float64."""
    m_r, m_f = (0.7, -1.2), (-0.4, 0.3)
    teacher, fake, batch = Recorder(gaussian(m_r, STDS)), gaussian(m_f, STDS), point_batch(200, key=4)
    x = torch.tensor(m_f, dtype=torch.float64) + torch.tensor(STDS, dtype=torch.float64) * batch.normal("student")
    networks = Networks({"teacher": teacher, "fake_score": fake}, ONE_STEP)
    grad, _ = DMD2().score_gradient(networks, batch, at(x))

    x_t, t = teacher.calls[-1][:2]
    variance = torch.tensor(STDS, dtype=torch.float64) ** 2
    alpha, sigma = (1 - t)[:, None], t[:, None]
    v = alpha**2 * variance + sigma**2
    mean = torch.tensor(m_r, dtype=torch.float64)
    exact = sigma**2 / v * (torch.tensor(m_f, dtype=torch.float64) - mean)
    raw = (fake(x_t, t, batch.cond) - teacher(x_t, t, batch.cond) - exact).abs().max().item()
    posterior = mean + alpha * variance / v * (x_t - alpha * mean)
    normalised = exact / (x - posterior).abs().mean(1, keepdim=True)
    error = ((grad - normalised).abs() / normalised.abs().clamp_min(1)).max().item()
    print(f"field {raw:.1e}, after its normaliser {error:.1e}; t in [{t.min():.3f}, {t.max():.3f}]")
    assert raw < 1e-10 and error < 1e-10
    assert 0.02 <= t.min() < 0.1 and 0.9 < t.max() <= 0.98


def test_the_student_loss_is_the_surrogate_of_the_field() -> None:
    """Its gradient on (a, b) of x = a + b z is mean g and mean g z: the surrogate's g / numel through the student."""
    student = AffineStudent(-1.0, 0.4)
    networks, batch, objective = affine_networks(student, gaussian()), point_batch(300, dim=1), DMD2()
    z = batch.normal("initial")
    loss = objective.student_loss(networks, batch)
    loss.total.backward()
    g, _ = objective.score_gradient(networks, batch, at(-1 + 0.4 * z))
    assert student.a.grad is not None and student.b.grad is not None
    errors = [(student.a.grad - g.mean()).abs().item(), (student.b.grad - (g * z).mean()).abs().item()]
    print(errors)
    assert max(errors) < 1e-13
    assert abs(loss.terms["dm_grad"] - g.abs().mean()) < 1e-13
    assert not any(v.requires_grad for v in loss.terms.values())


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5, 7.0])
def test_guidance_between_equal_covariances_is_a_shifted_gaussian(w: float) -> None:
    """Exactly, at every t and x: the guided prediction is that of N(m_c + (w - 1)(m_c - m_u), S)."""
    m_c, m_u = (0.7, -1.2), (-0.1, 0.5)
    teacher = guided_pair(m_c, m_u, STDS)
    shifted = gaussian([c + (w - 1) * (c - u) for c, u in zip(m_c, m_u, strict=True)], STDS)
    x = 3 * torch.randn(300, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, zero = torch.linspace(0.001, 1, 300, dtype=torch.float64), torch.zeros(300, dtype=torch.int64)
    cond, uncond = Conditioning({"label": zero}), Conditioning({"label": zero + 2})
    error = (signals.guided(teacher, x, t, cond, uncond, w) - shifted(x, t, cond)).abs().max().item()
    print(f"w = {w}: {error:.1e}")
    assert error < 1e-12


@pytest.mark.parametrize(("w", "target"), [(1.0, 0.7), (2.5, 1.9)])
def test_an_affine_student_converges_to_the_guided_gaussian(w: float, target: float) -> None:
    """Trained on DMD2's own student loss against its exact fake score, x = a + b z ends at the mean
    m_c + (w - 1)(m_c - m_u) and the standard deviation sqrt(S) of the teacher: m_c = 0.7, m_u = -0.1, sqrt(S) = 1.3.

    The floor of 0.1 does not move the fixed point; in one dimension the normaliser |x - mu| is often almost 0, and the
    rare huge gradients slow Adam down by an order of magnitude."""
    student, objective = AffineStudent(-1.0, 0.4), DMD2(guidance_scale=w, normaliser_floor=0.1)
    networks = affine_networks(student, guided_pair(0.7, -0.1))
    optimizer = torch.optim.Adam(student.parameters(), 0.04)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=300)
    for step in range(300):
        batch = point_batch(torch.arange(512) + 512 * step, key=step, dim=1, uncond=2)
        optimizer.zero_grad()
        objective.student_loss(networks, batch).total.backward()
        optimizer.step()
        decay.step()
    a, b = student.a.item(), abs(student.b.item())
    print(f"w = {w}: mean off by {a - target:+.1e}, standard deviation by {b - 1.3:+.1e}")
    assert abs(a - target) < 0.01 and abs(b - 1.3) < 0.01


def test_the_field_vanishes_at_the_answer_and_nowhere_near_it() -> None:
    """With the exact fake at the guided teacher's own law the gradient is 0 for every sample, not only on average."""
    student, batch = AffineStudent(1.9, 1.3), point_batch(500, dim=1, uncond=2)
    networks = affine_networks(student, guided_pair(0.7, -0.1))
    answer, other = (
        DMD2(guidance_scale=w).score_gradient(networks, batch, at(1.9 + 1.3 * batch.normal("initial")))[0]
        for w in (2.5, 2.6)
    )
    print(f"at the answer {answer.abs().max().item():.1e}, for w = 2.6 {other.abs().max().item():.2f}")
    assert answer.abs().max() < 1e-10 and other.abs().mean() > 0.01


@pytest.mark.parametrize("space", [None, "sample", "epsilon", "flow_prediction"])
def test_the_fake_loss_is_least_at_the_students_own_law(space: PredictionType | None) -> None:
    """Against fakes of another mean or spread, on the same 20,000 samples; its gradient does not reach the student."""
    student, batch = AffineStudent(-1.0, 0.4), point_batch(20_000, dim=1)
    objective, teacher = DMD2(fake_space=space), gaussian()

    def loss(shift: float, stretch: float) -> float:
        networks = affine_networks(student, teacher, ExactFake(student, shift, stretch))
        total = objective.fake_loss(networks, batch).total
        assert not total.requires_grad
        return total.item()

    others = [loss(s, r) for s, r in ((0.1, 1.0), (-0.1, 1.0), (0.0, 1.3), (0.0, 0.75))]
    print(f"exact {loss(0, 1):.5f}, others {others}")
    assert loss(0, 1) < min(others)


class Retyped(Denoiser):
    """The same x0 function as a network of another prediction type: its raw output is converted from the exact x0."""

    def __init__(
        self, function: Callable[[Tensor, Tensor, Conditioning], Tensor], schedule: Schedule, kind: PredictionType
    ):
        super().__init__(nn.Identity(), schedule, kind)
        self.function = [function]

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        return self.schedule.from_sample(self.function[0](x_t, t, cond), x_t, t, self.prediction_type)


@pytest.mark.parametrize(
    "kinds",
    [
        ("epsilon", "epsilon", "epsilon"),
        ("v_prediction", "v_prediction", "v_prediction"),
        ("flow_prediction", "flow_prediction", "flow_prediction"),
        ("epsilon", "flow_prediction", "v_prediction"),
        ("v_prediction", "sample", "epsilon"),
    ],
)
def test_losses_do_not_depend_on_the_networks_prediction_types(
    vp_schedule: VPSchedule, kinds: tuple[PredictionType, PredictionType, PredictionType]
) -> None:
    """Student, fake score and teacher as epsilon-, v-, flow- or sample-predictors of the same functions: the same
    student loss, the same gradient on the student and, in one stated space, the same fake loss."""
    a = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    objective = DMD2(fake_space="epsilon", stops="per_sample", guidance_scale=1.5)
    batch = point_batch(200, uncond=1)
    config = GaussianMixtureConfig(((0.5, -1.0), (-0.5, 0.2)), (0.8, 0.8), classes=(0, 1))
    teacher = AnalyticDenoiser(build_mixture(config), vp_schedule)
    fake = gaussian((0.1, 0.1), (0.9, 0.7), vp_schedule)

    def student(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return a + 0.8 * x_t.tanh() * (1 - 0.5 * t[:, None])

    def losses(*kinds: PredictionType) -> tuple[Tensor, Tensor, Tensor]:
        roles = {"student": student, "fake_score": fake, "teacher": teacher}
        modules: dict[str, nn.Module] = {
            role: Retyped(function, vp_schedule, kind)
            for (role, function), kind in zip(roles.items(), kinds, strict=True)
        }
        networks = Networks(modules, RolloutPolicy((1.0, 0.6)))
        total = objective.student_loss(networks, batch).total
        return total.detach(), torch.autograd.grad(total, a)[0], objective.fake_loss(networks, batch).total.detach()

    reference = losses("sample", "sample", "sample")
    error = max(((g - r).abs() / r.abs()).max().item() for g, r in zip(losses(*kinds), reference, strict=True))
    print(f"{kinds}: relative {error:.1e}")
    assert error < 1e-9


POLICY = RolloutPolicy(timesteps=(1.0, 0.6, 0.3))


GAN: Mapping[str, Any] = {"gan_weight": 0.3, "guidance_scale": 2.0, "stops": "per_sample", "condition_on_stop": True}


def test_the_student_turn_leaves_gradient_on_the_student_alone() -> None:
    """With the GAN on: every student tensor is reached, and no tensor of the fake score or the discriminator holds so
    much as a zero gradient; both are trainable again afterwards. The teacher has nothing to hold one."""
    objective = DMD2(**GAN)
    networks = tiny_networks(objective, POLICY)
    objective.loss(Turn("student", ("student",)), networks, tiny_batch(), {}).total.backward()
    assert all(reached(networks.student).values())
    assert touched(networks) == {"student"}
    assert all(p.requires_grad for role in ("fake_score", "discriminator") for p in networks[role].parameters())


def test_the_fake_turn_leaves_none_on_the_student() -> None:
    """It reaches every tensor of the fake score, its stop table included, and of the discriminator."""
    objective = DMD2(**GAN)
    networks = tiny_networks(objective, POLICY)
    turn = objective.turns(0, {})[0]
    objective.loss(turn, networks, tiny_batch(), {}).total.backward()
    assert turn.roles == ("fake_score", "discriminator") and touched(networks) == set(turn.roles)
    assert all(reached(networks.fake_score).values()) and all(reached(networks["discriminator"]).values())


def test_the_gan_reaches_the_student_through_frozen_networks() -> None:
    """The student's gradient is affine in gan_weight, and what weight 1 adds is, along itself, the slope of
    softplus(-D) by central differences. One-step students, whose gradient is not truncated."""
    batch = tiny_batch()
    networks = tiny_networks(DMD2(**GAN), ONE_STEP)
    parameters = list(networks.student.parameters())

    def gradient(weight: float) -> list[Tensor]:
        total = DMD2(**{**GAN, "gan_weight": weight}).student_loss(networks, batch).total
        return list(torch.autograd.grad(total, parameters))

    def slope(direction: list[Tensor], length: float, h: float = 1e-5) -> float:
        terms = []
        for step in (h, -2 * h, h):
            for p, d in zip(parameters, direction, strict=True):
                p.data += step / length * d
            terms.append(DMD2(**GAN).student_loss(networks, batch).terms["gan"].item())
        return (terms[0] - terms[1]) / (2 * h)

    none, half, one = gradient(0.0), gradient(0.5), gradient(1.0)
    added = [b - a for a, b in zip(none, one, strict=True)]
    length = math.sqrt(sum(float(d.square().sum()) for d in added))
    bend = max((a + b - 2 * h).abs().max().item() for a, h, b in zip(none, half, one, strict=True))
    error = slope(added, length) / length - 1
    print(f"length {length:.4f}; affine to {bend:.1e}, slope off by {error:.1e}")
    assert length > 1e-3 and bend < 1e-12 and abs(error) < 1e-6


def test_turns_roles_and_needs() -> None:
    """The fake score's updates come first, then the student's one; the discriminator and real data only with a GAN."""
    plain, gan = DMD2(fake_updates=4), DMD2(gan_weight=0.1)
    assert plain.trained_roles == ("student", "fake_score") and plain.needs == frozenset()
    assert gan.trained_roles == ("student", "fake_score", "discriminator") and gan.needs == {"latents"}
    assert plain.turns(7, {}) == (Turn("fake_score", ("fake_score",), 4), Turn("student", ("student",)))
    assert gan.turns(0, {})[0] == Turn("fake_score", ("fake_score", "discriminator"), 5)
    assert plain.init_state() == {}
    for objective in (plain, gan):
        networks = tiny_networks(objective, POLICY)
        assert set(networks) == {"teacher", *objective.trained_roles}


def test_the_discriminator_has_one_logit_a_depth() -> None:
    objective = DMD2(**GAN)
    networks = tiny_networks(objective, POLICY)
    batch = tiny_batch()
    assert batch.latents is not None
    logits = objective.logits(networks, batch, batch.latents, torch.zeros_like(batch.ids), "gan")
    assert logits.shape == (32, TINY.depth)


def test_the_extended_fake_starts_as_the_unextended_one() -> None:
    """condition_on_stop: at the start exactly the same function for every stop; once its table has moved, stops
    differ, and a network that is not told its stop is refused."""
    backbone = tiny_backbone()
    extended = tiny_networks(DMD2(condition_on_stop=True), POLICY, backbone=backbone)
    plain, fake = backbone.load("fake_score"), extended.fake_score
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, cond = torch.linspace(0.01, 1, 30, dtype=torch.float64), Conditioning({"label": torch.arange(30) % 3})
    expected = plain(x, t, cond)
    for k in range(POLICY.num_steps):
        assert torch.equal(fake(x, t, cond, Inputs(stop=torch.full((30,), k))), expected)
    with torch.no_grad():
        fake.time_embedding.tables["stop"].weight[1] += 0.5
    told = [fake(x, t, cond, Inputs(stop=torch.full((30,), k))) for k in range(3)]
    assert torch.equal(told[0], expected) and torch.equal(told[2], expected)
    assert (told[1] - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match="stop"):
        fake(x, t, cond)
    with pytest.raises(ValueError, match="stop"):
        plain(x, t, cond, Inputs(stop=torch.zeros(30, dtype=torch.int64)))


def test_stop_conditioning_reaches_the_student_loss_per_sample() -> None:
    """Moving one stop's entry changes the field of that stop's samples and of no other."""
    objective = DMD2(condition_on_stop=True, stops="per_sample")
    networks = tiny_networks(objective, POLICY)
    batch = tiny_batch()
    rollout = objective.rollout(networks, batch, grad=False)
    before, _ = objective.score_gradient(networks, batch, rollout)
    with torch.no_grad():
        networks.fake_score.time_embedding.tables["stop"].weight[1] += 0.5  # type: ignore[union-attr,index]
    after, _ = objective.score_gradient(networks, batch, rollout)
    moved = (after != before).any(1)
    assert torch.equal(moved, rollout.stop == 1) and 0 < moved.sum() < len(moved)


def test_turns_of_different_updates_draw_different_samples() -> None:
    """The key decides: the same key repeats a loss bit for bit, another does not."""
    objective = DMD2(stops="per_sample")
    networks = tiny_networks(objective, POLICY)
    losses = [objective.fake_loss(networks, tiny_batch(key=key)).total.item() for key in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("guidance_scale", -0.5),
        ("guidance_rescale", 1.5),
        ("guidance_interval", (0.5, 0.5)),
        ("guidance_interval", (0.2, 1.1)),
        ("fake_updates", 0),
        ("normaliser_floor", 0.0),
        ("gan_weight", -1.0),
        ("stops", "random"),
        ("fake_space", "x0"),
    ],
)
def test_impossible_settings_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        DMD2(**{field: value})


def test_replacing_a_field_checks_it_again() -> None:
    """An objective is frozen; dataclasses.replace validates what it is given."""
    with pytest.raises(ValueError, match="guidance_scale"):
        dataclasses.replace(DMD2(), guidance_scale=-1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        DMD2().guidance_scale = 3.0  # type: ignore[misc]
