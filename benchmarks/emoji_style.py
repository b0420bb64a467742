"""Measures how many pictures of an emoji student are flat, if the prompt leaves the style open.

    python benchmarks/emoji_style.py runs/emoji_dmd2_4step runs/emoji_rtdmd_flat

It takes runs, exports, or the teacher, adds a row of each to emoji_style.jsonl, and writes the table of
assets/emoji/README.md. The prompts are the names of the
held-out emoji, each once, and sample i has seed i.

flat         the share that CLIP holds for "NAME, flat" rather than "NAME, 3d": what the reward of the recipes asks
flat_judged  the share that a judge which no reward knows holds for flat. The first path, the student before its
             reward, teaches it: a small convolutional network learns to tell that student's pictures of "NAME, flat"
             from those of "NAME, 3d", of the names in names.txt. judge_accuracy: of the same on held-out names, where
             a judge cannot be always right, as some emoji look alike in both styles; judge_flat: what it calls flat
             of the pictures that were asked to be
clip_retrieval, clip_retrieval_5, clip_score: of the names, without a style"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import fastgen
from benchmarks.rows import append_row, read_rows, write_table
from fastgen.metrics import METRICS, MetricContext
from fastgen.metrics.features import FeatureNetwork
from fastgen.sampling.sampler import Sampler, load_sampler

ROOT = Path(__file__).resolve().parents[1]
EMOJI = ROOT / "assets/emoji"
CLIP = str(EMOJI / "clip")
TABLE = Path(__file__).resolve().with_name("emoji_style.jsonl")
BATCH = 64
TAUGHT, JUDGE_STEPS, ASKED = 768, 500, 128  # names the judge learns from, its updates, names it is tried on


class Judge(nn.Module):
    """Whether a picture [3, S, S] in [0, 1] is flat, as a logit."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 96)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.GELU())
                for a, b in pairwise(widths)
            )
        )
        self.last = nn.Linear(widths[-1], 1)

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.layers(pixels * 2 - 1).mean((2, 3))
        return self.last(F.dropout(features, 0.3, self.training))[:, 0]

    @torch.no_grad()
    def flat(self, pixels: Tensor) -> Tensor:
        return self(pixels) > 0


def styles(sampler: Sampler, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The sampler's pictures of each name in both styles, and which of them were asked to be flat."""
    prompts = [f"{name}, {style}" for name in names for style in ("flat", "3d")]
    return pictures(sampler, prompts), torch.tensor([1.0, 0.0]).repeat(len(names))


def taught(pixels: Tensor, flat: Tensor) -> Judge:
    """A judge that has learned from pictures [N, 3, S, S], of which `flat` [N] is 1 for the flat ones."""
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.01)
    for _ in range(JUDGE_STEPS):
        rows = torch.randint(len(pixels), (BATCH,))
        shown = F.pad(pixels[rows], (3, 3, 3, 3), value=1.0)
        top, left = torch.randint(7, (2,)).tolist()
        shown = shown[:, :, top : top + pixels.shape[2], left : left + pixels.shape[3]]
        shown = shown.flip(3) if torch.rand(()) < 0.5 else shown
        loss = F.binary_cross_entropy_with_logits(judge(shown), flat[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return judge.eval()


def make_judge(sampler: Sampler) -> tuple[Judge, dict[str, float]]:
    """A judge that learned from the sampler's pictures, and how well it does on names that it has not seen."""
    torch.manual_seed(0)
    known = (EMOJI / "names.txt").read_text().splitlines()
    judge = taught(*styles(sampler, [known[i] for i in torch.randperm(len(known))[:TAUGHT]]))
    pixels, flat = styles(sampler, held_out_names()[:: len(held_out_names()) // ASKED])
    found = judge.flat(pixels).float()
    return judge, {
        "judge_accuracy": float((found == flat).float().mean()),
        "judge_flat": float(found[flat > 0].mean()),
    }


def held_out_names() -> list[str]:
    return (EMOJI / "held_out_names.txt").read_text().splitlines()


def pictures(sampler: Sampler, prompts: Sequence[str]) -> Tensor:
    parts = [
        sampler.sample(prompts[i : i + BATCH], range(i, min(i + BATCH, len(prompts))))
        for i in tqdm(range(0, len(prompts), BATCH))
    ]
    return torch.cat(parts).clamp(0, 1)


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
        judge, found = make_judge(sampler)
    prompts = held_out_names()
    pixels = pictures(sampler, prompts)
    return found | numbers(pixels, prompts, judge), judge


def numbers(pixels: Tensor, prompts: Sequence[str], judge: Judge) -> dict[str, float]:
    found = {"flat": flat_by_clip(pixels, prompts), "flat_judged": float(judge.flat(pixels).float().mean())}
    return found | alignment(pixels, prompts) | {"pictures": len(pixels)}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    heads = {"flat by CLIP": "flat", "flat by the judge": "flat_judged", "own name nearest": "clip_retrieval"}
    lines = [f"| student | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for name, row in sorted(rows.items(), key=lambda item: item[1]["flat_judged"]):
        numbers = " | ".join(f"{row[key]:.3f}" for key in heads.values())
        lines.append(f"| [{name.removeprefix('emoji_')}](../../recipes/{name}.yaml) | {numbers} |")
    return "\n".join(lines)


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
    if arguments.table == TABLE:
        write_table(EMOJI / "README.md", "style", table(read_rows(TABLE)))


if __name__ == "__main__":
    main()
