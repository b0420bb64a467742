"""`fastgen prepare`: encodes a recipe's prompts and images once, into a folder that data {name: prepared} reads. Can
also sample ODE pairs of the recipe's teacher.

Every file is written under another name and then renamed, and the manifest is rewritten after every file. So the
command may be stopped at any moment. Started again, it continues after the last complete file."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

import fastgen
from fastgen.backbones.pipeline import PipelineBackbone, PipelineConfig
from fastgen.config.stored import to_dict
from fastgen.data.base import Samples, SampleSource, encode_picture
from fastgen.data.files import sealed
from fastgen.data.pair_sampling import sample_pairs
from fastgen.data.pairs import PairSettings
from fastgen.data.prepared import (
    ENCODER_FILES,
    FORMAT,
    MANIFEST,
    TABLES,
    TEACHER_FILES,
    VAE_FILES,
    Manifest,
    PreparedPrompts,
    differing,
    identity,
    read_manifest,
    sha256,
    source_files,
    stamp,
)
from fastgen.data.prompts import read_prompts
from fastgen.data.shard_rows import fold, packed, shard_name
from fastgen.metrics.reference import open_reference
from fastgen.recipe import EvalConfig, Recipe
from fastgen.run.terminal import progress_bar
from fastgen.sampling.sampler import teacher_sampler

ENCODED_AT_ONCE = 32  # prompts in one batch, as in PipelineBackbone

Make = Callable[[], bytes]


def prepare(
    recipe: Recipe, folder: Path, dtype: str = "float32", shard_size: int = 256, pairs: PairSettings | None = None
) -> Manifest:
    """Encodes every prompt of the recipe's data and evaluation, and every image of its data. Samples ODE pairs of its
    teacher if `pairs` or the recipe's data asks for them. dtype: that of the stored prompt tokens and latents.
    shard_size: rows per file, which is also the most that an interruption may lose. Returns the manifest.

    A complete folder is verified byte for byte, and damaged files are made again. Raises ValueError, before weights
    load, for data that cannot be prepared, and for a folder that holds anything else or was prepared with other
    settings. Raises DataError for an image that cannot be read."""
    config, source = recipe.backbone, recipe.data
    if not isinstance(config, PipelineConfig):
        raise ValueError(f"backbone.name: prepare is for diffusers pipelines; {config.name} has nothing to encode")
    if not isinstance(source, SampleSource) or getattr(source, "streaming", False):
        raise ValueError(
            "data.name: prepare needs a source with random access to its rows: prompts, images, "
            "webdataset, or hub with streaming: false"
        )
    pairs = pairs or getattr(source, "pairs", None)
    known = begun(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = config.build(device, getattr(torch, recipe.train.dtype), recipe.seed)
    assert isinstance(backbone, PipelineBackbone)
    samples = source.samples(backbone)
    prompts = list(dict.fromkeys(["", backbone.negative_prompt, *samples.prompts, *evaluation_prompts(recipe.eval)]))
    manifest: Manifest = {
        "format": FORMAT,
        "fastgen": fastgen.__version__ if known is None else known["fastgen"],
        "source": config.path,
        "identity": identity(config, samples.num_pictures > 0, known, pairs is not None),
        "data": to_dict(source),
        "dtype": dtype,
        "shard_size": shard_size,
        "num_samples": len(samples.prompts),
        "num_prompts": len(prompts),
        "num_pictures": samples.num_pictures,
        "pairs": None if pairs is None else to_dict(pairs),
        "samples_sha256": hashlib.sha256(prompt_lines(prompts) + sample_rows(samples, prompts)).hexdigest(),
    }
    if known is not None:
        check_settings(folder, known, manifest)
    manifest["source_stamps"] = stamps(config, pairs is not None)
    for key, empty in (("lengths", {}), ("complete", False), ("files", {})):
        manifest[key] = empty if known is None else known[key]

    folder.mkdir(parents=True, exist_ok=True)
    write(folder / MANIFEST, dump(manifest))
    count = len(prompts) + samples.num_pictures + (pairs.count if pairs else 0)
    with progress_bar(count, "preparing", "row") as bar:
        files = plan(backbone, samples, prompts, getattr(torch, dtype), shard_size, manifest["lengths"], bar)
        if pairs is not None:
            backbone.prompts.stored = PreparedPrompts(folder, manifest, prompts)  # pairs are made after them
            files |= plan_pairs(backbone, samples, pairs, getattr(torch, dtype), shard_size, bar)
        for name, (rows, make) in files.items():
            if name in manifest["files"] and verified(folder / name, manifest["files"][name]):
                bar.update(rows if name not in TABLES else 0)
                continue
            data = make()
            write(folder / name, data)
            digest = hashlib.sha256(data).hexdigest()
            manifest["files"][name] = {"rows": rows, "bytes": len(data), "sha256": digest}
            write(folder / MANIFEST, dump(manifest))
    manifest["files"] = {name: manifest["files"][name] for name in files}  # in this order, even after repairs
    manifest["complete"] = True
    write(folder / MANIFEST, dump(manifest))
    return manifest


def plan(
    backbone: PipelineBackbone,
    samples: Samples,
    prompts: Sequence[str],
    dtype: torch.dtype,
    shard_size: int,
    lengths: dict[str, int],
    bar: Any,
) -> dict[str, tuple[int, Make]]:
    """Every file of the folder: name -> its number of rows, and the function that makes its bytes."""
    files: dict[str, tuple[int, Make]] = {
        "prompts.jsonl": (len(prompts), partial(prompt_lines, prompts)),
        "samples.safetensors": (len(samples.prompts), partial(sample_rows, samples, prompts)),
    }
    for i, rows in enumerate(spans(len(prompts), shard_size)):
        make = partial(encode_prompts, backbone, prompts[rows.start : rows.stop], dtype, lengths, bar)
        files[shard_name("prompts", i)] = (len(rows), make)
    for i, rows in enumerate(spans(samples.num_pictures, shard_size)):
        files[shard_name("latents", i)] = (len(rows), partial(encode_pictures, backbone, samples, rows, dtype, bar))
    return files


def plan_pairs(
    backbone: PipelineBackbone, samples: Samples, pairs: PairSettings, dtype: torch.dtype, shard_size: int, bar: Any
) -> dict[str, tuple[int, Make]]:
    """The files of the ODE pairs, as in `plan`. Raises ValueError if the teacher's own sampler draws noise."""
    if backbone.teacher_policy(pairs.steps).transition != "ode":
        raise ValueError("pairs need the teacher's ODE, but its own scheduler is stochastic; use another pipeline")
    prompts = [samples.prompts[i] for i in pairs.samples(len(samples.prompts)).tolist()]
    teacher = cache(lambda: teacher_sampler(backbone, pairs.steps, pairs.guidance_scale))  # loaded only if needed

    def make(rows: range) -> bytes:
        return packed({"x0": sample_pairs(teacher(), prompts, rows, pairs.key, bar).to(dtype)})

    spanned = enumerate(spans(pairs.count, shard_size))
    return {shard_name("pairs", i): (len(rows), partial(make, rows)) for i, rows in spanned}


