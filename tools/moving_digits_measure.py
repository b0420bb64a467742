"""What the moving digits teacher reaches, beside what its autoencoder and the data themselves reach."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline
from moving_digits_transformer import FRAMES, TOKENS
from moving_digits_vae import encode
from torch import Tensor

from fastgen import noise
from fastgen.data.moving_digits import CANVAS, draw_scenes, render
from fastgen.metrics import METRICS, MetricContext
from fastgen.metrics.tracks import latent_frames, mass
from fastgen.metrics.video_accuracy import VideoAccuracy

NAMES = ("video_accuracy", "motion_error", "drift")
COUNT = 500
BATCH = 50


def held_out(count: int, frames: int, seed: int) -> tuple[Tensor, list[str]]:
    """Videos of held-out digits and their whole prompts."""
    scenes = draw_scenes(torch.arange(count), noise.make_key(seed, "moving digits, held out"), "test")
    return render(scenes, frames), scenes.prompts(torch.ones(count, 3, dtype=torch.bool))


def scores(videos: Tensor, prompts: Sequence[str]) -> dict[str, float | list[float]]:
    """The numbers of every metric, and accuracy and brightness by latent frame."""
    found: dict[str, float | list[float]] = {}
    for name in NAMES:
        metric = METRICS[name](MetricContext(len(videos), 0))
        for start in range(0, len(videos), BATCH):
            metric.update(videos[start : start + BATCH], prompts[start : start + BATCH])
        found |= metric.compute()
        if isinstance(metric, VideoAccuracy):
            found["accuracy_by_latent_frame"] = metric.by_latent_frame().tolist()
    of = latent_frames(videos.shape[1])
    total = torch.zeros(int(of[-1]) + 1, dtype=torch.float64).index_add_(0, of, mass(videos).mean(0))
    return found | {"mass_by_latent_frame": (total / of.bincount()).tolist()}


@torch.no_grad()
def floor(vae: AutoencoderKLWan, frames: int, count: int, seed: int) -> dict[str, float | list[float]]:
    """Held-out videos encoded and decoded: what a perfect transformer would reach."""
    videos, prompts = held_out(count, frames, seed)
    means, again = [], []
    for part in videos.split(BATCH):
        mean, _ = encode(vae, part.transpose(1, 2) * 2 - 1)
        means.append(mean.std((0, 1, 3, 4)))
        again.append(vae.decode(mean).sample.transpose(1, 2) / 2 + 0.5)
    error = F.mse_loss(torch.cat(again), videos)
    found = scores(torch.cat(again), prompts)
    spread = torch.stack(means).mean(0).tolist()
    return {"psnr": -10 * error.log10().item(), **found, "latent_std_by_latent_frame": spread}


@torch.no_grad()
def teacher(pipe: WanPipeline, steps: int, guidance: float, count: int, seed: int) -> dict[str, float | list[float]]:
    """The stock pipeline with prompts that state everything."""
    _, prompts = held_out(count, 1, seed)
    generator, videos, started = torch.Generator().manual_seed(seed), [], time.perf_counter()
    for start in range(0, count, BATCH):
        videos.append(
            pipe(
                prompts[start : start + BATCH],
                height=CANVAS,
                width=CANVAS,
                num_frames=FRAMES,
                num_inference_steps=steps,
                guidance_scale=guidance,
                max_sequence_length=TOKENS,
                generator=generator,
                output_type="pt",
            ).frames.cpu()
        )
    seconds = time.perf_counter() - started
    return {"steps": steps, "guidance": guidance, "seconds": seconds, **scores(torch.cat(videos), prompts)}


def measure(folder: Path, guidances: Sequence[float], count: int, seed: int) -> None:
    """Measure the data, the autoencoder and the teacher at each guidance; write metrics.json."""
    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    found = {
        "videos": count,
        "data": scores(*held_out(count, FRAMES, seed)),
        "autoencoder": floor(pipe.vae.eval(), FRAMES, count, seed),
        "autoencoder_49_frames": floor(pipe.vae, 49, count, seed),
        "autoencoder_109_frames": floor(pipe.vae, 109, count // 4, seed),
        "teacher": [teacher(pipe, 25, guidance, count, seed) for guidance in guidances],
    }
    (folder / "metrics.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
