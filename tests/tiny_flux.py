"""A complete FluxPipeline folder of real diffusers classes at random, tiny sizes, made without the network."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tiny_pipelines import TEXT_WIDTH, tiny_clip, tiny_tokenizer, tiny_vae
from tiny_wan import t5_tokenizer
from transformers import CLIPTextModel, T5Config, T5EncoderModel

T5_WIDTH = 24


def tiny_flux(folder: Path, guided: bool = True, seed: int = 0) -> Path:
    """Writes the folder and returns it; images of 32 x 32 pixels make latents of [4, 16, 16]. guided: as dev, told a
    guidance scale and with a shift that depends on the resolution; else as schnell."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = t5_tokenizer()
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guided, shift=3.0 if guided else 1.0),
            vae=flux_vae(),
            text_encoder=tiny_clip(CLIPTextModel),
            tokenizer=tiny_tokenizer(),
            text_encoder_2=t5_encoder(len(tokenizer)),
            tokenizer_2=tokenizer,
            transformer=flux_transformer(guided),
        )
    pipeline.save_pretrained(folder)
    return folder


def flux_transformer(guided: bool, **options: Any) -> FluxTransformer2DModel:
    """Two blocks of each kind. Its output is made as large as a velocity."""
    sizes: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": T5_WIDTH,
        "pooled_projection_dim": TEXT_WIDTH,
        "axes_dims_rope": (4, 6, 6),
        "guidance_embeds": guided,
    }
    network = FluxTransformer2DModel(**sizes | options).eval()
    with torch.no_grad():
        network.proj_out.weight.mul_(3)
    return network


def flux_vae() -> AutoencoderKL:
    """As FLUX's: latents that are shifted and scaled, and no quantisation layers."""
    return tiny_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)


def t5_encoder(vocabulary: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocabulary,
        d_model=T5_WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()
