"""Says in words which process keeps the others waiting.

Processes wait for each other in every update. When one of them stops or hangs, the others would be silent until torch
gives up, after ten minutes or more. So a thread of every process watches where the process's main thread is, and tells
the others by torch's key-value store."""

import json
import os
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch.distributed as dist
from accelerate import Accelerator
from tqdm import tqdm

from fastgen.registry import RecipeError

SECONDS = "FASTGEN_STALL_SECONDS"
DEFAULT_SECONDS = 60.0
LOOKS = 12  # at the main thread, in the seconds after which a process counts as stopped
PACKAGE = Path(__file__).resolve().parents[1]


class Message(NamedTuple):
    """What a process tells the others. still: seconds for which it has been at this place. looks: so that every
    message is another one."""

    process: str
    place: str = ""
    still: float = 0.0
    looks: int = 0


class Attendance:
    """Where every process is. One process looks at itself and at the others whenever `look` is called.

    A process is still if its main thread is at the same instruction in every look and has made no update meanwhile. It
    is silent if it has not been heard of. Once any has been so for `seconds`, the first process that is not silent
    itself says where all of them are, and says it again each time the wait has doubled."""

    def __init__(self, store: dist.Store, rank: int, num_processes: int, seconds: float, thread: int, now: float):
        self.store, self.rank, self.seconds, self.thread = store, rank, seconds, thread
        self.keys = [f"fastgen/attendance/{other}" for other in range(num_processes)]
        self.name = f"process {rank} (pid {os.getpid()} on {socket.gethostname()})"
        self.updates, self.looks, self.next_report = 0, 0, seconds
        self.here: tuple[object, ...] = ()
        self.since = now
        self.heard = [(b"", self.since)] * num_processes  # the last message of each process, and when it came

    def moved(self) -> None:
        """To be called by the main thread after every update."""
        self.updates += 1

    def look(self, now: float) -> str | None:
        """Tells the others where this process is. now: seconds by a clock that never goes back. Returns a report, if
        there is one to make and this process is the one to make it."""
        frame = sys._current_frames()[self.thread]
        if self.here != (here := (self.updates, *instructions(frame))):
            self.here, self.since = here, now
        self.looks += 1
        message = Message(self.name, place(frame), now - self.since, self.looks)
        self.store.set(self.keys[self.rank], json.dumps(message))
        if self.store.check(self.keys):
            messages = self.store.multi_get(self.keys)
            self.heard = [old if old[0] == new else (new, now) for old, new in zip(self.heard, messages, strict=True)]
        return self.report(now)

    def report(self, now: float) -> str | None:
        """Where all processes are, if it is time to say that and this process is to say it."""
        silences = [now - when for _, when in self.heard]
        told = [Message(*json.loads(text or f'["process {i}"]')) for i, (text, _) in enumerate(self.heard)]
        silent = [rank for rank, silence in enumerate(silences) if silence >= self.seconds]
        alive = [rank for rank in range(len(told)) if rank not in silent]
        longest = max([told[rank].still for rank in alive] + [silences[rank] for rank in silent])
        if longest < self.seconds:
            self.next_report = self.seconds
        if longest < self.next_report or alive[:1] != [self.rank]:
            return None
        while self.next_report <= longest:
            self.next_report *= 2
        parts = [f"{told[rank].process} gives no sign of life" for rank in silent]
        places = defaultdict[str, list[int]](list)
        for rank in alive:
            places[told[rank].place].append(rank)
        for where, ranks in sorted(places.items(), key=lambda item: len(item[1])):
            who = f"{told[ranks[0]].process} is" if len(ranks) == 1 else f"{span(ranks)} are"
            parts.append(f"{who} in {where}")
        return f"warning: processes have waited for each other for {longest:.0f} s: {'; '.join(parts)}"


def instructions(frame: FrameType | None) -> Iterator[tuple[object, int]]:
    """The instruction that each function on the stack is at."""
    while frame is not None:
        yield frame.f_code, frame.f_lasti
        frame = frame.f_back


def place(frame: FrameType) -> str:
    """The innermost function of this package on the stack, its file and line, and what it has called."""
    own: FrameType | None = frame
    while own is not None and PACKAGE not in Path(own.f_code.co_filename).parents:
        own = own.f_back
    if own is None:
        return frame.f_code.co_name
    line = f"{Path(own.f_code.co_filename).relative_to(PACKAGE.parent)}:{own.f_lineno}"
    called = "" if own is frame else f", which called {frame.f_code.co_name}"
    return f"{own.f_code.co_name} ({line}){called}"


def span(ranks: Iterable[int]) -> str:
    """Ranks in words: "processes 0, 2-7"."""
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0])]
    return "processes " + ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


@contextmanager
def attended(accelerator: Accelerator) -> Iterator[Callable[[], None]]:
    """Watches the processes of a run from a thread, and prints reports. Yields a function to be called after every
    update. With one process, or if the environment variable FASTGEN_STALL_SECONDS is 0, nothing is watched.

    Raises RecipeError if that variable is not a number of seconds."""
    seconds = stall_seconds()
    if accelerator.num_processes == 1 or not seconds:
        yield lambda: None
        return
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=max(seconds, 30)))
    rank, main = accelerator.process_index, threading.main_thread().ident or 0
    attendance = Attendance(store, rank, accelerator.num_processes, seconds, main, time.monotonic())
    ended = threading.Event()
    thread = threading.Thread(target=watch, args=(attendance, ended), daemon=True, name="attendance")
    thread.start()
    try:
        yield attendance.moved
    finally:
        ended.set()
        thread.join(timeout=5)


def watch(attendance: Attendance, ended: threading.Event) -> None:
    """Looks until the run has ended, or until the launcher, which keeps the store, is gone."""
    while not ended.wait(attendance.seconds / LOOKS):
        try:
            if report := attendance.look(time.monotonic()):
                tqdm.write(report, file=sys.stderr)
        except RuntimeError:  # of the store
            if not ended.is_set() and os.environ.get("LOCAL_RANK", "0") == "0":
                tqdm.write(
                    f"warning: the launcher of this run no longer answers; {attendance.name} goes on without it",
                    file=sys.stderr,
                )
            return


def stall_seconds() -> float:
    """After how many seconds a wait is reported."""
    text = os.environ.get(SECONDS, str(DEFAULT_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise RecipeError(f"{SECONDS} is {text!r}; set it to a number of seconds, or to 0 for no reports")
    return seconds
