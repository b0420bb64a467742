"""Measures emoji students and their teacher alike, and writes the table of assets/emoji/README.md.

    python benchmarks/emoji.py runs/emoji_dmd2_4step runs/emoji_gndm_4step    # finished runs of recipes/emoji_*.yaml
    python benchmarks/emoji.py runs/emoji_flow_map_4step --num-steps 1 2 8    # a flow map at other numbers of steps
    python benchmarks/emoji.py --teacher 50 4 --guidance-scale 2
    python benchmarks/emoji.py --report                                       # the table alone, from the rows

Each is sampled for the 693 captions of assets/emoji/reference, as `fastgen eval` does with the recipes' own eval
section (seed 0, about a minute and a half of one core), and adds a row to emoji.jsonl. A row that is there is not made
again. The leaderboard's page has the same table."""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

import fastgen
from benchmarks.rows import append_row, read_rows, write_table

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).resolve().with_name("emoji.jsonl")
PAGE = ROOT / "assets/emoji/README.md"
RECIPE = ROOT / "recipes/emoji_dmd2_4step.yaml"  # whose eval section says how the teacher is measured
METRICS = {  # heading -> metric, digits
    "FD": ("fid", 1),
    "nearest": ("clip_retrieval", 3),
    "among five": ("clip_retrieval_5", 3),
    "CLIP score": ("clip_score", 3),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
}
Wanted = tuple[str, dict[str, Any], Path, dict[str, Any]]  # name, what its row says, the folder, how it is sampled
OWN = ("metrics", "reference", "features", "clip", "scorers", "num_samples", "batch_size")


def student_row(run: Path, steps: int | None) -> tuple[str, dict[str, Any]]:
    """Its name, and what the row says besides the numbers."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    count = steps or len(recipe["rollout"]["timesteps"])
    name = Path(recipe["output_dir"]).name
    about = {"recipe": name, "steps": count, "evaluations": count, "seed": recipe["seed"]}
    return f"{name}, {count} steps, seed {recipe['seed']}", about


def measured(path: Path, **options: Any) -> dict[str, float]:
    section = yaml.safe_load(RECIPE.read_text())["eval"]
    return fastgen.evaluate(path, student_only=True, **{key: section[key] for key in OWN}, **options)["metrics"]


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The teacher first, then students by their steps and FD. Seeds of one recipe have lines of their own."""
    lines = [f"| | steps | evaluations | seed | {' | '.join(METRICS)} |", "|---" * (4 + len(METRICS)) + "|"]
    order = sorted(rows.values(), key=lambda row: ("recipe" in row, -row["steps"], row["metrics"]["fid"]))
    return "\n".join([*lines, *(line(row) for row in order)])


def line(row: Mapping[str, Any]) -> str:
    if "recipe" in row:
        who = f"[{row['recipe'].removeprefix('emoji_')}](../../recipes/{row['recipe']}.yaml)"
    else:
        who = f"teacher, guidance {row['guidance_scale']:g}"
    numbers = " | ".join(f"{row['metrics'][key]:.{digits}f}" for key, digits in METRICS.values())
    return f"| {who} | {row['steps']} | {row['evaluations']} | {row.get('seed', '')} | {numbers} |"


def missing(options: argparse.Namespace, rows: Mapping[str, Any]) -> Iterator[Wanted]:
    """What is asked for and has no row."""
    for run in options.runs:
        for steps in options.num_steps or [None]:
            name, about = student_row(run, steps)
            if name not in rows:
                yield name, about, run, {} if steps is None else {"num_steps": steps}
    for steps in options.teacher:
        name = f"teacher, {steps} steps, guidance {options.guidance_scale:g}"
        if name not in rows:
            how = {"guidance_scale": options.guidance_scale, "num_steps": steps}
            about = {
                "steps": steps,
                "evaluations": steps * (1 + (options.guidance_scale != 1)),
                "guidance_scale": options.guidance_scale,
            }
            yield name, about, ROOT / "assets/emoji/teacher", how


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--num-steps", type=int, nargs="+", help="of flow maps")
    parser.add_argument("--teacher", type=int, nargs="+", default=[], help="numbers of steps of the teacher")
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="of the teacher")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    for name, about, path, how in [] if options.report else list(missing(options, read_rows(TABLE))):
        append_row(TABLE, {"name": name, **about, "metrics": measured(path, **how)})
    write_table(PAGE, "table", table(read_rows(TABLE)))


if __name__ == "__main__":
    main()
