"""Videos that are driven by a sound: it is given frame by frame, and is no part of what is made."""

import json
import re
import shutil
from dataclasses import asdict, replace
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
from fastgen.batch import Conditioning, Draws
from fastgen.cli import app
from fastgen.config.stored import to_dict
from fastgen.data import DataError, make_batch
from fastgen.data.controls import encode_given
from fastgen.data.moving_digits import MovingDigitsData, scenes_as_told, told
from fastgen.data.prompts import read_prompts
from fastgen.denoiser import Inputs
from fastgen.metrics.reference import captions, given_files
from fastgen.pipelines.streaming import StreamingWanPipeline
from fastgen.recipe import Recipe
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy, sample
from fastgen.run.prepare import prepare
from fastgen.sampling.sampler import METADATA
from fastgen.sampling.stream import whole_sound
from fastgen.streaming.context import Context
from fastgen.streaming.schedule import ChunkSchedule
from fastgen.streaming.sound import FILE, Sound, add_sound, by_frame, hearing
from fastgen.train import train
from tools.make_tones import write_tones

BINS = 40  # more than the numbers of a patch: what is given has no place in the latents
GIVEN = {"bins": BINS, "moments": 2, "given": True}  # as a recipe says it; 17 pictures are 5 latent frames
POLICY = RolloutPolicy((1.0, 0.6), chunks=ChunkSchedule(frames=1, window=4, sink=1))


def driven(denoiser: WanDenoiser, sinks: int = 0) -> WanDenoiser:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        add_sound(denoiser.network, sinks, BINS)
        for part in (denoiser.network.sound.sink_keys, denoiser.network.sound.sink_values) if sinks else ():
            torch.nn.init.normal_(part)
    return denoiser.requires_grad_(False)


@pytest.fixture(scope="module", params=[0, 3], ids=["no sinks", "sinks"])
def network(request: pytest.FixtureRequest) -> WanDenoiser:
    return driven(wan(), request.param)


def sounding(frames: int, seed: int = 0) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    sound = torch.randn(2, frames, 2, BINS, generator=generator, dtype=torch.float64)
    return Conditioning({**conditioning(), "sound": sound})


def test_a_given_sound_does_not_roll() -> None:
    """Rolling sketches chunks beyond the end of the video, and of the sound."""
    config, chunks = WanConfig(path="someone/a-pipeline", sound=Sound(**GIVEN)), POLICY.chunks
    assert chunks is not None
    config.check_chunks(POLICY)
    with pytest.raises(ValueError, match=r"order: rolling .* no sound is given; use order: chunk"):
        config.check_chunks(replace(POLICY, chunks=replace(chunks, order="rolling")))


# --- the network


def test_a_mask_is_chunk_by_chunk(network: WanDenoiser) -> None:
    chunks, t, cond = ChunkSchedule(frames=2, window=4), torch.tensor([0.9, 0.3], dtype=torch.float64), sounding(8)
    packed = network(draws(8)("x"), t, cond, Inputs(causal=chunks, clean=draws(8)("clean")))
    alone = torch.cat(forced(network, chunks, cond, 8), 1)
    assert packed.shape == draws(8)("x").shape
    torch.testing.assert_close(packed, alone, atol=1e-6, rtol=0)


def test_a_moment_drives_its_own_chunk_and_those_after_it(network: WanDenoiser) -> None:
    """Also through what is committed: the second list sees frame 2 in the context alone."""
    x, t, cond, other = draws(8)("x"), torch.tensor([0.9, 0.3], dtype=torch.float64), sounding(8), sounding(8)
    other["sound"][:, 2, 1] += 1
    chunks = ChunkSchedule(frames=2)
    a, b = (network(x, t, each, Inputs(causal=chunks, clean=x)) for each in (cond, other))
    assert [(a[:, f] != b[:, f]).any().item() for f in range(8)] == [False, False, *[True] * 6]
    a, b = (torch.cat(forced(network, chunks, each, 8), 1) for each in (cond, other))
    assert [(a[:, f] != b[:, f]).any().item() for f in range(8)] == [False, False, *[True] * 6]


