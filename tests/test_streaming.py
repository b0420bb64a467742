"""The streaming engine on tiny real Wan networks in float64: schedules, contexts, causality, draws, gradients."""

import dataclasses
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_wan import CHANNELS, TEXT_WIDTH, transformer
from torch import Tensor

from fastgen.backbones.wan import WanDenoiser
from fastgen.batch import Batch, Conditioning, Draws
from fastgen.denoiser import Denoiser, Inputs
from fastgen.rollout import RolloutPolicy, backward_simulation, commit, sample, sample_chunks
from fastgen.streaming.causal_wan import rotation
from fastgen.streaming.compiled import compile_blocks
from fastgen.streaming.context import Context
from fastgen.streaming.schedule import ChunkSchedule

SHAPE = (CHANNELS, 4, 4)
POLICIES = {
    "whole past": ChunkSchedule(frames=2),
    "first chunk of one": ChunkSchedule(frames=2, first=1),
    "window": ChunkSchedule(frames=2, window=4),
    "window that cuts chunks": ChunkSchedule(frames=2, first=1, window=5),
    "sink": ChunkSchedule(frames=2, window=5, sink=1),
    "sink, absolute": ChunkSchedule(frames=2, window=6, sink=2, positions="absolute"),
    "EMA sink": ChunkSchedule(frames=2, window=6, sink=2, sink_decay=0.5),
    "context noise": ChunkSchedule(frames=2, window=4, context_noise=0.1),
    "slow memory": ChunkSchedule(frames=2, window=6, sink=1, slow=2, slow_similarity=0.2),
    "8 bits": ChunkSchedule(frames=2, window=4, cache_dtype="int8"),
    "linear memory": ChunkSchedule(frames=2, window=5, sink=1, linear=True),
}


def wan(layers: int = 2, seed: int = 0, linear: bool = False) -> WanDenoiser:
    """linear: with a linear memory that is not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        denoiser = WanDenoiser(transformer(layers, 1e-3).double())
        if linear:
            denoiser.add_linear_memory()
            for branch in denoiser.network.memory:
                torch.nn.init.normal_(branch.project.weight)
        return denoiser


@pytest.fixture(scope="module")
def network() -> WanDenoiser:
    return wan(linear=True).requires_grad_(False)


def conditioning(rows: int = 2, seed: int = 0) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    return Conditioning({"prompt_embeds": torch.randn(rows, 6, TEXT_WIDTH, generator=generator, dtype=torch.float64)})


def draws(frames: int, rows: int = 2, key: str = "k") -> Draws:
    return Draws(torch.arange(rows), (frames, *SHAPE), key, torch.float64)


def batch(frames: int, rows: int = 2) -> Batch:
    ids = torch.arange(rows)
    return Batch(ids, 3, conditioning(rows), conditioning(rows, 1), (frames, *SHAPE), dtype=torch.float64)


def policy(chunks: ChunkSchedule, *timesteps: float, **options: Any) -> RolloutPolicy:
    return RolloutPolicy(timesteps or (1.0, 0.6), chunks=chunks, **options)


def forced(network: Denoiser, chunks: ChunkSchedule, x: Tensor, t: Tensor, clean: Tensor) -> Iterator[Tensor]:
    """The chunks' predictions, each given the clean frames before it."""
    cond, context = conditioning(len(x)), Context(chunks)
    for frames in chunks.split(x.shape[1]):
        part = slice(frames.start, frames.stop)
        yield network(x[:, part], t, cond, Inputs(context=context))
        level = torch.full_like(t, chunks.context_noise)
        context = network.commit(clean[:, part], level, cond, context)


# --- the schedule


