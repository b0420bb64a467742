"""Actions that move the view of a video, and frames that are fetched by where they were seen from."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from test_streaming import batch, conditioning, draws, policy, wan
from test_streaming_training import recipe
from test_teacher_forcing import TURN, videos
from tiny_wan import tiny_wan
from torch import Tensor

from fastgen.backbones.wan import WanConfig, WanDenoiser
from fastgen.batch import Conditioning, Draws
from fastgen.config.stored import to_dict
from fastgen.data.digit_views import SLOTS, camera, draw, prompt_for, render
from fastgen.denoiser import NO_INPUTS, Inputs
from fastgen.networks import Networks
from fastgen.objectives import TeacherForcing
from fastgen.pipelines.streaming import StreamingWanPipeline
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy, backward_simulation, sample, sample_chunks
from fastgen.sampling.sampler import METADATA
from fastgen.sampling.stream import StreamRequest
from fastgen.streaming.actions import FILE, ActionEmbedding, Actions, add_actions, lasting, split_prompt
from fastgen.streaming.context import Context
from fastgen.streaming.retention import nearest
from fastgen.streaming.schedule import ChunkSchedule
from fastgen.train import train

WORLD = Actions(words={"left": (-1.0,), "right": (1.0,), "stay": (0.0,)}, period=(8.0,))
PLAIN = {"words": {"left": [-1], "right": [1]}, "period": [8]}
RECALL = ChunkSchedule(frames=2, window=7, sink=1, recall=2)


def told(denoiser: WanDenoiser, zero: bool = False) -> WanDenoiser:
    """The network with actions that matter."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        add_actions(denoiser.network, (8.0,), 24)
        if not zero:
            for part in (denoiser.network.actions.outer.weight, denoiser.network.actions.outer.bias):
                torch.nn.init.normal_(part, std=0.3)
    return denoiser.requires_grad_(False)


@pytest.fixture(scope="module")
def network() -> WanDenoiser:
    return told(wan())


def acting(frames: int, seed: int = 0, rows: int = 2) -> Conditioning:
    moves = torch.randint(-1, 2, (rows, frames, 1), generator=torch.Generator().manual_seed(seed)).double()
    moves[:, 0] = 0
    return Conditioning({**conditioning(rows), "actions": moves})


def forced(network: WanDenoiser, chunks: ChunkSchedule, cond: Conditioning, frames: int = 14) -> list[Tensor]:
    """The chunks' predictions, each given the clean frames before it."""
    x, clean, context = draws(frames)("x"), draws(frames)("clean"), Context(chunks)
    t, found = torch.tensor([0.9, 0.3], dtype=torch.float64), []
    for part in chunks.split(frames):
        own = slice(part.start, part.stop)
        found.append(network(x[:, own], t, cond, Inputs(context=context)))
        context = network.commit(clean[:, own], 0 * t, cond, context)
    return found


# --- words


def test_words_after_the_bar_are_moves() -> None:
    assert split_prompt("a street | right*2 left") == ("a street", "right*2 left")
    assert WORLD.listed("a street | right*2 left") == ["right", "right", "left"]
    assert WORLD.moves("a | right*2 left")[:, 0].tolist() == [0, 1, 1, -1], "the first frame has no action"
    assert WORLD.moves("a | right left", 6)[:, 0].tolist() == [0, 1, -1, -1, -1, -1], "the last one goes on"
    assert WORLD.moves("a | right*9", 3)[:, 0].tolist() == [0, 1, 1]
    assert WORLD.moves("a", 3)[:, 0].tolist() == [0, 0, 0], "without a word, nothing moves"


@pytest.mark.parametrize("prompt", ["a | up", "a | right*", "a | right * 2", "a | right | left", "a | right*99999999"])
def test_a_word_that_is_no_action_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="is no action; they are left, right"):
        WORLD.moves(prompt)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"words": {"left": (1.0, 2.0)}, "period": (8.0,)}, "left has 2 numbers, and period has 1 axes"),
        ({"words": {"a b": (1.0,)}, "period": (8.0,)}, "'a b' is no word"),
        ({"words": {"left": (1.0,)}, "period": (0.0,)}, "positive"),
    ],
)
def test_a_world_that_makes_no_sense_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Actions(**options)