def test_each_frame_hears_its_own_moments(network: WanDenoiser) -> None:
    """The frames 2 and 3 of a video with the sound of the frames 0 and 1 are those frames, at equal positions."""
    x, t, cond = draws(2)("x"), torch.tensor([0.9, 0.3], dtype=torch.float64), sounding(4)
    later = Conditioning({**cond, "sound": torch.cat([sounding(2, 5)["sound"], cond["sound"][:, :2]], 1)})
    context = network.commit(draws(2)("clean"), 0 * t, later, Context(ChunkSchedule(frames=2, window=2)))
    found = network(x, t, later, Inputs(context=context))
    assert not torch.equal(found, network(x, t, cond, Inputs(context=context))), "which has another sound there"
    alone = network(x, t, cond, Inputs(context=Context(ChunkSchedule(frames=2))))
    torch.testing.assert_close(found, alone, atol=1e-6, rtol=0)


def test_the_moments_are_the_first_patches_of_the_row_below_the_picture(network: WanDenoiser) -> None:
    """In the order of their time; what is left of the row has the embedding of zeros."""
    wan, moments = network.network, sounding(1)["sound"][:, :, :1]
    rows = draws(1)("x").flatten(0, 1)[:, :, None]  # [B, C, 1, H, W], whose last row of patches gives way
    with hearing(wan, rows.shape[-1], moments):
        out = wan.patch_embedding(rows)[..., -1, :].squeeze(2).mT  # [B, tokens, D]
    assert out.shape[1] == 2
    torch.testing.assert_close(out[:, 0], wan.sound.embedding(moments[:, 0, 0]))
    torch.testing.assert_close(out[:, 1], wan.sound.embedding.bias.expand(2, -1))


def test_it_cannot_do_without_its_sound(network: WanDenoiser) -> None:
    with pytest.raises(KeyError, match="sound"):
        network(draws(2)("x"), torch.tensor([0.9, 0.3], dtype=torch.float64), conditioning())


# --- backbone and data


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan(tmp_path_factory.mktemp("wan") / "teacher", layers=2, time_scale=1e-3)


def built(teacher: Path, **sound: Any) -> Any:
    options = {k: v for k, v in backbone_of(teacher, sound=GIVEN | sound).items() if k != "name"}
    return WanConfig(**options).build(torch.device("cpu"), torch.float32, 0)


def test_a_batch_has_the_sound_of_its_clips_on_both_sides(teacher: Path) -> None:
    backbone = built(teacher, bins=32, moments=4, mean=0.1, std=0.5)
    assert backbone.latent_shape == (5, 4, 4, 4), "as without sound"
    samples = MovingDigitsData(videos=3).samples(backbone)
    stream = MovingDigitsData(videos=3).open(backbone, 0)
    batch = make_batch(stream, backbone, torch.arange(2), 0, frozenset({"latents"}))
    assert batch.latents is not None and batch.latents.shape[1:] == backbone.latent_shape
    assert samples.read_sound is not None
    rows = stream.rows(torch.arange(2))  # type: ignore[attr-defined]
    sounds = torch.stack([samples.read_sound(int(row)) for row in rows])
    expected = by_frame(Sound(bins=32, moments=4, mean=0.1, std=0.5), sounds)
    assert torch.equal(batch.cond["sound"], expected) and torch.equal(batch.uncond["sound"], expected)
    with pytest.raises(ValueError, match="makes every sample from given sound: give one for each prompt"):
        backbone.encode_both(["a cat"])


