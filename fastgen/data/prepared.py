"""Folders written by `fastgen prepare`: their manifest, the checks against it, and how they are read.

manifest.json                       what the tensors depend on, and the rows, size and sha256 of every file
prompts.jsonl                       the prompts, one JSON string per line; first the empty and the negative one
samples.safetensors                 prompt [N] and, if there are images, picture [N], int64: the rows of every sample;
                                    with buckets, bucket [P], that of each picture
prompts-00000.safetensors ...       rows of conditioning, as the stock pipeline encodes them
latents-00000.safetensors ...       latents [n, *latent_shape], normalised; with buckets, those of each size in shards
                                    of its own (latents-512x768-00000.safetensors), in the order of the pictures
pairs-00000.safetensors ...         x0 [n, *latent_shape] of ODE pairs; the manifest fixes their noise and prompts

Each of the last three also holds a checksum of every row; see `shard_rows`.
"""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import try_to_load_from_cache
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fastgen import noise
from fastgen.backbones.base import Backbone
from fastgen.backbones.pipeline import PipelineBackbone
from fastgen.backbones.pipeline_config import PipelineConfig
from fastgen.batch import Conditioning
from fastgen.data.base import DataSource, Stream
from fastgen.data.files import is_sealed
from fastgen.data.pairs import Pairs, PairSettings
from fastgen.data.readers import READERS
from fastgen.data.samples import Samples, SampleStream
from fastgen.data.shard_rows import ShardRows, latents_of

FORMAT = 1
MANIFEST = "manifest.json"
TABLES = ("prompts.jsonl", "samples.safetensors")
ENCODER_FILES = ("text_encoder*/*", "tokenizer*/*", "connectors/*")
VAE_FILES = ("vae/*.safetensors",)
IMAGE_FILES = ("image_encoder/*", "image_processor/*")
TEACHER_FILES = ("transformer*/*", "unet/*", "scheduler/*")
LATENT_KEYS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # entries of the VAE's config

Manifest = dict[str, Any]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PreparedData(DataSource):
    """A folder written by `fastgen prepare`. It contains prompts and their embeddings, latents if the source had
    images (for a backbone that makes its samples from them: what networks are told of them), and ODE pairs if they
    were requested. With pairs, samples come in the order of the pairs. The text encoders are loaded only for prompts
    that are not in the folder. Rows are read from the shards as they are needed.

    The folder is refused unless it was prepared with this recipe's text encoders. If it has latents, the VAE and the
    resolution must also match; if it has pairs, the teacher must. The sizes and headers of the shards are checked
    before weights load, and the rows when they are read. Running `fastgen prepare` again checks every byte."""

    folder: str
    name: Literal["prepared"] = "prepared"
    encodes_prompts: ClassVar[bool] = False

    @property
    def provides(self) -> frozenset[str]:
        try:
            manifest = read_manifest(Path(self.folder))
        except ValueError:
            # check() reports what is wrong with the folder
            return frozenset({"latents", "pixels", "pairs", "images", "controls", "sound"})
        kinds = {"control": "controls", "sound": "sound"}
        made_from = next((kind for key, kind in kinds.items() if key in manifest["identity"]), "images")
        counts = {"latents": "num_pictures", "pairs": "pairs", made_from: "num_images"}
        given = frozenset(kind for kind, count in counts.items() if manifest.get(count))
        given |= {"sound"} & manifest["identity"].keys()
        return given - {"latents"} if manifest.get("only_images") else given

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return bucket_sizes(read_manifest(Path(self.folder)))

    def check(self, backbone: Any) -> None:
        folder = Path(self.folder)
        manifest = read_manifest(folder)
        if not manifest["complete"]:
            raise ValueError(
                f"folder: {folder} is incomplete; run the same fastgen prepare command again to finish it"
            )
        if not isinstance(backbone, PipelineConfig):
            raise ValueError(f"name: prepared data needs a diffusers pipeline as its backbone, not {backbone.name}")
        wanted = identity(backbone, bool(manifest["num_pictures"]), manifest, bool(manifest.get("pairs")))
        if changed := differing(manifest["identity"], wanted):
            raise ValueError(
                f"folder: {folder} was prepared with another backbone: {'; '.join(changed)}. Prepare "
                "a new folder with this recipe, or train with the backbone that this folder was prepared with"
            )
        for size in bucket_sizes(manifest):
            backbone.build(torch.device("cpu"), torch.float32, 0).latent_shape_of(size)
        for name, entry in manifest["files"].items():
            check_file(folder / name, entry)

    def open(self, backbone: Backbone, seed: int, unit: int = 1, readers: int = READERS) -> Stream:
        assert isinstance(backbone, PipelineBackbone)
        folder = Path(self.folder)
        manifest, prompts = read_manifest(folder), read_prompt_lines(folder)
        rows = load_file(folder / TABLES[1])
        backbone.prompts.stored = PreparedPrompts(folder, manifest, prompts)
        texts, views = [prompts[i] for i in rows["prompt"].tolist()], manifest.get("views", 1)
        sizes = bucket_sizes(manifest)
        samples = Samples(texts, rows.get("picture"), views=views, sizes=sizes, bucket_of=rows.get("bucket"))
        pairs = None
        if manifest.get("pairs"):
            shards = shard_rows(folder, manifest, "pairs")
            settings = PairSettings(**manifest["pairs"])
            pairs = Pairs(settings, len(samples.prompts), backbone, lambda rows: shards.read(rows)["x0"])
        kinds = ("latents", "images", *map(latents_of, sizes))
        stored = {kind: shard_rows(folder, manifest, kind) for kind in kinds}
        return PreparedStream(samples, backbone, noise.make_key(seed, "data"), stored, pairs, unit)


