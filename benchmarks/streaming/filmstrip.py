"""Draws assets/moving_digits.png: the teacher, teacher forcing and Self Forcing on the same prompts and noise.

    python benchmarks/streaming/filmstrip.py runs/moving_digits_teacher_forcing runs/moving_digits_self_forcing_4step

The teacher makes 25 pictures and ends. The students go on to 109, with a window of 7 latent frames and a sink of one.
Every sixth picture is shown; the first five are those of the training length."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from benchmarks.streaming.moving_digits import ROOT, make_videos
from fastgen.backbones.wan import WanConfig
from fastgen.sampling.sampler import load_sampler, teacher_sampler
from fastgen.streaming.stream import with_window

TEACHER = ROOT / "assets" / "teachers" / "moving_digits"
PROMPTS = ["a seven moving right, fast", "a two moving down, slowly"]
EVERY, CHUNKS, LABEL, SIDE = 6, 28, 230, 48


def draw(rows: list[tuple[str, Tensor]], path: Path) -> None:
    """One line of pictures for each label and video [F, 3, 32, 32]."""
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 13)
    columns = max(len(video[::EVERY]) for _, video in rows)
    sheet = Image.new("RGB", (LABEL + columns * (SIDE + 2), len(rows) * (SIDE + 2)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (label, video) in enumerate(rows):
        top = row * (SIDE + 2)
        pen.text((4, top + SIDE // 2), label, "black", font, anchor="lm")
        for column, picture in enumerate(video[::EVERY]):
            large = to_pil_image(picture).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(large, (LABEL + column * (SIDE + 2), top))
    sheet.save(path, optimize=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher_forcing", type=Path)
    parser.add_argument("self_forcing", type=Path)
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--output", type=Path, default=ROOT / "assets" / "moving_digits.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(len(PROMPTS))
    strips = {}
    for label, folder in (
        ("teacher forcing, 4 steps", options.teacher_forcing),
        ("Self Forcing, 4 steps", options.self_forcing),
    ):
        sampler = load_sampler(folder)
        policy = with_window(sampler.policy, 7, 1, force=True)
        strips[label], _ = make_videos(sampler, policy, CHUNKS, seeds, PROMPTS)
    config = WanConfig(path=str(TEACHER), height=32, width=32, num_frames=25, max_sequence_length=16)
    teacher = teacher_sampler(config.build(torch.device("cpu"), torch.float32, 0), 25, options.guidance)
    strips = {"teacher, 25 guided steps": teacher.sample(PROMPTS, list(seeds)), **strips}
    draw([(label, video[i]) for i in seeds for label, video in strips.items()], options.output)


if __name__ == "__main__":
    main()
