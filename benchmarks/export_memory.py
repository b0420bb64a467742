"""Peak memory of what a user does with a LoRA of a real pipeline on a CPU: train, sample, export, merge, reload.

    python benchmarks/export_memory.py sd15 /tmp/scratch
    python benchmarks/export_memory.py sdxl /tmp/scratch
    python benchmarks/export_memory.py sd15 /tmp/scratch --tree ../other/checkout --label before

The pipeline has the real configs (fastgen/backbones/configs), random weights, and a tokenizer that spells; SD 1.5 is
stored in float32 and SDXL in float16, as they are published. It trains one update at 64 x 64 pixels. Every command is
a process of its own, whose largest resident set counts, with Python and torch in it. The aim is that export and merge
take at most 1.2 times the bytes of the stored weights. The rows are in export_memory.jsonl.

SDXL needs 20 GB of memory, most of it for the adapters and their optimizers, 22 GB of disk and half an hour."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))

import torch

from benchmarks.rows import append_row
from fastgen.modules.tensor_file import Spec, TensorWriter

ROOT = Path(__file__).resolve().parents[1]
PIPELINES = {
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", torch.float32, "recipes/sd15_dmd2_1step.yaml"),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", torch.float16, "recipes/sdxl_dmd2_4step.yaml"),
}
LORA = "lora={student: {rank: 64}, fake_score: {rank: 64}}"
SHORT = [
    *("backbone.resolution=64", "train.device=cpu", "train.steps=1", "train.batch_size=1", "train.accumulate=1"),
    *("train.mixed_precision=bf16", "train.frozen_dtype=bfloat16", "train.gradient_checkpointing=true"),
    *("train.sample_every=0", "train.eval_every=0", "train.num_samples=1", "train.checkpoint_every=1"),
    *("objective.fake_updates=1", "optimizers.student.warmup=0", "optimizers.student.lr=1e-3", "health.every=0"),
    *("eval.quick_num_samples=2", "eval.num_samples=2", "eval.batch_size=1", "eval.teacher_steps=[1]"),
    "rollout={timesteps: [1.0]}",
]
SAMPLE = ["--prompt", "a red cat", "--dtype", "bfloat16"]


def write_component(name: str, entry: list[str], source: Path, folder: Path, dtype: torch.dtype) -> int:
    """A component with its real config and random weights, written tensor by tensor. Returns its bytes."""
    import diffusers
    import transformers

    with torch.device("meta"):
        if entry[0] == "diffusers":
            cls, file = getattr(diffusers, entry[1]), "diffusion_pytorch_model.safetensors"
            network = cls.from_config(cls.load_config(source / name))
            network.save_config(folder / name)
        else:
            cls, file = getattr(transformers, entry[1]), "model.safetensors"
            network = cls(cls.config_class.from_pretrained(source / name))
            network.config.save_pretrained(folder / name)
    state = {key: value for key, value in network.state_dict().items() if value.is_floating_point()}
    with TensorWriter(folder / name / file, {key: Spec(dtype, tuple(v.shape)) for key, v in state.items()}) as writer:
        for key, value in state.items():
            if value.dim() < 2:  # norms and biases
                writer.put(key, torch.full(value.shape, float(key.endswith("weight"))))
            else:
                writer.put(key, torch.randn(value.shape) * value[0].numel() ** -0.5)
    return (folder / name / file).stat().st_size


def make_pipeline(path: str, dtype: torch.dtype, folder: Path) -> int:
    """A pipeline folder with these configs. Returns the bytes of its weights."""
    import diffusers
    from tiny_pipelines import tiny_tokenizer

    torch.manual_seed(0)
    source, total = ROOT / "fastgen/backbones/configs" / path, 0
    shutil.rmtree(folder, ignore_errors=True)
    index = json.loads((source / "model_index.json").read_text())
    for name in ("safety_checker", "feature_extractor"):
        index.pop(name, None)
    for name, entry in index.items():
        if not isinstance(entry, list):
            continue
        if name.startswith("tokenizer"):
            tokenizer = tiny_tokenizer()
            tokenizer.model_max_length = 77
            tokenizer.save_pretrained(folder / name)
        elif name == "scheduler":
            shutil.copytree(source / name, folder / name)
        else:
            total += write_component(name, entry, source, folder, dtype)
    index["_diffusers_version"] = diffusers.__version__
    (folder / "model_index.json").write_text(json.dumps(index))
    return total


def measured(tree: Path, *arguments: str, log: Path) -> dict[str, float]:
    """Runs a command of fastgen. Returns its largest resident set in GB, and its seconds."""
    command = [sys.executable, "-m", "fastgen", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    with log.open("ab") as file:
        process = subprocess.Popen(command, cwd=tree, env=environment, stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"fastgen {' '.join(arguments)} failed; see {log}")
    kilobytes = usage.ru_maxrss
    return {"peak_gb": round(kilobytes * 1024 / 1e9, 3), "seconds": round(time.perf_counter() - started, 1)}


def pixel_difference(one: Path, other: Path) -> float:
    """The largest difference of two sampled pictures, of 255 levels."""
    import numpy as np
    from PIL import Image

    first, second = (np.asarray(Image.open(f / "00000.png").convert("RGB"), dtype=float) for f in (one, other))
    return float(np.abs(first - second).max())


def measure(name: str, scratch: Path, tree: Path, sample: list[str], overrides: list[str]) -> dict[str, Any]:
    path, dtype, recipe = PIPELINES[name]
    teacher, run, log = scratch / name, scratch / f"{name}_run", scratch / f"{name}.log"
    stored = make_pipeline(path, dtype, teacher)
    for folder in (run, *scratch.glob(f"{name}_out*")):
        shutil.rmtree(folder, ignore_errors=True)
    row: dict[str, Any] = {"stored_gb": round(stored / 1e9, 3), "dtype": str(dtype).removeprefix("torch.")}
    paths = [f"backbone.path={teacher}", f"output_dir={run}"]
    row["train"] = measured(tree, "train", recipe, *SHORT, *paths, LORA, *overrides, log=log)
    row["sample"] = measured(tree, "sample", str(run), "--output", f"{scratch}/{name}_out1", *sample, log=log)
    row["export"] = measured(tree, "export", str(run), "--output", f"{scratch}/{name}_out2", log=log)
    row["merge"] = measured(tree, "export", str(run), "--output", f"{scratch}/{name}_out3", "--merge", log=log)
    merged = f"{scratch}/{name}_out3"
    row["reload"] = measured(tree, "sample", merged, "--output", f"{scratch}/{name}_out4", *sample, log=log)
    row["pixel_difference"] = pixel_difference(scratch / f"{name}_out1", scratch / f"{name}_out4")
    row["ratio"] = round(max(row["export"]["peak_gb"], row["merge"]["peak_gb"]) / row["stored_gb"], 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", choices=PIPELINES)
    parser.add_argument("scratch", type=Path, help="a folder for the pipeline and what becomes of it")
    parser.add_argument("overrides", nargs="*", help="dotted.key=value, for the training")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout whose fastgen is measured")
    parser.add_argument("--label", default="", help="added to the row's name; without it, bounds are asserted")
    parser.add_argument("--float32", action="store_true", help="sample in float32, as versions without --dtype do")
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    sample = SAMPLE[:2] if given.float32 else SAMPLE
    row = measure(given.pipeline, given.scratch.resolve(), given.tree.resolve(), sample, given.overrides)
    name = " ".join([given.pipeline, given.label]).strip()
    append_row(Path(__file__).with_suffix(".jsonl"), {"name": name, **row, "torch": torch.__version__})
    print(json.dumps(row, indent=2))
    if not given.label and row["ratio"] > 1.2:
        sys.exit(f"export and merge took {row['ratio']} times the stored weights, more than 1.2")


if __name__ == "__main__":
    main()
