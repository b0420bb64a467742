"""What a sampler believes the sample to be after each of its steps: where the layout of a sample is settled.

The clean predictions of all steps, side by side, show when structure appears and when details do  (Distilling
Diversity and Control in Diffusion Models, arXiv 2503.10637, which finds that distilled students settle it at once)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastgen.batch import Conditioning
from fastgen.sampling.sampler import Sampler


@torch.no_grad()
def views(
    sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], images: Conditioning | None = None
) -> tuple[list[float], Tensor]:
    """The level of each step, and the clean prediction there, guided if the sampler is, decoded: [steps, B, ...]
    float32, on the CPU, as `Sampler.sample` gives samples. The last one is the sample itself, except where a stock
    scheduler stops above level 0. Raises ValueError for a student that works in chunks and for several students."""
    if sampler.policy.chunks is not None:
        raise ValueError("views are of whole samples, and this student works chunk by chunk")
    seen: list[Tensor] = []
    sampler.latents(prompts, seeds, images=images, seen=seen)
    return sampler.levels, torch.stack([sampler.backbone.decode(x0).float().cpu() for x0 in seen])


def save_views(levels: Sequence[float], pictures: Tensor, path: Path) -> None:
    """Writes a PNG with one row a sample and one column a step. pictures: [steps, B, 3, H, W], or videos
    [steps, B, F, 3, H, W], of which the middle frame is shown."""
    from fastgen.sampling.pictures import save_grid  # matplotlib takes a second to import

    if pictures.dim() == 6:
        pictures = pictures[:, :, pictures.shape[2] // 2]
    captions = [f"t = {level:.3f}" for level in levels] * pictures.shape[1]
    save_grid(pictures.transpose(0, 1).flatten(0, 1), path, columns=len(levels), captions=captions)