def begun(folder: Path) -> Manifest | None:
    """The manifest of a folder begun earlier; None for a new or empty one. Raises ValueError for any other."""
    if (folder / MANIFEST).is_file():
        return read_manifest(folder)
    if folder.exists() and (not folder.is_dir() or any(f.name != f"{MANIFEST}.partial" for f in folder.iterdir())):
        raise ValueError(f"{folder} is not empty and was not written by fastgen prepare; choose another --output")
    return None


def check_settings(folder: Path, known: Manifest, wanted: Manifest) -> None:
    """Raises ValueError if the folder was begun with other settings."""
    keys = [key for key in wanted if key not in ("fastgen", "source")]
    if changed := differing({key: known.get(key) for key in keys}, {key: wanted[key] for key in keys}):
        raise ValueError(
            f"{folder} was prepared with other settings: {'; '.join(changed)}. Choose another --output, "
            "or undo the change to continue"
        )


def stamps(config: PipelineConfig, pairs: bool) -> dict[str, list[int]]:
    """Size and time stamp of the pipeline's files, so that unchanged files are hashed only once; {} for a hub id."""
    folder = config.local_folder()
    if folder is None:
        return {}
    patterns = (*ENCODER_FILES, *VAE_FILES, *(TEACHER_FILES if pairs else ()))
    return {name: stamp(folder / name) for name in source_files(folder, patterns)}


