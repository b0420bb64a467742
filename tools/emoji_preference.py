"""The preference model of the emoji world: a CLIP in PickScore's layout that tells a good picture of a caption from a
worse one.

It is the CLIP of the emoji world, trained further on pairs (PickScore, arXiv 2305.01569: the softmax over two scores).
Nobody was asked for a preference: the better picture of a pair is a real one of the caption, and the worse one is the
same picture made worse, or a mixture with another picture, as few-step students make it, or another picture."""

from pathlib import Path

import torch
import torch.nn.functional as F
from emoji_clip import augmented, image_features, read_clip, text_features, tokens_of
from emoji_pictures import SIZE, WORDINGS, split, weights
from torch import Tensor
from training import optimizers, train

BATCH = 48
LEARNING_RATE = 1e-3  # of Muon; AdamW has a tenth


def worse(pixels: Tensor) -> Tensor:
    """Pictures [B, 3, S, S] in [0, 1] made worse, each in one of five ways: blurred, noisy, in coarse blocks, faded
    towards white, or mixed with the next picture of the batch."""
    rows = len(pixels)
    amount = 0.3 + 0.7 * torch.rand(rows, 1, 1, 1)
    small = F.interpolate(pixels, size=SIZE // 4, mode="area")
    ways = (
        torch.lerp(pixels, F.interpolate(small, size=SIZE, mode="bilinear", align_corners=False), amount),
        (pixels + 0.4 * amount * torch.randn_like(pixels)).clamp(0, 1),
        torch.lerp(pixels, F.interpolate(small, size=SIZE, mode="nearest"), amount),
        torch.lerp(pixels, torch.ones_like(pixels), 0.7 * amount),
        torch.lerp(pixels, pixels.roll(1, 0), 0.5 * amount),
    )
    return torch.stack(ways)[torch.randint(len(ways), (rows,)), torch.arange(rows)]


def train_preference(folder: Path, clip_folder: Path, work: Path, seed: int, steps: int, bf16: bool) -> None:
    """Train it on the pictures that are not held out; write it, in float16, with its tokenizer into `folder`. Prints
    the share of held-out pairs in which it prefers the better picture."""
    torch.manual_seed(seed)
    emoji, pixels = split(work, held=False)
    clip, tokenizer = read_clip(clip_folder)
    clip.train().requires_grad_(True)
    clip.logit_scale.requires_grad_(False)
    ids, often = tokens_of(tokenizer, emoji), weights(emoji)

    def losses(step: int, steps: int) -> dict[str, Tensor]:
        rows = torch.multinomial(often, BATCH)
        real = pixels[rows].float() / 255
        other = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.2, real.roll(1, 0), worse(real))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            image = image_features(clip, torch.cat([augmented(real), augmented(other)])).float()
            text = text_features(clip, ids[rows, torch.randint(len(WORDINGS), (BATCH,))]).float()
        better, less = (clip.logit_scale.exp() * (image.unflatten(0, (2, -1)) * text).sum(-1)).unbind()
        return {"loss": F.softplus(less - better).mean(), "right": (better > less).float().mean()}

    matrices = [p for name, p in clip.named_parameters() if p.ndim >= 2 and "embed" not in name]
    others = [p for p in clip.parameters() if p.requires_grad and not any(p is q for q in matrices)]
    averaged = train(
        clip,
        losses,
        optimizers(matrices, others, LEARNING_RATE, LEARNING_RATE / 10),
        steps,
        seed,
        work / "preference",
        0.99,
    )
    averaged.eval().half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"prefers the better of held-out pairs: {preferred(folder, work, seed):.3f}")


@torch.no_grad()
def preferred(folder: Path, work: Path, seed: int) -> float:
    """The share of held-out pictures that it prefers to the same picture made worse."""
    clip, tokenizer = read_clip(folder)
    emoji, pixels = split(work, held=True)
    real = pixels.float() / 255
    torch.manual_seed(seed)
    other, text = worse(real), text_features(clip, tokens_of(tokenizer, emoji)[:, 0])
    better, less = ((image_features(clip, x) * text).sum(-1) for x in (real, other))
    return (better > less).float().mean().item()
