"""Tar shards: all samples are read, or the shard is refused by name. No damage loses some of them in silence."""

import io
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from mutations import SECTOR, draws, mutated
from PIL import Image

from fastgen.backbones.sd3 import SD3Config
from fastgen.data import DataError, WebDatasetData
from fastgen.data.digits import assets_dir
from fastgen.data.tar_shards import Entry, expand_braces, index_shard, read_members

COUNT = 6
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def member(name: str, data: bytes) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, io.BytesIO(data)


def archive(members: dict[str, bytes], kind: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for name, data in members.items():
            tar.addfile(*member(name, data))
    return file.getvalue()


def digits() -> dict[str, bytes]:
    """Six samples, two of which have names so long that a tar needs an extension for them."""
    draw, members = np.random.default_rng(0), dict[str, bytes]()
    for i in range(COUNT):
        picture, name = io.BytesIO(), f"{'folder/' * 15 * (i % 3 == 2)}{i:06d}"
        Image.fromarray(draw.integers(0, 255, (32, 32, 3), np.uint8)).save(picture, "PNG")
        members |= {f"{name}.png": picture.getvalue(), f"{name}.txt": f"caption {i}".encode()}
    return members


WHOLE = {name: archive(digits(), kind) for name, kind in FORMATS.items()}


def entries(path: Path, data: bytes) -> list[Entry]:
    path.write_bytes(data)
    index_shard.cache_clear()
    return [entry for _, entry in WebDatasetData(shards=str(path)).entries()]


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def blanked(data: bytes, place: int) -> bytes:
    return data[:place] + bytes(SECTOR) + data[place + SECTOR :]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_header_anywhere_is_refused(kind: str, tmp_path: Path) -> None:
    """tarfile takes it for the end of the archive, and gives the samples before it."""
    path, data = tmp_path / "a.tar", WHOLE[kind]
    assert len(entries(path, data)) == COUNT
    for info in read_members(path):
        for damage in (flipped, blanked):
            with pytest.raises(ValueError, match=r"a\.tar is not a complete, uncompressed tar file"):
                entries(path, damage(data, info.offset))


def test_a_shard_that_ends_between_two_members_is_refused(tmp_path: Path) -> None:
    path, data = tmp_path / "a.tar", WHOLE["gnu"]
    entries(path, data)
    for info in read_members(path)[1:]:
        with pytest.raises(ValueError, match="it was cut short"):
            entries(path, data[: info.offset])


def test_two_archives_in_one_file_are_refused(tmp_path: Path) -> None:
    """As `cat a.tar b.tar` makes them: tarfile, and tar itself, read the first alone."""
    with pytest.raises(ValueError, match=r"what follows byte [\d,]+ is neither a member nor the end"):
        entries(tmp_path / "a.tar", WHOLE["gnu"] * 2)


def test_the_end_may_be_shorter_or_longer(tmp_path: Path) -> None:
    members = archive({"1.png": digits()["000000.png"], "1.txt": b"a"})
    end = len(members.rstrip(b"\0")) // SECTOR * SECTOR + SECTOR
    for zeros in (2 * SECTOR, 1 << 21):
        assert len(entries(tmp_path / "a.tar", members[:end] + bytes(zeros))) == 1
    with pytest.raises(ValueError, match="it was cut short"):
        entries(tmp_path / "a.tar", members[: end + SECTOR])


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"1.png": b"", "1.txt": b"a", "2.txt": b"b"}, r"a\.tar has a caption of 2, but no png"),
        ({"x/1.png": b"", "x/1.txt": b"a", "x/2.json": b"{}"}, r"a\.tar has a caption of x/2, but no png"),
        ({"1.png": b"", "1.jpg": b"", "1.txt": b"a"}, "two image members named 1"),
        (
            {"1.png": b"", "1.txt": b"a", "Mr. Bean.jpg": b"", "Mr. Bean.txt": b"b"},
            r"has Mr\. Bean\.jpg, of whose name",
        ),
        ({"1.png": b"", "1.txt": b"a", "1.TXT": b"b"}, r"two \.txt members named 1"),
        ({"1.png": b""}, r"1\.png in .*a\.tar has no caption"),
        ({"1.png": b"", "1.json": b"[" * 100_000}, r"the \.json of 1\.png in .*a\.tar is not JSON"),
        ({"1.png": b"", "1.txt": b"\xff"}, r"the \.txt of 1\.png in .*a\.tar is not UTF-8"),
    ],
)
def test_what_makes_no_sample_is_named(members: dict[str, bytes], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        entries(tmp_path / "a.tar", archive(members))


def test_a_compressed_shard_is_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        tar.addfile(*member("1.txt", b"a"))
    with pytest.raises(ValueError, match=r"a\.tar\.gz is not a complete, uncompressed tar file"):
        entries(tmp_path / "a.tar.gz", file.getvalue())


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "a.tar")
    with pytest.raises(ValueError, match=r"a\.tar is not a file"):
        WebDatasetData(shards=str(tmp_path)).entries()


