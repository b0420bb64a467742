"""`fastgen sample`: writes images, videos or points of a pipeline to files."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastgen.backbones.base import Backbone
from fastgen.data import read_prompts
from fastgen.data.controls import encode_given, references_of
from fastgen.data.files import check_place
from fastgen.run.terminal import progress_bar
from fastgen.sampling.adapters import Adapter, with_adapters
from fastgen.sampling.original import with_teacher_first
from fastgen.sampling.sampler import Routed, load_sampler
from fastgen.sampling.sound import write_sound
from fastgen.sampling.video import check_writer, save_video, stills
from fastgen.sampling.views import save_views, views

SHOWN = 8  # samples whose steps are shown


def sample_folder(
    path: Path,
    prompts: Sequence[str],
    prompt_file: Path | None,
    num_images: int,
    seed: int,
    output: Path,
    num_steps: int | None,
    guidance_scale: float | None,
    batch_size: int,
    negative_prompt: str | None = None,
    images: Sequence[Path] = (),
    dtype: torch.dtype | None = None,
    teacher_first: int = 0,
    teacher_steps: int | None = None,
    teacher_guidance: float | None = None,
    with_views: bool = False,
    adapters: Sequence[Adapter] = (),
) -> int:
    """Writes num_images samples per prompt: 00000.png (00000.mp4 for a video model) with its prompt in 00000.txt, and
    so on, and the overview grid.png; of a model with sound, also that (`sampling.sound`). For a mixture, writes
    points.safetensors and grid.png. Image i has the seed seed + i. images: the pictures or control videos that a
    pipeline makes its samples from, one for each prompt or one for all. dtype: see `load_sampler`. teacher_first,
    teacher_steps, teacher_guidance: see `original.with_teacher_first`. with_views: whether to write the clean
    predictions of each step of the first samples, of at most 8 and of one batch, views.png. adapters: see
    `adapters.with_adapters`. Returns the number of samples.

    Raises ValueError if there is no prompt, if images are given exactly where the pipeline takes none, if the folder
    is not empty, or if this machine cannot write videos."""
    texts = [*prompts, *(read_prompts(str(prompt_file)) if prompt_file else [])]
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder; choose another")
    check_place(output)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sampler = load_sampler(
        path,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        image=bool(images),
        references=references_of(images),
        device=device,
        dtype=dtype,
    )
    sampler = with_teacher_first(path, sampler, teacher_first, teacher_steps, teacher_guidance)
    sampler = with_adapters(sampler, adapters)
    kind = sampler.backbone.output
    if not texts and kind != "points":
        raise ValueError("give --prompt or --prompts")
    if kind == "frames":
        check_writer()
    if with_views and (kind == "points" or sampler.policy.chunks is not None or isinstance(sampler, Routed)):
        raise ValueError("views are of the pictures or whole videos of one student; leave them out")
    given = prompt_images(sampler.backbone, images, len(texts))
    everything = [t for t in texts or [""] for _ in range(num_images)]
    kept: list[Tensor] = []
    bar = progress_bar(len(everything), "sampling", "sample")
    for start in range(0, len(everything), batch_size):
        chunk = range(start, min(start + batch_size, len(everything)))
        rows = None if given is None else encode_given(sampler.backbone, [given[i // num_images] for i in chunk])
        latents = sampler.latents([everything[i] for i in chunk], [seed + i for i in chunk], images=rows)
        samples, sounds = sampler.backbone.decode(latents).float().cpu(), sampler.backbone.sound_of(latents)
        if not bool(samples.isfinite().all()):
            raise ValueError(
                f"the samples of {path} are not finite: its weights hold NaN, or overflow in this precision; export "
                "an earlier checkpoint"
            )
        output.mkdir(parents=True, exist_ok=True)
        for i, sample in zip(chunk, samples, strict=True):
            write_sample(sample, everything[i], output / f"{i:05d}", sampler.backbone.fps)
        for i, sound in zip(chunk, () if sounds is None else sounds, strict=sounds is not None):
            write_sound(sound, output / f"{i:05d}.mp4", sampler.backbone.sound_rate)
        kept.append(stills(samples) if kind == "frames" else samples)
        bar.update(len(chunk))
    bar.close()
    from fastgen.sampling.pictures import plot_points, save_grid

    first = torch.cat(kept)
    if kind == "points":
        save_file({"points": first}, output / "points.safetensors")
        plot_points({path.name: first}, output / "grid.png")
    else:
        if with_views:
            shown = range(min(len(everything), SHOWN, batch_size))
            rows = None if given is None else encode_given(sampler.backbone, [given[i // num_images] for i in shown])
            save_views(
                *views(sampler, everything[: len(shown)], [seed + i for i in shown], rows), output / "views.png"
            )
        save_grid(first, output / "grid.png", columns=max(1, round(len(first) ** 0.5)), captions=everything)
    return len(first)


def prompt_images(backbone: Backbone, images: Sequence[Path], count: int) -> list[Path] | None:
    """The picture of each of `count` prompts; None for a pipeline that takes none. Raises ValueError for a number of
    pictures that is neither 1 nor that of the prompts, and if pictures are given exactly where none are taken."""
    if bool(images) != backbone.takes_given:
        raise ValueError(
            f"this pipeline makes its samples from {', '.join(backbone.config.given)}: give --image"
            if backbone.takes_given
            else "this pipeline makes its samples from prompts alone; leave out --image"
        )
    if len(images) not in (0, 1, count):
        raise ValueError(f"there are {len(images)} images for {count} prompts; give one for each, or one for all")
    return (list(images) * count)[:count] if images else None


def write_sample(sample: Tensor, text: str, stem: Path, fps: int | None) -> None:
    """Writes an image [3, H, W] or a video [F, 3, H, W], and its prompt in a .txt file; nothing for a point [D]."""
    from fastgen.sampling.pictures import save_grid  # matplotlib takes a second to import

    if sample.dim() == 1:
        return
    if sample.dim() == 3:
        save_grid(sample[None], stem.with_suffix(".png"), columns=1)
    else:
        assert fps is not None
        save_video(sample, stem.with_suffix(".mp4"), fps)
    stem.with_suffix(".txt").write_text(text + "\n")
