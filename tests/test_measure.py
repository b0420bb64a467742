"""Evaluations that are interrupted and continued, with the scorers, and `fastgen score`."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_scorers as tiny
import torch
from rich.console import Console
from test_evaluation import CopyingSampler, mixture_teacher
from torch import Tensor
from torchvision.utils import save_image
from typer.testing import CliRunner

from fastgen.cli import app
from fastgen.data import read_prompts
from fastgen.data.digits import load_digits
from fastgen.evaluation import evaluate as evaluation
from fastgen.evaluation import folders
from fastgen.evaluation.config import scorer_keys
from fastgen.evaluation.evaluate import image_prompts
from fastgen.evaluation.scoring import score_folder, score_table
from fastgen.metrics.features import check_inception
from fastgen.metrics.reference import given_files, in_order, sample_files
from fastgen.recipe import EvalConfig

torch.set_num_threads(1)

PIXEL_METRICS = ("fid", "accuracy", "diversity", "precision_recall", "throughput", "digit_stroke")
POINT_METRICS = ("energy_distance", "mean_error", "cov_error", "mode_share_error")


@pytest.fixture(scope="module")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("scorers")
    clip = str(tiny.tiny_clip_score(root / "clip"))
    return {
        "clip_score": {"path": clip},
        "pickscore": {"path": clip},
        "aesthetic": {"path": str(tiny.tiny_aesthetic(root / "aesthetic")), "clip": clip},
    }


class InterruptedSampler(CopyingSampler):
    """Gets SIGINT while it makes its third batch; once."""

    calls = 0

    def sample(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        InterruptedSampler.calls += 1
        if InterruptedSampler.calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return super().sample(prompts, seeds)


def without_speed(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"metrics": {k: v for k, v in row["metrics"].items() if k != "images_per_second"}}


def test_an_interrupted_evaluation_continues_to_the_same_bits(
    scorers: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """After the batch in which the signal came; every metric of pictures restores what it had gathered."""
    InterruptedSampler.calls, partial = 0, tmp_path / "results.partial.safetensors"
    options: dict[str, Any] = {
        "metrics": (*PIXEL_METRICS, "clip_score"),
        "scorers": scorers,
        "num_samples": 100,
        "reference": "digits",
        "batch_size": 16,
    }
    config = EvalConfig(**options)
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate_with_samples(InterruptedSampler(), config, False, partial)  # type: ignore[arg-type]
    assert InterruptedSampler.calls == 3 and partial.is_file()
    before = signal.getsignal(signal.SIGINT)
    continued, kept = evaluation.evaluate_with_samples(InterruptedSampler(), config, False, partial)  # type: ignore[arg-type]
    assert InterruptedSampler.calls == 3 + 3 + 4 and signal.getsignal(signal.SIGINT) == before
    whole, first = evaluation.evaluate_with_samples(CopyingSampler(), config, False)  # type: ignore[arg-type]
    assert without_speed(continued) == without_speed(whole) and torch.equal(kept, first) and len(kept) == 64
    with pytest.raises(
        ValueError, match="belongs to another evaluation, which differs in seed, prompts_sha256; remove it"
    ):
        other = EvalConfig(**options, seed=1)
        evaluation.evaluate_with_samples(CopyingSampler(), other, False, partial)  # type: ignore[arg-type]
    partial.write_bytes(b"half a file")
    with pytest.raises(ValueError, match="cannot be read; remove it"):
        evaluation.evaluate_with_samples(CopyingSampler(), config, False, partial)  # type: ignore[arg-type]


def test_metrics_of_points_continue_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, partial = mixture_teacher(4), tmp_path / "partial.safetensors"
    config = EvalConfig(metrics=POINT_METRICS, num_samples=400, batch_size=100)
    whole = evaluation.evaluate_with_samples(sampler, config, False)[0]
    sample, calls = sampler.sample, list[int]()

    def interrupted(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        calls.append(len(prompts))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(prompts, seeds)

    monkeypatch.setattr(sampler, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate_with_samples(sampler, config, False, partial)
    assert evaluation.evaluate_with_samples(sampler, config, False, partial)[0] == whole


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, pixels = tmp_path_factory.mktemp("pictures"), load_digits("test")[0]
    for i in range(12):
        save_image(pixels[i], folder / f"{i:03}.png")
    return folder


def test_scorers_are_metrics_and_the_file_is_the_same_to_the_bit(
    scorers: dict[str, dict[str, Any]], pictures: Path, tmp_path: Path
) -> None:
    """Two runs of the command write equal bytes, with hashes of the weights and the prompts; FID beside them."""
    options = [f"{name}.{key}={value}" for name, keys in scorers.items() for key, value in keys.items()]
    (prompts := tmp_path / "prompts.txt").write_text("".join(f"{line}\n" for line in read_prompts("neutral")[:12]))
    arguments = ["eval", str(pictures), "--metrics", "fid,clip_score,pickscore,aesthetic", "--prompts", str(prompts)]
    arguments += [part for option in options for part in ("--scorer", option)] + ["--batch-size", "5"]
    for name in ("a", "b"):
        found = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / f"{name}.json")])
        assert found.exit_code == 0, found.output
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    names = ["a.html", "a.json", "b.html", "b.json", "prompts.txt"]
    assert sorted(f.name for f in tmp_path.iterdir()) == names
    result = json.loads((tmp_path / "a.json").read_text())
    assert set(result["metrics"]) == {
        "fid",
        "fid_num_samples",
        "clip_score",
        "clip_score_std",
        "pickscore",
        "pickscore_std",
        "aesthetic",
        "aesthetic_std",
    }
    scale = result["metrics"]["pickscore"] / result["metrics"]["clip_score"]
    assert scale == pytest.approx(14.2857, rel=1e-3)  # exp of the tiny checkpoint's logit_scale
    assert len(result["scorers"]["aesthetic"]["weights"]["model.safetensors"]) == 64
    assert "bicubic" in result["scorers"]["clip_score"]["input_size"] and result["threads"] == 1


def test_what_is_wrong_with_an_evaluation_is_said_before_weights_load(
    scorers: dict[str, dict[str, Any]], pictures: Path, tmp_path: Path
) -> None:
    for options, words in (
        ({"metrics": "clip_score"}, r"scorers\.clip_score\.path: required but not given"),
        ({"metrics": "clip_score", "scorers": {"clip_scor": {}}}, "did you mean 'clip_score'"),
        ({"metrics": "fid", "scorers": {"hpsv2": {"pat": "a/b"}}}, r"scorers\.hpsv2\.pat"),
        ({"metrics": "clip_score", "scorers": {"clip_score": {"path": "nowhere/at/all"}}}, "neither a local folder"),
        ({"metrics": "clip_score", "scorers": scorers}, "has no captions"),
        *(
            ({"metrics": f"fid,{name}", "features": "clip", "clip": scorers["clip_score"]["path"]}, "has no captions")
            for name in ("clip_retrieval", "diversity", "accuracy", "digit_class")
        ),
        ({"metrics": "motion", "scorers": {"motion": {"path": "a/b"}}, "prompts": ("a cat",)}, "measures frames"),
        ({"metrics": "accuracy", "prompts": ("a two", "a six")}, "prompts has 2 prompts for 12 images"),
        ({"metrics": "accuracy", "prompts": "neutral", "num_samples": 6}, "neutral has 64 prompts for 12 images"),
        ({"metrics": "fid", "features": "inception", "inception_weights": "nowhere.pth"}, "there is no file"),
    ):
        with pytest.raises(ValueError, match=words):
            folders.evaluate_path(pictures, progress=False, **options)
    for text in ("clip_score", "=x", "clip_score="):
        with pytest.raises(ValueError, match="write NAME=PATH"):
            scorer_keys([text])
    assert scorer_keys(["hpsv2=a/b", "hpsv2.version=v2", "motion.scale=0.1"]) == {
        "hpsv2": {"path": "a/b", "version": "v2"},
        "motion": {"scale": 0.1},
    }
    with pytest.raises(ValueError, match=r"torch-fidelity|there is no file"):
        check_inception("nowhere/at.pth")


def test_pictures_of_a_folder_have_a_prompt_each_or_one_for_all(pictures: Path) -> None:
    """Also where fewer are measured: a picture keeps its own."""
    files = sample_files(pictures)
    for prompts in (tuple(f"picture {i}" for i in range(12)), ("one for all",)):
        config = EvalConfig(metrics=("accuracy",), num_samples=5, prompts=prompts)
        assert image_prompts(files, config) == [prompts[min(i, len(prompts) - 1)] for i in config.rows(12)]


def test_files_whose_names_are_numbers_are_in_the_order_of_the_numbers(tmp_path: Path) -> None:
    """As a file of prompts has them; overviews of `fastgen sample` are no samples."""
    for name in ("0", "2", "10", "1", "grid", "views"):
        save_image(torch.rand(3, 4, 4), tmp_path / f"{name}.png")
    for read in (sample_files, lambda folder: given_files(str(folder))):
        assert [file.stem for file in read(tmp_path)] == ["0", "1", "2", "10"]
    save_image(torch.rand(3, 4, 4), tmp_path / "a.png")
    assert [file.stem for file in sample_files(tmp_path)] == ["0", "1", "10", "2", "a"]
    for ending in ("mp4", "sound.safetensors"):
        assert in_order([Path(f"{i}.{ending}") for i in (10, 9)]) == [Path(f"{i}.{ending}") for i in (9, 10)]


def test_the_neutral_prompts_ship() -> None:
    prompts = read_prompts("neutral")
    assert len(prompts) == len(set(prompts)) == 64 and all(prompt == prompt.strip() for prompt in prompts)


def test_score_gives_each_picture_its_numbers(
    scorers: dict[str, dict[str, Any]], pictures: Path, tmp_path: Path
) -> None:
    """Pictures of two sizes; a row each, equal to the reward of the picture alone; means; a table; refusals."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i in range(5):
        save_image(torch.rand(3, 40, 40 if i < 2 else 64), folder / f"{i}.png")
    (tmp_path / "prompts.txt").write_text("\n".join(f"picture {i}" for i in range(5)))
    names, keys = ["clip_score", "digit_stroke"], {"clip_score": scorers["clip_score"]}
    arguments = ["score", str(folder), "--metrics", ",".join(names), "--prompts", str(tmp_path / "prompts.txt")]
    arguments += ["--scorer", f"clip_score={scorers['clip_score']['path']}", "--output", str(tmp_path / "s.json")]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    result = json.loads((tmp_path / "s.json").read_text())
    rows = result["images"]
    assert [row["file"] for row in rows] == [f"{i}.png" for i in range(5)] and rows[3]["prompt"] == "picture 3"
    alone = score_folder(folder, names, keys, str(tmp_path / "prompts.txt"), batch_size=1, progress=False)
    for one, other in zip(rows, alone["images"], strict=True):
        assert one["clip_score"] == pytest.approx(other["clip_score"], abs=1e-5)
    assert result["means"]["clip_score"] == pytest.approx(sum(r["clip_score"] for r in rows) / 5)
    console = Console(width=120, record=True, quiet=False)
    console.print(score_table(result))
    assert "picture 3" in (text := console.export_text()) and "mean" in text
    (tmp_path / "two.txt").write_text("a\nb\n")
    for wrong, words in (
        ((names, keys, str(tmp_path / "two.txt")), "has 2 prompts for 5 images"),
        ((names, keys, None), "has no captions"),
        ((["clip_scor"], {}, None), "there is no scorer clip_scor"),
        ((["digit_stroke"], keys, None), "it is not among the metrics"),
        ((["clip_score"], {}, None), "clip_score.path"),
        ((["motion"], {"motion": {"path": "a/b"}}, None), "reads frames, but a folder contains pictures"),
    ):
        with pytest.raises(ValueError, match=words):
            score_folder(folder, *wrong, progress=False)  # type: ignore[arg-type]
