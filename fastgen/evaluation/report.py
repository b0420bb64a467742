"""A self-contained HTML page that compares results."""

import base64
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from fastgen.data.files import replace_file
from fastgen.metrics import DIRECTIONS
from fastgen.sampling.pictures import BLUE, EXACT, grid, plain, png, scatter_figure

ORANGE = "#e07b39"
ARROWS = {"lower": "↓", "higher": "↑", "neither": ""}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem } h3 { font-size: 1rem; margin: .3rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top }
th:first-child, td:first-child { text-align: left } td.best { font-weight: 700; background: #eef5ec }
.facts td { text-align: left; font-family: ui-monospace, monospace; font-size: .8rem; word-break: break-all }
.samples { display: flex; flex-wrap: wrap; gap: 1.5rem } .pixels { image-rendering: pixelated; width: 24rem }
img { max-width: 100% } .note { background: #fff4e0; padding: .6rem 1rem; border-left: 4px solid #e07b39 }
"""


@dataclass(frozen=True)
class Picture:
    """Samples of a result. title: the result's name, or several. png: the file. style: a class of the page's CSS."""

    title: str
    png: bytes
    style: str


def write_report(path: Path, results: Sequence[dict[str, Any]], pictures: Sequence[Picture]) -> None:
    """Writes the page atomically: a table, bars, samples, and what is needed to repeat the measurement.

    results: as `fastgen.evaluation.evaluate` gives them, each with a "name". The page is a single file, and all text
    is escaped."""
    bars = "<h2>Numbers side by side</h2>" + image(png(plot_bars(results)), "bars of each metric")
    head = "<h1>Evaluation</h1>" + differences(results)
    parts = [head, table(results), bars, sample_section(pictures), facts(results)]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>fastgen evaluation</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    replace_file(path, page.encode())


def metric_names(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of all numbers, in the order of their first appearance."""
    return list(dict.fromkeys(key for row in results for key in row["metrics"]))


def format_value(value: float | None) -> str:
    """Four significant digits; no decimals for whole numbers and from 1000 on; a dash for a missing number."""
    if value is None:
        return "–"
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.4g}"


def best_value(results: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The best value of a metric; None if neither direction is better, or if there is nothing to compare."""
    values = [row["metrics"][name] for row in results if name in row["metrics"]]
    direction = DIRECTIONS.get(name, "neither")
    if len(values) < 2 or direction == "neither":
        return None
    # The value closest to 0, not the smallest, because an unbiased estimate of a distance can be negative.
    return min(values, key=abs) if direction == "lower" else max(values)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    names = metric_names(results)
    heads = "".join(f"<th>{escape(n)} {ARROWS[DIRECTIONS.get(n, 'neither')]}</th>" for n in names)
    best = {name: best_value(results, name) for name in names}
    rows = []
    for row in results:
        cells = [row["metrics"].get(name) for name in names]
        marks = [' class="best"' if v is not None and v == best[n] else "" for n, v in zip(names, cells, strict=True)]
        body = "".join(f"<td{mark}>{escape(format_value(v))}</td>" for mark, v in zip(marks, cells, strict=True))
        rows.append(f"<tr><td>{escape(row['name'])}</td>{body}</tr>")
    return f'<div class="wide"><table><tr><th></th>{heads}</tr>\n' + "\n".join(rows) + "</table></div>"


def differences(results: Sequence[Mapping[str, Any]]) -> str:
    """A warning if the results were not measured in the same way."""
    keys = ("num_samples", "seed", "prompts_sha256", "reference", "features")
    differing = [key for key in keys if len({json.dumps(row[key]) for row in results if key in row}) > 1]
    if not differing:
        return ""
    return f'<p class="note">These results differ in {escape(", ".join(differing))}: compare them with care.</p>'


def facts(results: Sequence[Mapping[str, Any]]) -> str:
    """Everything in the results except the metrics."""
    keys = list(dict.fromkeys(k for row in results for k in row if k not in ("name", "metrics")))
    heads = "".join(f"<th>{escape(row['name'])}</th>" for row in results)
    lines = [
        f"<tr><td>{escape(key)}</td>" + "".join(f"<td>{fact(row.get(key))}</td>" for row in results) + "</tr>"
        for key in keys
    ]
    return (
        '<h2>How to repeat this</h2><div class="wide"><table class="facts">'
        f"<tr><th></th>{heads}</tr>\n" + "\n".join(lines) + "</table></div>"
    )


def fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return "<br>".join(f"{escape(k)}: {fact(v)}" for k, v in value.items())
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(fact(v) for v in value)
    return escape("–" if value is None else value)


def draw_pictures(samples: Mapping[str, Tensor], captions: Mapping[str, Sequence[str]]) -> list[Picture]:
    """A grid for each set of images or videos; one picture of all sets of points.

    samples: pixels [B, 3, H, W] or frames [B, F, 3, H, W] in [0, 1], or points [B, D], by the name of their result;
    points named "exact" are drawn behind the others. captions: by the same names, the prompt of each sample."""
    styles, found = {4: "pixels", 5: "frames"}, list[Picture]()
    for name in (name for name, value in samples.items() if value.dim() > 2):
        value, texts = samples[name], captions.get(name, ())[: len(samples[name])]
        style = "captioned" if any(texts) else styles[value.dim()]
        found.append(Picture(name, png(grid(value, captions=texts)), style))
    points = {name: value for name, value in samples.items() if value.dim() == 2}
    if points:
        found.append(Picture(joined(name for name in points if name != EXACT), png(scatter_figure(points)), "plot"))
    return found


def joined(names: Iterable[str]) -> str:
    return ", ".join(names)


def sample_section(pictures: Sequence[Picture]) -> str:
    shown = (f"<div><h3>{escape(p.title)}</h3>{image(p.png, p.title, p.style)}</div>" for p in pictures)
    return f'<h2>Samples</h2><div class="samples">{"".join(shown)}</div>' if pictures else ""


SHOWN = re.compile(
    r'<div><h3>([^<]*)</h3><img class="(\w+)" alt="[^"]*" src="data:image/png;base64,([\w+/=]+)"></div>'
)


def pictures_in(page: Path, names: Sequence[str]) -> list[Picture]:
    """The samples of these results that a page of `write_report` shows; [] if there is no such page."""
    text = page.read_text(errors="replace") if page.is_file() else ""
    found = [(html.unescape(title), base64.b64decode(data), style) for title, style, data in SHOWN.findall(text)]
    return [Picture(*shown) for shown in found if shown[0] in (*names, joined(names))]


def escape(value: object) -> str:
    return html.escape(str(value))


def image(data: bytes, alt: str, css_class: str = "plot") -> str:
    source = base64.b64encode(data).decode()
    return f'<img class="{css_class}" alt="{escape(alt)}" src="data:image/png;base64,{source}">'


def plot_bars(results: Sequence[Mapping[str, Any]]) -> Figure:
    """One panel per number that has a better direction, with one bar per result, the best in orange. A number
    `<name>_floor` is drawn as a dashed line in the panel of `<name>`."""
    names = [name for name in metric_names(results) if DIRECTIONS.get(name) != "neither"]
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    height = 0.9 + 0.28 * len(results)
    figure = Figure(figsize=(3.2 * columns, height * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    for i, (panel, name) in enumerate(zip(panels, names, strict=False)):
        values = [row["metrics"].get(name, 0.0) for row in results]
        best = best_value(results, name)
        bars = panel.barh(range(len(values)), values, color=[ORANGE if v == best else BLUE for v in values])
        panel.bar_label(bars, [format_value(row["metrics"].get(name)) for row in results], fontsize=7, padding=2)
        floors = [row["metrics"][f"{name}_floor"] for row in results if f"{name}_floor" in row["metrics"]]
        for floor in floors[:1]:
            panel.axvline(floor, color="black", linestyle="--", linewidth=0.8)
        labels = [plain(str(row["name"])) for row in results] if i % columns == 0 else [""] * len(results)
        panel.set_yticks(range(len(values)), labels, fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.3)
        panel.tick_params(axis="x", labelsize=7)
        panel.set_title(f"{name} {ARROWS[DIRECTIONS.get(name, 'neither')]}", fontsize=9)
    return figure
