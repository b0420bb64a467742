"""Complete diffusers pipelines of tiny random networks, as folders: real classes, made in a second, no network."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

PROMPTS = ("a red cat", "two green dogs", "the blue house")
TEXT_WIDTH, TEXT_LENGTH = 16, 16
NOISE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# SDXL's added embedding: pooled text and six sizes of `addition_time_embed_dim` each
XL_UNET = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": TEXT_WIDTH + 6 * 8,
}


def tiny_sd(folder: Path) -> Path:
    """A StableDiffusionPipeline of 32x32 pixels with a DDIMScheduler configured as SD 1.5's scheduler is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusionPipeline(
            vae=tiny_vae(scaling_factor=0.18215),
            text_encoder=tiny_clip(CLIPTextModel),
            tokenizer=tiny_tokenizer(),
            unet=tiny_unet(cross_attention_dim=TEXT_WIDTH),
            scheduler=sd_scheduler("epsilon", "DDIMScheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def tiny_sdxl(folder: Path, second: int = TEXT_WIDTH) -> Path:
    """A StableDiffusionXLPipeline of 32x32 pixels, its scheduler as SDXL's. second: width of the second encoder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusionXLPipeline(
            vae=tiny_vae(scaling_factor=0.13025, force_upcast=True),
            text_encoder=tiny_clip(CLIPTextModel),
            text_encoder_2=tiny_clip(CLIPTextModelWithProjection, second),
            tokenizer=tiny_tokenizer(),
            tokenizer_2=tiny_tokenizer(),
            unet=tiny_unet(
                cross_attention_dim=TEXT_WIDTH + second,
                **XL_UNET | {"projection_class_embeddings_input_dim": second + 6 * 8},
            ),
            scheduler=sd_scheduler("epsilon", "EulerDiscreteScheduler"),
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def with_scheduler(source: Path, folder: Path, name: str, prediction_type: str = "epsilon", **options: Any) -> Path:
    """A copy of a tiny_sd or tiny_sdxl folder with another scheduler."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    scheduler = sd_scheduler(prediction_type, name, **options)
    shutil.rmtree(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scheduler": ["diffusers", name]}))
    return folder


def sd_scheduler(prediction_type: str, name: str, **options: Any) -> Any:
    """A scheduler by class name with those of Stable Diffusion's settings that it knows: leading spacing, an offset
    of one, the last step to step 0."""
    common = {"timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
    cls = getattr(diffusers, name)
    known = inspect.signature(cls).parameters
    config = NOISE | common | {"prediction_type": prediction_type}
    return cls(**{k: v for k, v in config.items() if k in known} | options)


def tiny_unet(**options: Any) -> UNet2DConditionModel:
    """4x16x16 latents, two resolutions, 70 thousand parameters."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        **options,
    )


def tiny_vae(**options: Any) -> AutoencoderKL:
    """Pixels to latents of half the size."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
        **{"mid_block_add_attention": False} | options,
    )


def tiny_tokenizer() -> CLIPTokenizer:
    """Spells every word in letters."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TEXT_LENGTH)


def tiny_clip(cls: type, width: int = TEXT_WIDTH) -> Any:
    """A two-layer CLIP text encoder whose embeddings are large enough to tell prompts apart."""
    tokenizer = tiny_tokenizer()
    encoder = cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    for name, parameter in encoder.named_parameters():
        if "token_embedding" in name or "text_projection" in name:
            nn.init.normal_(parameter, std=1.0)
    return encoder.eval()


def tiny_unet2d(folder: Path) -> Path:
    """A DDPMPipeline, as the published ones: with a DDPMScheduler that clips."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=16,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            norm_num_groups=4,
        ).eval()
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    return folder
