"""Sound that a causal network makes together with its video."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_streaming import conditioning, draws, wan
from test_streaming_actions import backbone_of, forced
from test_streaming_training import recipe
from tiny_wan import tiny_wan
from torch import Tensor
from typer.testing import CliRunner

from fastgen.backbones.wan import WanConfig, WanDenoiser
from fastgen.batch import Draws
from fastgen.cli import app
from fastgen.config.stored import to_dict
from fastgen.data.moving_digits import CANVAS, draw_scenes, pitches, render, tones
from fastgen.denoiser import NO_INPUTS, Inputs
from fastgen.ops.block_sparse_attention import Result
from fastgen.pipelines.streaming import StreamingWanPipeline
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy, sample
from fastgen.run.prepare import prepare
from fastgen.sampling.sampler import METADATA
from fastgen.sampling.stream import moments_of
from fastgen.streaming.context import Context
from fastgen.streaming.schedule import ChunkSchedule
from fastgen.streaming.sound import FILE, Sound, SoundStream, Strip, add_sound, heard, laid
from fastgen.train import train

STRIP = Strip(channels=4, high=2, wide=2, width=8)  # that of the tiny network, under latents that are 8 wide
SOUND = Sound(bins=12, moments=3, mean=0.5, std=2.0)
PLAIN = {"bins": 16, "moments": 2}  # as a recipe says it; the latents of tiny videos are 4 wide
CHUNKS = ChunkSchedule(frames=2, window=5, sink=1)


def sounding(denoiser: WanDenoiser, sinks: int = 0) -> WanDenoiser:
    """The network with a sound that matters."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        add_sound(denoiser.network, sinks)
        sound = denoiser.network.sound
        torch.nn.init.normal_(sound.head.weight, std=0.5)
        for part in (sound.sink_keys, sound.sink_values) if sinks else ():
            torch.nn.init.normal_(part)
    return denoiser.requires_grad_(False)


@pytest.fixture(scope="module", params=[0, 3], ids=["no sinks", "sinks"])
def network(request: pytest.FixtureRequest) -> WanDenoiser:
    return sounding(wan(), request.param)


# --- where the sound lies


def test_rows_hold_the_moments_of_their_frames() -> None:
    values = torch.arange(7 * 12).view(1, 7, 12).double()
    rows = laid(SOUND, STRIP, values)
    assert rows.shape == (1, 3, 4, 2, 8)
    patches = STRIP.patches(rows)
    torch.testing.assert_close(patches[0, 0, :3, :12] * 2 + 0.5, values[0, :1].expand(3, -1), msg="one moment, thrice")
    torch.testing.assert_close(patches[0, 2, :3, :12] * 2 + 0.5, values[0, 4:7])
    assert not patches[..., 12:].any() and not patches[..., 3:, :].any(), "the rest is 0"
    assert torch.equal(rows[0, 1, :, :, :2].flatten(), patches[0, 1, 0]), "a moment is a patch of the latents"


def test_what_was_laid_is_heard() -> None:
    values = torch.randn(2, 7, 12, dtype=torch.float64)
    rows = laid(SOUND, STRIP, values)
    latents = torch.cat([torch.randn(2, 3, 4, 6, 8, dtype=torch.float64), rows], dim=-2)
    torch.testing.assert_close(heard(SOUND, STRIP, latents), values)
    parts = [heard(SOUND, STRIP, latents[:, :1]), heard(SOUND, STRIP, latents[:, 1:], first=False)]
    assert torch.equal(torch.cat(parts, dim=1), heard(SOUND, STRIP, latents)), "chunk by chunk, the same"
    noisy = torch.randn_like(latents)
    copies = STRIP.patches(noisy[:, 0, :, -2:])[:, :3, :12] * 2 + 0.5
    torch.testing.assert_close(heard(SOUND, STRIP, noisy)[:, 0], copies.mean(1), msg="the first moment is their mean")


@pytest.mark.parametrize(
    ("options", "reason"), [({"bins": 17}, "a patch has 16 numbers"), ({"moments": 5}, "4 patches wide")]
)
def test_sound_that_does_not_fit_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        STRIP.check(Sound(**{"bins": 12, "moments": 3, **options}))


# --- sinks


