"""The folder of somebody who reads the pages, for tests of their code: own pictures, videos, sounds, prompts."""

import csv
import json
import re
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from safetensors.torch import save_file

from fastgen.sampling.video import video_writer

ROOT = Path(__file__).parents[1]
PROMPTS = ("a handwritten two", "a handwritten seven")
MODULES = ("my_rewards", "my_objective")  # which the folder has
FRAMES = 81  # of a clip, at 16 pictures a second


def make_reader_folder(folder: Path) -> Path:
    """Fills an empty folder, and returns it."""
    for name in ("assets", "recipes", "fastgen"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("my/pipeline", "path/to/pipeline"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).symlink_to(ROOT / "assets/teachers/digits")
    (folder / "recipe.yaml").symlink_to(ROOT / "recipes/digits_quickstart.yaml")
    write_prompts(folder)
    write_modules(folder)
    for name in ("photos", "first_frames"):
        write_pictures(folder / name)
    for name in ("clips", "depth"):
        write_clip(folder / name)
    write_sounds(folder)
    (folder / "depth/references").mkdir()
    Image.new("RGB", (832, 480)).save(folder / "depth/references/a.png")
    picture, clip = folder / "photos/a.png", folder / "clips/a.mp4"
    write_shards(folder / "shards", picture)
    write_shards(folder / "video_shards", clip)
    return folder


def write_prompts(folder: Path) -> None:
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    (folder / "prompts.csv").write_text("".join(f"{row}\n" for row in ("caption", *PROMPTS)))
    pyarrow.parquet.write_table(pyarrow.table({"title": PROMPTS}), folder / "prompts.parquet")


def write_modules(folder: Path) -> None:
    """What the pages call my_rewards, and the module that docs/new_objective.md writes."""
    (folder / "my_rewards.py").write_text("def brightness(pixels, prompts):\n    return pixels.mean((1, 2, 3))\n")
    page = (ROOT / "docs/new_objective.md").read_text()
    blocks = dict(re.findall(r"(?ms)^```(python|yaml)\n(.*?)^```$", page))
    (folder / "my_objective.py").write_text(blocks["python"])
    (folder / "my_recipe.yaml").write_text(blocks["yaml"])


def write_captions(folder: Path, file: str) -> None:
    (folder / "a.txt").write_text(PROMPTS[0])
    with (folder / "metadata.csv").open("w", newline="") as table:
        csv.writer(table).writerows([("file_name", "caption", "title"), (file, PROMPTS[0], PROMPTS[1])])


def write_pictures(folder: Path) -> None:
    folder.mkdir()
    Image.new("RGB", (1280, 1280), (90, 120, 200)).save(folder / "a.png")
    write_captions(folder, "a.png")


def write_clip(folder: Path) -> None:
    folder.mkdir()
    grey = torch.linspace(0, 1, FRAMES).reshape(-1, 1, 1, 1)
    with video_writer(folder / "a.mp4", 16) as append:
        for picture in grey:
            append(picture.expand(1, 3, 480, 832))
    write_captions(folder, "a.mp4")


def write_sounds(folder: Path) -> None:
    """A number for each of the bins and moments that the recipes of the pages name, with the mean and the deviation
    that they name: sounds for docs/data.md, tones for docs/streaming.md."""
    generator = torch.Generator().manual_seed(0)
    for name, bins, mean, std in (("sounds", 64, -3.1, 1.9), ("tones", 32, 0.12, 0.26)):
        (folder / name).mkdir()
        sound = mean + std * torch.randn(FRAMES, bins, generator=generator)
        save_file({"sound": sound}, folder / name / "a.sound.safetensors")


def write_shards(folder: Path, file: Path) -> None:
    """A hundred shards of one sample."""
    folder.mkdir()
    caption = folder / "caption.json"
    caption.write_text(json.dumps({"caption": PROMPTS[0]}))
    first = folder / "000000.tar"
    with tarfile.open(first, "w") as archive:
        archive.add(file, f"000001{file.suffix}")
        archive.add(caption, "000001.json")
    caption.unlink()
    for number in range(1, 100):
        (folder / f"{number:06d}.tar").hardlink_to(first)
