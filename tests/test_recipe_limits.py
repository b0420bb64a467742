"""Recipes too large to be meant: numbers of which a tensor or a loop would be made, texts, and lists of mistakes."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from fastgen.config import build_recipe, load_recipe
from fastgen.config.sections import SECTIONS
from fastgen.config.text import parse_yaml
from fastgen.recipe import Recipe
from fastgen.registry import RecipeError, resolve

RING = Path(__file__).parents[1] / "recipes/mixture_dmd2_4step.yaml"
CLASSES = [resolve(section, name, names, base) for section, (names, base) in SECTIONS.items() for name in names]


# --- numbers


def unbounded(schema: Any, path: str) -> Iterator[str]:
    """The integers in a JSON schema that have no smallest or no largest value."""
    if isinstance(schema, dict):
        least, most = {"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"}
        bounded = {"const", "enum"} & set(schema) or (least & set(schema) and most & set(schema))
        if schema.get("type") == "integer" and not bounded:
            yield path
        for key, value in schema.items():
            yield from unbounded(value, f"{path}.{key}")
    elif isinstance(schema, list):
        for i, value in enumerate(schema):
            yield from unbounded(value, f"{path}.{i}")


def test_every_whole_number_of_a_recipe_has_a_smallest_and_a_largest_value() -> None:
    """A tensor, a list or a loop may be of its size: 1e9 must not fill the memory."""
    schemas = [TypeAdapter(cls).json_schema() for cls in (Recipe, *CLASSES)]
    found = [name for schema in schemas for name in unbounded(schema, schema["title"])]
    assert not found, f"give Field(ge=..., le=...), with a constant of registry.py, to {found}"


@pytest.mark.parametrize(
    "override",
    [
        "backbone.classes=[0, 1, 2, 3, 4, 5, 6, 1000000000]",
        "backbone.classes=[0, 1, 2, 3, 4, 5, 6, 1000000000000000000000000000000]",
        "backbone.width=1000000000",
        "backbone.depth=1000000000",
        "train.batch_size=1000000000",
        "train.num_samples=1000000000",
        "eval.num_samples=1000000000",
        "eval.teacher_steps=[1000000000]",
        "health.num_samples=1000000000",
        "lora.student.rank=1000000000",
        "data.pair_steps=1000000000",
        "objective.fake_updates=1000000000",
        "objective={name: consistency, teach: data, grid: {count: 1000000000}}",
        "objective={name: consistency, teach: data, grid: {count: 4}, end: uniform, phases: [1000000000]}",
        "objective={name: disback, path_length: 1000000000}",
        "objective={name: gndm, num_pairs: 1000000000}",
        "objective={name: ode_regression, path_steps: 1000000000}",
        "objective={name: scm, trajectory_steps: 1000000000}",
    ],
)
def test_a_number_of_a_billion_is_refused_at_once(override: str) -> None:
    start = time.process_time()
    with pytest.raises(RecipeError, match=r"less than or equal to [\d]+|classes must use every label from 0 up"):
        load_recipe(RING, [override])
    print(f"{time.process_time() - start:.2f} s")


# --- values that YAML can hold


LETTERS = list(itertools.pairwise("abcdefghijklmnopqrstuvwxyz"))
TOO_LONG = {
    "aliases": "a: &a [x]\n" + "".join(f"{k}: &{k} [{f'*{before}, ' * 9}]\n" for before, k in LETTERS),
    "merged": "a: &a {x: 1}\n" + "".join(f"{k}: &{k} {{<<: [{f'*{before}, ' * 9}]}}\n" for before, k in LETTERS),
    "long": "data: {prompts: [" + "a, " * 300_000 + "]}",
    "wide": "\n".join(f"k{i}: 1" for i in range(60_000)),
}


@pytest.mark.parametrize("name", TOO_LONG)
def test_a_text_of_more_values_than_a_recipe_has_is_refused(name: str) -> None:
    start = time.process_time()
    with pytest.raises(RecipeError, match="the recipe has more than 20,000 values"):
        parse_yaml(TOO_LONG[name], "the recipe")
    print(f"{time.process_time() - start:.2f} s")


def test_a_value_that_contains_itself_is_refused() -> None:
    with pytest.raises(RecipeError, match="has a value that contains itself"):
        parse_yaml("a: &a [*a]", "the recipe")


def test_aliases_and_merge_keys_are_read() -> None:
    text = "a: &a {lr: 1, betas: &b [1, 2]}\nb: {<<: *a, lr: 2}\nc: [*b, *b]"
    assert parse_yaml(text, "it") == {
        "a": {"lr": 1, "betas": [1, 2]},
        "b": {"lr": 2, "betas": [1, 2]},
        "c": [[1, 2], [1, 2]],
    }


@pytest.mark.parametrize("key", ["output_dir", "data.name", "eval.prompts", "init_from"])
def test_a_name_too_long_for_a_file_is_refused(key: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(RING, ["init_from=x", f"{key}={'x' * 5000}"])


def test_a_thousand_mistakes_are_counted_and_the_first_are_said() -> None:
    raw = yaml.safe_load(RING.read_text())
    raw["optimizers"] = {f"role{i}": "x" for i in range(1000)}
    with pytest.raises(RecipeError) as error:
        build_recipe(raw)
    assert "role0" in str(error.value) and str(error.value).endswith("and 950 more mistakes")


@pytest.mark.parametrize("code", ["raise AttributeError('x')", "import sys; sys.exit(3)", "def", "1 / 0"])
@pytest.mark.parametrize("section", ["objective", "data", "rewards"])
def test_a_module_that_cannot_be_imported_is_words(
    code: str, section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    value = "{name: odd_module:Class}"
    value = f"{{parts: [{value}]}}" if section == "rewards" else value
    with pytest.raises(RecipeError, match=r"cannot import 'odd_module:Class'"):
        load_recipe(RING, [f"{section}={value}"])
    with pytest.raises(RecipeError, match=r"cannot import 'odd_module:function'"):
        parts = "[{name: function, function: odd_module:function, input: points, differentiable: true}]"
        load_recipe(RING, [f"rewards={{parts: {parts}}}"])
