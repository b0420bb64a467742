"""`fastgen stream` on a tiny real pipeline: the file, the report, prompts on the way, refusals, interruptions."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import imageio.v3
import pytest
import torch
from fresh import RunFresh
from tiny_wan import tiny_wan
from torch import Tensor
from typer.testing import CliRunner

from fastgen.backbones.wan import WanConfig
from fastgen.cli import app
from fastgen.config.stored import to_dict
from fastgen.pipelines.streaming import StreamingWanPipeline
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.sampler import METADATA
from fastgen.sampling.speed import STAGES, Speed
from fastgen.sampling.stream import check_changes, parse_change
from fastgen.sampling.video import video_writer
from fastgen.streaming.schedule import ChunkSchedule
from fastgen.streaming.stream import Stream

ROOT = Path(__file__).parents[1]
POLICY = RolloutPolicy((1.0, 0.6), chunks=ChunkSchedule(frames=2, first=1, window=5, sink=1))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the export of a student that streams."""
    root = tmp_path_factory.mktemp("stream")
    teacher = tiny_wan(root / "teacher", layers=2, time_scale=1e-3)
    config = WanConfig(path=str(teacher), height=32, width=32, num_frames=17, max_sequence_length=16)
    backbone = config.build(torch.device("cpu"), torch.float32, 0)
    backbone.save_pipeline(backbone.load("student"), POLICY, root / "run/export")
    metadata = {"lora": False, "backbone": to_dict(config), "policy": to_dict(POLICY)}
    (root / "run/export" / METADATA).write_text(json.dumps(metadata))
    return root / "run"


def stream(folder: Path, *arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["stream", str(folder), *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def pictures_in(path: Path) -> Tensor:
    return torch.from_numpy(imageio.v3.imread(path)).permute(0, 3, 1, 2) / 255


def test_a_video_and_its_report(run_folder: Path, tmp_path: Path) -> None:
    """The pictures are those of the pipeline, cut at the last second; the prompt changes with the first chunk that
    begins at its time or later, with the context computed again."""
    output, report = tmp_path / "videos/out.mp4", tmp_path / "speed.json"
    changed = ["--at", "0.6:a blue dog", "--recache"]
    status, text, _ = stream(
        run_folder,
        "--prompt",
        "a cat runs",
        "--seconds",
        2,
        "--seed",
        3,
        *changed,
        "--output",
        output,
        "--report",
        report,
    )
    assert status == 0
    print(text)
    for words in (
        "first pictures after",
        "95th percentile",
        "with the commit",
        "resident",
        f"32 pictures in {output}",
    ):
        assert words in text
    measured = json.loads(report.read_text())
    fps = measured["fps"]
    assert fps["denoise"] > fps["with_commit"] > fps["with_vae"] > fps["with_file"] > 0
    assert measured["chunks"] == 5 and measured["pictures"] == 32 and measured["pictures_per_chunk"] == 8
    assert measured["chunk_seconds"]["median"] <= measured["chunk_seconds"]["p95"]
    assert 0 < measured["text_seconds"] < measured["first_picture_seconds"] and measured["peak_bytes"] > 1e8
    assert (measured["window"], measured["sink"], measured["steps"], measured["video_fps"]) == (5, 1, 2, 16)

    expected = StreamingWanPipeline.from_pretrained(run_folder / "export").stream("a cat runs", seed=3)
    parts = [next(expected) for _ in range(3)]  # 1 + 8 + 8 pictures: a fourth chunk begins at 17 / 16 s
    assert 9 / 16 < 0.6 <= 17 / 16
    expected.prompt = "a blue dog"
    expected.recache()
    parts += [next(expected) for _ in range(2)]
    wanted = torch.cat(parts)[:32]
    written = pictures_in(output)
    assert written.shape == wanted.shape
    error = (written - wanted).abs().mean(dim=(1, 2, 3))
    print(f"mean error of the mp4 by picture: at most {error.max():.2g}")
    assert error.max() < 0.05  # H.264 halves the resolution of colour
    assert (imageio.v3.immeta(output)["fps"], imageio.v3.immeta(output)["codec"]) == (16, "h264")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--window", 9], "trained with a window of 5 latent frames and a sink of 1"),
        (["--num-steps", 3], "distilled to 2 steps, and 3 are asked for"),
        (["--first-steps", 3], "only a flow map takes others"),
        (["--window", 2, "--force"], "set window to at least 3"),
        (["--at", "12:a dog"], "12 seconds is not before the end of a video of 2 seconds"),
        (["--at", "1:a dog", "--at", "1:a cat"], "must increase"),
        (["--at", "0:a dog"], "above 0"),
        (["--at", "a dog"], "SECONDS:PROMPT"),
        (["--at", "nan:a dog"], "SECONDS:PROMPT"),
        (["--at", "1:"], "SECONDS:PROMPT"),
        (["--output", "out.gif"], "must end in .mp4"),
        (["--device", "cuda"], "no GPU"),
        (["--device", "gpu"], "cpu, cuda or cuda:N"),
    ],
)
def test_refusals(arguments: list[object], words: str, run_folder: Path, tmp_path: Path) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    status, text, error = stream(run_folder, "--prompt", "a cat", "--seconds", 2, *arguments)
    assert status == 2 and words in error and not text


