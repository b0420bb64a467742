"""Teacher forcing and diffusion forcing on a tiny real Wan: their two forms, and that they train a causal network."""

import dataclasses
from typing import Any

import pytest
import torch
from test_streaming import POLICIES, SHAPE, batch, conditioning, draws, policy, wan
from torch import Tensor

from fastgen import signals
from fastgen.batch import Batch, Draws
from fastgen.networks import Networks
from fastgen.objectives import TeacherForcing
from fastgen.objectives.base import Turn
from fastgen.rollout import RolloutPolicy
from fastgen.streaming.schedule import ChunkSchedule

TURN = Turn("student", ("student",))


def videos(frames: int, rows: int = 2) -> Batch:
    return dataclasses.replace(batch(frames, rows), latents=draws(frames, rows, "data")("x"))


def loss_of(objective: TeacherForcing, sampler: RolloutPolicy, data: Batch) -> tuple[Tensor, list[Tensor]]:
    student = wan()
    loss = objective.loss(TURN, Networks({"student": student, "teacher": student}, sampler), data, {})
    loss.total.backward()
    return loss.total.detach(), [p.grad for p in student.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["whole past", "first chunk of one", "window", "sink, absolute", "context noise"])
def test_both_forms_are_the_same_loss(name: str) -> None:
    """Loss and gradient, packed into one masked call and chunk by chunk."""
    chunks = POLICIES[name]
    data = videos(7 if chunks.first else 8)
    packed, grads = loss_of(TeacherForcing(), policy(chunks), data)
    by_chunk, other = loss_of(TeacherForcing(form="chunks"), policy(chunks), data)
    scale = max(g.abs().max().item() for g in grads)
    error = max((a - b).abs().max().item() for a, b in zip(grads, other, strict=True)) / scale
    print(f"{name}: loss {packed:.8f}, {by_chunk:.8f}; largest error of the gradient {error:.1e}")
    assert by_chunk.item() == pytest.approx(packed.item(), rel=1e-6) and error < 1e-6


def frame_errors(
    objective: TeacherForcing, data: Batch, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, list[Tensor]]:
    """The squared error of each frame [F], and the gradient of the first four frames' sum."""
    errors = list[Tensor]()

    def early(prediction: Tensor, x: Tensor, *_: Any) -> Tensor:
        errors.append((prediction - x).square().mean((0, 2, 3, 4)))
        return errors[-1][:4].sum()

    with monkeypatch.context() as patch:
        patch.setattr(signals, "denoising_loss", early)
        _, grads = loss_of(objective, policy(ChunkSchedule(frames=2)), data)
    return errors[0].detach(), grads


@pytest.mark.parametrize("changed", ["data", "noise", "level"])
@pytest.mark.parametrize(
    "objective",
    [TeacherForcing(), TeacherForcing(form="chunks"), TeacherForcing(past="noisy")],
    ids=["teacher forcing", "chunks", "diffusion forcing"],
)
def test_a_later_chunk_moves_no_earlier_loss(
    objective: TeacherForcing, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the training entry point: other data, noise or levels from frame 4 on move neither the losses of the frames
    before nor their gradients, to the bit. A network that was left bidirectional by mistake fails here."""
    data = videos(8)
    errors, grads = frame_errors(objective, data, monkeypatch)
    assert data.latents is not None
    if changed == "data":
        latents = data.latents.clone()
        latents[:, 4:] = 2.0
        data = dataclasses.replace(data, latents=latents)
    elif changed == "noise":
        plain = Draws.__call__

        def other(self: Draws, name: str) -> Tensor:
            result = plain(self, name)
            if self.frames is None and self.shape[0] == 8:
                result[:, 4:] += 1
            return result

        monkeypatch.setattr(Draws, "__call__", other)
    else:
        uniform = Batch.uniform

        def levels(self: Batch, name: str, by_group: bool = False, shape: tuple[int, ...] = ()) -> Tensor:
            result = uniform(self, name, by_group, shape)
            return torch.cat([result[:, :2], 1 - result[:, 2:]], dim=1) if shape else result

        monkeypatch.setattr(Batch, "uniform", levels)
    moved, moved_grads = frame_errors(objective, data, monkeypatch)
    assert torch.equal(errors[:4], moved[:4])
    assert not torch.isclose(errors[4:], moved[4:]).any()
    assert all(torch.equal(a, b) for a, b in zip(grads, moved_grads, strict=True))


def test_an_earlier_chunk_moves_a_later_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The past is seen, and in teacher forcing it is the clean one."""
    data = videos(8)
    assert data.latents is not None
    for objective in (TeacherForcing(), TeacherForcing(form="chunks"), TeacherForcing(past="noisy")):
        errors, _ = frame_errors(objective, data, monkeypatch)
        latents = data.latents.clone()
        latents[:, :2] = 2.0
        moved, _ = frame_errors(objective, dataclasses.replace(data, latents=latents), monkeypatch)
        assert not torch.isclose(errors[4:], moved[4:], rtol=1e-9).any()


def test_a_share_of_prompts_is_dropped() -> None:
    data = dataclasses.replace(videos(2, 200), cond=conditioning(200), uncond=conditioning(200, 1))
    cond = TeacherForcing(prompt_dropout=0.25).dropped(data)["prompt_embeds"]
    dropped = (cond == data.uncond["prompt_embeds"]).all((1, 2))
    assert 0.15 < dropped.double().mean() < 0.35
    assert torch.equal(cond[~dropped], data.cond["prompt_embeds"][~dropped])
    assert TeacherForcing(prompt_dropout=0).dropped(data) is data.cond


@pytest.mark.parametrize(
    ("objective", "options", "words"),
    [
        ({}, {"chunks": None}, "say how in rollout.chunks"),
        ({}, {"two_time": True, "transition": "ode"}, "leave out two_time"),
        (
            {"past": "noisy"},
            {"chunks": ChunkSchedule(frames=2, context_noise=0.1)},
            "leave out rollout.chunks.context",
        ),
    ],
)
def test_policies_that_it_cannot_train(objective: dict[str, Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TeacherForcing(**objective).check(
            RolloutPolicy(**({"timesteps": (1.0,), "chunks": ChunkSchedule()} | options))
        )


def test_shapes_are_those_of_the_data() -> None:
    assert videos(8).latents.shape == (2, 8, *SHAPE)  # type: ignore[union-attr]