def test_the_teacher_hears_nothing(teacher: Path) -> None:
    backbone = built(teacher)
    network, noise, t = backbone.load("teacher"), torch.randn(1, *backbone.latent_shape), torch.tensor([0.5])
    cond = backbone.encode_both(["a cat"], backbone.encode_sound(torch.randn(9, BINS)))[0]
    assert torch.equal(network(noise, t, cond), network(noise, t, backbone.encode_prompts(["a cat"])))
    assert backbone.image_shapes() == {"sound": (5, 2, BINS)}
    for role in ("teacher", "student"):
        assert backbone.load(role).silent_rows == 0, "its state has no rows of sound"
    with pytest.raises(ValueError, match="a sound has 8 moments, and a video of this backbone 9"):
        backbone.encode_sound(torch.randn(8, BINS))


def test_files_of_sounds_are_given(teacher: Path, tmp_path: Path) -> None:
    backbone, sounds = built(teacher), torch.randn(2, 12, BINS)
    files = [tmp_path / f"{name}.sound.safetensors" for name in "ab"]
    for file, sound in zip(files, sounds, strict=True):
        save_file({"sound": sound}, file)
    found = encode_given(backbone, files)
    assert torch.equal(found["sound"], torch.cat([backbone.encode_sound(sound)["sound"] for sound in sounds]))
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=r"from sounds \(\.sound\.safetensors\), and .*a\.png is none"):
        encode_given(backbone, [tmp_path / "a.png"])
    save_file({"sound": sounds[0, :6]}, files[0])
    with pytest.raises(DataError, match="ends after 6 moments, and a clip needs 9"):
        encode_given(backbone, files)


# --- export, stream and commands


@pytest.fixture(scope="module", params=[0, 2], ids=["no sinks", "sinks"])
def exported(
    teacher: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Any, WanDenoiser, Path]:
    backbone = built(teacher, sinks=request.param)
    student = backbone.load("student")
    for name, part in student.network.sound.named_parameters():
        torch.nn.init.normal_(part, std=1.0 if "sink" in name else 0.3)
    folder = tmp_path_factory.mktemp("wan") / "export"
    backbone.save_pipeline(student, POLICY, folder)
    about = {"lora": False, "backbone": to_dict(backbone.config), "policy": to_dict(POLICY)}
    (folder / METADATA).write_text(json.dumps(about))
    return backbone, student, folder


