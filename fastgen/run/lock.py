"""One program per folder: two that train, or prepare, in the same one would write over each other."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate import Accelerator

from fastgen.registry import RecipeError
from fastgen.run.machines import check_shared

LOCK = ".lock"


def lock(path: Path) -> tuple[int, str]:
    """Opens the lock file and locks it. Returns its descriptor, and who has the lock if that is another process."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        with suppress(OSError):  # some network file systems have no locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return handle, os.pread(handle, 200, 0).decode(errors="replace") or "another process"
        if not is_at(handle, path):
            os.close(handle)  # the run that had it has just ended, and removed the file
            continue
        with suppress(OSError):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        return handle, ""


def is_at(handle: int, path: Path) -> bool:
    """Whether the open file is the one at this path. It may have been removed, and another be there, at any moment."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def locked(
    folder: Path, accelerator: Accelerator, key: str = "output_dir", work: str = "is training in"
) -> Iterator[None]:
    """Holds the folder for this program, on all processes alike. The first process has the lock file open; the
    operating system gives it up when that process ends, however it ends. key, work: what messages call the folder, and
    what is done there.

    Raises RecipeError, naming the process, if another program works in the folder. That includes processes which a
    killed launcher has left behind. Also if machines see different folders under its name."""
    existed = folder.is_dir()
    handle = None
    owner = ""
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        handle, owner = lock(folder / LOCK)
    taken = torch.tensor(float(bool(owner)), device=accelerator.device)
    try:
        if accelerator.reduce(taken, "sum") > 0:
            raise RecipeError(
                f"{key}: {owner or 'another process'} {work} {folder}; wait for it, or end it (a "
                f"launcher that was killed may have left its processes running), or choose another {key}"
            )
        check_shared(accelerator, folder / LOCK, key)
        yield
    finally:
        if handle is not None:
            if not owner and is_at(handle, folder / LOCK):  # the folder may have been moved or removed
                os.unlink(folder / LOCK)
            os.close(handle)
            if not existed:
                with suppress(OSError):  # it has become a run
                    folder.rmdir()
