"""Writing files without losing what was there: a reader or a kill finds the old file or the new one, never a part."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

TEMPORARY = re.compile(r"\..+\.[a-z]+-[0-9a-f]{12}(\.mp4)?")  # names that `unused_sibling` gives


def unused_sibling(path: Path, word: str, suffix: str = "") -> Path:
    """A hidden path beside `path` that nothing has: .NAME.WORD-<random><suffix>. It is not created."""
    return path.with_name(f".{path.name}.{word}-{uuid4().hex[:12]}{suffix}")


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends. When the block fails, `path` stays as it was.
    The folder is created if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = unused_sibling(path, "partial")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Raises ValueError if no file or folder can be made at this path, so that this is known before the work."""
    holder = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    if not holder.is_dir():
        raise ValueError(f"{path} cannot be written, because {holder} is no folder; choose another place")
    if not os.access(holder, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: there is no permission to write in {holder}")


def check_output(path: Path, overwrite: bool) -> None:
    """Raises ValueError if a file cannot be written at this path, or is there already and must not be replaced."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another --output, or give --overwrite to replace it")
    check_place(path)


def replace_file(path: Path, data: bytes | str) -> None:
    """Writes a whole file in place of the one that is there."""
    with replacing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with the sha256 of all of it under the key "sha256", for JSON files that other files rely on."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return rest | {"sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def is_sealed(content: Mapping[str, Any]) -> bool:
    """Whether the content of a JSON file is what `sealed` gave."""
    return content.get("sha256") == sealed(content)["sha256"]


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, indented. Raises ValueError for numbers that are not finite, which JSON does not have."""
    replace_file(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
