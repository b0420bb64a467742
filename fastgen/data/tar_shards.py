"""WebDataset shards: tar files in which 000001.jpg and 000001.txt form one sample. They are read by random access."""

import json
import re
import tarfile
from collections.abc import Sequence
from functools import cache
from glob import glob
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor
from tqdm import tqdm

from fastgen.backbones.base import Backbone
from fastgen.data.base import DataError, Samples, SampleSource
from fastgen.data.images import check_sizes, read_image, resolution
from fastgen.data.pictures import IMAGE_SUFFIXES, picture_size
from fastgen.data.tables import check_text, choose_column


class Entry(NamedTuple):
    """One sample of a shard: the position of its image in the file, the image's width and height, and its caption."""

    key: str
    offset: int
    length: int
    size: tuple[int, int] | None
    caption: str


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class WebDatasetData(SampleSource):
    """Local tar shards. shards: a folder of .tar files, one file, a pattern (`data/*.tar`,
    `data/{000000..000099}.tar`), or a list of these.

    A sample consists of the members that share a name up to its first dot: an image (png, jpg, jpeg, webp) and its
    caption. The caption is a .txt member, or the entry `column` (by default `prompt`, `caption` or `text`) of a .json
    member. The shards are scanned once at the start to locate every image. Images are resized and cropped as in
    ImageData."""

    shards: str | tuple[str, ...]
    column: str | None = None
    allow_upscaling: bool = False
    name: Literal["webdataset"] = "webdataset"

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"latents", "pixels"})

    def check(self, backbone: Any) -> None:
        sizes = ((f"{entry.key} in {shard}", entry.size) for shard, entry in self.entries())
        check_sizes(sizes, resolution(backbone), self.allow_upscaling)

    def samples(self, backbone: Backbone) -> Samples:
        entries, size = self.entries(), backbone.image_size
        assert size is not None

        def read(i: int) -> Tensor:
            shard, entry = entries[i]
            try:
                with shard.open("rb") as file:
                    file.seek(entry.offset)
                    data = BytesIO(file.read(entry.length))
            except OSError as error:
                raise DataError(f"cannot read {shard}: {error}") from None
            return read_image(data, size, f"{entry.key} in {shard}", self.allow_upscaling)

        return Samples([entry.caption for _, entry in entries], torch.arange(len(entries)), read)

    def entries(self) -> list[tuple[Path, Entry]]:
        """Every sample of every shard, in order."""
        files = shard_files([self.shards] if isinstance(self.shards, str) else self.shards)
        result = list[tuple[Path, Entry]]()
        for shard in tqdm(files, desc="indexing shards", disable=len(files) < 10):
            result.extend((shard, entry) for entry in index_shard(shard, shard.stat().st_mtime_ns, self.column))
        return result


def shard_files(patterns: Sequence[str]) -> list[Path]:
    """The tar files of folders, names and patterns, in the given order. Raises ValueError if one of them has none."""
    files = list[Path]()
    for pattern in patterns:
        if "://" in pattern or pattern.startswith("pipe:"):
            raise ValueError(
                f"shards: {pattern} is not a local file; download the shards, or read them with data "
                "{name: hub, streaming: true}"
            )
        for name in expand_braces(pattern):
            found = sorted(Path(name).glob("*.tar")) if Path(name).is_dir() else [Path(f) for f in sorted(glob(name))]
            if not found:
                raise ValueError(f"shards: there is no tar file at {name}")
            files.extend(found)
    if not files:
        raise ValueError("shards: the list of shards is empty")
    return files


def expand_braces(pattern: str) -> list[str]:
    """Expands `a-{008..010}.tar` into a-008.tar, a-009.tar, a-010.tar."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return [name for n in numbers for name in expand_braces(pattern[: match.start()] + n + pattern[match.end() :])]


@cache
def index_shard(shard: Path, modified: int, column: str | None) -> tuple[Entry, ...]:
    """The samples of a shard, in its order. modified: the shard's time stamp, so that a changed file is read again.

    Raises ValueError if the file is not an uncompressed tar, is cut short or has no image. Raises ValueError too if a
    sample has two images or no caption."""
    images: dict[str, tuple[int, int, tuple[int, int] | None]] = {}
    texts: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(shard, "r:") as archive, shard.open("rb") as file:
            total = file.seek(0, 2)
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                key, suffix = f"{folder}/{stem}" if folder else stem, f".{extension.lower()}"
                if not member.isfile() or suffix not in (*IMAGE_SUFFIXES, ".txt", ".json"):
                    continue
                if member.offset_data + member.size > total:
                    raise tarfile.ReadError(f"{member.name} is cut short")
                file.seek(member.offset_data)
                if suffix in IMAGE_SUFFIXES:
                    if key in images:
                        raise ValueError(f"{shard} has two images named {key}; give each sample its own name")
                    data = BytesIO(file.read(min(member.size, 1 << 16)))
                    size = picture_size(data, key) or picture_size(
                        BytesIO(data.getvalue() + file.read(member.size)), key
                    )
                    images[key] = (member.offset_data, member.size, size)
                else:
                    texts.setdefault(key, {})[suffix] = file.read(member.size)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(
            f"{shard} is not a complete, uncompressed tar file: {error}; create or copy it again"
        ) from None
    if not images:
        raise ValueError(f"{shard} contains no png, jpg, jpeg or webp image")
    return tuple(
        Entry(key, *place, read_caption(texts.get(key, {}), column, f"{key} in {shard}"))
        for key, place in images.items()
    )


def read_caption(texts: dict[str, bytes], column: str | None, where: str) -> str:
    """The caption of a sample, from its .txt member; from its .json member if there is no .txt or a column is
    given."""
    suffix = ".json" if column is not None or ".txt" not in texts else ".txt"
    if suffix not in texts:
        kinds = ".json" if column else ".txt or .json"
        raise ValueError(f"{where} has no caption; add a {kinds} member with the same name")
    try:
        text = texts[suffix].decode("utf-8-sig")
        if suffix == ".txt":
            return text.strip()
        row = json.loads(text)
    except ValueError as error:
        kind = "UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON"
        raise ValueError(f"the {suffix} of {where} is not {kind}: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f'the .json of {where} is not an object like {{"caption": "a lighthouse"}}')
    column = choose_column(list(row), column, f"the .json of {where}")
    return check_text(row[column], f"{column} in the .json of {where}")
