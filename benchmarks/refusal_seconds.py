"""Measures the CPU seconds that a bad recipe takes to be refused, beside those of `import torch` alone.

    python benchmarks/refusal_seconds.py

Every bad recipe is given to `fastgen train`, to `python -m fastgen.train` and to `python fastgen/train.py`, each in a
process of its own. CPU seconds are user plus system time of that process, which other programs on the machine change
less than wall time, but still change. So everything takes turns with `import torch`, and a row has the median of the
repeats of both, the least refusal, and the median of the ratios of neighbours. They are in refusal_seconds.jsonl."""

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rows import append_row, read_rows, sort_rows

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {
    "fastgen train": ["-m", "fastgen", "train"],
    "python -m fastgen.train": ["-m", "fastgen.train"],
    "python fastgen/train.py": [str(ROOT / "fastgen/train.py")],
}
BAD = {  # what is wrong -> the recipe and overrides
    "no such file": ["no_such_recipe.yaml"],
    "no valid YAML": ["torn.yaml"],
    "unknown key": [str(ROOT / "recipes/mixture_dmd2_4step.yaml"), "train.stps=3"],
    "value out of range": [str(ROOT / "recipes/sdxl_dmd2_4step.yaml"), "train.steps=-1"],
    "metric that does not fit": [str(ROOT / "recipes/mixture_dmd2_4step.yaml"), "eval.metrics=[fid]"],
    "no pipeline there": [str(ROOT / "recipes/digits_dmd2_4step.yaml"), "backbone.path=/nowhere/pipeline"],
}


def cpu_seconds(arguments: Sequence[str], folder: Path, code: int) -> float:
    """User plus system time of a Python process with these arguments, which must end with this exit code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != code:
        raise RuntimeError(f"{arguments} ended with {done.returncode} instead of {code}:\n{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(arguments: Sequence[str], repeats: int) -> dict[str, float]:
    """Medians over the repeats: the seconds of a refusal, those of `import torch`, and the ratio of the two."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "torn.yaml").write_text("backbone: {name: [")
        torch = ["-c", "import torch"]
        pairs = [(cpu_seconds(arguments, folder, 2), cpu_seconds(torch, folder, 0)) for _ in range(repeats)]
    return {
        "seconds": round(statistics.median(refusal for refusal, _ in pairs), 2),
        "least": round(min(refusal for refusal, _ in pairs), 2),
        "torch_seconds": round(statistics.median(alone for _, alone in pairs), 2),
        "ratio": round(statistics.median(refusal / alone for refusal, alone in pairs), 3),
        "repeats": repeats,
    }


def machine() -> dict[str, str]:
    from importlib.metadata import version

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"machine": f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {version('torch')}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="the table to write")
    arguments = parser.parse_args()
    there = read_rows(arguments.rows)
    for program, start in PROGRAMS.items():
        for bad, recipe in BAD.items():
            if f"{program}: {bad}" in there:
                continue
            measured = measure([*start, *recipe], arguments.repeats)
            append_row(arguments.rows, {"name": f"{program}: {bad}", **measured, **machine()})
            print(f"{program}: {bad}: {measured}", flush=True)
    sort_rows(arguments.rows)


if __name__ == "__main__":
    main()
