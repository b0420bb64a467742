"""VDOT: Sinkhorn's plan against exact ones, the field it gives, and the turns of its GAN."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import (
    ONE_STEP,
    AffineStudent,
    affine_networks,
    gaussian,
    guided_pair,
    point_batch,
    reached,
    tiny_batch,
    tiny_networks,
    touched,
)
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fastgen import signals
from fastgen.config import load_recipe
from fastgen.networks import Networks
from fastgen.objectives import DMD2, VDOT
from fastgen.objectives.vdot import sinkhorn, tokens, transport_field
from fastgen.registry import RecipeError
from fastgen.rollout import Rollout, RolloutPolicy

THREE = RolloutPolicy(timesteps=(1.0, 0.6, 0.3))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cost_of(a: Tensor, b: Tensor) -> Tensor:
    return (a[..., :, None, :] - b[..., None, :, :]).square().sum(-1)


@pytest.mark.parametrize("epsilon", [0.05, 1.0])
def test_the_plan_of_two_tokens_is_exact(epsilon: float) -> None:
    """T = [[p, 1/2 - p], [1/2 - p, p]], where 2 log(p / (1/2 - p)) = (C_12 + C_21 - C_11 - C_22) / epsilon."""
    cost = torch.tensor([[0.3, 0.9], [0.7, 0.2]], dtype=torch.float64)
    p = 0.5 * torch.sigmoid(torch.tensor((0.9 + 0.7 - 0.3 - 0.2) / (2 * epsilon), dtype=torch.float64))
    exact = torch.stack([torch.stack([p, 0.5 - p]), torch.stack([0.5 - p, p])])
    assert (sinkhorn(cost, epsilon, 200) - exact).abs().max() < 1e-10


def test_the_plan_is_the_best_one_with_its_marginals() -> None:
    """In two by three tokens: marginals 1/2 and 1/3, and no direction along which the regularised cost falls."""
    cost, epsilon = normal(2, 3).abs(), 0.2
    plan = sinkhorn(cost, epsilon, 300)
    assert (plan.sum(1) - 1 / 2).abs().max() < 1e-10 and (plan.sum(0) - 1 / 3).abs().max() < 1e-10
    slope = cost + epsilon * (plan.log() + 1)
    for i, j in itertools.combinations(range(3), 2):  # moving mass around a cycle keeps the marginals
        assert abs(slope[0, i] - slope[0, j] - slope[1, i] + slope[1, j]) < 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_without_regularisation_the_plan_is_the_assignment(seed: int) -> None:
    cost = cost_of(normal(7, 2, seed=seed), normal(7, 2, seed=seed + 10))
    rows, columns = linear_sum_assignment(cost.numpy())
    best = cost[rows, columns].mean()
    plan = sinkhorn(cost / cost.mean(), 5e-3, 1000)
    print((plan * cost).sum() / best)
    assert abs((plan * cost).sum() / best - 1) < 0.05
    assert (sinkhorn(cost / cost.mean(), 1.0, 200) * cost).sum() > 1.2 * best


def test_the_field_is_the_gradient_of_the_transport_cost() -> None:
    """n / 2 times it, against autograd through the whole iteration, with the scale of the cost held fixed."""
    fake, real = normal(1, 3, 2, 3), normal(1, 3, 2, 3, seed=1)
    a = fake.flatten(2).mT.clone().requires_grad_()
    b = real.flatten(2).mT
    cost = cost_of(a, b)
    scale = cost.detach().mean()
    plan = sinkhorn(cost / scale, 0.3, 400)
    whole = (plan * cost / scale).sum() + 0.3 * (plan * plan.log()).sum()
    (gradient,) = torch.autograd.grad(scale * whole, a)
    expected = (6 / 2 * gradient).mT.reshape(fake.shape)
    error = (transport_field(fake, real, 0.3, 400) - expected).abs().max()
    print(error)
    assert error < 1e-6


def test_permuted_tokens_have_no_field() -> None:
    """As epsilon goes to 0; DMD2's is not 0 there. Frames are matched by themselves."""
    real = normal(2, 3, 2, 4, 4)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    fake = real.flatten(3)[..., order].reshape(real.shape)
    assert transport_field(fake, real, 1e-3, 500).abs().mean() < 1e-2
    assert signals.score_difference(real, fake, real).abs().mean() > 0.1
    assert transport_field(real.flip(1), real, 1e-3, 500).abs().mean() > 0.1


def test_with_much_regularisation_every_token_is_drawn_to_the_mean() -> None:
    fake, real = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    expected = fake - real.mean((2, 3), keepdim=True)
    assert (transport_field(fake, real, 1e4, 50) - expected).abs().max() < 1e-3


def test_a_point_is_one_token() -> None:
    fake, real = normal(5, 2), normal(5, 2, seed=1)
    assert torch.allclose(transport_field(fake, real, 0.05, 10), fake - real)
    assert tokens(normal(2, 3, 4, 5)).shape == (2, 1, 20, 3) and tokens(normal(2, 6, 3, 4, 5)).shape == (2, 6, 20, 3)


def test_bfloat16_and_wrong_numbers_stay_finite() -> None:
    fake, real = normal(2, 3, 4, 4).bfloat16(), normal(2, 3, 4, 4, seed=1).bfloat16()
    assert transport_field(fake, real, 0.05, 50).dtype == torch.float32
    plain = transport_field(normal(2, 3, 4, 4).float(), real.float(), 0.05, 50)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transport_field(normal(2, 3, 4, 4).float(), real.float(), 0.05, 50), plain)
    fake[0, 0, 0, 0] = float("nan")
    assert transport_field(fake, real, 0.05, 50).isfinite().all()


