"""A self-contained HTML page that shows and compares results: numbers, pictures by prompt and seed, and curves."""

import base64
import html
import io
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from fastgen.data.files import replace_file
from fastgen.evaluation.charts import TEACHER, bars, best_value, curves, escape, format_value, heading, metric_names
from fastgen.sampling.pictures import EXACT, grid, png, scatter_figure

STEPS = "steps"  # the kind of a picture that shows them
COMPARED = (  # facts that two results must have in common
    *("num_samples", "seed", "prompts_sha256", "choice", "features", "machine"),
    *("reference", "reference_sha256", "reference_sampler", "reference_teacher"),
)
PLACES = ("path", "base", "clip", "tokenizer", "template")  # keys of scorers that name files, whose hashes count
LARGEST = 512  # pixels: larger pictures are made smaller, or a page of 64 would have hundreds of megabytes
SMALL = 128  # pixels: smaller pictures are enlarged without smoothing, and stored without loss

STYLE = """
:root { color-scheme: light dark; --text: #222; --page: #fff; --line: #ddd; --soft: #f3f4f6; --good: #e3f1df;
  --note: #fff4e0; --bar: #2f6fab; --best: #d9762f; --l0: #2f6fab; --l1: #d9762f; --l2: #3b8a4e; --l3: #9350a8 }
@media (prefers-color-scheme: dark) { :root { --text: #e6e6e6; --page: #16181c; --line: #383c44; --soft: #22252b;
  --good: #24402a; --note: #43351b; --bar: #5f9fdc; --best: #f0995a; --l0: #5f9fdc; --l1: #f0995a; --l2: #6cc283;
  --l3: #c48bd6 } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 84rem;
  margin: 1.5rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 2rem 0 .8rem } h3 { font-size: .95rem; margin: 0 0 .4rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top }
th { vertical-align: bottom } th:first-child, td:first-child { text-align: left }
td.best { font-weight: 700; background: var(--good) }
.facts td, .facts th { text-align: left } .facts td { font: .8rem ui-monospace, monospace; overflow-wrap: anywhere;
  min-width: 9rem; max-width: 28rem }
.note { background: var(--note); padding: .6rem 1rem; border-left: 4px solid var(--best) }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem }
.panel { background: var(--soft); border-radius: .5rem; padding: .7rem .9rem; min-width: 0 }
.panel div { display: grid; grid-template-columns: minmax(0, 8rem) 1fr 3.6rem; gap: .5rem; align-items: center;
  font-size: .8rem } .panel div > span { overflow-wrap: anywhere } .panel div > span:last-child { text-align: right;
  font-variant-numeric: tabular-nums } .best > span { font-weight: 700 }
.track { position: relative; height: .8rem } .bar { position: absolute; inset: 0 auto 0 0; background: var(--bar);
  border-radius: 2px; min-width: 1px } .best .bar { background: var(--best) }
.floor { position: absolute; top: -.15rem; bottom: -.15rem; border-left: 2px dashed var(--text) }
.panel p { margin: .2rem 0 0; font-size: .8rem } svg { width: 100%; display: block } svg text { font-size: 11px;
  fill: var(--text) } .axis { stroke: var(--line); fill: none } polyline { fill: none; stroke-width: 2 }
.line0 { --c: var(--l0) } .line1 { --c: var(--l1) } .line2 { --c: var(--l2) } .line3 { --c: var(--l3) }
polyline { stroke: var(--c) } circle { fill: var(--c) } .key { margin-right: 1rem } .key::before { content: "";
  display: inline-block; width: .8rem; height: .2rem; margin-right: .3rem; vertical-align: middle;
  background: var(--c) }
.samples { display: grid; gap: 1.2rem; --size: 10rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, calc(var(--results) * var(--size))), 1fr)) }
.samples + .samples { margin-top: 1.2rem } .large { --size: 20rem } .strips { --size: 60rem }
.sample { background: var(--soft); border-radius: .5rem; padding: .6rem; min-width: 0 }
.sample > p { margin: 0 0 .4rem; overflow-wrap: anywhere } .sample small { opacity: .7; white-space: nowrap }
.cells { display: grid; grid-template-columns: repeat(var(--results), minmax(7rem, 1fr)); gap: .5rem;
  overflow-x: auto }
.strips .cells { grid-template-columns: 1fr } figure { margin: 0; min-width: 0 } figcaption { font-size: .8rem;
  opacity: .85; overflow-wrap: anywhere } img { width: 100%; display: block; border-radius: 3px }
.pixels { image-rendering: pixelated } .plot { width: auto; max-width: 100%; background: #fff; margin-bottom: 1rem }
summary { cursor: pointer }
"""


