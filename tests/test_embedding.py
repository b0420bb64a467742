"""The embedding loss: MMD against its closed form, the features of random networks and of the teacher, the objectives
that take it, and embedding_loss alone."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import (
    GAUSSIAN,
    ONE_STEP,
    TINY,
    AffineStudent,
    affine_networks,
    consistency_networks,
    gaussian,
    gaussian_batch,
    point_batch,
    reached,
    tiny_backbone,
    tiny_batch,
    tiny_networks,
    touched,
)
from pydantic import ValidationError
from torch import Tensor

from fastgen.config import load_recipe
from fastgen.flow.time_pairs import GridPairs
from fastgen.objectives import DMD2, Consistency, EmbeddingLoss, SiD
from fastgen.objectives.base import Objective
from fastgen.objectives.embedding import Embedding, linear, mmd, random_features, rbf
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import TimeSampler

THREE = RolloutPolicy(timesteps=(1.0, 0.6, 0.3))
FRESH = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=FRESH, dtype=torch.float64)


def gaussian_kernel(mean: float, variance: float, width: float) -> float:
    """E k(a, b) for a - b ~ N(mean, variance), k = exp(-(a - b)^2 / (2 width^2))."""
    total = width**2 + variance
    return width / math.sqrt(total) * math.exp(-(mean**2) / (2 * total))


def test_mmd_is_that_of_two_gaussians() -> None:
    """N(0, 1) against N(0.7, 1.3^2) with one bandwidth of 0.9: 0.0795, within four standard errors of 100 batches."""
    exact = gaussian_kernel(0, 2, 0.9) + gaussian_kernel(0, 2 * 1.69, 0.9) - 2 * gaussian_kernel(0.7, 2.69, 0.9)
    found = torch.stack(
        [mmd(normal(128, 1), 0.7 + 1.3 * normal(100, 1), lambda _: lambda d: rbf(d, (0.81,))) for _ in range(100)]
    )
    error = found.std() / 10
    print(f"{found.mean():.4f} +- {error:.4f}, exact {exact:.4f}")
    assert abs(found.mean() - exact) < 4 * error and error < 0.1 * exact and abs(exact - 0.07948) < 1e-5


def test_the_statistic_is_unbiased() -> None:
    """Zero on average for equal laws, even with three samples; with the diagonals it would be above 0.2."""
    found = torch.stack([mmd(normal(3, 1), normal(3, 1), lambda _: lambda d: rbf(d, (1.0,))) for _ in range(500)])
    print(f"{found.mean():.4f} +- {found.std() / math.sqrt(500):.4f}, least {found.min():.2f}")
    assert abs(found.mean()) < 4 * found.std() / math.sqrt(500) and found.min() < -0.1


def test_the_linear_kernel_compares_means() -> None:
    """The products of features, without those of a sample with itself."""
    x, y = normal(5, 3), normal(4, 3)
    gram_x, gram_y = x @ x.T / 3, y @ y.T / 3
    off_x = (gram_x.sum() - gram_x.trace()) / 20
    off_y = (gram_y.sum() - gram_y.trace()) / 12
    expected = off_x + off_y - 2 * (x @ y.T / 3).mean()
    own = (x.square().sum(1).mean() + y.square().sum(1).mean()) / 3  # cancels: |a|^2 / 2 has coefficients 1 - 1
    assert own > 0 and abs(mmd(x, y, lambda _: linear) - expected) < 1e-12


def test_bandwidths_follow_the_median_distance() -> None:
    """So that the loss does not depend on the unit of the features."""
    embedding, x, y = Embedding(), normal(20, 3), 0.5 + normal(20, 3)
    one, other = (mmd(scale * x, scale * y, embedding.kernel_for) for scale in (1.0, 100.0))
    assert abs(one - other) < 1e-10


def test_autocast_does_not_round_distances() -> None:
    x, y, kernel_for = 10 + normal(20, 3).float(), 10 + normal(20, 3).float(), Embedding().kernel_for
    with torch.autocast("cpu", torch.bfloat16):
        inside = mmd(x, y, kernel_for)
    assert torch.equal(inside, mmd(x, y, kernel_for))


@pytest.mark.parametrize("shape", [(2,), (3, 8, 8), (3, 5, 9), (2, 3, 8, 8)], ids=["point", "image", "odd", "video"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_random_networks_of_all_shapes(shape: tuple[int, ...], layers: int) -> None:
    """Features are finite, of size about 1, at most 4 x 4 positions, the same for the same key and others for another
    one, and they carry gradient."""
    x = normal(6, *shape).requires_grad_()
    features = random_features(x, 1, 16, layers)
    again, other = random_features(x, 1, 16, layers), random_features(x, 2, 16, layers)
    assert features.shape[0] == 6 and torch.equal(features, again) and not torch.allclose(features, other)
    assert 0.05 < features.std() < 5 and features.shape[1] <= 16 * 16 * (shape[0] if len(shape) == 4 else 1)
    features.square().sum().backward()
    assert x.grad is not None and (x.grad.flatten(1).abs().sum(1) > 0).all()


def test_every_update_has_other_networks() -> None:
    """The value at the same samples depends on the key of the batch, and on nothing else."""
    embedding, x, real = Embedding(), normal(32, 2), 1 + normal(32, 2)
    networks = affine_networks(AffineStudent((0.0, 0.0), (1.0, 1.0)), gaussian())
    one, again, other = (embedding.student_loss(networks, point_batch(32, key), x, real) for key in (0, 0, 1))
    assert one == again and one != other


@pytest.mark.parametrize("kernel", ["rbf", "linear"])
def test_one_network_is_not_enough_where_many_are(kernel: Any) -> None:
    """Equal laws are 0 on average, and others are far above: in the mean, and in the spread alone."""
    networks = affine_networks(AffineStudent((0.0, 0.0), (1.0, 1.0)), gaussian())
    embedding, found = Embedding(kernel=kernel), []
    for shift, stretch in ((0.0, 1.0), (0.5, 1.0), (0.0, 1.5)):
        values = [
            embedding.student_loss(networks, point_batch(64, k), shift + stretch * normal(64, 2), normal(64, 2))
            for k in range(20)
        ]
        found.append((torch.stack(values).mean().item(), torch.stack(values).std().item() / math.sqrt(20)))
    print(found)
    assert abs(found[0][0]) < 4 * found[0][1]
    assert all(mean > 4 * error for mean, error in found[1:])


def test_the_loss_at_a_level_is_that_of_noised_data() -> None:
    """x at level t against real data noised there: 0 on average for the same law, and not for clean data."""
    embedding = Embedding()
    networks = affine_networks(AffineStudent((0.0, 0.0), (1.0, 1.0)), gaussian())
    level, found = torch.full((64,), 0.6, dtype=torch.float64), []
    for at in (level, None):
        values = []
        for k in range(20):
            batch = point_batch(64, k)
            x = networks.teacher.schedule.add_noise(2 + 0.1 * normal(64, 2), normal(64, 2), level)
            values.append(embedding.student_loss(networks, batch, x, 2 + 0.1 * normal(64, 2), at))
        found.append(torch.stack(values))
    print([v.mean().item() for v in found])
    assert abs(found[0].mean()) < 4 * found[0].std() / math.sqrt(20) and found[1].mean() > 0.1


def test_features_of_the_teacher_are_those_of_its_blocks() -> None:
    """On a mixture they are of the network fitted to it, at one level for both sides; gradient flows to x alone."""
    embedding = Embedding(features="teacher", time=TimeSampler(low=0.1, high=0.4))
    objective = EmbeddingLoss(embedding=embedding)
    networks, batch = tiny_networks(objective, ONE_STEP), tiny_batch()
    assert set(networks) == {"student", "teacher", "features"} and batch.latents is not None
    x = (batch.latents + 1).requires_grad_()
    with networks.critic.capture() as seen:
        loss = embedding.student_loss(networks, batch, x, batch.latents)
    assert len(seen) == 2 * TINY.depth
    loss.backward()
    assert x.grad is not None and touched(networks) == set()
    values = [mmd(a.mean(1), b.mean(1), embedding.kernel_for) for a, b in zip(seen[:2], seen[2:], strict=True)]
    assert torch.allclose(loss, torch.stack(values).mean())


def embedded(objective: Any, **changes: Any) -> Objective:
    return dataclasses.replace(objective, embedding=Embedding(weight=0.7, **changes))


@pytest.mark.parametrize("objective", [DMD2(stops="per_sample"), SiD(gan_weight=0.1)], ids=lambda o: o.name)
def test_it_is_added_to_other_objectives(objective: DMD2) -> None:
    """The student's loss is the objective's own plus weight times the term, and real data are needed; the fake score's
    loss does not change."""
    with_term = embedded(objective)
    networks, batch = tiny_networks(objective, THREE), tiny_batch()
    fake, student = objective.turns(0, {})
    plain, both = (o.loss(student, networks, batch, {}) for o in (objective, with_term))
    assert not isinstance(plain, Any.__class__) and with_term.needs == {"latents"}
    assert torch.allclose(both.total, plain.total + 0.7 * both.terms["embedding"])
    assert both.terms["embedding"] > 0 and not both.terms["embedding"].requires_grad
    assert objective.loss(fake, networks, batch, {}).total == with_term.loss(fake, networks, batch, {}).total


def test_it_is_added_to_consistency() -> None:
    objective = Consistency(grid=GridPairs(count=4), teach="data")
    with_term = embedded(objective)
    networks, batch = consistency_networks(0.1), gaussian_batch()
    (turn,) = objective.turns(0, {})
    plain, both = (o.loss(turn, networks, batch, {}) for o in (objective, with_term))
    assert torch.allclose(both.total, plain.total + 0.7 * both.terms["embedding"])
    phased = embedded(Consistency(grid=GridPairs(count=4), phases=(2,)))
    value = phased.loss(turn.__class__("student", ("student",), phases=2), networks, gaussian_batch(512), {})
    print(value.terms["embedding"])
    assert abs(value.terms["embedding"]) < 0.05  # both sides are at the lower edges of the phases


def test_alone_it_trains_the_student_alone() -> None:
    objective = EmbeddingLoss()
    networks, batch = tiny_networks(objective, THREE), tiny_batch()
    assert set(networks) == {"student", "teacher"} and objective.needs == {"latents"}
    (turn,) = objective.turns(0, {})
    loss = objective.loss(turn, networks, batch, {})
    loss.total.backward()
    assert touched(networks) == {"student"} and all(reached(networks.student).values())
    assert loss.total == loss.terms["embedding"] == loss.terms["loss"]


@pytest.mark.slow
def test_an_affine_student_ends_at_the_data() -> None:
    """x = a + b z, with data of N(0.7, 1.3^2), from N(-1, 0.4^2)."""
    student = AffineStudent(-1.0, 0.4)
    networks, objective = (
        affine_networks(student, gaussian()),
        EmbeddingLoss(embedding=Embedding(networks=2, width=16)),
    )
    optimizer = torch.optim.Adam(student.parameters(), 0.05)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=150)
    for step in range(150):
        ids = torch.arange(128) + 128 * step
        batch = point_batch(ids, step, dim=1)
        batch = dataclasses.replace(batch, latents=0.7 + 1.3 * batch.normal("data"))
        optimizer.zero_grad()
        objective.loss(objective.turns(step, {})[0], networks, batch, {}).total.backward()  # type: ignore[union-attr]
        optimizer.step()
        decay.step()
    a, b = student.a.item(), abs(student.b.item())
    print(f"mean {a:.3f}, standard deviation {b:.3f}")
    assert abs(a - 0.7) < 0.08 and abs(b - 1.3) < 0.08


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"features": "teacher"}, "give time"),
        ({"features": "teacher", "time": TimeSampler(), "width": 8}, "leave them out with features: teacher"),
        ({"kernel": "linear", "bandwidths": (1.0,)}, "leave them out with kernel: linear"),
        ({"weight": 0.0}, "greater than 0"),
        ({"bandwidths": ()}, "at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Embedding(**changes)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.batch_size=1"], "train.batch_size is 1; make it at least 2"),
        (["objective={name: dmd2, embedding: {}}", "train.batch_size=1"], "make it at least 2"),
        (["objective={name: dmd2, embedding: {weights: 1}}"], "objective.embedding.weights"),
        (["objective.embedding={weight: 0}"], "objective.embedding.weight"),
    ],
)
def test_recipes_are_refused_before_anything_loads(mixture_recipe: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(
            mixture_recipe,
            ["objective={name: embedding_loss}", "optimizers={student: {lr: 1e-3}}", *overrides]
            if not any("dmd2" in o for o in overrides)
            else overrides,
        )


def test_a_pipeline_is_its_own_feature_network() -> None:
    """Only a teacher that is a formula has a network of features beside it, and only where they are asked for."""
    backbone = tiny_backbone(GAUSSIAN)
    assert Embedding().networks_needed(backbone) == {}
    features = Embedding(features="teacher", time=TimeSampler()).networks_needed(backbone)
    assert set(features) == {"features"} and not any(p.requires_grad for p in features["features"].parameters())
