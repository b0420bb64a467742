"""A complete HunyuanVideo15Pipeline folder of real diffusers classes at tiny sizes, made without the network."""

import inspect
import re
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from tiny_qwen import TEXT_WIDTH, qwen_tokenizer
from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, T5Config, T5EncoderModel

CHANNELS, GLYPH_WIDTH = 4, 8
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_hunyuan(folder: Path, seed: int = 0) -> Path:
    """Writes the folder and returns it; videos of 32 x 32 x 5 make latents of [2, 4, 8, 8]."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = instruction_tokenizer()
        pipeline = HunyuanVideo15Pipeline(
            text_encoder=qwen_text_model(len(tokenizer)),
            tokenizer=tokenizer,
            transformer=hunyuan_transformer(),
            vae=hunyuan_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            text_encoder_2=byt5_encoder(),
            tokenizer_2=ByT5Tokenizer(),
            guider=ClassifierFreeGuidance(guidance_scale=6.0),
        )
    pipeline.save_pretrained(folder)
    return folder


def instruction_tokenizer() -> "object":
    """One token for each word of the pipeline's instruction and for each of its indents, so that the instruction is
    hardly longer than the 108 tokens that the pipeline drops, and Qwen's chat template."""
    defaults = inspect.signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters
    words = re.findall("[A-Za-z]+", defaults["system_message"].default)
    tokenizer = qwen_tokenizer(words=[*dict.fromkeys(words), "Ġ" * 6])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def qwen_text_model(vocabulary: int) -> Qwen2_5_VLTextModel:
    config = Qwen2_5_VLTextConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen2_5_VLTextModel(config).eval()


def byt5_encoder() -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(ByT5Tokenizer()),
        d_model=GLYPH_WIDTH,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


def hunyuan_transformer() -> HunyuanVideo15Transformer3DModel:
    """Its output is made as large as a velocity, and its text matters."""
    network = HunyuanVideo15Transformer3DModel(
        in_channels=2 * CHANNELS + 1,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=4,
        num_refiner_layers=1,
        text_embed_dim=TEXT_WIDTH,
        text_embed_2_dim=GLYPH_WIDTH,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
        task_type="t2v",
    ).eval()
    with torch.no_grad():
        network.proj_out.weight.mul_(3)
        network.context_embedder.proj_in.weight.mul_(5)
        network.context_embedder_2.linear_3.weight.mul_(5)
    return network


def hunyuan_vae() -> AutoencoderKLHunyuanVideo15:
    return AutoencoderKLHunyuanVideo15(
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    ).eval()
