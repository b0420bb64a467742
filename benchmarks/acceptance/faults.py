"""The faults that fault_runs.py puts on a training, each at a moment drawn from a seed."""

import errno
import itertools
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Moment = tuple[float, Callable[[int], object]]  # seconds after the start, and what is then done to process `pid`
OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")  # Python's audit events
DISK = 64 << 20  # bytes of a file system of our own


@dataclass(frozen=True)
class Scale:
    """The size of the uninterrupted run, from which moments are drawn. bytes: of its largest file."""

    seconds: float
    operations: int
    bytes: int


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Fault:
    """inside: called in the process before it trains. act: called in it just before file operation number `operation`.
    moments: what is done to the process while it runs. before and after: called around it, in the program that starts
    it."""

    inside: Callable[[], object] = nothing
    operation: int = -1
    act: Callable[[], None] = nothing
    moments: tuple[Moment, ...] = ()
    before: Callable[[], object] = nothing
    after: Callable[[], object] = nothing


class Operations:
    """Counts the operations of this process that open a file for writing, rename, remove or make a folder, and calls
    `act` just before operation number `number`."""

    def __init__(self, number: int, act: Callable[[], None]):
        self.seen, self.number, self.act = 0, number, act
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple[object, ...]) -> None:
        if event not in OPERATIONS:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        self.seen += 1
        if self.seen == self.number + 1:
            self.act()


def sent(draw: random.Random, scale: Scale, *numbers: int) -> Fault:
    """Signals: the first at a random moment of the run, each other one up to half a second later."""
    at, moments = draw.uniform(0, scale.seconds), list[Moment]()
    for number in numbers:
        moments.append((at, lambda pid, number=number: os.kill(pid, number)))  # type: ignore[misc]
        at += draw.uniform(0, 0.5)
    return Fault(moments=tuple(moments))


def beginning(draw: random.Random, scale: Scale) -> float:
    """When a limit begins to hold: in one of three runs from the start, and otherwise at a random moment."""
    return draw.choice([0.0, draw.uniform(0, scale.seconds), draw.uniform(0, scale.seconds)])


def at_operation(draw: random.Random, scale: Scale, act: Callable[[], None]) -> Fault:
    return Fault(operation=draw.randrange(scale.operations), act=act)


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def file_limit(draw: random.Random, scale: Scale, answer: signal.Handlers) -> Fault:
    """From a random moment on, no file may grow beyond a random size. answer: how the process takes SIGXFSZ. Python
    ignores it, and the write then fails with EFBIG."""
    size, at = int(scale.bytes * draw.random() ** 2), beginning(draw, scale)
    moments = ((at, lambda pid: limit(pid, resource.RLIMIT_FSIZE, size)),)
    return Fault(inside=lambda: signal.signal(signal.SIGXFSZ, answer), moments=moments)


def few_files(draw: random.Random, scale: Scale) -> Fault:
    """From a random moment on, no further file may be opened, or one at a time."""
    few, at = draw.randrange(2), beginning(draw, scale)

    def act(pid: int) -> None:
        used = set(os.listdir(f"/proc/{pid}/fd"))
        lowest = next(i for i in itertools.count() if str(i) not in used)
        limit(pid, resource.RLIMIT_NOFILE, lowest + few)

    return Fault(moments=((at, act),))


def limit(pid: int, what: int, value: int) -> None:
    resource.prlimit(pid, what, (value, resource.prlimit(pid, what)[1]))


def full_disk(draw: random.Random, scale: Scale, disk: Path) -> Fault:
    """From a random moment on, the file system has few free pages: none, or up to those of three checkpoints."""
    pages, at = draw.randrange(100), beginning(draw, scale)

    def act(_: int) -> None:
        now = os.statvfs(disk)
        mount(disk, f"remount,size={(now.f_blocks - now.f_bfree + pages) * now.f_frsize}")

    return Fault(moments=((at, act),), after=lambda: mount(disk, f"remount,size={DISK}"))


def read_only(_draw: random.Random, _scale: Scale, disk: Path) -> Fault:
    """The file system is read-only when the command starts."""
    return Fault(before=lambda: mount(disk, "remount,ro"), after=lambda: mount(disk, "remount,rw"))


def mount(disk: Path, options: str) -> None:
    """Mounts a file system in memory, or changes its options."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], check=True)


KILL, TERM, INT, USR1 = signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
KINDS: dict[str, Callable[[random.Random, Scale, Path], Fault]] = {
    "SIGKILL": lambda d, s, _: sent(d, s, KILL),
    "SIGKILL at a file operation": lambda d, s, _: at_operation(d, s, kill_this_process),
    "SIGTERM": lambda d, s, _: sent(d, s, TERM),
    "SIGINT": lambda d, s, _: sent(d, s, INT),
    "SIGUSR1": lambda d, s, _: sent(d, s, USR1),
    "two signals": lambda d, s, _: sent(d, s, *d.choice([(TERM, TERM), (INT, INT), (USR1, TERM)])),
    "file size limit": lambda d, s, _: file_limit(d, s, signal.SIG_IGN),
    "file size limit, fatal": lambda d, s, _: file_limit(d, s, signal.SIG_DFL),
    "no space at a file operation": lambda d, s, _: at_operation(d, s, refuse_space),
    "few open files": lambda d, s, _: few_files(d, s),
    "full file system": full_disk,
    "read-only file system": read_only,
}
MOUNTED = ("full file system", "read-only file system")  # kinds that need a file system of their own
