"""The gdd objective: its losses, R1, the frozen part of its student, and what it refuses."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import (
    ONE_STEP,
    Recorder,
    gaussian_batch,
    one_loss,
    reached,
    tiny_backbone,
    tiny_batch,
    tiny_networks,
    touched,
)
from torch import Tensor, nn

from fastgen.backbones.sd3 import SD3Config
from fastgen.batch import Batch
from fastgen.config import load_recipe
from fastgen.data.digits import assets_dir, load_digits
from fastgen.denoiser import Denoiser
from fastgen.modules.heads import PictureHeads
from fastgen.networks import Networks
from fastgen.objectives.adp import PictureFeatures, make_pixel_network
from fastgen.objectives.gdd import GDD, per_head
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy

ROOT = Path(__file__).parents[1]


class Linear(GDD):
    """GDD with given samples, which D sees as they are: D's heads are linear in them."""

    def generated(self, networks: Networks, batch: Any, grad: bool) -> Tensor:
        weight: Any = networks["student"].weight
        return weight if grad else weight.detach()

    def seen(self, networks: Networks, batch: Any, x0: Tensor, name: str) -> Tensor:
        return x0

    def logits_of(self, networks: Networks, batch: Any, seen: Tensor, name: str) -> Tensor:
        return networks["discriminator"](seen)


def linear_networks(count: int = 64, heads: int = 3) -> Networks:
    torch.manual_seed(0)
    fake = nn.Linear(2, count, bias=False).double()
    discriminator = nn.Linear(2, heads).double()
    return Networks({"student": fake, "discriminator": discriminator}, ONE_STEP)


def test_the_losses_are_sums_over_heads() -> None:
    networks, batch = linear_networks(), gaussian_batch()
    assert batch.latents is not None
    fake, real = networks["discriminator"](networks["student"].weight), networks["discriminator"](batch.latents)
    soft = nn.functional.softplus
    wanted = sum(soft(-fake[:, i]).mean() for i in range(3))
    assert torch.allclose(Linear().student_loss(networks, batch).total, wanted)  # type: ignore[arg-type]
    wanted = sum(soft(fake[:, i]).mean() + soft(-real[:, i]).mean() for i in range(3))
    assert torch.allclose(Linear().discriminator_loss(networks, batch, False).total, wanted)  # type: ignore[arg-type]
    hinge = Linear(loss_type="hinge")
    assert torch.allclose(hinge.student_loss(networks, batch).total, -fake.mean(0).sum())
    wanted = (1 + fake).relu().mean(0).sum() + (1 - real).relu().mean(0).sum()
    assert torch.allclose(hinge.discriminator_loss(networks, batch, False).total, wanted)
    assert per_head(torch.ones(7, 3)) == 3


def test_equal_laws_leave_twice_log_two_for_each_head() -> None:
    """At the optimal discriminator of equal laws, D = 0."""
    networks, batch = linear_networks(), gaussian_batch()
    for p in networks["discriminator"].parameters():
        nn.init.zeros_(p)
    found = Linear().discriminator_loss(networks, batch, False).total
    assert float(found) == pytest.approx(3 * 2 * 0.6931471805599453)


def test_r1_is_the_square_of_the_gradient_of_the_summed_heads_and_lazy_in_the_mean() -> None:
    """For linear heads the gradient is the sum of their rows. One update in sixteen has sixteen times the penalty."""
    networks, batch = linear_networks(), gaussian_batch()
    rows = networks["discriminator"].weight.sum(0)  # type: ignore[union-attr, operator]
    objective = Linear(r1_weight=0.3)
    assert torch.allclose(objective.r1_penalty(networks, batch), rows.square().sum())
    plain, lazy = (objective.discriminator_loss(networks, batch, r1).total for r1 in (False, True))
    assert torch.allclose(lazy - plain, 16 * 0.15 * rows.square().sum())
    turn, state = objective.turns(0, {})[0], objective.init_state()
    due = []
    for _ in range(33):
        loss: Any = objective.loss(turn, networks, batch, state)
        due.append("r1" in loss.terms)
        objective.finish(turn, networks, state)
    assert [i for i, found in enumerate(due) if found] == [0, 16, 32]
    assert "r1" not in Linear(r1_weight=0.0).discriminator_loss(networks, batch, True).terms


def test_descent_moves_samples_towards_what_the_discriminator_takes_for_real() -> None:
    networks, batch = linear_networks(heads=1), gaussian_batch()
    one_loss(Linear(), networks, batch, Linear().turns(0, {})[1]).backward()
    step = -networks["student"].weight.grad  # type: ignore[operator, union-attr]
    assert bool(((step @ networks["discriminator"].weight.T) > 0).all())  # type: ignore[union-attr, operator]


def test_each_turn_moves_its_own_networks() -> None:
    objective = GDD(discriminator_updates=2)
    networks = tiny_networks(objective, ONE_STEP)
    assert [(turn.name, turn.updates) for turn in objective.turns(0, {})] == [("discriminator", 2), ("student", 1)]
    for turn in objective.turns(0, {}):
        one_loss(objective, networks, tiny_batch(), turn).backward()
        for role, module in networks.items():
            assert any(reached(module).values()) == (role in turn.roles), (turn.name, role)
            module.zero_grad()


