"""The loop: what a run leaves behind, and that dividing or interrupting the work changes nothing."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastgen.config import load_recipe
from fastgen.evaluation.evaluate import evaluate
from fastgen.evaluation.folders import evaluate_path
from fastgen.recipe import Recipe
from fastgen.registry import RecipeError
from fastgen.run import checkpoint
from fastgen.run.build import TrainingError
from fastgen.run.export import export_run
from fastgen.run.log import RunLog
from fastgen.run.summary import time_left
from fastgen.run.trackers import MOST_PIXELS
from fastgen.run.watching import bit_sum
from fastgen.sampling.sampler import load_sampler, teacher_sampler
from fastgen.train import main, train

ROOT = Path(__file__).parents[1]
TINY = [
    "backbone.means=[[0,0],[3,1]]",
    "backbone.stds=[0.3,0.2]",
    "backbone.weights=[1,2]",
    "backbone.width=16",
    "backbone.fit_steps=20",
    "backbone.fit_batch_size=32",
    "objective.fake_updates=2",
    "train.batch_size=8",
    "train.steps=6",
    "train.log_every=2",
    "train.sample_every=3",
    "train.eval_every=3",
    "train.checkpoint_every=3",
    "eval.num_samples=64",
    "eval.quick_num_samples=64",
    "eval.teacher_steps=[4]",
    "optimizers.student.decay=constant",
    "optimizers.fake_score.decay=constant",
]
GAN = ["objective.gan_weight=0.1", "optimizers.discriminator={lr: 1e-3}"]


def tiny(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes/mixture_dmd2_4step.yaml", [*TINY, f"output_dir={folder}", *overrides])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to be read only."""
    return train(tiny(tmp_path_factory.mktemp("plain") / "run"))


@pytest.fixture(scope="module")
def adversarial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a discriminator, to be read only."""
    return train(tiny(tmp_path_factory.mktemp("adversarial") / "run", *GAN))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint."""
    last = checkpoint.complete(folder / "checkpoints")[-1]
    return {f"{f.stem}.{k}": v for f in sorted(last.glob("*.safetensors")) for k, v in load_file(f).items()}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_folder_holds_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(tiny(tmp_path / "run", *GAN))
    for name in (
        "recipe.yaml",
        "log.jsonl",
        "samples/teacher.png",
        "samples/step_00000003.png",
        "export/README.md",
        "export/model.safetensors",
        "export/config.json",
        "export/fastgen.json",
        "export/recipe.yaml",
    ):
        assert (folder / name).is_file(), name
    assert list((folder / "tensorboard").iterdir())
    with_checkpoint = 3  # whose update waits for no later row
    assert [r["step"] for r in rows(folder) if "student/loss" in r] == [2, with_checkpoint, 4, 6]
    assert [r["step"] for r in rows(folder) if "eval/energy_distance" in r] == [3, 6]
    logged = rows(folder)[0]
    for key in (
        "student/loss",
        "student/fake_lag",
        "student/grad_norm_student",
        "fake_score/gan",
        "fake_score/loss",
        "fake_score/grad_norm_discriminator",
        "lr/student",
        "seconds_per_step",
        "memory_mb",
    ):
        assert key in logged, key
    # two steps, each of one student update and two of the fake score; a rollout's share differs by its stops
    student, fake = logged["student/evaluations"], logged["fake_score/evaluations"]
    assert logged["evaluations"] == pytest.approx(2 * student + 4 * fake)
    assert 4 <= student <= 7 and 4 <= fake <= 7  # the rollout's 1 to 4, and fake score, teacher and discriminator's
    card = (folder / "export/README.md").read_text()
    assert "| student, 4 steps |" in card and "| teacher, 4 steps |" in card and "6 student updates" in card
    printed = capsys.readouterr().out
    assert "discriminator" in printed and "tensors moved" in printed and "the teacher at" in printed
    assert printed.count("for the 2 updates that are left, at ") == 1  # after 4 of 6 updates
    for words in (
        f"{folder}/recipe.yaml has all values",
        "dmd2",
        "mixture",
        "4 steps at 1, 0.75",
        "each of 8 samples",
    ):
        assert words in printed, words
    assert len(printed.splitlines()) < 35 and "fit_batch_size" not in printed  # not the whole recipe
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    assert board.Tags()["images"] == ["teacher", "student"]
    assert [event.step for event in board.Images("student")] == [3, 6]
    shown = Image.open(io.BytesIO(board.Images("student")[-1].encoded_image_string))
    assert shown.tobytes() == Image.open(folder / "samples/step_00000006.png").convert("RGB").tobytes()
    assert load_recipe(folder / "recipe.yaml") == tiny(tmp_path / "run", *GAN)


