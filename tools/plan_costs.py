"""Write the tables of docs/cost.md and docs/choosing.md: what the recipes for published pipelines take, by
`fastgen plan`, and their learning rates and batches.

    python tools/plan_costs.py            # plans every recipe, about 10 minutes on one CPU core
    python tools/plan_costs.py NAME ...   # plans these again and keeps the other rows; rates: the second table

Nothing is downloaded: the configs of these pipelines ship with fastgen."""

import re
import sys
from pathlib import Path

import torch
import yaml

from fastgen.config import load_recipe
from fastgen.planning.cost import Speed, operations
from fastgen.planning.plan import CONTEXT, plan
from fastgen.planning.report import HEADROOM, advise
from fastgen.run.build import build_backbone
from fastgen.starting.shipped import recipe_files

ROOT = Path(__file__).resolve().parents[1]
PAGE, CHOOSING = ROOT / "docs/cost.md", ROOT / "docs/choosing.md"
BEGIN, END = "<!-- made by tools/plan_costs.py -->", "<!-- end -->"
GPUS, GIGABYTES = 8, 80
H100 = Speed(tflops=989, utilisation=0.4)
HEADS = (
    "recipe",
    "updates",
    "samples an update",
    "GB on each GPU",
    "what makes it fit",
    "TFLOP a sample",
    "GPU hours",
)
RATE_HEADS = ("parameters", "recipe", "steps", "student", "its rate", "rate of the fake score", "samples an update")


def planned() -> list[str]:
    """The names of the recipes whose pipeline is one of the hub."""
    sections = {file.stem: yaml.safe_load(file.read_text())["backbone"] for file in recipe_files()}
    return [name for name, section in sections.items() if not section.get("path", "assets").startswith("assets")]


def processes(name: str) -> int:
    """How many the recipe is written for, as the comment at its `accumulate` says; 1 if it says nothing."""
    text = (ROOT / f"recipes/{name}.yaml").read_text()
    found = re.search(r"accumulate: .*# [\d,]+ \w+ (?:per update )?on (\d+) processes", text)
    return int(found[1]) if found else 1


def row(name: str) -> str:
    recipe = load_recipe(ROOT / f"recipes/{name}.yaml")
    found = plan(recipe, GPUS, gpu=True)
    memory = (1 - HEADROOM) * GIGABYTES * 1e9 - CONTEXT
    peak, lines = found.peak, "as it is"
    if peak > memory:
        advice = advise(found, memory)
        changed = " ".join(f"`{line}`" for line in advice.lines or ())
        lines = f"{changed}: {advice.peak / 1e9:.0f} GB" if advice.lines else "no combination of changes"
    done = operations(found) * processes(name)
    hours = done * recipe.train.steps / (H100.tflops * 1e12 * H100.utilisation) / 3600
    samples = recipe.train.batch_size * recipe.train.accumulate * processes(name)
    cells = [f"[{name}](../recipes/{name}.yaml)", f"{recipe.train.steps:,}", str(samples), f"{peak / 1e9:.0f}", lines]
    return f"| {' | '.join([*cells, figures(done / samples / 1e12), figures(hours)])} |"


def figures(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def rates(name: str) -> tuple[int, str]:
    """The parameters of the teacher's network, and the recipe's row in the table of learning rates."""
    recipe = load_recipe(ROOT / f"recipes/{name}.yaml")
    backbone = build_backbone(recipe, torch.device("cpu"), deferred=True, section=recipe.backbone.unloaded())
    teacher, lora = backbone.load("teacher"), recipe.lora.get("student")
    network = teacher if backbone.shared is None else backbone.shared.denoiser  # the base of adapters is the teacher
    parameters = sum(p.numel() for p in network.parameters())
    trained = f"adapter, rank {lora.rank}" if lora else "whole network"
    roles = (recipe.optimizers.get(role) for role in ("student", "fake_score"))
    lrs = [f"{role.lr:.0e}".replace("e-0", "e-") if role else "none" for role in roles]
    samples = recipe.train.batch_size * recipe.train.accumulate * processes(name)
    steps = str(recipe.rollout.num_steps)
    cells = [f"{parameters / 1e9:.2g} B", f"[{name}](../recipes/{name}.yaml)", steps, trained, *lrs, str(samples)]
    return parameters, f"| {' | '.join(cells)} |"


def rates_table() -> str:
    rows = [row for _, row in sorted(rates(name) for name in planned())]
    return "\n".join([f"| {' | '.join(RATE_HEADS)} |", "|" + "---|" * len(RATE_HEADS), *rows])


def rows_of(text: str) -> dict[str, str]:
    """name -> row of a page's table."""
    return {name: line for line in text.splitlines() for name in re.findall(r"^\| \[(\w+)\]\(\.\./recipes/", line)}


def table(rows: dict[str, str]) -> str:
    return "\n".join([f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS), *(rows[name] for name in sorted(rows))])


def between(page: Path, table: str) -> None:
    """Puts a table between the marks of a page."""
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}")


def main() -> None:
    names = sys.argv[1:] or ["rates", *planned()]
    if "rates" in names:
        between(CHOOSING, rates_table())
    for name in (name for name in names if name != "rates"):
        line = row(name)
        print(line, flush=True)
        between(PAGE, table(rows_of(PAGE.read_text()) | {name: line}))


if __name__ == "__main__":
    main()
