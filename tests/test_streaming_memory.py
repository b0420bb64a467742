"""What a context keeps of frames that left the window, and in how many bits."""

import dataclasses
import functools
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from test_streaming import POLICIES, conditioning, draws, forced, network, policy, wan
from test_streaming_training import recipe
from tiny_wan import tiny_wan
from torch import Tensor

from fastgen.backbones.wan import WanDenoiser
from fastgen.denoiser import Inputs
from fastgen.pipelines.streaming import StreamingWanPipeline
from fastgen.registry import RecipeError
from fastgen.rollout import sample_chunks
from fastgen.sampling.sampler import load_sampler
from fastgen.streaming.context import Context
from fastgen.streaming.linear_state import linear_attention, linear_state
from fastgen.streaming.memory_file import MEMORY
from fastgen.streaming.precision import pack, unpack
from fastgen.streaming.schedule import ChunkSchedule
from fastgen.train import train

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


@pytest.mark.parametrize(
    "chunks",
    [
        ChunkSchedule(frames=3, window=6, sink=1),
        ChunkSchedule(frames=1, first=5, window=6, sink=1),
        ChunkSchedule(frames=3, window=8, sink=1, slow=2),
        ChunkSchedule(frames=3, window=7, recall=2, archive=4),
        ChunkSchedule(frames=3, window=5, sink=1, linear=True),
    ],
    ids=["sink", "first chunk", "slow memory", "recall", "linear memory"],
)
def test_a_context_holds_no_memory_of_frames_that_are_gone(chunks: ChunkSchedule) -> None:
    """Of a chunk that left in part, the rest is held alone, and its size is what `nbytes` says."""
    context = Context(chunks)
    for _ in range(6):
        keys = torch.randn(1, 2 * len(context.chunk), 1, 4)
        context = context.committed([(keys, keys)])
    tensors = [x for block in context.stored for x in (block.keys, block.values)] + [*(context.absorbed or ())]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    assert sum(storages.values()) == context.nbytes


def test_a_schedule_whose_past_is_gone_refuses_to_compute_it_again() -> None:
    for name in ("EMA sink", "slow memory", "linear memory"):
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


@pytest.mark.parametrize(("dtype", "cache_dtype"), [(torch.float32, "int8"), (torch.bfloat16, None)])
def test_an_averaged_sink_is_not_rounded(dtype: torch.dtype, cache_dtype: Literal["int8"] | None) -> None:
    """With a decay near 1, every step is smaller than half of what 8 or 16 bits can tell apart: the sink would never
    move. It is kept in float32, also in a file, and layers read it in the dtype of the other frames."""
    chunks = ChunkSchedule(frames=1, window=3, sink=1, sink_decay=0.999, cache_dtype=cache_dtype)
    context = Context(chunks)
    for value in [1.0] + 400 * [2.0]:
        keys = torch.full((1, 1, 1, 4), value, dtype=dtype)
        context = context.committed([(keys, keys)])
    for stored in (context, Context.load(chunks, context.state_dict())):
        sink = stored.blocks[0].keys
        assert sink.dtype == torch.float32
        torch.testing.assert_close(sink, torch.full_like(sink, 2 - 0.999**399), rtol=1e-4, atol=0)
        assert [x.dtype for x in stored.past(0) or ()] == [dtype, dtype]


# --- the linear memory