def test_views_repeat_with_the_world() -> None:
    embedding = ActionEmbedding((8.0,), 4)
    round_trip = torch.ones(1, 9, 1)
    round_trip[:, 0] = 0
    views = embedding.views(round_trip)[0]
    # cos p, cos q, sin p, sin q: after eight moves of 1 the end of the move is where the video began
    torch.testing.assert_close(views[8, [0, 2]], views[0, [0, 2]], atol=1e-6, rtol=0)
    torch.testing.assert_close(views[1:, [1, 3]], views[:-1, [0, 2]], atol=1e-6, rtol=0)
    assert (views[4, 0] + 1).abs() < 1e-6


# --- the network


def test_a_new_embedding_changes_nothing() -> None:
    chunks, told_nothing = ChunkSchedule(frames=2, window=5, sink=1), told(wan(), zero=True)
    plain = wan().requires_grad_(False)
    pairs = zip(forced(told_nothing, chunks, acting(14)), forced(plain, chunks, acting(14)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_no_action_reaches_the_frames_before_it(network: WanDenoiser) -> None:
    """Chunk 3 begins with frame 6. Other actions from there on change its prediction and those after it."""
    cond, other = acting(14), acting(14)
    other["actions"][:, 6:] *= -1
    other["actions"][:, 6:] += 1
    changed = [
        not torch.equal(a, b)
        for a, b in zip(forced(network, RECALL, cond), forced(network, RECALL, other), strict=True)
    ]
    assert changed == [False] * 3 + [True] * 4


def test_a_whole_video_is_told_each_frames_action(network: WanDenoiser) -> None:
    """One call on a whole video in one chunk is the call without a context, and a mask is chunk by chunk."""
    cond, x, t = acting(6), draws(6)("x"), torch.tensor([0.9, 0.3], dtype=torch.float64)
    whole = network(x, t, cond)
    one_chunk = network(x, t, cond, Inputs(context=Context(ChunkSchedule(frames=6))))
    torch.testing.assert_close(whole, one_chunk, atol=1e-12, rtol=0)
    chunks, clean = ChunkSchedule(frames=2, window=4), draws(6)("clean")
    packed = network(x, t, cond, Inputs(causal=chunks, clean=clean))
    torch.testing.assert_close(packed, torch.cat(forced(network, chunks, cond, 6), 1), atol=1e-6, rtol=0)


def test_only_the_called_frames_are_embedded(network: WanDenoiser) -> None:
    """The cost of a call does not grow with the video. What it is told is what a call on all frames tells."""
    moves, embedding, rows = acting(14)["actions"], network.actions, list[int]()
    assert embedding is not None
    whole = embedding(moves, range(14))
    with embedding.inner.register_forward_hook(lambda _, given, _out: rows.append(given[0].shape[1])):
        told_of = network.acted(Conditioning({"actions": moves}), NO_INPUTS, range(12, 14))[1]
    assert rows == [2]
    torch.testing.assert_close(told_of, whole[:, 12:], atol=1e-12, rtol=0)


def test_chunks_beyond_the_end_go_on_with_the_last_action(network: WanDenoiser) -> None:
    """With `order: rolling`, later chunks are in the making when a video ends, in sampling and in training."""
    sampler = policy(ChunkSchedule(frames=2, window=4, order="rolling"), 1.0, 0.8, 0.6)
    cond, videos = acting(6), dataclasses.replace(batch(6), cond=acting(6))
    longer = Conditioning({**cond, "actions": lasting(cond["actions"], 10)})
    expected = sample(network, sampler, longer, draws(6))
    assert torch.equal(sample(network, sampler, cond, draws(6)), expected)
    for stop in range(3):
        x = backward_simulation(network, sampler, videos, torch.full((2,), stop)).x
        assert x.shape == expected.shape and x.isfinite().all()


# --- recall


def test_an_archive_that_is_recalled_whole_is_a_window_as_long(network: WanDenoiser) -> None:
    """After 8 frames two have left: both are recalled, to the bit what a window of 8 shows."""
    cond, recalled = acting(8), ChunkSchedule(frames=2, window=8, recall=2)
    plain = ChunkSchedule(frames=2, window=8)
    pairs = zip(forced(network, recalled, cond, 8), forced(network, plain, cond, 8), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_nearest_view_is_fetched_for_each_sample_and_the_latest_of_equals() -> None:
    """One axis. Sample 0 goes round a world of 8 columns, sample 1 to and fro."""
    embedding = ActionEmbedding((8.0,), 4)
    moves = torch.ones(2, 12, 1)
    moves[:, 0] = 0
    moves[1, 4:8] = -1
    views = embedding.views(moves)
    found = nearest(views, range(1, 8), range(9, 10), 2)
    where = moves.cumsum(1)[..., 0] % 8
    assert where[:, 9].tolist() == [1, 1]
    # sample 0 was at column 1 in frame 1, coming from 0, as it is in frame 9; sample 1 in frames 1 and 5
    assert found.add(1)[0].tolist() == [1, 2]
    assert 1 in found.add(1)[1].tolist()
    still = torch.zeros(1, 9, 1)
    assert nearest(embedding.views(still), range(0, 6), range(8, 9), 2)[0].tolist() == [4, 5]


def test_the_distance_of_a_view_is_a_mean_over_the_chunk_and_knows_no_rounding() -> None:
    """Frame 0 is where the chunk's first frame is, frame 1 farther from that and as far from both (0.65): the mean
    distances are 0.5 and 0.65, the largest 1 and 0.65. Of two views that differ in their last digits, the latest."""
    views = torch.tensor([[[0.0, 0.0], [0.5, 0.4**0.5], [0.0, 0.0], [1.0, 0.0]]])
    assert nearest(views, range(0, 2), range(2, 4), 1).tolist() == [[0]]
    alike = torch.tensor([[[0.5 + 1e-6], [0.5], [1.0]]])
    assert nearest(alike, range(0, 2), range(2, 3), 1).tolist() == [[1]]


def test_what_is_recalled_stands_between_sink_and_window() -> None:
    """Values are the numbers of frames. A schedule with a sink of 1, 2 recalled and 2 more frames of past."""
    chunks = ChunkSchedule(frames=1, window=6, sink=1, recall=2, archive=4)
    views = torch.tensor([[float(f % 5 == 2), 0.0] for f in range(12)])[None].expand(2, -1, -1).clone()
    views[1] = views[1].flip(0)
    context = Context(chunks)
    for frame in range(10):
        value = torch.full((2, 1, 1, 1), float(frame))
        context = context.committed([(value, value)])
    assert context.archive is not None and context.archive.frames == range(4, 8), "the oldest went"
    seen = context.recalled(views, 1).past(0)
    assert seen is not None
    here = views[:, 10]
    for row in range(2):
        like = [f for f in range(4, 8) if bool((views[row, f] == here[row]).all())]
        unlike = [f for f in range(4, 8) if f not in like]
        expected = sorted(([*reversed(like), *reversed(unlike)])[:2])
        assert seen[1][row, :, 0, 0].tolist() == [0, *expected, 8, 9]


def test_a_rollout_recalls_what_forcing_recalls(network: WanDenoiser) -> None:
    """The chunks of a sampled video are the predictions given that video, also from a context that was stored."""
    sampler = policy(RECALL, 1.0)
    cond, noise = acting(14), draws(14)
    video = sample(network, sampler, cond, noise)
    context, t = Context(RECALL), torch.ones(2, dtype=torch.float64)
    for part in RECALL.split(14):
        own = slice(part.start, part.stop)
        x0 = network(noise.chunk(part)("initial"), t, cond, Inputs(context=context))
        torch.testing.assert_close(x0, video[:, own], atol=1e-9, rtol=0)
        context = network.commit(video[:, own], 0 * t, cond, context)
        context = Context.load(RECALL, {k: v.clone() for k, v in context.state_dict().items()})


def test_rows_are_independent(network: WanDenoiser) -> None:
    cond = acting(14)
    clips = sample_chunks(network, policy(RECALL), cond, draws(1))
    context = [next(clips).context for _ in range(6)][-1]
    x, t = draws(2)("x"), torch.ones(2, dtype=torch.float64)
    both = network(x, t, cond, Inputs(context=context))
    for row in range(2):
        rows = slice(row, row + 1)
        alone = network(x[rows], t[rows], cond.select(rows), Inputs(context=context).select(rows))
        torch.testing.assert_close(alone, both[rows], atol=1e-12, rtol=0)


def test_memory_stays_flat() -> None:
    chunks = dataclasses.replace(RECALL, archive=6)
    clips = sample_chunks(told(wan()), policy(chunks, 1.0), acting(40), draws(1))
    sizes = [next(clips).context.nbytes for _ in range(16)]
    assert sizes[8] == sizes[-1] > sizes[2]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"recall": 2}, "give a window"),
        ({"recall": 2, "window": 3}, "2 recalled"),
        ({"recall": 2, "window": 7, "slow": 1}, "one place to go"),
        ({"recall": 2, "window": 7, "linear": True}, "one place to go"),
        ({"recall": 2, "window": 7, "archive": 1}, "archive"),
        ({"recall": 2, "window": 7, "positions": "absolute"}, "positions"),
        ({"recall": 2, "window": 7, "order": "step"}, "one chunk at a time"),
    ],
)
def test_a_recall_that_makes_no_sense_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        ChunkSchedule(frames=2, **options)