@dataclass(frozen=True)
class Picture:
    """A sample of a result. result: the result's name, or several for a plot. kind: a class of the page's CSS: image,
    pixels (a small image), frames (some of a video, in a row), steps (what a sample is after each step, in a row) or
    plot. type: of the file in data, png or jpeg.
    index: of the sample; that with the same index has the same prompt and seed in other results."""

    result: str
    kind: str
    data: bytes
    type: str = "png"
    index: int = 0
    prompt: str = ""


def write_report(path: Path, results: Sequence[dict[str, Any]], pictures: Sequence[Picture]) -> None:
    """Writes the page atomically: a table, bars, curves, samples, and what is needed to repeat the measurement.

    results: as `fastgen.evaluation.evaluate` gives them, each with a "name"; "curves" are numbers over the updates of
    a run, name -> [(update, value)]. The page is a single file, and all text is escaped."""
    parts = [
        "<h1>Evaluation</h1>" + differences(results),
        table(results),
        section("Numbers side by side", bars(results)),
        section("During training", curves(results)),
        section("Samples", samples(results, [p for p in pictures if p.kind != STEPS])),
        section("From noise to the sample", steps([p for p in pictures if p.kind == STEPS])),
        facts(results),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>fastgen evaluation</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(filter(None, parts)) + "\n</body></html>\n"
    )
    replace_file(path, page.encode())


def section(title: str, body: str) -> str:
    return f"<h2>{title}</h2>{body}" if body else ""


def table(results: Sequence[Mapping[str, Any]]) -> str:
    names = metric_names(results)
    heads = "".join(f"<th>{heading(n)}</th>" for n in names)
    best = {name: best_value(results, name) for name in names}
    rows = []
    for row in results:
        cells = [row["metrics"].get(name) for name in names]
        marks = [' class="best"' if v is not None and v == best[n] else "" for n, v in zip(names, cells, strict=True)]
        body = "".join(f"<td{mark}>{escape(format_value(v))}</td>" for mark, v in zip(marks, cells, strict=True))
        rows.append(f"<tr><td>{escape(row['name'])}</td>{body}</tr>")
    return f'<div class="wide"><table><tr><th></th>{heads}</tr>\n' + "\n".join(rows) + "</table></div>"


def differences(results: Sequence[Mapping[str, Any]]) -> str:
    """A warning if the results were not measured in the same way. What only some of them have is no difference."""
    found = [compared_facts(row) for row in results]
    keys = dict.fromkeys(key for facts in found for key in facts)
    differing = [key for key in keys if len({json.dumps(facts[key]) for facts in found if key in facts}) > 1]
    if not differing:
        return ""
    return f'<p class="note">These results differ in {escape(", ".join(differing))}: compare them with care.</p>'


def compared_facts(row: Mapping[str, Any]) -> dict[str, Any]:
    """What results that are compared must agree in: how the samples were chosen, what they are compared with, and the
    scorers, wherever their files lie."""
    scorers = {
        f"scorers.{name}.{key}": value
        for name, said in row.get("scorers", {}).items()
        for key, value in said.items()
        if key not in PLACES
    }
    return {key: row[key] for key in COMPARED if key in row} | scorers


def facts(results: Sequence[Mapping[str, Any]]) -> str:
    """Everything in the results except the metrics."""
    keys = list(dict.fromkeys(k for row in results for k in row if k not in ("name", "metrics", "curves")))
    heads = "".join(f"<th>{escape(row['name'])}</th>" for row in results)
    lines = [
        f"<tr><td>{escape(key)}</td>" + "".join(f"<td>{fact(row.get(key))}</td>" for row in results) + "</tr>"
        for key in keys
    ]
    return (
        '<h2>How to repeat this</h2><details><summary>Weights, prompts, seeds, versions</summary><div class="wide">'
        f'<table class="facts"><tr><th></th>{heads}</tr>\n' + "\n".join(lines) + "</table></div></details>"
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
    """A picture of each image and video; one of all sets of points.

    samples: pixels [B, 3, H, W] or frames [B, F, 3, H, W] in [0, 1], or points [B, D], by the name of their result;
    points named "exact" are drawn behind the others. captions: by the same names, the prompt of each sample."""
    found = list[Picture]()
    for name in (name for name, value in samples.items() if value.dim() > 2):
        prompts = list(captions.get(name, ()))[: len(samples[name])]
        prompts += [""] * (len(samples[name]) - len(prompts))
        for i, (sample, prompt) in enumerate(zip(samples[name].split(1), prompts, strict=True)):
            found.append(Picture(name, *encoded(sample), i, prompt))
    points = {name: value for name, value in samples.items() if value.dim() == 2}
    if points:
        found.append(Picture(joined(name for name in points if name != EXACT), "plot", png(scatter_figure(points))))
    return found


def draw_steps(name: str, views: Tensor, captions: Sequence[str]) -> list[Picture]:
    """A row for each sample, with its clean prediction after each step. views: [steps, B, 3, H, W] in [0, 1]."""
    rows = [(i, grid(views[:, i], columns=len(views))) for i in range(views.shape[1])]
    return [Picture(name, STEPS, png(row), index=i, prompt=captions[i]) for i, row in rows]


def encoded(sample: Tensor) -> tuple[str, bytes, str]:
    """The kind, the file and its type, of pixels [1, 3, H, W] or frames [1, F, 3, H, W]."""
    kind = "frames" if sample.dim() == 5 else "image"
    picture = grid(sample, columns=1, padding=2 if kind == "frames" else 0)
    if max(picture.size) <= SMALL:
        return "pixels", png(picture), "png"
    if kind == "image":
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=92, subsampling=0)
    return kind, buffer.getvalue(), "jpeg"


