"""Does a student show the same digit again when its camera comes back? For runs of recipes/digit_views_*.

    python benchmarks/streaming/views.py RUN --name "teacher forcing, recall" [--steps 25]

Videos are made with each of PATHS, as a stream makes them. The shipped classifier names the digit in the picture where
the camera stands in front of a slot. `agreement` is the share of videos that show the digit they showed in front of
the same slot before, when the camera has gone all the way around; `chance` is the same for slots that differ, whose
digits have nothing to do with each other; `agreement_by_return` has it for each of the returns. `ink` is the mean
brightness there divided by that of real digits, so that nothing fades unseen. Each row goes to views.jsonl."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.rows import append_row
from fastgen.batch import Draws
from fastgen.data.digit_views import PICTURES, SEGMENT, SLOTS, camera, draw, prompt_for, render
from fastgen.data.digits import load_classifier
from fastgen.metrics.video_accuracy import digit_crops
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.sampler import Sampler, load_sampler
from fastgen.streaming.stream import Stream, VideoDecoder

TABLE = Path(__file__).with_suffix(".jsonl")
PATHS = {"around": [1] * 4, "around the other way": [0] * 4}
BATCH = 40


def stands(turns: Sequence[int]) -> list[int]:
    """The slot in front of which the camera stands, at the beginning and after each turn."""
    found = [0]
    for turn in turns:
        found.append((found[-1] + 2 * turn - 1) % SLOTS)
    return found


def returns(turns: Sequence[int]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The pairs of stands in front of one slot, each with the one before, and the pairs in front of two."""
    at = stands(turns)
    pairs = list(combinations(range(len(at)), 2))
    same = [(i, j) for i, j in pairs if at[i] == at[j] and at[i] not in at[i + 1 : j]]
    return same, [(i, j) for i, j in pairs if at[i] != at[j]]


def pictures_of(latent_frames: Sequence[int]) -> list[int]:
    """The last picture of each latent frame."""
    return [PICTURES * frame for frame in latent_frames]


def make_videos(sampler: Sampler, policy: RolloutPolicy, turns: Sequence[int], ids: range) -> Tensor:
    """Videos [B, F, 3, H, W] of these seeds, chunk by chunk as a stream makes them."""
    backbone: Any = sampler.backbone
    draws = Draws(torch.tensor(list(ids)), backbone.latent_shape, "sample", backbone.dtype)
    prompt = prompt_for(torch.tensor(turns))

    def encode(text: str) -> Any:
        cond = backbone.encode_prompts([text] * len(ids))
        moves = backbone.config.actions.moves(text)
        return type(cond)({**cond, "actions": moves.expand(len(ids), -1, -1)})

    stream = Stream(sampler.denoiser, policy, draws, encode, prompt, VideoDecoder(backbone.vae))
    parts = []
    while stream.made <= len(turns) * SEGMENT:
        stream.commit()
        parts.append(stream.decoder(stream.denoise()).cpu())
    return torch.cat(parts, 1)


def shown(videos: Tensor, turns: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The digit at each stand, [B, stands], and the brightness there."""
    grey = videos[:, pictures_of([SEGMENT * i for i in range(len(turns) + 1)])].float().mean(2)
    crops, _ = digit_crops(grey.flatten(0, 1))
    return load_classifier()(crops).argmax(1).view(grey.shape[:2]), grey.mean((2, 3))


def scores(videos: dict[str, Tensor]) -> dict[str, Any]:
    same, other, ink, by_return = [], [], [], {}
    for path, turns in PATHS.items():
        digits, light = shown(videos[path], turns)
        again, apart = returns(turns)
        for i, j in again:
            agree = (digits[:, i] == digits[:, j]).double()
            same.append(agree)
            by_return[f"{path}, latent frame {SEGMENT * i} and {SEGMENT * j}"] = round(agree.mean().item(), 4)
        other += [(digits[:, i] == digits[:, j]).double() for i, j in apart]
        ink.append(light.mean())
    real, _, _ = draw(torch.arange(1000), 1, 1)
    bright = render(real, camera(torch.ones(1000, 1).long(), 1)).mean()
    return {
        "agreement": torch.cat(same).mean().item(),
        "chance": torch.cat(other).mean().item(),
        "ink": (torch.stack(ink).mean() / bright).item(),
        "agreement_by_return": by_return,
    }


def real_videos(backbone: Any, count: int) -> dict[str, Tensor]:
    """Real ones through the autoencoder: what is lost there, no student can show."""
    digits = draw(torch.arange(count), 2, 1, "test")[0]
    found = {}
    for path, turns in PATHS.items():
        frames = PICTURES * SEGMENT * len(turns) + 1
        columns = camera(torch.tensor([turns]).expand(count, -1), frames)
        parts = [
            backbone.decode(backbone.encode(render(d, c)))
            for d, c in zip(digits.split(BATCH), columns.split(BATCH), strict=True)
        ]
        found[path] = torch.cat(parts)
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--videos", type=int, default=200)
    parser.add_argument("--steps", type=int, help="other levels than the student's: so many, evenly apart, as an ODE")
    parser.add_argument("--real", action="store_true", help="real videos through the autoencoder, instead of its own")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sampler = load_sampler(options.student)
    policy = sampler.policy
    assert policy.chunks is not None
    if options.steps is not None:
        levels = tuple(1 - i / options.steps for i in range(options.steps))
        policy = dataclasses.replace(policy, timesteps=levels, transition="ode")
    if options.real:
        videos = real_videos(sampler.backbone, options.videos)
    else:
        parts = [range(start, min(start + BATCH, options.videos)) for start in range(0, options.videos, BATCH)]
        videos = {
            path: torch.cat([make_videos(sampler, policy, turns, ids) for ids in parts])
            for path, turns in PATHS.items()
        }
    row = {"name": options.name, "videos": options.videos, "steps": None if options.real else policy.num_steps}
    row |= {"versions": {"torch": torch.__version__}} | scores(videos)
    append_row(TABLE, row)
    print(row)


if __name__ == "__main__":
    main()
