"""Distils the embedded digits teacher to four steps, and shows in one table and one picture how it went.

    python tools/quickstart.py train.steps=100 --output runs/short

`make quickstart` runs it without options, which takes a few minutes."""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from fastgen.config import load_recipe
from fastgen.evaluation.results import write_results
from fastgen.metrics import METRICS, MetricContext, Timing
from fastgen.metrics.features import FeatureNetwork
from fastgen.metrics.reference import Reference, open_reference
from fastgen.run.terminal import console, print_table
from fastgen.sampling.pictures import grid
from fastgen.sampling.sampler import Sampler, load_sampler, teacher_sampler
from fastgen.train import train

COLUMNS = {
    "network_evaluations": "network evaluations",
    "fd_held_out": "FD to held-out digits",
    "fd_teacher": "FD to the teacher's 50 steps",
    "accuracy": "accuracy",
    "diversity": "diversity",
    "images_per_second": "images / second",
}
OTHER_SEEDS = 1_000_000  # of the teacher's samples that all rows are compared with; no row uses these seeds


def draw(sampler: Sampler, prompts: list[str], seed: int, name: str, timing: Timing | None = None) -> Tensor:
    """Samples [N, 3, 32, 32], one image for each prompt, with the seeds seed, seed + 1, and so on."""
    parts = []
    for i in tqdm(range(0, len(prompts), 100), desc=name):
        chunk, began = prompts[i : i + 100], time.perf_counter()
        parts.append(sampler.sample(chunk, range(seed + i, seed + i + len(chunk))))
        if timing:
            timing.batches.append((len(chunk), time.perf_counter() - began))
    return torch.cat(parts)


def measure(
    sampler: Sampler, name: str, held_out: Reference, teacher: Reference, features: FeatureNetwork
) -> tuple[dict, Tensor]:
    """One row of the table, and its samples."""
    prompts, timing = list(held_out.prompts), Timing(sampler.network_evaluations)
    samples = draw(sampler, prompts, 0, name, timing)
    numbers: dict[str, float] = {"num_samples": len(samples)}
    for reference, key in ((teacher, "fd_teacher"), (held_out, "fd_held_out")):
        context = MetricContext(len(samples), 0, reference, features, None, timing)
        for metric_name in ("fid", "accuracy", "diversity", "throughput"):
            metric = METRICS[metric_name](context)
            metric.update(samples, prompts)
            numbers |= {key if k == "fid" else k: v for k, v in metric.compute().items() if k != "fid_num_samples"}
    row = {
        "name": name,
        "metrics": numbers,
        "guidance_scale": sampler.guidance_scale,
        "policy": list(sampler.policy.timesteps),
        "weights": sampler.weight_hashes(),
    }
    return row, samples


def picture(strips: dict[str, Tensor], path: Path, left: float = 0.13, height: float = 0.55) -> None:
    """Draws one labelled row of images for each sampler. A column has one prompt and seed. left: the share of the
    width that labels have. height: of a row, in inches, of 10 across."""
    figure = Figure(figsize=(10, height * len(strips)), dpi=150)
    for i, (name, pixels) in enumerate(strips.items()):
        axes = figure.add_axes((left, 1 - (i + 1) / len(strips), 1 - left, 1 / len(strips)))
        axes.imshow(grid(pixels, columns=len(pixels)))
        axes.set_axis_off()
        figure.text(left - 0.01, 1 - (i + 0.5) / len(strips), name, ha="right", va="center", fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/digits_quickstart.yaml", help="what is trained")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="a folder")
    parser.add_argument("overrides", nargs="*", help="dotted.key=value, for the recipe")
    arguments = parser.parse_args()
    began = time.perf_counter()

    recipe = load_recipe(arguments.recipe, [f"output_dir={arguments.output / 'run'}", *arguments.overrides])
    folder = train(recipe)
    backbone = recipe.backbone.build(torch.device("cpu"), torch.float32, recipe.seed)
    held_out, features = open_reference("digits"), FeatureNetwork("digits")
    prompts, scale = list(held_out.prompts), recipe.teacher_guidance
    own = draw(teacher_sampler(backbone, 50, scale), prompts, OTHER_SEEDS, "the teacher's own samples")
    teacher = Reference("teacher", held_out.prompts, lambda start, stop: own[start:stop])

    rows, pictures = [], {}
    samplers = {f"teacher, {k} steps": teacher_sampler(backbone, k, scale) for k in (50, 8, 4)}
    samplers["student, 4 steps"] = load_sampler(folder)
    for name, sampler in samplers.items():
        row, samples = measure(sampler, name, held_out, teacher, features)
        rows.append(row)
        pictures[name] = samples[:64]

    table = Table("", *COLUMNS.values(), title=f"{len(own)} samples on each side of every FD (Frechet distance)")
    for row in rows:
        table.add_row(row["name"], *(f"{row['metrics'][key]:.4g}" for key in COLUMNS))
    print_table(table, console())
    write_results(arguments.output / "results.json", rows, pictures, dict.fromkeys(pictures, prompts))
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    asked = [f"a handwritten {word}" for word in words] * 2
    strips = {name: sampler.sample(asked, range(20)) for name, sampler in samplers.items()}
    picture(strips, arguments.output / "grid.png")
    print(f"picture: {arguments.output / 'grid.png'}")
    print(f"page:    {arguments.output / 'results.html'}")
    print(f"export:  {folder / 'export'}")
    print(f"{time.perf_counter() - began:.0f} seconds")


if __name__ == "__main__":
    main()
