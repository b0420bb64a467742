"""Tables of results survive several writers and kills at any moment."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.rows import append_row, read_rows, replace_text, sort_rows, write_table

ROOT = Path(__file__).parents[1]


def test_the_last_row_of_a_name_counts_and_sorting_keeps_it(tmp_path: Path) -> None:
    table = tmp_path / "folder/rows.jsonl"
    assert read_rows(table) == {}
    second, first, again = ({"name": name, "value": v} for name, v in (("b", 0.1), ("a", 1 / 3), ("b", 2e-17)))
    for row in (second, first, again):
        append_row(table, row)
    assert read_rows(table) == {"a": first, "b": again}
    assert len(table.read_text().splitlines()) == 3
    sort_rows(table)
    assert [json.loads(line) for line in table.read_text().splitlines()] == [first, again]
    before = table.stat()
    sort_rows(table)
    assert (table.stat().st_ino, table.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [path.name for path in table.parent.iterdir()] == ["rows.jsonl"]


def test_a_line_that_was_cut_off_is_ignored_and_then_removed(tmp_path: Path) -> None:
    table, whole = tmp_path / "rows.jsonl", json.dumps({"name": "b", "values": [1, {"c": 2.5}]})
    append_row(table, {"name": "a"})
    start = table.read_text()
    for length in range(len(whole)):
        table.write_text(start + whole[:length])
        assert read_rows(table).keys() == {"a"}
        append_row(table, {"name": "c"})
        assert table.read_text() == start + '{"name": "c"}\n'
    table.write_text(start + whole)  # only the newline is missing
    assert read_rows(table).keys() == {"a", "b"}
    append_row(table, {"name": "c"})
    assert table.read_text() == start + whole + "\n" + '{"name": "c"}\n'
    table.write_text(start + whole[:9])
    sort_rows(table)
    assert table.read_text() == start


def test_what_is_no_row_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "rows.jsonl"
    for line in ("<<<<<<< HEAD", '{"value": 1}', "[1]", '{"name": 3}'):
        table.write_text(f'{{"name": "a"}}\n\n{line}\n{{"name": "b"}}\n')
        with pytest.raises(ValueError, match=r"rows\.jsonl, line 3, is not a JSON object with a name"):
            read_rows(table)
    with pytest.raises(ValueError, match="a row needs a name"):
        append_row(table, {"value": 1})


def test_a_text_is_replaced_with_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    replace_text(path, "old")
    path.chmod(0o640)
    replace_text(path, "new")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o640)
    assert list(tmp_path.iterdir()) == [path]


START = """
from pathlib import Path
from benchmarks.rows import append_row, read_rows, sort_rows
table, payload = Path({table!r}), "x" * 9000
"""


def write_many(table: Path, program: str) -> subprocess.Popen[str]:
    """A process that writes to the table. Its program knows `table`, and a payload that fills several pages."""
    command = [sys.executable, "-c", START.format(table=str(table)) + program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_several_processes_write_and_sort_one_table(tmp_path: Path) -> None:
    table, count = tmp_path / "rows.jsonl", 40
    program = "for i in range({count}):\n append_row(table, {{'name': f'{who}{{i}}', 'payload': payload}})\n {then}\n"
    writers = [
        write_many(table, program.format(count=count, who=who, then=then))
        for who, then in (("a", "pass"), ("b", "sort_rows(table)"), ("c", "assert f'c{i}' in read_rows(table)"))
    ]
    assert [process.wait(60) for process in writers] == [0, 0, 0]
    assert read_rows(table).keys() == {f"{who}{i}" for who in "abc" for i in range(count)}
    assert all(row["payload"] == "x" * 9000 for row in read_rows(table).values())


@pytest.mark.parametrize("kill", range(3))
def test_a_killed_writer_loses_no_finished_row(tmp_path: Path, kill: int) -> None:
    """What it reported as written is there afterwards, and another process can go on."""
    table = tmp_path / "rows.jsonl"
    program = "i = 0\nwhile True:\n append_row(table, {'name': f'{i % 50}', 'count': i, 'payload': payload})\n"
    process = write_many(table, program + " sort_rows(table)\n print(i, flush=True)\n i += 1\n")
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.05 + 0.021 * kill)
    process.send_signal(signal.SIGKILL)
    reported = [0, *(int(line) for line in process.stdout.read().splitlines())]
    process.wait()
    rows = read_rows(table)
    assert max(row["count"] for row in rows.values()) in (reported[-1], reported[-1] + 1)
    assert len(rows) == min(max(row["count"] for row in rows.values()) + 1, 50)
    append_row(table, {"name": "after"})
    assert read_rows(table) == rows | {"after": {"name": "after"}}


def test_a_table_goes_between_its_marks_and_nothing_else_changes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- rows -->\n\nold\n\n<!-- end of rows -->\n\nafter\n")
    for table in ("| a |", "| b |"):
        write_table(page, "rows", table)
        assert page.read_text() == f"before\n\n<!-- rows -->\n\n{table}\n\n<!-- end of rows -->\n\nafter\n"
    with pytest.raises(ValueError, match="end of other"):
        write_table(page, "other", "")
    assert "| b |" in page.read_text()
