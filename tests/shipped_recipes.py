"""The recipes that ship, for tests."""

import json
import tempfile
from functools import cache
from pathlib import Path

import yaml

from fastgen.config import load_recipe
from fastgen.recipe import Recipe
from fastgen.sampling.sampler import METADATA

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@cache
def run_folders() -> set[str]:
    """Where the runs of all recipes lie."""
    return {yaml.safe_load(path.read_text())["output_dir"] for path in RECIPES}


def loaded(path: Path) -> Recipe:
    """A recipe that starts from a run of another one is read without it, as that run is not there; one that has a run
    as its teacher, with a folder that says of itself what such a run does; and one that trains on the pictures that a
    tool makes, with others."""
    raw = yaml.safe_load(path.read_text())
    first, folder = raw.get("init_from"), raw["data"].get("folder")
    assert first is None or first in run_folders()
    changes = ["init_from=null"] if first else []
    changes += ["data.folder=assets/emoji/reference"] if folder == "build/emoji/training" else []
    if raw["objective"].get("teacher_from"):
        teacher, policy = Path(tempfile.mkdtemp()), {"timesteps": [1.0], "chunks": {"frames": 1}}
        (teacher / METADATA).write_text(json.dumps({"backbone": {"name": "wan"}, "policy": policy}))
        changes.append(f"objective.teacher_from={teacher}")
    return load_recipe(path, changes)
