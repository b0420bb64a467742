"""Tables of results. A table is a JSON Lines file: every line is one JSON object, and its "name" is the row's key.

Several programs may write to one table at the same time, and each of them may be killed at any moment:

- `append_row` adds a finished row under a file lock, as one complete line in one write.
- `read_rows` takes the last line of each name, so that a row that is measured again replaces the older one. If the
  last line of the file was cut off while it was being written, it does not count.
- `sort_rows` removes the replaced lines and sorts the rest by name. The new file takes the old one's place at once.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: Path) -> dict[str, Row]:
    """The rows of a table by name; none if the file is not there. Raises ValueError for a line that is no row."""
    return parse(path.read_bytes(), path) if path.is_file() else {}


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row to a table, or replaces the row of that name. When this returns, the row is on the disk."""
    if not isinstance(row.get("name"), str):
        raise ValueError(f"a row needs a name, got the keys {sorted(row)}")
    line = json.dumps(row).encode() + b"\n"
    with locked(path) as file:
        end = mend(file)
        if os.write(file, line) != len(line):
            os.ftruncate(file, end)
            raise OSError(f"{path}: the row {row['name']} could not be written; is the disk full?")
        os.fsync(file)


def sort_rows(path: Path) -> None:
    """Rewrites a table with one line for each name, sorted by name. A table that is so already is left alone."""
    if not path.is_file():
        return
    with locked(path):
        before = path.read_bytes()
        rows = parse(before, path)
        after = "".join(json.dumps(rows[name]) + "\n" for name in sorted(rows))
        if after.encode() != before:
            replace_text(path, after)


def write_table(page: Path, name: str, table: str) -> None:
    """Puts a table between the marks <!-- NAME --> and <!-- end of NAME --> of a Markdown page. Raises ValueError if
    the page does not have them."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    if not after:
        raise ValueError(f"{page} has no {begin} and {end}")
    replace_text(page, f"{before}{begin}\n\n{table}\n\n{end}{after}")


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that a reader finds the old text or the new one, and never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        shutil.copymode(path, partial)
    partial.replace(path)


def parse(data: bytes, path: Path) -> dict[str, Row]:
    """The rows in the bytes of a table. What follows the last newline counts only if it is a whole row."""
    *lines, rest = data.split(b"\n")
    rows = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = parse_line(line)
        if row is None:
            raise ValueError(f"{path}, line {number}, is not a JSON object with a name: {line[:80]!r}")
        rows[row["name"]] = row
    row = parse_line(rest)
    if row is not None:
        rows[row["name"]] = row
    return rows


def parse_line(line: bytes) -> Row | None:
    """The row on a line, or None if the line does not hold one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("name"), str) else None


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """The file descriptor of a table that no other process changes meanwhile. The file is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if is_at(file, path):  # otherwise `sort_rows` replaced the file while this process waited for the lock
                yield file
                return
        finally:
            os.close(file)


def is_at(file: int, path: Path) -> bool:
    """Whether an open file is still the one with this path."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def mend(file: int) -> int:
    """Makes a table end with a complete line, and returns its size. A last line that was cut off is removed; a whole
    row without a newline, as some editors leave it, gets one."""
    size = os.fstat(file).st_size
    data = os.pread(file, size, 0)
    rest = data[data.rfind(b"\n") + 1 :]
    if not rest:
        return size
    if parse_line(rest) is not None:
        return size + os.write(file, b"\n")
    os.ftruncate(file, size - len(rest))
    return size - len(rest)
