"""`fastgen score`: the score that each scorer gives each picture of a folder."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from fastgen.backbones.folder import local_folder
from fastgen.data import read_prompts
from fastgen.data.files import check_output, write_json
from fastgen.evaluation.charts import format_value
from fastgen.metrics.reference import captions, hash_files, read_images, sample_files
from fastgen.rewards import REWARDS, Reward, make_reward
from fastgen.run.terminal import progress_bar

SHOWN = 20  # images in the printed table


def score_folder(
    folder: Path,
    names: Sequence[str],
    keys: dict[str, dict[str, Any]],
    prompts: str | None = None,
    output: Path | None = None,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    progress: bool = True,
    overwrite: bool = True,
) -> dict[str, Any]:
    """Scores all images of a folder, here or among the files that ship with fastgen. Their sizes may differ. names:
    rewards that read pixels. keys: the rewards' keys, by name. prompts: a file with one prompt for each image, in the
    order of the images' names, or one prompt for all. By default, the captions next to the images are used.

    Returns the result, and writes it as JSON if `output` is given. It has one row per image with its file, prompt and
    scores (null if there is none), the means over the images that have a score, and what is needed to repeat the
    measurement. overwrite: whether the file may exist. Raises ValueError for anything that does not fit, before
    weights load."""
    if output is not None:
        check_output(output, overwrite)
    files = sample_files(local_folder(str(folder)) or folder)
    texts = match(list(captions(files)) if prompts is None else read_prompts(prompts), len(files), prompts)
    rewards = choose(names, keys)
    readers = [name for name, reward in rewards.items() if reward.reads_prompts]
    check_read(readers, texts, f"{folder} has no captions")
    rows: list[dict[str, Any]] = []
    with progress_bar(len(files), "scoring", "image", enabled=progress) as bar:
        for pixels, start in batches((read_images([file]) for file in files), batch_size):
            stop = start + len(pixels)
            columns = score(rewards, pixels.to(device), texts[start:stop])
            rows += [
                {"file": files[i].name, "prompt": texts[i], **{k: v[i - start] for k, v in columns.items()}}
                for i in range(start, stop)
            ]
            bar.update(len(pixels))
    scored = [key for key in rows[0] if key not in ("file", "prompt")]
    result = {
        "means": {key: mean([row[key] for row in rows]) for key in scored},
        "images_sha256": hash_files(files),
        "scorers": {name: reward.facts() for name, reward in rewards.items()},
        "images": rows,
    }
    if output is not None:
        write_json(output, result)
    return result


def choose(names: Sequence[str], keys: dict[str, dict[str, Any]]) -> dict[str, Reward]:
    """The rewards by name. Raises ValueError for unknown names, keys that do not fit, and missing files."""
    possible = [name for name in REWARDS if name not in ("linear", "quadratic", "function")]
    for name in (*names, *keys):
        if name not in possible:
            raise ValueError(f"there is no scorer {name}; choose from {', '.join(possible)}")
    if unused := [name for name in keys if name not in names]:
        raise ValueError(f"--scorer {unused[0]}: it is not among the metrics {', '.join(names)}; add it to them")
    rewards = {}
    for name in names:
        rewards[name] = make_reward(name, keys.get(name, {}))
        if rewards[name].input != "pixels":
            raise ValueError(f"{name} reads {rewards[name].input}, but a folder contains pictures; leave it out")
        try:
            rewards[name].ready()
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None
    return rewards


def match(prompts: list[str], count: int, source: str | None) -> list[str]:
    """One prompt per image. Raises ValueError unless there is one prompt for each image or one for all."""
    if len(prompts) not in (1, count):
        raise ValueError(
            f"{source} has {len(prompts)} prompts for {count} images; give one per image, in the order "
            "of the images' names, or one for all"
        )
    return prompts * count if len(prompts) < count else prompts


def check_read(readers: Sequence[str], prompts: Sequence[str], why: str) -> None:
    """Raises ValueError if all prompts are empty, where metrics or scorers read them. why: in words."""
    if readers and not any(prompts):
        raise ValueError(f"{readers[0]} reads prompts, but {why}; give eval.prompts or --prompts FILE")


def batches(images: Iterable[Tensor], size: int) -> Iterator[tuple[Tensor, int]]:
    """Pixels [B, 3, H, W] of at most `size` consecutive images [1, 3, H, W] of equal size, and the index of the
    first."""
    kept, count = list[Tensor](), 0
    for i, pixels in enumerate(images):
        count = i + 1
        if kept and (len(kept) == size or kept[0].shape != pixels.shape):
            yield torch.cat(kept), i - len(kept)
            kept = []
        kept.append(pixels)
    yield torch.cat(kept), count - len(kept)


@torch.no_grad()
def score(rewards: dict[str, Reward], pixels: Tensor, prompts: Sequence[str]) -> dict[str, list[float | None]]:
    """`name` and `name_part` -> one number per image, None if it has no score."""
    columns: dict[str, list[float | None]] = {}
    for name, reward in rewards.items():
        result = reward(pixels, prompts)
        for key, values in {name: result.value, **{f"{name}_{k}": v for k, v in result.parts.items()}}.items():
            pairs = zip(values.tolist(), result.valid.tolist(), strict=True)
            columns[key] = [value if valid and math.isfinite(value) else None for value, valid in pairs]
    return columns


def mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def score_table(result: dict[str, Any]) -> Table:
    """A rich table of the first images and of the means."""
    from rich.text import Text

    columns = list(result["means"])
    table = Table("image", "prompt", title=f"{len(result['images'])} images")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in result["images"][:SHOWN]:
        cells = (format_value(row[column]) for column in columns)
        table.add_row(Text(row["file"]), Text(row["prompt"][:48]), *cells)
    if len(result["images"]) > SHOWN:
        table.add_row("...", "", *[""] * len(columns))
    table.add_section()
    table.add_row("mean", "", *(format_value(result["means"][column]) for column in columns))
    return table
