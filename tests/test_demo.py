"""What stands behind the page of `fastgen demo`, and that the page can be built where gradio is installed."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fastgen.backbones.base import RoleOptions
from fastgen.cli import app
from fastgen.config import load_recipe
from fastgen.data.prompts import read_prompts
from fastgen.run.export import export
from fastgen.sampling import demo
from fastgen.sampling.demo import Drawn, Pair, draw_student, draw_teacher, load_pair, make_page, shown
from fastgen.sampling.sampler import load_sampler, teacher_sampler

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "assets/teachers/digits"
PROMPT = "a handwritten three"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose weights are not the teacher's."""
    folder = tmp_path_factory.mktemp("demo")
    recipe = load_recipe(ROOT / "recipes/digits_dmd2_4step.yaml", [f"output_dir={folder}/mine"])
    backbone = recipe.backbone.build(torch.device("cpu"), torch.float32, 0, RoleOptions())
    student = backbone.load("student")
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(1.01)
    export(student, backbone, recipe, folder / "export", 0)
    return folder


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    return load_pair(folder)


def test_both_sides_are_what_the_samplers_give(folder: Path, pair: Pair) -> None:
    left, right = draw_student(pair, PROMPT, 5, 4), draw_teacher(pair, PROMPT, 5, 3, 1.5)
    assert right is not None
    assert torch.equal(left.pixels, load_sampler(folder).sample([PROMPT], [5])[0])
    assert torch.equal(right.pixels, teacher_sampler(pair.backbone, 3, 1.5).sample([PROMPT], [5])[0])
    assert (left.steps, left.evaluations, right.steps, right.evaluations) == (4, 4, 3, 6)
    assert left.caption.startswith("4 steps, ") and right.caption.startswith("3 steps, 6 network evaluations, ")
    assert shown(left, None).shape == (256, 256, 3) and shown(None, None) is None
    assert shown(Drawn(torch.rand(3, 300, 200), 0.0, 1, 1), None).shape == (300, 200, 3)
    assert isinstance(pair.guidance, float) and pair.teacher_steps > 4
    assert pair.prompt == read_prompts(str(TEACHER / "prompts.txt"))[0]
    with pytest.raises(ValueError, match="distilled to 4 steps"):
        draw_student(pair, PROMPT, 5, 8)


def test_the_clock_starts_when_the_prompt_is_encoded(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding on a GPU goes on after the call has returned."""
    said, clock = list[str](), iter((1.0, 3.0))
    monkeypatch.setattr(demo, "synchronise", lambda device: said.append(f"{device} is done"))
    monkeypatch.setattr(demo.time, "perf_counter", lambda: said.append("clock") or next(clock))
    assert draw_student(pair, PROMPT, 5, 4).seconds == 2 and said == ["cpu is done", "clock", "clock"]


def test_a_pipeline_that_was_not_distilled_stands_alone() -> None:
    alone = load_pair(TEACHER)
    assert alone.prompt == read_prompts(str(TEACHER / "prompts.txt"))[0]
    assert alone.teacher is None and draw_teacher(alone, PROMPT, 0, 2, 1.0) is None
    assert [draw_student(alone, PROMPT, 5, 3, scale).evaluations for scale in (None, 2.0)] == [3, 6]


def test_a_video_is_shown_as_a_file() -> None:
    path = Path(shown(Drawn(torch.rand(5, 3, 32, 32), 0.0, 1, 1), 8))
    assert path.suffix == ".mp4" and path.stat().st_size > 100
    path.unlink()


def test_captions() -> None:
    assert Drawn(torch.zeros(3, 1, 1), 1.234, 1, 1).caption == "1 step, 1.23 s"


def test_without_gradio_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match="fastgen-distill"):
        make_page(pair, "digits")
    monkeypatch.delitem(sys.modules, "gradio")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "gradio" else object())
    result = CliRunner().invoke(app, ["demo", str(TEACHER)])
    assert result.exit_code == 2 and "needs the package gradio" in result.stderr


def test_the_page_calls_both_sides_and_says_what_is_wrong(pair: Pair) -> None:
    gradio: Any = pytest.importorskip("gradio")
    page = make_page(pair, "digits")
    (compare,) = [f.fn for f in page.fns.values()]
    first, last = compare(PROMPT, 5, 4, 3, 1.5)
    assert first[2] is None and last[2].shape == (256, 256, 3)
    assert (last[0] == shown(draw_student(pair, PROMPT, 5, 4), None)).all()
    with pytest.raises(gradio.Error, match="distilled to 4 steps"):
        list(compare(PROMPT, 5, 8, 3, 1.5))


def test_a_pipeline_is_called_as_its_card_recommends() -> None:
    """Until another guidance is asked for."""
    emoji = load_pair(ROOT / "assets/emoji/teacher")
    assert emoji.guidance == 2.0 and emoji.prompt == read_prompts("assets/emoji/prompts.txt")[0]
    usual, other = (draw_student(emoji, emoji.prompt, 0, 2, guidance) for guidance in (None, 1.0))
    expected = [teacher_sampler(emoji.backbone, 2, g).sample([emoji.prompt], [0])[0] for g in (2.0, 1.0)]
    assert torch.equal(usual.pixels, expected[0]) and torch.equal(other.pixels, expected[1])


@pytest.mark.slow
def test_a_video_pipeline_is_shown_at_the_size_that_it_knows() -> None:
    videos = load_pair(ROOT / "assets/teachers/moving_digits")
    assert (videos.student.policy.num_steps, videos.guidance) == (25, 4.0)
    assert draw_student(videos, videos.prompt, 0, 2).pixels.shape == (25, 3, 32, 32)


def test_a_teacher_that_was_measured_at_few_steps_alone_is_shown_as_its_card_recommends(tmp_path: Path) -> None:
    changes = [f"output_dir={tmp_path}/mine", "eval.teacher_steps=[4]"]
    recipe = load_recipe(ROOT / "recipes/digits_dmd2_4step.yaml", changes)
    backbone = recipe.backbone.build(torch.device("cpu"), torch.float32, 0, RoleOptions())
    export(backbone.load("student"), backbone, recipe, tmp_path / "export", 0)
    assert load_pair(tmp_path).teacher_steps == 50


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="one step at least, got num_steps 0"):
        load_sampler(TEACHER, num_steps=0)
