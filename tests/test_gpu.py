"""On a GPU: every recipe that needs no download takes its first updates there, and they are those of a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from shipped_recipes import RECIPES, ROOT

from fastgen.backbones.encoders import on_device
from fastgen.backbones.sd3 import SD3Config
from fastgen.config import load_recipe
from fastgen.train import train


def is_complete(path: Path) -> bool:
    """Whether the networks and the data of a recipe ship with fastgen."""
    raw = yaml.safe_load(path.read_text())
    files = (raw["backbone"].get("path", ""), raw["data"].get("folder", ""))
    return all(not file or file.startswith("assets/") for file in files)


COMPLETE = [path.stem for path in RECIPES if is_complete(path)]
FEW = [
    "train.steps=3",
    "train.batch_size=48",
    "train.log_every=1",
    "train.sample_every=0",
    "train.eval_every=2",
    "train.checkpoint_every=2",
    "eval.num_samples=16",
    "eval.quick_num_samples=16",
    "eval.batch_size=16",
]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def first_updates(name: str, folder: Path, device: str, *overrides: str) -> list[dict[str, Any]]:
    """The log's lines with losses. A run that continues another starts from its teacher here."""
    path = ROOT / "recipes" / f"{name}.yaml"
    start = ["init_from=null"] if "init_from" in path.read_text() else []
    fit = ["backbone.fit_steps=50"] if "fit_steps" in path.read_text() else []
    fit += ["data.pairs.count=48", "data.pairs.steps=4"] if "pairs: {count" in path.read_text() else []
    fit += ["objective.phases=[{first: 0, last: 2, updates: 2}, {first: 2, last: 4, updates: 1}]"] * ("phased" in name)
    chosen = [*FEW, *start, *fit, f"output_dir={folder}", f"train.device={device}", *overrides]
    if device == "cpu":  # a process of its own: accelerate settles for one device
        command = [sys.executable, str(ROOT / "fastgen/train.py"), str(path), *chosen]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    else:
        train(load_recipe(path, chosen))
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if any(key.endswith("loss") for key in line)]


@pytest.mark.parametrize("name", COMPLETE)
def test_a_recipe_takes_its_first_updates(name: str, tmp_path: Path) -> None:
    lines = first_updates(name, tmp_path, "cuda")
    losses = [value for line in lines for key, value in line.items() if key.endswith("loss")]
    assert losses and all(abs(value) < 1e6 for value in losses)
    assert (tmp_path / "export").is_dir()


@pytest.mark.parametrize("name", ["mixture_dmd2_4step", "digits_dmd2_4step"])
def test_the_first_updates_are_those_of_a_cpu(name: str, tmp_path: Path) -> None:
    """Noise is drawn by counters, so that a device changes rounding alone."""
    here, there = (first_updates(name, tmp_path / device, device) for device in ("cpu", "cuda"))
    for one, other in zip(here, there, strict=True):
        for key, value in one.items():
            if key.endswith("loss"):
                assert other[key] == pytest.approx(value, rel=2e-3), key


def test_mixed_precision(tmp_path: Path) -> None:
    exact, mixed = (
        first_updates("digits_dmd2_4step", tmp_path / name, "cuda", f"train.mixed_precision='{name}'")
        for name in ("no", "bf16")
    )
    key = "fake_score/loss"
    assert [line[key] for line in mixed] == pytest.approx([line[key] for line in exact], rel=0.05)


def test_offloaded_encoders_come_back_to_their_memory() -> None:
    """On the GPU inside, then where they were, without a copy."""
    digits = str(ROOT / "assets/teachers/digits")
    config = SD3Config(path=digits, encoders="offload")
    backbone = config.build(torch.device("cuda"), torch.float32, 0)
    encoder = backbone.text_pipeline.text_encoder
    places = [p.data_ptr() for p in encoder.parameters()]
    with on_device(backbone.text_pipeline, backbone.device):
        assert all(t.is_cuda for t in (*encoder.parameters(), *encoder.buffers()))
    assert [p.data_ptr() for p in encoder.parameters()] == places
    held = SD3Config(path=digits).build(torch.device("cuda"), torch.float32, 0)
    one, other = (b.encode_prompts(["a three"])["prompt_embeds"] for b in (backbone, held))
    assert torch.equal(one, other) and one.is_cuda