def test_chunks_and_what_they_see() -> None:
    chunks = ChunkSchedule(frames=3, first=1, window=9, sink=3)
    assert chunks.split(10) == (range(1), range(1, 4), range(4, 7), range(7, 10))
    assert [chunks.past(c) for c in chunks.split(16)[3:]] == [
        (range(3), range(4, 7)),
        (range(3), range(7, 10)),
        (range(3), range(10, 13)),
    ]
    assert chunks.positions_of(range(13, 16)) == ((range(3), range(3, 6)), range(6, 9))
    absolute = dataclasses.replace(chunks, positions="absolute")
    assert absolute.positions_of(range(13, 16)) == ((range(3), range(10, 13)), range(13, 16))
    assert ChunkSchedule(frames=3).past(range(6, 9)) == (range(6),)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"frames": 3, "window": 5, "sink": 3}, "set window to at least 6"),
        (
            {"frames": 3, "window": 7, "sink": 3, "slow": 2},
            "a slow memory of 2 and a chunk of 3; set window to at least 8",
        ),
        ({"frames": 3, "slow": 2}, "give a window"),
        ({"frames": 3, "linear": True}, "give a window"),
        ({"frames": 3, "window": 9, "slow": 3, "linear": True}, "one place to go"),
        ({"frames": 3, "sink": 3, "window": 12, "slow": 3, "sink_decay": 0.9}, "leave out sink_decay"),
        ({"frames": 3, "window": 9, "slow": 3, "positions": "absolute"}, "positions: absolute"),
        ({"frames": 3, "sink": 3, "sink_decay": 0.9}, "give a window"),
        ({"frames": 3, "sink": 2, "window": 9, "sink_decay": 0.9}, "sink = frames = first"),
        ({"frames": 3, "sink": 3, "window": 10, "sink_decay": 0.9}, "multiple"),
        ({"attention": {"layout": "top_k"}}, "needs a density"),
        ({"frames": 0}, "greater than or equal to 1"),
        ({"frame": 3}, "[Uu]nexpected"),
    ],
)
def test_schedules_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ChunkSchedule(**options)


def test_a_length_that_is_no_number_of_chunks_names_its_neighbours() -> None:
    with pytest.raises(ValueError, match=r"8 latent frames .* nearest lengths are 7 or 10"):
        ChunkSchedule(frames=3, first=1).split(8)
    with pytest.raises(ValueError, match=r"nearest lengths are 3$"):
        ChunkSchedule(frames=3).split(2)


# --- cached chunks against masks over whole videos


@pytest.mark.parametrize("name", POLICIES)
def test_cached_chunks_equal_the_teacher_forcing_mask(name: str, network: WanDenoiser) -> None:
    """For schedules that no mask can express, the mask refuses, and the test after next has their reference."""
    chunks = POLICIES[name]
    frames = chunks.split(7 if chunks.first else 8)[-1].stop
    x, clean, t = draws(frames)("x"), draws(frames)("clean"), torch.tensor([0.9, 0.3], dtype=torch.float64)
    inputs = Inputs(causal=chunks, clean=clean)
    if chunks.cache_dtype or chunks.linear or (chunks.sink + chunks.slow and chunks.positions == "relative"):
        with pytest.raises(ValueError, match="go chunk by chunk"):
            network(x, t, conditioning(), inputs)
        return
    packed = network(x, t, conditioning(), inputs)
    cached = torch.cat(list(forced(network, chunks, x, t, clean)), dim=1)
    error = (packed - cached).abs().max().item()
    print(f"{name}: {error:.1e}")
    assert error <= 1e-6


def test_one_chunk_without_a_past_is_the_stock_network(network: WanDenoiser) -> None:
    x, t = draws(4)("x"), torch.tensor([0.9, 0.3], dtype=torch.float64)
    stock = network(x, t, conditioning())
    causal = network(x, t, conditioning(), Inputs(context=Context(ChunkSchedule(frames=4))))
    assert (stock - causal).abs().max() < 1e-6
    assert (stock - network(x, t[:, None].expand(-1, 4), conditioning())).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["sink", "EMA sink"])