def sound_of(*seeds: int, moments: int = 9) -> Tensor:
    return torch.stack([torch.randn(moments, BINS, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def test_an_export_is_driven_by_the_sound_that_it_is_given(exported: tuple[Any, WanDenoiser, Path]) -> None:
    backbone, student, folder = exported
    pipeline, prompts, sound = StreamingWanPipeline.from_pretrained(folder), ["a cat", "a dog"], sound_of(1, 2)
    assert pipeline.made_sound is None and pipeline.driven is not None
    made = pipeline(prompts, seed=[3, 4], sound=sound, output_type="pt")
    assert made.sound is None
    rows = torch.cat([backbone.encode_sound(each)["sound"] for each in sound])
    cond = Conditioning({**backbone.encode_prompts(prompts), "sound": rows})
    latents = sample(student, POLICY, cond, Draws(torch.tensor([3, 4]), backbone.latent_shape, "sample"))
    torch.testing.assert_close(made.frames, backbone.decode(latents), atol=1e-4, rtol=0)
    for other, reason in (
        ({}, "driven by a sound: give sound="),
        ({"sound": sound[:1]}, r"5 latent frames of 2 videos take \[2, 9, 40\], got \[1, 9, 40\]"),
        ({"sound": sound[:, :8]}, r"got \[2, 8, 40\]"),
    ):
        with pytest.raises(ValueError, match=reason):
            pipeline(prompts, **other)
    with pytest.raises(ValueError, match=r"a latent frame is 1 patches wide, .* and 2 are asked for"):
        pipeline(prompts, sound=sound, width=16)
    one = pipeline(prompts, seed=[3, 4], sound=sound[0], output_type="pt").frames
    assert torch.equal(one[0], made.frames[0]) and not torch.equal(one[1], made.frames[1])


def test_a_stream_waits_for_its_sound(exported: tuple[Any, WanDenoiser, Path], tmp_path: Path) -> None:
    """It is the whole video, however its sound comes in, and goes on from where it was saved."""
    pipeline, (sound,) = StreamingWanPipeline.from_pretrained(exported[2]), sound_of(1)
    whole = pipeline("a cat", seed=0, sound=sound, output_type="pt").frames[0]
    stream = pipeline.stream("a cat", seed=0)
    assert next(stream, None) is None, "it has no sound yet"
    stream.listen(sound[:6])
    pictures = list(stream)
    assert len(torch.cat(pictures)) == 9, "six moments are those of three latent frames, and one more"
    save_file(stream.state_dict(), tmp_path / "stream.safetensors")
    for part in (stream, pipeline.resume(tmp_path / "stream.safetensors")):
        part.listen(sound[6:7])
        later = list(part)
        part.listen(sound[7:])
        torch.testing.assert_close(torch.cat([*pictures, *later, *part]), whole, atol=1e-5, rtol=0)
        assert next(part, None) is None
    at_once = torch.cat(list(pipeline.stream("a cat", seed=0, sound=sound)))
    torch.testing.assert_close(at_once, whole, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"the sound is \[moments, 40\] and finite, got \[3, 12\]"):
        stream.listen(torch.zeros(3, 12))
    state = stream.state_dict()
    del state["moments"]
    with pytest.raises(ValueError, match="was saved with sound bins 0, and cannot go on with 40"):
        stream.load_state_dict(state)


def test_the_commands_take_a_sound(exported: tuple[Any, WanDenoiser, Path], tmp_path: Path) -> None:
    _, _, folder = exported
    sound, run = tmp_path / "a.sound.safetensors", CliRunner().invoke
    save_file({"sound": sound_of(1)[0]}, sound)
    call = ["stream", str(folder), "--prompt", "a cat", "--output", str(tmp_path / "s.mp4"), "--seconds"]
    silent = run(app, [*call, "1.0"])
    assert silent.exit_code == 2 and "driven by a sound; give its file" in silent.stderr.replace("\n", " ")
    long = run(app, [*call, "2.0", "--sound", str(sound)])
    assert long.exit_code == 2 and "has 9 moments, and the video that it drives 17" in " ".join(long.stderr.split())
    absent = run(app, [*call, "1.0", "--sound", str(tmp_path / "b.sound.safetensors")])
    words = " ".join(absent.stderr.split())
    assert absent.exit_code == 2 and "--sound: " in words and "is no safetensors file with a tensor" in words
    assert run(app, [*call, "1.0", "--sound", str(sound)]).exit_code == 0
    assert not (tmp_path / "s.sound.safetensors").exists()
    call = ["sample", str(folder), "--prompt", "a cat", "--output", str(tmp_path / "samples")]
    assert run(app, call).exit_code == 2
    assert run(app, [*call, "--image", str(sound)]).exit_code == 0
    assert (tmp_path / "samples/00000.mp4").is_file()


def test_the_end_of_a_sound_goes_on_in_what_the_last_chunk_makes_beyond_the_video(
    exported: tuple[Any, WanDenoiser, Path], tmp_path: Path
) -> None:
    pipeline, file = StreamingWanPipeline.from_pretrained(exported[2]), tmp_path / "a.sound.safetensors"
    (sound,) = sound_of(1, moments=12)
    save_file({"sound": sound}, file)
    found = whole_sound(file, pipeline, 10)  # pictures, of which four latent frames have 13
    assert torch.equal(found, torch.cat([sound[:7], sound[6:7].expand(2, -1)]))
    config = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    assert POLICY.chunks is not None
    policy = replace(POLICY, chunks=replace(POLICY.chunks, first=4, window=5))
    pipeline.register_modules(scheduler=type(pipeline.scheduler)(**config | {"policy": asdict(policy)}))
    found = whole_sound(file, pipeline, 2)  # two latent frames, in a first chunk of four
    assert torch.equal(found, torch.cat([sound[:3], sound[2:3].expand(8, -1)]))


# --- recipes

TONE = {"bins": 32, "moments": 4, "mean": 0.12, "std": 0.26, "given": True}
TWO = {"timesteps": [1.0, 0.6], "chunks": {"frames": 1, "window": 3, "sink": 1}}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose frames have room for four moments."""
    return tiny_wan(tmp_path_factory.mktemp("wan") / "wide", layers=2, patch=1)


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """Two sounds of 17 moments, with prompts."""
    folder = tmp_path / "sounds"
    folder.mkdir()
    for name in "ab":
        save_file({"sound": torch.rand(17, 32)}, folder / f"{name}.sound.safetensors")
        (folder / f"{name}.txt").write_text(f"a digit {name}")
    return folder


def recipe_of(teacher: Path, output: Path, sounds: Path, objective: dict[str, Any], **changes: Any) -> Recipe:
    options = {
        "backbone": backbone_of(teacher, sound=TONE),
        "rollout": TWO,
        "data": {"name": "moving_digits", "videos": 2},
        "optimizers": {"student": {"lr": 1e-3}},
        "eval": {"metrics": ["throughput"], "num_samples": 2, "images": str(sounds)},
        **changes,
    }
    return recipe(teacher, output, objective, **options)


@pytest.mark.slow
def test_two_stages_learn_to_follow_a_sound(
    wide: Path, sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teacher forcing, then Context Forcing, on batches of a prepared folder that are those of the data; both read
    their evaluation's prompts from the sounds."""
    first, teacher = {"name": "teacher_forcing", "form": "chunks"}, wide
    given = recipe_of(teacher, tmp_path / "none", sounds, first)
    prepare(given, tmp_path / "prepared")
    data = {"name": "prepared", "folder": str(tmp_path / "prepared")}
    made = recipe_of(teacher, tmp_path / "first", sounds, first, data=data)
    backbone = made.backbone.build(torch.device("cpu"), torch.float32, 0)
    batches = [
        make_batch(each.data.open(backbone, 0), backbone, torch.arange(2), 0, frozenset({"latents"}))
        for each in (given, made)
    ]
    assert torch.equal(batches[0].cond["sound"], batches[1].cond["sound"])
    with pytest.raises(RecipeError, match=r"sound\.given"):
        recipe(
            teacher, tmp_path, first, data=data, rollout=TWO, backbone=backbone_of(teacher, sound=TONE | {"given": 0})
        )
    start = train(made)
    second = {"name": "context_forcing", "teacher_from": str(start), "fake_updates": 1}
    optimizers = {role: {"lr": 1e-3} for role in ("student", "fake_score")}
    run = train(
        recipe_of(teacher, tmp_path / "second", sounds, second, init_from=str(start / "export"), optimizers=optimizers)
    )
    card = (run / "export/README.md").read_text()  # whose code runs as it stands
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(run / "export"))
    monkeypatch.chdir(tmp_path)
    shutil.copy(sounds / "a.sound.safetensors", tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["video"].shape == (17, 32, 32, 3) and len(list(names["stream"])) == 4
    learned, distilled = (load_file(folder / "export" / FILE) for folder in (start, run))
    assert learned.keys() == {"0.sound.embedding.weight", "0.sound.embedding.bias"}
    for name in learned:
        assert not torch.equal(learned[name], distilled[name]), name


def test_a_sound_of_an_evaluation_may_end_a_latent_frame_early(wide: Path, sounds: Path, tmp_path: Path) -> None:
    forcing = {"name": "teacher_forcing", "form": "chunks"}
    save_file({"sound": torch.rand(13, 32)}, sounds / "b.sound.safetensors")
    assert recipe_of(wide, tmp_path / "run", sounds, forcing).eval.images == str(sounds)
    save_file({"sound": torch.rand(12, 32)}, sounds / "b.sound.safetensors")
    with pytest.raises(RecipeError, match=r"b\.sound\.safetensors has 12 moments, and the video that it drives 17"):
        recipe_of(wide, tmp_path / "run", sounds, forcing)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"objective": {"name": "dmd2"}}, "learns from the pipeline's own network, which knows no sound"),
        ({"data": {"name": "prompts", "prompts": ["a"]}}, "makes its samples from sound, which data prompts does not"),
        (
            {"eval": {"metrics": ["throughput"], "prompts": ["a"]}},
            "from sound; give a folder of sounds",
        ),
        ({"sound": TONE | {"bins": 16}}, r"set backbone\.sound\.bins to 32"),
        ({"images": "assets/emoji/reference"}, r"from sounds \(\.sound\.safetensors\) here, and .* has pictures"),
        ({"frames": 33}, "has 17 moments, and the video that it drives 33"),
    ],
)
def test_recipes_with_a_given_sound_that_cannot_work_are_refused(
    changes: dict[str, Any], reason: str, wide: Path, sounds: Path, tmp_path: Path
) -> None:
    changes, teacher = dict(changes), wide
    frames, sound = changes.pop("frames", 17), changes.pop("sound", TONE)
    options = {"backbone": backbone_of(teacher, sound=sound) | {"num_frames": frames}, **changes}
    if (images := options.pop("images", None)) is not None:
        options["eval"] = {"metrics": ["throughput"], "num_samples": 2, "images": images}
    objective = options.pop("objective", {"name": "teacher_forcing"})
    with pytest.raises(RecipeError, match=reason):
        recipe_of(teacher, tmp_path / "run", sounds, objective, **options)


