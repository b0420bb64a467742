"""Whether a change of the code changed what recipes compute: hashes of the first updates of every CPU recipe.

    python benchmarks/first_updates.py before.json                        # in the tree before the change
    python benchmarks/first_updates.py after.json --against before.json   # and after it; differences are printed
    python benchmarks/first_updates.py after.json --quick                 # four updates of 48 samples
    python benchmarks/first_updates.py after.json --tree ../other/checkout

Every recipe trains as `fastgen train` does, on one thread. What is hashed, to the bit: all tensors of the checkpoint
(networks, average, optimizers, state), the exported weights, and the logged numbers but for seconds and memory. Hashes
are comparable on one machine with one version of torch only, so none are stored in this repository."""

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
UNREPEATABLE = ("seconds", "memory", "throughput", "per_second", "time")  # parts of the names of numbers that vary


def cpu_recipes(tree: Path) -> list[Path]:
    """The recipes whose teacher is a formula or the embedded digits model."""
    marks = ("name: gaussian_mixture", "path: assets/teachers/digits")
    return [path for path in sorted((tree / "recipes").glob("*.yaml")) if any(m in path.read_text() for m in marks)]


def overrides(path: Path, runs: Path, quick: bool) -> list[str]:
    """20 updates (4 with quick), logged one by one, and a short evaluation."""
    import yaml

    raw = yaml.safe_load(path.read_text())
    steps = 4 if quick else 20
    points = raw["backbone"]["name"] == "gaussian_mixture"
    given = [
        f"output_dir={runs / path.stem}",
        "train.device=cpu",
        f"train.steps={steps}",
        "train.log_every=1",
        f"train.checkpoint_every={steps}",
        "train.sample_every=0",
        "train.eval_every=0",
        "train.num_samples=4",
        "eval.teacher_steps=[4]",
        f"eval.quick_num_samples={500 if points else 64}",
        "health.every=10",
        "health.num_samples=16",
    ]
    if quick:
        given += ["train.batch_size=48"] + ["backbone.fit_steps=50"] * points
    if raw["data"].get("pairs"):
        given.append("data.pairs={count: 64, steps: 4}")
    phases = raw["objective"].get("phases")
    if phases and isinstance(phases[0], dict):  # of Phased DMD: their updates add up to train.steps
        shared = [phase | {"updates": steps // len(phases)} for phase in phases]
        given.append(f"objective.phases={json.dumps(shared)}")
    if "init_from" in raw:
        given.append(f"init_from={runs / Path(raw['init_from']).name}")
    return given


def train_and_hash(path: Path, runs: Path, quick: bool) -> dict[str, Any]:
    """Trains one recipe in this process. Returns {what: hash}, and the logged rows under "log"."""
    import torch

    torch.set_num_threads(1)
    import fastgen

    assert Path(fastgen.__file__).is_relative_to(Path.cwd()), (
        f"{fastgen.__file__} is not of the tree that was asked for"
    )
    from fastgen.config import load_recipe
    from fastgen.train import train

    folder = train(load_recipe(path, overrides(path, runs, quick)))
    [checkpoint] = (folder / "checkpoints").iterdir()
    found = {f"checkpoint/{f.stem}": hash_tensors(f) for f in sorted(checkpoint.glob("*.safetensors"))}
    exported = sorted((folder / "export").rglob("*.safetensors"))
    found |= {f"export/{f.relative_to(folder / 'export')}": hash_tensors(f) for f in exported}
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    log = [{k: v for k, v in row.items() if not any(part in k for part in UNREPEATABLE)} for row in rows]
    return found | {"log": log}


def hash_tensors(path: Path) -> str:
    """Of names, shapes, dtypes and bits of a safetensors file, whatever their order in it."""
    import torch
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line for each recipe and thing that differs."""
    lines = []
    for name in sorted({*before, *after}):
        a, b = before.get(name), after.get(name)
        if a is None or b is None:
            lines.append(f"{name}: only {'after' if a is None else 'before'}")
            continue
        lines += [f"{name}: {key} differs" for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
    return lines


def stages(paths: list[Path]) -> list[list[Path]]:
    """Recipes, those that start from another one's run after it."""
    starts = [path for path in paths if "init_from:" in path.read_text()]
    return [[path for path in paths if path not in starts], starts]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--against", type=Path, help="hashes to compare with; exit code 1 if any differ")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout whose fastgen trains")
    parser.add_argument("--only", default="", help="recipes whose name contains this")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=Path, help="an empty folder to keep the run folders in")
    given = parser.parse_args()
    if given.runs and given.runs.is_dir() and any(given.runs.iterdir()):
        parser.error(f"{given.runs} is not empty")
    tree, output = given.tree.resolve(), given.output.resolve()
    before = json.loads(given.against.read_text()) if given.against else None
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    sys.path.insert(0, str(tree))  # the processes it starts inherit this
    os.chdir(tree)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastgen.train"])
    hashes: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.runs.resolve() if given.runs else Path(temporary)
        for stage in stages([path for path in cpu_recipes(tree) if given.only in path.stem]):
            with ProcessPoolExecutor(given.jobs, context, max_tasks_per_child=1) as pool:
                jobs = {p.name: pool.submit(train_and_hash, p, folder, given.quick) for p in stage}
                hashes |= {name: job.result() for name, job in jobs.items()}
    output.write_text(json.dumps(hashes, indent=1) + "\n")
    print(f"{len(hashes)} recipes hashed")
    if before is None:
        return 0
    found = differences(before, hashes)
    print("\n".join(found) if found else "all equal, to the bit")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
