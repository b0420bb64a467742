"""Caption files: what is damaged is read alike or refused by name, and no row is lost without a word."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from mutations import draws, mutated

from fastgen.data.prompts import read_prompts

CAPTIONS = [f"a picture of the number {i}" for i in range(40)]


def parquet(**options: Any) -> bytes:
    file = io.BytesIO()
    table = pyarrow.table({"id": list(range(len(CAPTIONS))), "prompt": CAPTIONS})
    pyarrow.parquet.write_table(table, file, **options)
    return file.getvalue()


PARQUET = [
    parquet(write_page_checksum=True),
    parquet(write_page_checksum=True, compression="none", use_dictionary=False),
    parquet(write_page_checksum=True, compression="zstd", row_group_size=10),
]


def test_a_flipped_bit_in_a_parquet_file_with_checksums_is_found(tmp_path: Path) -> None:
    data = bytearray(PARQUET[1])
    data[data.index(b"number 7")] ^= 1
    path = tmp_path / "a.parquet"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable parquet file.*[Cc][Rr][Cc]"):
        read_prompts(str(path))


def test_text_that_is_not_utf8_in_a_parquet_file_is_named(tmp_path: Path) -> None:
    data = bytearray(parquet(compression="none", use_dictionary=False))
    data[data.index(b"number 7")] = 0xFF
    path = tmp_path / "a.parquet"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable parquet file: 'utf-8'"):
        read_prompts(str(path))


@pytest.mark.parametrize("line", ["[" * 100_000, '{"prompt": ' + "1" * 5000 + "}"], ids=["deep", "a long number"])
def test_a_json_row_that_python_cannot_hold_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*a\.jsonl is not JSON"):
        read_prompts(str(path))


@pytest.mark.slow
def test_fuzzed_parquet_is_read_alike_or_refused_by_name(tmp_path: Path) -> None:
    """Files with checksums. Those without can change the text that they hold, and nothing can tell."""
    path, counts = tmp_path / "fuzz.parquet", Counter[str]()
    for draw in draws():
        path.write_bytes(mutated(draw, draw.choice(PARQUET)))
        try:
            assert read_prompts(str(path)) == CAPTIONS
            counts["the same"] += 1
        except ValueError as error:
            assert path.name in str(error)
            counts["refused"] += 1
    print(f"{counts['the same']} read the same, {counts['refused']} refused")
    assert min(counts["the same"], counts["refused"]) > 100


def rows_of(suffix: str) -> list[str]:
    """The lines of a caption file: first its header, if it has one, then one line per caption."""
    if suffix == ".txt":
        return CAPTIONS
    if suffix == ".jsonl":
        return [json.dumps({"id": i, "prompt": caption}) for i, caption in enumerate(CAPTIONS)]
    comma, quote = {".csv": (",", '"'), ".tsv": ("\t", "")}[suffix]
    return [f"id{comma}prompt", *(f"{i}{comma}{quote}{caption}{quote}" for i, caption in enumerate(CAPTIONS))]


@pytest.mark.slow
def test_fuzzed_captions_keep_every_line_that_is_whole_or_are_refused_by_name(tmp_path: Path) -> None:
    """Text has no checksum: a changed letter is another caption. But what is whole is read, whatever is beside it."""
    files = {suffix: rows_of(suffix) for suffix in (".txt", ".csv", ".tsv", ".jsonl")}
    counts = Counter[str]()
    for draw in draws(30):
        suffix = draw.choice(list(files))
        rows, path = files[suffix], tmp_path / f"fuzz{suffix}"
        data = mutated(draw, "\n".join(rows).encode())
        path.write_bytes(data)
        try:
            read = read_prompts(str(path))
        except ValueError as error:
            assert path.name in str(error)
            counts["refused"] += 1
            continue
        lines = set(data.split(b"\n"))
        whole = {
            caption for caption, row in zip(CAPTIONS, rows[-len(CAPTIONS) :], strict=True) if row.encode() in lines
        }
        assert whole <= set(read), (suffix, whole - set(read))
        counts["the same" if read == CAPTIONS else "another text"] += 1
    print(
        f"{counts['the same']} read the same, {counts['another text']} with another text in the lines that changed, "
        f"{counts['refused']} refused"
    )
    assert min(counts.values()) > 100
