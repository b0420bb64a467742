"""Programs in processes of their own, which begin with torch imported and nothing else of weight.

Importing torch takes seconds. One process does it for all, and every program runs in a fork of that process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SERVER = """
import gc, json, os, sys, torch
gc.freeze()  # or else every fork would copy what it looks through
for line in sys.stdin:
    program, folder, *outputs = json.loads(line)
    if os.fork() == 0:
        os.chdir(folder)
        for number, path in enumerate(outputs, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
        sys.exit()
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""

RunFresh = Callable[[str, Path], subprocess.CompletedProcess[str]]


@contextmanager
def fresh_processes(scratch: Path) -> Iterator[RunFresh]:
    """A function that runs a program, given as text, in a folder, and returns its exit code and outputs. Environment
    variables that change what is shown are left out. scratch: an empty folder."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TQDM_", "PYTHONWARNINGS"))}
    command = [sys.executable, "-c", SERVER]
    outputs = [scratch / name for name in ("stdout", "stderr")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        asked, answered = server.stdin, server.stdout

        def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
            asked.write(json.dumps([program, str(folder), *map(str, outputs)]) + "\n")
            asked.flush()
            code = int(answered.readline())
            return subprocess.CompletedProcess(program, code, *(path.read_text() for path in outputs))

        yield run
        asked.close()
