"""WebDataset shards: tar files in which 000001.jpg and 000001.txt form one sample. They are read by random access."""

import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from glob import glob
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor
from tqdm import tqdm

from fastgen.backbones.base import Backbone, BackboneConfig
from fastgen.data.base import DataError
from fastgen.data.clips import Header, read_header
from fastgen.data.images import picture_fills, read_image
from fastgen.data.media import IMAGES, VIDEOS, Medium
from fastgen.data.pictures import picture_size
from fastgen.data.samples import Samples, SampleSource
from fastgen.data.section import section
from fastgen.data.sizes import Side, check_buckets, check_sizes, placed, resolution
from fastgen.data.tables import check_text, choose_column, unique


class Entry(NamedTuple):
    """One sample of a shard: the name of its image or video, the place in the file, and the width and height; its
    caption; and all that the header of a video says."""

    name: str
    offset: int
    length: int
    size: tuple[int, int] | None
    caption: str
    header: Header | None = None


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class WebDatasetData(SampleSource):
    """Local tar shards. shards: a folder of .tar files, one file, a pattern (`data/*.tar`,
    `data/{000000..000099}.tar`), or a list of these.

    A sample consists of the members that share a name up to its first dot: an image (png, jpg, jpeg, webp) and its
    caption. The caption is a .txt member, or the entry `column` (by default `prompt`, `caption` or `text`) of a .json
    member. The shards are scanned once at the start to locate every image; a damaged shard is refused, so that no
    sample is lost. Images are resized and cropped as in ImageData, also to `buckets`."""

    shards: str | tuple[str, ...]
    column: str | None = None
    allow_upscaling: bool = False
    buckets: tuple[tuple[Side, Side], ...] = ()
    name: Literal["webdataset"] = "webdataset"

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"latents", "pixels", "images"})

    def fills(self, backbone: BackboneConfig) -> frozenset[str]:
        return picture_fills(super().fills(backbone))

    def check(self, backbone: Any) -> None:
        sizes = [(f"{entry.name} in {shard}", entry.size) for shard, entry in self.entries()]
        if self.buckets:
            check_buckets(backbone, self.buckets, sizes, self.allow_upscaling)
        else:
            check_sizes(sizes, resolution(backbone), self.allow_upscaling)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return self.buckets

    def samples(self, backbone: Backbone) -> Samples:
        entries = self.entries()
        size_of, bucket_of = placed(backbone, self.buckets, lambda: [entry.size for _, entry in entries])

        def read(i: int) -> Tensor:
            shard, entry = entries[i]
            with member(shard, entry) as file:
                return read_image(BytesIO(file.read()), size_of(i), f"{entry.name} in {shard}", self.allow_upscaling)

        captions, numbers = [entry.caption for _, entry in entries], torch.arange(len(entries))
        return Samples(captions, numbers, read, sizes=self.buckets, bucket_of=bucket_of)

    def entries(self) -> list[tuple[Path, Entry]]:
        """Every sample of every shard, in order."""
        return shard_entries(self.shards, self.column, IMAGES)


def shard_entries(shards: str | Sequence[str], column: str | None, medium: Medium) -> list[tuple[Path, Entry]]:
    """Every sample of every shard, in order."""
    files = shard_files([shards] if isinstance(shards, str) else shards)
    result = list[tuple[Path, Entry]]()
    for shard in tqdm(files, desc="indexing shards", disable=len(files) < 10):
        result.extend((shard, entry) for entry in index_shard(shard, shard.stat().st_mtime_ns, column, medium))
    return result


@contextmanager
def member(shard: Path, entry: Entry) -> Iterator[BinaryIO]:
    """The image or video of a sample, as a file of its own. Raises DataError if the shard cannot be read."""
    try:
        with shard.open("rb") as file:
            yield section(file, entry.offset, entry.length)
    except OSError as error:
        raise DataError(f"cannot read {shard}: {error}") from None


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
            path = Path(name)  # a name may have brackets, too
            matching = [path] if path.is_file() else [Path(f) for f in sorted(glob(name))]
            found = sorted(path.glob("*.tar")) if path.is_dir() else matching
            if not found:
                raise ValueError(f"shards: there is no tar file at {name}")
            if odd := next((f for f in found if not f.is_file()), None):
                raise ValueError(f"shards: {odd} is not a file; remove it, or name the shards by a pattern")
            files.extend(found)
    if not files:
        raise ValueError("shards: the list of shards is empty")
    return files


