"""ODE regression and consistency on given videos, chunk by chunk: both forms, causality, levels and refusals, on a
tiny real Wan."""

import dataclasses
from typing import Any

import pytest
import torch
from test_streaming import POLICIES, batch, draws, policy, wan
from torch import Tensor

from fastgen import signals
from fastgen.batch import Batch
from fastgen.denoiser import Inputs
from fastgen.networks import Networks
from fastgen.objectives import Consistency, Objective, ODERegression
from fastgen.objectives.ode_regression import student_levels
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import FlowSchedule
from fastgen.streaming.schedule import ChunkSchedule

OBJECTIVES = {
    "ode_regression": lambda **options: ODERegression(**options),
    "consistency": lambda **options: Consistency(
        teach="data", grid={"count": 8}, distance="square", target_decay=0.5, **options
    ),
}


def videos(frames: int) -> Batch:
    x = draws(frames, key="data")("x")
    return dataclasses.replace(batch(frames), latents=x, pairs=(draws(frames, key="noise")("x"), x))


def loss_of(objective: Objective, sampler: RolloutPolicy, data: Batch) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the student's gradient."""
    objective.check(sampler)
    student, target = wan(), wan().requires_grad_(False)
    networks = Networks({"student": student, "teacher": student, "target": target}, sampler)
    (turn,), state = objective.turns(0, {}), objective.init_state()
    loss = objective.loss(turn, networks, data, state)
    loss.total.backward()  # type: ignore[union-attr]
    return loss.total.detach(), [p.grad for p in student.parameters() if p.grad is not None]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["first chunk of one", "window", "context noise"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_both_forms_are_the_same_loss(objective: str, name: str) -> None:
    """Loss and gradient, packed into one masked call and chunk by chunk."""
    chunks = POLICIES[name]
    data = videos(7 if chunks.first else 8)
    packed, grads = loss_of(OBJECTIVES[objective](), policy(chunks), data)
    by_chunk, other = loss_of(OBJECTIVES[objective](form="chunks"), policy(chunks), data)
    scale = max(g.abs().max().item() for g in grads)
    error = max((a - b).abs().max().item() for a, b in zip(grads, other, strict=True)) / scale
    print(f"{objective}, {name}: loss {packed:.8f}, {by_chunk:.8f}; largest error of the gradient {error:.1e}")
    assert by_chunk.item() == pytest.approx(packed.item(), rel=1e-6) and error < 1e-6


@pytest.mark.parametrize("form", ["packed", "chunks"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_later_chunk_moves_no_earlier_loss(objective: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the training entry point: other data from frame 4 on moves neither the errors of the frames before nor their
    gradients, to the bit."""

    def errors(data: Batch) -> tuple[Tensor, list[Tensor]]:
        found = list[Tensor]()

        def early(square: Tensor) -> Tensor:
            video = square.unflatten(0, (2, 8)) if len(square) == 16 else square
            found.append(video.detach())
            kept = video * (torch.arange(8) < 4).view(-1, 1, 1, 1)
            return kept.reshape(square.shape).flatten(1).mean(1)

        with monkeypatch.context() as patch:
            patch.setattr(signals, "per_sample_mean", early)
            _, grads = loss_of(OBJECTIVES[objective](form=form), policy(ChunkSchedule(frames=2)), data)
        return found[0][:, :4], grads

    data = videos(8)
    changed = data.latents.clone()  # type: ignore[union-attr]
    changed[:, 4:] = 2.0
    other = dataclasses.replace(data, latents=changed, pairs=(data.pairs[0], changed))  # type: ignore[index]
    (before, grads), (after, other_grads) = errors(data), errors(other)
    assert before.shape[:2] == (2, 4) and torch.equal(before, after)
    assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True))


def test_a_noisy_past_is_that_of_the_noisy_video() -> None:
    """The prediction of `past: noisy` is that of one causal call on x_t, and not that of a clean past."""
    sampler, data = policy(ChunkSchedule(frames=2)), videos(8)
    found = {past: loss_of(ODERegression(past=past), sampler, data)[0] for past in ("clean", "noisy")}  # type: ignore
    noise, x0 = data.pairs  # type: ignore[misc]
    t = student_levels(sampler, data, noise)
    with torch.no_grad():
        prediction = wan()(FlowSchedule().add_noise(x0, noise, t), t, data.cond, Inputs(causal=sampler.chunks))
    assert float(found["noisy"]) == pytest.approx(0.5 * float((prediction - x0).square().mean()), rel=1e-6)
    assert abs(float(found["clean"] - found["noisy"])) > 1e-4 * float(found["noisy"])


def test_every_chunk_draws_a_level_of_its_own_list() -> None:
    """Equal for the frames of a chunk, different between chunks, and the first chunk has its own list."""
    sampler = policy(ChunkSchedule(frames=2, first=1, first_timesteps=(1.0, 0.8, 0.3)))
    data = dataclasses.replace(batch(7), ids=torch.arange(200))
    t = student_levels(sampler, data, data.ids.double())
    assert t.shape == (200, 7) and torch.equal(t[:, 1::2], t[:, 2::2])
    assert set(t[:, 0].tolist()) == {1.0, 0.8, 0.3} and set(t[:, 1:].flatten().tolist()) == {1.0, 0.6}
    assert (t[:, 1] != t[:, 3]).any()
    pair = OBJECTIVES["consistency"]().levels(data, sampler, 0)
    assert all(level.shape == (200, 7) and torch.equal(level[:, 1::2], level[:, 2::2]) for level in pair)
    assert (
        torch.allclose(pair[0] - pair[1], torch.full((), 1 / 8, dtype=torch.float64)) and pair[0].unique().numel() == 8
    )


@pytest.mark.parametrize(
    ("objective", "chunks", "words"),
    [
        (ODERegression(states="path"), True, "states: line"),
        (ODERegression(form="chunks"), False, "leave them out"),
        (ODERegression(past="noisy"), False, "leave them out"),
        (ODERegression(past="noisy", form="chunks"), True, "leave form out"),
        (Consistency(grid={"count": 8}), True, "teach: data"),  # type: ignore[arg-type]
        (Consistency(teach="data", grid={"count": 8}, phases=(2,)), True, "phases"),  # type: ignore[arg-type]
        (Consistency(teach="data", grid={"count": 8}, form="chunks"), False, "leave it out"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_trained_is_said(objective: Any, chunks: bool, words: str) -> None:
    sampler = RolloutPolicy((1.0, 0.6), chunks=ChunkSchedule(frames=2) if chunks else None)
    with pytest.raises(ValueError, match=words):
        objective.check(sampler)
