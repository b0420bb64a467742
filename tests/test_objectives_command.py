"""`fastgen objectives`: the table of all objectives, made from their classes, and a page for each."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastgen.cli import app
from fastgen.objectives.dmd2 import DMD2
from fastgen.objectives.phased_dmd import PhasedDMD
from fastgen.registry import OBJECTIVES, imported
from fastgen.run.terminal import console, print_table
from fastgen.starting.objectives import COLUMNS, Summary, as_rows, as_table, summary
from fastgen.starting.pages import field_comments, keys, text_page


@pytest.fixture(scope="module")
def rows() -> dict[str, Summary]:
    return {name: summary(name) for name in OBJECTIVES}


@pytest.mark.slow
def test_every_objective_fills_every_column(rows: dict[str, Summary]) -> None:
    for row in as_rows(list(rows.values())):
        print(row)
        assert len(row) == len(COLUMNS) and all(cell.strip() for cell in row), row
    for name, row in rows.items():
        assert row.does.endswith(".") or ":" in row.does or "(" in row.does, (name, row.does)
        assert row.evaluations["student"] >= 1 and row.networks >= 3 and row.sampler


def test_the_rows_are_what_the_classes_do(rows: dict[str, Summary]) -> None:
    dmd2 = rows["dmd2"]
    assert dmd2.needs == "prompts; pictures or videos with gan_weight" and dmd2.gan == "no; yes with gan_weight"
    assert dmd2.trains == ("student", "fake_score") and dmd2.networks == 4 and dmd2.steps == "fixed, from 1"
    # five fake updates with one evaluation each, one in the student's; the guided teacher once
    assert dmd2.evaluations["fake_score"] == 6 and dmd2.evaluations["teacher"] == 2
    # six rollouts whose last step is one of four, at random
    assert 12 < dmd2.evaluations["student"] < 18
    assert rows["sc_dmd"].steps == "fixed, from 2" and rows["flow_map"].steps == "any number"
    assert rows["scm"].steps == rows["consistency"].steps == "any of its levels"
    assert rows["ode_regression"].needs == "ODE pairs" and rows["ode_regression"].evaluations == {"student": 1}
    assert rows["phased_dmd"].export.startswith("stock pipeline, 2 experts") and rows["phased_dmd"].networks == 6
    assert rows["teacher_forcing"].export == "streaming pipeline" and rows["flow_map"].export == "flow map pipeline"
    assert rows["rtdmd"].sampler == ("renoise", "cps") and rows["mean_flow"].sampler == ("jumps",)
    assert rows["crd"].rewards == "any" and rows["rtdmd"].rewards.startswith("no; differentiable with stage: 2")


def test_examples_are_keys_and_guides_exist(project: Path) -> None:
    for path in OBJECTIVES.values():
        cls = imported(path)
        assert cls.examples and all("name" not in keys for keys in cls.examples)
        assert not cls.page or (project / cls.page).is_file()


@pytest.mark.slow
def test_a_page_has_the_docstring_and_every_key_with_its_comment() -> None:
    found = {key.name: key for key in keys(DMD2)}
    assert (
        found["fake_updates"].default == "5" and "5 fake updates per generator update" in found["fake_updates"].comment
    )
    assert found["normaliser_floor"].values == "number above 0"
    assert "uncond + w (cond - uncond)" in found["guidance_scale"].comment  # the lines above a field
    assert next(key for key in keys(PhasedDMD) if key.name == "phases").default is None
    inherited = {key.name: key for key in keys(imported(OBJECTIVES["sc_dmd"]))}
    assert inherited["fake_updates"].comment == found["fake_updates"].comment  # of a base class
    assert "type: ignore" not in " ".join(field_comments(imported(OBJECTIVES["sc_dmd"])).values())
    for path in OBJECTIVES.values():
        text = text_page(imported(path))
        assert len(text) > 500 and all(f"\n  {key.name}: " in text for key in keys(imported(path)))


def test_the_command(rows: dict[str, Summary]) -> None:
    run = CliRunner()
    shown = run.invoke(app, ["objectives", "dmd2"]).stdout
    assert shown.startswith("DMD2") and "fake_updates: integer from 1 to 10000; default 5" in shown
    (row,) = json.loads(run.invoke(app, ["objectives", "scm", "--json"]).stdout)
    assert (
        row["name"] == "scm"
        and row["evaluations"] == rows["scm"].evaluations
        and row["trains"] == ["student", "weighting"]
    )
    wrong = run.invoke(app, ["objectives", "dmd3"])
    assert wrong.exit_code == 2 and "did you mean 'dmd2'" in wrong.output


def test_the_whole_table_is_printed_with_whole_words(
    rows: dict[str, Summary], capsys: pytest.CaptureFixture[str]
) -> None:
    print_table(as_table(list(rows.values())), console())
    shown = capsys.readouterr().out
    assert all(f" {name} " in shown for name in (*OBJECTIVES, *COLUMNS)) and "…" not in shown