def test_what_does_not_stream_is_refused(run_folder: Path, tmp_path: Path) -> None:
    def refusal(folder: Path, *more: object) -> str:
        status, _, error = stream(folder, "--prompt", "a cat", "--seconds", 1, "--output", tmp_path / "out.mp4", *more)
        assert status == 2
        return error

    def other(**changes: Any) -> Path:
        metadata = json.loads((run_folder / "export/fastgen.json").read_text())
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other/fastgen.json").write_text(json.dumps(metadata | changes))
        return tmp_path / "other"

    policy = json.loads((run_folder / "export/fastgen.json").read_text())["policy"]
    assert "neither a run nor an export" in refusal(tmp_path)
    assert "does not stream: it makes samples whole" in refusal(other(policy=policy | {"chunks": None}))
    assert "no pictures to stream" in refusal(other())
    (tmp_path / "other/model_index.json").write_text('{"_class_name": "WanPipeline"}')
    assert "holds a WanPipeline" in refusal(tmp_path / "other")
    averaged = policy["chunks"] | {"first": None, "sink": 2, "window": 6, "sink_decay": 0.5}
    (tmp_path / "other/model_index.json").write_text('{"_class_name": "StreamingWanPipeline"}')
    assert "--recache" in refusal(other(policy=policy | {"chunks": averaged}), "--recache")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text("")
    assert "fastgen export" in refusal(tmp_path / "run")
    (tmp_path / "out.mp4").write_text("mine")
    assert "give --overwrite" in refusal(run_folder) and (tmp_path / "out.mp4").read_text() == "mine"
    assert "is a folder" in refusal(run_folder, "--overwrite", "--report", tmp_path)
    assert "are both" in refusal(run_folder, "--overwrite", "--report", tmp_path / "out.mp4")


