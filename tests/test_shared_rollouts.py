"""With share_rollout, the fake updates of a student update train on one rollout of the student."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastgen.config import load_recipe
from fastgen.planning.plan import plan
from fastgen.registry import RecipeError
from fastgen.run.checkpoint import complete
from fastgen.train import train

SMALL = [
    "train.steps=2",
    "train.batch_size=16",
    "train.log_every=1",
    "train.checkpoint_every=1",
    "train.eval_every=0",
    "train.sample_every=0",
    "eval.num_samples=20",
    "eval.quick_num_samples=20",
    "eval.teacher_steps=[4]",
    "health.every=0",
    "objective.fake_updates=3",
    "objective.share_rollout=true",
    "backbone.fit_steps=2",
]
PHASES = "objective.phases=[{first: 0, last: 2, updates: 1}, {first: 2, last: 4, updates: 1}]"
RECIPES = {"dmd2": [], "tdm": [], "phased_dmd": [PHASES], "rtdmd": [], "gndm": [], "adm": []}
SLOW = ("rtdmd", "adm", "tdm", "gndm")


def ended(recipe: Path, folder: Path, *overrides: str) -> tuple[dict[str, dict[str, torch.Tensor]], list[dict]]:
    """The networks and optimizers of the last checkpoint, and the rows of the log."""
    run = train(load_recipe(recipe, [*SMALL, f"output_dir={folder}", *overrides]))
    files = sorted(complete(run / "checkpoints")[-1].glob("*.safetensors"))
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {file.name: load_file(file) for file in files}, rows


def farthest_apart(a: dict[str, dict[str, torch.Tensor]], b: dict[str, dict[str, torch.Tensor]]) -> float:
    assert a.keys() == b.keys()
    return max((a[f][k].double() - b[f][k].double()).abs().max().item() for f in a for k in a[f])


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in RECIPES])
def test_only_the_first_fake_update_runs_the_student(name: str, project: Path, tmp_path: Path) -> None:
    """In the plan, and in the log of a run: a rollout of one to four steps for three updates."""
    recipe, overrides = project / "recipes" / f"mixture_{name}_4step.yaml", RECIPES[name]

    def planned(*more: str) -> dict[str, float]:
        found = plan(load_recipe(recipe, [*SMALL, *overrides, *more]), gpu=False, activations=True)
        return next(part.evaluations for part in found.turns if part.turn.name == "fake_score")

    shared, each = planned(), planned("objective.share_rollout=false")
    assert shared["student"] == pytest.approx(each["student"] / 3)
    assert shared["fake_score"] == each["fake_score"]
    _, rows = ended(recipe, tmp_path, *overrides)
    fake = next(row["fake_score/evaluations"] for row in rows if "fake_score/evaluations" in row)
    student = fake - shared["fake_score"]
    assert 1 / 3 - 1e-6 <= student <= 4 / 3 + 1e-6


@pytest.mark.slow
def test_micro_batches_keep_a_rollout_each(mixture_recipe: Path, tmp_path: Path) -> None:
    """Two micro-batches of eight samples give the update of sixteen, to rounding."""
    whole, _ = ended(mixture_recipe, tmp_path / "whole")
    halves, _ = ended(mixture_recipe, tmp_path / "halves", "train.batch_size=8", "train.accumulate=2")
    apart, _ = ended(mixture_recipe, tmp_path / "each", "objective.share_rollout=false")
    print("halves", farthest_apart(whole, halves), "a rollout each", farthest_apart(whole, apart))
    assert farthest_apart(whole, halves) < 1e-4 and farthest_apart(whole, apart) > 1e-3


@pytest.mark.slow
def test_a_continued_run_ends_with_the_same_bits(mixture_recipe: Path, tmp_path: Path) -> None:
    constant = ("optimizers.student.decay=constant", "optimizers.fake_score.decay=constant")
    whole, _ = ended(mixture_recipe, tmp_path / "whole", *constant)
    ended(mixture_recipe, tmp_path / "parts", "train.steps=1", *constant)
    parts, _ = ended(mixture_recipe, tmp_path / "parts", *constant)
    assert farthest_apart(whole, parts) == 0


def test_phased_dmd_without_random_exits_is_refused(project: Path) -> None:
    """There only the first step of a phase is part of the kept rollout."""
    overrides = [*SMALL, PHASES, "objective.random_exit=false"]
    with pytest.raises(RecipeError, match="set random_exit: true"):
        load_recipe(project / "recipes" / "mixture_phased_dmd_4step.yaml", overrides)
