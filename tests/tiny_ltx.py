"""A complete LTXPipeline folder of real diffusers classes at random, tiny sizes, made without the network."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from tiny_flux import T5_WIDTH, t5_encoder
from tiny_wan import t5_tokenizer

CHANNELS = 4


def tiny_ltx(folder: Path, told: bool = True, seed: int = 0) -> Path:
    """Writes the folder and returns it; videos of 32 x 32 x 9 make latents of [5, 4, 4, 4]. told: whether the VAE is
    told a timestep, as those of 0.9.5 and later are."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = t5_tokenizer()
        pipeline = LTXPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(  # as published
                use_dynamic_shifting=True,
                base_shift=0.95,
                max_shift=2.05,
                base_image_seq_len=1024,
                max_image_seq_len=4096,
                shift_terminal=0.1,
            ),
            vae=ltx_vae(told),
            text_encoder=t5_encoder(len(tokenizer)),
            tokenizer=tokenizer,
            transformer=ltx_transformer(),
        )
    pipeline.save_pretrained(folder)
    return folder


def ltx_transformer() -> LTXVideoTransformer3DModel:
    """Its output is made as large as a velocity, and its text matters."""
    network = LTXVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=4,
        caption_channels=T5_WIDTH,
    ).eval()
    with torch.no_grad():
        network.proj_out.weight.mul_(3)
        for block in network.transformer_blocks:
            block.attn2.to_out[0].weight.mul_(10)
    return network


def ltx_vae(told: bool) -> AutoencoderKLLTXVideo:
    vae = AutoencoderKLLTXVideo(
        latent_channels=CHANNELS,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D", "LTXVideoDownBlock3D"),
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False, False, False),
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        timestep_conditioning=told,
    ).eval()
    vae.latents_mean.copy_(torch.tensor([0.1, 0.2, -0.3, 0.4]))
    vae.latents_std.copy_(torch.tensor([1.5, 0.7, 2.0, 1.1]))
    return vae