def test_a_video_is_replaced_only_when_there_are_pictures(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that hold NaN make none."""
    output = tmp_path / "out.mp4"
    output.write_bytes(b"an earlier video")
    arguments = ["--prompt", "a cat", "--seconds", 1, "--output", output, "--overwrite"]
    with monkeypatch.context() as patch:
        patch.setattr(Stream, "decode", lambda self, latents: torch.full((1, 3, 32, 32), float("nan")))
        status, _, error = stream(run_folder, *arguments)
    assert status == 2 and "not finite" in error
    assert output.read_bytes() == b"an earlier video" and list(tmp_path.iterdir()) == [output]


@pytest.mark.slow
def test_a_refusal_imports_nothing_heavy(run_folder: Path, tmp_path: Path, run_fresh: RunFresh) -> None:
    from test_cli import SLOW_TO_IMPORT

    program = (
        "import sys\nfrom fastgen.cli import main\n"
        f"sys.argv = ['fastgen', 'stream', {str(run_folder)!r}, '--prompt', 'a', '--seconds', '1', '--window', '9']\n"
        "try:\n    main()\nexcept SystemExit as error:\n    assert error.code == 2, error.code\n"
        f"print(sorted(set({SLOW_TO_IMPORT}) & set(sys.modules)))"
    )
    done = run_fresh(program, tmp_path)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_times_and_texts_of_prompts() -> None:
    assert parse_change('12:a fox: "red"') == (12.0, 'a fox: "red"')
    assert parse_change("0.5: a fox ") == (0.5, " a fox ")
    check_changes([(1, "a"), (2, "b")], 2.5)
    with pytest.raises(ValueError, match="above 0"):
        check_changes([(-1, "a")], 2)


def test_numbers_of_a_report() -> None:
    speed = Speed()
    speed.add(9, [0.0, 0.0, 9.0, 9.0, 9.0])  # the first chunk does not count
    for i in range(20):
        speed.add(12, [0.1, 5.0 if i == 3 else 0.0, 0.4 + (i == 19), 0.2, 0.3])
    report = speed.report()
    assert STAGES == ("commit", "prompt", "denoise", "vae", "file")
    assert report["chunks"] == 21 and report["pictures_per_chunk"] == 12
    assert report["chunk_seconds"] == pytest.approx({"median": 1.0, "p95": 2.0})
    assert report["stage_seconds"] == pytest.approx({"denoise": 0.4, "commit": 0.1, "vae": 0.2, "file": 0.3})
    expected = {"denoise": 240 / 9, "with_commit": 240 / 11, "with_vae": 240 / 15, "with_file": 240 / 21}
    assert report["fps"] == pytest.approx(expected)
    alone = Speed()
    alone.add(9, [0.0, 0.0, 1.0, 1.0, 1.0])
    assert alone.report()["fps"]["with_file"] == 3.0


def test_the_file_grows_picture_by_picture(tmp_path: Path) -> None:
    """While it is written, what is there can be played."""
    frames, path = torch.rand(90, 3, 64, 64, generator=torch.Generator().manual_seed(0)), tmp_path / "out.mp4"
    sizes = [0]
    with video_writer(path, 10, playable=True) as append:
        for part in frames.split(30):
            append(part)
            deadline = time.monotonic() + 300
            while not (path.is_file() and path.stat().st_size > sizes[-1] + 1000) and time.monotonic() < deadline:
                time.sleep(0.05)  # ffmpeg works on its own
            sizes.append(path.stat().st_size)
        partial = len(pictures_in(path))
    print(f"sizes {sizes}; {partial} of 90 pictures can be played before the end")
    assert all(b > a + 1000 for a, b in pairwise(sizes)) and 60 < partial <= 90
    assert len(pictures_in(path)) == 90


def test_a_flow_map_streams_with_the_steps_that_are_asked_for(tmp_path: Path) -> None:
    teacher = tiny_wan(tmp_path / "teacher", layers=2, time_scale=1e-3)
    config = WanConfig(path=str(teacher), height=32, width=32, num_frames=17, max_sequence_length=16)
    backbone: Any = config.build(torch.device("cpu"), torch.float32, 0)
    policy = replace(POLICY, transition="ode", two_time=True)
    student = backbone.load("student")
    student.add_inputs({}, backbone.time_dim, policy.inputs)
    backbone.save_pipeline(student, policy, tmp_path / "export")
    metadata = {"lora": False, "backbone": to_dict(config), "policy": to_dict(policy)}
    (tmp_path / "export" / METADATA).write_text(json.dumps(metadata))
    for number, steps in enumerate((2, 3)):
        report = tmp_path / f"{number}.json"
        output = ["--output", tmp_path / f"{number}.mp4", "--report", report]
        several = ["--num-steps", steps, "--first-steps", 4]
        assert stream(tmp_path / "export", "--prompt", "a cat", "--seconds", 1, *output, *several)[0] == 0
        assert json.loads(report.read_text())["steps"] == steps


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_video_can_be_played(how: signal.Signals, run_folder: Path, tmp_path: Path) -> None:
    """Ctrl-C ends it with its report and exit code 130."""
    output, report = tmp_path / "out.mp4", tmp_path / "speed.json"
    arguments = ["--prompt", "a cat", "--seconds", "100000", "--output", str(output), "--report", str(report)]
    command = [sys.executable, "-m", "fastgen", "stream", str(run_folder), *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while (not output.is_file() or output.stat().st_size < 20_000) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    os.kill(process.pid, how)
    text, _ = process.communicate(timeout=120)
    pictures = pictures_in(output)
    print(f"{len(pictures)} pictures after {how.name}")
    assert len(pictures) >= 16
    if how == signal.SIGINT:
        assert process.returncode == 130 and f"{len(pictures)} pictures in" in text
        assert json.loads(report.read_text())["interrupted"]
