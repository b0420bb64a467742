"""Draws what runs look like that went wrong: assets/failures.png, for docs/troubleshooting.md.

    python tools/make_failures.py        # 5 CPU minutes; a run that is there is not trained again

The upper rows are students of the digits, each trained with the mistake that its label names, below a good one, and
their teacher in one step. The last two rows are the emoji teacher with little guidance and with much. Within the
digits, and within the emoji, a column has one prompt and seed."""

import argparse
from pathlib import Path
from typing import NamedTuple

from emoji_strips import PROMPTS as EMOJI_PROMPTS
from quickstart import picture

from fastgen.config import load_recipe
from fastgen.data.digits import prompt_for
from fastgen.sampling.sampler import load_sampler
from fastgen.train import train

ROOT = Path(__file__).resolve().parents[1]
TEACHER, EMOJI = ROOT / "assets/teachers/digits", ROOT / "assets/emoji/teacher"
PROMPTS = [prompt_for(digit) for digit in range(10)]
QUIET = (
    "train.batch_size=32",
    "train.eval_every=0",
    "train.sample_every=0",
    "train.checkpoint_every=0",
    "train.num_samples=2",
    "eval.metrics=[throughput]",
    "eval.num_samples=2",
    "eval.quick_num_samples=2",
    "eval.teacher_steps=[]",
)


class Failure(NamedTuple):
    """label: of the row.  overrides: of recipes/digits_quickstart.yaml, or of `recipe`.  begin: whether the run begins
    with the good student."""

    label: str
    overrides: tuple[str, ...]
    recipe: str = "digits_quickstart"
    begin: bool = False


GOOD = Failure("as it should be", ("train.steps=60",))
FAILURES = (
    Failure(
        "fake score left behind",
        (
            "train.steps=60",
            "objective.fake_updates=1",
            "optimizers.student.lr=1e-3",
            "optimizers.fake_score.lr=1e-5",
        ),
    ),
    Failure(
        "reward without matching",
        ("train.steps=40", "objective.dm_weight=1e-9", "train.batch_size=64"),
        recipe="digits_rtdmd_gdpo",
        begin=True,
    ),
)


def trained(failure: Failure, runs: Path) -> Path:
    """The run's folder."""
    folder = runs / failure.label.replace(" ", "_")
    if not (folder / "export").is_dir():
        start = [f"init_from={runs / GOOD.label.replace(' ', '_') / 'export'}"] if failure.begin else []
        recipe = ROOT / f"recipes/{failure.recipe}.yaml"
        train(load_recipe(recipe, [*QUIET, *failure.overrides, *start, f"output_dir={folder}"]))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("build/failures"))
    parser.add_argument("--output", type=Path, default=ROOT / "assets/failures.png")
    arguments = parser.parse_args()
    seeds = range(len(PROMPTS))
    rows = {f.label: load_sampler(trained(f, arguments.runs)).sample(PROMPTS, seeds) for f in (GOOD, *FAILURES)}
    rows["one step, untrained"] = load_sampler(TEACHER, num_steps=1, guidance_scale=1.0).sample(PROMPTS, seeds)
    for scale in (2.0, 10.0):
        emoji = load_sampler(EMOJI, num_steps=28, guidance_scale=scale)
        rows[f"guidance of {scale:g}"] = emoji.sample(EMOJI_PROMPTS, seeds)
    picture(rows, arguments.output, left=0.2, height=0.8)


if __name__ == "__main__":
    main()
