"""A part of a file as a file of its own, so that a member of a tar file is read without being copied."""

import io
from typing import Any, BinaryIO


class Section(io.RawIOBase):
    """The bytes [offset, offset + length) of a binary file, which it leaves open. The place in the file is its own."""

    def __init__(self, file: BinaryIO, offset: int, length: int):
        self._file, self._offset, self._length, self._place = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._place)
        data = self._file.read(min(len(buffer), max(self._length - self._place, 0)))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def section(file: BinaryIO, offset: int, length: int) -> BinaryIO:
    """The bytes [offset, offset + length) of a binary file."""
    return io.BufferedReader(Section(file, offset, length))  # type: ignore[return-value]
