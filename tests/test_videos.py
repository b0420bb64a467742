"""Videos: each clip has the pictures of its times, in every run the same, and what is no whole video is named."""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mutations import draws, mutated
from PIL import Image
from tiny_wan import tiny_wan
from torch import Tensor
from video_files import FRAGMENTS, GREY, write_video

from fastgen.backbones.sd3 import SD3Config
from fastgen.backbones.wan import Wan
from fastgen.config import build_recipe
from fastgen.data import DataError, VideoData, clips, make_batch
from fastgen.data.clips import VideoError, read_clip, read_header
from fastgen.recipe import Recipe
from fastgen.registry import RecipeError
from fastgen.run.prepare import prepare
from fastgen.train import train

SIZE = {"height": 32, "width": 32, "num_frames": 5, "fps": 8}
LATENTS = frozenset({"latents"})


def kept(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image))


def numbers(path: Path, place: float, count: int, fps: float) -> list[int]:
    """Which pictures of the file are in the clip, from their greys (within 20)."""
    clip = read_clip(path, path.suffix, path.name, place, count, fps, kept)
    greys = clip[:, -4:, -4:].float().mean((1, 2, 3))
    found = (greys / GREY).round()
    assert float((greys - found * GREY).abs().max()) < GREY / 3
    return [int(number) for number in found]


RATES = [(16, 16), (20, 10), (10, 20), (25, 16), (12, 23.976)]
CASES = [("a.mp4", *rates) for rates in RATES]
CASES += [(kind, *rates) for kind in ("fragments.mp4", "a.webm", "a.gif") for rates in RATES[::3]]


@pytest.mark.parametrize(("kind", "rate", "fps"), CASES)
def test_a_clip_has_the_pictures_nearest_to_its_times(kind: str, rate: int, fps: float, tmp_path: Path) -> None:
    path, total, count = tmp_path / kind, 19, 7
    write_video(path, total, rate, container=FRAGMENTS if kind == "fragments.mp4" else None, options={"g": "5"})
    header = read_header(path, path.suffix, path.name)
    assert header[:2] == (48, 40) and abs(header.seconds - total / rate) < 0.02
    for place in (0.0, 0.37, 0.9):
        found = numbers(path, place, count, fps)
        first = int(place * (header.seconds - (count - 1) / fps) * rate + 1e-6)
        wanted = first + np.arange(count) * rate / fps
        assert abs(found[0] - first) <= (kind[-3:] == "gif")  # whose times are hundredths of a second
        assert np.abs(np.array(found) - found[0] + first - wanted).max() <= (0.51 if kind[-3:] != "gif" else 0.8)
        assert sorted(found) == found and (rate != fps or found == list(range(found[0], found[0] + count)))