def test_stored_frames_of_another_archive_are_refused(network: WanDenoiser) -> None:
    clips = sample_chunks(network, policy(RECALL), acting(14), draws(1))
    state = [next(clips).context.state_dict() for _ in range(6)][-1]
    assert Context.load(RECALL, state).archive is not None
    with pytest.raises(ValueError, match="saved with another"):
        Context.load(RECALL, {name: value for name, value in state.items() if not name.startswith("archive.")})
    with pytest.raises(ValueError, match="without recache"):
        RECALL.check_recache()


# --- residuals


def test_the_past_carries_the_students_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What later chunks are given is x + scale (prediction - x) in the chosen frames, and x in the others."""
    student = wan().requires_grad_(False)
    networks = Networks({"student": student, "teacher": student}, policy(ChunkSchedule(frames=2)))
    data, objective = videos(6), TeacherForcing(residual_share=0.5, residual_scale=0.7, prompt_dropout=0)
    assert data.latents is not None
    seen: list[Tensor] = []
    call = WanDenoiser.forward
    monkeypatch.setattr(
        WanDenoiser, "forward", lambda self, x, t, c, i, **o: (seen.append(i.clean), call(self, x, t, c, i, **o))[1]
    )
    objective.loss(TURN, networks, data, {})
    clean, past = seen
    x = data.latents
    t = objective.levels(data, ChunkSchedule(frames=2))
    x_t = student.schedule.add_noise(x, data.normal("noise"), t)
    guess = call(student, x_t, t, data.cond, Inputs(causal=ChunkSchedule(frames=2), clean=x), predict="sample")
    chosen = (data.uniform("residual", shape=(6,)) < 0.5).view(2, 6, 1, 1, 1)
    assert torch.equal(clean, x) and 0 < chosen.sum() < 12
    torch.testing.assert_close(past, torch.where(chosen, x + 0.7 * (guess - x), x), atol=1e-12, rtol=0)


def test_noisy_past_has_no_residuals() -> None:
    with pytest.raises(ValidationError, match="leave residual_share out"):
        TeacherForcing(past="noisy", residual_share=0.5)


# --- the world of digits


def test_a_camera_sees_the_same_digits_again() -> None:
    digits, labels, turns = draw(torch.arange(4), 3, 3)
    columns = camera(torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 1]]), 49)
    assert columns[:, [0, 16, 32, 48]].tolist() == [
        [0, 32, 64, 96],
        [0, -32, -64, -96],
        [0, 32, 0, -32],
        [0, -32, 0, 32],
    ]
    video = render(digits, columns)
    assert video.shape == (4, 49, 3, 32, 32) and 0.9 < video.max() <= 1
    torch.testing.assert_close(video[:2, 32], video[:2, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(video[:2, 48], video[:2, 16], atol=1e-5, rtol=0)
    for row, slot in ((0, 1), (1, SLOTS - 1)):
        torch.testing.assert_close(video[row, 16, 0, 8:24, 8:24], digits[row, slot], atol=1e-5, rtol=0)
    assert prompt_for(turns[0]).count("*4") == 3 and labels.shape == (4, SLOTS)


# --- recipes, export and stream


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan(tmp_path_factory.mktemp("wan") / "teacher", layers=2, time_scale=1e-3)


def backbone_of(teacher: Path, **options: Any) -> dict[str, Any]:
    sizes = {"height": 32, "width": 32, "num_frames": 17, "max_sequence_length": 16}
    return {"name": "wan", "path": str(teacher), **sizes, **options}


@pytest.fixture(scope="module")
def exported(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[WanDenoiser, Path]:
    config = WanConfig(**{k: v for k, v in backbone_of(teacher, actions=PLAIN).items() if k != "name"})
    backbone = config.build(torch.device("cpu"), torch.float32, 0)
    student: Any = backbone.load("student")
    torch.nn.init.normal_(student.network.actions.outer.weight, std=0.3)
    folder = tmp_path_factory.mktemp("wan") / "export"
    chunks = ChunkSchedule(frames=1, window=5, sink=1, recall=1)
    backbone.save_pipeline(student, RolloutPolicy((1.0, 0.6), chunks=chunks), folder)
    return student, folder


def test_actions_are_exported_and_read_again(exported: tuple[WanDenoiser, Path], teacher: Path) -> None:
    student, folder = exported
    pipeline = StreamingWanPipeline.from_pretrained(folder)
    assert pipeline.actions == Actions(words={"left": (-1.0,), "right": (1.0,)}, period=(8.0,))
    prompts, seeds = ["a cat | right*2 left", "a dog | left"], [3, 4]
    pictures = pipeline(prompts, seed=seeds, output_type="latent").frames.transpose(1, 2)
    config = WanConfig(**{k: v for k, v in backbone_of(teacher, actions=PLAIN).items() if k != "name"})
    backbone = config.build(torch.device("cpu"), torch.float32, 0)
    noise = Draws(torch.tensor(seeds), backbone.latent_shape, "sample")
    loaded = backbone.load_exported(folder)
    for network in (student, loaded):
        cond = backbone.encode_prompts(prompts)
        torch.testing.assert_close(sample(network, pipeline.policy, cond, noise), pictures, atol=1e-4, rtol=0)
    cond, uncond = backbone.encode_both(prompts)
    assert torch.equal(cond["prompt_embeds"][:1], backbone.encode_prompts(["a cat"])["prompt_embeds"])
    half = config.build(torch.device("cpu"), torch.bfloat16, 0).encode_prompts(["a cat | right*300"])["actions"]
    assert half.dtype == torch.float32, "a sum of moves stays exact"
    assert torch.equal(cond["actions"], uncond["actions"]) and cond["actions"][0, :, 0].tolist() == [0, 1, 1, -1, -1]


def test_a_stream_is_the_video_with_the_same_actions(exported: tuple[WanDenoiser, Path], tmp_path: Path) -> None:
    """Said at once, said on the way, or said after the stream was stored."""
    pipeline = StreamingWanPipeline.from_pretrained(exported[1])
    whole = pipeline("a cat | right*4 left*3", seed=3, num_frames=29, output_type="latent").frames[0].transpose(0, 1)
    at_once = pipeline.stream("a cat | right*4 left*3", seed=3)
    on_the_way = pipeline.stream("a cat | right*99", seed=3)
    for frame in range(8):
        if frame == 5:
            on_the_way.prompt = "a cat | left"
            save_file(on_the_way.state_dict(), tmp_path / "stream.safetensors")
            on_the_way = pipeline.resume(tmp_path / "stream.safetensors")
        for stream in (at_once, on_the_way):
            torch.testing.assert_close(stream.denoise()[0, 0], whole[frame], atol=1e-5, rtol=0)
            stream.commit()


def test_a_refused_prompt_changes_nothing(exported: tuple[WanDenoiser, Path], teacher: Path, tmp_path: Path) -> None:
    """Neither the stream, nor what is saved of it, nor one that is to go on from a file with such a prompt."""
    pipeline = StreamingWanPipeline.from_pretrained(exported[1])
    plain, stream = (pipeline.stream("a cat | right*4 left*3", seed=3) for _ in range(2))
    next(plain)
    next(stream)
    with pytest.raises(ValueError, match=r"'up' in 'a dog \| up' is no action"):
        stream.prompt = "a dog | up"
    assert stream.prompt == "a cat | right*4 left*3" and torch.equal(next(stream), next(plain))
    save_file(stream.state_dict(), tmp_path / "stream.safetensors")
    pictures = next(plain)
    assert torch.equal(next(pipeline.resume(tmp_path / "stream.safetensors")), pictures)
    state = pipeline.stream("a dog | left", seed=1).state_dict()
    for wrong, reason in (("up", "no action"), (None, "was saved with action axes 0, and cannot go on with 1")):
        about = json.loads(bytes(state["about"].tolist())) | ({"prompt": f"a dog | {wrong}"} if wrong else {})
        packed = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
        moves = {} if wrong is None else {"moves": state["moves"]}
        given = {name: value for name, value in state.items() if name != "moves"} | {"about": packed, **moves}
        with pytest.raises(ValueError, match=reason):
            stream.load_state_dict(given)
    assert torch.equal(next(stream), pictures)


def test_the_command_refuses_a_wrong_action_before_it_streams(
    exported: tuple[WanDenoiser, Path], teacher: Path, tmp_path: Path
) -> None:
    """Also in a prompt that is far away."""
    config = WanConfig(**{k: v for k, v in backbone_of(teacher, actions=PLAIN).items() if k != "name"})
    policy = StreamingWanPipeline.from_pretrained(exported[1]).policy
    about = {"lora": False, "backbone": to_dict(config), "policy": to_dict(policy)}
    (exported[1] / METADATA).write_text(json.dumps(about))
    call: dict[str, Any] = {"path": exported[1], "seconds": 9, "output": tmp_path / "a.mp4"}
    right, wrong = ("a cat | left", "a cat | up")
    StreamRequest(**call, prompt=right, changes=((8.0, right),)).check()
    with pytest.raises(ValueError, match=r"--at: 'up' in 'a cat \| up' is no action"):
        StreamRequest(**call, prompt=right, changes=((2.0, right), (8.0, wrong))).check()
    with pytest.raises(ValueError, match=r"--prompt: 'up' in 'a cat \| up' is no action"):
        StreamRequest(**call, prompt=wrong).check()


@pytest.mark.slow
def test_two_stages_learn_actions(tmp_path: Path) -> None:
    """Teacher forcing on videos with actions, then a few-step student of that network (Context Forcing). Both export
    what they learned of actions."""
    teacher = tiny_wan(tmp_path / "teacher", layers=2)
    world = {"words": {"left": [-8], "right": [8]}, "period": [64]}
    changes = {
        "backbone": backbone_of(teacher, actions=world),
        "rollout": {"timesteps": [1.0, 0.6], "chunks": {"frames": 1, "window": 3, "recall": 1}},
        "data": {"name": "digit_views", "videos": 2},
        "eval": {"metrics": ["throughput"], "num_samples": 2, "prompts": ["a | right*4", "a | left"]},
    }
    first = {"name": "teacher_forcing", "form": "chunks", "residual_share": 0.5}
    one = {"student": {"lr": 1e-3}}
    untold = changes | {"backbone": backbone_of(teacher), "data": {"name": "moving_digits", "videos": 2}}
    untold |= {"rollout": {"timesteps": [1.0, 0.6], "chunks": {"frames": 1}}}
    before = train(recipe(teacher, tmp_path / "before", {"name": "teacher_forcing"}, **untold, optimizers=one))
    given = str(before / "export")
    start = train(recipe(teacher, tmp_path / "first", first, **changes, optimizers=one, init_from=given))
    second = {"name": "context_forcing", "teacher_from": str(start), "fake_updates": 1}
    run = train(recipe(teacher, tmp_path / "second", second, **changes, init_from=str(start / "export")))
    learned, distilled = (load_file(folder / "export" / FILE) for folder in (start, run))
    assert learned["0.actions.outer.weight"].abs().max() > 0
    assert not torch.equal(learned["0.actions.outer.weight"], distilled["0.actions.outer.weight"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"objective": {"name": "dmd2"}}, "learns from the pipeline's own network, which knows no actions"),
        ({"lora": {"student": {"rank": 2}}}, "weights that no adapter has"),
        ({"rollout": {"timesteps": [1.0]}}, "say how in rollout.chunks"),
        (
            {"eval": {"metrics": ["throughput"], "num_samples": 2, "prompts": ["a | up"]}},
            "'up' in 'a | up' is no action",
        ),
        ({"data": {"name": "prompts", "prompts": ["a | up"]}}, "is no action|needs latents"),
    ],
)
def test_recipes_with_actions_that_cannot_work_are_refused(
    changes: dict[str, Any], reason: str, teacher: Path, tmp_path: Path
) -> None:
    options = {
        "backbone": backbone_of(teacher, actions={"words": {"left": [-8], "right": [8]}, "period": [64]}),
        "data": {"name": "digit_views", "videos": 2},
        "optimizers": {"student": {"lr": 1e-3}},
        **changes,
    }
    objective = options.pop("objective", {"name": "teacher_forcing"})
    with pytest.raises(RecipeError, match=reason):
        recipe(teacher, tmp_path / "run", objective, **options)


def test_frames_are_recalled_by_actions_alone(teacher: Path, tmp_path: Path) -> None:
    """Also with a pipeline of which nothing is known yet."""
    rollout = {"timesteps": [1.0], "chunks": {"frames": 1, "window": 3, "recall": 1}}
    for path in (str(teacher), "someone/a-pipeline"):
        with pytest.raises(RecipeError, match=r"give backbone\.actions"):
            recipe(
                teacher, tmp_path / "run", {"name": "dmd2"}, rollout=rollout, backbone={"name": "wan", "path": path}
            )
    with pytest.raises(RecipeError, match="prompts have the actions left and right"):
        objective, data = {"name": "teacher_forcing"}, {"name": "digit_views"}
        recipe(teacher, tmp_path / "run", objective, data=data, optimizers={"student": {"lr": 1e-3}})


def test_without_its_file_an_export_is_refused(exported: tuple[WanDenoiser, Path], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "export"
    shutil.copytree(exported[1], folder)
    weights = load_file(folder / FILE)
    assert {name.split(".")[1] for name in weights} == {"actions"}
    (folder / FILE).write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        StreamingWanPipeline.from_pretrained(folder)
    (folder / FILE).unlink()
    with pytest.raises(ValueError, match=r"actions\.safetensors is missing"):
        StreamingWanPipeline.from_pretrained(folder)


def test_lasting_moves() -> None:
    moves = torch.tensor([[0.0], [1.0], [2.0]])
    assert lasting(moves, 5)[:, 0].tolist() == [0, 1, 2, 2, 2] and lasting(moves, 2)[:, 0].tolist() == [0, 1]
