"""The sound of videos in files: a clip has the moments of its own time, and what does not fit its video is refused."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_streaming_actions import backbone_of
from test_streaming_training import recipe
from tiny_wan import tiny_wan
from torch import Tensor
from video_files import GREY, write_video

from fastgen.backbones.wan import Wan, WanConfig
from fastgen.data import DataError, VideoData
from fastgen.data.samples import Sounding
from fastgen.data.sounds import read_sound
from fastgen.recipe import Recipe
from fastgen.registry import RecipeError
from fastgen.run.prepare import prepare
from fastgen.streaming.sound import Sound

PICTURES = 20  # of a file, 16 a second; a video of the backbone has 17, which are 5 latent frames
SOUND = {"bins": 16, "moments": 2, "mean": 0.5, "std": 0.3}
RATES = {2: 8, 4: 16}  # moments of a latent frame -> of a second


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan(tmp_path_factory.mktemp("wan") / "teacher", layers=2, channels=32, patch=1)


def counted(moments: int, bins: int = 16) -> Tensor:
    """A sound whose moment j is j / moments, in all bins."""
    return (torch.arange(moments) / moments)[:, None].repeat(1, bins)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Two videos with captions, and the sound of each, eight moments a second."""
    (tmp_path / "clips").mkdir()
    (tmp_path / "sounds").mkdir()
    for name in ("a", "b.c"):
        write_video(tmp_path / "clips" / f"{name}.mp4", PICTURES, size=(32, 32))
        (tmp_path / "clips" / f"{name}.txt").write_text(f"video {name}")
        save_file({"sound": counted(PICTURES // 2)}, tmp_path / "sounds" / f"{name}.sound.safetensors")
    return tmp_path


def source(clips: Path, taken: int = 1) -> VideoData:
    return VideoData(folder=str(clips / "clips"), sounds=str(clips / "sounds"), clips=taken)


def backbone(teacher: Path, **sound: Any) -> Wan:
    options = {k: v for k, v in backbone_of(teacher, sound=SOUND | sound).items() if k != "name"}
    built = WanConfig(**options).build(torch.device("cpu"), torch.float32, 0)
    assert isinstance(built, Wan)
    return built


def recipe_of(teacher: Path, clips: Path, sound: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    options = {
        "backbone": backbone_of(teacher) if sound == {} else backbone_of(teacher, sound=SOUND | (sound or {})),
        "rollout": {"timesteps": [1.0, 0.6], "chunks": {"frames": 1, "window": 3}},
        "data": {"name": "videos", "folder": str(clips / "clips"), "sounds": str(clips / "sounds")},
        "optimizers": {"student": {"lr": 1e-3}},
        "eval": {"metrics": ["throughput"], "num_samples": 2, "prompts": ["a cat", "a dog"]},
        **changes,
    }
    return recipe(teacher, clips / "run", {"name": "teacher_forcing"}, **options)


@pytest.mark.parametrize("moments", RATES)
def test_a_clip_has_the_moments_of_its_pictures(moments: int, teacher: Path, clips: Path) -> None:
    """Picture i of a file is grey i, and moment j is at the time of picture j times (16 / moments a second)."""
    rate = RATES[moments]
    total = PICTURES * rate // 16
    for file in (clips / "sounds").iterdir():
        save_file({"sound": counted(total)}, file)
    samples = source(clips, taken=5).samples(backbone(teacher, moments=moments))
    starts = set()
    for number in range(10):
        found = samples.read_data(number)
        assert isinstance(found, Sounding) and found.sound.shape == (1 + 4 * moments, 16)
        first = round(float(found.pixels[0, :, -4:, -4:].mean()) * 255 / GREY)  # the picture that the clip begins with
        heard = found.sound[:, 0] * total
        torch.testing.assert_close(heard, heard[0] + torch.arange(1 + 4 * moments))
        assert int(heard[0].round()) == first * rate // 16
        starts.add(first)
    assert starts == {0, 1, 2, 3}


def test_the_clips_latents_hold_their_sound(teacher: Path, clips: Path) -> None:
    made = backbone(teacher)
    stream = source(clips).open(made, 0)
    latents = stream.latents(torch.arange(2))
    assert latents is not None and latents.shape == (2, *made.latent_shape)
    sound = made.sound_of(latents)
    assert sound is not None
    torch.testing.assert_close(sound.diff(dim=1), torch.full((2, 8, 16), 2 / PICTURES))


def test_the_last_moment_goes_on_for_one_latent_frame(tmp_path: Path) -> None:
    file, sound = tmp_path / "a.sound.safetensors", Sound(bins=16, moments=2)
    save_file({"sound": counted(10)}, file)
    assert torch.equal(read_sound(file, sound, 3, 7), counted(10)[3:])
    assert torch.equal(read_sound(file, sound, 3, 9), torch.cat([counted(10)[3:], counted(10)[-1:].expand(2, -1)]))
    with pytest.raises(DataError, match="ends after 10 moments, and a clip needs 13"):
        read_sound(file, sound, 3, 10)
    save_file({"sound": counted(10) / 0}, file)
    with pytest.raises(DataError, match="not finite"):
        read_sound(file, sound, 3, 5)


@pytest.mark.parametrize(
    ("sound", "reason"),
    [
        ({}, "videos of this backbone have no sound; set backbone.sound"),
        ({"bins": 12}, r"F32 of shape \[10, 16\], and a sound is \[moments, 12\]"),
        ({"moments": 4}, r"has 10 moments, and .*a\.mp4 lasts 1\.25 s, which are 20 at 16 per second"),
        ({"std": 0.7}, "have mean 0.45 and standard deviation 0.288, and backbone.sound normalises them by 0.5 and"),
        ({"mean": -0.2}, "normalises them by -0.2 and 0.3"),
    ],
)
def test_a_sound_that_is_not_the_backbones_is_refused(
    sound: dict[str, Any], reason: str, teacher: Path, clips: Path
) -> None:
    with pytest.raises(RecipeError, match=reason):
        recipe_of(teacher, clips, sound)


def test_the_numbers_of_all_files_count(teacher: Path, clips: Path) -> None:
    """The second is eight times as loud."""
    save_file({"sound": 8 * counted(PICTURES // 2)}, clips / "sounds/b.c.sound.safetensors")
    with pytest.raises(RecipeError, match=r"have mean 2\.03 and standard deviation 2\.28"):
        recipe_of(teacher, clips)


def test_numbers_that_are_not_finite_are_refused(teacher: Path, clips: Path) -> None:
    save_file({"sound": counted(PICTURES // 2) / 0}, clips / "sounds/a.sound.safetensors")
    with pytest.raises(RecipeError, match=r"a\.sound\.safetensors holds numbers that are not finite"):
        recipe_of(teacher, clips)


def test_files_that_do_not_belong_together_are_refused(teacher: Path, clips: Path) -> None:
    recipe_of(teacher, clips)
    with pytest.raises(RecipeError, match=r"data videos has none; choose videos with data\.sounds"):
        recipe_of(teacher, clips, data={"name": "videos", "folder": str(clips / "clips")})
    (clips / "sounds/b.c.sound.safetensors").write_bytes(b"no tensors")
    with pytest.raises(RecipeError, match=r'b\.c\.sound\.safetensors is no safetensors file with a tensor "sound"'):
        recipe_of(teacher, clips)
    (clips / "sounds/b.c.sound.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"1 of 2 videos have none, the first is .*b\.c\.sound\.safetensors"):
        recipe_of(teacher, clips)


def test_prepared_sounds_give_the_same_latents(teacher: Path, clips: Path) -> None:
    made = recipe_of(teacher, clips)
    prepare(made, clips / "prepared")
    stored = recipe_of(teacher, clips, data={"name": "prepared", "folder": str(clips / "prepared")})
    assert "sound" in stored.data.provides
    positions = torch.arange(2)
    latents = [each.data.open(backbone(teacher), 0).latents(positions) for each in (made, stored)]
    assert latents[0] is not None and latents[1] is not None
    assert torch.equal(*latents)
    silent = dataclasses.replace(made, data=VideoData(folder=str(clips / "clips")))
    with pytest.raises(ValueError, match="its latents hold sound, and data videos has none"):
        prepare(silent, clips / "silent")


def test_the_pages_code_writes_the_loudness_of_pitches(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two seconds, of which the second has a tone: 33 moments, the later ones louder at its pitch."""
    text = (project / "docs/data.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "mel_filter_bank" in block]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sounds").mkdir()
    time = np.arange(32000) / 16000
    exec(code, {"waveform": np.sin(2 * np.pi * 440 * time) * (time > 1)})
    found = read_sound(tmp_path / "sounds/a.sound.safetensors", Sound(bins=64), 0, 33)
    loudest = found.amax(1)
    assert found.shape == (33, 64) and loudest[18:].min() > loudest[:14].max() + 3
