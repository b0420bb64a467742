"""Writes the leaderboard's page and plots from its rows: report.md, ring.png and digits.png beside the table.

What the tables teach is written by hand in lessons.md, which the page begins with."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import emoji
from benchmarks.leaderboard.entries import ABSENT, BUDGETS, ENTRIES, STEPS, TASKS, Entry, make_runs
from benchmarks.rows import read_rows, replace_text

Record = dict[str, Any]
METRICS = {  # task -> metric -> the head of its column
    "ring": {"energy_distance": "energy distance", "mode_share_error": "mode share error", "linear": "reward x / 2"},
    "digits": {"fid": "FD", "accuracy": "accuracy", "diversity": "diversity", "digit_stroke": "reward ink"},
}
MAIN = {"ring": "energy_distance", "digits": "fid"}
INTRODUCTION = """\
# Leaderboard

Every objective is trained under one budget on the two teachers whose samples can be judged: a ring of eight Gaussian
modes, and handwritten digits. `python benchmarks/leaderboard/leaderboard.py` runs what is missing and writes this
page; with `--plan` it says how long that takes.
"""
EMOJI = """\
Colour pictures of 64 pixels from text, 693 held-out captions, each recipe at its own length:
[what the columns are](../../assets/emoji/README.md#measured). `benchmarks/emoji.py` measures them.
"""
METHOD = """
## How it was made

- Each task has one budget: the same teacher, student, number of updates and batch size. {budgets}
  This is less than the recipes' own lengths: a place in a table says how far an objective comes in that time, and not
  where it ends.
- Learning rates, the distributions of time levels, weights and inner updates are each recipe's own. Most of them were
  tuned for longer runs, and some for another objective; nothing was tuned for this page. What a recipe does in phases
  keeps its share of the run.
- Four steps were run with three seeds: the tables show the mean, and the smallest and the largest value. Two steps and
  one were run with seed 0. The time levels are {levels}. Flow maps, consistency models and
  ADP train in a way that does not depend on the steps, so that one run is measured at all of them.
- The numbers are what `fastgen eval` gives for the single recipe with the overrides in `rows.jsonl`, on 599 digits or
  4,000 points. The ring's reward is the mean over the first 2,000. Rewards are shown for all objectives; those "with a
  reward" were trained on one, from the run that is named.
- Seconds are the wall time of a student update with all its inner updates. They include its share of the ODE pairs,
  which the runs on the digits make before their first update. Measured on {device}. Other work shared the machine.
- MB are the live bytes of tensors at the peak of an update. Networks and optimizers are included, and libraries are
  not.
- Evaluations are the samples given to any network in training, with those of the run it starts from and those for ODE
  pairs; a sample whose derivative is also taken counts once. The ring's teacher is a formula, and counts like a
  network. Sampling takes as many evaluations as steps.
- The digits teacher samples at the levels of its own diffusers scheduler, the last of which is 0.001. K of its steps
  are therefore worth K - 1.
- DisBack's runs have three tenths more updates, in which the teacher is degraded. Too few steps for an objective, and
  so absent: {few}.
"""


def records(found: dict[str, Record], entry: str, task: str, steps: int) -> list[Record]:
    """An entry's rows of all seeds that were measured at these steps."""
    own = [r for r in found.values() if r.get("entry") == entry and r["task"] == task]
    return sorted((r for r in own if str(steps) in r["results"]), key=lambda r: r["seed"])


def evaluations(found: dict[str, Record], record: Record) -> int | None:
    """The evaluations of networks in training, with those of the run it started from. None if that run has no row."""
    if not record["start"]:
        return record["evaluations"]
    start = found.get(record["start"])
    before = None if start is None else evaluations(found, start)
    return None if before is None else record["evaluations"] + before


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """The mean and, where there are several values, their range."""
    text = form(mean(values))
    return f"{text} ({form(min(values))} to {form(max(values))})" if len(values) > 1 else text


def form_of(metric: str) -> Callable[[float], str]:
    """How a metric's numbers are written."""
    digits = {"fid": 2, "diversity": 2, "accuracy": 3, "digit_stroke": 3, "linear": 3}.get(metric, 4)
    return lambda value: f"{value:.{digits}f}"


def line(found: dict[str, Record], entry: Entry, task: str, steps: int, main: str) -> str | None:
    """An entry's line of a table, or None if nothing was measured."""
    own = records(found, entry.name, task, steps)
    if not own:
        return None
    cells = [f"`{entry.name}`", entry.family + (f", from `{entry.start}`" if entry.start else "")]
    for metric in METRICS[task]:
        values = [r["results"][str(steps)][metric] for r in own]
        cells.append(spread(values, form_of(metric)) if metric == main else form_of(metric)(mean(values)))
    cells.append(f"{mean([r['seconds_per_update'] for r in own]):.3f}")
    peaks = [r["peak_mb"] for r in own if "peak_mb" in r]
    cells.append(f"{max(peaks):.0f}" if peaks else "")
    calls = evaluations(found, own[0])
    cells.append("" if calls is None else f"{calls / 1e6:.2f} M" if calls >= 1e5 else f"{calls / 1e3:.0f} k")
    return f"| {' | '.join(cells)} |"


def table(found: dict[str, Record], task: str, steps: int) -> list[str]:
    """A table's lines: the entries, the best first by the mean of the task's main metric, and then the teacher."""
    main = MAIN[task]
    if not (there := [e for e in ENTRIES if records(found, e.name, task, steps)]):
        return []
    there.sort(key=lambda e: mean([r["results"][str(steps)][main] for r in records(found, e.name, task, steps)]))
    heads = ["objective", "family", *METRICS[task].values(), "seconds", "MB", "evaluations"]
    lines = ["", f"### {task.capitalize()}, {steps} step{'s' * (steps > 1)}", ""]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [text for e in there if (text := line(found, e, task, steps, main))]
    teacher = found.get(f"{task}_teacher", {"results": {}})["results"]
    for k in (steps, 50):
        if str(k) in teacher:
            values = [form_of(m)(teacher[str(k)][m]) for m in METRICS[task]]
            lines.append(f"| the teacher, {k} step{'s' * (k > 1)} | | {' | '.join(values)} | | | |")
    return lines


def method(found: dict[str, Record]) -> str:
    """The part of the page that says how the numbers were made."""
    budgets = " ".join(f"The {t}: {b.updates} updates of {b.batch} samples." for t, b in BUDGETS.items())
    devices = sorted({f"{r['device']}, {r['jobs']} at a time" for r in found.values() if "jobs" in r})
    few = [f"`{e.name}` below {e.least_steps}" for e in ENTRIES if e.least_steps > 1]
    return METHOD.format(
        budgets=budgets,
        levels="; ".join(str(list(levels)) for levels in STEPS.values()),
        device="; ".join(devices) or "not measured yet",
        few=", ".join(few),
    )


def write_report(rows: Path) -> None:
    """Writes the page and the plots beside the table `rows`."""
    found, folder = read_rows(rows), rows.parent
    lessons = folder / "lessons.md"
    plots = [f"![{task}]({task}.png)" for task in TASKS if plot(found, task, folder)]
    lines = [INTRODUCTION, *([lessons.read_text()] if lessons.is_file() else []), *plots]
    lines += [text for task in TASKS for steps in STEPS for text in table(found, task, steps)]
    if folder == Path(__file__).resolve().parent and (students := read_rows(emoji.TABLE)):
        lines += ["", "## Emoji", "", EMOJI, emoji.table(students)]
    lines.append(method(found))
    lines += [f"- `{name}` is not here: {why}" for name, why in ABSENT.items()]
    missing = [name for name in make_runs() if name not in found]
    if missing:
        lines.append(f"Not run yet: {len(missing)} of {len(make_runs())} runs, {', '.join(missing[:5])} ...")
    hours = sum(r.get("cpu_seconds", 0.0) for r in found.values()) / 3600
    lines.append(
        f"{len(found)} rows took {hours:.2f} CPU hours. Of a run that was interrupted, only the last part is counted."
    )
    replace_text(folder / "report.md", "\n".join(lines).rstrip() + "\n")


COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def plot(found: dict[str, Record], task: str, folder: Path) -> bool:
    """Draws a task's plot. On the left is the main metric at four steps against the evaluations in training; on the
    right its range over the seeds, and its values at two steps and at one. Lower is better. Returns False if there is
    nothing to draw."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    main = MAIN[task]
    there = [e for e in ENTRIES if records(found, e.name, task, 4)]
    if not there:
        return False

    def values(entry: Entry, steps: int) -> list[float]:
        return [r["results"][str(steps)][main] for r in records(found, entry.name, task, steps)]

    there.sort(key=lambda e: -mean(values(e, 4)))
    families = list(dict.fromkeys(e.family for e in ENTRIES))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 6), layout="constrained")
    points = dict[str, tuple[float, float]]()
    for i, entry in enumerate(there):
        colour, four = COLOURS[families.index(entry.family)], values(entry, 4)
        calls = evaluations(found, records(found, entry.name, task, 4)[0])
        if calls is not None:
            left.plot(calls, mean(four), "o", color=colour)
            points[entry.name] = (calls, mean(four))
        right.barh(i, mean(four), color=colour, alpha=0.6)
        right.plot([min(four), max(four)], [i, i], color="black", linewidth=1.5)
        for steps, marker in ((2, "|"), (1, "x")):
            if other := values(entry, steps):
                right.plot(other[0], i, marker, color="black", markersize=8 if steps == 2 else 5)
    right.set_yticks(range(len(there)), [e.name for e in there], fontsize=8)
    teacher = found.get(f"{task}_teacher", {"results": {}})["results"]
    for k, style in ((50, ":"), (4, "--")):
        if str(k) in teacher:
            left.axhline(teacher[str(k)][main], color="grey", linestyle=style, label=f"teacher, {k} steps")
    for family in families:
        left.plot([], [], "o", color=COLOURS[families.index(family)], label=family)
    named = {"xlabel": "network evaluations in training", "ylabel": f"{METRICS[task][main]} at four steps"}
    left.set(xscale="log", yscale="log", **named)
    right.set(xscale="log", xlabel=METRICS[task][main])
    right.set_title("bar: 4 steps, mean and range of seeds;  | 2 steps;  x 1 step", fontsize=9)
    left.margins(x=0.3)  # room for the names
    left.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    name_points(left, points)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{task}.png", dpi=90, metadata={"Software": None})
    pyplot.close(figure)
    return True


OFFSETS = [(4, 2), (4, -8), (-4, 2), (-4, -8), *((4 * s, y) for y in (11, -17, 20, -26, 29, -35) for s in (1, -1))]


def name_points(axes: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Writes each point's name beside it, at the first of OFFSETS (in points; negative: to the left) where it covers
    no other name and no point. A name that is farther away has a line to its point."""
    figure = axes.figure
    figure.draw_without_rendering()  # now the axes have their final size
    markers = [axes.transData.transform(place) for place in points.values()]
    taken: list[Any] = []
    for name, place in points.items():
        for x, y in OFFSETS:
            line = {"arrowstyle": "-", "linewidth": 0.4, "color": "grey"} if abs(y) > 8 else None
            label = axes.annotate(
                name,
                place,
                fontsize=7,
                xytext=(x, y),
                textcoords="offset points",
                horizontalalignment="left" if x > 0 else "right",
                arrowprops=line,
            )
            box = label.get_window_extent(figure.canvas.get_renderer())
            if not any(map(box.overlaps, taken)) and not any(box.contains(*marker) for marker in markers):
                break
            if (x, y) != OFFSETS[-1]:
                label.remove()
        taken.append(box)
