"""What an earlier version wrote is still read under its old key names: recipes of runs, metadata of exports."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from fastgen.config import load_recipe, load_stored
from fastgen.registry import RENAMED, RecipeError
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.sampler import METADATA, load_sampler
from fastgen.train import train

ROOT = Path(__file__).parents[1]
FLOW_MAP = ROOT / "recipes/mixture_flow_map_4step.yaml"
SHORT = [
    "backbone.fit_steps=0",
    "backbone.width=16",
    "train.steps=1",
    "train.batch_size=64",
    "train.device=cpu",
    "health.every=0",
    "eval.quick_num_samples=400",
    "eval.teacher_steps=[2]",
]


def with_old_names(values: dict[str, object]) -> dict[str, object]:
    """A rollout section as version 0.1 wrote it."""
    old = {new: before for before, new in RENAMED["rollout"].items()}
    return {old.get(key, key): value for key, value in values.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose files say what version 0.1 would have said."""
    folder = tmp_path_factory.mktemp("stored") / "run"
    train(load_recipe(FLOW_MAP, [*SHORT, f"output_dir={folder}"]))
    for path in (folder / "recipe.yaml", folder / "export/recipe.yaml"):
        raw = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump(raw | {"rollout": with_old_names(raw["rollout"])}))
    path = folder / "export" / METADATA
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps(metadata | {"policy": with_old_names(metadata["policy"])}))
    assert "next_time" in path.read_text() and "two_time" not in path.read_text()
    return folder


def test_a_stored_recipe_is_the_recipe(run: Path) -> None:
    assert load_stored(run / "recipe.yaml") == load_recipe(FLOW_MAP, [*SHORT, f"output_dir={run}"])


def test_a_run_of_the_earlier_version_continues(run: Path) -> None:
    train(load_recipe(FLOW_MAP, [*SHORT, f"output_dir={run}", "train.steps=2"]))
    assert (run / "checkpoints/step_00000002").is_dir()


def test_an_export_of_the_earlier_version_samples(run: Path) -> None:
    sampler = load_sampler(run / "export")
    assert sampler.policy == load_stored(run / "recipe.yaml").rollout
    assert sampler.sample([""], [0]).shape == torch.Size([1, 2])


@pytest.mark.parametrize(("before", "now"), RENAMED["rollout"].items())
def test_a_users_recipe_says_the_new_name(before: str, now: str) -> None:
    assert hasattr(RolloutPolicy((1.0,)), now)
    with pytest.raises(RecipeError, match=f"unknown key rollout.{before}; since version 0.2 it is called {now}"):
        load_recipe(FLOW_MAP, [f"rollout.{before}=0.5"])