def test_a_sink_that_moves_equals_a_gathered_video(name: str, network: WanDenoiser) -> None:
    """One layer, whose keys depend on its own frame alone: attention over the sink's frames and the window's, as one
    short video. EMA: by linearity the averaged keys are those of the reference's average."""
    chunks = POLICIES[name]
    one = wan(layers=1).requires_grad_(False)
    frames = 8 if chunks.first is None else 9
    x, clean, t = draws(frames)("x"), draws(frames)("clean"), torch.tensor([0.9, 0.3], dtype=torch.float64)
    outputs = list(forced(one, chunks, x, t, clean))
    last = chunks.split(frames)[-1]
    seen = [frame for part in chunks.past(last) for frame in part]
    short = ChunkSchedule(frames=len(last), first=len(seen))
    context = one.commit(clean[:, seen], torch.zeros_like(t), conditioning(), Context(short))
    if chunks.sink_decay is not None:  # frames 0, 1 are averaged with 2, 3: the window has held 4, 5
        gone = one.commit(clean[:, 2:4], torch.zeros_like(t), conditioning(), Context(ChunkSchedule(frames=2)))
        block = context.blocks[0]
        size = block.keys.shape[2] // len(seen) * 2
        keys, values = block.keys.clone(), block.values.clone()
        keys[:, :, :size] = 0.5 * (keys[:, :, :size] + gone.blocks[0].keys)
        values[:, :, :size] = 0.5 * (values[:, :, :size] + gone.blocks[0].values)
        context = dataclasses.replace(context, blocks=(block._replace(keys=keys, values=values),))
    reference = one(x[:, last.start : last.stop], t, conditioning(), Inputs(context=context))
    assert (outputs[-1] - reference).abs().max() < 1e-6


def test_relative_positions_equal_absolute_ones_until_the_sink_moves(network: WanDenoiser) -> None:
    x, clean, t = draws(10)("x"), draws(10)("clean"), torch.tensor([0.9, 0.3], dtype=torch.float64)

    def outputs(**options: Any) -> list[Tensor]:
        return list(forced(network, ChunkSchedule(frames=2, window=6, **options), x, t, clean))

    without = zip(outputs(), outputs(positions="absolute"), strict=True)
    assert max((a - b).abs().max().item() for a, b in without) < 1e-6
    differ = [
        (a - b).abs().max().item() for a, b in zip(outputs(sink=2), outputs(sink=2, positions="absolute"), strict=True)
    ]
    assert max(differ[:3]) < 1e-6 < 1e-3 < min(differ[3:])


def test_frame_100_000_is_as_frame_30(network: WanDenoiser) -> None:
    """No table ends: the same window gives the same prediction at any frame, to the bit."""
    chunks = ChunkSchedule(frames=2, window=6, sink=2)
    x, t = draws(2)("x"), torch.tensor([0.9, 0.3], dtype=torch.float64)
    context = Context(chunks)
    for i in range(15):
        context = network.commit(draws(2)(f"{i}"), torch.zeros_like(t), conditioning(), context)
    assert context.frames == 30
    window = tuple(b._replace(frames=range(b.frames.start + 10**5, b.frames.stop + 10**5)) for b in context.blocks[1:])
    far = dataclasses.replace(context, blocks=(context.blocks[0], *window), frames=10**5 + 30)
    near = network(x, t, conditioning(), Inputs(context=context))
    assert torch.equal(near, network(x, t, conditioning(), Inputs(context=far)))


def test_absolute_positions_at_frame_100_000(network: WanDenoiser) -> None:
    """Angles are exact there, and without a sink the prediction is that of frame 30, up to float32 rotations."""
    angles = torch.arange(10**5, 10**5 + 2, dtype=torch.float64)[:, None] / 10000 ** torch.tensor([0.0, 0.5])
    cos, sin = rotation((range(10**5, 10**5 + 2),), (1, 1), (4, 2, 2), torch.device("cpu"))
    assert torch.equal(cos[0, :, 0, :2], angles.cos().float()) and torch.equal(sin[0, :, 0, :2], angles.sin().float())
    chunks = ChunkSchedule(frames=2, window=6, positions="absolute")
    x, t = draws(2)("x"), torch.tensor([0.9, 0.3], dtype=torch.float64)
    context = Context(chunks)
    for i in range(15):
        context = network.commit(draws(2)(f"{i}"), torch.zeros_like(t), conditioning(), context)
    blocks = tuple(b._replace(frames=range(b.frames.start + 10**5, b.frames.stop + 10**5)) for b in context.blocks)
    far = dataclasses.replace(context, blocks=blocks, frames=10**5 + 30)
    near = network(x, t, conditioning(), Inputs(context=context))
    error = (near - network(x, t, conditioning(), Inputs(context=far))).abs().max().item()
    print(f"{error:.1e}")
    assert error < 1e-5


