"""What commands print: whole tables at any width, progress bars on terminals only, and no noise of libraries."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fresh import RunFresh
from rich.console import Console
from rich.table import Table

from fastgen.evaluation.results import results_table
from fastgen.run.terminal import LOG_WIDTH, console, print_table, progress_bar

ROOT = Path(__file__).parents[1]
NAMES = ["energy_distance", "energy_distance_floor", "images_per_second", "mode_share_min_ratio", "cov_error"]


def printed(table: Table, width: int, terminal: bool = True) -> str:
    to = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    print_table(table, to)
    assert to.width == width
    return to.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [20, 40, 80, 120, 200])
def test_a_table_keeps_its_words_and_columns_at_any_width(width: int) -> None:
    rows = [{"name": f"teacher at {k} steps", "metrics": dict.fromkeys(NAMES, k / 7)} for k in (4, 8, 50)]
    text = printed(results_table(rows), width)
    for word in (*" ".join(NAMES).replace("_", " ").split(), "teacher", "0.5714", "7.143"):
        assert word in text, word
    assert "…" not in text
    alone = printed(results_table(rows[:1]), width)
    assert all(name in alone for name in NAMES) and "…" not in alone


def test_output_that_is_no_terminal_is_wide(capsys: pytest.CaptureFixture[str]) -> None:
    to = console()
    assert to.width == LOG_WIDTH
    to.print("a sentence of many words " * 10, highlight=False)
    table = Table("role", "network evaluations per sample")
    table.add_row("fake_score", "student 2.48, fake_score 1, discriminator 1, teacher 2.48, held-out rewards 0.1")
    print_table(table, to)
    assert len(capsys.readouterr().out.splitlines()) == 1 + 5  # a heading, a row and three lines of the table


class Stream(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize(
    ("terminal", "options", "shown"),
    [
        (True, {}, True),
        (False, {}, False),
        (False, {"in_logs": True}, True),
        (True, {"enabled": False}, False),
        (False, {"enabled": False, "in_logs": True}, False),
    ],
)
def test_bars_are_for_terminals(
    terminal: bool, options: dict[str, bool], shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(1000, "measuring", "sample", **options) as bar:
        for _ in range(1000):
            bar.update()
    assert ("measuring" in stream.getvalue()) == shown
    if not terminal:
        assert stream.getvalue().count("\r") <= 3  # not a line each tenth of a second in the log of a night


LIBRARIES = """
import warnings
from fastgen.run.quiet import quiet_libraries
quiet_libraries()
from tqdm.auto import tqdm
from transformers.utils.logging import tqdm as transformers_tqdm
for bar in (tqdm, transformers_tqdm):
    for _ in bar(range(3), desc="Loading weights"):
        pass
warnings.warn("`torch_dtype` is deprecated", FutureWarning)
warnings.warn("torch.jit.script is deprecated", DeprecationWarning)
warnings.warn("something that a user should know")
from transformers import AutoTokenizer
AutoTokenizer.from_pretrained("assets/emoji/teacher/tokenizer")("apple " * 50)
"""


@pytest.mark.parametrize("asked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_commands_hide_what_libraries_say_to_programmers(asked: bool) -> None:
    """Short bars and warnings of future changes, unless Python is asked for warnings. Others are shown."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TQDM_", "PYTHONWARNINGS"))}
    command = [sys.executable, *(["-Wdefault"] if asked else []), "-c", LIBRARIES]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=True)
    assert "Loading weights" not in done.stderr and "something that a user should know" in done.stderr
    assert ("torch_dtype" in done.stderr) == asked and ("torch.jit.script" in done.stderr) == asked
    assert ("sequence length is longer than" in done.stderr) == asked


def test_importing_fastgen_hides_nothing(run_fresh: RunFresh) -> None:
    program = (
        "import os, warnings\n"
        "import fastgen.cli, fastgen.config, fastgen.run.terminal\n"
        "assert 'TQDM_DELAY' not in os.environ\n"
        "warnings.warn('`torch_dtype` is deprecated', FutureWarning)\n"
    )
    done = run_fresh(program, ROOT)
    assert done.returncode == 0 and "torch_dtype" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_plan_prints_nothing_on_standard_error() -> None:
    command = [sys.executable, "-m", "fastgen", "plan", str(ROOT / "recipes/digits_dmd2_4step.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "fake_score" in done.stdout and "parameters" in done.stdout and "…" not in done.stdout
