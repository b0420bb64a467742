"""The text parts and the transformer of the moving digits teacher."""

import re
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from make_digits_teacher import t5_tokenizer
from moving_digits_vae import encode
from safetensors.torch import load_file
from torch import Tensor, nn
from training import optimizers, save_whole, train
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from fastgen import noise
from fastgen.data.digits import DIGIT_WORDS
from fastgen.data.moving_digits import DIRECTIONS, SPEEDS, Scenes, draw_scenes, prompt_for, render

FRAMES = 25
LATENTS = 7
TOKENS = 16  # of text
TEXT_WIDTH = 64
LAYERS, HEADS, HEAD_DIM, FFN = 4, 4, 32, 384
SHIFT = 3.0
VIDEOS = 6_000
PIECE = 1_000
PICTURES_UNTIL, CLIPS_UNTIL = 500, 1000  # steps
UNSTATED = 0.1  # of each part of a prompt
UNPROMPTED = 0.1


def prompts() -> list[str]:
    """All prompts, by digit, direction and speed, None last in each; then the empty one."""
    parts = product([*DIGIT_WORDS, None], [*DIRECTIONS, None], [*SPEEDS, None])
    return [*(prompt_for(*words) for words in parts), ""]


def make_text(folder: Path, seed: int) -> None:
    """Write a tokenizer that knows every word of the prompts, and a random, frozen UMT5 encoder.

    Its attention output is zero, so that each token is read on its own; padding is the zero vector."""
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer(sorted(set(re.findall("[a-z]+", " ".join(prompts())))))
    sizes = {"d_model": TEXT_WIDTH, "d_kv": 16, "d_ff": 2 * TEXT_WIDTH, "num_layers": 1, "num_heads": 2}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **sizes, **special))
    nn.init.zeros_(encoder.encoder.block[0].layer[0].SelfAttention.o.weight)
    nn.init.normal_(encoder.shared.weight)
    with torch.no_grad():
        encoder.shared.weight[tokenizer.pad_token_id] = 0
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder.eval().save_pretrained(folder / "text_encoder")


def new_transformer(channels: int) -> WanTransformer3DModel:
    """The untrained transformer; its output begins at zero."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=FFN,
        num_layers=LAYERS,
    )
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def pipeline(folder: Path, transformer: WanTransformer3DModel) -> WanPipeline:
    """The pipeline of the written text parts and autoencoder and this transformer."""
    vae = AutoencoderKLWan.from_pretrained(folder / "vae").eval()
    vae.register_to_config(_name_or_path="")  # where it was read
    return WanPipeline(
        tokenizer=T5Tokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder").eval(),
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )


@torch.no_grad()
def encode_prompts(pipe: WanPipeline) -> Tensor:
    """The embeddings of `prompts()`, [N, TOKENS, TEXT_WIDTH]."""
    return pipe.encode_prompt(prompts(), do_classifier_free_guidance=False, max_sequence_length=TOKENS)[0]


def make_latents(folder: Path, work: Path, seed: int) -> None:
    """Encode VIDEOS training videos once, in pieces; pieces that are there already are kept."""
    vae = AutoencoderKLWan.from_pretrained(folder / "vae").eval()
    key = noise.make_key(seed, "moving digits")
    for piece, ids in enumerate(torch.arange(VIDEOS).split(PIECE)):
        path = work / f"latents-{piece:02d}.safetensors"
        if not path.exists():
            save_whole(encode_scenes(vae, draw_scenes(ids, key)), path)


@torch.no_grad()
def encode_scenes(vae: AutoencoderKLWan, scenes: Scenes) -> dict[str, Tensor]:
    """Normalised latents [N, C, 7, 4, 4] in float16 and the words of each prompt [N, 3]: digit, direction, speed."""
    mean, std = (torch.tensor(vae.config[name])[:, None, None, None] for name in ("latents_mean", "latents_std"))
    video = render(scenes, FRAMES).transpose(1, 2)
    coded = torch.cat([encode(vae, part * 2 - 1)[0] for part in video.split(50)])
    words = torch.stack([scenes.labels, scenes.directions, scenes.speeds], 1)
    return {"latents": ((coded - mean) / std).half(), "words": words}


def read_latents(work: Path) -> tuple[Tensor, Tensor]:
    """The latents and words of all pieces. Raises FileNotFoundError if one is missing."""
    pieces = [load_file(work / f"latents-{piece:02d}.safetensors") for piece in range(VIDEOS // PIECE)]
    return torch.cat([p["latents"] for p in pieces]), torch.cat([p["words"] for p in pieces])


def parts_at(step: int) -> list[tuple[int, int, float]]:
    """(latent frames, samples, shift of the noise levels) of the parts of a batch: single pictures first, then short
    clips, then whole videos, always with single pictures among them."""
    if step < PICTURES_UNTIL:
        return [(1, 128, 1.5)]
    if step < CLIPS_UNTIL:
        return [(1, 32, 1.5), (3, 32, 2.0)]
    return [(1, 16, 1.5), (LATENTS, 16, SHIFT)]


def flow_loss(transformer: WanTransformer3DModel, clean: Tensor, text: Tensor, shift: float) -> Tensor:
    """Flow matching's mean squared error of the velocity, noise minus clean [B, C, F, h, w]."""
    drawn = torch.sigmoid(1.2 * torch.randn(len(clean), device=clean.device))
    t = shift * drawn / (1 + (shift - 1) * drawn)
    gaussian = torch.randn_like(clean)
    noisy = torch.lerp(clean, gaussian, t.view(-1, 1, 1, 1, 1))
    velocity = transformer(noisy, t * 1000, text, return_dict=False)[0]
    return F.mse_loss(velocity, gaussian - clean)


def train_transformer(folder: Path, work: Path, seed: int, steps: int, device: str) -> None:
    """Train the transformer by flow matching on the stored latents; write the whole pipeline."""
    torch.manual_seed(seed)
    latents, drawn = (tensor.to(device) for tensor in read_latents(work))
    transformer = new_transformer(latents.shape[1])
    text = encode_prompts(pipeline(folder, transformer)).to(device)
    transformer = transformer.to(device)
    kinds = torch.tensor([len(DIGIT_WORDS), len(DIRECTIONS), len(SPEEDS)], device=device)

    def losses(step: int, steps: int) -> dict[str, Tensor]:
        total, named = torch.zeros((), device=device), {}
        for frames, samples, shift in parts_at(step):
            rows = torch.randint(len(drawn), (samples,), device=device)
            words = torch.where(torch.rand(samples, 3, device=device) < UNSTATED, kinds, drawn[rows])
            prompt = (words[:, 0] * (kinds[1] + 1) + words[:, 1]) * (kinds[2] + 1) + words[:, 2]
            prompt = torch.where(torch.rand(samples, device=device) < UNPROMPTED, len(text) - 1, prompt)
            loss = flow_loss(transformer, latents[rows, :, :frames].float(), text[prompt], shift)
            total = total + loss * samples * frames
            named[f"latents_{frames}"] = loss.detach()
        return {"loss": total / sum(s * f for f, s, _ in parts_at(step)), **named}

    matrices = [p for p in transformer.blocks.parameters() if p.ndim == 2]
    others = [p for p in transformer.parameters() if not any(p is q for q in matrices)]
    averaged = train(
        transformer, losses, optimizers(matrices, others, 0.01, 2e-3), steps, seed, work / "transformer", 0.999
    )
    pipeline(folder, averaged.cpu()).save_pretrained(folder)
