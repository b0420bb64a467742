"""Signals that ask a run to end: it saves first, and says how to continue."""

import os
import signal
import time
from collections.abc import Mapping
from types import FrameType

import torch
from accelerate import Accelerator

COPIES = 5.0  # ours
# The exit code of a run that was asked to end, by signal. Slurm sends SIGUSR1 before its time limit.
EXIT_CODES: Mapping[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}


class Interrupted(Exception):
    """A signal ended the run after a checkpoint was saved. exit_code: what the program should return."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class Interruption:
    """While entered, the first signal is noted and the second one ends the process at once. A scheduler signals all
    processes of a job, torchrun among them, which passes the signal on: under torchrun, what comes within `COPIES`
    seconds is the same one.

    Only the main thread of a program can receive signals; elsewhere nothing is changed. says: whether the first signal
    is answered on standard error."""

    def __init__(self, says: bool = True) -> None:
        self.received, self.says, self.when = 0, says, 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        try:
            self._before = {number: signal.signal(number, self.note) for number in EXIT_CODES}
        except ValueError:  # not the main thread
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def note(self, number: int, _frame: FrameType | None) -> None:
        before, self.when = self.when, time.monotonic()
        if self.received and "TORCHELASTIC_RUN_ID" in os.environ and self.when - before < COPIES:
            return
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
        if self.says:
            text = "the run saves what it has and ends; a second signal ends it at once"
            os.write(2, f"\n{signal.Signals(number).name}: {text}\n".encode())  # print may be what was interrupted

    def agreed(self, accelerator: Accelerator) -> int:
        """The signal that any process has received, 0 if none has. All processes call this together, so that they end
        at the same step."""
        if accelerator.num_processes == 1:
            return self.received
        seen = torch.zeros(accelerator.num_processes, device=accelerator.device)
        seen[accelerator.process_index] = self.received
        return int(accelerator.reduce(seen, "sum").max())