def test_sinks_are_keys_without_a_position() -> None:
    """The sound's queries read a softmax over their own logits and those of the sinks; the pictures' do not."""
    torch.manual_seed(0)
    frames, tokens, length, heads, dim = 3, 2, 15, 2, 6
    stream = SoundStream(4, 12, (2, 5, heads, dim)).double()
    torch.nn.init.normal_(stream.sink_keys)  # type: ignore[arg-type]
    torch.nn.init.normal_(stream.sink_values)  # type: ignore[arg-type]
    query, turned, key, value = torch.randn(4, 2, length, heads, dim, dtype=torch.float64)
    logits = torch.einsum("blhd,bkhd->bhlk", turned, key) * dim**-0.5
    plain = torch.einsum("bhlk,bkhd->blhd", logits.softmax(-1), value)
    found = stream.with_sinks(1, Result(plain, logits.logsumexp(-1)), query, frames, tokens)
    assert stream.sink_keys is not None and stream.sink_values is not None
    more = torch.einsum("blhd,nhd->bhln", query, stream.sink_keys[1]) * dim**-0.5
    weights = torch.cat([logits, more], dim=-1).softmax(-1)
    whole = torch.cat([value, stream.sink_values[1].expand(2, -1, -1, -1)], dim=1)
    expected = torch.einsum("bhlk,bkhd->blhd", weights, whole)
    of_sound = torch.arange(length) % (length // frames) >= length // frames - tokens
    torch.testing.assert_close(found[:, of_sound], expected[:, of_sound])
    assert torch.equal(found[:, ~of_sound], plain[:, ~of_sound])


def test_a_network_reads_its_sinks() -> None:
    few, x, t = sounding(wan(), 3), draws(4)("x"), torch.tensor([0.9, 0.3], dtype=torch.float64)
    before = few(x, t, conditioning())
    few.network.sound.sink_values.mul_(2)
    assert not torch.equal(few(x, t, conditioning()), before)


def test_sinks_are_the_same_at_every_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first chunk that stands at frames 50 and 51 is the one at 0 and 1: its tokens turn alike, and sinks do not."""
    few, x, t = sounding(wan(), 3), draws(2)("x"), torch.tensor([0.9, 0.3], dtype=torch.float64)
    inputs = Inputs(context=Context(ChunkSchedule(frames=2)))
    here = few(x, t, conditioning(), inputs)
    monkeypatch.setattr(ChunkSchedule, "positions_of", lambda *_: ((), range(50, 52)))
    torch.testing.assert_close(few(x, t, conditioning(), inputs), here, atol=1e-6, rtol=0)


# --- two streams in one network


def test_a_mask_is_chunk_by_chunk(network: WanDenoiser) -> None:
    chunks, t = ChunkSchedule(frames=2, window=4), torch.tensor([0.9, 0.3], dtype=torch.float64)
    packed = network(draws(8)("x"), t, conditioning(), Inputs(causal=chunks, clean=draws(8)("clean")))
    alone = torch.cat(forced(network, chunks, conditioning(), 8), 1)
    torch.testing.assert_close(packed, alone, atol=1e-6, rtol=0)


def test_a_whole_video_is_one_chunk(network: WanDenoiser) -> None:
    x, t = draws(6)("x"), torch.tensor([0.9, 0.3], dtype=torch.float64)
    one_chunk = network(x, t, conditioning(), Inputs(context=Context(ChunkSchedule(frames=6))))
    torch.testing.assert_close(network(x, t, conditioning()), one_chunk, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rows", [slice(0, 2), slice(2, 4)], ids=["picture", "sound"])
def test_each_stream_hears_and_sees_the_other_and_no_later_chunk(network: WanDenoiser, rows: slice) -> None:
    """A change of one stream in frame 2 changes both of them from its chunk on."""
    x, t, chunks = draws(8)("x"), torch.tensor([0.9, 0.3], dtype=torch.float64), ChunkSchedule(frames=2)
    other = x.clone()
    other[:, 2, :, rows] += 1
    a, b = (network(video, t, conditioning(), Inputs(causal=chunks, clean=video)) for video in (x, other))
    for part in (slice(0, 2), slice(2, 4)):
        changed = [(a[:, f, :, part] != b[:, f, :, part]).any().item() for f in range(8)]
        assert changed == [False, False, *[True] * 6]


def test_sound_has_its_own_embedding_and_head(network: WanDenoiser) -> None:
    """The gradient of the sound's loss reaches them, and that of the picture alone does not reach the head."""
    for parameter in network.network.sound.parameters():
        parameter.requires_grad_(True)
    x, t = draws(4)("x"), torch.tensor([0.9, 0.3], dtype=torch.float64)
    out = network(x, t, conditioning())
    sound = network.network.sound
    _, picture = torch.autograd.grad(
        out[..., :2, :].square().sum(),
        [sound.embedding.weight, sound.head.weight],
        allow_unused=True,
        retain_graph=True,
    )
    found = torch.autograd.grad(out[..., 2:, :].square().sum(), list(sound.parameters()))
    network.requires_grad_(False)
    assert (picture is None or not picture.any()) and all(grad.any() for grad in found)


def test_the_head_reads_the_sounds_own_tokens(network: WanDenoiser) -> None:
    """They are the last ones of a frame; what it says of patch j is where patch j of the sound lies."""
    x, t, seen = draws(4)("x"), torch.tensor([0.9, 0.3], dtype=torch.float64), list[Tensor]()
    with network.network.proj_out.register_forward_pre_hook(lambda _, given: seen.append(given[0])):
        out = network(x, t, conditioning(), predict="flow_prediction")
    said = network.network.sound.head(seen[0].unflatten(0, (2, 4))[:, :, -2:])  # two patches wide
    rows = said.unflatten(-1, (2, 2, 4)).permute(0, 1, 5, 3, 2, 4).flatten(-2)  # a stock network's are [p, p, C]
    torch.testing.assert_close(out[..., 2:, :], rows)


# --- data


def test_a_tone_follows_the_height_of_its_digit() -> None:
    scenes = draw_scenes(torch.arange(50), 3)
    pitch = pitches(scenes, 25)
    rows = render(scenes, 25)[:, :, 0].sum(-1)
    middle = CANVAS - (rows * (torch.arange(CANVAS) + 0.5)).sum(-1) / rows.sum(-1)
    assert (middle - pitch).abs().max() < 3, "a digit's weight is near the middle of its 16 pixels"
    loudness = tones(pitch)
    assert loudness.shape == (50, 25, CANVAS)
    centre = (loudness * (torch.arange(CANVAS) + 0.5)).sum(-1) / loudness.sum(-1)
    torch.testing.assert_close(centre, pitch, atol=1e-2, rtol=0)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan(tmp_path_factory.mktemp("wan") / "teacher", layers=2, time_scale=1e-3)


def built(teacher: Path, **sound: Any) -> Any:
    options = {k: v for k, v in backbone_of(teacher, sound=PLAIN | sound).items() if k != "name"}
    return WanConfig(**options).build(torch.device("cpu"), torch.float32, 0)


def test_a_state_has_pictures_and_sound(teacher: Path) -> None:
    backbone = built(teacher)
    assert backbone.latent_shape == (5, 4, 6, 4), "two rows more than the picture's four"
    pixels, sound = torch.rand(1, 17, 3, 32, 32), torch.rand(1, 9, 16)
    latents = backbone.encode(pixels)
    state = backbone.with_sound(latents, sound)
    torch.testing.assert_close(backbone.sound_of(state), sound)
    plain = WanConfig(**{k: v for k, v in backbone_of(teacher).items() if k != "name"})
    assert torch.equal(backbone.decode(state), plain.build(torch.device("cpu"), torch.float32, 0).decode(latents))


def test_the_teacher_makes_its_pictures_and_no_sound(teacher: Path) -> None:
    backbone = built(teacher)
    network, noise = backbone.load("teacher"), torch.randn(2, *backbone.latent_shape)
    cond, t = backbone.encode_prompts(["a cat", "a dog"]), torch.tensor([0.9, 0.4])
    x0 = network(noise, t, cond, predict="sample")
    plain = WanConfig(**{k: v for k, v in backbone_of(teacher).items() if k != "name"})
    stock = plain.build(torch.device("cpu"), torch.float32, 0).load("teacher")
    torch.testing.assert_close(x0[..., :4, :], stock(noise[..., :4, :], t, cond, predict="sample"))
    assert x0[..., 4:, :].abs().max() < 1e-6
    for part in (network, backbone.load("student")):  # what keeps processes in step where experts are sharded
        x_t, level, inputs = part.smallest(noise, t, NO_INPUTS)
        assert part(x_t, level, cond, inputs).shape == x_t.shape


# --- export and stream


@pytest.fixture(scope="module", params=[0, 2], ids=["no sinks", "sinks"])
def exported(
    teacher: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Any, WanDenoiser, Path]:
    backbone = built(teacher, sinks=request.param)
    student = sounding_student(backbone)
    folder = tmp_path_factory.mktemp("wan") / "export"
    chunks = ChunkSchedule(frames=1, window=4, sink=1)
    backbone.save_pipeline(student, RolloutPolicy((1.0, 0.6), chunks=chunks), folder)
    return backbone, student, folder


def sounding_student(backbone: Any) -> WanDenoiser:
    student: WanDenoiser = backbone.load("student")
    for name, part in student.network.sound.named_parameters():
        torch.nn.init.normal_(part, std=1.0 if "sink" in name else 0.3)
    return student


def test_sound_is_exported_and_read_again(exported: tuple[Any, WanDenoiser, Path]) -> None:
    backbone, student, folder = exported
    pipeline = StreamingWanPipeline.from_pretrained(folder)
    prompts, seeds = ["a cat", "a dog"], [3, 4]
    made = pipeline(prompts, seed=seeds, output_type="pt")
    noise, cond = Draws(torch.tensor(seeds), backbone.latent_shape, "sample"), backbone.encode_prompts(prompts)
    for network in (student, backbone.load_exported(folder)):
        latents = sample(network, pipeline.policy, cond, noise)
        torch.testing.assert_close(backbone.decode(latents), made.frames, atol=1e-4, rtol=0)
        torch.testing.assert_close(backbone.sound_of(latents), made.sound, atol=1e-4, rtol=0)
    assert made.sound.shape == (2, 9, 16)
    with pytest.raises(ValueError, match=r"a latent frame is 1 patches wide, .* and 2 are asked for"):
        pipeline(prompts, width=16)
    frames, sound = pipeline(prompts, seed=seeds, output_type="pt", return_dict=False)
    assert torch.equal(frames, made.frames) and torch.equal(sound, made.sound)


def test_a_stream_is_the_whole_video_with_its_sound(exported: tuple[Any, WanDenoiser, Path], tmp_path: Path) -> None:
    pipeline = StreamingWanPipeline.from_pretrained(exported[2])
    whole, stream = pipeline("a cat", seed=3, num_frames=29, output_type="pt"), pipeline.stream("a cat", seed=3)
    pictures, sound = list[Tensor](), list[Tensor]()
    for chunk in range(8):
        if chunk == 5:
            save_file(stream.state_dict(), tmp_path / "stream.safetensors")
            stream = pipeline.resume(tmp_path / "stream.safetensors")
        pictures.append(next(stream))
        assert stream.sound is not None
        sound.append(stream.sound)
    torch.testing.assert_close(torch.cat(pictures), whole.frames[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat(sound), whole.sound[0], atol=1e-5, rtol=0)


def test_the_commands_write_the_sound_beside_the_video(
    exported: tuple[Any, WanDenoiser, Path], tmp_path: Path
) -> None:
    backbone, _, folder = exported
    policy = to_dict(StreamingWanPipeline.from_pretrained(folder).policy)
    about = {"lora": False, "backbone": to_dict(backbone.config), "policy": policy}
    (folder / METADATA).write_text(json.dumps(about))
    video, runner = tmp_path / "stream.mp4", CliRunner()
    arguments = ["stream", str(folder), "--prompt", "a cat", "--seconds", "0.4", "--output", str(video)]
    assert runner.invoke(app, arguments).exit_code == 0
    sound = load_file(tmp_path / "stream.sound.safetensors")["sound"]
    whole = StreamingWanPipeline.from_pretrained(folder)("a cat", seed=0, num_frames=9, output_type="pt").sound[0]
    torch.testing.assert_close(sound, whole[:4], atol=1e-5, rtol=0)  # six pictures, of nine that were made
    assert [moments_of(Sound(bins=1, moments=2), n, 4) for n in (1, 2, 3, 4, 5, 6, 9)] == [1, 2, 2, 3, 3, 4, 5]
    video.unlink()
    again = runner.invoke(app, arguments)
    assert again.exit_code == 2 and "stream.sound.safetensors" in again.stderr.replace("\n", "")
    samples = ["sample", str(folder), "--prompt", "a cat", "--num-images", "2", "--output", str(tmp_path / "samples")]
    done = runner.invoke(app, samples)
    assert done.exit_code == 0, done.output
    first = load_file(tmp_path / "samples/00000.sound.safetensors")["sound"]
    torch.testing.assert_close(first[:5], whole[:5], atol=1e-4, rtol=0)
    assert len(list((tmp_path / "samples").glob("*.sound.safetensors"))) == 2 and first.shape == (9, 16)


def test_a_folder_without_its_sound_is_refused(exported: tuple[Any, WanDenoiser, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for entry in exported[2].iterdir():
        if entry.name != FILE:
            (copy / entry.name).symlink_to(entry)
    with pytest.raises(ValueError, match=r"was trained with backbone\.sound"):
        StreamingWanPipeline.from_pretrained(copy)
    (copy / FILE).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        StreamingWanPipeline.from_pretrained(copy)


# --- recipes

TONE = {"bins": 32, "moments": 4, "mean": 0.12, "std": 0.26, "sinks": 2}
TWO = {"timesteps": [1.0, 0.6], "chunks": {"frames": 1, "window": 3, "sink": 1}}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose patches have room for a tone of 32 bins, and its rows for four moments."""
    return tiny_wan(tmp_path_factory.mktemp("wan") / "wide", layers=2, channels=32, patch=1)


@pytest.mark.slow
def test_two_stages_learn_sound(wide: Path, tmp_path: Path) -> None:
    """Teacher forcing on videos with sound, from a student that knows none; then a few-step student of that network
    (Context Forcing). The videos of the first stage and their sound are prepared; another sound does not fit them, and
    another number of sinks does."""
    changes = {
        "rollout": TWO,
        "data": {"name": "moving_digits", "videos": 2},
        "eval": {"metrics": ["throughput"], "num_samples": 2, "prompts": ["a cat", "a dog"]},
    }
    silent, told = ({"backbone": backbone_of(wide, **more)} for more in ({}, {"sound": TONE}))
    first = {"name": "teacher_forcing", "form": "chunks", "residual_share": 0.5}
    once = changes | {"optimizers": {"student": {"lr": 1e-3}}}
    before = train(recipe(wide, tmp_path / "before", first, **once, **silent))
    prepare(recipe(wide, tmp_path / "none", first, **once, **told), tmp_path / "prepared")
    stored = once | {"data": {"name": "prepared", "folder": str(tmp_path / "prepared")}}
    for change, sound in (("std", TONE | {"std": 0.5}), (None, TONE | {"sinks": 1})):
        refusal = pytest.raises(RecipeError, match=r"sound\.std \(0\.26 in the folder") if change else nullcontext()
        with refusal:
            recipe(wide, tmp_path / "none", first, **stored, backbone=backbone_of(wide, sound=sound))
    start = train(recipe(wide, tmp_path / "first", first, **stored, **told, init_from=str(before / "export")))
    second = {"name": "context_forcing", "teacher_from": str(start), "fake_updates": 1}
    run = train(recipe(wide, tmp_path / "second", second, **changes, **told, init_from=str(start / "export")))
    learned, distilled = (load_file(folder / "export" / FILE) for folder in (start, run))
    assert learned["0.sound.head.weight"].abs().max() > 0
    for name in learned:
        assert not torch.equal(learned[name], distilled[name]), name


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"objective": {"name": "dmd2"}}, "learns from the pipeline's own network, which knows no sound"),
        ({"lora": {"student": {"rank": 2}}}, "weights that no adapter has"),
        ({"data": {"name": "videos", "folder": "."}}, "data videos has none"),
        ({"sound": TONE | {"bins": 16}}, "set backbone.sound.bins to 32"),
        ({"sound": TONE | {"bins": 40}}, "a patch has 32 numbers, and 40 are asked for"),
        ({"sound": TONE | {"moments": 5}}, "the most moments"),
        (
            {"rollout": TWO | {"chunks": {"frames": 1, "attention": {"backend": "sdpa"}}}},
            "backend: sdpa does not give",
        ),
    ],
)
def test_recipes_with_sound_that_cannot_work_are_refused(
    changes: dict[str, Any], reason: str, wide: Path, tmp_path: Path
) -> None:
    sound = changes.pop("sound", TONE)
    options = {
        "backbone": backbone_of(wide, sound=sound),
        "rollout": TWO,
        "data": {"name": "moving_digits", "videos": 2},
        "optimizers": {"student": {"lr": 1e-3}},
        **changes,
    }
    objective = options.pop("objective", {"name": "teacher_forcing"})
    with pytest.raises(RecipeError, match=reason):
        recipe(wide, tmp_path / "run", objective, **options)
