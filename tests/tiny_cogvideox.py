"""A complete CogVideoXPipeline folder of real diffusers classes at random, tiny sizes, made without the network."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from tiny_flux import T5_WIDTH, t5_encoder
from tiny_wan import t5_tokenizer

CHANNELS, LENGTH = 4, 12
# the scheduler of the published 2B; that of 5B has snr_shift_scale 1
NOISE: dict[str, Any] = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "clip_sample": False,
    "timestep_spacing": "linspace",
}


def tiny_cogvideox(folder: Path, five: bool = False, seed: int = 0, **options: Any) -> Path:
    """Writes the folder and returns it; videos of 32 x 32 x 9 make latents of [3, 4, 4, 4]. five: as 5B, with rotary
    positions and a multi-step scheduler; else as 2B. options: other sizes of the network."""
    cls = CogVideoXDPMScheduler if five else CogVideoXDDIMScheduler
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = t5_tokenizer()
        pipeline = CogVideoXPipeline(
            tokenizer=tokenizer,
            text_encoder=t5_encoder(len(tokenizer)),
            vae=cogvideox_vae(),
            transformer=cogvideox_transformer(use_rotary_positional_embeddings=five, **options),
            scheduler=cls(**NOISE, snr_shift_scale=1.0 if five else 3.0),
        )
    pipeline.save_pretrained(folder)
    return folder


def cogvideox_transformer(**options: Any) -> CogVideoXTransformer3DModel:
    """Its output is made as large as a velocity, and its text matters."""
    sizes: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "time_embed_dim": 16,
        "text_embed_dim": T5_WIDTH,
        "num_layers": 4,
        "sample_width": 4,
        "sample_height": 4,
        "sample_frames": 9,
        "max_text_seq_length": LENGTH,
    }
    network = CogVideoXTransformer3DModel(**sizes | options).eval()
    with torch.no_grad():
        network.proj_out.weight.mul_(3)
        network.patch_embed.text_proj.weight.mul_(10)
    return network


def cogvideox_vae() -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), latent_channels=CHANNELS, layers_per_block=1, norm_num_groups=2
    ).eval()
