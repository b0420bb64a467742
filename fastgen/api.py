"""The Python interface, one function a task. `import fastgen` has all of them, and imports what is heavy on their use.

run = fastgen.distill("recipes/digits_quickstart.yaml", {"train.steps": 100})
pipeline = fastgen.load(run)                                  # as diffusers loads it
fastgen.evaluate(run)["metrics"]                              # as its recipe says
fastgen.score(images, prompts, "clip_score", path="openai/clip-vit-large-patch14")
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastgen.config import build_recipe
from fastgen.config import load_recipe as read
from fastgen.config.text import apply_override
from fastgen.data.pictures import to_rgb
from fastgen.evaluation.folders import evaluate_path
from fastgen.evaluation.scoring import batches, choose, match
from fastgen.evaluation.scoring import score as score_batch
from fastgen.metrics.reference import read_images
from fastgen.recipe import Recipe
from fastgen.registry import OBJECTIVES

Picture = str | Path | Image.Image | np.ndarray | Tensor


def load_recipe(recipe: str | Path | Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Recipe:
    """A checked recipe, as an object: from a file, from the path of one that ships, or from its sections as a dict.

    changes: dotted key -> value, {"train.steps": 100}; a text is read as YAML. Raises fastgen.registry.RecipeError,
    with all mistakes at once."""
    overrides = [f"{key}={as_yaml(value)}" for key, value in (changes or {}).items()]
    if not isinstance(recipe, Mapping):
        return read(recipe, overrides)
    values = copied(recipe)
    for text in overrides:
        apply_override(values, text)
    return build_recipe(values)


def copied(value: Any) -> Any:
    """The same mappings and lists anew, so that changes stay here; other objects as they are."""
    if isinstance(value, Mapping):
        return {key: copied(part) for key, part in value.items()}
    return [copied(part) for part in value] if isinstance(value, list) else value


def as_yaml(value: Any) -> str:
    import yaml

    if isinstance(value, str | Path):
        return str(value)
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def distill(recipe: str | Path | Mapping[str, Any] | Recipe, changes: Mapping[str, Any] | None = None) -> Path:
    """Trains a recipe to its end, or goes on with its run, and returns the run folder. recipe, changes: as in
    `load_recipe`, or a recipe that it returned, without changes.

    Raises RecipeError for a recipe that is wrong, and fastgen.run.build.TrainingError if the run cannot go on. Several
    GPUs need a process each: `accelerate launch fastgen/train.py RECIPE`."""
    from fastgen.train import train

    if isinstance(recipe, Recipe):
        if changes:
            raise ValueError("changes belong to load_recipe; a recipe that is an object is already checked")
        return train(recipe)
    return train(load_recipe(recipe, changes))


def load(path: str | Path, **options: Any) -> Any:
    """The pipeline of a run (its export), of an export, or of any diffusers folder, ready to be called.

    A student whose network takes inputs of its own is a pipeline class of fastgen, a causal one a streaming pipeline,
    and an adapter is loaded into its original pipeline. options: of diffusers' from_pretrained. A student of points
    has no pipeline: it is returned as a `fastgen.sampling.sampler.Sampler`, with `sample(prompts, seeds)`.
    Raises ValueError for a folder that is none of these."""
    from fastgen.sampling.loading import load_pipeline

    return load_pipeline(Path(path), options)


def evaluate(path: str | Path, **options: Any) -> dict[str, Any]:
    """Measures a run, an export, a pipeline or a folder of images; the result has the numbers in `metrics`. options:
    those of `fastgen.evaluation.folders.evaluate_path`, such as metrics="fid,clip_score", num_samples or output."""
    return evaluate_path(Path(path), **options)


def score(
    images: Picture | Sequence[Picture],
    prompts: str | Sequence[str],
    name: str,
    *,
    device: torch.device | str | None = None,
    batch_size: int = 16,
    **keys: Any,
) -> list[float | None]:
    """One number for each picture by the reward `name`; None where it has none. Higher is better.

    images: one or several files, PIL pictures (read as their files are: `fastgen.data.pictures`), arrays [H, W, 3]
    (uint8, or in [0, 1]), or tensors [3, H, W] in [0, 1].
    prompts: one for each picture, or one for all. keys: those of the reward (docs/rewards.md), such as path=. device:
    by default a GPU if there is one. Raises ValueError for anything that does not fit, before weights load."""
    several = isinstance(images, Sequence) and not isinstance(images, str)
    found: list[Any] = list(images) if several else [images]  # type: ignore[arg-type]
    texts = match([prompts] if isinstance(prompts, str) else list(prompts), len(found), "prompts")
    rewards = choose([name], {name: keys} if keys else {})
    chosen, values = device or ("cuda" if torch.cuda.is_available() else "cpu"), list[float | None]()
    for pixels, start in batches(map(as_pixels, found), batch_size):
        values += score_batch(rewards, pixels.to(chosen), texts[start : start + len(pixels)])[name]
    return values


def as_pixels(picture: Picture) -> Tensor:
    """[1, 3, H, W] in [0, 1]. Raises ValueError for an array or a tensor of another shape or range, and for a PIL
    picture whose scale is not known."""
    if isinstance(picture, str | Path):
        return read_images([Path(picture)])
    if isinstance(picture, Image.Image):
        picture = np.asarray(to_rgb(ImageOps.exif_transpose(picture)))
    if isinstance(picture, np.ndarray):
        if picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(f"an array must be a picture [H, W, 3], got {list(picture.shape)}")
        scale = 255 if picture.dtype == np.uint8 else 1
        picture = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / scale
    if picture.dim() != 3 or picture.shape[0] != 3 or not picture.is_floating_point():
        raise ValueError(f"a tensor must be a picture [3, H, W] in [0, 1], got {list(picture.shape)}, {picture.dtype}")
    low, high = picture.aminmax()
    if not -1e-3 <= float(low) <= float(high) <= 1 + 1e-3:
        raise ValueError(f"pixels must lie in [0, 1], got {float(low):g} to {float(high):g}")
    return picture[None].float().clamp(0, 1)


def list_objectives() -> dict[str, str]:
    """Every objective's name in a recipe, with the first line of its page, which says what it does."""
    pages = {name: import_module(path.partition(":")[0]).__doc__ or "" for name, path in OBJECTIVES.items()}
    return {name: " ".join(page.split("\n\n")[0].split()) for name, page in pages.items()}
