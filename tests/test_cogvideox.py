"""CogVideoX: rotary positions, patches of two frames, its noise in stock schedulers, negative prompts, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline
from tiny_cogvideox import NOISE, tiny_cogvideox
from tiny_families import FAMILIES, PROMPTS, draws
from variants import slow

from fastgen.backbones.cogvideox import CogVideoXConfig
from fastgen.backbones.discrete import noise_schedule
from fastgen.pipelines.schedulers import table_noise
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.sampler import Sampler, teacher_sampler

FAMILY = FAMILIES["cogvideox"]


@pytest.mark.parametrize(
    ("options", "frames"),
    [({"five": True, "sample_height": 8, "sample_width": 6}, 9), slow(({"five": True, "patch_size_t": 2}, 9))],
    ids=["5b", "1.5"],
)
def test_rotary_positions_are_those_of_the_pipeline(tmp_path: Path, options: dict[str, Any], frames: int) -> None:
    """Of 5B at another size than it was trained at, and of 1.5, whose tokens are of two latent frames. The scheduler
    of the folder is a multi-step solver."""
    backbone = FAMILY.make(tiny_cogvideox(tmp_path, **options), num_frames=frames, negative_prompt="a cat")
    ours = teacher_sampler(backbone, 2, 3.0).sample(PROMPTS, [3, 1])
    call = {"num_frames": frames, "guidance_scale": 3.0, "negative_prompt": ["a cat"] * 2}
    theirs, _ = FAMILY.plain_pixels(tmp_path, backbone, 2, **call)
    assert ours.shape == (2, frames, 3, 32, 32)
    assert float((ours - theirs).abs().max()) < 1e-4
    assert backbone.encode(ours).shape == (2, *backbone.latent_shape)


def test_the_noise_of_its_schedulers_is_kept_to_the_last_digit(tmp_path: Path) -> None:
    """alpha^2 is the same, also at the end, where no signal is left; and so are the pipeline's own steps."""
    for shift in (1.0, 3.0):
        own = CogVideoXDDIMScheduler(**NOISE | {"timestep_spacing": "trailing"}, snr_shift_scale=shift)
        scheduler = CogVideoXDDIMScheduler.from_config(own.config)
        stock = noise_schedule(type("S", (), {"betas": 0, "config": table_noise(own.alphas_cumprod, "v_prediction")}))
        assert float((stock.table[1:] - own.alphas_cumprod).abs().max()) < 1e-6
        assert stock.table[-1] == own.alphas_cumprod[-1] == 0
        assert scheduler.alphas_cumprod.equal(own.alphas_cumprod)


def test_one_step_of_the_pipeline_with_its_own_scheduler_is_ours(tmp_path: Path) -> None:
    """With trailing steps, CogVideoXDDIMScheduler itself makes the steps of our teacher."""
    tiny_cogvideox(tmp_path)
    own = CogVideoXDDIMScheduler(**NOISE | {"timestep_spacing": "trailing"}, snr_shift_scale=3.0)
    own.save_pretrained(tmp_path / "scheduler")
    backbone = FAMILY.make(tmp_path)
    pipeline = CogVideoXPipeline.from_pretrained(tmp_path)
    assert isinstance(pipeline.scheduler, CogVideoXDDIMScheduler)
    pipeline.set_progress_bar_config(disable=True)
    latents, size = draws(backbone, "initial"), {"height": 32, "width": 32, "num_frames": FAMILY.num_frames}
    call = {"max_sequence_length": 12, "num_inference_steps": 4, "output_type": "np", **size}
    theirs = torch.from_numpy(pipeline(PROMPTS, guidance_scale=1, latents=latents, **call).frames).movedim(-1, -3)
    ours = teacher_sampler(backbone, 4, 1.0).sample(PROMPTS, [3, 1])
    assert float((ours - theirs).abs().max()) < 1e-4


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"num_frames must be 8 k \+ 1, got 5; the nearest are 1 and 9"):
        FAMILY.make(FAMILY.folder(tmp_path / "2b"), num_frames=5)
    with pytest.raises(ValueError, match=r"height must be a multiple of 16, got 24"):
        FAMILY.make(tmp_path / "2b", height=24)
    with pytest.raises(ValueError, match="it is given an image"):
        FAMILY.make(tiny_cogvideox(tmp_path / "i2v", in_channels=8))
    with pytest.raises(ValueError, match="evenly spaced"):
        CogVideoXConfig(path="org/name").check_export(RolloutPolicy((1.0, 0.857, 0.666, 0.4)))


def test_the_card_of_an_export_calls_it_as_it_was_trained(tmp_path: Path) -> None:
    backbone = FAMILY.make(FAMILY.folder(tmp_path))
    policy = RolloutPolicy((1.0, 0.5), "tcd", eta=0.3)
    text = backbone.usage(policy, tmp_path, adapter=False)
    assert "height=32, width=32, num_frames=9" in text and "eta=0.3" in text and "max_sequence_length=12" in text
    assert "50 steps instead of 2 and guidance scale 6 instead of 1" in backbone.plain_call(policy, False)
    student = backbone.load("student")
    assert Sampler(backbone, student, policy).sample(PROMPTS, [3, 1]).shape == (2, 9, 3, 32, 32)
