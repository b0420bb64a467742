"""Every shipped recipe is complete, says what it is, and comes with the curve of a good run, or says it has none."""

import json
from pathlib import Path

import pytest
from shipped_recipes import RECIPES, ROOT, loaded

from fastgen.config import load_recipe
from fastgen.config.stored import dump_recipe

UNVERIFIED = "# UNVERIFIED: nobody has run this recipe to the end.\n"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_loads_and_resolves_to_itself(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = loaded(path)
    assert path.read_text().startswith("# ")
    assert recipe.output_dir.parts[0] == "runs"
    (tmp_path / path.name).write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / path.name) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_has_a_reference_curve_of_its_whole_length(path: Path) -> None:
    """Or, in its first line, says that there is none."""
    logged = map(json.loads, (ROOT / "recipes/reference.jsonl").read_text().splitlines())
    rows = [row for row in logged if row["recipe"] == path.stem]
    if not rows:
        assert path.read_text().startswith(UNVERIFIED)
        return
    assert "UNVERIFIED" not in path.read_text()
    assert rows[-1]["step"] == loaded(path).train.steps
    assert any(key.startswith("eval/") for key in rows[-1])
    assert "student/loss" in {key for row in rows for key in row}
