"""Names, bars and curves of an evaluation's page, as HTML and SVG, in the colours of the page, light or dark."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastgen.metrics import DIRECTIONS

TEACHER = "its teacher"  # the beginning of the name that a page gives to a teacher's samples
ARROWS = {"lower": "↓", "higher": "↑", "neither": ""}
WIDTH, HEIGHT = 320, 180  # of a curve's panel
LEFT, BOTTOM, TOP, RIGHT = 46, 24, 10, 10  # its margins

Curve = Sequence[tuple[int, float]]


def escape(value: object) -> str:
    return html.escape(str(value))


def heading(name: str) -> str:
    """A metric's name, with an arrow to where it is better that stays on its line."""
    arrow = ARROWS[DIRECTIONS.get(name, "neither")]
    return escape(name.replace("_", " ") + (f"\N{NO-BREAK SPACE}{arrow}" if arrow else ""))


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
    """The best value of a metric; None if neither direction is better, or if there are no two values."""
    values = [row["metrics"][name] for row in results if name in row["metrics"]]
    direction = DIRECTIONS.get(name, "neither")
    if len(set(values)) < 2 or direction == "neither":
        return None
    # The value closest to 0, not the smallest, because an unbiased estimate of a distance can be negative.
    return min(values, key=abs) if direction == "lower" else max(values)


def bars(results: Sequence[Mapping[str, Any]]) -> str:
    """A panel for each number that has a better direction, with a bar for each result. A number `<name>_floor` is a
    dashed line in the panel of `<name>`. "" if there is nothing to compare."""
    names = [name for name in metric_names(results) if DIRECTIONS.get(name, "neither") != "neither"]
    if len(results) < 2 or not names:
        return ""
    return f'<div class="panels">{"".join(bar_panel(results, name) for name in names)}</div>'


def bar_panel(results: Sequence[Mapping[str, Any]], name: str) -> str:
    values = [row["metrics"].get(name) for row in results]
    floor = next((row["metrics"][f"{name}_floor"] for row in results if f"{name}_floor" in row["metrics"]), None)
    most = max([abs(v) for v in (*values, floor) if v is not None and math.isfinite(v)], default=0.0) or 1.0
    line = "" if floor is None else f'<i class="floor" style="left:{share(floor, most)}"></i>'
    rows = []
    for row, value in zip(results, values, strict=True):
        mark = ' class="best"' if value is not None and value == best_value(results, name) else ""
        width = "0" if value is None else share(value, most)
        rows.append(
            f'<div{mark}><span>{escape(row["name"])}</span><b class="track">'
            f'<i class="bar" style="width:{width}"></i>{line}</b><span>{format_value(value)}</span></div>'
        )
    return f'<div class="panel"><h3>{heading(name)}</h3>{"".join(rows)}</div>'


def share(value: float, most: float) -> str:
    return f"{100 * min(1.0, abs(value) / most):.1f}%" if math.isfinite(value) else "100%"


def curves(results: Sequence[Mapping[str, Any]]) -> str:
    """A panel for each metric that was measured during training, over the updates, with a line for each result."""
    found = {row["name"]: row["curves"] for row in results if row.get("curves")}
    names = list(dict.fromkeys(name for lines in found.values() for name in lines if name in DIRECTIONS))
    panels = [
        curve_panel(name, {result: lines[name] for result, lines in found.items() if lines.get(name)})
        for name in names
    ]
    return f'<div class="panels">{"".join(panels)}</div>' if panels else ""


def curve_panel(name: str, lines: Mapping[str, Curve]) -> str:
    points = [point for line in lines.values() for point in line if math.isfinite(point[1])]
    if not points:
        return ""
    last = max(step for step, _ in points) or 1
    low, high = min(v for _, v in points), max(v for _, v in points)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)

    def at(step: int, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        return f"{x:.1f},{HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - low) / (high - low):.1f}"

    drawn = []
    for number, (result, line) in enumerate(lines.items()):
        kept = [at(step, value) for step, value in line if math.isfinite(value)]
        dots = "".join(f'<circle cx="{x}" cy="{y}" r="2.5"/>' for x, y in (p.split(",") for p in kept))
        title = f"<title>{escape(result)}</title>"
        drawn.append(f'<g class="line{number % 4}">{title}<polyline points="{" ".join(kept)}"/>{dots}</g>')
    axes = (
        f'<path class="axis" d="M{LEFT},{TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 4}" y="{TOP + 8}" text-anchor="end">{format_value(high)}</text>'
        f'<text x="{LEFT - 4}" y="{HEIGHT - BOTTOM}" text-anchor="end">{format_value(low)}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 6}">0</text>'
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{last} updates</text>'
    )
    keys = "".join(f'<span class="key line{i % 4}">{escape(result)}</span>' for i, result in enumerate(lines))
    return (
        f'<div class="panel"><h3>{heading(name)}</h3>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)} over updates">'
        f"{axes}{''.join(drawn)}</svg><p>{keys}</p></div>"
    )
