"""What a context keeps of frames that left the window, and in how many bits."""

import dataclasses

import pytest
import torch
from test_streaming import POLICIES, SHAPE, conditioning, draws, forced, network, policy, wan
from torch import Tensor

from fastgen.backbones.wan import WanDenoiser
from fastgen.rollout import sample_chunks
from fastgen.streaming.context import Context
from fastgen.streaming.precision import pack, unpack
from fastgen.streaming.schedule import ChunkSchedule

__all__ = ["network"]  # the fixture


def outputs(network: WanDenoiser, chunks: ChunkSchedule, frames: int = 14) -> list[Tensor]:
    t = torch.tensor([0.9, 0.3], dtype=torch.float64)
    return list(forced(network, chunks, draws(frames)("x"), t, draws(frames)("clean")))


# --- the slow memory


@pytest.mark.parametrize(("similarity", "same_as"), [(-1.0, {"sink": 4}), (1.0, {"sink": 1})])
def test_ends_of_the_slow_memory(similarity: float, same_as: dict[str, int], network: WanDenoiser) -> None:
    """-1 takes no frame after the first ones, which is a longer sink; 1 takes every frame, which is a plain window of
    the same size. Both to the bit."""
    slow = ChunkSchedule(frames=2, window=9, sink=1, slow=3, slow_similarity=similarity)
    plain = ChunkSchedule(frames=2, window=9, **same_as)
    pairs = zip(outputs(network, slow), outputs(network, plain), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("frames", "first"), [(1, None), (2, 1), (3, None), (3, 2)])
def test_the_slow_memory_of_each_sample_holds_what_was_new_to_it(frames: int, first: int | None) -> None:
    """Keys are unit vectors that tell which scene a frame belongs to. Sample 0 changes the scene with every frame,
    sample 1 with every third one, sample 2 never."""
    chunks = ChunkSchedule(frames=frames, first=first, window=2 + 3 + frames, sink=2, slow=3, slow_similarity=0.5)
    context, number = Context(chunks), chunks.split(chunks.chunk_at(0).stop + 5 * frames)[-1].stop
    scenes = torch.tensor([[frame, frame // 3, 0] for frame in range(number)])
    keys = torch.nn.functional.one_hot(scenes, number).double()[None]  # [layers, frames, samples, D]
    values = torch.arange(number, dtype=torch.float64)[None, :, None, None].expand_as(keys)
    while context.frames < number:
        own = slice(context.chunk.start, context.chunk.stop)
        rows = [part[:, own].movedim(1, 2)[:, :, :, None] for part in (keys, values)]
        context = context.committed([(rows[0][0], rows[1][0])])
    _, seen = context.past(0) or (None, torch.empty(0))
    left = range(2, context.chunk.stop - frames)  # after the sink: a window of `frames` holds the next chunk alone
    assert context.chunk.start == number == left.stop
    for sample in range(3):
        memory = list(left[:3])
        for frame in left[3:]:
            if scenes[frame, sample] != scenes[memory[-1], sample]:
                memory = [*memory[1:], frame]
        assert seen[sample, :, 0, 0].tolist() == [0, 1, *memory]


def test_the_slow_memory_decides_for_all_layers_together() -> None:
    """New in one of two layers is a mean cosine of one half."""
    for similarity, expected in ((0.4, [0.0, 1.0]), (0.6, [1.0, 2.0])):
        chunks = ChunkSchedule(frames=1, window=3, slow=2, slow_similarity=similarity)
        context = Context(chunks)
        for frame in range(3):
            same = torch.eye(3, dtype=torch.float64)[0].view(1, 1, 1, 3)
            other = torch.eye(3, dtype=torch.float64)[frame].view(1, 1, 1, 3)
            value = torch.full_like(same, frame)
            context = context.committed([(same, value), (other, value)])
        _, seen = context.past(0) or (None, torch.empty(0))
        assert seen[0, :, 0, 0].tolist() == expected


def test_a_schedule_whose_past_is_gone_refuses_to_compute_it_again() -> None:
    for name in ("EMA sink", "slow memory"):
        with pytest.raises(ValueError, match="without recache"):
            POLICIES[name].check_recache()
    POLICIES["sink"].check_recache()


# --- 8 bits


def test_8_bits_are_off_by_half_a_scale_at_most() -> None:
    x = torch.randn(2, 3, 5, 4, 16) * torch.logspace(-6, 3, 5).view(1, 1, 5, 1, 1)
    x[0, 0, 0] = 0
    packed = pack(x)
    assert packed.dtype == torch.int8 and packed.shape == (2, 3, 5, 4, 20)
    scale = x.abs().amax(-1, keepdim=True) / 127
    assert ((unpack(packed) - x).abs() <= scale / 2 * (1 + 1e-5)).all()
    assert torch.equal(unpack(packed[:, 1:, 2:4]), unpack(packed)[:, 1:, 2:4])
    assert torch.equal(unpack(pack(unpack(packed))), unpack(packed)), "packing again changes nothing"
    assert unpack(x) is x


def test_training_sees_the_values_that_sampling_sees_and_gradient_passes() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    seen = pack(x)
    assert torch.equal(seen, unpack(pack(x.detach())))
    (slope,) = torch.autograd.grad(seen.square().sum(), x)
    assert torch.equal(slope, 2 * seen.detach())


def test_a_context_in_8_bits_takes_an_eighth_of_float64(network: WanDenoiser) -> None:
    whole, small = POLICIES["window"], POLICIES["8 bits"]
    full, short = outputs(network, whole), outputs(network, small)
    error = max((a - b).abs().max() / a.abs().max() for a, b in zip(full, short, strict=True))
    print(f"largest relative error of a prediction: {error:.1e}")
    assert torch.equal(full[0], short[0]) and 1e-9 < error < 0.02
    sizes = []
    for chunks in (whole, small):
        clips = sample_chunks(network, policy(chunks), conditioning(), draws(1))
        sizes.append([next(clips).context.nbytes for _ in range(4)][-1])
    head = wan().network.config.attention_head_dim
    assert sizes[1] * 8 * head == sizes[0] * (head + 4)


def test_an_averaged_sink_is_not_rounded() -> None:
    """With a decay near 1, every step is smaller than half a scale: 8 bits would never move."""
    chunks = ChunkSchedule(frames=1, window=2, sink=1, sink_decay=0.999, cache_dtype="int8")
    context = Context(chunks)
    for value in [1.0] + 400 * [2.0]:
        keys = torch.full((1, 1, 1, 4), value)
        context = context.committed([(keys, keys)])
    sink = context.blocks[0].keys
    assert sink.dtype == torch.float32
    torch.testing.assert_close(sink, torch.full_like(sink, 2 - 0.999**400), rtol=1e-4, atol=0)


def test_shapes_of_the_latents_are_what_the_tests_assume() -> None:
    assert draws(2)("x").shape == (2, 2, *SHAPE)
    assert dataclasses.replace(POLICIES["8 bits"], cache_dtype=None) == POLICIES["window"]
