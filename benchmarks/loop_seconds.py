"""Measures how much of an update is neither a forward nor a backward pass, with a slow reader and slow encoders.

    python benchmarks/loop_seconds.py

The digits teacher is distilled by DMD2 with a GAN on image files, each with a caption of its own, so that every update
reads, decodes and encodes new pictures and prompts. Reading a picture, encoding one and encoding a prompt are each
slowed by a sleep, which stands for a disk or an encoder of real size and leaves the processor to the training. The
same updates are made with no batch ahead, with the recipe's default of one, and with two and torch's fused AdamW, in
turns, in one process. A row of loop_seconds.jsonl has the seconds of an update and the share of it outside of
`Objective.loss` and `backward`."""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rows import append_row, sort_rows
from fastgen.backbones.flow_image import FlowImage
from fastgen.backbones.sd3 import SD3
from fastgen.config import load_recipe
from fastgen.data import images, samples
from fastgen.data.digits import load_digits, prompt_for
from fastgen.objectives.dmd2 import DMD2
from fastgen.run.log import RunLog
from fastgen.train import train

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".jsonl")
Seconds = defaultdict[str, float]


@contextmanager
def replaced(owner: Any, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    kept = getattr(owner, name)
    setattr(owner, name, change(kept))
    try:
        yield
    finally:
        setattr(owner, name, kept)


def slowed(seconds: float) -> Callable[[Any], Any]:
    def change(function: Any) -> Any:
        def slow(*arguments: Any, **named: Any) -> Any:
            time.sleep(seconds)
            return function(*arguments, **named)

        return slow

    return change


def clocked(total: Seconds, name: str) -> Callable[[Any], Any]:
    """Adds the seconds of every call to total[name]."""

    def change(function: Any) -> Any:
        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                total[name] += time.perf_counter() - began

        return timed

    return change


def write_pictures(folder: Path, count: int) -> None:
    pixels, labels = load_digits("train", 32)
    for i in range(count):
        picture = (pixels[i] * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(picture).save(folder / f"{i:04d}.png")
        (folder / f"{i:04d}.txt").write_text(f"{prompt_for(int(labels[i]))}, number {i}")


ROLES = ("student", "fake_score")  # of the recipe; the discriminator is added
SETTINGS = ((0, "adamw"), (1, "adamw"), (2, "adamw_fused"))  # batches ahead, and the kind of optimizer


def measure(folder: Path, prefetch: int, updates: int, sleep: float, kind: str = "adamw") -> tuple[float, float]:
    """Seconds of an update after the first, and the share of them that is neither a forward nor a backward pass."""
    overrides = {
        "data": f"{{name: images, folder: {folder / 'pictures'}}}",
        "objective": "{name: dmd2, gan_weight: 0.01, fake_updates: 4}",
        "optimizers.discriminator": f"{{lr: 2e-4, kind: {kind}}}",
        "rollout": "{timesteps: [1.0, 0.75, 0.5, 0.25]}",
        "train": f"{{steps: {updates + 1}, batch_size: 16, sample_every: 0, checkpoint_every: 0, log_every: 1}}",
        "train.prefetch": prefetch,
        **{f"optimizers.{role}.kind": kind for role in ROLES},
        "train.num_samples": 1,
        "eval": "{metrics: [accuracy], num_samples: 1, quick_num_samples: 1, reference: digits}",
        "health.every": 0,
        "output_dir": tempfile.mkdtemp(dir=folder),
    }
    recipe = load_recipe(
        ROOT / "recipes/digits_dmd2_4step.yaml", [f"{key}={value}" for key, value in overrides.items()]
    )
    total, took, passes = Seconds(float), list[float](), list[float]()

    def noted(keep: Callable[[RunLog, float], None]) -> Callable[[RunLog, float], None]:
        def note(log: RunLog, seconds: float) -> None:
            keep(log, seconds)
            took.append(seconds)
            passes.append(sum(total.values()))
            total.clear()

        return note

    with (
        replaced(images, "read_image", slowed(sleep)),
        replaced(SD3, "encode_chunk", slowed(sleep)),
        replaced(FlowImage, "encode", slowed(sleep)),
        replaced(samples, "LATENT_BYTES", lambda _: 0),
        replaced(DMD2, "loss", clocked(total, "loss")),
        replaced(torch.Tensor, "backward", clocked(total, "backward")),
        replaced(RunLog, "took", noted),
    ):
        train(recipe)
    return sum(took[1:]) / updates, 1 - sum(passes[1:]) / sum(took[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=12, help="timed updates of every run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sleep", type=float, default=0.005, help="seconds that each reading or encoding waits")
    arguments = parser.parse_args()
    found: dict[tuple[int, str], list[tuple[float, float]]] = {setting: [] for setting in SETTINGS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pictures").mkdir()
        write_pictures(folder / "pictures", 1198)
        for _ in range(arguments.repeats):
            for (prefetch, kind), rows in found.items():
                rows.append(measure(folder, prefetch, arguments.updates, arguments.sleep, kind))
    for (prefetch, kind), rows in found.items():
        optimizer = "" if kind == "adamw" else f", {kind}"
        row = {
            "name": f"digits, prefetch {prefetch}{optimizer}, sleep {arguments.sleep:g}",
            "seconds_per_update": round(statistics.median(seconds for seconds, _ in rows), 3),
            "share_outside_passes": round(statistics.median(share for _, share in rows), 4),
            "sleep": arguments.sleep,
            "updates": arguments.updates,
            "repeats": arguments.repeats,
            "batch_size": 16,
            "threads": torch.get_num_threads(),
            "machine": f"{platform.machine()} CPU, torch {torch.__version__}",
        }
        print(row)
        append_row(TABLE, row)
    sort_rows(TABLE)


if __name__ == "__main__":
    main()
