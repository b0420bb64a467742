"""The program that compares streaming methods on moving digits."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.streaming import methods
from benchmarks.streaming.methods import (
    BASE,
    COLUMNS,
    KILOBYTES,
    METHODS,
    SECONDS,
    Method,
    Run,
    every_run,
    pooled,
    table,
)
from benchmarks.streaming.rewards import told_motion
from fastgen.config import load_recipe
from fastgen.data.moving_digits import draw_scenes, render
from fastgen.objectives import ContextForcing
from fastgen.recipe import Recipe
from fastgen.train import train

ROOT = Path(__file__).parents[1]


RUNS = [run for run in every_run([0], [4, 2, 1], "") if run.training == run]
# what only the objective's own key says of a method
NAMED = {"stream_r1", "asd", "hiar", "sc_dmd", "salt", "any_flow", "context_forcing", "long_tuning", "re_dmd", "dmd2"}
QUICK = ("train.steps=1", "train.batch_size=2", "train.num_samples=2", "health.every=0", "eval.num_samples=2")


def recipe_of(run: Run, start: Path, runs: Path, *more: str) -> Recipe:
    """That of the run, whose student begins with the moving digits' own network if `start` has no weights."""
    begin = start if (start / "checkpoints").is_dir() else ROOT / "assets/teachers/moving_digits"
    overrides = [o for o in run.overrides(start, runs) if not o.startswith("init_from=")]
    return load_recipe(methods.RECIPE, [*overrides, f"init_from={begin}", *more])


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_every_method_is_a_recipe(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    start = tmp_path / "start"
    (start / "export").mkdir(parents=True)
    said = {"backbone": {"name": "wan"}, "policy": {"timesteps": [1.0], "chunks": {"frames": 1}}}
    (start / "export/fastgen.json").write_text(json.dumps(said))
    recipe = recipe_of(run, start, tmp_path)
    assert (recipe.train.steps, recipe.train.batch_size) == (80, 32), "one budget"
    assert len(recipe.rollout.timesteps) == run.trained_steps and recipe.rollout.chunks is not None
    assert recipe.rollout.with_steps(run.steps).timesteps == pytest.approx(methods.LEVELS[run.steps])
    assert recipe.objective.name in NAMED
    if isinstance(recipe.objective, ContextForcing):
        assert recipe.objective.teacher_from == str(start)


def test_every_streaming_objective_is_compared() -> None:
    words = " ".join(override for method in METHODS for override in method.overrides)
    assert {name for name in NAMED if f"name={name}" in words or f"name: {name}" in words} == NAMED - {"dmd2"}


def test_a_star_is_at_what_differs_by_more_than_two_standard_errors() -> None:
    """Two seeds of plain Self Forcing, at 0.90 and 0.92, and one of another method."""
    assert pooled([[1.0, 3.0], [5.0], [0.0, 0.0, 3.0]]) == pytest.approx((8 / 3) ** 0.5)
    bound = 2 * 0.02 / 2**0.5 * (1 + 1 / 2) ** 0.5
    for other in (0.91 + 0.99 * bound, 0.91 - 1.01 * bound):
        numbers = {f"{BASE}, 4 steps, seed 0": 0.90, f"{BASE}, 4 steps, seed 1": 0.92}
        numbers["8-bit context, 4 steps, seed 0"] = other
        rows = {
            f"{name} {part}": {key: value for own, key in COLUMNS.values() if own == part}
            | {"cpu_seconds": value, "videos": 1, "chunks": 1}
            for name, value in numbers.items()
            for part in ("whole", "long", "switch")
        }
        plain, row, _, said = table(rows).splitlines()[2:]
        assert plain.startswith(f"| {BASE} | 4 | 2 | 0.910 ± 0.010 |") and "*" not in plain
        starred = [cell.strip().endswith("*") for cell in row.split("|")[4:-1]]
        expected = [other < 0.91 and heading not in (KILOBYTES, SECONDS) for heading in COLUMNS]
        assert starred == expected, "memory and seconds are not of seeds"
        assert said.startswith("Deviation between seeds: accuracy 0.0141; ")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of teacher forcing of one update."""
    folder = tmp_path_factory.mktemp("runs") / "start"
    changes = ("eval.teacher_steps=[]", "eval.metrics=[drift]", f"output_dir={folder}")
    return train(load_recipe(ROOT / "recipes/moving_digits_teacher_forcing.yaml", [*changes, *QUICK]))


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in METHODS if "objective" in "".join(m.overrides)], ids=lambda m: m.name)
def test_every_objective_makes_an_update(
    method: Method, start: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Some of what does not fit a schedule of chunks is found only when a video is made."""
    monkeypatch.chdir(ROOT)
    folder = train(recipe_of(Run(method, method.steps[-1], 0), start, tmp_path, *QUICK, "train.log_every=1"))
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [row["student/loss"] for row in rows if "student/loss" in row]
    assert len(losses) == 1 and math.isfinite(losses[0]) and (folder / "export/fastgen.json").is_file()


def test_a_run_comes_after_the_one_it_starts_from() -> None:
    every = list(every_run([0, 1], [4, 2, 1], ""))
    assert all(every.index(run.training) <= every.index(run) and run.folder == run.training.folder for run in every)
    runs = [run for run in every if run.training == run]
    folders = [run.folder for run in runs]
    several = sum(len(run.method.steps) - 1 for run in runs if run.method.any_step and run.steps == run.trained_steps)
    assert len(set(folders)) == len(runs) - several and len({m.name for m in METHODS}) == len(METHODS)
    for run in runs:
        if run.method.start is not None:
            first = Run(methods.by_name(run.method.start), run.steps, run.seed).folder
            assert folders.index(first) < folders.index(run.folder)


def test_the_table_shows_means_and_their_errors() -> None:
    row = {"videos": 10, "chunks": 2, "cpu_seconds": 40.0} | {key: 0.5 for _, key in methods.COLUMNS.values()}
    rows = {f"{BASE}, 4 steps, seed {s} {part}": row for s in (0, 1) for part in ("whole", "long")}
    rows[f"{BASE}, 4 steps, seed 1 whole"] = row | {"video_accuracy": 0.7}
    rows[f"{BASE}, 2 steps, seed 0 whole"] = row  # its long videos are not measured yet
    lines = methods.table(json.loads(json.dumps(rows))).splitlines()
    assert lines[3:] == ["", "Deviation between seeds: accuracy 0.1414."] and lines[2].startswith(
        f"| {BASE} | 4 | 2 | 0.600 ± 0.100 | 0.500 ± 0.000 |"
    )
    assert lines[2].endswith("| 2.000 ± 0.000 |")


def test_the_reward_is_best_for_real_videos() -> None:
    scenes = draw_scenes(torch.arange(16), 0)
    prompts = scenes.prompts(torch.ones(16, 3, dtype=torch.bool))
    videos = render(scenes, 25)
    still = videos[:, :1].expand_as(videos)
    moving, frozen = told_motion(videos, prompts), told_motion(still, prompts)
    speeds = torch.tensor([1.0, 0.5])[scenes.speeds]
    assert (moving > frozen).all() and torch.allclose(frozen, -speeds, atol=1e-3)
    sideways = told_motion(videos.transpose(-1, -2), prompts)
    assert (moving > sideways).all()
