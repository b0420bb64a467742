"""The watch: quiet on a healthy run, and in words on planted collapses."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastgen import signals
from fastgen import train as program
from fastgen.config import load_recipe
from fastgen.objectives import DMD2, Loss
from fastgen.recipe import HealthConfig
from fastgen.run import checkpoint
from fastgen.run.build import TrainingError
from fastgen.run.health import Watch, statistics
from fastgen.run.log import RunLog
from fastgen.train import train

ROOT = Path(__file__).parents[1]
RING = ROOT / "recipes/mixture_dmd2_4step.yaml"
SHORT = [
    "train.sample_every=0",
    "train.eval_every=0",
    "backbone.fit_steps=300",
    "eval.num_samples=64",
    "train.steps=200",
    "eval.quick_num_samples=64",
    "train.batch_size=64",
    "health.num_samples=64",
    "train.checkpoint_every=50",
    "objective.fake_updates=3",
    "eval.teacher_steps=[4]",
]
pytestmark = pytest.mark.usefixtures("fit_once")
TEACHER = {"mean": 0.0, "std": 1.0, "diversity": 1.4, "saturation": 0.003}


def warnings_of(folder: Path) -> str:
    path = folder / "warnings.log"
    return path.read_text() if path.is_file() else ""


def watched(samples: Tensor, terms: dict[str, float] | None = None, moved: float = 0.1) -> list[str]:
    watch = Watch(HealthConfig())
    watch.memory.reference = TEACHER
    return watch.look(500, samples, terms or {}, {"student": moved})[1]


def normal(count: int = 64) -> Tensor:
    return torch.randn(count, 100, generator=torch.Generator().manual_seed(0))


def test_statistics_of_a_known_law() -> None:
    """Of standard normal samples: distance a value sqrt(2), 0.27 % beyond three standard deviations."""
    seen = statistics(normal(500))
    assert seen["mean"] == pytest.approx(0, abs=0.02) and seen["std"] == pytest.approx(1, abs=0.01)
    assert seen["diversity"] == pytest.approx(2**0.5, rel=0.01)
    assert seen["saturation"] == pytest.approx(0.0027, rel=0.2)


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (normal() + 2, "drifted"),
        (0.2 * normal(), "washed out"),
        (3 * normal(), "over-saturated"),
        (normal(1).expand(64, -1) + 0.01 * normal(), "look alike"),
        (normal() * float("nan"), "not finite"),
    ],
)
def test_what_goes_wrong_is_said(samples: Tensor, said: str) -> None:
    assert any(said in warning for warning in watched(samples))


def test_healthy_samples_are_quiet() -> None:
    assert watched(normal(), {"student/fake_lag": -0.4, "student/grad_norm_student": 1.0}) == []
    assert any("does not follow" in w for w in watched(normal(), {"student/fake_lag": -3.0}))
    assert any("is not learning" in w for w in watched(normal(), moved=1e-9))
    assert any("forgets" in w for w in watched(normal(), moved=3.0))


def test_the_lag_of_a_row_does_not_depend_on_how_its_samples_are_divided(tmp_path: Path) -> None:
    """The same 64 samples in one update, or two a process in 16 updates of two processes, give one lag. The mean of
    quotients, one a batch, does not: some samples hardly tell the scores apart."""
    generator = torch.Generator().manual_seed(0)
    x0, fake, real = (torch.randn(64, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    real = fake + torch.logspace(-2, 0.5, 64, dtype=torch.float64)[:, None] * (real - fake)
    whole, divided = RunLog(tmp_path, 0, enabled=False), RunLog(tmp_path, 0, enabled=False)
    whole.add("student", signals.lag_terms(x0, fake, real))
    quotients = []
    for rows in torch.arange(64).split(4):
        halves = [signals.lag_terms(*(value[part] for value in (x0, fake, real))) for part in rows.split(2)]
        divided.add("student", {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]})
        quotients += [half["fake_error"] / half["score_gap"] for half in halves]
    lags = [log.means()["student/fake_lag"] for log in (whole, divided)]
    print(f"lag {lags[0]:.4f} and {lags[1]:.4f}, mean of quotients {torch.stack(quotients).mean():.2f}")
    assert lags[1] == pytest.approx(lags[0], rel=1e-6)
    assert abs(torch.stack(quotients).mean() - lags[0]) > 1
    d = fake - real
    assert lags[0] == pytest.approx((((x0 - fake) * d).sum() / d.square().sum()).item(), rel=1e-6)


def test_gradients_that_grow_are_said_after_some_looks() -> None:
    watch = Watch(HealthConfig())
    watch.memory.reference = TEACHER
    looks = [watch.look(500, normal(), {"student/grad_norm_student": norm}, {})[1] for norm in (1, 2, 1, 1, 100)]
    assert looks[:4] == [[], [], [], []] and "grown to 100 times" in looks[4][0]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, fit_once: None) -> Path:
    """80 updates with four looks, two of them after the grace."""
    looks = ["train.steps=80", "train.checkpoint_every=40", "health.every=20", "health.grace=40"]
    folder = tmp_path_factory.mktemp("healthy") / "run"
    return train(load_recipe(RING, [*SHORT, *looks, "backbone.fit_batch_size=128", f"output_dir={folder}"]))


@pytest.mark.slow
def test_a_healthy_run_is_quiet(healthy: Path) -> None:
    assert warnings_of(healthy) == ""
    looks = [row for row in map(json.loads, (healthy / "log.jsonl").open()) if "health/std" in row]
    assert [row["step"] for row in looks] == [20, 40, 60, 80]


def planted(folder: Path, *overrides: str) -> str:
    try:
        train(load_recipe(RING, [*SHORT, f"output_dir={folder}", *overrides]))
    except TrainingError as error:
        return warnings_of(folder) + str(error)
    return warnings_of(folder)


@pytest.mark.slow
def test_a_student_frozen_at_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its samples are nearly the origin, and its learning rate does nothing about it."""
    build = program.build

    def with_zero_student(*arguments: Any) -> program.TrainingRun:
        run = build(*arguments)
        run.networks.student.register_forward_hook(lambda _module, _inputs, x0: 1e-3 * x0)
        return run

    monkeypatch.setattr(program, "build", with_zero_student)
    fixed = ["optimizers.student.lr=1e-9", "optimizers.student.weight_decay=0", "train.steps=150"]
    said = planted(tmp_path / "run", *fixed)
    print(said)
    assert "look alike" in said and "washed out" in said


