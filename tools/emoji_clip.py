"""The CLIP of the emoji world: a tiny CLIPModel that tells which caption belongs to which picture."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from emoji_pictures import SIZE, WORDINGS, Emoji, every_prompt, split, weights
from torch import Tensor, nn
from training import optimizers, train
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from fastgen.rewards.images import normalise

LENGTH = 24  # tokens of a caption, at most
TOKENS = 4000  # of the tokenizer
WIDTH, PROJECTION = 128, 96
BATCH = 96


def tokenizer_of(work: Path) -> CLIPTokenizer:
    """A byte-pair tokenizer of TOKENS tokens for the captions. It is trained once and kept in `work`, because the
    numbers that its training gives the tokens differ from process to process."""
    if (folder := work / "tokenizer").is_dir():
        return CLIPTokenizer.from_pretrained(folder)
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    start = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=LENGTH)
    start.train_new_from_iterator(every_prompt(work), TOKENS).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    tower = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {
        **tower,
        **special,
        "num_hidden_layers": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": LENGTH,
    }
    vision = {**tower, "num_hidden_layers": 4, "image_size": SIZE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION))


def tokens_of(tokenizer: CLIPTokenizer, emoji: list[Emoji]) -> Tensor:
    """[N, wordings, LENGTH]: the tokens of every wording of every caption."""
    texts = [e.prompt(wording) for e in emoji for wording in range(len(WORDINGS))]
    ids = tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    if ids.shape[1] > LENGTH:
        raise ValueError(f"a caption has {ids.shape[1]} tokens, more than {LENGTH}")
    return ids.view(len(emoji), len(WORDINGS), LENGTH)


def augmented(pixels: Tensor) -> Tensor:
    """Pictures [B, 3, S, S] in [0, 1] moved by up to 4 pixels and scaled by up to 12 %, on white; half of them with
    noise or blur, so that the features are smooth where a generator errs."""
    rows = len(pixels)
    scale = 1 + 0.12 * (2 * torch.rand(rows) - 1)
    move = (2 * torch.rand(rows, 2) - 1) / 8
    matrix = torch.zeros(rows, 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, :, 2] = scale, scale, move
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    moved = 1 - F.grid_sample(1 - pixels, grid, align_corners=False)  # 1 - x: what comes in is white
    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, 1)
    noisy = moved + 0.15 * torch.rand(rows, 1, 1, 1) * torch.randn_like(moved)
    kind = torch.rand(rows, 1, 1, 1)
    return torch.where(kind < 0.25, blurred, torch.where(kind < 0.5, noisy, moved)).clamp(0, 1)


def image_features(clip: CLIPModel, pixels: Tensor) -> Tensor:
    """[B, PROJECTION] of length 1, of pixels [B, 3, S, S] in [0, 1]."""
    pooled = clip.vision_model(pixel_values=normalise(pixels)).pooler_output
    return F.normalize(clip.visual_projection(pooled), dim=-1)


def text_features(clip: CLIPModel, ids: Tensor) -> Tensor:
    """[B, PROJECTION] of length 1."""
    return F.normalize(clip.text_projection(clip.text_model(input_ids=ids).pooler_output), dim=-1)


def train_clip(folder: Path, work: Path, seed: int, steps: int, bf16: bool) -> None:
    """Train CLIP on the pictures that are not held out; write it, in float16, with its tokenizer into
    `folder`."""
    torch.manual_seed(seed)
    emoji, pixels = split(work, held=False)
    tokenizer = tokenizer_of(work)
    clip, ids, often = new_clip(tokenizer), tokens_of(tokenizer, emoji), weights(emoji)

    def losses(step: int, steps: int) -> dict[str, Tensor]:
        rows = torch.multinomial(often, BATCH)
        captions = ids[rows, torch.randint(len(WORDINGS), (BATCH,))]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            image = image_features(clip, augmented(pixels[rows].float() / 255))
            text = text_features(clip, captions)
        logits = clip.logit_scale.exp().clamp(max=100) * image.float() @ text.float().T
        target = torch.arange(BATCH)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        right = (logits.argmax(1) == target).float().mean()
        return {"loss": loss, "right": right}

    matrices = [p for p in clip.parameters() if p.ndim >= 2 and "embed" not in name_of(clip, p)]
    others = [p for p in clip.parameters() if not any(p is q for q in matrices)]
    averaged = train(clip, losses, optimizers(matrices, others, 0.01, 2e-3), steps, seed, work / "clip", 0.998)
    with torch.no_grad():
        averaged.logit_scale.clamp_(max=math.log(100))
    averaged.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def name_of(module: nn.Module, parameter: nn.Parameter) -> str:
    return next(name for name, p in module.named_parameters() if p is parameter)


def read_clip(folder: Path) -> tuple[CLIPModel, CLIPTokenizer]:
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    return clip, CLIPTokenizer.from_pretrained(folder)


@torch.no_grad()
def retrieval(clip: CLIPModel, tokenizer: CLIPTokenizer, emoji: list[Emoji], pixels: Tensor) -> dict[str, float]:
    """How well captions and pictures [N, 3, S, S] in [0, 1] find each other among the N: the share of pictures whose
    own caption is nearest, and among the five nearest; the share of captions whose own picture is; and their mean
    cosine. Equal captions count as one."""
    texts = [e.prompt(0) for e in emoji]
    unique = sorted(set(texts))
    own = torch.tensor([unique.index(text) for text in texts])
    ids = tokenizer(unique, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    text = text_features(clip, ids)
    image = torch.cat([image_features(clip, part) for part in pixels.split(256)])
    cosine = image @ text.T
    best = cosine.topk(5, dim=1).indices
    found = cosine[:, own].argmax(0)  # the nearest picture of each row's caption
    return {
        "caption_of_picture": (best[:, 0] == own).float().mean().item(),
        "caption_in_five": (best == own[:, None]).any(1).float().mean().item(),
        "picture_of_caption": (own[found] == own).float().mean().item(),
        "cosine": cosine[torch.arange(len(own)), own].mean().item(),
    }