def expand_braces(pattern: str) -> Iterator[str]:
    """Expands `a-{008..010}.tar` into a-008.tar, a-009.tar, a-010.tar."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    for n in range(int(first), int(last) + 1):
        yield from expand_braces(f"{pattern[: match.start()]}{str(n).zfill(len(first))}{pattern[match.end() :]}")


@cache
def index_shard(shard: Path, modified: int, column: str | None, medium: Medium = IMAGES) -> tuple[Entry, ...]:
    """The samples of a shard, in its order. modified: the shard's time stamp, so that a changed file is read again.

    Raises ValueError if the file is damaged, has no image (or video), has a member twice, or if an image has no
    caption or a caption no image."""
    word, listed = medium.word, f"{medium.endings} {medium.word}"
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}  # key -> its members: image or video, .txt, .json
    passed: dict[str, str] = {}  # key -> a member of it that has the ending of an image or video after another dot
    for member in read_members(shard):
        key, suffix = key_and_suffix(member.name)
        part = word if suffix in medium.suffixes else suffix
        if part not in (word, ".txt", ".json"):
            if suffix.endswith(medium.suffixes) and not Path(member.name).name.startswith("."):
                passed[key] = member.name
            continue
        if member.islnk() or member.issym():
            raise ValueError(f"{shard} has a link at {member.name}; write the file itself (tar --hard-dereference -h)")
        if not member.isfile():
            continue
        if part in samples.setdefault(key, {}):
            raise ValueError(f"{shard} has two {part} members named {key}; give each sample its own name")
        samples[key][part] = member
    if not any(word in parts for parts in samples.values()):
        raise ValueError(f"{shard} contains no {listed}")
    if lost := next((name for key, name in passed.items() if word not in samples.get(key, {})), None):
        raise ValueError(
            f"{shard} has {lost}, of whose name all after the first dot is the ending, as in any shard; rename it, "
            "with one dot"
        )
    if alone := next((key for key, parts in samples.items() if word not in parts), None):
        raise ValueError(
            f"{shard} has a caption of {alone}, but no {listed} of that name; add the {word} or remove the caption"
        )
    try:
        with shard.open("rb") as file:
            in_order = sorted(samples.values(), key=lambda parts: parts[word].offset)
            return tuple(read_entry(shard, file, parts, column, medium) for parts in in_order)
    except OSError as error:
        raise ValueError(f"cannot read {shard}: {error}") from None


def key_and_suffix(name: str) -> tuple[str, str]:
    """What the members of a sample share, and what differs: the name up to its first dot, and the rest in lower
    case."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", f".{extension.lower()}"


def read_members(shard: Path) -> list[tarfile.TarInfo]:
    """Every member of a shard. tarfile takes a damaged header for the end of the archive. So this also checks that the
    members are followed by what ends an archive, at least two blocks of zeros, and by nothing else. Raises ValueError
    if they are not, or if the file is no uncompressed tar."""
    members = []
    try:
        with tarfile.open(shard, "r:") as archive, shard.open("rb") as file:
            for member in archive:
                if member.size < 0:  # the archive would never end
                    raise tarfile.ReadError(f"{member.name} has a size of {member.size} bytes")
                members.append(member)
            zeros = file.seek(0, 2) - file.seek(archive.offset)
            if any(chunk.strip(b"\0") for chunk in iter(lambda: file.read(1 << 20), b"")):
                raise tarfile.ReadError(f"what follows byte {archive.offset:,} is neither a member nor the end")
            if (size := archive.offset + zeros) % tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"it has {size:,} bytes, which are no whole blocks of {tarfile.BLOCKSIZE}")
            if zeros < 2 * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it was cut short: the blocks of zeros that end a tar file are missing")
    except Exception as error:  # of a damaged file, tarfile raises errors of many kinds
        raise ValueError(
            f"{shard} is not a complete, uncompressed tar file: {error}; create or copy it again"
        ) from None
    return members


def read_entry(
    shard: Path, file: BinaryIO, parts: Mapping[str, tarfile.TarInfo], column: str | None, medium: Medium
) -> Entry:
    """One sample, from its members. Of the image or video, only as much is read as tells its size."""
    shown = parts[medium.word]
    where = f"{shown.name} in {shard}"

    def read(member: tarfile.TarInfo, most: int | None = None) -> bytes:
        file.seek(member.offset_data)
        return file.read(member.size if most is None else min(member.size, most))

    texts = {part: read(member) for part, member in parts.items() if part != medium.word}
    entry = Entry(shown.name, shown.offset_data, shown.size, None, read_caption(texts, column, where))
    if medium is VIDEOS:
        ending = key_and_suffix(shown.name)[1]
        header = read_header(section(file, entry.offset, entry.length), ending, where)
        return entry._replace(size=(header.width, header.height), header=header)
    size = picture_size(BytesIO(read(shown, 1 << 16)), where) or picture_size(BytesIO(read(shown)), where)
    return entry._replace(size=size)


def read_caption(texts: Mapping[str, bytes], column: str | None, where: str) -> str:
    """The caption of a sample, from its .txt member; from its .json member if there is no .txt or a column is
    given."""
    suffix = ".json" if column is not None or ".txt" not in texts else ".txt"
    if suffix not in texts:
        kinds = ".json" if column else ".txt or .json"
        raise ValueError(f"{where} has no caption; add a {kinds} member with the same name")
    try:
        text = texts[suffix].decode("utf-8-sig")
        row = {} if suffix == ".txt" else json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        kind = "UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON"
        raise ValueError(f"the {suffix} of {where} is not {kind}: {error}") from None
    if suffix == ".txt":
        return check_text(text.strip(), f"the .txt of {where}")
    if not isinstance(row, dict):
        raise ValueError(f'the .json of {where} is not an object like {{"caption": "a lighthouse"}}')
    column = choose_column(list(row), column, f"the .json of {where}")
    return check_text(row[column], f"{column} in the .json of {where}")