def test_seconds_per_step_are_those_of_updates_after_the_first(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, enabled=True)
    for seconds in ([50.0, 1.0, 3.0], [4.0, 6.0]):
        for taken in seconds:
            log.took(taken)
        log.write(1, {})
    log.close()
    assert [row["seconds_per_step"] for row in rows(tmp_path)] == [2.0, 5.0]
    alone = RunLog(tmp_path / "alone", 0, enabled=True)
    alone.took(7.0)
    alone.write(1, {})
    alone.close()
    assert rows(tmp_path / "alone")[0]["seconds_per_step"] == 7.0


def test_large_pictures_are_made_smaller_for_tensorboard(tmp_path: Path) -> None:
    Image.new("RGB", (2 * MOST_PIXELS, MOST_PIXELS), "red").save(tmp_path / "large.png")
    log = RunLog(tmp_path, 0, enabled=True)
    log.picture(3, "student", tmp_path / "large.png")
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    (event,) = board.Images("student")
    assert (event.step, event.width, event.height) == (3, MOST_PIXELS, MOST_PIXELS // 2)


def test_the_export_is_the_moving_average(plain: Path, tmp_path: Path) -> None:
    last = checkpoint.complete(plain / "checkpoints")[-1]
    exported = load_file(plain / "export/model.safetensors")
    average, student = load_file(last / "ema.safetensors"), load_file(last / "student.safetensors")
    assert all(torch.equal(v, average[f"network.{k}"]) for k, v in exported.items())
    assert any(not torch.equal(v, student[f"network.{k}"]) for k, v in exported.items())
    again = export_run(plain, tmp_path / "again")
    assert all(torch.equal(v, exported[k]) for k, v in load_file(again / "model.safetensors").items())
    points = load_sampler(plain).sample(["", ""], [0, 1])
    assert points.shape == (2, 2)


def test_an_interrupted_run_ends_with_the_same_bits(adversarial: Path, tmp_path: Path) -> None:
    train(tiny(tmp_path / "parts", *GAN, "train.steps=3"))
    (tmp_path / "parts/checkpoints/step_00000005.partial").mkdir()  # what a kill while saving leaves
    parts = train(tiny(tmp_path / "parts", *GAN))
    a, b = weights(adversarial), weights(parts)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [r["step"] for r in rows(parts) if "student/loss" in r] == [2, 3, 4, 6]


def test_a_changed_recipe_is_refused_by_the_name_of_its_keys(tmp_path: Path) -> None:
    train(tiny(tmp_path / "run", "train.steps=1"))
    with pytest.raises(RecipeError, match=r"objective\.fake_updates"):
        train(tiny(tmp_path / "run", "objective.fake_updates=3"))
    train(tiny(tmp_path / "done", "train.steps=1", "train.checkpoint_every=0"))
    with pytest.raises(RecipeError, match="finished run without checkpoints"):
        train(tiny(tmp_path / "done", "train.steps=2", "train.checkpoint_every=0"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("years of work")
    with pytest.raises(RecipeError, match="not empty"):
        train(tiny(tmp_path / "other"))


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], pytest.param(GAN, marks=pytest.mark.slow)], ids=["plain", "gan"])
def test_accumulating_two_halves_equals_one_batch(tmp_path: Path, extra: list[str]) -> None:
    """2 x 1 equals 1 x 2, in float64, over 20 student updates."""
    common = [
        *extra,
        "train.dtype=float64",
        "train.steps=20",
        "train.eval_every=0",
        "train.sample_every=0",
        "train.checkpoint_every=20",
    ]
    one = weights(train(tiny(tmp_path / "one", *common, "train.batch_size=8")))
    two = weights(train(tiny(tmp_path / "two", *common, "train.batch_size=4", "train.accumulate=2")))
    error = max((one[k] - two[k]).abs().max().item() for k in one if one[k].is_floating_point())
    moved = weights_moved(tmp_path / "one")
    print(f"largest difference of a weight {error:.2g}, largest movement {moved:.2g}")
    assert error < 1e-10 < moved