def test_the_student_makes_its_samples_from_noise_in_one_step() -> None:
    objective = GDD()
    networks = tiny_networks(objective, ONE_STEP)
    student = Recorder(networks.student)
    networks.modules["student"] = student
    batch = tiny_batch()
    objective.student_loss(networks, batch)
    (call,) = student.calls
    assert bool((call.t == 1).all()) and call.grad and torch.equal(call.x_t, batch.normal("initial"))


def test_what_is_frozen_keeps_the_teachers_values_and_the_rest_learns() -> None:
    objective = GDD(freeze=("blocks",))
    networks = tiny_networks(objective, ONE_STEP)
    names = {name: p.requires_grad for name, p in networks.student.named_parameters()}
    assert all(learns != ("blocks" in name) for name, learns in names.items()) and len(set(names.values())) == 2
    optimizer = torch.optim.AdamW(networks.student.parameters(), lr=0.1, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in networks.student.named_parameters()}
    one_loss(objective, networks, tiny_batch(), objective.turns(0, {})[1]).backward()
    optimizer.step()
    for name, p in networks.student.named_parameters():
        assert torch.equal(p, before[name]) or "blocks" not in name
    assert any(not torch.equal(p, before[name]) for name, p in networks.student.named_parameters())
    assert objective.full_roles == ("discriminator", "student") and GDD().full_roles == ("discriminator",)


class Pictures(Denoiser):
    """A student whose samples are given pictures as latents."""

    def __init__(self, pixels: Tensor):
        super().__init__(nn.Identity(), tiny_backbone().schedule, "sample")
        self.pixels = nn.Parameter(pixels)

    def call_network(self, x_t: Tensor, t: Tensor, cond: Any, inputs: Any) -> Tensor:
        return self.pixels


def test_pictures_are_seen_decoded_and_r1_is_of_their_pixels() -> None:
    """Decoding halves a latent here: the gradient in pixels is twice that in latents. It is checked against a
    difference, and the student's gradient passes the frozen network."""
    objective = GDD(pixel_network="digits")
    features = PictureFeatures(make_pixel_network("digits").double(), lambda x, clamp: 0.5 * x).double()
    pixels, _ = load_digits("train")
    latents = 2 * pixels[:4].double()
    batch = dataclasses.replace(gaussian_batch(4), latents=latents, latent_shape=tuple(latents.shape[1:]))
    heads = PictureHeads(features.network.feature_dims, 8).double()  # type: ignore[arg-type]
    student = Pictures(torch.rand_like(latents))
    networks = Networks({"student": student, "pixel_features": features, "discriminator": heads}, ONE_STEP)
    seen = objective.seen(networks, batch, latents, "gan_real")
    assert torch.equal(seen, 0.5 * latents)
    penalty = objective.r1_penalty(networks, batch)
    leaf = seen.clone().requires_grad_()
    (grad,) = torch.autograd.grad(objective.logits_of(networks, batch, leaf, "gan_real").sum(), leaf)
    assert torch.allclose(penalty, grad.square().sum((1, 2, 3)).mean())
    penalty.backward()
    assert any(reached(heads).values())
    heads.zero_grad()
    objective.student_loss(networks, batch).total.backward()
    assert student.pixels.grad is not None and float(student.pixels.grad.abs().max()) > 0
    assert not any(reached(heads).values())


def test_the_features_of_a_transformer_are_differentiated_twice_for_r1() -> None:
    """The digits teacher's own attention, with the prompt. R1 leaves gradient on the heads alone."""
    backbone = SD3Config(path=str(assets_dir() / "teachers/digits")).build(torch.device("cpu"), torch.float32, 0)
    objective = GDD(r1_weight=1.0)
    modules: dict[str, nn.Module] = {"student": backbone.load("student"), "teacher": backbone.load("teacher")}
    modules |= objective.auxiliary(backbone, ONE_STEP)
    networks, cond = Networks(modules, ONE_STEP), backbone.encode_prompts(["a one", "a two", "", ""])
    rows = (cond.select(slice(0, 2)), cond.select(slice(2, 4)))
    latents = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    batch = Batch(torch.arange(2), 0, *rows, backbone.latent_shape, latents=latents)
    penalty = objective.r1_penalty(networks, batch)
    penalty.backward()
    assert float(penalty) > 0 and touched(networks) == {"discriminator"}


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is in every name"):
        GDD(freeze=("",))
    with pytest.raises(ValueError, match=r"has no config\.json"):
        GDD(pixel_network=str(tmp_path))
    with pytest.raises(ValueError, match=r"give \[1.0\]"):
        GDD().check(RolloutPolicy((1.0, 0.5)))
    for freeze, text in (
        (("nowhere",), "nowhere in its name"),
        (("network",), "no parameter of the student"),
    ):
        with pytest.raises(ValueError, match=text):
            GDD(freeze=freeze).make_student(tiny_backbone(), ONE_STEP)
    recipe = ROOT / "recipes/mixture_gdd_1step.yaml"
    for lines, text in (
        (["objective.pixel_network=digits"], "gives points, not pixels"),
        (["objective.freeze=[blocks]", "lora={student: {rank: 2}}"], "can be adapters are"),
    ):
        with pytest.raises(RecipeError, match=text):
            load_recipe(recipe, lines)
