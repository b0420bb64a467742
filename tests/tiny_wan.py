"""A complete WanPipeline folder of real diffusers classes at random, tiny sizes, made without the network."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

CHANNELS = 4
TEXT_WIDTH = 16
WORDS = ("a", "cat", "dog", "runs", "sleeps", "red", "blue")


def tiny_wan(
    folder: Path,
    experts: int = 1,
    boundary: float = 0.875,
    scheduler: Any = None,
    layers: int = 4,
    seed: int = 0,
    time_scale: float = 1.0,
    channels: int = CHANNELS,
    patch: int = 2,
    **pipeline_config: Any,
) -> Path:
    """Writes the folder and returns it. The VAE divides sides by 8 and frames by 4, as Wan's; videos of 32 x 32 x 5
    make latents of [2, 4, 4, 4].

    experts: 2 adds a transformer_2 and the boundary. scheduler: shifted Euler by default. time_scale: factor of the
    time input; random networks change with every unit of the timestep, at 0 they follow one smooth flow.
    channels: of the latents. patch: side of the network's patches."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        networks = [transformer(layers, time_scale, channels, patch) for _ in range(experts)]
        tokenizer = t5_tokenizer()
        pipeline = WanPipeline(
            tokenizer=tokenizer,
            text_encoder=umt5_encoder(len(tokenizer)),
            vae=autoencoder(channels),
            scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=5.0),
            transformer=networks[0],
            transformer_2=networks[1] if experts == 2 else None,
            boundary_ratio=boundary if experts == 2 else None,
            **pipeline_config,
        )
        pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def transformer(layers: int, time_scale: float, channels: int = CHANNELS, patch: int = 2) -> WanTransformer3DModel:
    """Its output is made as large as a velocity, and its text and time matter."""
    network = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        patch_size=(1, patch, patch),
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT_WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
    ).eval()
    with torch.no_grad():
        network.proj_out.weight.mul_(3)
        network.condition_embedder.time_embedder.linear_1.weight.mul_(time_scale)
        for block in network.blocks:
            block.attn2.to_out[0].weight.mul_(10)
    return network


def autoencoder(channels: int = CHANNELS) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, 0.2, -0.3, 0.4] * (channels // 4),
        latents_std=[1.5, 0.7, 2.0, 1.1] * (channels // 4),
    ).eval()


def t5_tokenizer() -> T5Tokenizer:
    """One token for each of WORDS; any other word is spelled in characters."""
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    spelled = [("▁", -8.0), *((character, -10.0) for character in characters)]
    known = [(f"▁{word}", -2.0) for word in WORDS]
    return T5Tokenizer(vocab=[*special, *spelled, *known], extra_ids=0, model_max_length=512)


def umt5_encoder(vocabulary: int) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=TEXT_WIDTH,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=1,
        )
    ).eval()
