"""The flash_dmd objective: which step has which loss, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import RENOISE, Recorder, tiny_batch, tiny_networks, touched
from torch import Tensor

from fastgen.config import load_recipe
from fastgen.networks import Networks
from fastgen.objectives.flash_dmd import FlashDMD
from fastgen.objectives.gdd import GDD
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy

ROOT = Path(__file__).parents[1]
OBJECTIVE = FlashDMD(split=0.6, ida_decay=0.9)


def keys(wanted: int, name: str = "stop", high: int = 4) -> int:
    """A key of a batch that draws this step."""
    return next(key for key in range(200) if tiny_batch(key=key).integer(name, high) == wanted)


class Watched(FlashDMD):
    """Counts which of the two gradients an update asks for."""

    def matching_loss(self, networks: Networks, *rest: Any, **options: Any) -> Any:
        networks.asked.append("matching")  # type: ignore[attr-defined]
        return super().matching_loss(networks, *rest, **options)


@pytest.mark.parametrize("step", range(4))
def test_high_steps_are_matched_and_low_ones_are_sharpened(step: int) -> None:
    """With timesteps 1, 0.75, 0.5, 0.25 and split 0.6, two each. A high step's loss does not depend on the
    discriminator, and a low one's on neither teacher nor fake score: their gradients are bitwise those without."""
    objective = Watched(split=0.6)
    networks, batch = tiny_networks(objective, RENOISE), tiny_batch(key=keys(step))
    networks.asked = []  # type: ignore[attr-defined]
    student_turn = objective.turns(0, {})[-1]

    def gradient() -> Tensor:
        loss: Any = objective.loss(student_turn, networks, batch, objective.init_state())
        (found,) = torch.autograd.grad(loss.total, [next(networks.student.parameters())])
        return found

    first = gradient()
    assert networks.asked == (["matching"] if step < 2 else [])  # type: ignore[attr-defined]
    unused, used = ("discriminator", "fake_score") if step < 2 else ("fake_score", "discriminator")
    for role, same in ((unused, True), (used, False)):
        with torch.no_grad():
            for p in networks[role].parameters():
                p.add_(0.3 * torch.randn_like(p))
        assert torch.equal(gradient(), first) == same, role


def test_the_fake_score_sees_high_steps_and_the_discriminator_low_ones() -> None:
    networks = tiny_networks(OBJECTIVE, RENOISE)
    seen: dict[str, set[float]] = {"fake_score": set(), "discriminator": set()}
    student = networks.modules["student"] = Recorder(networks.student)
    for key in range(12):
        for turn in OBJECTIVE.turns(0, {})[:2]:
            student.calls.clear()
            OBJECTIVE.loss(turn, networks, tiny_batch(4, key), OBJECTIVE.init_state())
            seen[turn.name].add(float(student.calls[-1].t[0]))
            assert not any(call.grad for call in student.calls)
    assert seen == {"fake_score": {1.0, 0.75}, "discriminator": {0.5, 0.25}}


@pytest.mark.parametrize("step", [1, 3])
def test_gradient_reaches_the_executed_step_alone_and_each_turn_its_own_networks(step: int) -> None:
    networks, state = tiny_networks(OBJECTIVE, RENOISE), OBJECTIVE.init_state()
    student = networks.modules["student"] = Recorder(networks.student)
    for turn in OBJECTIVE.turns(0, state):
        student.calls.clear()
        OBJECTIVE.loss(turn, networks, tiny_batch(key=keys(step)), state).total.backward()  # type: ignore[union-attr]
        assert touched(networks) == set(turn.roles)
        if turn.name == "student":
            assert [call.grad for call in student.calls] == [False] * step + [True]
        for module in networks.values():
            module.zero_grad()


def test_the_sharpening_term_has_its_weight_and_the_fake_score_moves_towards_the_student() -> None:
    networks, batch, state = tiny_networks(OBJECTIVE, RENOISE), tiny_batch(key=keys(3)), OBJECTIVE.init_state()
    turn = OBJECTIVE.turns(0, state)[-1]
    losses: list[Any] = [
        FlashDMD(split=0.6, sharpening_weight=w).loss(turn, networks, batch, state) for w in (1.0, 0.25)
    ]
    assert torch.allclose(losses[1].total, 0.25 * losses[0].total)
    with torch.no_grad():
        for p in networks.student.parameters():
            p.add_(1.0)
    fake, student = (next(networks[role].parameters()) for role in ("fake_score", "student"))
    wanted = 0.9 * fake.detach() + 0.1 * student.detach()
    OBJECTIVE.finish(turn, networks, state)
    assert torch.allclose(fake, wanted)
    discriminator_turn = OBJECTIVE.turns(0, state)[1]
    OBJECTIVE.finish(discriminator_turn, networks, state)
    assert int(state["updates"]) == 1 and torch.allclose(fake, wanted)


def test_what_cannot_be_is_refused() -> None:
    for options, text in (
        ({"stops": "per_sample"}, "leave out stops"),
        ({"student_input": "data"}, "leave out stops"),
        ({"gan_weight": 0.1}, "sharpening_weight"),
        ({"gan": GDD(freeze=("blocks",))}, r"gan\.freeze"),
    ):
        with pytest.raises(ValueError, match=text):
            FlashDMD(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="below it"):
        FlashDMD(split=0.2).check(RENOISE)
    with pytest.raises(ValueError, match="above it"):
        FlashDMD(split=0.6).check(RolloutPolicy((0.5, 0.25)))
    recipe = ROOT / "recipes/mixture_flash_dmd_4step.yaml"
    for lines, text in (
        (["objective.gan.pixel_network=digits"], "gives points, not pixels"),
        (["objective.split=0.1"], "leaves no step"),
        (["objective.gan.heads=3"], "unknown key objective.gan.heads"),
    ):
        with pytest.raises(RecipeError, match=text):
            load_recipe(recipe, lines)
