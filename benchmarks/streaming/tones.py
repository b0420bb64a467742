"""Does the tone that a student makes follow the digit that it shows? For runs of recipes/tone_digits_*. Does the digit
follow the tone by which it is driven? For runs of recipes/driven_digits_*.

    python benchmarks/streaming/tones.py RUN --name "teacher forcing" [--steps 25] [--parts whole long]

Videos are made chunk by chunk, as a stream makes them: whole ones of the training length, and long ones of four
times as many chunks. For every picture, `tone_error` is |pitch of the tone - height of the digit|, in pixels. The
pitch is the centre of the tone's loudness, and the height that of the picture's brightness; `chance` is the same with
the tone of another video of the same prompt. `off` is the share of pictures with an error of more than 3 pixels.
`loudness` is the mean peak of the tones divided by that of real ones. `late` has the error in the last quarter of the
video. Beside them stand the metrics of the pictures alone, as in moving_digits.py. Each row goes to tones.jsonl. The
part "real" is of real videos and tones, whose pictures the autoencoder has read and written. --picture FILE shows
three videos, every fourth picture with the tones of those up to it, and adds no row.

Driven videos are given the tones of scenes of held-out digits that are as their prompts say."""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.rows import append_row
from benchmarks.streaming.moving_digits import PROMPTS, scores
from fastgen.batch import Conditioning, Draws
from fastgen.data.moving_digits import CANVAS, draw_scenes, pitches, render, scenes_as_told, tones
from fastgen.metrics.tracks import centres
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.sampler import Sampler, load_sampler
from fastgen.streaming.sound import by_frame, heard
from fastgen.streaming.stream import Stream, VideoDecoder, with_window

TABLE = Path(__file__).with_suffix(".jsonl")
BATCH = len(set(PROMPTS))
OFF = 3.0  # pixels
KEY = 5  # of the scenes whose tones drive a video


def make_videos(sampler: Sampler, policy: RolloutPolicy, chunks: int, ids: range) -> tuple[Tensor, Tensor, list[str]]:
    """Videos [B, F, 3, H, W] of these seeds, their sound [B, F, bins], and their prompts."""
    backbone: Any = sampler.backbone
    prompts, sound = [PROMPTS[i % len(PROMPTS)] for i in ids], backbone.config.sound
    draws = Draws(torch.tensor(list(ids)), backbone.latent_shape, "sample", backbone.dtype)
    given = told_tones(ids, chunks) if sound.given else None

    def encode(_: str) -> Conditioning:
        cond = backbone.encode_prompts(prompts)
        return cond if given is None else Conditioning({**cond, "sound": by_frame(sound, given)})

    decoder = VideoDecoder(backbone.vae, 0 if sound.given else backbone.strip.high)
    stream = Stream(sampler.denoiser, policy, draws, encode, "", decoder)
    pictures, sounds = list[Tensor](), list[Tensor]()
    for chunk in range(chunks):
        stream.commit()
        latents = stream.denoise()
        if given is None:
            sounds.append(heard(sound, backbone.strip, latents, first=chunk == 0).cpu())
        pictures.append(decoder(latents).cpu())
    return torch.cat(pictures, 1), torch.cat(sounds, 1) if given is None else given, prompts


