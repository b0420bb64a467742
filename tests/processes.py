"""Several gloo processes that are forks of this one, so that none of them has to import anything."""

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState


def in_processes(folder: Path, count: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Calls function(*arguments) in `count` processes, set up as torchrun does. Raises AssertionError with the
    tracebacks of those that fail, which they write into `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(count):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
                os.environ |= {k: str(v) for k, v in ranks.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                torch.set_num_threads(1)  # a fork has none of the threads of its parent
                for state in (AcceleratorState, GradientState, PartialState):
                    state._reset_state()
                function(*arguments)
                code = 0
            except BaseException:
                (folder / f"failed_{rank}.txt").write_text(traceback.format_exc())
            finally:
                os._exit(code)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    failed = "\n".join(path.read_text() for path in sorted(folder.glob("failed_*.txt")))
    assert not any(codes), f"exit codes {codes}\n{failed}"
