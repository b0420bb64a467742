"""A complete ZImagePipeline folder of real diffusers classes at random, tiny sizes, made without the network."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tiny_flux import flux_vae
from tiny_qwen import TEXT_WIDTH, qwen_tokenizer
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_z_image(folder: Path, seed: int = 0) -> Path:
    """Writes the folder and returns it; images of 32 x 32 pixels make latents of [4, 16, 16]."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = chat_tokenizer()
        pipeline = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),  # as published
            vae=flux_vae(),
            text_encoder=Qwen3Model(qwen3_config(len(tokenizer))).eval(),
            tokenizer=tokenizer,
            transformer=z_image_transformer(),
        )
    pipeline.save_pretrained(folder)
    return folder


def z_image_transformer() -> ZImageTransformer2DModel:
    """Its output is made as large as a velocity, and its text matters."""
    network = ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[8, 8, 8],
        axes_lens=[128, 16, 16],
    ).eval()
    with torch.no_grad():
        for layer in network.all_final_layer.values():
            layer.linear.weight.mul_(3)
    return network


def chat_tokenizer() -> Qwen2Tokenizer:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen3_config(vocabulary: int, layers: int = 3) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.5,
    )
