"""Data sets from the Hugging Face hub, or local folders that `datasets` can read."""

import itertools
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen import noise
from fastgen.backbones.base import Backbone, BackboneConfig
from fastgen.batch import Conditioning
from fastgen.data.base import DataError, Stream
from fastgen.data.images import picture_fills, read_image
from fastgen.data.order import permutation
from fastgen.data.pictures import picture_size
from fastgen.data.readers import READERS, Readers
from fastgen.data.samples import Samples, SampleSource, SampleStream, encode_given_picture, encode_picture
from fastgen.data.sizes import check_sizes, resolution
from fastgen.data.tables import check_text, choose_column, import_extra
from fastgen.registry import MOST_BATCH

CHECKED_IMAGES = 256  # number of images whose size is checked before weights load

Row = dict[str, Any]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class HubData(SampleSource):
    """path: a hub id "org/name", or a local folder that `datasets` reads (parquet, arrow, csv, jsonl, or the output of
    `save_to_disk`). subset, split, revision: as in load_dataset. column: the caption column, by default `prompt`,
    `caption` or `text`. image_column: the column of the images; without it, the source has prompts only.

    A data set is downloaded once (or converted, if it is local) and read by random access. With `streaming: true` it
    is read in its own order and nothing is stored; see BlockStream. The sizes of the first 256 images are checked
    before weights load, and those of later images when they are read. The captions of a local data set are checked
    before weights load, and those of a data set on the hub after its download. When streaming, each caption is checked
    when it is read."""

    path: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str | None = None
    image_column: str | None = None
    allow_upscaling: bool = False
    streaming: bool = False
    shuffle_buffer: int = Field(default=1000, ge=1, le=MOST_BATCH)  # samples per block, when streaming
    name: Literal["hub"] = "hub"

    @property
    def provides(self) -> frozenset[str]:
        return frozenset() if self.image_column is None else frozenset({"latents", "pixels", "images"})

    def fills(self, backbone: BackboneConfig) -> frozenset[str]:
        return picture_fills(super().fills(backbone))

    def check(self, backbone: Any) -> None:
        import_extra("datasets", "data hub")
        local = Path(self.path).exists()
        rows = self.load(streaming=not local or self.streaming)
        first = next(iter(rows), None)
        if first is None:
            raise ValueError(f"path: {self.path} has no rows in split {self.split}")
        column = choose_column(list(first), self.column, self.path)
        check_text(first[column], f"{column} in row 1 of {self.path}")
        if local and not self.streaming:
            self.captions(rows)
        if self.image_column is not None:
            if self.image_column not in first:
                raise ValueError(
                    f"image_column: {self.path} has no column {self.image_column!r}; choose one of {', '.join(first)}"
                )
            sizes = (
                (f"row {i + 1} of {self.path}", picture_size(image_bytes(row[self.image_column]), f"row {i + 1}"))
                for i, row in enumerate(itertools.islice(rows, CHECKED_IMAGES))
            )
            check_sizes(sizes, resolution(backbone), self.allow_upscaling)

    def load(self, streaming: bool) -> Any:
        """The datasets.Dataset or IterableDataset, with undecoded images. Raises ValueError if it cannot be loaded."""
        datasets = import_extra("datasets", "data hub")
        folder = Path(self.path)
        try:
            if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
                rows = datasets.load_from_disk(folder)
                rows = self.stored_split(rows)
                rows = rows.to_iterable_dataset() if streaming else rows
            elif folder.is_file():
                raise ValueError("it is a file; give its folder, or name: prompts for a file of prompts")
            else:
                rows = datasets.load_dataset(
                    self.path, self.subset, split=self.split, revision=self.revision, streaming=streaming
                )
        except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"path: cannot load {self.path}, split {self.split}: {error}") from None
        for name in [n for n, feature in rows.features.items() if isinstance(feature, datasets.Image)]:
            rows = rows.cast_column(name, datasets.Image(decode=False))
        return rows

    def stored_split(self, saved: Any) -> Any:
        """The rows of the split of what `save_to_disk` saved: several splits or one. Raises ValueError if what is
        asked for is not there, which has no subsets and no revisions."""
        if self.subset or self.revision:
            raise ValueError("it was saved with save_to_disk; leave out subset and revision")
        if isinstance(saved, dict):
            return saved[self.split]
        if self.split not in ("train", str(saved.split)):
            raise ValueError("it was saved as one data set; leave out split, or save that part alone")
        return saved

    def captions(self, rows: Any) -> list[str]:
        """The caption of every row. Raises ValueError if one is not text."""
        column = choose_column(rows.column_names, self.column, self.path)
        return [check_text(value, f"{column} in row {i} of {self.path}") for i, value in enumerate(rows[column][:], 1)]

    def pixels(self, row: Row, where: str, size: tuple[int, int]) -> Tensor:
        """The pixels of a row's image, [3, H, W] in [0, 1]. Only for a source with images."""
        assert self.image_column is not None
        return read_image(image_bytes(row[self.image_column]), size, where, self.allow_upscaling)

    def samples(self, backbone: Backbone) -> Samples:
        rows = self.load(streaming=False)
        try:
            captions = self.captions(rows)
        except ValueError as error:
            raise DataError(f"data: {error}") from None
        if self.image_column is None:
            return Samples(captions)
        size, rows = backbone.picture_size, rows.select_columns([self.image_column])
        assert size is not None
        return Samples(
            captions, torch.arange(len(captions)), lambda i: self.pixels(rows[i], f"row {i + 1} of {self.path}", size)
        )

    def open(self, backbone: Backbone, seed: int, unit: int = 1, readers: int = READERS) -> Stream:
        key = noise.make_key(seed, "data")
        if self.streaming:
            return BlockStream(self, backbone, key, readers)
        return SampleStream(self.samples(backbone), backbone, key, readers=readers)


