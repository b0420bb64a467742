"""Measures how many pictures of an emoji student are flat, if the prompt leaves the style open.

    python benchmarks/emoji_style.py runs/emoji_dmd2_4step runs/emoji_rtdmd_flat

It takes runs, exports, or the teacher, and adds a row of each to emoji_style.jsonl. The prompts are the names of the
held-out emoji, each once, and sample i has seed i.

flat             the share that CLIP holds for "NAME, flat" rather than "NAME, 3d": what the reward of the recipes asks
flat_statistics  the share that a judge which no reward knows holds for flat: a logistic regression on how large the
                 steps between neighbouring pixels are, and how saturated they are. judge_accuracy: of this judge, on
                 real held-out pictures as the autoencoder gives them back, by cross-validation
clip_retrieval, clip_retrieval_5, clip_score: of the names, without a style"""

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import fastgen
from benchmarks.rows import append_row
from fastgen.metrics import METRICS, MetricContext
from fastgen.metrics.features import FeatureNetwork
from fastgen.sampling.sampler import Sampler, load_sampler

ROOT = Path(__file__).resolve().parents[1]
EMOJI = ROOT / "assets/emoji"
CLIP = str(EMOJI / "clip")
TABLE = Path(__file__).resolve().with_name("emoji_style.jsonl")
BATCH = 64
FOLDS = 5
EDGES = (0.0, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 2.0)  # of the steps between neighbouring pixels, in [0, 1]
WHITE = 0.97


def reference() -> tuple[list[str], Tensor]:
    """The captions of the held-out pictures, and their pixels [N, 3, S, S] in [0, 1]."""
    with open(EMOJI / "reference/metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    pictures = [np.asarray(Image.open(EMOJI / "reference" / row["file_name"]).convert("RGB")) for row in rows]
    return [row["caption"] for row in rows], torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def statistics(pixels: Tensor) -> Tensor:
    """[N, 16]: of the parts that are not white, the shares of steps between neighbours in each range of EDGES, along
    both axes; how much is not white; and its mean saturation."""
    ink = (pixels.amin(1) < WHITE).float()
    found = []
    for axis in (1, 2):
        steps = pixels.diff(dim=axis + 1).abs().mean(1)
        both = ink.narrow(axis, 1, steps.shape[axis]) * ink.narrow(axis, 0, steps.shape[axis])
        for low, high in pairwise(EDGES):
            found.append(share(((steps >= low) & (steps < high)).float(), both))
    saturation = pixels.amax(1) - pixels.amin(1)
    return torch.stack([*found, ink.mean((1, 2)), share(saturation, ink)], 1)


def share(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum((1, 2)) / weights.sum((1, 2)).clamp_min(1)


class Judge:
    """A logistic regression from standardised statistics to whether a picture is flat."""

    def __init__(self, statistics: Tensor, flat: Tensor):
        self.mean, self.std = statistics.mean(0), statistics.std(0).clamp_min(1e-6)
        self.weights = torch.zeros(statistics.shape[1] + 1, requires_grad=True)
        optimizer = torch.optim.LBFGS([self.weights], max_iter=100)

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.binary_cross_entropy_with_logits(self.logits(statistics), flat)
            value = value + 0.01 * self.weights.square().sum()
            value.backward()
            return value

        optimizer.step(loss)

    def logits(self, statistics: Tensor) -> Tensor:
        return ((statistics - self.mean) / self.std) @ self.weights[1:] + self.weights[0]

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.logits(statistics(pixels)).detach() > 0


def cross_validated(statistics: Tensor, flat: Tensor) -> float:
    """The accuracy of judges on pictures that they were not fitted to."""
    fold = torch.arange(len(flat)) % FOLDS
    right = [
        (Judge(statistics[fold != i], flat[fold != i]).logits(statistics[fold == i]) > 0).float() == flat[fold == i]
        for i in range(FOLDS)
    ]
    return float(torch.cat(right).float().mean())


def make_judge(sampler: Sampler) -> tuple[Judge, float]:
    """A judge of pictures that come from the autoencoder, and its accuracy."""
    captions, pixels = reference()
    again = torch.cat([sampler.backbone.decode(sampler.backbone.encode(part)) for part in pixels.split(BATCH)])
    found, flat = statistics(again), torch.tensor([float(caption.endswith("flat")) for caption in captions])
    return Judge(found, flat), cross_validated(found, flat)


def flat_by_clip(pixels: Tensor, prompts: Sequence[str]) -> float:
    """CLIP's two-class probability of "flat" is above a half."""
    texts = {"towards": "{prompt}, flat", "away": "{prompt}, 3d"}
    contrast = fastgen.score(list(pixels), prompts, "clip_contrast", path=CLIP, **texts)
    return float((torch.tensor(contrast) > math.log(0.5)).float().mean())


def alignment(pixels: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    metric = METRICS["clip_retrieval"](MetricContext(len(pixels), 0, features=FeatureNetwork("clip", CLIP)))
    metric.update(pixels, list(prompts))
    scores = fastgen.score(list(pixels), prompts, "clip_score", path=CLIP)
    return metric.compute() | {"clip_score": float(torch.tensor(scores).mean())}


def measure(path: Path, judge: Judge | None) -> tuple[dict[str, float], Judge]:
    sampler = load_sampler(path)
    found = dict[str, float]()
    if judge is None:
        judge, found["judge_accuracy"] = make_judge(sampler)
    prompts = (EMOJI / "held_out_names.txt").read_text().splitlines()
    parts = [
        sampler.sample(prompts[i : i + BATCH], range(i, min(i + BATCH, len(prompts))))
        for i in tqdm(range(0, len(prompts), BATCH), desc=path.name)
    ]
    pixels = torch.cat(parts).clamp(0, 1)
    found |= {"flat": flat_by_clip(pixels, prompts), "flat_statistics": float(judge(pixels).float().mean())}
    return found | alignment(pixels, prompts) | {"pictures": len(pixels)}, judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="run folders, exports or pipelines")
    parser.add_argument("--table", type=Path, default=TABLE)
    arguments = parser.parse_args()
    judge = None
    for path in arguments.paths:
        row, judge = measure(path, judge)
        append_row(arguments.table, {"name": path.name, "versions": {"torch": torch.__version__}} | row)
        print(path.name, {key: round(value, 3) for key, value in row.items()})


if __name__ == "__main__":
    main()
