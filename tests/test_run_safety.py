"""Nothing on disk is lost: exports, checkpoints, logs, and runs that are stopped, started twice or moved."""

import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from benchmarks.rows import read_rows
from fastgen.config import load_recipe, load_stored
from fastgen.data.files import replace_file, replacing
from fastgen.objectives import Turn
from fastgen.objectives.dmd2 import DMD2
from fastgen.registry import RecipeError
from fastgen.run import checkpoint
from fastgen.run.build import build
from fastgen.run.checkpoint import CheckpointError
from fastgen.run.distributed import start
from fastgen.run.export import export_run
from fastgen.run.interruption import EXIT_CODES, Interruption
from fastgen.run.leftovers import REPLACED, leftovers, restore
from fastgen.run.lock import LOCK, lock, locked
from fastgen.run.log import RunLog
from fastgen.train import export, main, train, update

DIGITS = Path(__file__).parents[1] / "recipes/digits_quickstart.yaml"
RING = Path(__file__).parents[1] / "recipes/mixture_dmd2_4step.yaml"
SHORT = [
    "backbone.fit_steps=0",
    "backbone.width=16",
    "train.steps=2",
    "train.batch_size=32",
    "train.log_every=1",
    "train.checkpoint_every=1",
    "train.device=cpu",
    "health.every=0",
    "eval.num_samples=400",
    "eval.quick_num_samples=400",
    "eval.teacher_steps=[2]",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two updates, with both checkpoints."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(load_recipe(RING, [*SHORT, f"output_dir={folder}"]))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def continued(run: Path, *overrides: str) -> list[str]:
    return [str(RING), *SHORT, "train.steps=3", f"output_dir={run}", *overrides]


# --- files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    replace_file(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half of the ne")
        raise RuntimeError("the disk is full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# --- exports


def test_an_export_leaves_its_neighbours_alone(run: Path) -> None:
    """A user's folders named as version 0.1 named its temporary ones."""
    neighbours = [run.parent / name for name in ("student", "student.old", "student.partial")]
    for folder in neighbours[1:]:
        folder.mkdir()
        (folder / "thesis.txt").write_text("the only copy")
    for _ in range(2):
        export_run(run, neighbours[0])
    assert [(f / "thesis.txt").read_text() for f in neighbours[1:]] == ["the only copy"] * 2
    assert sorted(p.name for p in run.parent.iterdir()) == ["run", "student", "student.old", "student.partial"]


def test_an_export_keeps_what_is_in_its_place_and_no_export(run: Path) -> None:
    shutil.rmtree(run / "export")
    (run / "export").mkdir()
    (run / "export/thesis.txt").write_text("the only copy")
    assert main(continued(run)) == 0
    (kept,) = run.glob("export.kept-*")
    assert (kept / "thesis.txt").is_file() and (run / "export/fastgen.json").is_file()
    assert main(continued(run)) == 0
    assert (kept / "thesis.txt").is_file()


def test_an_export_that_fails_leaves_the_earlier_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.relative_to(run): p.read_bytes() for p in (run / "export").rglob("*") if p.is_file()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastgen.run.export.dump_recipe", full)
    with pytest.raises(OSError, match="No space left"):
        export_run(run)
    assert {p.relative_to(run): p.read_bytes() for p in (run / "export").rglob("*") if p.is_file()} == before
    assert not [p for p in run.iterdir() if p.name.startswith(".export")]


def test_an_export_is_put_back_after_a_kill_between_two_renames(run: Path) -> None:
    folder = run / "export"
    before = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    folder.rename(run / f".export.{REPLACED}-0123456789ab")
    restore(folder)
    assert {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_what_kills_have_left_is_removed_and_nothing_else(run: Path) -> None:
    left = [
        run / ".recipe.yaml.partial-0123456789ab",
        run / f".export.{REPLACED}-0123456789ab",
        run / "checkpoints/step_00000007.partial",
        run / "checkpoints/step_00000001.01234567.going.partial",
    ]
    kept = [run / "notes.partial", run / ".git", run / "checkpoints/step_best.partial", run / "samples/mine"]
    for folder in (*left, *kept):
        folder.mkdir()
        (folder / "thesis.txt").write_text("the only copy")
    assert sorted(leftovers(run)) == sorted(left)
    assert main(continued(run)) == 0
    assert not any(folder.exists() for folder in left)
    assert all((folder / "thesis.txt").is_file() for folder in kept)


def test_a_run_that_was_killed_before_it_had_a_recipe_starts(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in (LOCK, ".recipe.yaml.partial-0123456789ab"):
        (run / name).write_text("")
    assert main(continued(run)) == 0
    assert not leftovers(run)


# --- checkpoints


def test_only_checkpoints_are_checkpoints(run: Path) -> None:
    folder = run / "checkpoints"
    for name in ("step_00000030_backup", "step_best", "step_00000003.going.partial"):
        shutil.copytree(folder / "step_00000002", folder / name)
    (folder / "step_00000009").write_text("a file")
    assert [c.name for c in checkpoint.complete(folder)] == ["step_00000001", "step_00000002"]
    assert main(continued(run)) == 0
    kept = {p.name for p in folder.iterdir()}
    assert {"step_00000030_backup", "step_best", "step_00000002", "step_00000003"} <= kept
    assert "step_00000001" not in kept and "step_00000003.going.partial" not in kept


@pytest.mark.parametrize("name", ["student", "fake_score.optimizer", "objective", "ema"])
def test_a_flipped_bit_is_found(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / f"checkpoints/step_00000002/{name}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main(continued(run)) == 1
    assert f"the contents of {name}.safetensors are not those that were written" in capsys.readouterr().err


def test_another_runs_file_is_found(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    train(load_recipe(RING, [*SHORT, f"output_dir={other}", "seed=1"]))
    name = "checkpoints/step_00000002/student.optimizer.safetensors"
    shutil.copy(other / name, run / name)
    with pytest.raises(CheckpointError, match=r"student\.optimizer\.safetensors"):
        checkpoint.verify(run / "checkpoints/step_00000002")


def test_a_checkpoint_of_the_first_version_has_sizes_only(run: Path) -> None:
    path = run / "checkpoints/step_00000002/counters.json"
    counters = json.loads(path.read_text())
    del counters["sha256"]
    counters["files"] = {name: entry["bytes"] for name, entry in counters["files"].items()}
    path.write_text(json.dumps(counters))
    assert main(continued(run)) == 0


def test_later_checkpoints_are_set_aside_only_when_the_run_goes_on(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume = "train.resume_from=step_00000001"
    assert main(continued(run, resume, "train.batch_size=16")) == 2
    assert "keep the product as it was" in capsys.readouterr().err
    assert (run / "checkpoints/step_00000002").is_dir() and not (run / "set_aside").exists()
    assert main(continued(run, resume)) == 0
    assert (run / "set_aside/step_00000002").is_dir()


def test_the_same_command_goes_on_where_train_resume_from_led(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a scheduler says it again and again. Without train.resume_from, it goes back anew; and no stored recipe has
    it."""
    kept = "train.keep_checkpoints=9"
    resume = continued(run, "train.resume_from=step_00000001", "train.steps=4", kept)
    assert main([*resume, "train.steps=3"]) == 0 and "continuing from step_00000001" in capsys.readouterr().out
    assert (run / "set_aside/step_00000002").is_dir()
    assert main(resume) == 0
    assert "continuing from step_00000003, which comes from step_00000001" in capsys.readouterr().out
    assert [c.name for c in (run / "set_aside").iterdir()] == ["step_00000002"]
    for stored in (run / "recipe.yaml", run / "export/recipe.yaml"):
        assert load_stored(stored).train.resume_from is None
    shutil.rmtree(run / "set_aside")
    assert main(continued(run, "train.steps=5", kept)) == 0
    assert main([*resume, "train.steps=5"]) == 0
    assert "continuing from step_00000001" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train.batch_size=16", "keep the product as it was"),
        ("train.steps=1", "train.steps is 1, and "),
        ("train.resume_from=step_00000007", "has no checkpoint step_00000007"),
    ],
)
def test_a_start_that_is_refused_changes_nothing_and_loads_nothing(
    change: str, words: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run / "recipe.yaml").read_text()
    monkeypatch.setattr("fastgen.train.build", lambda *_: pytest.fail("networks were built"))
    assert main(continued(run, change)) == 2
    assert words in capsys.readouterr().err and (run / "recipe.yaml").read_text() == before


def test_a_folder_that_cannot_be_removed_does_not_end_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, where a file that is open somewhere stays under another name."""
    real = shutil.rmtree

    def leaves_one(path: Path, ignore_errors: bool = False, **_: Any) -> None:
        if Path(path).name.endswith(checkpoint.GOING) and not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        real(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", leaves_one)
    assert main(continued(run, "train.keep_checkpoints=1")) == 0
    assert [c.name for c in checkpoint.complete(run / "checkpoints")] == ["step_00000003"]


def test_data_that_changed_between_two_starts_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "the data are not those that the run was started with"
    assert main(continued(run)) == 0 and words not in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastgen.run.build.MARKED", 15)  # another hash
        assert main(continued(run, "train.steps=4")) == 0
    assert words in capsys.readouterr().out


def test_other_data_have_another_mark(tmp_path: Path) -> None:
    """Whatever is shown of them: a continued run may show more pictures."""

    def mark(prompts: list[str], *changes: str) -> str:
        data = f"data={{name: prompts, prompts: {prompts}}}"
        recipe = load_recipe(DIGITS, [data, f"output_dir={tmp_path / 'run'}", "train.device=cpu", *changes])
        return build(recipe, start(recipe)).data_mark

    three = [f"the digit {word}" for word in ("one", "two", "three")]
    assert mark(three) == mark(three, "train.num_samples=40", "health.num_samples=50")
    assert mark(three) != mark([*three, "the digit four"])


def test_a_run_may_be_watched_from_any_start_on(run: Path) -> None:
    """The teacher's statistics are measured when they are first needed."""
    assert main(continued(run, "health.every=1")) == 0
    assert any("health/mean" in row for row in log_rows(run))


def test_a_turn_whose_every_update_is_skipped_stops_the_run(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However well the other turns' updates go in between."""
    real = DMD2.loss

    def student_not_finite(self: DMD2, turn: Turn, *given: Any) -> Any:
        loss = real(self, turn, *given)
        return dataclasses.replace(loss, total=loss.total * float("nan")) if "student" in turn.roles else loss

    monkeypatch.setattr(DMD2, "loss", student_not_finite)
    assert main(continued(run, "train.steps=20", "health.max_skipped=2")) == 1
    assert "the gradient of student was not finite in 3 updates in a row" in capsys.readouterr().err


# --- logs and recipes


def log_rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_checkpoint_leaves_no_update_without_a_row(tmp_path: Path) -> None:
    """Whoever continues from it knows nothing of them: 4 updates, a row every 3, a checkpoint after the second."""
    run, changes = tmp_path / "run", ["train.steps=4", "train.log_every=3", "train.checkpoint_every=2"]
    losses = []
    for _ in range(2):
        assert main([str(RING), *SHORT, *changes, f"output_dir={run}"]) == 0
        losses.append([(row["step"], row["student/loss"]) for row in log_rows(run) if "student/loss" in row])
        shutil.rmtree(run / "checkpoints/step_00000004")
    assert [step for step, _ in losses[0]] == [2, 3, 4] and losses[0] == losses[1]


def test_a_torn_row_of_the_log_stops_nothing(run: Path) -> None:
    path = run / "log.jsonl"
    rows = path.read_text().splitlines()
    path.write_text("\n".join(rows) + '\n{"step": 3, "student/lo')
    RunLog(run, 2, enabled=True).close()
    assert path.read_text().splitlines() == rows


@pytest.mark.slow
def test_a_run_whose_start_has_moved_continues_and_exports(run: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    train(load_recipe(RING, [*SHORT, f"output_dir={second}", f"init_from={run}"]))
    run.rename(tmp_path / "moved")
    assert load_stored(second / "recipe.yaml").init_from == str(run)
    export_run(second, tmp_path / "student")
    assert main(continued(second, f"init_from={run}")) == 0
    with pytest.raises(RecipeError, match="init_from"):
        load_recipe(RING, [f"output_dir={tmp_path / 'third'}", f"init_from={run}"])


def test_roles_that_init_from_does_not_have_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(load_recipe(RING, [*SHORT, f"output_dir={tmp_path / 'new'}", f"init_from={run / 'export'}"]))
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "has no fake_score; it starts from the pretrained weights" in text


# --- two runs in one folder, and runs that are asked to end


def test_a_folder_has_one_run(tmp_path: Path) -> None:
    with locked(tmp_path / "run", Accelerator(cpu=True)):
        assert main([str(RING), *SHORT, f"output_dir={tmp_path / 'run'}"]) == 2
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_lock_file_that_was_just_removed_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that had the lock removes the file between our opening it and locking it."""
    path, flock = tmp_path / LOCK, fcntl.flock

    def late(handle: int, flags: int) -> None:
        path.unlink()
        monkeypatch.undo()
        flock(handle, flags)

    monkeypatch.setattr("fcntl.flock", late)
    handle, owner = lock(path)
    assert not owner and os.path.samestat(os.fstat(handle), path.stat())
    second, owner = lock(path)
    assert str(os.getpid()) in owner
    for descriptor in (handle, second):
        os.close(descriptor)


def test_a_lock_file_that_vanishes_while_it_is_compared_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run begins and ends in between, so that the file seems to be there and is not."""
    path, flock = tmp_path / LOCK, fcntl.flock

    def late(handle: int, flags: int) -> None:
        path.unlink()
        monkeypatch.undo()
        monkeypatch.setattr(Path, "is_file", lambda self: True)
        flock(handle, flags)

    monkeypatch.setattr("fcntl.flock", late)
    handle, owner = lock(path)
    assert not owner and os.path.samestat(os.fstat(handle), path.stat())
    os.close(handle)


def test_the_lock_of_a_run_that_came_later_stays(tmp_path: Path) -> None:
    with locked(tmp_path / "run", Accelerator(cpu=True)):
        (tmp_path / "run" / LOCK).unlink()
        (tmp_path / "run" / LOCK).write_text("another run")
    assert (tmp_path / "run" / LOCK).read_text() == "another run"
    with locked(tmp_path / "run", Accelerator(cpu=True)):
        shutil.rmtree(tmp_path / "run")


def test_the_first_signal_is_noted() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interruption() as interruption:
        assert interruption.agreed(Accelerator(cpu=True)) == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.agreed(Accelerator(cpu=True)) == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_all_that_was_logged_is_in_tensorboard_when_a_signal_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        monkeypatch.undo()
        return update(*arguments)

    monkeypatch.setattr("fastgen.train.update", signalled)
    assert main(continued(tmp_path / "run")) == EXIT_CODES[signal.SIGUSR1]
    assert "SIGUSR1: the run saves what it has and ends" in capfd.readouterr().err
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("student/loss")] == [1]


def test_a_signal_while_the_student_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without checkpoints, the export is all that a run leaves."""

    def signalled(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        export(*arguments, **options)

    monkeypatch.setattr("fastgen.train.export", signalled)
    assert main(continued(tmp_path / "run", "train.checkpoint_every=0")) == EXIT_CODES[signal.SIGTERM]
    assert "exported" in capsys.readouterr().err
    assert (tmp_path / "run/export/model.safetensors").is_file()


@pytest.mark.parametrize("moment", ["build", "quick_metrics"])
def test_ctrl_c_before_and_after_training_is_no_traceback(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"fastgen.train.{moment}", interrupted)
    assert main(continued(tmp_path / "run")) == EXIT_CODES[signal.SIGINT]
    assert re.search("^stopped: SIGINT ended the run", capsys.readouterr().err, re.MULTILINE)
    monkeypatch.undo()
    assert main(continued(tmp_path / "run")) == 0


def test_a_full_disk_is_words_in_a_background_thread_too(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard's writer is a thread of its own, whose errors Python shows as tracebacks."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    assert main(continued(run)) == 1
    said = capsys.readouterr().err
    assert "stopped: [Errno 28] No space left on device. Free some space" in said
    assert "in a background thread" in said and "Traceback" not in said
    monkeypatch.undo()
    assert main(continued(run)) == 0


@pytest.mark.slow
def test_a_run_survives_a_fault_of_every_kind(tmp_path: Path) -> None:
    """benchmarks/acceptance/fault_runs.py is the whole program."""
    program = [sys.executable, "benchmarks/acceptance/fault_runs.py", "--faults=1", "--steps=9"]
    places = [f"--folder={tmp_path / 'runs'}", f"--rows={tmp_path / 'rows.jsonl'}"]
    result = subprocess.run([*program, *places], cwd=RING.parents[1], capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = read_rows(tmp_path / "rows.jsonl")
    assert len(rows) >= 10 and all(sum(row["outcomes"].values()) == 1 for row in rows.values())


@pytest.mark.slow
@pytest.mark.parametrize("number", EXIT_CODES)
def test_a_signal_saves_and_says_how_to_continue(number: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = [str(RING), *SHORT, "train.steps=100000", "train.checkpoint_every=0", f"output_dir={folder}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastgen", "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (folder / "log.jsonl").is_file() or not (folder / "log.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == EXIT_CODES[number]
    assert re.search(rf"^stopped: {signal.Signals(number).name} ended the run", error, re.MULTILINE)
    (saved,) = checkpoint.complete(folder / "checkpoints")
    step = checkpoint.counters_of(saved)["step"]
    last = [*SHORT, f"train.steps={step + 1}", "train.checkpoint_every=0", f"output_dir={folder}"]
    assert main([str(RING), *last]) == 0 and not (folder / LOCK).exists()


# --- the end of a run


def test_a_student_that_cannot_be_measured_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights are there, although the average has diverged in the last update."""

    def diverged(*_: object, **__: object) -> None:
        raise ValueError("the samples are not finite")

    monkeypatch.setattr("fastgen.train.student_row", diverged)
    folder = tmp_path / "run"
    assert main([str(RING), *SHORT, "train.checkpoint_every=0", f"output_dir={folder}"]) == 1
    assert "was exported" in capsys.readouterr().err
    assert (folder / "export/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("eval.metrics=[fid]", "fid measures pixels, and backbone gaussian_mixture gives points"),
        ("eval.reference=digits", "it is for images"),
    ],
)
def test_an_evaluation_that_cannot_be_made_is_refused_at_the_start(override: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(RING, [override])


def test_pictures_need_prompts_and_a_reference() -> None:
    digits = RING.with_name("digits_dmd2_4step.yaml")
    with pytest.raises(RecipeError, match=r"eval: reference: .*no/images"):
        load_recipe(digits, ["eval.reference=no/images"])
    with pytest.raises(RecipeError, match=r"eval: prompts: there is no prompt file at no/prompts\.txt"):
        load_recipe(digits, ["eval.prompts=no/prompts.txt"])
    with pytest.raises(RecipeError, match="fid compares with other images"):
        load_recipe(digits, ["eval.reference=null"])
    with pytest.raises(RecipeError, match="there are no prompts to sample"):
        load_recipe(digits, ["eval.reference=null", "eval.metrics=[throughput]"])


def test_no_more_samples_are_measured_than_asked_for() -> None:
    config = load_recipe(RING, ["eval.num_samples=8"]).eval
    assert config.quick().num_samples == 8


def test_the_teacher_is_shown_with_the_guidance_that_is_distilled() -> None:
    recipe = load_recipe(RING, ["objective.guidance_scale=4.0"])
    assert recipe.eval.teacher_guidance_scale is None and recipe.teacher_guidance == 4.0
    said = load_recipe(RING, ["objective.guidance_scale=4.0", "eval.teacher_guidance_scale=1.0"])
    assert said.teacher_guidance == 1.0


def test_weights_that_are_not_finite_are_not_drawn(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from fastgen.sampling.folder import sample_folder

    path = run / "export/model.safetensors"
    save_file({name: torch.full_like(p, torch.nan) for name, p in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="are not finite"):
        sample_folder(run, [""], None, 4, 0, tmp_path / "samples", None, None, 4)
    assert not (tmp_path / "samples").exists()


def test_an_export_cannot_name_code(run: Path, tmp_path: Path) -> None:
    from fastgen.sampling.sampler import load_sampler

    path = run / "export/fastgen.json"
    metadata = json.loads(path.read_text())
    metadata["backbone"]["name"] = "evil_module:Config"
    path.write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="may not name code to import"):
        load_sampler(run / "export")
