"""Reads columns of text and table files: txt, csv, tsv, jsonl and parquet. Errors name the line or row."""

import csv
import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

CAPTION_COLUMNS = ("prompt", "caption", "text")  # tried in this order
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


def read_lines(path: Path) -> list[str]:
    """The non-empty lines of a UTF-8 file, stripped, also of the marks that files begin with, which are in the middle
    of joined ones. Raises ValueError for a line that is no text."""
    with utf8(path), path.open(encoding="utf-8") as file:
        lines = [line.replace("\ufeff", "").strip() for line in file]
    return [check_text(line, f"line {i} of {path}") for i, line in enumerate(lines, 1) if line]


def read_captions(path: Path, column: str | None) -> list[str]:
    """The caption column of a table. Raises ValueError if the column is missing, has no rows, or contains anything but
    text."""
    column = choose_column(columns_of(path), column, str(path))
    (values,) = read_columns(path, [column])
    return [check_text(value, f"{column} in row {i} of {path}") for i, value in enumerate(values, 1)]


def choose_column(columns: Sequence[str], column: str | None, where: str) -> str:
    """The name of the caption column: `column`, or by default the first of prompt, caption and text that exists.
    Raises ValueError if it does not exist."""
    chosen = next((c for c in CAPTION_COLUMNS if c in columns), None) if column is None else column
    if chosen is None or chosen not in columns:
        what = "no column prompt, caption or text" if column is None else f"no column {column!r}"
        raise ValueError(f"column: {where} has {what}; choose one of {', '.join(columns)}")
    return chosen


def check_text(value: Any, where: str) -> str:
    """Returns the value. Raises ValueError if it is not text; also for a NUL, which a crash leaves in place of what
    was written last, and for one half of a surrogate pair, which no UTF-8 file can hold."""
    if not isinstance(value, str):
        shown = "null" if value is None else f"{str(value)[:40]!r} ({type(value).__name__})"
        raise ValueError(f"{where} is {shown}, not text; correct or remove it, or choose another column")
    if "\0" in value:
        raise ValueError(f"{where} has a NUL character: it is damaged, or UTF-16; write it again as UTF-8")
    if half := next((c for c in value if "\ud800" <= c <= "\udfff"), None):
        raise ValueError(f"{where} has half a character, \\u{ord(half):x}; correct or remove it")
    return value


def columns_of(path: Path) -> list[str]:
    """The column names; for jsonl, the keys of the first row. Raises ValueError for an empty file."""
    if path.suffix.lower() == ".parquet":
        with parquet_file(path) as file:
            return list(file.schema_arrow.names)
    first = next(rows_of(path), None)
    if first is None:
        raise ValueError(f"{path} is empty: it has no rows")
    return list(first)


def read_columns(path: Path, columns: Sequence[str]) -> list[list[Any]]:
    """One list per column, all of equal length. Raises ValueError if there are no rows, or if a row lacks a column."""
    if path.suffix.lower() == ".parquet":
        with parquet_file(path) as file:
            table = file.read(columns=list(columns))
            values = [table.column(column).to_pylist() for column in columns]
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            if {file.metadata.num_rows, sum(groups)} != {len(cells) for cells in values}:
                raise ValueError(f"it says that it has {file.metadata.num_rows} rows, and has {len(values[0])}")
    else:
        values = [[] for _ in columns]
        for number, row in enumerate(rows_of(path), 1):
            for column, cells in zip(columns, values, strict=True):
                if column not in row:
                    raise ValueError(f"row {number} of {path} has no {column}")
                cells.append(row[column])
    if not values[0]:
        raise ValueError(f"{path} is empty: it has no rows")
    return values


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a csv, tsv or jsonl file."""
    with utf8(path), path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() == ".jsonl":
            yield from json_rows(path, file)
        else:
            yield from csv_rows(path, file)


def json_rows(path: Path, lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} of {path} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f'line {number} of {path} is not an object like {{"prompt": "a lighthouse"}}')
        yield row


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values. Raises ValueError if a key repeats, where json would take the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"it has two values of {repeated([key for key, _ in pairs])!r}")
    return row


def repeated(names: Sequence[str]) -> str:
    """The first of the names that is there twice; "" if none is."""
    return next((name for i, name in enumerate(names) if name in names[:i]), "")


def csv_rows(path: Path, lines: Iterator[str]) -> Iterator[dict[str, str]]:
    reader = csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError(f"{path} has two columns named {repeated(header)}; rename or remove one of them")
        for cells in reader if header else ():
            if cells and len(cells) != len(header):
                raise ValueError(
                    f"line {reader.line_num} of {path} has {len(cells)} cells, but the header has "
                    f"{len(header)}; text that contains a comma needs quotes"
                )
            if cells:
                yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} of {path} is not valid csv: {error}") from None


@contextmanager
def utf8(path: Path) -> Iterator[None]:
    """Turns a decoding error into a ValueError that names the line."""
    try:
        yield
    except UnicodeDecodeError:
        with path.open("rb") as file:
            number = next(i for i, line in enumerate(file, 1) if not decodes(line))
        raise ValueError(
            f"line {number} of {path} is not UTF-8; convert the file, for example with iconv -f WINDOWS-1252 -t UTF-8"
        ) from None


def read_text(path: Path) -> str:
    """A caption file's text, without the spaces around it. Raises ValueError if it is not UTF-8, or no text."""
    with utf8(path):
        text = path.read_bytes().decode("utf-8-sig")  # an open file skips even a part of the byte order mark
    return check_text(text.replace("\r\n", "\n").replace("\r", "\n").strip(), str(path))


def decodes(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


@contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    """An open parquet file, whose checksums, if it has some, are compared when it is read. Any error in the block
    becomes a ValueError that names the file: of a damaged one, Arrow raises errors of many kinds."""
    pyarrow = import_extra("pyarrow.parquet", str(path))
    try:
        with pyarrow.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except Exception as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}; create or copy it again") from None


def import_extra(module: str, needed_by: str) -> ModuleType:
    """Imports a module of the optional extra `data`. Raises ValueError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        package = module.partition(".")[0]
        raise ValueError(f"{needed_by} needs {package}; install it with pip install 'fastgen-distill[data]'") from None
