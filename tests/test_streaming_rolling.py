"""Chunks in the making together (`chunks.order: rolling`) on tiny real Wan networks and on the exact law."""

import dataclasses
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_ar1_streaming import backbone
from test_streaming import POLICIES, SHAPE, batch, conditioning, draws, policy, wan
from test_streaming_training import recipe
from tiny_wan import tiny_wan
from torch import Tensor

from fastgen.backbones.ar1_law import to_complex
from fastgen.backbones.wan import WanConfig, WanDenoiser
from fastgen.batch import Conditioning, Draws
from fastgen.denoiser import Inputs
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy, backward_simulation, sample, sample_chunks
from fastgen.streaming.context import Context
from fastgen.streaming.schedule import ChunkSchedule
from fastgen.train import train

LEVELS = (1.0, 0.8, 0.5)
FRAMES = 8
ASD = {"name": "asd", "lists": [[1.0, 0.8, 0.6], [1.0, 0.6]]}


@pytest.fixture(scope="module")
def network() -> WanDenoiser:
    return wan(linear=True).requires_grad_(False)


def rolling(chunks: ChunkSchedule, *levels: float, **options: Any) -> RolloutPolicy:
    return policy(dataclasses.replace(chunks, order="rolling"), *(levels or LEVELS), **options)


def full(value: Tensor | float, like: Tensor) -> Tensor:
    return torch.full(like.shape[:2], float(value), dtype=like.dtype)


@pytest.mark.parametrize("name", POLICIES)
def test_one_step_is_the_same_in_all_orders(name: str, network: WanDenoiser) -> None:
    plain, rolled = policy(POLICIES[name], 1.0), rolling(POLICIES[name], 1.0)
    frames = 7 if POLICIES[name].first else 8
    assert torch.equal(*(sample(network, p, conditioning(), draws(frames)) for p in (plain, rolled)))
    stop = torch.zeros(2, dtype=torch.int64)
    assert torch.equal(*(backward_simulation(network, p, batch(frames), stop).x for p in (plain, rolled)))


@pytest.mark.parametrize("transition", ["ode", "renoise"])
def test_two_steps_by_the_definition(transition: Any, network: WanDenoiser) -> None:
    """The first two chunks of four frames, written out. Before anything is committed, a call on several chunks is the
    stock network on a short video whose frames have levels of their own."""
    sampler, noise, cond = rolling(ChunkSchedule(frames=2), 1.0, 0.6, transition=transition), draws(8), conditioning()
    first, second, third = (noise.chunk(range(i, i + 2)) for i in (0, 2, 4))
    start = first("initial")
    x0 = network(start, full(1, start)[:, 0], cond)

    def stepped(x0: Tensor, x_t: Tensor, own: Draws) -> Tensor:
        return 0.4 * x0 + 0.6 * (own("step1") if transition == "renoise" else x_t)  # at level 1, x_t is the noise

    a, b = stepped(x0, start, first), second("initial")
    levels = torch.cat([full(0.6, a), full(1, b)], dim=1)
    both = network(torch.cat([a, b], dim=1), levels, cond)
    clean, b = both[:, :2], stepped(both[:, 2:], b, second)
    context = network.commit(clean, full(0, clean)[:, 0], cond, Context(sampler.chunks))  # type: ignore[arg-type]
    c = third("initial")
    both = network(torch.cat([b, c], dim=1), levels, cond, Inputs(context=context))
    expected = torch.cat([clean, both[:, :2]], dim=1)
    made = sample(network, sampler, cond, draws(4))
    assert (made - expected).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["first chunk of one", "window", "sink", "EMA sink", "context noise", "8 bits"])
def test_the_same_seed_gives_the_same_video(name: str, network: WanDenoiser) -> None:
    """Whole, streamed, and as the beginning of a longer video: the same bits."""
    sampler, frames = rolling(POLICIES[name]), 7 if POLICIES[name].first else 8
    whole = sample(network, sampler, conditioning(), draws(frames))
    streamed = sample_chunks(network, sampler, conditioning(), draws(1))
    assert torch.equal(torch.cat([next(streamed).x0 for _ in range(4)], dim=1), whole)
    assert torch.equal(sample(network, sampler, conditioning(), draws(frames + 4))[:, :frames], whole)


@pytest.mark.parametrize("stop", range(3))
def test_a_rollout_keeps_each_chunk_once_on_the_sampler_s_way(stop: int, network: WanDenoiser) -> None:
    """Chunk b stops at step (k - b) mod T. Where that is the last step, the sample is the sampler's."""
    sampler, videos = rolling(POLICIES["window"]), batch(FRAMES)
    rollout = backward_simulation(network, sampler, videos, torch.full((2,), stop))
    own = Draws(videos.ids, (FRAMES, *SHAPE), videos.key, torch.float64)
    whole = sample(network, sampler, videos.cond, own)
    assert rollout.x.shape == whole.shape
    for b in range(4):
        part = slice(2 * b, 2 * b + 2)
        same = (rollout.x[:, part] - whole[:, part]).abs().max() < 1e-12
        assert same == ((stop - b) % 3 == 2)