def test_both_fields_are_weighted() -> None:
    x, fake, real = (normal(2, 3, 4, 4, seed=s) for s in range(3))
    ot, dm = transport_field(fake, real, 0.05, 100), DMD2().field(x, fake, real)
    assert torch.allclose(VDOT(ot_weight=0.5, dmd_weight=2.0).field(x, fake, real), 0.5 * ot + 2 * dm)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, 1.0)], ids=["transport alone", "both"])
def test_an_affine_student_converges_to_the_guided_gaussian(weights: tuple[float, float]) -> None:
    student = AffineStudent(-1.0, 0.4)
    objective = VDOT(ot_weight=weights[0], dmd_weight=weights[1], guidance_scale=2.5, normaliser_floor=0.1)
    networks = affine_networks(student, guided_pair(0.7, -0.1))
    optimizer = torch.optim.Adam(student.parameters(), 0.04)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=300)
    for step in range(300):
        batch = point_batch(torch.arange(256) + 256 * step, key=step, dim=1, uncond=2)
        optimizer.zero_grad()
        objective.loss(objective.turns(step, {})[1], networks, batch, {}).total.backward()
        optimizer.step()
        decay.step()
    a, b = student.a.item(), abs(student.b.item())
    print(f"mean off by {a - 1.9:+.1e}, standard deviation by {b - 1.3:+.1e}")
    assert abs(a - 1.9) < 0.05 and abs(b - 1.3) < 0.05


# --- the GAN


GAN: dict[str, Any] = {"gan_weight": 0.3, "stops": "per_sample", "condition_on_stop": True}


def test_updates_alternate_between_transport_and_gan() -> None:
    objective = VDOT(**GAN)
    networks, batch = tiny_networks(objective, THREE), tiny_batch()
    logged = []
    for step in range(4):
        fake, student = objective.turns(step, {})
        assert fake.roles == ("fake_score", "discriminator") and student.roles == ("student",)
        loss = objective.loss(student, networks, batch, {})
        loss.total.backward()
        assert touched(networks) == {"student"} and all(reached(networks.student).values())
        networks.student.zero_grad()
        logged.append((student.name, "dm_grad" in loss.terms))
        assert "gan" not in loss.terms
    assert logged == [("student", True), ("adversarial", False)] * 2
    assert {turn.name for step in range(4) for turn in VDOT().turns(step, {})} == {"fake_score", "student"}
    assert VDOT().needs == frozenset() and objective.needs == {"latents"}


class Slope(VDOT):
    """A discriminator that is 3 x."""

    def discriminator_logits(self, networks: Networks, batch: Any, x_t: Tensor, t: Tensor, stop: Tensor) -> Tensor:
        return 3 * x_t


def test_the_relative_loss_is_the_gap_and_a_penalty_of_its_slope() -> None:
    """Between samples at 2 and data at 0, both noised alike: D(x_t) - D(real_t) = 6 (1 - t), and the penalty is
    r1_weight (3 r1_noise)^2."""
    batch = point_batch(4000, dim=1, latents=torch.zeros(4000, 1, dtype=torch.float64))
    networks = affine_networks(AffineStudent(2.0, 0.0), gaussian())
    zero = torch.zeros(4000, dtype=torch.float64)
    rollout = Rollout(torch.full((4000, 1), 2.0, dtype=torch.float64), zero, zero.long())
    objective = Slope(gan_weight=1.0, r1_weight=2.0, r1_noise=0.1)
    loss, terms = objective.discriminator_gan(networks, batch, rollout)
    gap = 6 * (1 - objective.gan_time(batch.uniform("gan_time"))).mean()
    assert torch.allclose(terms["logit_gap"], -gap)
    assert abs(terms["r1"] - 0.09) < 0.01 and torch.allclose(loss, gap + 2 * terms["r1"])


def test_the_generators_side_is_minus_d() -> None:
    objective = Slope(gan_weight=0.5)
    student = AffineStudent(2.0, 1.0)
    networks = affine_networks(student, gaussian())
    networks.modules["discriminator"] = torch.nn.Identity()
    batch = point_batch(4000, dim=1)
    loss = objective.loss(objective.turns(1, {})[1], networks, batch, {})
    (slope,) = torch.autograd.grad(loss.total, student.a)
    assert abs(slope + 0.5 * 3 * (1 - objective.gan_time(batch.uniform("gan_time"))).mean()) < 1e-12


def test_the_fake_turn_reaches_fake_score_and_discriminator() -> None:
    objective = VDOT(**GAN)
    networks = tiny_networks(objective, ONE_STEP)
    turn = objective.turns(0, {})[0]
    objective.loss(turn, networks, tiny_batch(), {}).total.backward()
    assert touched(networks) == {"fake_score", "discriminator"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective.ot_weight=0", "objective.dmd_weight=0"], "nothing is matched"),
        (["objective.ca_time={}", "objective.guidance_scale=2"], "vdot has two fields: leave it out"),
        (["objective.epsilon=0"], "epsilon"),
        (["objective.r1_weight=0"], "r1_weight"),
    ],
)
def test_wrong_combinations_are_refused_before_anything_loads(
    mixture_recipe: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(mixture_recipe, ["objective.name=vdot", *overrides])
