"""A complete SanaPipeline folder of real diffusers classes at random, tiny sizes, made without the network."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

TEXT_WIDTH = 24


def tiny_sana(folder: Path, seed: int = 0) -> Path:
    """Writes the folder and returns it; images of 32 x 32 pixels make latents of [4, 16, 16]."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = gemma_tokenizer()
        pipeline = SanaPipeline(
            tokenizer=tokenizer,
            text_encoder=gemma(len(tokenizer)),
            vae=dc_autoencoder(),
            transformer=sana_transformer(),
            scheduler=DPMSolverMultistepScheduler(
                use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
            ),
        )
    pipeline.save_pretrained(folder)
    return folder


def tiny_sana_sprint(folder: Path, seed: int = 0) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = gemma_tokenizer()
        pipeline = SanaSprintPipeline(
            tokenizer=tokenizer,
            text_encoder=gemma(len(tokenizer)),
            vae=dc_autoencoder(),
            transformer=sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads"),
            scheduler=SCMScheduler(),
        )
    pipeline.save_pretrained(folder)
    return folder


def sana_transformer(**options: Any) -> SanaTransformer2DModel:
    """Its output is made as large as a velocity, and its text matters."""
    network = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=TEXT_WIDTH,
        sample_size=16,
        **options,
    ).eval()
    with torch.no_grad():
        network.proj_out.weight.mul_(3)
        for block in network.transformer_blocks:
            block.attn2.to_out[0].weight.mul_(10)
    return network


def dc_autoencoder() -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        scaling_factor=0.41407,
    ).eval()


def gemma_tokenizer() -> GemmaTokenizer:
    """One token for each printable character."""
    characters = ["▁", "\n", *(chr(code) for code in range(ord("!"), ord("~") + 1))]
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *characters]
    return GemmaTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], add_bos_token=True)


def gemma(vocabulary: int) -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        query_pre_attn_scalar=12,
    )
    return Gemma2Model(config).eval()