def test_gradient_reaches_every_chunk_through_its_own_step() -> None:
    """The loss of one chunk has a gradient through the call in which it stops, and through no other: the noise that a
    chunk starts from gets none."""
    network, videos = wan(), batch(FRAMES)
    for b in range(4):
        network.zero_grad()
        rollout = backward_simulation(network, rolling(POLICIES["window"]), videos, torch.ones(2, dtype=torch.int64))
        assert not rollout.steps[0].x_t.requires_grad, "an input that an earlier call made"
        rollout.x[:, 2 * b : 2 * b + 2].square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.network.blocks[0].ffn.parameters())
    with torch.no_grad():
        assert not backward_simulation(
            network, rolling(POLICIES["window"]), videos, torch.ones(2).long()
        ).x.requires_grad


def test_stops_that_differ_are_refused(network: WanDenoiser) -> None:
    sampler = rolling(POLICIES["window"])
    with pytest.raises(ValueError, match="stops: shared"):
        backward_simulation(network, sampler, batch(FRAMES), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="clean predictions"):
        backward_simulation(network, sampler, batch(FRAMES), torch.ones(2).long(), to=torch.full((2,), 0.5))


def test_a_call_of_half_a_chunk_is_refused(network: WanDenoiser) -> None:
    context = Context(rolling(ChunkSchedule(frames=2)).chunks)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the next chunk has 2 frames"):
        network(draws(3)("x"), torch.ones(2, dtype=torch.float64), conditioning(), Inputs(context=context))


def test_the_exact_law_rolls_to_itself() -> None:
    """The velocity of the joint law moves frames that are at different levels to that law, too: with many small steps,
    and as many frames in the making, videos of the exact denoiser have the law's variance and lag in every frame. The
    same in four large steps does not."""
    made, rows, frames = backbone(copies=1), 2000, 4
    rho, cond = made.law.rhos[0], Conditioning({"label": torch.zeros(rows, dtype=torch.int64)})
    errors = {}
    for steps in (4, 48):
        levels = tuple(1 - i / steps for i in range(steps))
        chunks = ChunkSchedule(frames=1, window=3, order="rolling")
        sampler = RolloutPolicy(levels, transition="ode", chunks=chunks)
        noise = Draws(torch.arange(rows), (frames, 2, 1, 1), "k")
        video = to_complex(sample(made.load("teacher"), sampler, cond, noise)).squeeze(-1) - 0.3
        variance = video.abs().square().mean(0) / 2  # of both channels
        lag = (video[:, 1:] * video[:, :-1].conj()).mean(0) / (2 * variance[:-1])
        errors[steps] = max(float((variance - 1).abs().max()), float((lag - rho).abs().max()))
    print(errors)
    assert errors[48] < 0.1 < 0.4 < errors[4]


def test_a_whole_update_and_its_stream(tmp_path: Any) -> None:
    """DMD2 trains such a student, and its export streams and is continued to the same bits."""
    from fastgen.pipelines.streaming import StreamingWanPipeline

    rollout = {"timesteps": [1.0, 0.6], "chunks": {"frames": 1, "window": 2, "order": "rolling"}}
    folder = tiny_wan(tmp_path / "wan", layers=2)
    run = train(recipe(folder, tmp_path / "run", {"name": "dmd2", "fake_updates": 1}, rollout=rollout))
    pipeline = StreamingWanPipeline.from_pretrained(run / "export")
    stream = pipeline.stream("a cat", seed=3)
    whole = [next(stream) for _ in range(4)]
    stream = pipeline.stream("a cat", seed=3)
    for _ in range(2):
        next(stream)
    state = stream.state_dict()
    assert "making.0" in state
    other = pipeline.stream("a dog", seed=0)
    other.load_state_dict(state)
    assert torch.equal(next(other), whole[2]) and torch.equal(next(other), whole[3])


@pytest.mark.parametrize(
    "options", [{"first_timesteps": (1.0, 0.5)}, {"replay": True}], ids=["first timesteps", "replay"]
)
def test_schedules_that_cannot_roll(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="order: rolling"):
        ChunkSchedule(frames=1, order="rolling", **options)


@pytest.mark.parametrize(
    "objective",
    [{"name": "dmd2", "stops": "per_sample"}, {"name": "dmd2", "condition_on_stop": True}, {"name": "rtdmd"}, ASD],
    ids=["stops per sample", "condition on stop", "rtdmd", "asd"],
)
def test_objectives_that_need_one_step_for_all_chunks_are_refused(objective: dict[str, Any], tmp_path: Any) -> None:
    rollout = {"timesteps": [1.0, 0.6], "chunks": {"frames": 1, "order": "rolling"}}
    with pytest.raises(RecipeError, match="stop at different steps"):
        recipe(tiny_wan(tmp_path / "wan"), tmp_path / "run", objective, rollout=rollout)


def test_experts_of_a_well_known_pipeline_do_not_roll() -> None:
    """Its configs ship with fastgen, so that this is known before anything is downloaded."""
    config = WanConfig(path="Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    config.check_chunks(policy(ChunkSchedule(frames=3)))
    with pytest.raises(ValueError, match="experts have a level each"):
        config.check_chunks(rolling(ChunkSchedule(frames=3)))
    with pytest.raises(ValueError, match="nearest lengths are 20 or 24"):
        config.check_chunks(policy(ChunkSchedule(frames=4)))
