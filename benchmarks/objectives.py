"""Compares what a student update costs in several recipes, relative to the first of them.

    python benchmarks/objectives.py recipes/mixture_dmd2_4step.yaml recipes/mixture_flow_map_4step.yaml ...

The recipes take turns in one process of one thread. A recipe may be followed by overrides of its own:
`recipe.yaml,objective.form=eulerian`. Times are CPU seconds of this process, which other programs on the machine
hardly change. Each is the median of the repeats."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import Accelerator

from fastgen.config import load_recipe
from fastgen.noise import make_key
from fastgen.run.build import build
from fastgen.train import set_rates, update


def stepper(text: str) -> Callable[[int], None]:
    """A function that makes one student update of a recipe, as fastgen/train.py does."""
    path, *overrides = text.split(",")
    recipe = load_recipe(path, ["init_from=null", *overrides])
    run = build(recipe, Accelerator(cpu=True))

    def step(index: int) -> None:
        for turn in recipe.objective.turns(index, run.state):
            set_rates(run, turn, index)
            for inner in range(turn.updates):
                position = recipe.train.batch_size * (index * 10 + inner)
                update(run, turn, position, make_key(index, turn.name, inner))
                recipe.objective.finish(turn, run.networks, run.state)
        run.ema.update(run.networks.student)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", help="recipe.yaml, or recipe.yaml,key=value,...")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps = {text: stepper(text) for text in arguments.recipes}
    seconds: dict[str, list[float]] = {text: [] for text in steps}
    for index in range(arguments.repeats + 2):  # two to warm up
        for text, step in steps.items():
            before = time.process_time()
            step(index)
            seconds[text].append(time.process_time() - before)
    medians = {text: statistics.median(times[2:]) for text, times in seconds.items()}
    first = next(iter(medians.values()))
    for text, median in medians.items():
        print(json.dumps({"recipe": text, "cpu_seconds": round(median, 4), "relative": round(median / first, 3)}))


if __name__ == "__main__":
    main()
