"""What commands show: whole tables, and progress bars on a terminal."""

import re
import sys
from collections import Counter

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from tqdm import tqdm

LOG_WIDTH = 500  # of output that is no terminal, where nothing needs to be wrapped
LOG_SECONDS = 60.0  # between two lines of a progress bar there


def console(quiet: bool = False) -> Console:
    """The console of standard output. If that is a file or a pipe, lines are not wrapped at 80 columns."""
    return Console(quiet=quiet, width=None if sys.stdout.isatty() else LOG_WIDTH)


def print_table(table: Table, console: Console) -> None:
    """Prints a table with whole words: cells are wrapped between words to fit the console, and where that is not
    enough, the table is wider than the console. rich alone would cut words."""
    own, whole = console.width, words(table, console, LOG_WIDTH)
    least = Measurement.get(console, console.options.update(width=LOG_WIDTH), table).minimum
    enough = (w for w in range(max(own, least), LOG_WIDTH) if whole <= words(table, console, w))
    console.width = next(enough, max(own, LOG_WIDTH))
    console.print(table)
    console.width = own


def words(table: Table, console: Console, width: int) -> Counter[str]:
    """What a table of this width shows, without its lines, which are box-drawing characters."""
    lines = console.render_lines(table, console.options.update(width=width))
    text = "\n".join("".join(segment.text for segment in line) for line in lines)
    return Counter(re.findall(r"[^\s\u2500-\u257f]+", text))


def progress_bar(
    total: int, what: str, unit: str = "it", initial: int = 0, enabled: bool = True, in_logs: bool = False
) -> tqdm:
    """A progress bar on standard error, if that is a terminal. in_logs: elsewhere, too, with a line a minute."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        initial=initial,
        delay=0,
        disable=not (enabled and (terminal or in_logs)),
        mininterval=0.1 if terminal else LOG_SECONDS,
        maxinterval=10.0 if terminal else LOG_SECONDS,
    )