@pytest.mark.parametrize("kind", ["a.mp4", "a.gif"])
def test_a_clip_may_begin_at_every_picture_that_leaves_room(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    write_video(path, 9, 10)
    assert {tuple(numbers(path, place, 9, 10)) for place in (0.0, 0.5, 0.999)} == {tuple(range(9))}
    starts = [numbers(path, (i + 0.5) / 30, 7, 10)[0] for i in range(30)]
    assert [starts.count(first) for first in range(3)] == [10, 10, 10]
    with pytest.raises(VideoError, match=r"a\.(mp4|gif): it lasts 0\.90 s, and the clip 0\.95"):
        numbers(path, 0.0, 10, 10)


def test_a_clip_is_read_from_a_key_frame_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, starts, decoded = tmp_path / "a.mp4", [], clips.decoded

    def spied(container: Any, stream: Any, start: Any) -> Any:
        starts.append(start)
        return decoded(container, stream, start)

    write_video(path, 72, 24, options={"g": "8", "bf": "2"})
    for place in (0.5, 0.77, 0.999):
        monkeypatch.setattr(clips, "decoded", spied)
        clip = read_clip(path, ".mp4", "a", place, 9, 16, kept)
        monkeypatch.setattr(clips, "decoded", lambda container, stream, start: decoded(container, stream, None))
        assert torch.equal(clip, read_clip(path, ".mp4", "a", place, 9, 16, kept))
    assert len(starts) == 3 and None not in starts


def test_pictures_are_turned_and_what_is_transparent_is_white(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    plain = read_clip(tmp_path / "a.mp4", ".mp4", "a", 0.0, 2, 16, kept)
    for turned in (90, 180, 270):
        write_video(tmp_path / "b.mp4", turned=turned)
        header = read_header(tmp_path / "b.mp4", ".mp4", "b")
        clip = read_clip(tmp_path / "b.mp4", ".mp4", "b", 0.0, 2, 16, kept)
        assert header[:2] == (clip.shape[2], clip.shape[1])
        assert torch.equal(clip, plain.rot90(turned // 90, (1, 2)))
    left = Image.new("RGBA", (40, 40), (0, 0, 255, 255))
    left.paste((200, 0, 0, 0), (0, 0, 20, 40))  # red that the file hides
    right = left.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left.save(tmp_path / "c.gif", save_all=True, append_images=[right, left], duration=100, disposal=2)
    clip = read_clip(tmp_path / "c.gif", ".gif", "c", 0.0, 3, 10, kept)
    assert clip[:, 20, 5].tolist() == [[255, 255, 255], [0, 0, 255], [255, 255, 255]]


# --- the source


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan(tmp_path_factory.mktemp("wan"), layers=2)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos with captions, three of which are longer than a clip."""
    root = tmp_path_factory.mktemp("videos")
    for i, (kind, count) in enumerate([("mp4", 20), ("webm", 30), ("gif", 25), ("mp4", 10)]):
        write_video(root / f"{i}.{kind}", count, 16)
        (root / f"{i}.txt").write_text(f"a cat {i}")
    return root


def recipe_of(folder: Path, data: dict[str, Any], **changes: Any) -> Recipe:
    raw: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "backbone": {"name": "wan", "path": str(folder), "max_sequence_length": 16} | SIZE,
        "rollout": {"timesteps": [1.0, 0.6], "chunks": {"frames": 1}},
        "data": {"name": "videos"} | data,
        "objective": {"name": "teacher_forcing"},
        "optimizers": {"student": {"lr": 1e-3}},
        "health": {"every": 0},
        "train": {
            "steps": 1,
            "batch_size": 2,
            "eval_every": 0,
            "num_samples": 2,
            "sample_every": 0,
            "checkpoint_every": 0,
        },
        "eval": {"metrics": ["throughput"], "num_samples": 2, "prompts": ["a cat"]},
    }
    return build_recipe(raw | changes)


def build(recipe: Recipe) -> Wan:
    return recipe.backbone.build(torch.device("cpu"), torch.float32, 0)  # type: ignore[return-value]


def in_shard(videos: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for file in sorted(videos.iterdir()):
            tar.add(file, file.name)
    return path


def test_epochs_show_the_clips_in_turn_and_shards_the_same_ones(folder: Path, videos: Path, tmp_path: Path) -> None:
    shard = in_shard(videos, tmp_path / "a.tar")
    recipe = recipe_of(folder, {"folder": str(videos), "clips": 2})
    backbone = build(recipe)
    stream, positions = recipe.data.open(backbone, 3), torch.arange(16)
    prompts, whole = stream.prompts(positions), stream.pixels(positions)
    assert whole is not None and whole.shape == (16, 5, 3, 32, 32)
    shown = {(prompt, i // 4): whole[i] for i, prompt in enumerate(prompts)}
    for prompt in sorted(set(prompts)):
        assert torch.equal(shown[prompt, 0], shown[prompt, 2]) and torch.equal(shown[prompt, 1], shown[prompt, 3])
        assert not torch.equal(shown[prompt, 0], shown[prompt, 1])
    other = recipe_of(folder, {"shards": str(shard), "clips": 2}).data.open(backbone, 3)
    later = other.pixels(positions[6:11])  # a run that is continued, on the shard
    assert later is not None and torch.equal(later, whole[6:11])
    assert other.prompts(positions[6:11]) == prompts[6:11]


@pytest.mark.slow
def test_prepared_clips_are_the_same_to_the_bit(folder: Path, videos: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, {"folder": str(videos), "clips": 3})
    manifest = prepare(recipe, tmp_path / "prepared", shard_size=5)
    assert (manifest["num_pictures"], manifest["views"], manifest["data"]["fps"]) == (12, 3, 8.0)
    stored = recipe_of(folder, {"name": "prepared", "folder": str(tmp_path / "prepared")})
    here, there, positions = build(recipe), build(recipe), torch.arange(16)
    wanted = make_batch(recipe.data.open(here, 3), here, positions, 1, LATENTS)
    got = make_batch(stored.data.open(there, 3), there, positions, 1, LATENTS)
    assert torch.equal(got.latents, wanted.latents) and got.prompts == wanted.prompts
    assert "vae" not in vars(there)
    slower = recipe_of(folder, {"folder": str(videos), "clips": 3}, backbone=vars(recipe.backbone) | {"fps": 12})
    with pytest.raises(ValueError, match=r"other settings: data\.fps \(8\.0 in the folder, 12\.0 in the recipe\)"):
        prepare(slower, tmp_path / "prepared", shard_size=5)


@pytest.mark.slow
def test_a_student_trains_on_them(folder: Path, videos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(recipe_of(folder, {"folder": str(videos)}, output_dir=str(run)))
    assert (run / "export" / "model_index.json").is_file()


# --- refusals


def broken(path: Path) -> None:
    path.write_bytes(b"#EXTM3U\n#EXTINF:1,\nother.ts\n")  # a list of further files


def cut(path: Path) -> None:
    path.write_bytes(write_video(path, container={"movflags": "faststart"}, options={"g": "1"})[:-100])


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("b.mp4", broken, r"cannot read the video .*b\.mp4: .*; replace or remove it"),
        ("b.webm", lambda path: path.write_bytes(b""), r"cannot read the video .*b\.webm: "),
        (
            "b.mp4",
            lambda path: write_video(path, 4),
            r"1 video is shorter than 5 pictures at 8 per second \(0\.62 s\), ",
        ),
        ("b.gif", lambda path: write_video(path, size=(16, 48)), r"1 video is smaller .*b\.gif with 48x16"),
        (
            "b.webm",
            lambda path: write_video(path, rate=7),
            r"1 video has fewer than 8 .* first is .*b\.webm with 7\. ",
        ),
        ("b.mp4", lambda path: write_video(path, color_trc=16), r"b\.mp4: it is in HDR \(PQ\); convert it"),
        ("b.mp4", lambda path: write_video(path, sample_aspect_ratio=2), r"b\.mp4: its pixels are not square \(2\)"),
        ("b.webm", os.mkfifo, r"b\.webm is not a file"),
    ],
    ids=["playlist", "empty", "short", "small", "slow", "HDR", "aspect", "pipe"],
)
def test_what_is_no_clip_is_refused_before_weights_load(
    name: str, make: Callable[[Path], Any], words: str, folder: Path, tmp_path: Path
) -> None:
    write_video(tmp_path / "a.mp4")
    for text in ("a.txt", "b.txt"):
        (tmp_path / text).write_text("a cat")
    make(tmp_path / name)
    with pytest.raises(RecipeError, match=rf"data\.?.*{words}"):
        recipe_of(folder, {"folder": str(tmp_path)})


def test_captions_folders_and_backbones_that_do_not_fit(folder: Path, videos: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    for data, words in (
        ({"folder": str(tmp_path)}, r"1 videos in .* have no caption, the first is a\.mp4"),
        ({"folder": str(tmp_path / "none")}, "there is no video folder"),
        ({}, "either a folder of videos or shards"),
        ({"folder": str(videos), "shards": "a.tar"}, "either a folder of videos or shards"),
        ({"folder": str(videos), "column": "title"}, "column: .* has none of metadata"),
    ):
        with pytest.raises(RecipeError, match=words):
            recipe_of(folder, data)
    with pytest.raises(ValueError, match="needs a backbone that makes videos, and sd3 does not"):
        VideoData(folder=str(videos)).check(SD3Config(path="assets/teachers/digits"))
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a cat")
    with pytest.raises(RecipeError, match=r"wan does not; data of videos is \{name: videos\}"):
        recipe_of(folder, {"name": "images", "folder": str(tmp_path)})


def test_a_video_that_turns_out_to_be_cut_is_named_when_it_is_read(folder: Path, videos: Path, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("a cat")
    cut(tmp_path / "b.mp4")
    recipe = recipe_of(folder, {"folder": str(tmp_path), "fps": 16, "clips": 12})
    read = recipe.data.samples(build(recipe)).read
    with pytest.raises(DataError, match=r"cannot read the video .*b\.mp4: "):
        for number in range(12):
            read(number)


@pytest.mark.slow
def test_fuzzed_videos_are_read_or_refused_by_name(tmp_path: Path) -> None:
    """Damage to three formats: a clip of the right shape, the same from a file and from memory, or its name."""
    bases = [(kind, write_video(tmp_path / f"a{kind}", 10)) for kind in (".mp4", ".webm", ".gif")]
    read, refused = 0, 0
    for draw in draws(15):
        ending, data = draw.choice(bases)
        path = tmp_path / f"fuzz{ending}"
        path.write_bytes(mutated(draw, data))
        results: list[Tensor | str] = []
        for source in (path, io.BytesIO(path.read_bytes())):
            try:
                header = read_header(source, ending, path.name)
                results.append(read_clip(source, ending, path.name, 0.3, 5, 8, kept))
                assert results[-1].shape[:1] == (5,) and header.width > 0
            except VideoError as error:
                assert path.name in str(error)
                results.append(str(error))
        one, two = results
        assert torch.equal(one, two) if isinstance(one, Tensor) and isinstance(two, Tensor) else type(one) is type(two)
        read, refused = read + isinstance(one, Tensor), refused + isinstance(one, str)
    print(f"{read} read, {refused} refused")
    assert read > 100 and refused > 100


@pytest.mark.parametrize("key", ["controls", "sounds"])
def test_videos_of_one_name_would_share_their_files(key: str, tmp_path: Path) -> None:
    for folder in ("day", "night"):
        (tmp_path / folder).mkdir()
        write_video(tmp_path / folder / "a.gif", 8, 8)
    (tmp_path / "metadata.csv").write_text("file_name,caption\nday/a.gif,a street\nnight/a.gif,a street at night\n")
    source = VideoData(folder=str(tmp_path), **{key: str(tmp_path / "others")})
    with pytest.raises(ValueError, match=f"{key}: two videos are named a, and would get the same file"):
        source.sound_files(source.videos()) if key == "sounds" else source.control_files(source.videos(), 0)