def joined(names: Iterable[str]) -> str:
    return ", ".join(names)


def samples(results: Sequence[Mapping[str, Any]], pictures: Sequence[Picture]) -> str:
    """Plots, and then for each prompt and seed the samples of all results beside each other. Those of which fewer
    results have a sample come after the others, closer together."""
    parts = [f"<h3>{escape(p.result)}</h3>{image(p)}" for p in pictures if p.kind == "plot"]
    groups: dict[tuple[int, str], list[Picture]] = {}
    for picture in (p for p in pictures if p.kind != "plot"):
        groups.setdefault((picture.index, picture.prompt), []).append(picture)
    if not groups:
        return "".join(parts)
    seeds = {row["name"]: row["seed"] for row in results if isinstance(row.get("seed"), int)}
    kinds = {p.kind for group in groups.values() for p in group}
    size = " strips" if "frames" in kinds else " large" if "image" in kinds else ""
    order = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0][0]))
    for across, alike in itertools.groupby(order, key=lambda item: len(item[1])):
        shown = "".join(sample(seeds, *key, group) for key, group in alike)
        parts.append(f'<div class="samples{size}" style="--results:{across}">{shown}</div>')
    return "".join(parts)


def steps(pictures: Sequence[Picture]) -> str:
    """The rows of each result below each other, with the prompt above."""
    figures = [
        f"<figure><figcaption>{escape(p.prompt)} ({escape(p.result)})</figcaption>{image(p)}</figure>"
        for p in pictures
    ]
    return f'<div class="samples strips" style="--results:1">{"".join(figures)}</div>' if figures else ""


def sample(seeds: Mapping[str, int], index: int, prompt: str, pictures: Sequence[Picture]) -> str:
    """A group. The seed is said where all results have the same one; a teacher has its student's."""
    own = {seeds[picture.result] for picture in pictures if picture.result in seeds}
    seed = own.pop() if len(own) == 1 else None
    said = "" if seed is None else f" <small>seed {seed + index}</small>"
    cells = "".join(f"<figure>{image(p)}<figcaption>{escape(p.result)}</figcaption></figure>" for p in pictures)
    return f'<div class="sample"><p>{escape(prompt)}{said}</p><div class="cells">{cells}</div></div>'


def image(picture: Picture) -> str:
    source = base64.b64encode(picture.data).decode()
    return (
        f'<img class="{picture.kind}" data-result="{escape(picture.result)}" data-index="{picture.index}" '
        f'alt="{escape(picture.prompt)}" src="data:image/{picture.type};base64,{source}">'
    )


SHOWN = re.compile(
    r'<img class="(\w+)" data-result="([^"]*)" data-index="(\d+)" alt="([^"]*)" '
    r'src="data:image/(png|jpeg);base64,([\w+/=]+)">'
)


def pictures_in(page: Path, names: Sequence[str]) -> list[Picture]:
    """The samples of these results, and of their teachers, that a page of `write_report` shows; [] if there is no such
    page."""
    text = page.read_text(errors="replace") if page.is_file() else ""
    found = [
        Picture(html.unescape(result), kind, base64.b64decode(data), type, int(index), html.unescape(prompt))
        for kind, result, index, prompt, type, data in SHOWN.findall(text)
    ]
    wanted = [picture for picture in found if picture.result in (*names, joined(names))]
    return wanted + [p for p in found if p.result.startswith(TEACHER) and p not in wanted] if wanted else []
