"""Measures a causal student of moving digits: whole videos, long ones, and videos whose prompt changes.

    python benchmarks/streaming/moving_digits.py runs/moving_digits_self_forcing_4step --name dmd2

It takes a run's folder or an export. Each part gives a row of moving_digits.jsonl, named "NAME PART":

whole    videos of the training length: video_accuracy, motion_error, drift, and the accuracy of every latent frame.
long     four times as many chunks, with --window and --sink if the student was not trained with a window. The
         accuracy of the first and the last quarter of the chunks, the metrics of the whole video, and the bytes of
         what a stream of one video remembers at its end.
switch   videos whose prompt changes with chunk 4 to another axis ("right" to "up", and so on); the digit stays.
         turned: the share of videos whose centre moves farther along the new axis than across it, over the four
         pictures of the second chunk with the new prompt. kept: the accuracy in the first two. With --recache, the
         context is computed again with the new prompt.

--steps, --first-steps: of a chunk and of the first one, for a student that makes any number of steps. --density: with
top_k attention over tiles of one frame. Prompts are those of assets/moving_digits_prompts.txt, in turn; seeds are
0, 1, 2, ... The CPU seconds of a part on one thread are in its row."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from benchmarks.rows import append_row
from fastgen.batch import Conditioning, Draws
from fastgen.data.digits import DIGIT_WORDS
from fastgen.data.moving_digits import DIRECTIONS, SPEEDS, prompt_for, told
from fastgen.metrics import METRICS, MetricContext
from fastgen.metrics.tracks import centres
from fastgen.metrics.video_accuracy import VideoAccuracy
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.sampler import Sampler, load_sampler
from fastgen.streaming.schedule import ChunkAttention
from fastgen.streaming.stream import Stream, VideoDecoder, with_window

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "streaming" / "moving_digits.jsonl"
PROMPTS = (ROOT / "assets" / "moving_digits_prompts.txt").read_text().splitlines()
BATCH = 80
CHANGE = 4  # the chunk that is the first with the new prompt
AXES = {"right": "up", "left": "down", "up": "left", "down": "right"}


def turned_prompt(prompt: str) -> str:
    """The same digit and speed along the other axis."""
    said = told(prompt)
    assert said.digit is not None and said.direction is not None
    direction = next(word for word, value in DIRECTIONS.items() if value == said.direction)
    speed = next(word for word, value in SPEEDS.items() if value == said.speed)
    return prompt_for(DIGIT_WORDS[said.digit], AXES[direction], speed)


def make_videos(
    sampler: Sampler,
    policy: RolloutPolicy,
    chunks: int,
    ids: range,
    given: Sequence[str] = PROMPTS,
    switch: bool = False,
    recache: bool = False,
) -> tuple[Tensor, list[str]]:
    """Videos [B, F, 3, H, W] of these seeds, chunk by chunk as a stream makes them, and the prompts that hold at their
    ends."""
    backbone: Any = sampler.backbone
    prompts = {"first": [given[i % len(given)] for i in ids]}
    prompts["second"] = [turned_prompt(prompt) for prompt in prompts["first"]]
    draws = Draws(torch.tensor(list(ids)), backbone.latent_shape, "sample", backbone.dtype)

    def encode(name: str) -> Conditioning:
        return backbone.encode_prompts(prompts[name])

    stream = Stream(sampler.denoiser, policy, draws, encode, "first", VideoDecoder(backbone.vae))
    parts = []
    for chunk in range(chunks):
        stream.commit()
        if switch and chunk == CHANGE:
            stream.prompt = "second"
            if recache:
                stream.recache()
        parts.append(stream.decoder(stream.denoise()).cpu())
    return torch.cat(parts, 1), prompts["second" if switch else "first"]


def context_bytes(sampler: Sampler, policy: RolloutPolicy, chunks: int) -> int:
    """What a stream of one video remembers after so many chunks."""
    backbone: Any = sampler.backbone
    draws = Draws(torch.tensor([0]), backbone.latent_shape, "sample", backbone.dtype)
    stream = Stream(
        sampler.denoiser,
        policy,
        draws,
        lambda prompt: backbone.encode_prompts([prompt]),
        PROMPTS[0],
        VideoDecoder(backbone.vae),
    )
    for _ in range(chunks):
        stream.denoise()
        stream.commit()
    return stream.context.nbytes


def scores(videos: list[Tensor], prompts: list[list[str]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("video_accuracy", "motion_error", "drift"):
        metric = METRICS[name](MetricContext(sum(map(len, videos)), 0))
        for some, told_them in zip(videos, prompts, strict=True):
            metric.update(some, told_them)
        found |= metric.compute()
        if isinstance(metric, VideoAccuracy):
            found["accuracy_by_latent_frame"] = [round(share, 4) for share in metric.by_latent_frame().tolist()]
    return found


def after_a_change(videos: list[Tensor], prompts: list[list[str]]) -> dict[str, float]:
    """What the second chunk with the new prompt shows. A chunk is one latent frame, which is four pictures."""
    first = 4 * (CHANGE + 1) - 3  # the first picture of that chunk
    turned = []
    for some, said in zip(videos, prompts, strict=True):
        along = torch.tensor([told(prompt).direction for prompt in said], dtype=torch.float64)
        moved = (centres(some)[:, first + 3] - centres(some)[:, first - 1]).abs()
        turned.append((moved * along.abs()).sum(1) > (moved * (1 - along.abs())).sum(1))
    metric = METRICS["video_accuracy"](MetricContext(1, 0))
    for some, said in zip(videos, prompts, strict=True):
        metric.update(some, said)
    assert isinstance(metric, VideoAccuracy)
    kept = metric.by_latent_frame()[CHANGE : CHANGE + 2].mean().item()
    return {"turned": torch.cat(turned).double().mean().item(), "kept": kept}


def measure(sampler: Sampler, part: str, options: argparse.Namespace) -> dict[str, Any]:
    policy = sampler.policy.with_counts(options.steps, options.first_steps)
    assert policy.chunks is not None
    if options.density is not None:
        attention = ChunkAttention(layout="top_k", density=options.density, tile=16)
        policy = dataclasses.replace(policy, chunks=dataclasses.replace(policy.chunks, attention=attention))
    trained = len(policy.chunks.split(sampler.backbone.latent_shape[0]))
    if part == "long" and policy.chunks.window is None:
        policy = with_window(policy, options.window, options.sink, force=True)
    chunks = {"whole": trained, "long": 4 * trained, "switch": CHANGE + 3}[part]
    videos, prompts, seconds = [], [], time.process_time()
    for start in range(0, options.videos, BATCH):
        ids = range(start, min(start + BATCH, options.videos))
        some, said = make_videos(sampler, policy, chunks, ids, PROMPTS, part == "switch", options.recache)
        videos.append(some)
        prompts.append(said)
    found = {"videos": options.videos, "chunks": chunks, "cpu_seconds": round(time.process_time() - seconds, 1)}
    assert policy.chunks is not None
    found |= {"window": policy.chunks.window, "sink": policy.chunks.sink, "density": options.density}
    if part == "switch":
        return found | {"recache": options.recache} | after_a_change(videos, prompts)
    found |= scores(videos, prompts)
    if part == "long":
        shares = found["accuracy_by_latent_frame"]
        quarter = len(shares) // 4
        found["accuracy_first_quarter"] = sum(shares[:quarter]) / quarter
        found["accuracy_last_quarter"] = sum(shares[-quarter:]) / quarter
        found["context_bytes"] = context_bytes(sampler, policy, chunks)
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--parts", nargs="+", choices=("whole", "long", "switch"), default=["whole", "long", "switch"])
    parser.add_argument("--videos", type=int, default=560)
    parser.add_argument("--window", type=int, default=7)
    parser.add_argument("--sink", type=int, default=1)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--first-steps", type=int)
    parser.add_argument("--density", type=float)
    parser.add_argument("--recache", action="store_true")
    parser.add_argument("--table", type=Path, default=TABLE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sampler = load_sampler(options.student)
    for part in options.parts:
        row = {"name": f"{options.name} {part}", "versions": {"torch": torch.__version__}}
        row |= measure(sampler, part, options)
        append_row(options.table, row)
        print(row, flush=True)


if __name__ == "__main__":
    main()
