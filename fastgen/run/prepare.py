"""`fastgen prepare`: encodes a recipe's prompts and images once, into a folder that data {name: prepared} reads. Can
also sample ODE pairs of the recipe's teacher.

Every file is written under another name and then renamed, and the manifest is rewritten after every file. So the
command may be stopped at any moment. Started again, it continues after the last complete file."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

import fastgen
from fastgen.backbones.pipeline import PipelineBackbone
from fastgen.backbones.pipeline_config import PipelineConfig
from fastgen.config.stored import to_dict
from fastgen.data.files import sealed
from fastgen.data.pairs import PairSettings
from fastgen.data.prepared import (
    ENCODER_FILES,
    FORMAT,
    IMAGE_FILES,
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
from fastgen.data.samples import SampleSource
from fastgen.metrics.reference import TEACHER, open_reference
from fastgen.recipe import EvalConfig, Recipe
from fastgen.run.lock import LOCK, locked
from fastgen.run.prepared_files import (
    Make,
    check_length,
    pair_files,
    picture_files,
    prompt_files,
    prompt_lines,
    sample_rows,
)
from fastgen.run.terminal import progress_bar


def prepare(
    recipe: Recipe, folder: Path, dtype: str = "float32", shard_size: int = 256, pairs: PairSettings | None = None
) -> Manifest:
    """Encodes every prompt of the recipe's data and evaluation, and every image of its data. Samples ODE pairs of its
    teacher if `pairs` or the recipe's data asks for them. dtype: that of the stored prompt tokens and latents.
    shard_size: rows per file, which is also the most that an interruption may lose. Returns the manifest.

    Processes that were launched together (by torchrun or accelerate) divide the files between them. A complete folder
    is verified byte for byte, and damaged files are made again. Raises ValueError, before weights load, for data that
    cannot be prepared, for a folder that holds anything else or was prepared with other settings, and for one that
    another program prepares now. Raises DataError for an image that cannot be read."""
    config, source = recipe.backbone, recipe.data
    if not isinstance(config, PipelineConfig):
        raise ValueError(f"backbone.name: prepare is for diffusers pipelines; {config.name} has nothing to encode")
    if not isinstance(source, SampleSource) or getattr(source, "streaming", False):
        raise ValueError(
            "data.name: prepare needs a source with random access to its rows: prompts, images, "
            "videos, webdataset, or hub with streaming: false"
        )
    if config.encodes_together:
        raise ValueError(
            f"backbone.name: {config.name} encodes every prompt together with its image, and prepare stores prompts "
            "by themselves; train on the data as they are"
        )
    if missing := config.given - source.fills(config):
        raise ValueError(
            f"data.name: backbone {config.name} makes its samples from {', '.join(missing)}; choose others"
        )
    if not (config.encodes_data or config.given) and source.provides - {"pairs"}:
        raise ValueError(f"data.name: data have not all that the latents of {config.name} hold; prepare prompts alone")
    if getattr(config, "made_sound", None) and "latents" in source.fills(config) and "sound" not in source.provides:
        raise ValueError(
            f"backbone.sound: its latents hold sound, and data {source.name} has none; give data.sounds, or leave "
            "backbone.sound out"
        )
    if source.sizes and pairs is not None:
        raise ValueError("data.buckets: ODE pairs have the size of the backbone; leave out --pairs or buckets")
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    begun(folder)
    with locked(folder, accelerator, "--output", "is preparing"):
        return prepare_locked(recipe, folder, dtype, shard_size, pairs or getattr(source, "pairs", None), accelerator)


def prepare_locked(
    recipe: Recipe, folder: Path, dtype: str, shard_size: int, pairs: PairSettings | None, accelerator: Accelerator
) -> Manifest:
    """`prepare`, in a folder that no other program changes."""
    config, source, known = recipe.backbone, recipe.data, begun(folder)
    assert isinstance(config, PipelineConfig)
    assert isinstance(source, SampleSource)
    backbone = config.build(accelerator.device, getattr(torch, recipe.train.dtype), recipe.seed)
    assert isinstance(backbone, PipelineBackbone)
    samples = source.samples(backbone)
    prompts = list(dict.fromkeys(["", backbone.negative_prompt, *samples.prompts, *evaluation_prompts(recipe.eval)]))
    data = to_dict(source.settled(config))
    if not samples.sizes:
        data.pop("buckets", None)  # as in folders of before it was a key
    for key in ("controls", "sounds"):  # likewise
        if data.get(key) is None:
            data.pop(key, None)
    manifest: Manifest = {
        "format": FORMAT,
        "fastgen": fastgen.__version__ if known is None else known["fastgen"],
        "source": config.path,
        "identity": identity(config, samples.num_pictures > 0, known, pairs is not None),
        "data": data,
        "dtype": dtype,
        "shard_size": shard_size,
        "num_samples": len(samples.prompts),
        "num_prompts": len(prompts),
        "num_pictures": samples.num_pictures,
        "pairs": None if pairs is None else to_dict(pairs),
        "samples_sha256": hashlib.sha256(prompt_lines(prompts) + sample_rows(samples, prompts)).hexdigest(),
    }
    if samples.views > 1:
        manifest["views"] = samples.views
    if samples.sizes:
        manifest["buckets"] = [list(size) for size in samples.sizes]
    if config.takes_given:
        manifest |= {"num_images": samples.num_pictures, "only_images": "latents" not in source.fills(config)}
    if known is not None:
        check_settings(folder, known, manifest)
    manifest["source_stamps"] = stamps(config, pairs is not None)
    for key, empty in (("lengths", {}), ("complete", False), ("files", {})):
        manifest[key] = empty if known is None else known[key]

    main, stored = accelerator.is_main_process, getattr(torch, dtype)
    if main:
        write(folder / MANIFEST, dump(manifest))
    accelerator.wait_for_everyone()  # no file is there before the manifest, which says what the folder is
    kinds = ["images"] * config.takes_given + ["latents"] * (not manifest.get("only_images"))
    count = len(prompts) + samples.num_pictures * len(kinds) + (pairs.count if pairs else 0)
    with progress_bar(-(-count // accelerator.num_processes), "preparing", "row", enabled=main) as bar:
        files = prompt_files(backbone, samples, prompts, stored, shard_size, manifest["lengths"], bar)
        for kind in kinds:
            files |= picture_files(kind, backbone, samples, stored, shard_size, bar)
        make_files(folder, files, manifest, accelerator, bar)
        if pairs is not None:
            backbone.prompts.stored = PreparedPrompts(folder, manifest, prompts)
            paired = pair_files(backbone, samples, pairs, stored, shard_size, bar)
            make_files(folder, paired, manifest, accelerator, bar)
            files |= paired
    manifest["files"] = {name: manifest["files"][name] for name in files}  # in this order, even after repairs
    manifest["complete"] = True
    if main:
        write(folder / MANIFEST, dump(manifest))
    accelerator.wait_for_everyone()
    return manifest


def make_files(
    folder: Path, files: Mapping[str, tuple[int, Make]], manifest: Manifest, accelerator: Accelerator, bar: Any
) -> None:
    """Makes the files that are missing or damaged, one at a time on each process, and enters them into the manifest,
    which the first process writes."""
    ways, rank = accelerator.num_processes, accelerator.process_index
    for names in (list(files)[i : i + ways] for i in range(0, len(files), ways)):
        made = {}
        for name in names[rank : rank + 1]:
            rows, make = files[name]
            entry = manifest["files"].get(name)
            if entry is not None and verified(folder / name, entry):
                bar.update(rows if name not in TABLES else 0)
                continue
            data = make()
            write(folder / name, data)
            made[name] = {"rows": rows, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for others, lengths in gather_object([(made, dict(manifest["lengths"]))]):
            manifest["files"] |= others
            for key, length in lengths.items():
                check_length(manifest["lengths"], key, length)
            if others and accelerator.is_main_process:
                write(folder / MANIFEST, dump(manifest))


def begun(folder: Path) -> Manifest | None:
    """The manifest of a folder begun earlier; None for a new or empty one. Raises ValueError for any other."""
    if (folder / MANIFEST).is_file():
        return read_manifest(folder)
    if folder.exists() and (not folder.is_dir() or {f.name for f in folder.iterdir()} - {f"{MANIFEST}.partial", LOCK}):
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
    patterns = (*ENCODER_FILES, *VAE_FILES, *(IMAGE_FILES if config.takes_image else ()))
    patterns += TEACHER_FILES if pairs else ()
    return {name: stamp(folder / name) for name in source_files(folder, patterns)}


def evaluation_prompts(config: EvalConfig) -> Sequence[str]:
    """The prompts of the recipe's evaluation. With them prepared, evaluation needs no text encoders either."""
    if config.prompts is not None:
        return read_prompts(config.prompts)
    return () if config.reference in (None, TEACHER) else open_reference(config.reference).prompts


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
