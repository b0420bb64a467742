"""What a first recipe begins with: the schema, and the recipes that ship."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

import fastgen
from fastgen.cli import app
from fastgen.config import load_recipe
from fastgen.config.schema import recipe_schema, recipe_schema_text
from fastgen.config.text import read_recipe
from fastgen.registry import BACKBONES, DATA, OBJECTIVES, REWARDS
from fastgen.starting.shipped import MODELINE, SCHEMA, copy_recipe, is_unverified, recipe_files, summary

NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def as_an_editor_reads(value: Any) -> Any:
    """1e-4 is a number in YAML 1.2, which editors read, and a text in YAML 1.1."""
    if isinstance(value, dict):
        return {key: as_an_editor_reads(part) for key, part in value.items()}
    if isinstance(value, list):
        return [as_an_editor_reads(part) for part in value]
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


@pytest.fixture(scope="module")
def editor() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(recipe_schema())
    return jsonschema.Draft202012Validator(json.loads(recipe_schema_text()))


def test_the_shipped_schema_is_the_current_one(project: Path) -> None:
    """`fastgen schema --output recipes/recipe.schema.json` writes it again."""
    assert (project / "recipes" / SCHEMA).read_text() == recipe_schema_text()


def test_every_recipe_names_the_schema_and_fits_it(editor: jsonschema.Draft202012Validator) -> None:
    for file in recipe_files():
        assert f"\n{MODELINE}{SCHEMA}\n" in file.read_text(), file
        errors = [error.message for error in editor.iter_errors(as_an_editor_reads(read_recipe(file, file)))]
        assert not errors, f"{file}: {errors[:3]}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": {"stepz": 3}}, "stepz"),
        ({"objective": {"fake_update": 3}}, "fake_update"),
        ({"backbone": {"means": "near"}}, "near"),
        ({"objective": {"name": "dmd3"}}, "dmd3"),
        ({"seed": -1}, "-1"),
    ],
)
def test_mistakes_are_underlined(
    editor: jsonschema.Draft202012Validator, raw_recipe: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    raw = as_an_editor_reads(copy.deepcopy(raw_recipe))
    assert editor.is_valid(raw)
    for key, value in change.items():
        raw[key] = raw[key] | value if isinstance(value, dict) else value
    assert any(words in error.message for error in editor.iter_errors(raw))


def test_every_name_has_its_keys_and_its_page() -> None:
    found = recipe_schema()["$defs"]
    for section, names in (("backbone", BACKBONES), ("data", DATA), ("objective", OBJECTIVES), ("rewards", REWARDS)):
        for name in names:
            assert found[f"{section}.{name}"]["description"] and not found[f"{section}.{name}"]["additionalProperties"]


def test_recipes_are_listed_and_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in recipe_files():
        assert summary(file.read_text()).endswith("."), file
    listed = CliRunner().invoke(app, ["recipes"], env={"COLUMNS": "200"}).stdout
    assert "mixture_dmd2_4step" in listed
    unverified = next(file for file in recipe_files() if is_unverified(file.read_text()))
    assert "yes" not in next(line for line in listed.splitlines() if unverified.stem in line)
    copied = copy_recipe("mixture_dmd2_4step", None)
    assert copied == Path("mixture_dmd2_4step.yaml") and load_recipe(copied) == load_recipe(
        recipe_files()[0].parent / copied
    )
    assert Path(copied.read_text().partition(MODELINE)[2].splitlines()[0]).is_file()
    with pytest.raises(ValueError, match="exists"):
        copy_recipe("mixture_dmd2_4step", None)
    with pytest.raises(ValueError, match="did you mean 'sdxl_dmd2_4step'"):
        copy_recipe("sdxl_dmd_4step", None)


def test_the_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"fastgen {fastgen.__version__}\n"