def weights_moved(folder: Path) -> float:
    """How far the student came from its pretrained weights: that the comparison is of something."""
    recipe = load_recipe(folder / "recipe.yaml")
    start = recipe.backbone.build(torch.device("cpu"), torch.float64, recipe.seed).load("student").state_dict()
    return max(
        (v - weights(folder)[f"student.{k}"]).abs().max().item() for k, v in start.items() if v.is_floating_point()
    )


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """The same samples, divided between two processes, give the same weights in float64."""
    common = [*TINY, "train.dtype=float64", "train.eval_every=0", "train.sample_every=0", "train.steps=3"]
    program = str(ROOT / "fastgen/train.py")
    recipe = str(ROOT / "recipes/mixture_dmd2_4step.yaml")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*launch, program, recipe, *common, "train.batch_size=4", f"output_dir={tmp_path / 'two'}"],
        capture_output=True,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    one, two = (
        weights(train(load_recipe(recipe, [*common, f"output_dir={tmp_path / 'one'}"]))),
        weights(tmp_path / "two"),
    )
    error = max((one[k] - two[k]).abs().max().item() for k in one if one[k].is_floating_point())
    print(f"largest difference of a weight {error:.2g}")
    assert error < 1e-10
    world = json.loads((checkpoint.complete(tmp_path / "two/checkpoints")[-1] / "counters.json").read_text())
    assert world["position"] == 3 * 3 * 8  # three updates of three turns of eight samples: both processes took part


def test_a_run_may_start_from_another(plain: Path, tmp_path: Path) -> None:
    """From a run, student and fake score; from an export, the student. The student's average begins there too."""
    last = checkpoint.complete(plain / "checkpoints")[-1]
    still = [
        "train.steps=1",
        "optimizers.student.lr=2e-7",
        "optimizers.fake_score.lr=2e-7",
        "health.every=0",
        "optimizers.student.weight_decay=0",
        "optimizers.fake_score.weight_decay=0",
    ]
    for source in (plain, plain / "export"):
        second = train(tiny(tmp_path / f"from_{source.name}", *still, f"init_from={source}"))
        found = weights(second)
        for role, origin in (("student", "ema"), ("ema", "ema"), ("fake_score", "fake_score")):
            expected = load_file(last / f"{origin}.safetensors")
            far = max((found[f"{role}.{k}"] - v).abs().max().item() for k, v in expected.items())
            assert (far < 1e-6) == (source == plain or role != "fake_score"), (source, role, far)


