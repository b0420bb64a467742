"""The blocks of docs/new_objective.md, run as they stand."""

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastgen.config import load_recipe
from fastgen.train import main

PAGE = Path(__file__).parent.parent / "docs" / "new_objective.md"
TINY = [
    "backbone.fit_steps=20",
    "backbone.width=16",
    "train.batch_size=32",
    "train.checkpoint_every=3",
    "train.sample_every=0",
    "eval.quick_num_samples=50",
]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's two files in a fresh folder on the import path."""
    blocks = dict(re.findall(r"^```(python|yaml)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE))
    (tmp_path / "my_objective.py").write_text(blocks["python"])
    (tmp_path / "my_recipe.yaml").write_text(blocks["yaml"])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_objective", raising=False)
    return tmp_path / "my_recipe.yaml"


def run(recipe: Path, name: str, steps: int, *more: str) -> Path:
    """Trains to `steps` in a run folder beside the recipe; returns its newest checkpoint."""
    folder = recipe.parent / name
    assert main([str(recipe), f"output_dir={folder}", f"train.steps={steps}", *TINY, *more]) == 0
    return folder / "checkpoints" / f"step_{steps:08d}"


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference between two sets of tensors with the same names."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.mark.slow
def test_the_tutorial_trains_and_continues(recipe: Path) -> None:
    early = run(recipe, "run", 3)
    settings = load_recipe(recipe, TINY)
    backbone = settings.backbone.build(torch.device("cpu"), torch.float32, settings.seed)
    pretrained = settings.objective.auxiliary(backbone, settings.rollout)["fake_score"].state_dict()
    moved = distance(load_file(early / "fake_score.safetensors"), pretrained)
    print(f"the fake score moved by up to {moved:.2g}")
    assert moved > 1e-4
    assert load_file(early / "fake_score.safetensors")["network.time.tables.stop.weight"].abs().max() > 0

    # Three student updates of 32 samples are in the average, the older ones decayed.
    state = load_file(early / "objective.safetensors")
    memory = settings.objective.memory
    assert state["average"][1].sum().item() == pytest.approx(32 * (1 + memory + memory**2), rel=1e-5)
    assert state["seen"].abs().sum().item() == 0
    assert (state["average"][0] >= 0).all() and state["average"][0].sum() > 0

    continued = run(recipe, "run", 6)
    assert (recipe.parent / "run" / "export" / "recipe.yaml").read_text().count("my_objective:RunningDMD") == 1
    direct = run(recipe, "uninterrupted", 6)
    for name in ("objective", "fake_score", "student", "ema"):
        error = distance(load_file(continued / f"{name}.safetensors"), load_file(direct / f"{name}.safetensors"))
        print(f"{name}: continued against uninterrupted {error:.2g}")
        assert error == 0


@pytest.mark.slow
def test_its_state_does_not_depend_on_accumulation(recipe: Path) -> None:
    whole = run(recipe, "whole", 3)
    halves = run(recipe, "halves", 3, "train.batch_size=16", "train.accumulate=2")
    error = distance(load_file(whole / "objective.safetensors"), load_file(halves / "objective.safetensors"))
    print(f"state, one batch against two halves: {error:.2g}")
    assert error < 1e-4


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("objective.memry=0.5", "did you mean 'memory'"),
        ("objective.memory=1.5", "objective.memory"),
        ("objective.name=my_objective:RunningDMB", "objective.name"),
    ],
)
def test_mistakes_are_refused(recipe: Path, capsys: pytest.CaptureFixture[str], override: str, wanted: str) -> None:
    assert main([str(recipe), f"output_dir={recipe.parent / 'run'}", override]) == 2
    message = capsys.readouterr().err
    assert message.startswith("refused: ") and wanted in message
    assert not (recipe.parent / "run").exists()