class PreparedStream(SampleStream):
    """The samples of the prepared source, in the same order, with stored latents and stored rows of given images."""

    def __init__(
        self,
        samples: Samples,
        backbone: Backbone,
        key: int,
        stored: Mapping[str, ShardRows],
        pairs: Pairs | None = None,
        unit: int = 1,
    ):
        super().__init__(samples, backbone, key, pairs, unit)
        self._stored = stored
        self._members = [members.tolist() for members in samples.of_buckets()]

    def picture_latents(self, pictures: list[int]) -> list[Tensor]:
        if not self._members:
            return list(self._stored["latents"].read(pictures)["latents"])
        assert self._samples.bucket_of is not None
        bucket = int(self._samples.bucket_of[pictures[0]])  # of all, as they are of one update
        rows = [bisect_left(self._members[bucket], picture) for picture in pictures]
        return list(self._stored[latents_of(self._samples.sizes[bucket])].read(rows)["latents"])

    def picture_images(self, pictures: list[int]) -> list[Conditioning]:
        return [self._stored["images"].read(pictures).to(self._backbone.dtype)]


class PreparedPrompts:
    """The stored conditioning of prompts."""

    def __init__(self, folder: Path, manifest: Manifest, prompts: Sequence[str]):
        self._rows = {prompt: i for i, prompt in enumerate(prompts)}
        self._stored = shard_rows(folder, manifest, "prompts")

    def __contains__(self, prompt: str) -> bool:
        return prompt in self._rows

    def read(self, prompts: Sequence[str]) -> Conditioning:
        """The prompts' rows, as `encode_chunk` gave them, on the CPU. Raises KeyError if a prompt is not stored."""
        return self._stored.read([self._rows[p] for p in prompts])


def bucket_sizes(manifest: Manifest) -> tuple[tuple[int, int], ...]:
    return tuple((high, wide) for high, wide in manifest.get("buckets", ()))


def shard_rows(folder: Path, manifest: Manifest, kind: str) -> ShardRows:
    """Access to the rows of one kind of shard."""
    return ShardRows(folder, kind, manifest["shard_size"], manifest["lengths"], checked=not first_version(manifest))


def first_version(manifest: Manifest) -> bool:
    """Whether the folder was begun by version 0.1, which stored no checksums of rows and of the manifest."""
    return str(manifest["fastgen"]).startswith("0.1.")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder. Raises ValueError if there is none, if it was changed, or if this version cannot read
    it."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"folder: {folder} is not a prepared folder: it has no {MANIFEST}; write one with fastgen "
            "prepare recipe.yaml --output FOLDER"
        )
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"it has format {manifest['format']}, but this version reads format {FORMAT}")
        if not (is_sealed(manifest) or ("sha256" not in manifest and first_version(manifest))):
            raise ValueError("its contents are not those that were written")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"folder: {path} is not readable: {reason}; prepare the data again") from None
    return manifest