def told_tones(ids: range, chunks: int) -> Tensor:
    """The tones [B, 1 + 4 (chunks - 1), bins] of scenes as the prompts of these videos say, each another one."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(ids.stop)]
    return tones(pitches(scenes_as_told(prompts, KEY), 1 + 4 * (chunks - 1))[ids.start :])


def real_videos(backbone: Any, ids: range) -> tuple[Tensor, Tensor, list[str]]:
    """Real ones through the autoencoder: what is lost there, no student can make."""
    scenes = draw_scenes(torch.tensor(list(ids)), 2, "test")
    frames = backbone.config.num_frames
    latents, sound = backbone.encode(render(scenes, frames)), tones(pitches(scenes, frames))
    if not backbone.config.sound.given:
        latents = backbone.with_sound(latents, sound)
        sound = backbone.sound_of(latents)
    return backbone.decode(latents), sound, scenes.prompts(torch.ones(len(ids), 3).bool())


def pitch_of(sound: Tensor) -> Tensor:
    """The pitch of each moment [..., bins], in bins, which are pixels: the centre of its loudness squared, so that
    what is heard faintly elsewhere counts little."""
    power = sound.clamp(min=0).double().square()
    bins = torch.arange(sound.shape[-1], dtype=torch.float64) + 0.5
    return (power * bins).sum(-1) / power.sum(-1).clamp(min=1e-9)


def tone_scores(videos: list[Tensor], sounds: list[Tensor]) -> dict[str, float]:
    height = CANVAS - 0.5 - torch.cat([centres(some) for some in videos])[..., 0]  # of the middle of a row of pixels
    sound = torch.cat(sounds)
    error = (pitch_of(sound) - height).abs()
    other = (pitch_of(sound).roll(BATCH, 0) - height).abs()  # the next video with the same prompt
    return {
        "tone_error": error.mean().item(),
        "chance": other.mean().item(),
        "off": (error > OFF).double().mean().item(),
        "late": error[:, -(error.shape[1] // 4) :].mean().item(),
        "loudness": (sound.amax(-1).mean() / tones(torch.arange(8.0, 25.0)).amax(-1).mean()).item(),
    }


def shown(pictures: Tensor, sound: Tensor) -> Tensor:
    """[3, 2 S, S n] of a video [F, 3, S, S] and its sound [F, bins], high pitches above, for every fourth picture."""
    side = pictures.shape[-1]
    first, later = sound[:1].repeat_interleave(side, 0), sound[1:].repeat_interleave(side // 4, 0)
    tone = torch.cat([first, later]).mT.flip(0).clamp(0, 1)
    row = pictures[::4].permute(1, 2, 0, 3).flatten(2)
    return torch.cat([row, tone[None].expand(3, -1, -1)[..., : row.shape[-1]]], dim=1)


def save_picture(sampler: Sampler, file: Path, scale: int = 3) -> None:
    assert sampler.policy.chunks is not None
    chunks = len(sampler.policy.chunks.split(sampler.backbone.latent_shape[0]))
    videos, sounds, prompts = make_videos(sampler, sampler.policy, chunks, range(0, BATCH, BATCH // 3 + 1))
    rows = torch.cat([shown(video, sound) for video, sound in zip(videos, sounds, strict=True)], dim=1)
    pixels = (rows * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).resize((scale * pixels.shape[1], scale * pixels.shape[0]), Image.Resampling.NEAREST).save(
        file
    )
    print("\n".join(prompts))


def measure(sampler: Sampler, policy: RolloutPolicy, part: str, options: argparse.Namespace) -> dict[str, Any]:
    assert policy.chunks is not None
    if part == "long" and policy.chunks.window is None:
        policy = with_window(policy, options.window, options.sink, force=True)
    assert policy.chunks is not None
    chunks = len(policy.chunks.split(sampler.backbone.latent_shape[0])) * (4 if part == "long" else 1)
    made, seconds = [], time.process_time()
    for start in range(0, options.videos, BATCH):
        ids = range(start, start + BATCH)
        real = part == "real"
        made.append(real_videos(sampler.backbone, ids) if real else make_videos(sampler, policy, chunks, ids))
    videos, sounds, prompts = (list(each) for each in zip(*made, strict=True))
    found: dict[str, Any] = {"videos": options.videos, "steps": None if part == "real" else policy.num_steps}
    found |= {"window": policy.chunks.window, "sink": policy.chunks.sink}
    found |= {"cpu_seconds": round(time.process_time() - seconds, 1), **tone_scores(videos, sounds)}
    if part == "real":
        del found["chance"]  # the prompts of these scenes are drawn, so that the next one with the same is elsewhere
    return found | scores(videos, prompts)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--parts", nargs="+", choices=("whole", "long", "real"), default=["whole", "long"])
    parser.add_argument("--videos", type=int, default=7 * BATCH)
    parser.add_argument("--steps", type=int, help="other levels than the student's: so many, evenly apart, as an ODE")
    parser.add_argument("--window", type=int, default=7, help="of long videos, if the student was trained without")
    parser.add_argument("--sink", type=int, default=1)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sampler = load_sampler(options.student)
    if options.picture is not None:
        save_picture(sampler, options.picture)
        return
    policy = sampler.policy
    if options.steps is not None:
        levels = tuple(1 - i / options.steps for i in range(options.steps))
        policy = dataclasses.replace(policy, timesteps=levels, transition="ode")
    for part in options.parts:
        row = {"name": f"{options.name} {part}", "versions": {"torch": torch.__version__}}
        row |= measure(sampler, policy, part, options)
        append_row(TABLE, row)
        print(row, flush=True)


if __name__ == "__main__":
    main()
