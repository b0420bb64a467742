"""Flux2Pipeline and Flux2KleinPipeline folders of real diffusers classes at random, tiny sizes, made offline.

The stock calls read the layers 10, 20 and 30 of dev's text encoder, and 9, 18 and 27 of klein's, so that these have as
many, very narrow ones."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from tiny_qwen import TEXT_WIDTH, qwen_tokenizer
from tiny_z_image import chat_tokenizer, qwen3_config
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    Qwen3ForCausalLM,
)

SCHEDULER: dict[str, Any] = {"use_dynamic_shifting": True, "shift": 3.0}  # as published
# the user's text alone: with the system message, every prompt would be cut to the same first words
CHAT = (
    "{% for m in messages if m.role == 'user' %}{% for c in m.content %}{{ c.text }}{% endfor %}<|im_end|>{% endfor %}"
)


def tiny_flux2_dev(folder: Path, seed: int = 0) -> Path:
    """Writes the folder and returns it; images of 32 x 32 pixels make latents of [16, 8, 8]."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = qwen_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]})
        pipeline = Flux2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
            vae=flux2_vae(),
            text_encoder=mistral3(len(tokenizer)),
            tokenizer=PixtralProcessor(PixtralImageProcessor(), tokenizer, patch_size=16, chat_template=CHAT),
            transformer=flux2_transformer(guided=True),
        )
    pipeline.save_pretrained(folder)
    return folder


def tiny_flux2_klein(folder: Path, distilled: bool = False, seed: int = 0) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = chat_tokenizer()
        pipeline = Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
            vae=flux2_vae(),
            text_encoder=Qwen3ForCausalLM(qwen3_config(len(tokenizer), layers=27)).eval(),
            tokenizer=tokenizer,
            transformer=flux2_transformer(guided=False),
            is_distilled=distilled,
        )
    pipeline.save_pretrained(folder)
    return folder


def flux2_transformer(guided: bool) -> Flux2Transformer2DModel:
    """Its output is made as large as a velocity."""
    network = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * TEXT_WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guided,
    ).eval()
    with torch.no_grad():
        network.proj_out.weight.mul_(3)
    return network


def flux2_vae() -> AutoencoderKLFlux2:
    """Pixels to latents of half the size, with statistics that no two channels share."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
        mid_block_add_attention=False,
    ).eval()
    vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2, 16))
    return vae


def mistral3(vocabulary: int) -> Mistral3ForConditionalGeneration:
    text = {
        "model_type": "mistral",
        "vocab_size": vocabulary,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 30,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "initializer_range": 0.5,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "patch_size": 16,
        "image_size": 32,
    }
    config = Mistral3Config(text_config=text, vision_config=vision, spatial_merge_size=1)
    return Mistral3ForConditionalGeneration(config).eval()