def test_a_few_step_teacher_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export of ours, and a name that says so; the digits teacher itself is not."""
    recipe = load_recipe(ROOT / "recipes/digits_dmd2_4step.yaml", [f"output_dir={tmp_path}"])
    assert recipe.backbone.build(torch.device("cpu"), torch.float32, 0).warnings() == []
    for name, marked in (("digits-turbo", False), ("plain", True)):
        folder = shutil.copytree(ROOT / "assets/teachers/digits", tmp_path / name)
        if marked:
            (folder / "fastgen.json").write_text("{}")
        config = dataclasses.replace(recipe.backbone, path=str(folder))
        (warning,) = config.build(torch.device("cpu"), torch.float32, 0).warnings()
        assert "init_from" in warning


def test_a_run_is_evaluated_without_further_options(plain: Path, tmp_path: Path) -> None:
    run = shutil.copytree(plain, tmp_path / "run")
    evaluate_path(run, output=tmp_path / "results.json")
    result = json.loads((tmp_path / "results.json").read_text())
    assert {"energy_distance", "energy_distance_floor", "mean_error", "cov_error", "mode_share_error"} <= result[
        "metrics"
    ].keys()
    assert (tmp_path / "results.html").is_file()


def test_a_student_is_measured_beside_its_teacher_and_the_card_has_the_newest_numbers(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(plain, tmp_path / "run")
    card = (run / "export/README.md").read_text()
    result = evaluate_path(run, progress=False)  # as the run has measured it
    assert "the teacher at 4 steps was measured in the same way before" in capsys.readouterr().out
    (teacher,) = result["teachers"]
    stored = {row["name"]: row for row in json.loads((run / "export/evaluation.json").read_text())["rows"]}
    assert list(stored) == ["student, 4 steps", "teacher, 4 steps"] and teacher["name"] == "its teacher, 4 steps"
    assert stored["teacher, 4 steps"]["metrics"] == teacher["metrics"] != result["metrics"]
    assert stored["student, 4 steps"]["metrics"] == result["metrics"]
    assert (run / "export/README.md").read_text() == card  # the same student, prompts and seeds

    more = evaluate_path(run, num_samples=80, metrics="mean_error", output=tmp_path / "a.json", progress=False)
    printed, card = capsys.readouterr().out, (run / "export/README.md").read_text()
    assert f"{tmp_path / 'a.json'} has the results, and {tmp_path / 'a.html'} the page" in printed
    assert "measuring the teacher at 4 steps" in printed and "its teacher, 4 steps" in printed
    assert {row["num_samples"] for row in (more, *more["teachers"])} == {80}
    assert "Measured on 80 samples of each" in card and "energy_distance |" not in card.split("## Recipe")[0]
    for row, name in ((more, "student"), (more["teachers"][0], "teacher")):
        assert f"| {name}, 4 steps | {row['metrics']['mean_error']:.4g} |" in card
    assert json.loads((tmp_path / "a.json").read_text())["teachers"][0]["name"] == "its teacher, 4 steps"
    assert not list(tmp_path.glob("*.partial.safetensors"))

    alone = evaluate_path(run, num_samples=64, student_only=True, progress=False)
    other = evaluate_path(run, num_samples=64, metrics="mean_error", teacher_steps=(), progress=False)
    assert "teachers" not in alone and "teachers" not in other
    text = (run / "export/README.md").read_text()
    assert "Measured on 64 samples. " in text and "| teacher" not in text


@pytest.mark.parametrize(
    ("seconds", "updates", "words"),
    [
        ((0.5, 1.5), 40, "about 40 seconds for the 40 updates that are left, at 1 s each"),
        ((4.0,), 396, "about 26 minutes for the 396 updates"),
        ((4.0,), 1, "about 4 seconds for the one update that is left"),
        ((3.0,), 5_000, "about 4 hours for the 5,000 updates"),
        ((120.0,), 5_000, "about 7 days for the 5,000 updates that are left, at 120 s each"),
    ],
)
def test_the_time_that_is_left(seconds: tuple[float, ...], updates: int, words: str) -> None:
    assert words in time_left(seconds, updates)


def test_a_diverged_run_stops_with_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rate = ("optimizers.student.lr=1e30", "optimizers.student.warmup=0")
    recipe = tiny(tmp_path / "run", *rate, "train.eval_every=0", "health.max_skipped=2")
    with pytest.raises(TrainingError, match="not finite"):
        train(recipe)


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "missing.yaml")]) == 2
    assert "no recipe at" in capsys.readouterr().err
    assert main([]) == 2


@pytest.mark.slow
def test_the_ring_in_a_minute(tmp_path: Path) -> None:
    """The score-difference signal, end to end: a short run on the eight-mode ring already beats the teacher's own ODE
    at four steps (energy distance 0.0238)."""
    overrides = ["train.steps=600", "train.eval_every=0", "train.sample_every=0", f"output_dir={tmp_path / 'run'}"]
    folder = train(load_recipe(ROOT / "recipes/mixture_dmd2_4step.yaml", overrides))
    metrics = evaluate_path(folder)["metrics"]
    print({k: round(v, 5) for k, v in metrics.items()})
    assert metrics["energy_distance"] < 0.0175
    assert metrics["mode_share_min_ratio"] > 0.5


@pytest.mark.slow
def test_the_digits_in_eighty_updates(tmp_path: Path) -> None:
    """The main job on real images: half of the quickstart already halves the teacher's FD at four steps."""
    overrides = ["train.steps=80", "train.eval_every=0", "train.sample_every=0", f"output_dir={tmp_path / 'run'}"]
    recipe = load_recipe(ROOT / "recipes/digits_quickstart.yaml", overrides)
    student = evaluate_path(train(recipe), metrics="fid,accuracy")["metrics"]
    backbone = recipe.backbone.build(torch.device("cpu"), torch.float32, 0)
    teacher = evaluate(teacher_sampler(backbone, 4, recipe.teacher_guidance), recipe.eval)["metrics"]
    print(f"FD of the student {student['fid']:.3f}, of the teacher at four steps {teacher['fid']:.3f}")
    assert student["fid"] <= 0.75 * teacher["fid"]
    assert student["accuracy"] >= 0.97


def test_opposite_moves_of_two_elements_are_seen() -> None:
    """What tells whether a tensor moved: one element a bit up and another a bit down, also in different chunks."""
    p = torch.ones(5)
    moved = p.clone()
    moved[1], moved[3] = torch.nextafter(p[1], p[1] + 1), torch.nextafter(p[3], p[3] - 1)
    for chunk in (2, 5, 100):
        assert bit_sum(p.view(torch.int32), chunk) == bit_sum(p.clone().view(torch.int32), chunk)
        assert bit_sum(p.view(torch.int32), chunk) != bit_sum(moved.view(torch.int32), chunk)


def test_bf16_autocast_keeps_float32_weights(adversarial: Path, tmp_path: Path) -> None:
    folder = train(tiny(tmp_path / "run", *GAN, "train.mixed_precision=bf16"))
    saved = weights(folder)
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in saved.values())
    whole = weights(adversarial)
    assert any(not torch.equal(saved[k], whole[k]) for k in whole)  # the option does something