def test_a_new_linear_memory_changes_nothing() -> None:
    network, plain = wan(linear=True).requires_grad_(False), ChunkSchedule(frames=2, window=5, sink=1)
    network.add_linear_memory()  # zeros again
    pairs = zip(outputs(network, POLICIES["linear memory"]), outputs(network, plain), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_it_adds_is_linear_attention_over_all_frames_that_are_gone() -> None:
    """One layer, whose keys depend on their own frame alone. What the memory adds to the attention of a late chunk is
    that of the keys and values of every frame between the sink and the window, in whatever order they left."""
    network, chunks = wan(layers=1, linear=True).requires_grad_(False), POLICIES["linear memory"]
    frames, t = 14, torch.tensor([0.9, 0.3], dtype=torch.float64)
    clean, cond = draws(frames)("clean"), conditioning()
    context, every = Context(chunks), Context(ChunkSchedule(frames=2))
    for part in chunks.split(frames):
        own = clean[:, part.start : part.stop]
        context, every = (network.commit(own, 0 * t, cond, c) for c in (context, every))
    gone = chunks.gone(context.chunk)
    assert gone == range(1, 12) and context.absorbed is not None
    keys, values = every.past(0) or (torch.empty(0), torch.empty(0))
    rows = slice(*(keys.shape[1] // frames * edge for edge in (gone.start, gone.stop)))
    expected = linear_state(keys[:, rows].flip(1), values[:, rows].flip(1))
    for mine, theirs in zip(context.absorbed, expected, strict=True):
        assert (mine[0] - theirs).abs().max() < 1e-12 * theirs.abs().max()

    seen: dict[str, Tensor] = {}
    branch, attn = network.network.memory[0], network.network.blocks[0].attn1
    branch.register_forward_hook(lambda _, given, out: seen.update(query=given[0], added=out))
    attn.to_out[0].register_forward_pre_hook(lambda _, given: seen.update(out=given[0]))
    network(draws(2)("x"), t, cond, Inputs(context=context))
    with_memory = seen["out"]
    network(draws(2)("x"), t, cond, Inputs(context=dataclasses.replace(context, absorbed=None)))
    added = branch.project(linear_attention(seen["query"], expected))
    assert (seen["added"] - added).abs().max() < 1e-12
    assert (with_memory - seen["out"] - added.flatten(2)).abs().max() < 1e-9 < added.abs().max()


def test_a_linear_memory_sums_what_8_bits_keep(network: WanDenoiser) -> None:
    """The sums of what is kept in 8 bits are float32, whatever the network computes in."""
    plain = POLICIES["linear memory"]
    pairs = zip(outputs(network, plain), outputs(network, dataclasses.replace(plain, cache_dtype="int8")), strict=True)
    error = max((a - b).abs().max() / a.abs().max() for a, b in pairs)
    print(f"largest relative error of a prediction: {error:.1e}")
    assert 1e-9 < error < 0.05


def test_a_stored_context_without_its_sums_is_refused(network: WanDenoiser) -> None:
    clips = sample_chunks(network, policy(POLICIES["linear memory"]), conditioning(), draws(1))
    state = [next(clips).context.state_dict() for _ in range(5)][-1]
    assert Context.load(POLICIES["linear memory"], state).absorbed is not None
    for name in ("products", "keys"):
        del state[f"absorbed.{name}"]
    with pytest.raises(ValueError, match="saved with another"):
        Context.load(POLICIES["linear memory"], state)


def test_a_network_without_memory_says_so() -> None:
    network = wan()
    with pytest.raises(ValueError, match="no linear memory"):
        network(
            draws(2)("x"), torch.ones(2).double(), conditioning(), Inputs(context=Context(POLICIES["linear memory"]))
        )


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dmd2", "phased_dmd"])
def test_training_and_export_of_a_linear_memory(objective: str, tmp_path: Path) -> None:
    """A dense student first, then one with a memory that starts from it (Hybrid Forcing's two stages). Its weights are
    trained, the export has them, the pipeline gives the sampler's video, and a folder without them is refused."""
    folder, section = tiny_wan(tmp_path / "wan", layers=2), {"name": objective, "fake_updates": 1}
    settings = {"batch_size": 2, "num_samples": 2, "sample_every": 0, "checkpoint_every": 1}
    if objective == "phased_dmd":
        section["phases"] = [{"first": 0, "last": 1, "updates": 1}, {"first": 1, "last": 2, "updates": 1}]
    made = functools.partial(recipe, folder, objective=section)
    dense = made(tmp_path / "dense", train=settings | {"steps": 2})
    start = train(dense)
    rollout = {"timesteps": [1.0, 0.6], "chunks": {"frames": 1, "window": 2, "linear": True}}
    run = train(made(tmp_path / "hybrid", rollout=rollout, init_from=str(start), train=settings | {"steps": 2}))
    weights = load_file(run / "export" / MEMORY)
    experts = 2 if objective == "phased_dmd" else 1
    assert len(weights) == 2 * experts and all(w.abs().max() > 0 for w in weights.values())
    pipeline = StreamingWanPipeline.from_pretrained(run / "export")
    sampler = load_sampler(run / "export")
    latents = sampler.latents(["a cat"], [4])
    mine = pipeline("a cat", seed=4, output_type="latent").frames.transpose(1, 2)
    assert (mine - latents).abs().max() < 1e-5
    (run / "export" / MEMORY).unlink()
    with pytest.raises(ValueError, match=r"was trained with rollout\.chunks\.linear"):
        StreamingWanPipeline.from_pretrained(run / "export")


def test_an_adapter_has_no_linear_memory(tmp_path: Path) -> None:
    rollout = {"timesteps": [1.0], "chunks": {"frames": 1, "window": 2, "linear": True}}
    with pytest.raises(RecipeError, match="no adapter has"):
        recipe(
            tiny_wan(tmp_path / "wan"),
            tmp_path / "run",
            {"name": "dmd2"},
            rollout=rollout,
            lora={"student": {"rank": 2}, "fake_score": {"rank": 2}},
        )
