"""A complete LTX2Pipeline folder of real diffusers classes at random, tiny sizes, made without the network."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from tiny_sana import gemma_tokenizer
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

CHANNELS, TEXT_WIDTH, LAYERS, REGISTERS = 4, 16, 2, 4


def tiny_ltx2(folder: Path, newer: bool = False, seed: int = 0) -> Path:
    """Writes the folder and returns it; videos of 32 x 32 x 9 at 24 frames per second make 5 x 4 x 4 tokens of 4
    numbers, and 9 of their sound. newer: as 2.3, whose text is told the level, and its attention gated."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = gemma_tokenizer()
        pipeline = LTX2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(  # as LTX-Video's
                use_dynamic_shifting=True,
                base_shift=0.95,
                max_shift=2.05,
                base_image_seq_len=1024,
                max_image_seq_len=4096,
                shift_terminal=0.1,
            ),
            vae=video_vae(),
            audio_vae=sound_vae(),
            text_encoder=gemma3(len(tokenizer)),
            tokenizer=tokenizer,
            connectors=connectors(newer),
            transformer=ltx2_transformer(newer),
            vocoder=vocoder(),
        )
    pipeline.save_pretrained(folder)
    return folder


def ltx2_transformer(newer: bool) -> LTX2VideoTransformer3DModel:
    """Its outputs are made as large as a velocity, and its text and its other part matter."""
    network = LTX2VideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=CHANNELS,
        audio_out_channels=CHANNELS,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=4,
        caption_channels=TEXT_WIDTH,
        vae_scale_factors=(2, 8, 8),
        rope_type="split",
        gated_attn=newer,
        audio_gated_attn=newer,
        cross_attn_mod=newer,
        audio_cross_attn_mod=newer,
        use_prompt_embeddings=not newer,
        perturbed_attn=newer,
    ).eval()
    with torch.no_grad():
        for projection in (network.proj_out, network.audio_proj_out):
            projection.weight.mul_(3)
        for block in network.transformer_blocks:
            for attention in (block.attn2, block.audio_attn2, block.audio_to_video_attn, block.video_to_audio_attn):
                attention.to_out[0].weight.mul_(10)
    return network


def gemma3(vocabulary: int) -> Gemma3ForConditionalGeneration:
    """Its vision model is as small as it can be: the stock pipeline gives it no images."""
    config = Gemma3Config(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 32,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
        },
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 14,
            "patch_size": 14,
        },
        mm_tokens_per_image=1,
        image_token_index=vocabulary - 1,
    )
    return Gemma3ForConditionalGeneration(config).eval()


def connectors(newer: bool) -> LTX2TextConnectors:
    return LTX2TextConnectors(
        caption_channels=TEXT_WIDTH,
        text_proj_in_factor=LAYERS + 1,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=REGISTERS,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=4 if newer else 8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=REGISTERS,
        rope_type="split",
        video_gated_attn=newer,
        audio_gated_attn=newer,
        per_modality_projections=newer,
        video_hidden_dim=16,
        audio_hidden_dim=8,
        proj_bias=newer,
    ).eval()


def video_vae() -> AutoencoderKLLTX2Video:
    vae = AutoencoderKLLTX2Video(
        latent_channels=CHANNELS,
        block_out_channels=(8,),
        down_block_types=("LTX2VideoDownBlock3D",),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatiotemporal",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
    ).eval()
    vae.latents_mean.copy_(torch.tensor([0.1, 0.2, -0.3, 0.4]))
    vae.latents_std.copy_(torch.tensor([1.5, 0.7, 2.0, 1.1]))
    return vae


def sound_vae() -> AutoencoderKLLTX2Audio:
    vae = AutoencoderKLLTX2Audio(
        base_channels=CHANNELS,
        ch_mult=(1, 1, 1),
        num_res_blocks=1,
        in_channels=2,
        output_channels=2,
        latent_channels=2,
        resolution=8,
        mel_bins=8,
    ).eval()
    vae.latents_mean.copy_(torch.tensor([-0.2, 0.1, 0.3, 0.0]))
    vae.latents_std.copy_(torch.tensor([0.8, 1.2, 1.0, 1.4]))
    return vae


def vocoder() -> LTX2Vocoder:
    return LTX2Vocoder(
        in_channels=16,
        hidden_channels=8,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3]],
        output_sampling_rate=16000,
    ).eval()