def evaluation_prompts(config: EvalConfig) -> Sequence[str]:
    """The prompts of the recipe's evaluation. With them prepared, evaluation needs no text encoders either."""
    if config.prompts is not None:
        return read_prompts(config.prompts)
    return () if config.reference is None else open_reference(config.reference).prompts


def prompt_lines(prompts: Sequence[str]) -> bytes:
    return "".join(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in prompts).encode()


def sample_rows(samples: Samples, prompts: Sequence[str]) -> bytes:
    """prompt [N] and, with images, picture [N]: the row of each sample's prompt and of its picture."""
    row = {prompt: i for i, prompt in enumerate(prompts)}
    tensors = {"prompt": torch.tensor([row[p] for p in samples.prompts])}
    if samples.pictures is not None:
        tensors["picture"] = samples.pictures
    return save(tensors)


@torch.no_grad()
def encode_prompts(
    backbone: PipelineBackbone, prompts: Sequence[str], dtype: torch.dtype, lengths: dict[str, int], bar: Any
) -> bytes:
    """Encodes the prompts of one shard. lengths: key -> token count, filled in here. Padding is stored only once."""
    chunks = []
    with backbone.encoding():
        for span in spans(len(prompts), ENCODED_AT_ONCE):
            rows = backbone.encode_chunk(list(prompts[span.start : span.stop]))
            chunks.append({k: v.cpu() for k, v in rows.items()})
            bar.update(len(span))
    joined = {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}
    for key, value in joined.items():
        if value.dim() == 3 and lengths.setdefault(key, value.shape[1]) != value.shape[1]:
            raise ValueError(
                f"{key} has {value.shape[1]} tokens for these prompts and {lengths[key]} for earlier ones; only "
                "prompts that are all padded to one length can be prepared"
            )
    return packed({key: narrowed(fold(value), dtype).contiguous() for key, value in joined.items()})


def narrowed(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts tokens [n, L, D] to the stored dtype. Everything else in a prompt's conditioning is left as it is: it
    is small, and it may be sizes, which a narrow dtype would round."""
    return rows.to(dtype) if rows.dim() == 3 and rows.is_floating_point() else rows


def encode_pictures(
    backbone: PipelineBackbone, samples: Samples, pictures: Sequence[int], dtype: torch.dtype, bar: Any
) -> bytes:
    """Encodes the pictures of one shard: latents [n, *latent_shape]."""
    assert samples.read is not None
    latents = []
    for picture in pictures:
        latents.append(encode_picture(backbone, samples.read(picture)).to(dtype))
        bar.update()
    return packed({"latents": torch.stack(latents)})


def spans(count: int, size: int) -> list[range]:
    return [range(i, min(i + size, count)) for i in range(0, count, size)]


def verified(path: Path, entry: Mapping[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == entry["bytes"] and sha256(path) == entry["sha256"]


def dump(manifest: Manifest) -> bytes:
    return (json.dumps(sealed(manifest), indent=1) + "\n").encode()


def write(path: Path, data: bytes) -> None:
    """Writes a file under another name, flushes it to disk, then renames it."""
    partial_file = path.with_name(path.name + ".partial")
    with partial_file.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial_file, path)