@pytest.mark.slow
def test_a_long_stream_with_absolute_positions_keeps_no_old_rotations(network: WanDenoiser) -> None:
    """Every chunk has positions of its own there. What stays in memory is what four chunks need."""

    def held(positions: Any) -> int:
        """Bytes of all tensors after 20 chunks."""
        rotation.cache_clear()
        chunks = ChunkSchedule(frames=2, window=8, sink=2, positions=positions)
        clips = sample_chunks(network, policy(chunks, 1.0), conditioning(), draws(1))
        kept = [next(clips) for _ in range(20)][-1:]
        gc.collect()
        assert kept
        return sum(t.numel() * t.element_size() for t in gc.get_objects() if issubclass(type(t), Tensor))

    relative, absolute = held("relative"), held("absolute")
    cos, _ = rotation((range(8),), (2, 2), (4, 4, 4), torch.device("cpu"))  # of a whole window
    one = 2 * cos.numel() * cos.element_size()
    print(f"absolute positions hold {absolute - relative} bytes more than relative ones; a window takes {one}")
    assert absolute - relative <= 4 * one


# --- contexts


@pytest.mark.parametrize(("decay", "same_as"), [(1.0, {"sink": 2}), (0.0, {})])
def test_ends_of_the_ema_sink(decay: float, same_as: dict[str, int], network: WanDenoiser) -> None:
    """1 is a frozen sink, 0 is a plain window of the same size, to the bit."""
    ema = ChunkSchedule(frames=2, window=6, sink=2, sink_decay=decay)
    plain = ChunkSchedule(frames=2, window=6, **same_as)
    x, clean, t = draws(12)("x"), draws(12)("clean"), torch.tensor([0.9, 0.3], dtype=torch.float64)
    pairs = zip(forced(network, ema, x, t, clean), forced(network, plain, x, t, clean), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("window", [4, 6])
def test_two_evictions_of_the_ema_sink(window: int) -> None:
    """A decay of 1/2 gives the first chunk and the first evicted a quarter each, and the second evicted a half."""
    context = Context(ChunkSchedule(frames=2, window=window, sink=2, sink_decay=0.5))
    chunks = [torch.randn(1, 2, 1, 4, dtype=torch.float64) for _ in range(window // 2 + 2)]
    for chunk in chunks[: window // 2 + 1]:
        context = context.committed([(chunk, 2 * chunk)])
    expected = chunks[0] / 4 + chunks[1] / 4 + chunks[2] / 2
    assert torch.equal(context.blocks[0].keys[0], expected)
    assert torch.equal(context.blocks[0].values[0], 2 * expected)


def test_no_forward_changes_a_context(network: WanDenoiser) -> None:
    chunks = POLICIES["EMA sink"]
    clean, t = draws(8)("clean"), torch.tensor([0.9, 0.3], dtype=torch.float64)
    context = Context(chunks)
    for frames in chunks.split(8):
        context = network.commit(clean[:, frames.start : frames.stop], 0 * t, conditioning(), context)
    before = [(b.keys.clone(), b.values.clone()) for b in context.blocks]
    outputs = [network(draws(2)("x"), t, conditioning(), Inputs(context=context)) for _ in range(3)]
    network.commit(draws(2)("other"), 0 * t, conditioning(), context)
    for block, (keys, values) in zip(context.blocks, before, strict=True):
        assert torch.equal(block.keys, keys) and torch.equal(block.values, values)
        assert not block.keys.requires_grad
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("name", POLICIES)
def test_a_stored_context_continues_to_the_same_bits(name: str, network: WanDenoiser) -> None:
    chunks = POLICIES[name]
    sampler = policy(chunks)
    clips = sample_chunks(network, sampler, conditioning(), draws(1))
    whole = [next(clips).x0 for _ in range(7)]
    middle = None
    for i, chunk in enumerate(sample_chunks(network, sampler, conditioning(), draws(1))):
        if i == 4:
            middle = chunk
            break
    assert middle is not None
    state = {name: tensor.clone() for name, tensor in middle.context.state_dict().items()}
    context = Context.load(chunks, state)
    rest = sample_chunks(network, sampler, conditioning(), draws(1), context)
    assert all(torch.equal(next(rest).x0, x) for x in whole[4:])
    with pytest.raises(ValueError, match=r"saved with another|missing"):
        Context.load(ChunkSchedule(frames=5), {**state, "frames": torch.tensor(11)})


def test_memory_stays_flat(network: WanDenoiser) -> None:
    clips = sample_chunks(network, policy(POLICIES["sink"], 1.0), conditioning(), draws(1))
    sizes = [next(clips).context.nbytes for _ in range(40)]
    assert sizes[5] == sizes[-1] > 0


# --- draws


@pytest.mark.parametrize("name", ["whole past", "EMA sink", "context noise", "slow memory", "8 bits", "linear memory"])
def test_the_same_seed_gives_the_same_video(name: str, network: WanDenoiser) -> None:
    """Whole, streamed, and as the beginning of a longer video: the same bits, also in training."""
    chunks = POLICIES[name]
    sampler = policy(chunks)
    whole = sample(network, sampler, conditioning(), draws(8))
    streamed = sample_chunks(network, sampler, conditioning(), draws(1))
    assert torch.equal(torch.cat([next(streamed).x0 for _ in range(4)], dim=1), whole)
    longer = sample(network, sampler, conditioning(), draws(12))
    assert torch.equal(longer[:, :8], whole)
    trained = batch(8)
    stop = torch.full_like(trained.ids, 1)
    rollout = backward_simulation(network, sampler, trained, stop, grad=False)
    own = Draws(trained.ids, (8, *SHAPE), trained.key, torch.float64)
    assert torch.equal(rollout.x, sample(network, sampler, trained.cond, own))


def test_a_frame_is_drawn_alike_in_chunks_of_any_size() -> None:
    noise = draws(6)
    by_two = torch.cat([noise.chunk(range(i, i + 2))("initial") for i in (0, 2, 4)], dim=1)
    by_three = torch.cat([noise.chunk(range(i, i + 3))("initial") for i in (0, 3)], dim=1)
    assert torch.equal(by_two, by_three)
    assert not torch.equal(by_two[:, 0], by_two[:, 1])
    assert torch.equal(batch(6).chunk(range(2, 4)).normal("initial"), batch(8).chunk(range(2, 4)).normal("initial"))


# --- causality, on what trains


@pytest.mark.parametrize("form", ["teacher forcing", "diffusion forcing", "chunks"])
def test_no_chunk_of_the_loss_depends_on_a_later_one(form: str, network: WanDenoiser) -> None:
    """Neither the prediction of a chunk nor its gradient to the data changes with later noise or later data."""
    chunks = ChunkSchedule(frames=2)
    t = torch.tensor([0.9, 0.3], dtype=torch.float64)

    def outputs(x: Tensor, clean: Tensor) -> Tensor:
        if form == "chunks":
            return torch.cat(list(forced(network, chunks, x, t, clean)), dim=1)
        inputs = Inputs(causal=chunks, clean=clean if form == "teacher forcing" else None)
        return network(x, t, conditioning(), inputs)

    x, clean = draws(8)("x"), draws(8)("clean").requires_grad_(True)
    base = outputs(x, clean)
    for j in (1, 2, 3):
        first = 2 * j
        later_x, later_clean = x.clone(), clean.detach().clone()
        later_x[:, first:], later_clean[:, first:] = 5.0, -5.0
        changed = outputs(later_x, later_clean)
        assert torch.equal(changed[:, :first], base[:, :first])
        assert not torch.equal(changed[:, first:], base[:, first:])
    if form == "teacher forcing":
        (grad,) = torch.autograd.grad(base[:, :4].square().sum(), clean)
        assert grad[:, :2].abs().max() > 0 and grad[:, 2:].abs().max() == 0


@pytest.mark.parametrize("first_timesteps", [None, (1.0, 0.8, 0.5)])
def test_later_noise_moves_no_earlier_chunk_of_a_rollout(
    first_timesteps: tuple[float, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the rollout's frames before chunk j nor the gradient of their loss change with the noise of chunk j."""
    student = wan()
    sampler = policy(ChunkSchedule(frames=2, window=6, first_timesteps=first_timesteps))

    def run() -> tuple[Tensor, list[Tensor]]:
        part = batch(8)
        rollout = backward_simulation(student, sampler, part, torch.ones_like(part.ids))
        grads = torch.autograd.grad(rollout.x[:, :4].square().mean(), list(student.parameters()), allow_unused=True)
        return rollout.x.detach(), [g for g in grads if g is not None]

    x, grads = run()
    plain = Draws.__call__

    def noisy(self: Draws, name: str) -> Tensor:
        later = self.frames is not None and self.frames.start >= 4
        return plain(self, name) + (1.0 if later else 0.0)

    monkeypatch.setattr(Draws, "__call__", noisy)
    other, other_grads = run()
    assert torch.equal(x[:, :4], other[:, :4]) and not torch.equal(x[:, 4:], other[:, 4:])
    assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True))


# --- gradients


def gradients(student: WanDenoiser, sampler: RolloutPolicy, frames: int, to: float | None = None) -> list[Tensor]:
    part = batch(frames)
    stop = torch.ones_like(part.ids)
    level = None if to is None else torch.full((len(stop),), to, dtype=torch.float64)
    rollout = backward_simulation(student, sampler, part, stop, to=level)
    weight = draws(frames)("weight")
    return list(torch.autograd.grad((rollout.x * weight).sum(), list(student.parameters())))


@pytest.mark.parametrize("name", ["whole past", "EMA sink", "context noise", "slow memory", "8 bits", "linear memory"])
def test_replay_and_checkpointing_give_the_gradient_of_the_whole_graph(name: str) -> None:
    chunks = POLICIES[name]
    student = wan(linear=chunks.linear)
    whole = gradients(student, policy(chunks), 8, to=0.2)
    part = batch(8)
    replay = policy(dataclasses.replace(chunks, replay=True))
    rollout = backward_simulation(
        student, replay, part, torch.ones_like(part.ids), to=torch.full((2,), 0.2, dtype=torch.float64)
    )
    (rollout.x * draws(8)("weight")).sum().backward()
    for parameter, expected in zip(student.parameters(), whole, strict=True):
        assert parameter.grad is not None
        scale = expected.abs().max().clamp_min(1e-12)
        assert (parameter.grad - expected).abs().max() <= 1e-10 * scale
    student.enable_checkpointing()
    for a, b in zip(gradients(student, policy(chunks), 8, to=0.2), whole, strict=True):
        assert torch.equal(a, b)


def test_per_sample_stops_are_those_of_samples_alone(network: WanDenoiser) -> None:
    """A sample that has reached its stop leaves the batch, and its part of the context stays right."""
    sampler = policy(POLICIES["EMA sink"], 1.0, 0.7, 0.4)
    part = batch(8, rows=3)
    stop = torch.tensor([2, 0, 1])
    mixed = backward_simulation(network, sampler, part, stop, grad=False)
    for i in range(3):
        rows = slice(i, i + 1)
        alone = dataclasses.replace(
            part, ids=part.ids[rows], cond=part.cond.select(rows), uncond=part.uncond.select(rows)
        )
        single = backward_simulation(network, sampler, alone, stop[rows], grad=False)
        assert torch.allclose(single.x[0], mixed.x[i], atol=1e-6)


class Saved:
    """The most bytes that the graph holds at a time, of the tensors that autograd saves."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> Any:
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.most = max(self.most, self.now)

        class Held:
            value = tensor

            def __del__(held) -> None:
                self.now -= size

        return Held()


@pytest.mark.slow
def test_replay_holds_the_graph_of_one_chunk() -> None:
    def most(frames: int, replay: bool) -> int:
        student, saved = wan(), Saved()
        sampler = policy(ChunkSchedule(frames=1, window=3, replay=replay), 1.0)
        part = batch(frames)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.value):
            rollout = backward_simulation(student, sampler, part, torch.zeros_like(part.ids))
            rollout.x.square().sum().backward()
        gc.collect()
        return saved.most

    short, long, whole = most(7, True), most(28, True), most(28, False)
    print(f"graph of 7 chunks {short}, of 28 {long}; without replay {whole} bytes")
    assert long <= 1.15 * short
    assert whole > 5 * long


# --- prompts and refusals


def test_a_changed_prompt_leaves_earlier_chunks_alone(network: WanDenoiser) -> None:
    sampler, chunks = policy(POLICIES["sink"]), list[Tensor]()
    for i, chunk in enumerate(sample_chunks(network, sampler, conditioning(), draws(1))):
        chunks.append(chunk.x0)
        if i == 3:
            last = chunk
            break
    context = commit(network, sampler, [last.x0], conditioning(), draws(1).chunk(last.frames), last.context)
    same = next(sample_chunks(network, sampler, conditioning(), draws(1), context)).x0
    other = next(sample_chunks(network, sampler, conditioning(seed=9), draws(1), context)).x0
    assert not torch.equal(same, other)


def test_networks_without_chunks_refuse_them() -> None:
    from oracles import tiny_backbone

    student = tiny_backbone().load("student")
    with pytest.raises(ValueError, match="no causal network"):
        student(
            torch.zeros(2, 2),
            torch.ones(2),
            Conditioning({"label": torch.zeros(2, dtype=torch.int64)}),
            Inputs(context=Context(ChunkSchedule())),
        )


def test_a_chunk_of_another_length_is_refused(network: WanDenoiser) -> None:
    with pytest.raises(ValueError, match="the next chunk has 2 frames"):
        network(
            draws(3)("x"), torch.ones(2).double(), conditioning(), Inputs(context=Context(ChunkSchedule(frames=2)))
        )


def test_what_steps_compute_alike_is_computed_once(network: WanDenoiser) -> None:
    """A memoised context gives the same bits, keeps what each layer computed, and passes it to no other context."""
    chunks, t = POLICIES["sink"], torch.tensor([0.9, 0.3], dtype=torch.float64)
    context = Context(chunks)
    for frames in chunks.split(8):
        context = network.commit(draws(2).chunk(frames)("clean"), 0 * t, conditioning(), context)
    twin, x = context.memoised(), draws(2)("x")
    with torch.no_grad():
        outputs = [network(x, t, conditioning(), Inputs(context=c)) for c in (context, twin, twin)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert context.memo is None and twin.memo is not None and sorted(twin.memo) == [0, 1]
    kept = dict(twin.memo)
    with torch.no_grad():
        network(x, t, conditioning(), Inputs(context=twin))
    assert all(twin.memo[layer] is value for layer, value in kept.items())
    assert twin.select(slice(1)).memo is None and twin.layers(0, 2).memo is None
    assert network.commit(x, 0 * t, conditioning(), twin).memo is None
    fresh = context.memoised()
    with torch.enable_grad():
        network(x.requires_grad_(True), t, conditioning(), Inputs(context=fresh))
    assert fresh.memo == {}


@pytest.mark.slow
def test_compiled_blocks_give_the_same_video_and_compile_once() -> None:
    """Once for the first chunk, and once for chunks of another size; what is past does not matter."""
    student, chunks = wan().requires_grad_(False), ChunkSchedule(frames=2, first=1, window=6, sink=1)

    def video(length: int) -> Tensor:
        stream = sample_chunks(student, policy(chunks, 1.0), conditioning(1), draws(1, rows=1))
        return torch.cat([next(stream).x0 for _ in range(length)], dim=1)

    with torch.no_grad():
        expected = video(5)
        torch._dynamo.reset()
        compile_blocks(student.network, backend="eager", dynamic=False)
        assert torch.equal(video(3), expected[:, :5])
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(video(5), expected)
