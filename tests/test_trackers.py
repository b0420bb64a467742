"""The trackers of a run: the same rows and pictures in each, and one that is not installed is refused beforehand."""

import sqlite3
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastgen.config import load_recipe
from fastgen.registry import RecipeError
from fastgen.run.log import RunLog


def log_something(folder: Path, *trackers: str) -> None:
    """Two updates and a picture; then the run is continued after the first of them."""
    Image.new("RGB", (20, 10), "red").save(folder / "picture.png")
    log = RunLog(folder, 0, enabled=True, trackers=trackers)
    log.describe({"seed": 3, "train": {"steps": 2}})
    log.record(1, {"student/loss": 0.5})
    log.record(2, {"student/loss": 9.0})
    log.picture(2, "student", folder / "picture.png", ["a cat", "a dog"])
    log.close()
    log = RunLog(folder, 1, enabled=True, trackers=trackers)
    log.record(2, {"student/loss": 0.25})
    log.close()


def test_tensorboard_has_the_rows_of_the_log(tmp_path: Path) -> None:
    log_something(tmp_path, "tensorboard")
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("student/loss")] == [(1, 0.5), (2, 0.25)]
    assert not (tmp_path / "tracker_id").exists()


def test_a_run_without_trackers_has_its_log_alone(tmp_path: Path) -> None:
    log_something(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "picture.png"]


def test_trackio_gets_rows_pictures_and_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that is continued is the same one. Skipped where trackio is not installed."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    log_something(tmp_path, "trackio")
    with sqlite3.connect(next((tmp_path / "trackio").glob("*.db"))) as base:
        rows = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert len({name for name, _, _ in rows}) == 1 and [step for _, step, _ in rows] == [1, 2, 2, 2]
    assert "a cat\\na dog" in str(rows[2][2]).replace("\\\\n", "\\n")


def test_a_tracker_that_is_not_installed_is_refused(mixture_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgen.config.checks.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"train\.trackers: wandb is not installed; pip install wandb"):
        load_recipe(mixture_recipe, ["train.trackers=[wandb]"])
    load_recipe(mixture_recipe, ["train.trackers=[]"])
