"""A complete QwenImagePipeline folder of real diffusers classes at random, tiny sizes, made without the network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

TEXT_WIDTH = 16
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")  # of prompts with an image
# The words of the pipeline's template, so that its beginning has the 34 tokens that the pipeline drops, and some more.
FIRST = ["system", "Describe", "user", "assistant", "two"]
LATER = [
    "the",
    "image",
    "by",
    "detailing",
    "color",
    "shape",
    "size",
    "texture",
    "quantity",
    "text",
    "spatial",
    "relationships",
    "of",
    "objects",
    "and",
    "background",
    "red",
    "cat",
    "green",
]
# The other words of the template with an image, whose first 64 tokens are dropped.
EDIT_WORDS = [
    "key",
    "features",
    "input",
    "then",
    "explain",
    "how",
    "user",
    "instruction",
    "should",
    "alter",
    "or",
    "modify",
    "Generate",
    "a",
    "new",
    "that",
    "meets",
    "requirements",
    "while",
    "maintaining",
    "consistency",
    "with",
    "original",
    "where",
    "appropriate",
]
SCHEDULER: dict[str, Any] = {  # as published
    "use_dynamic_shifting": True,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift_terminal": 0.02,
}


def tiny_qwen(folder: Path, seed: int = 0) -> Path:
    """Writes the folder and returns it; images of 32 x 32 pixels make latents of [4, 16, 16]."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = qwen_tokenizer()
        pipeline = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
            vae=qwen_vae(),
            text_encoder=qwen_encoder(tokenizer),
            tokenizer=tokenizer,
            transformer=qwen_transformer(),
        )
    pipeline.save_pretrained(folder)
    return folder


def tiny_qwen_edit(folder: Path, seed: int = 0) -> Path:
    """A QwenImageEditPipeline of the same networks. Its text encoder sees a picture as 4 tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = qwen_tokenizer(SPECIAL + VISION, EDIT_WORDS)
        sizes = {"min_pixels": 56 * 56, "max_pixels": 56 * 56}
        pipeline = QwenImageEditPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
            vae=qwen_vae(),
            text_encoder=qwen_encoder(tokenizer),
            tokenizer=tokenizer,
            processor=Qwen2VLProcessor(Qwen2VLImageProcessor(**sizes), tokenizer, Qwen2VLVideoProcessor(**sizes)),
            transformer=qwen_transformer(),
        )
    pipeline.save_pretrained(folder)
    return folder


def qwen_transformer() -> QwenImageTransformer2DModel:
    """Its output is made as large as a velocity, and its text matters."""
    network = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    with torch.no_grad():
        network.proj_out.weight.mul_(3)
    return network


def qwen_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, 0.2, -0.3, 0.4],
        latents_std=[1.5, 0.7, 2.0, 1.1],
    ).eval()


def qwen_tokenizer(special: tuple[str, ...] = SPECIAL, words: Sequence[str] = ()) -> Qwen2Tokenizer:
    """One token for each word of FIRST, and for each of LATER and of `words` after a space; any other word is spelled
    in bytes."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    merges = []
    for word in [*(f"Ġ{word}" for word in [*LATER, *words]), *FIRST]:
        for end in range(1, len(word)):
            if word[: end + 1] not in vocabulary:
                vocabulary[word[: end + 1]] = len(vocabulary)
                merges.append((word[:end], word[end]))
    tokenizer = Qwen2Tokenizer(vocab=vocabulary | {special[0]: len(vocabulary)}, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special[1:])})
    return tokenizer


def qwen_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 1,
        "out_hidden_size": TEXT_WIDTH,
        "fullatt_block_indexes": [0],
    }
    known = tokenizer.get_vocab()
    ids = {f"{name}_token_id": known.get(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    ids |= {f"{kind}_token_id": known.get(f"<|{kind}_pad|>") for kind in ("image", "video")}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, **{name: value for name, value in ids.items() if value is not None}
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()
