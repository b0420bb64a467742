"""Results of evaluations: the files, the table, and the page that shows or compares them."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import Tensor

from fastgen.data.files import check_output, write_json
from fastgen.evaluation.charts import TEACHER, format_value, metric_names
from fastgen.run import terminal

Row = dict[str, Any]


def write_results(
    path: Path,
    rows: Sequence[Row],
    samples: Mapping[str, Tensor] | None = None,
    captions: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Writes several results, each with a name, as {"rows": [...]}, and an HTML page that compares them next to it.

    samples, captions: by the name of their row, in the form that `report.draw_pictures` takes."""
    write_json(path, {"rows": list(rows)})
    write_page(path.with_suffix(".html"), rows, samples or {}, captions or {})


def write_page(
    path: Path,
    rows: Sequence[Row],
    samples: Mapping[str, Tensor],
    captions: Mapping[str, Sequence[str]],
    views: Tensor | None = None,
) -> None:
    """views: [steps, B, 3, H, W], the clean predictions of the first row's first samples after each step."""
    # matplotlib takes a second to import
    from fastgen.evaluation.report import draw_pictures, draw_steps, write_report

    name = str(rows[0]["name"])
    strips = [] if views is None else draw_steps(name, views, captions[name])
    write_report(path, rows, [*draw_pictures(samples, captions), *strips])


def compare(results_files: Sequence[Path], output_html: Path, overwrite: bool = True) -> None:
    """Writes one page and prints one table for several result files. Rows whose name repeats also show their file. The
    samples are those of the pages beside the result files.

    overwrite: whether the page may exist. Raises ValueError if it must not, and for a file that contains no result."""
    from fastgen.evaluation.report import pictures_in, write_report

    check_output(output_html, overwrite)
    found, teachers = {Path(file): read_rows(Path(file)) for file in results_files}, list[Row]()
    for file, rows in found.items():  # a teacher that several students have, and that was measured once
        found[file] = [row for row in rows if row not in teachers]
        teachers += [row for row in found[file] if row["name"].startswith(TEACHER)]
    names = [row["name"] for rows in found.values() for row in rows]

    def title(name: str, file: Path) -> str:
        return f"{name} ({file})" if names.count(name) > 1 else name

    pictures = []
    for file, rows in found.items():
        page = file.with_suffix(".html")
        shown = pictures_in(page, [row["name"] for row in rows])
        named = (dataclasses.replace(picture, result=title(picture.result, file)) for picture in shown)
        pictures += [picture for picture in named if picture not in pictures]  # of a teacher that several have
        if not shown:
            print(f"{page}, which should show samples of {file}, is not there or has none; they are left out")
    rows = [row | {"name": title(row["name"], file)} for file, own in found.items() for row in own]
    print_results(rows)
    write_report(output_html, rows, pictures)


def read_rows(path: Path) -> list[Row]:
    """The results in a file: its rows, or the single result that it is, with those of its teacher. A result without a
    name gets the file's."""
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    rows = content.get("rows", [content]) if isinstance(content, dict) else []
    if not rows or not all(isinstance(row, dict) and isinstance(row.get("metrics"), dict) for row in rows):
        raise ValueError(f"{path} is not a result of `fastgen eval`: it has no metrics")
    rows = [part for row in rows for part in (row, *row.get("teachers", ()))]
    return [{"name": path.stem} | {key: row[key] for key in row if key != "teachers"} for row in rows]


def print_results(rows: Sequence[Row]) -> None:
    terminal.print_table(results_table(rows), terminal.console())


def results_table(rows: Sequence[Row], columns: Sequence[str] | None = None) -> Table:
    """A rich table with one result per row. A single result has one number per row, which fits any terminal.

    columns: names of numbers in `metrics`; all of them if left out."""
    columns = metric_names(rows) if columns is None else columns
    names = [Text(str(row["name"])) for row in rows]
    cells = [[format_value(row["metrics"].get(column)) for column in columns] for row in rows]
    table = Table("")
    if len(rows) == 1:
        table.add_column(names[0], justify="right")
        for column, cell in zip(columns, cells[0], strict=True):
            table.add_row(column, cell)
        return table
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")  # so that long names wrap
    for name, values in zip(names, cells, strict=True):
        table.add_row(name, *values)
    return table
