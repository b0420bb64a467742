"""Image-to-video pipelines of Wan, of real diffusers classes at random, tiny sizes, made without the network."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from tiny_wan import CHANNELS, TEXT_WIDTH, autoencoder, t5_tokenizer, umt5_encoder
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

IMAGE_WIDTH = 8
KINDS = ("clip", "experts", "first frame", "vace")  # Wan 2.1 I2V, Wan 2.2 I2V A14B, Wan 2.2 TI2V 5B and VACE


def tiny_wan_i2v(folder: Path, kind: str, seed: int = 0, boundary: float = 0.9) -> Path:
    """Writes the folder and returns it; "first frame" is stored as a WanPipeline, as TI2V 5B is."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, first = t5_tokenizer(), kind == "first frame"
        parts: dict[str, Any] = {
            "tokenizer": tokenizer,
            "text_encoder": umt5_encoder(len(tokenizer)),
            "vae": patched_autoencoder() if first else autoencoder(),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
            "transformer": image_transformer(CHANNELS if first else 2 * CHANNELS + 4, kind == "clip"),
        }
        if kind == "vace":
            pipeline: Any = WanVACEPipeline(**parts | {"transformer": vace_transformer()})
        elif first:
            pipeline = WanPipeline(**parts, expand_timesteps=True)
        elif kind == "experts":
            parts["transformer_2"] = image_transformer(2 * CHANNELS + 4, False)
            pipeline = WanImageToVideoPipeline(**parts, boundary_ratio=boundary)
        else:
            encoder, processor = clip_vision(), CLIPImageProcessor(size=16, crop_size={"height": 16, "width": 16})
            pipeline = WanImageToVideoPipeline(**parts, image_encoder=encoder, image_processor=processor)
        pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def image_transformer(channels: int, told: bool) -> WanTransformer3DModel:
    """Its output is made as large as a velocity, and its text, time and image matter. told: whether it is told CLIP's
    features of the image."""
    network = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        image_dim=IMAGE_WIDTH if told else None,
        added_kv_proj_dim=24 if told else None,
    ).eval()
    with torch.no_grad():
        network.proj_out.weight.mul_(3)
        for block in network.blocks:
            block.attn2.to_out[0].weight.mul_(10)
    return network


def vace_transformer() -> WanVACETransformer3DModel:
    """Its output is made as large as a velocity, and its text and control matter."""
    network = WanVACETransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        vace_layers=[0, 1],
        vace_in_channels=2 * CHANNELS + 64,
    ).eval()
    with torch.no_grad():
        network.proj_out.weight.mul_(3)
        for block in network.blocks:
            block.attn2.to_out[0].weight.mul_(10)
        for block in (*network.blocks, *network.vace_blocks):
            block.attn1.to_out[0].weight.mul_(10)
        for block in network.vace_blocks:
            block.proj_out.weight.normal_(std=0.3)
    return network


def clip_vision() -> CLIPVisionModel:
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=IMAGE_WIDTH,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    ).eval()


def patched_autoencoder() -> AutoencoderKLWan:
    """As that of TI2V 5B: residual, on patches of 2 x 2 pixels. It divides sides by 16 and frames by 4."""
    return AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, 0.2, -0.3, 0.4],
        latents_std=[1.5, 0.7, 2.0, 1.1],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    ).eval()