def read_prompt_lines(folder: Path) -> list[str]:
    with (folder / TABLES[0]).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def check_file(path: Path, entry: Mapping[str, Any]) -> None:
    """Raises ValueError if a file does not have the size, a table the contents, or a shard the number of rows that the
    manifest says."""
    remedy = "run the same fastgen prepare command again to rebuild it"
    if not path.is_file():
        raise ValueError(f"folder: {path} is missing; {remedy}")
    if path.stat().st_size != entry["bytes"]:
        raise ValueError(
            f"folder: {path} has {path.stat().st_size} bytes instead of {entry['bytes']}; it was cut "
            f"short or changed; {remedy}"
        )
    if path.name in TABLES:
        if sha256(path) != entry["sha256"]:
            raise ValueError(f"folder: the contents of {path} are not those that were written; {remedy}")
        return
    try:
        with safe_open(path, framework="pt") as file:
            rows = {file.get_slice(key).get_shape()[0] for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"folder: {path} is damaged: {error}; {remedy}") from None
    if rows != {entry["rows"]}:
        raise ValueError(f"folder: {path} has {sorted(rows)} rows instead of {entry['rows']}; {remedy}")


def identity(
    config: PipelineConfig, images: bool, known: Manifest | None = None, pairs: bool = False
) -> dict[str, Any]:
    """What prepared tensors depend on. This is always the backbone's name, its settings for prompts, the negative one,
    and its text encoders and tokenizers. With images, it is also the VAE, its scaling, the resolution and the latent
    shape; with pairs, the teacher, its scheduler and the latent shape. Networks are identified as in `fingerprint`.

    Reads configs and hashes files. known: a manifest; files whose size and time stamp match it are not hashed again.
    Raises ValueError if the configs cannot be read."""
    try:
        backbone = config.build(torch.device("cpu"), torch.float32, 0)
        assert isinstance(backbone, PipelineBackbone)
        keys = {k: v for k, v in asdict(config).items() if k in config.prompt_keys}
        settings = {"name": config.name} | json.loads(json.dumps(keys))  # as it is read again
        for key in ("negative_prompt", "encoder_dtype"):
            if value := getattr(config, key):  # left out otherwise, as in folders of before it was a key
                settings[key] = value
        result: dict[str, Any] = {"backbone": settings, "encoders": fingerprint(config, ENCODER_FILES, known)}
        if images:
            vae = {key: backbone.vae_config.get(key) for key in LATENT_KEYS}
            result |= {
                "vae": fingerprint(config, VAE_FILES, known),
                "vae_config": vae,
                "resolution": backbone.image_size,
                "latent_shape": list(backbone.latent_shape),
            }
        if images and (sound := getattr(config, "sound", None)) is not None:
            result["sound"] = {key: value for key, value in asdict(sound).items() if key not in ("sinks", "given")}
            result["sound"] |= {"given": True} if sound.given else {}  # in older folders, it is made
        if images and config.takes_image:
            result |= {
                "picture_size": list(backbone.picture_size or ()),
                "image_encoder": fingerprint(config, IMAGE_FILES, known),
            }
        if images and config.takes_control:
            result["control"] = {key: getattr(config, key) for key in ("num_frames", "references")}
        if pairs:
            teacher = fingerprint(config, TEACHER_FILES, known)
            result |= {"teacher": teacher, "latent_shape": list(backbone.latent_shape)}
    except OSError as error:
        raise ValueError(f"cannot read the configs of the backbone: {error}") from None
    return result


def fingerprint(config: PipelineConfig, patterns: Sequence[str], known: Manifest | None) -> dict[str, str]:
    """The sha256 of each matching file of a local pipeline folder, by its path there; for a hub id, the commit."""
    folder = config.local_folder()
    if folder is None:
        DiffusionPipeline.load_config(config.path)
        index = try_to_load_from_cache(config.path, "model_index.json")
        return {"commit": Path(str(index)).parent.name}
    found, stamps = (known["identity"], known["source_stamps"]) if known else ({}, {})
    hashes = {k: v for part in ("encoders", "vae", "teacher", "image_encoder") for k, v in found.get(part, {}).items()}
    result = {}
    for name in source_files(folder, patterns):
        trusted = name in hashes and stamps.get(name) == stamp(folder / name)
        result[name] = hashes[name] if trusted else sha256(folder / name)
    return result


def source_files(folder: Path, patterns: Iterable[str]) -> list[str]:
    return sorted(str(f.relative_to(folder)) for pattern in patterns for f in folder.glob(pattern) if f.is_file())


def stamp(path: Path) -> list[int]:
    """Size and modification time."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differing(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """A text 'key (old in the folder, new in the recipe)' for every dotted key that differs. Long values are cut."""
    from fastgen.registry import flatten

    a, b = flatten(stored), flatten(wanted)

    def shown(value: Any) -> str:
        text = "none" if value is None else str(value)
        return text if len(text) < 60 else f"{text[:12]}..."

    return [
        f"{k} ({shown(a.get(k))} in the folder, {shown(b.get(k))} in the recipe)"
        for k in dict.fromkeys([*a, *b])
        if a.get(k) != b.get(k)
    ]
