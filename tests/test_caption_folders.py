"""Captions of pictures: each picture has the one that its file says, or the file is named. None is lost in silence."""

import csv
import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from mutations import draws, mutated
from PIL import Image

from fastgen.data import ImageData
from fastgen.data.tables import read_text
from fastgen.metrics.reference import open_reference

CAPTIONS = {
    "0.png": "a lighthouse",
    "1.png": 'a sign, which says "open"',
    "2.png": "ein Hündchen, 犬, 🐕",
    "3.png": "two lines\nof one caption",
    "more/4.png": "a lighthouse",
    "more/5.png": "x" * 300,
}


def in_csv(*cells: str) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerow(cells)
    return file.getvalue()


def in_parquet(**columns: list[str]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file, write_page_checksum=True)
    return file.getvalue()


def in_json(name: str, caption: str) -> str:
    return json.dumps({"file_name": name, "text": caption}, ensure_ascii=False) + "\n"


LINES = {
    "metadata.csv": {name: in_csv(name, caption) for name, caption in CAPTIONS.items()},
    "metadata.jsonl": {name: in_json(name, caption) for name, caption in CAPTIONS.items()},
}
TABLES = {
    "metadata.csv": (in_csv("file_name", "text") + "".join(LINES["metadata.csv"].values())).encode(),
    "metadata.jsonl": "".join(LINES["metadata.jsonl"].values()).encode(),
    "metadata.parquet": in_parquet(file_name=list(CAPTIONS), text=list(CAPTIONS.values())),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures without captions."""
    draw = np.random.default_rng(0)
    for name in CAPTIONS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (8, 8, 3), np.uint8)).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def flat(folder: Path) -> Path:
    """The four pictures that are not in the subfolder, each with its caption in a .txt file."""
    shutil.rmtree(folder / "more")
    for path in folder.glob("*.png"):
        path.with_suffix(".txt").write_text(CAPTIONS[path.name])
    return folder


def read(folder: Path) -> list[tuple[str, str]]:
    """The pictures of a folder, by their names in it, with their captions."""
    files, captions = ImageData(folder=str(folder)).read()
    return [(str(file.relative_to(folder)), caption) for file, caption in zip(files, captions, strict=True)]


@pytest.mark.parametrize("table", TABLES)
def test_a_table_gives_every_picture_its_caption(table: str, folder: Path) -> None:
    (folder / table).write_bytes(TABLES[table])
    assert read(folder) == list(CAPTIONS.items())


@pytest.mark.parametrize("lost", ["3.png", "more/5.png", "more"])
@pytest.mark.parametrize("table", LINES)
def test_a_picture_that_the_table_does_not_list_is_named(table: str, lost: str, folder: Path) -> None:
    """As after a full disk, which cuts the table's end."""
    data = TABLES[table].decode()
    for name, line in LINES[table].items():
        data = data.replace(line, "") if name.startswith(lost) else data
    (folder / table).write_text(data)
    words = "2 images that lie" if lost == "more" else "1 image that lies"
    with pytest.raises(ValueError, match=rf"{table} does not list {words} there, the first is .*/{lost}"):
        read(folder)


@pytest.mark.parametrize(
    ("table", "text", "words"),
    [
        ("metadata.csv", "file_name,text,text\n0.png,a,b\n", r"metadata\.csv has two columns named text"),
        (
            "metadata.jsonl",
            '{"file_name": "0.png", "text": "a", "text": "b"}\n',
            r"line 1 of .*metadata\.jsonl .* two values of 'text'",
        ),
        (
            "metadata.jsonl",
            '{"file_name": "0.png", "text": "\\ud800"}\n',
            r"text in row 1 of .*metadata\.jsonl has half a character",
        ),
        ("metadata.csv", "file_name,text\n0.png,a\0b\n", r"text in row 1 of .*metadata\.csv has a NUL"),
        ("metadata.csv", f"file_name,text\n{'0' * 300}.png,a\n", r"row 1 of .*metadata\.csv names 0+\.png"),
        ("metadata.jsonl", '{"file_name": "0.png\\u0000", "text": "a"}\n', r"file_name in row 1 of .* has a NUL"),
        ("metadata.jsonl", '{"file_name": "\\ud800", "text": "a"}\n', r"file_name in row 1 of .* half a character"),
    ],
)
def test_what_is_no_caption_is_named(table: str, text: str, words: str, folder: Path) -> None:
    (folder / table).write_text(text)
    with pytest.raises(ValueError, match=words):
        read(folder)


def test_zeros_in_a_caption_file_are_refused_everywhere(flat: Path) -> None:
    """As a crash leaves in place of what was written last, and as UTF-16 without its mark has between the letters."""
    for data in (bytes(20), "a dog".encode("utf-16-le")):
        (flat / "1.txt").write_bytes(data)
        for reader in (read, lambda folder: open_reference(str(folder))):
            with pytest.raises(ValueError, match=r"1\.txt has a NUL"):
                reader(flat)


@pytest.mark.parametrize("data", [b"\xef", b"\xef\xbb"])
def test_a_part_of_a_byte_order_mark_is_no_text(data: bytes, flat: Path) -> None:
    (flat / "1.txt").write_bytes(data)
    with pytest.raises(ValueError, match=r"line 1 of .*1\.txt is not UTF-8"):
        read(flat)


def caption_of(data: bytes) -> str:
    """What a caption file says."""
    text = data.removeprefix(b"\xef\xbb\xbf").decode()
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


@pytest.mark.slow
def test_fuzzed_text_files_are_read_as_they_are_or_refused_by_name(flat: Path) -> None:
    """A missing caption is named by its picture."""
    counts, wanted = Counter[str](), dict(read(flat))
    for draw in draws(30):
        name = draw.choice(sorted(wanted))
        path = (flat / name).with_suffix(".txt")
        data = mutated(draw, CAPTIONS[name].encode())
        path.unlink()
        if draw.random() < 0.95:
            path.write_bytes(data)
        try:
            found = read(flat)
            assert tuple(caption for _, caption in found) == open_reference(str(flat)).prompts
        except ValueError as error:
            assert path.name in str(error) or (name in str(error) and not path.exists()), error
            counts["refused"] += 1
        else:
            expected = wanted | {name: caption_of(data)}
            assert found == list(expected.items()), data
            counts["the same" if expected == wanted else "another text"] += 1
        path.write_text(CAPTIONS[name])
    print(
        f"{counts['the same']} read the same, {counts['another text']} with another text, as the file says, "
        f"{counts['refused']} refused"
    )
    assert min(counts["another text"], counts["refused"]) > 100


@pytest.mark.slow
def test_fuzzed_tables_give_every_picture_a_caption_or_are_refused_by_name(folder: Path) -> None:
    """Text has no checksum: a changed letter is another caption. But every picture has one, and lines that are whole
    are read as they are."""
    counts = Counter[str]()
    for draw in draws(30):
        table = draw.choice(list(TABLES))
        data = mutated(draw, TABLES[table])
        (folder / table).write_bytes(data)
        try:
            found = read(folder)
        except ValueError as error:
            assert table in str(error), error
            counts["refused"] += 1
        else:
            assert {name for name, _ in found} == set(CAPTIONS)
            whole = [name for name, line in LINES.get(table, {}).items() if b"\n" + line.encode() in b"\n" + data]
            assert {(name, CAPTIONS[name]) for name in whole} <= set(found), data
            same = found == list(CAPTIONS.items())
            assert same or table in LINES  # parquet has checksums
            counts["the same" if same else "another text"] += 1
        (folder / table).unlink()
    print(
        f"{counts['the same']} read the same, {counts['another text']} with another text in the lines that changed, "
        f"{counts['refused']} refused"
    )
    assert min(counts["the same"], counts["another text"], counts["refused"]) > 100


def test_an_empty_caption_is_a_caption(flat: Path) -> None:
    """It trains the student without a prompt."""
    (flat / "1.txt").write_text("")
    assert dict(read(flat))["1.png"] == "" == read_text(flat / "1.txt")
