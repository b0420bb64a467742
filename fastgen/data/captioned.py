"""Folders of pictures or videos with captions: in text files next to them, or in one table."""

import os
from collections.abc import Sequence
from pathlib import Path

from fastgen.data.media import Medium
from fastgen.data.tables import check_text, choose_column, columns_of, read_columns, read_text

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def read_captioned(folder: Path, column: str | None, medium: Medium) -> tuple[list[Path], list[str]]:
    """The files of a folder and their captions. Raises ValueError if either are missing.

    column: the caption column of the table; by default `prompt`, `caption` or `text`."""
    table = metadata_table(folder)
    return read_metadata(table, column, medium) if table else read_beside(folder, column, medium)


def read_beside(folder: Path, column: str | None, medium: Medium) -> tuple[list[Path], list[str]]:
    """The files, and their captions from the text files next to them."""
    files = medium.files(folder)
    if column is not None:
        raise ValueError(f"column: {folder} has none of {', '.join(METADATA)} and so no columns; leave column out")
    missing = [f.name for f in files if not f.with_suffix(".txt").is_file()]
    if missing:
        raise ValueError(
            f"folder: {len(missing)} {medium.word}s in {folder} have no caption, the first is {missing[0]}; put "
            f"each caption in a .txt file with the {medium.word}'s name, or all captions in a metadata.csv"
        )
    return files, [read_text(f.with_suffix(".txt")) for f in files]


def metadata_table(folder: Path) -> Path | None:
    """The table with the captions of a folder, if there is one. Raises ValueError for two."""
    tables = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(tables) > 1:
        raise ValueError(f"folder: {folder} has {' and '.join(t.name for t in tables)}; keep only one of them")
    return tables[0] if tables else None


def read_metadata(table: Path, column: str | None, medium: Medium) -> tuple[list[Path], list[str]]:
    """The files that a table lists, and their captions. Raises ValueError if a file or a caption is missing, and if
    one in the folder is not in the table, which may have been cut."""
    columns = columns_of(table)
    if "file_name" not in columns:
        raise ValueError(f"{table} has no column file_name, only {', '.join(columns)}")
    column = choose_column([c for c in columns if c != "file_name"], column, str(table))
    names, values = read_columns(table, ["file_name", column])
    captions = [check_text(value, f"{column} in row {i} of {table}") for i, value in enumerate(values, 1)]
    files = [table.parent / check_text(n, f"file_name in row {i} of {table}") for i, n in enumerate(names, 1)]
    missing = next((i for i, f in enumerate(files) if not os.path.isfile(f)), None)  # False for any impossible name
    if missing is not None:
        raise ValueError(f"row {missing + 1} of {table} names {names[missing]}, which does not exist")
    if alone := unlisted(files, table.parent, medium):
        number = f"1 {medium.word} that lies" if len(alone) == 1 else f"{len(alone)} {medium.word}s that lie"
        raise ValueError(
            f"{table} does not list {number} there, the first is {alone[0]}; add what is missing to the table, or "
            f"move the {medium.word}s out of the folder"
        )
    return files, captions


def unlisted(listed: Sequence[Path], root: Path, medium: Medium) -> list[Path]:
    """The files of this kind in a folder, and in the folders below it, that are not listed; sorted by name. Those in a
    folder `masks` belong to other files (`data.controls`)."""
    known = {os.path.normpath(file) for file in listed}
    found = (f for f in root.rglob("*") if f.suffix.lower() in medium.suffixes and os.path.normpath(f) not in known)
    return sorted(f for f in found if not f.is_dir() and f.parent != root / "masks")