def test_a_long_range_costs_nothing_before_its_first_file() -> None:
    assert list(islice(expand_braces("a-{000..999999999999}.tar"), 2)) == ["a-000.tar", "a-001.tar"]
    with pytest.raises(ValueError, match=r"no tar file at nowhere-0\.tar"):
        WebDatasetData(shards="nowhere-{0..999999999999}.tar").entries()


def test_a_picture_that_cannot_be_read_names_shard_and_member(tmp_path: Path) -> None:
    path, backbone = tmp_path / "a.tar", SD3Config(path=str(assets_dir() / "teachers/digits"))
    (entry, *_) = entries(path, WHOLE["gnu"])
    path.write_bytes(flipped(WHOLE["gnu"], entry.offset + entry.length // 2))
    index_shard.cache_clear()
    read = WebDatasetData(shards=str(path)).samples(backbone.build(torch.device("cpu"), torch.float32, 0)).read
    assert read is not None
    with pytest.raises(DataError, match=r"cannot read the image 000000\.png in .*a\.tar"):
        read(0)
    assert read(1).shape == (3, 32, 32)


def caption_members(path: Path, data: bytes) -> dict[str, slice]:
    """Where the member of each caption lies in a shard, from its header to its last byte."""
    path.write_bytes(data)
    texts = [info for info in read_members(path) if info.name.endswith(".txt")]
    spans = [slice(info.offset, info.offset_data + info.size) for info in texts]
    return {data[span][-info.size :].decode(): span for info, span in zip(texts, spans, strict=True)}


@pytest.mark.slow
def test_fuzzed_shards_give_every_sample_or_are_refused_by_name(tmp_path: Path) -> None:
    """A tar has no checksum of what is in a member: pictures have their own, and a changed letter is another caption.
    Everything else is the same, and so are all members without a changed byte."""
    path, counts = tmp_path / "fuzz.tar", Counter[str]()
    wanted = {kind: entries(path, data) for kind, data in WHOLE.items()}
    captions = {kind: caption_members(path, data) for kind, data in WHOLE.items()}
    for draw in draws():
        kind = draw.choice(list(FORMATS))
        data = mutated(draw, WHOLE[kind])
        try:
            read = entries(path, data)
        except ValueError as error:
            assert path.name in str(error)
            counts["refused"] += 1
            continue
        assert [entry[:3] for entry in read] == [entry[:3] for entry in wanted[kind]]  # name, offset, length
        changed = [b.caption for a, b in zip(read, wanted[kind], strict=True) if a.caption != b.caption]
        for caption in changed:  # its own member was damaged
            span = captions[kind][caption]
            assert data[span] != WHOLE[kind][span], (kind, caption)
        counts["another text" if changed else "the same"] += 1
    print(
        f"{counts['the same']} read the same, {counts['another text']} with another text in a caption that changed, "
        f"{counts['refused']} refused"
    )
    assert min(counts["the same"], counts["refused"]) > 100


def test_a_link_is_refused_and_not_left_out(tmp_path: Path) -> None:
    """tar stores a file that it has seen before as a link to it."""
    path = tmp_path / "a.tar"
    path.write_bytes(archive(digits()))
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("again.png")
        link.type, link.linkname = tarfile.LNKTYPE, "000000.png"
        tar.addfile(link)
        tar.addfile(*member("again.txt", b"a caption"))
    with pytest.raises(ValueError, match=r"has a link at again\.png"):
        entries(path, path.read_bytes())


def test_a_member_beside_the_picture_and_a_hidden_one_are_left_out(tmp_path: Path) -> None:
    more = {"000000.mask.png": b"another picture", "._000001.png": b"what a Mac adds"}
    assert len(entries(tmp_path / "a.tar", archive(digits() | more))) == COUNT


def test_a_name_may_have_brackets(tmp_path: Path) -> None:
    (tmp_path / "[1]").mkdir()
    assert len(entries(tmp_path / "[1]/a[2].tar", archive(digits()))) == COUNT
