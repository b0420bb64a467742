"""`fastgen sample`: images or points of a pipeline, as files."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from fastgen.data import read_prompts
from fastgen.pipelines.sampler import load_sampler
from fastgen.report import plot_points, save_grid


def sample_folder(
    path: Path, prompts: Sequence[str], prompt_file: Path | None, num_images: int, seed: int, output: Path,
    num_steps: int | None, guidance_scale: float | None, batch_size: int,
) -> int:  # fmt: skip
    """num_images of every prompt: 00000.png with its prompt in 00000.txt, and grid.png; a mixture's points as
    points.safetensors and grid.png. Image i has seed seed + i. Returns how many.

    Raises ValueError if there is no prompt, or if the folder is not empty."""
    texts = [*prompts, *(read_prompts(str(prompt_file)) if prompt_file else [])]
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder; choose another")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sampler = load_sampler(path, num_steps=num_steps, guidance_scale=guidance_scale, device=device)
    points = sampler.backbone.output == "points"
    if not texts and not points:
        raise ValueError("give --prompt or --prompts")
    everything = [t for t in texts or [""] for _ in range(num_images)]
    chunks = [range(i, min(i + batch_size, len(everything))) for i in range(0, len(everything), batch_size)]
    samples = torch.cat([sampler.sample([everything[i] for i in chunk], [seed + i for i in chunk])
                         for chunk in tqdm(chunks, desc="sampling")])  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    if points:
        save_file({"points": samples}, output / "points.safetensors")
        plot_points({path.name: samples}, output / "grid.png")
        return len(samples)
    for i, (image, text) in enumerate(zip(samples, everything, strict=True)):
        save_grid(image[None], output / f"{i:05d}.png", columns=1)
        (output / f"{i:05d}.txt").write_text(text + "\n")
    save_grid(samples, output / "grid.png", columns=max(1, round(len(samples) ** 0.5)))
    return len(samples)
