"""The page of an evaluation: pictures by prompt and seed, bars, curves, and what it keeps of other pages."""

import io
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from fastgen.config import load_recipe
from fastgen.evaluation import charts, report
from fastgen.evaluation.beside import PICTURES, training_curves
from fastgen.evaluation.charts import TEACHER
from fastgen.evaluation.folders import VIEWED, evaluate_path
from fastgen.evaluation.results import compare, write_page
from fastgen.train import train

ROWS = [
    {"name": "student", "metrics": {"fid": 1.5, "accuracy": 0.9, "fid_floor": 1.0, "num_samples": 8}, "seed": 4},
    {"name": "<teacher>", "metrics": {"fid": 3.0, "accuracy": 1.0}, "seed": 4},
]


def page_of(tmp_path: Path, rows: list, samples: dict[str, Tensor], prompts: list[str]) -> str:
    path = tmp_path / "page.html"
    report.write_report(path, rows, report.draw_pictures(samples, dict.fromkeys(samples, prompts)))
    return path.read_text()


def test_student_and_teacher_stand_beside_each_other_by_prompt_and_seed(tmp_path: Path) -> None:
    samples = {name: torch.rand(3, 3, 32, 32) for name in ("student", "<teacher>")}
    page = page_of(tmp_path, ROWS, samples, ["a <two>", "a three", "a three"])
    groups = page.split('<div class="sample">')[1:]
    assert len(groups) == 3 and 'style="--results:2"' in page and 'class="samples"' in page
    for i, (group, prompt) in enumerate(zip(groups, ("a &lt;two&gt;", "a three", "a three"), strict=True)):
        assert f"<p>{prompt} <small>seed {4 + i}</small></p>" in group
        assert re.findall(r'data-result="([^"]*)" data-index="(\d)"', group) == [
            ("student", str(i)),
            ("&lt;teacher&gt;", str(i)),
        ]
    kept = report.pictures_in(tmp_path / "page.html", ["student"])
    assert [p.index for p in kept] == [0, 1, 2] and kept[0].prompt == "a <two>" and kept[0].kind == "pixels"
    stored = Image.open(io.BytesIO(kept[0].data))
    assert stored.size == (32, 32)  # without a frame and without loss
    expected = (samples["student"][0] * 255).round().byte().permute(1, 2, 0)
    assert stored.tobytes() == bytes(expected.flatten().tolist())


def test_samples_without_a_counterpart_come_last_and_closer_together(tmp_path: Path) -> None:
    """A teacher makes the first of a student's samples alone: a column for each result, then a single one."""
    prompts, seen = ["a", "b", "c"], {"student": torch.rand(3, 3, 32, 32), "teacher": torch.rand(1, 3, 32, 32)}
    report.write_report(tmp_path / "p.html", ROWS, report.draw_pictures(seen, dict.fromkeys(seen, prompts)))
    both, alone = (tmp_path / "p.html").read_text().split('<div class="samples"')[1:]
    assert both.startswith(' style="--results:2"') and both.count('<div class="sample">') == 1
    assert alone.startswith(' style="--results:1"') and re.findall(r'alt="(\w)"', alone) == ["b", "c"]


def test_steps_have_a_section_of_their_own_which_a_comparison_keeps(tmp_path: Path) -> None:
    row, kept = ROWS[0], torch.rand(3, 3, 32, 32)
    (tmp_path / "one.json").write_text(json.dumps(row))
    write_page(
        tmp_path / "one.html", [row], {"student": kept}, {"student": ["a", "b", "<c>"]}, torch.rand(4, 2, 3, 32, 32)
    )
    page = (tmp_path / "one.html").read_text()
    samples, steps = page.split("<h2>From noise to the sample</h2>")
    assert samples.count('<div class="sample">') == 3 and 'class="steps"' not in samples
    assert re.findall(r"<figcaption>(.*?)</figcaption>", steps) == ["a (student)", "b (student)"]
    first = next(p for p in report.pictures_in(tmp_path / "one.html", ["student"]) if p.kind == report.STEPS)
    width, height = Image.open(io.BytesIO(first.data)).size
    assert width > 4 * 32 > height
    compare([tmp_path / "one.json"], tmp_path / "both.html")
    assert (tmp_path / "both.html").read_text().count('class="steps"') == 2