class BlockStream(Stream):
    """A data set that can only be read in order, repeated for ever. It is cut into blocks of `shuffle_buffer` samples.
    Position p is a sample of block p // shuffle_buffer. Each block is shuffled, keyed by the seed and its number.

    So the sample at a position depends on the seed and the position alone, as in other sources. A run resumes by
    skipping to its block. If there are several processes, each reads the whole stream and picks its own positions.
    Skipped samples are not decoded. Two blocks are kept in memory, undecoded. Positions should ascend, because a
    position in an earlier block restarts the stream. Only the captions of the first block are remembered, for samples
    of fixed prompts."""

    def __init__(self, source: HubData, backbone: Backbone, key: int, readers: int = READERS):
        self._source, self._backbone, self._key, self._size = source, backbone, key, source.shuffle_buffer
        self._rows, self._readers = source.load(streaming=True), Readers(readers)
        self._blocks: dict[int, list[Row]] = {}
        self._reader: Iterator[Row] = iter(())
        self._next = -1  # the block that the reader reads next
        self._first_captions: list[str] | None = None

    def prompts(self, positions: Tensor) -> list[str]:
        if int(positions.max()) < self._size:
            self._first_captions = self._first_captions or [self.caption(row) for row in self.block(0)]
            order = permutation(self._size, self._key, 0)
            return [self._first_captions[i] for i in order[positions].tolist()]
        return [self.caption(self.sample(p)) for p in positions.tolist()]

    @property
    def has_pictures(self) -> bool:
        return self._source.image_column is not None and self._backbone.picture_size is not None

    def pictures(self, positions: Tensor) -> Iterator[Tensor]:
        """The pixels of each position's image, [3, H, W]. Rows are taken from the stream in this thread."""
        size = self._backbone.picture_size
        assert size is not None
        where = f"{self._source.path}, sample {{}} of the stream"
        rows = ((self.sample(p), where.format(p), size) for p in positions.tolist())
        return self._readers.each(lambda row: self._source.pixels(*row), rows)

    def pixels(self, positions: Tensor) -> Tensor | None:
        return torch.stack(list(self.pictures(positions))) if self.has_pictures else None

    def images(self, positions: Tensor) -> Conditioning | None:
        if not (self.has_pictures and self._backbone.takes_given):
            return None
        return Conditioning.cat([encode_given_picture(self._backbone, image) for image in self.pictures(positions)])

    def latents(self, positions: Tensor) -> Tensor | None:
        if not self.has_pictures:
            return None
        return torch.stack([encode_picture(self._backbone, image) for image in self.pictures(positions)])

    def caption(self, row: Row) -> str:
        try:
            column = choose_column(list(row), self._source.column, self._source.path)
            return check_text(row[column], f"{column} of a row of {self._source.path}")
        except ValueError as error:
            raise DataError(f"data: {error}") from None

    def sample(self, position: int) -> Row:
        block, place = divmod(position, self._size)
        return self.block(block)[int(permutation(self._size, self._key, block)[place])]

    def block(self, number: int) -> list[Row]:
        if number not in self._blocks:
            if number != self._next:
                self._reader = repeated(self._rows, number * self._size)
            rows = list(itertools.islice(self._reader, self._size))
            self._blocks = {k: v for k, v in self._blocks.items() if k == number - 1} | {number: rows}
            self._next = number + 1
        return self._blocks[number]


def repeated(rows: Any, start: int) -> Iterator[Row]:
    """Rows `start`, `start + 1`, ... of an iterable data set, repeated for ever. Raises DataError if it is empty."""
    while True:
        any_rows = False
        for row in rows.skip(start):
            any_rows = True
            yield row
        if not any_rows:
            length = sum(len(table) for table in rows.with_format("arrow").iter(1000))
            if length == 0:
                raise DataError("data: the data set has no rows")
            start %= length
        else:
            start = 0


def image_bytes(value: Any) -> Path | BytesIO:
    """The encoded bytes, or the path, of an undecoded image. value: {"bytes", "path"} as `datasets` gives it, or
    bytes. Any other value gives no bytes, which read as a broken image."""
    if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
        return Path(value["path"])
    data = value.get("bytes") if isinstance(value, dict) else value
    return BytesIO(data if isinstance(data, bytes) else b"")
