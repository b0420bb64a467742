"""A complete PixArtSigmaPipeline folder of real diffusers classes at random, tiny sizes, made without the network."""

from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from tiny_flux import T5_WIDTH, t5_encoder
from tiny_pipelines import tiny_vae
from tiny_wan import t5_tokenizer


def tiny_pixart(folder: Path, seed: int = 0) -> Path:
    """Writes the folder and returns it; images of 32 x 32 pixels make latents of [4, 16, 16]."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = t5_tokenizer()
        pipeline = PixArtSigmaPipeline(
            tokenizer=tokenizer,
            text_encoder=t5_encoder(len(tokenizer)),
            vae=tiny_vae(scaling_factor=0.13025),
            transformer=pixart_transformer(),
            scheduler=DPMSolverMultistepScheduler(),  # its defaults are those of the published pipelines
        )
    pipeline.save_pretrained(folder)
    return folder


def pixart_transformer() -> PixArtTransformer2DModel:
    """Its output is made as large as noise, and its text matters."""
    network = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=4,
        cross_attention_dim=32,
        sample_size=16,
        caption_channels=T5_WIDTH,
        use_additional_conditions=False,
    ).eval()
    with torch.no_grad():
        network.proj_out.weight.mul_(3)
        for block in network.transformer_blocks:
            block.attn2.to_out[0].weight.mul_(10)
    return network
