"""Draws the first picture of the README: one row for each sampler, one column for each prompt and seed.

    python tools/emoji_strips.py runs/emoji_dmd2_{4,2,1}step --output assets/emoji.png

Above the students named are three rows of the teacher, with 50, 4 and 1 steps. The prompts are those of pictures that
no network was trained on."""

import argparse
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.figure import Figure
from torch import Tensor

from fastgen.sampling.pictures import grid
from fastgen.sampling.sampler import Sampler, load_sampler

TEACHER = Path("assets/emoji/teacher")
GUIDANCE = 2.0
PROMPTS = (
    "cow face, 3d",
    "peach, flat",
    "astronaut with light skin, 3d",
    "woman singer with dark skin, flat",
    "rainbow, 3d",
    "prince with medium skin, 3d",
    "cactus, flat",
    "woman with light skin, 3d",
    "morocco flag, 3d",
    "taco, 3d",
)


def rows(students: list[Path]) -> dict[str, Sampler]:
    """What each row is called, and what draws it."""
    teachers = {
        f"teacher\n{counted(steps)}": load_sampler(TEACHER, num_steps=steps, guidance_scale=GUIDANCE)
        for steps in (50, 4, 1)
    }
    return teachers | {named(sampler := load_sampler(student)): sampler for student in students}


def named(student: Sampler) -> str:
    return f"student\n{counted(student.policy.num_steps)}"


def counted(steps: int) -> str:
    return f"{steps} step{'s' * (steps > 1)}"


def draw(strips: dict[str, Tensor], prompts: list[str], path: Path) -> None:
    """A labelled row for each name, and the prompts under the columns."""
    left, below, wide, high = 0.08, 0.1, 10.0, 0.98
    size = high * len(strips)
    figure = Figure(figsize=(wide, size / (1 - below)), dpi=120)
    part = (1 - below) / len(strips)
    for i, (name, pixels) in enumerate(strips.items()):
        axes = figure.add_axes((left, 1 - (i + 1) * part, 1 - left, part))
        axes.imshow(grid(pixels, columns=len(pixels)))
        axes.set_axis_off()
        figure.text(left - 0.01, 1 - (i + 0.5) * part, name, ha="right", va="center", fontsize=9)
    for i, prompt in enumerate(prompts):
        place = left + (1 - left) * (i + 0.5) / len(prompts)
        figure.text(place, below - 0.01, textwrap.fill(prompt, 14), ha="center", va="top", fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="+", type=Path, help="run folders or exports")
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("assets/emoji.png"))
    arguments = parser.parse_args()
    seeds = range(arguments.seed, arguments.seed + len(arguments.prompts))
    strips = {name: sampler.sample(arguments.prompts, seeds) for name, sampler in rows(arguments.students).items()}
    draw(strips, arguments.prompts, arguments.output)


if __name__ == "__main__":
    main()
