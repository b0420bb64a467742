"""The program that compares streaming methods on moving digits."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.streaming import methods
from benchmarks.streaming.methods import BASE, METHODS, Run, every_run
from benchmarks.streaming.rewards import told_motion
from fastgen.config import load_recipe
from fastgen.data.moving_digits import draw_scenes, render

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("run", list(every_run([0], [4, 2, 1], "")), ids=lambda run: run.name)
def test_every_method_is_a_recipe(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    start = ROOT / "assets/teachers/moving_digits"
    overrides = [o for o in run.overrides(start, tmp_path) if not o.startswith("init_from=")]
    recipe = load_recipe(methods.RECIPE, [*overrides, f"init_from={start}"])
    assert (recipe.train.steps, recipe.train.batch_size) == (80, 32), "one budget"
    assert len(recipe.rollout.timesteps) == run.steps and recipe.rollout.chunks is not None


def test_a_run_comes_after_the_one_it_starts_from() -> None:
    runs = list(every_run([0, 1], [4, 2, 1], ""))
    folders = [run.folder for run in runs]
    assert len(set(folders)) == len(runs) and len({m.name for m in METHODS}) == len(METHODS)
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
    assert len(lines) == 3 and lines[2].startswith(f"| {BASE} | 4 | 2 | 0.600 ± 0.100 | 0.500 ± 0.000 |")
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
