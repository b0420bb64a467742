"""The numbers of an export: its file evaluation.json, and the section of its model card that shows them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgen.data.files import replace_file, write_json
from fastgen.evaluation.charts import format_value, metric_names
from fastgen.evaluation.results import Row
from fastgen.metrics import DIRECTIONS, METRICS

STORED = "evaluation.json"  # in an export
SECTION = re.compile(r"^## Numbers\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)  # of its README.md
UNMEASURED = "Not measured yet; `fastgen eval` measures student and teacher, and writes the numbers here."
NOT_FACTS = {"name", "metrics", "curves", "teachers"}  # the keys of a row that are no facts of its measurement
OF_METRICS = {"machine", "scorers"}  # those that only some metrics need
FEATURES = {  # of eval.features
    "digits": "the features of a classifier of digits",
    "latents": "the latents of the pipeline's VAE",
    "clip": "CLIP's features",
    "inception": "Inception's features",
}


def row_name(who: str, steps: int) -> str:
    """The name of a row: who made its samples, in how many steps."""
    return f"{who}, {steps} step{'s' * (steps > 1)}"


def store_numbers(folder: Path, rows: Sequence[Row]) -> bool:
    """Writes the newest rows of an export, of the student and then of its teacher, which were measured alike, into its
    evaluation.json and its card, in place of those there. Returns whether the card has a section for them."""
    write_json(folder / STORED, {"rows": list(rows)})
    card = folder / "README.md"
    text = card.read_text() if card.is_file() else ""
    if not SECTION.search(text):
        return False
    replace_file(card, SECTION.sub(lambda _: numbers_section(rows), text, count=1))
    return True


def stored_numbers(folder: Path) -> list[Row]:
    """The rows of an export's evaluation.json; [] if there is none that can be read."""
    try:
        rows = json.loads((folder / STORED).read_text())["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("metrics"), dict)]


def known_numbers(rows: Sequence[Row], facts: Row, metrics: Sequence[str]) -> dict[str, float] | None:
    """The numbers of these metrics, from a row that agrees in all facts of a measurement (see `evaluate.facts_of`);
    None if no row does. It may have been measured with more metrics."""
    same, wanted = json.loads(json.dumps(facts)), [key for name in metrics for key in METRICS[name].directions]
    for row in rows:
        told = row.keys() - NOT_FACTS - (OF_METRICS - same.keys())
        if {key: row[key] for key in told} == same and row["metrics"].keys() >= set(wanted):
            return {key: row["metrics"][key] for key in wanted}
    return None


def numbers_section(rows: Sequence[Row]) -> str:
    """The section in Markdown: how was measured, then a table with one line per row and one column per number."""
    if not rows:
        return f"## Numbers\n\n{UNMEASURED}\n\n"
    columns = metric_names(rows)
    head = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    body = [
        f"| {row['name']} | " + " | ".join(format_value(row["metrics"].get(c)) for c in columns) + " |" for row in rows
    ]
    return "\n".join(["## Numbers", "", measured_how(rows), "", *head, *body, "", ""])


def measured_how(rows: Sequence[Row]) -> str:
    """On how many samples, with which guidance of the teacher, compared with what, and which way is better."""
    student, *teachers = rows
    said = f"Measured on {student['num_samples']} samples"
    if teachers:
        said += f" of each, with the same prompts and seeds; the teacher is at guidance scale {scale_of(teachers[0])}"
    return f"{said}.{compared(student)}"


def scale_of(row: Row) -> str:
    scale: Any = row["guidance_scale"]
    return ", ".join(f"{s:g}" for s in scale) if isinstance(scale, list | tuple) else f"{scale:g}"


def compared(row: Row) -> str:
    """What the samples were compared with, and in which direction the numbers are better."""
    said, found = "", [metric for metric in METRICS.values() if metric.directions.keys() & row["metrics"].keys()]
    if row.get("reference") is not None and any(metric.needs_reference for metric in found):
        known = {"teacher": "other samples of the teacher", "digits": "held-out digits"}
        what = known.get(row["reference"], f"the pictures of `{row['reference']}`")
        said += f" They are compared with {what}, in {FEATURES[row['features']]}."
    for direction in ("lower", "higher"):
        if names := [f"`{name}`" for name in row["metrics"] if DIRECTIONS.get(name) == direction]:
            said += f" {direction.capitalize()} is better for {', '.join(names)}."
    return said