@pytest.mark.slow
def test_a_fake_score_that_does_not_update(tmp_path: Path) -> None:
    fixed = ["optimizers.fake_score.lr=1e-20", "optimizers.fake_score.weight_decay=0", "train.steps=100"]
    said = planted(tmp_path / "run", *fixed)
    print(said)
    assert "fake_score is not learning" in said


@pytest.mark.slow
def test_a_learning_rate_a_hundred_times_too_high(tmp_path: Path) -> None:
    usual = load_recipe(RING).optimizers["student"].lr
    said = planted(tmp_path / "run", f"optimizers.student.lr={100 * usual}", "train.steps=100")
    print(said)
    assert "lower optimizers.student.lr" in said


@pytest.mark.slow
def test_stopping_at_a_warning_and_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint from before the first warning survives rotation."""
    look = Watch.look
    monkeypatch.setattr(
        Watch,
        "look",
        lambda self, step, samples, *rest: look(self, step, samples + (1000.0 if step >= 80 else 0.0), *rest),
    )
    options = [
        *SHORT,
        "health.every=20",
        "health.grace=0",
        "train.checkpoint_every=20",
        "train.keep_checkpoints=1",
        "train.steps=160",
        f"output_dir={tmp_path / 'run'}",
    ]
    folder = train(load_recipe(RING, options))
    assert "drifted" in warnings_of(folder)
    assert [c.name for c in checkpoint.complete(folder / "checkpoints")] == ["step_00000060", "step_00000160"]
    with pytest.raises(TrainingError, match=r"health\.stop.*drifted"):
        train(load_recipe(RING, [*options, f"output_dir={tmp_path / 'stopped'}", "health.stop=true"]))


@pytest.mark.slow
def test_updates_that_are_not_finite_are_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three bad losses cost three updates and leave the weights finite; eleven in a row end the run."""
    loss, calls, bad = DMD2.loss, itertools.count(), {30, 31, 40}

    def sometimes_broken(*arguments: Any) -> Loss:
        whole = loss(*arguments)
        return Loss(whole.total * float("nan"), whole.terms) if next(calls) in bad else whole

    monkeypatch.setattr(DMD2, "loss", sometimes_broken)
    options = [*SHORT, "train.steps=20", "train.log_every=20", "train.accumulate=1", "objective.fake_updates=4"]
    folder = train(load_recipe(RING, [*options, f"output_dir={tmp_path / 'run'}"]))
    row = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    assert row["fake_score/skipped"] * 80 + row["student/skipped"] * 20 == pytest.approx(3)
    last = checkpoint.complete(folder / "checkpoints")[-1]
    assert all(v.isfinite().all() for file in last.glob("*.safetensors") for v in load_file(file).values())
    bad.update(range(200, 10**4))
    with pytest.raises(TrainingError, match="not finite in 11 updates in a row"):
        train(load_recipe(RING, [*options, "train.steps=60", f"output_dir={tmp_path / 'ended'}"]))
