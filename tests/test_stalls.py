"""A process that keeps the others waiting is named."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from fastgen.registry import RecipeError
from fastgen.run.stalls import SECONDS, Attendance, span, stall_seconds, watch

ROOT = Path(__file__).parents[1]


def test_ranks_in_words() -> None:
    assert span([3]) == "processes 3"
    assert span([0, 2, 3, 4, 7]) == "processes 0, 2-4, 7"


def test_the_seconds_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stall_seconds() == 60
    monkeypatch.setenv(SECONDS, "0")
    assert stall_seconds() == 0
    for text in ("-1", "soon", "inf", "nan"):
        monkeypatch.setenv(SECONDS, text)
        with pytest.raises(RecipeError, match=SECONDS):
            stall_seconds()


class Processes:
    """Three processes as threads: two wait for an event, the third one for a lock. A clock of our own."""

    def __init__(self) -> None:
        self.event, self.lock, self.now = threading.Event(), threading.Lock(), 0.0
        self.lock.acquire()
        threads = [threading.Thread(target=t, daemon=True) for t in (self.event.wait, self.event.wait, self.read)]
        for thread in threads:
            thread.start()
        while threads[2].ident is None or sys._current_frames()[threads[2].ident].f_code.co_name != "read":
            time.sleep(0.01)
        time.sleep(0.2)  # until the others wait, too
        store = dist.HashStore()
        self.members = [Attendance(store, i, 3, 60.0, t.ident or 0, 0.0) for i, t in enumerate(threads)]

    def read(self) -> None:
        self.lock.acquire()

    def look(self, seconds: int, *ranks: int) -> list[tuple[float, int, str]]:
        """Lets these ranks look every 5 seconds. Returns their reports, with the time and the rank."""
        reports = []
        for _ in range(seconds // 5):
            self.now += 5
            reports += [(self.now, i, text) for i in ranks if (text := self.members[i].look(self.now))]
        return reports


@pytest.fixture
def processes() -> Iterator[Processes]:
    started = Processes()
    yield started
    started.event.set()
    started.lock.release()


def test_places_are_said_each_time_the_wait_has_doubled(processes: Processes) -> None:
    reports = processes.look(600, 0, 1, 2)
    assert [rank for _, rank, _ in reports] == [0, 0, 0, 0]
    assert [60 <= now - limit <= 70 for now, limit in zip([r[0] for r in reports], [0, 60, 180, 420], strict=True)]
    name = re.escape(processes.members[2].name)
    assert re.search(rf"for 6\d s: {name} is in read; processes 0-1 are in wait$", reports[0][2])


def test_updates_are_signs_of_life(processes: Processes) -> None:
    for _ in range(20):
        for member in processes.members:
            member.moved()
        assert not processes.look(30, 0, 1, 2)
    assert processes.look(70, 0, 1, 2)


@pytest.mark.parametrize("stopped", [0, 1, 2])
def test_a_silent_process_is_named_by_the_first_of_the_others(processes: Processes, stopped: int) -> None:
    processes.look(30, 0, 1, 2)
    for member in processes.members:
        member.moved()  # so that nobody has been still for long
    others = [rank for rank in range(3) if rank != stopped]
    (_, speaker, text), *_ = processes.look(90, *others)
    assert speaker == others[0]
    assert f"{processes.members[stopped].name} gives no sign of life" in text


def test_a_launcher_that_is_gone_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """The launcher keeps the store. The process goes on without it."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
    attendance = Attendance(client, 0, 1, 0.1, threading.get_ident(), time.monotonic())
    attendance.look(time.monotonic())
    del server
    thread = threading.Thread(target=watch, args=(attendance, threading.Event()))
    thread.start()
    thread.join()
    said = capsys.readouterr().err
    assert said.count("the launcher of this run no longer answers") == 1 and f"pid {os.getpid()}" in said


@pytest.mark.slow
def test_a_stopped_process_is_named(tmp_path: Path) -> None:
    """Two processes by torchrun. One is stopped, named, and goes on: the run ends well."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "fastgen/train.py"]
    recipe = ["recipes/mixture_dmd2_4step.yaml", "backbone.fit_steps=0", "train.steps=20", "train.batch_size=16"]
    rest = ["train.device=cpu", "train.log_every=1", "eval.num_samples=400", "eval.teacher_steps=[2]"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), SECONDS: "2"}
    log = tmp_path / "log"
    command = [*program, *recipe, *rest, f"output_dir={tmp_path / 'run'}"]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    wait_for(process, lambda: (tmp_path / "run/log.jsonl").is_file())
    second = child_of_rank(process.pid, 1)
    os.kill(second, signal.SIGSTOP)
    try:
        wait_for(process, lambda: f"process 1 (pid {second}" in log.read_text())
    finally:
        os.kill(second, signal.SIGCONT)
    assert process.wait() == 0
    said = re.search("^warning: processes have waited.*$", log.read_text(), re.MULTILINE)
    assert said is not None
    print(said[0])
    assert "gives no sign of life" in said[0] and "process 0" in said[0]


def wait_for(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    while not condition():
        assert process.poll() is None
        time.sleep(0.1)


def child_of_rank(parent: int, rank: int) -> int:
    """The process that torchrun has started with this rank."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    ranks = {pid: re.search(rb"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes()) for pid in children}
    return next(int(pid) for pid, found in ranks.items() if found and int(found[1]) == rank)