# --- what ships, and what the pages say


def test_the_shipped_tones_are_those_of_digits_as_their_prompts_say(project: Path, tmp_path: Path) -> None:
    folder = project / "assets/tones"
    files = given_files(str(folder))
    prompts, sounds = captions(files), torch.stack([load_file(file)["sound"].float() for file in files])
    assert list(prompts) == read_prompts("assets/moving_digits_prompts.txt") and sounds.shape == (80, 25, 32)
    scenes = scenes_as_told(prompts, 3)
    assert scenes.prompts(torch.ones(80, 3).bool()) == list(prompts)
    pitch = (sounds * (torch.arange(32) + 0.5)).sum(-1) / sounds.sum(-1)
    for prompt, moved in zip(prompts, pitch[:, 1] - pitch[:, 0], strict=True):
        said = told(prompt)
        assert said.direction is not None and said.speed is not None
        assert abs(float(moved) + said.direction[0] * said.speed) < 0.1, prompt
    write_tones(tmp_path / "tones")
    for file in files:
        assert (tmp_path / "tones" / file.name).read_bytes() == file.read_bytes()
    twice = scenes_as_told(["a seven moving up, fast"] * 2, 0)
    assert not torch.equal(twice.start[0], twice.start[1]) or not torch.equal(twice.digits[0], twice.digits[1])
    with pytest.raises(ValueError, match="'a seven moving up' does not state"):
        scenes_as_told(["a seven moving up"], 0)


def test_the_pages_code_drives_a_video(exported: tuple[Any, WanDenoiser, Path], project: Path) -> None:
    text = (project / "docs/streaming.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "listen" in block]
    sound = sound_of(1)[0]
    scope: dict[str, Any] = {
        "pipeline": StreamingWanPipeline.from_pretrained(exported[2]),
        "sound": sound,
        "more": sound,
    }
    exec(code, scope)
    assert scope["driven"].shape == (1, 17, 32, 32, 3) and len(list(scope["stream"])) == 4