def test_other_seeds_and_other_prompts_are_no_pairs(tmp_path: Path) -> None:
    rows = [ROWS[0], ROWS[1] | {"seed": 5}]
    page = page_of(tmp_path, rows, {row["name"]: torch.rand(1, 3, 32, 32) for row in rows}, ["a two"])
    assert "<small>" not in page and "differ in seed" in page
    pictures = report.draw_pictures({"a": torch.rand(1, 3, 32, 32), "b": torch.rand(1, 3, 32, 32)}, {"a": ["x"]})
    assert report.samples([], pictures).count('<div class="sample">') == 2


def test_large_pictures_are_large_enough_and_the_file_is_not(tmp_path: Path) -> None:
    noise = torch.nn.functional.interpolate(torch.rand(1, 3, 16, 24), size=(1024, 1536), mode="bicubic").clamp(0, 1)
    (picture,) = report.draw_pictures({"student": noise}, {"student": ["a cat"]})
    assert picture.kind == "image" and picture.type == "jpeg" and len(picture.data) < 100_000
    assert Image.open(io.BytesIO(picture.data)).size == (512, 341)
    (strip,) = report.draw_pictures({"student": torch.rand(1, 3, 3, 64, 64)}, {"student": ["a cat"]})
    assert strip.kind == "frames" and Image.open(io.BytesIO(strip.data)).size == (3 * 66 + 2, 64 + 4)
    assert 'class="samples strips"' in report.samples([], [strip])


def test_bars_compare_and_the_best_is_marked() -> None:
    shown = charts.bars(ROWS)
    assert shown.count('class="panel"') == 2 and "num_samples" not in shown
    fid, accuracy = shown.split("<h3>")[1:3]
    assert fid.startswith("fid\N{NO-BREAK SPACE}↓") and 'class="best"><span>student' in fid and "width:50.0%" in fid
    assert 'class="floor" style="left:33.3%"' in fid and 'class="best"><span>&lt;teacher&gt;' in accuracy
    assert charts.bars(ROWS[:1]) == "" and 'class="best"' not in charts.bars([ROWS[0], ROWS[0]])


def test_curves_go_through_their_points(tmp_path: Path) -> None:
    rows = [ROWS[0] | {"curves": {"fid": [(0, 3.0), (50, 2.0), (100, 1.0)], "nonsense": [(0, 1.0)]}}]
    shown = charts.curves(rows)
    (points,) = re.findall(r'polyline points="([^"]*)"', shown)
    (x0, y0), (x1, y1), (x2, y2) = [map(float, point.split(",")) for point in points.split()]
    assert x0 == charts.LEFT and x2 == charts.WIDTH - charts.RIGHT and x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y0 == charts.TOP and y2 == charts.HEIGHT - charts.BOTTOM and y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert "nonsense" not in shown and "100 updates" in shown and charts.curves(ROWS) == ""
    assert "During training" in page_of(tmp_path, rows, {}, [])
    charts.curves([ROWS[0] | {"curves": {"fid": [(0, 2.0), (10, float("nan"))]}}])  # one point, and one that is none


def test_the_last_value_of_an_update_counts(tmp_path: Path) -> None:
    lines = [
        {"step": 5, "eval/fid": 3.0},
        {"step": 10, "eval/fid": 2.0, "student/loss": 1.0},
        {"step": 5, "eval/fid": 4},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert training_curves(tmp_path) == {"fid": [(5, 4), (10, 2.0)]}
    assert training_curves(tmp_path / "nowhere") == {}


@pytest.mark.slow
def test_the_page_of_a_run_has_its_teacher_and_its_curve_and_a_comparison_keeps_them(
    tmp_path: Path, project: Path
) -> None:
    changes = ["train.steps=2", "train.batch_size=4", "train.eval_every=1", "eval.quick_num_samples=50"]
    recipe = load_recipe(project / "recipes/digits_quickstart.yaml", [f"output_dir={tmp_path / 'run'}", *changes])
    run = train(recipe)
    output = tmp_path / "results.json"
    result = evaluate_path(run, output=output, num_samples=50, progress=False)
    assert [step for step, _ in result["curves"]["fid"]] == [1, 2]
    page, teacher = output.with_suffix(".html").read_text(), f"{TEACHER}, 4 steps"
    assert page.count(f'data-result="{teacher}"') == PICTURES and page.count('data-result="run"') == 50 + VIEWED
    assert "During training" in page
    compare([output, output], tmp_path / "both.html")
    both = (tmp_path / "both.html").read_text()
    assert both.count(f'data-result="{teacher}"') == PICTURES  # once, though both have it
    assert both.count("<img") == PICTURES + 50 + VIEWED and "During training" in both
