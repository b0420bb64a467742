"""The shipped moving digits teacher: a plain diffusers folder that is as good as its card says."""

import json

import pytest
import torch
from diffusers import WanPipeline

from fastgen import noise
from fastgen.backbones.wan import WanConfig
from fastgen.data.digits import assets_dir
from fastgen.data.moving_digits import draw_scenes, render, told
from fastgen.metrics import METRICS, MetricContext

torch.set_num_threads(1)

TEACHER = assets_dir() / "teachers" / "moving_digits"
STATED = json.loads((TEACHER / "metrics.json").read_text())
CONFIG = WanConfig(path=str(TEACHER), height=32, width=32, num_frames=25, max_sequence_length=16)


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    pipe = WanPipeline.from_pretrained(TEACHER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scenes(count: int) -> tuple[torch.Tensor, list[str]]:
    """Videos of held-out digits and their prompts."""
    drawn = draw_scenes(torch.arange(count), noise.make_key("teacher test"), "test")
    return render(drawn, 25), drawn.prompts(torch.ones(count, 3, dtype=torch.bool))


def measured(videos: torch.Tensor, prompts: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in ("video_accuracy", "motion_error", "drift"):
        metric = METRICS[name](MetricContext(len(videos), 0))
        metric.update(videos, prompts)
        found |= metric.compute()
    return found


def test_the_folder_is_small_and_holds_no_pickles():
    files = [path for path in TEACHER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.suffix for path in files} == {".json", ".md", ".safetensors"}


def test_the_tokenizer_makes_one_token_of_each_word(pipe: WanPipeline):
    words = pipe.tokenizer.tokenize("a seven moving right, fast")
    assert words == ["▁a", "▁seven", "▁moving", "▁right", ",", "▁fast"]
    assert told("a seven moving right, fast") == (7, (0, 1), 1.0)


@torch.no_grad()
def test_the_autoencoder_alone_is_as_good_as_stated(pipe: WanPipeline):
    videos, prompts = scenes(24)
    latents = pipe.vae.encode(videos.transpose(1, 2) * 2 - 1).latent_dist.mode()
    again = pipe.vae.decode(latents).sample.transpose(1, 2) / 2 + 0.5
    got, stated = measured(again, prompts), STATED["autoencoder"]
    assert latents.shape == (24, 32, 7, 4, 4)
    assert -10 * (again - videos).square().mean().log10() > stated["psnr"] - 1
    assert got["video_accuracy"] > stated["video_accuracy"] - 0.02
    assert got["direction_accuracy"] == 1 and got["speed_error"] < 0.05 and got["drift"] < 0.03


@pytest.mark.slow
def test_the_plain_pipeline_is_as_good_as_stated(pipe: WanPipeline):
    """Within four standard errors of 24 videos."""
    best = max(STATED["teacher"], key=lambda row: row["video_accuracy"])
    _, prompts = scenes(24)
    videos = pipe(
        prompts,
        height=32,
        width=32,
        num_frames=25,
        num_inference_steps=25,
        guidance_scale=best["guidance"],
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames
    assert videos.shape == (24, 25, 3, 32, 32)
    got = measured(videos, prompts)
    for name in ("video_accuracy", "direction_accuracy"):
        share = best[name]
        assert got[name] >= share - 4 * (share * (1 - share) / 24) ** 0.5 - 0.01, name
    assert got["speed_error"] < 3 * best["speed_error"]


def test_our_backbone_reads_the_folder_and_its_own_latents():
    CONFIG.check()
    backbone = CONFIG.build(torch.device("cpu"), torch.float32, 0)
    assert backbone.latent_shape == (7, 32, 4, 4)
    latents = backbone.encode(scenes(16)[0])
    assert latents.mean().abs() < 0.1 and latents.std() == pytest.approx(1, abs=0.15)
