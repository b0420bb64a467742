"""Whatever a recipe holds, it is read, or refused in words, within two seconds."""

import copy
import math
import random
import signal
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from mutations import draws, mutated
from pydantic import TypeAdapter
from shipped_recipes import RECIPES

from fastgen.config import build_recipe, load_recipe
from fastgen.config.sections import SECTIONS
from fastgen.config.stored import dump_recipe, to_dict
from fastgen.config.text import parse_yaml
from fastgen.recipe import Recipe
from fastgen.registry import RecipeError, flatten, resolve

LONGEST = 2.0  # seconds of CPU time for one recipe
CHOSEN = ("backbone", "data", "objective")  # sections whose class is chosen by their name
NAN, INF = float("nan"), float("inf")
ODD: list[Any] = [
    *(0, 1, -1, 2, 1 << 31, 1 << 63, 10**9, 10**30, 1e9, 1e308, -1e308, 5e-324, INF, -INF, NAN, True, False, None),
    *("", "a", "1e9", "nan", "/dev/zero", "/dev/null", "/", "~", "~/x", "a\0b", "\ud800", "é" * 300, "x" * 100_000),
    *("org/name", "digits", "neutral", "fid", "auto", "no_module:Class", "fastgen.registry:x", "os:path", ":", "a:"),
    *([], [[]], [None], [1e9], [-1], [0], [NAN], ["a"], [0, 1], [1, 0], list(range(3000)), [[1.0] * 99] * 99),
    *({}, {"a": 1}, {1: 2}, {None: None}, {"x" * 5000: 1}, {"name": "x"}, {"name": 1}, {"path": "/dev/zero"}),
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a recipe with each of its keys or indices."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from places(inner)


def with_odd_values(draw: random.Random, raw: dict[str, Any]) -> None:
    """Puts values of any type anywhere, or removes or moves some."""
    for _ in range(draw.randint(1, 3)):
        if not (found := list(places(raw))):
            return
        (node, key), (other, moved) = draw.choice(found), draw.choice(found)
        kind = draw.random()
        if kind < 0.1:
            del node[key]
        elif kind < 0.2:
            node[key] = copy.deepcopy(other[moved])
        else:
            node[key] = copy.deepcopy(draw.choice(ODD))


def drawn(draw: random.Random, schema: dict[str, Any], top: dict[str, Any]) -> Any:
    """A value that fits a JSON schema, mostly at the ends of its range."""
    if "$ref" in schema:
        return drawn(draw, top["$defs"][schema["$ref"].rpartition("/")[2]], top)
    if "anyOf" in schema:
        return drawn(draw, draw.choice(schema["anyOf"]), top)
    if "const" in schema or "enum" in schema:
        return draw.choice(schema.get("enum", [schema.get("const")]))
    least = schema.get("minimum", schema.get("exclusiveMinimum", -10))
    most = schema.get("maximum", schema.get("exclusiveMaximum", 10))
    kind = schema.get("type")
    if kind == "integer":
        return draw.choice((least, least + 1, 2, 3, 4, 7, 64, most))
    if kind == "number":
        return draw.choice((least, most, (least + most) / 2, least + 1e-9, most - 1e-9, 0.3, 1.0, 4.0))
    if kind == "array":
        items = schema.get("prefixItems") or [schema.get("items", {})] * draw.randint(0, 4)
        return [drawn(draw, item, top) for item in items]
    if kind == "object":
        properties = schema.get("properties", {})
        needed = set(schema.get("required", ()))
        return {k: drawn(draw, v, top) for k, v in properties.items() if k in needed or draw.random() < 0.2}
    return {"boolean": draw.random() < 0.5, "null": None}.get(str(kind), "a")


def schemas() -> dict[str, dict[str, Any]]:
    """The JSON schema of every class that a section may choose, by section and name, and that of the whole recipe."""
    found = {"": TypeAdapter(Recipe).json_schema()}
    for section in CHOSEN:
        registry, base = SECTIONS[section]
        for name in registry:
            found[f"{section}.{name}"] = TypeAdapter(resolve(section, name, registry, base)).json_schema()
    return found


def with_fitting_values(draw: random.Random, raw: dict[str, Any], schemas: dict[str, dict[str, Any]]) -> None:
    """Sets some keys to values that their own types allow."""
    for _ in range(draw.randint(1, 3)):
        section = draw.choice((*CHOSEN, ""))
        target = raw[section] if section else raw
        schema = schemas[f"{section}.{target['name']}" if section else ""]
        key = draw.choice([k for k in schema["properties"] if k not in ("name", "output_dir", *CHOSEN)] or [""])
        old, value = target.get(key), drawn(draw, schema["properties"].get(key, {}), schema)
        if isinstance(old, dict) and isinstance(value, dict):
            old |= dict(draw.sample(sorted(value.items()), min(2, len(value))))
        elif key:
            target[key] = value


@contextmanager
def timed() -> Iterator[None]:
    """Fails when the block takes more CPU time than a recipe may. Also one that would never end is stopped."""

    def late(number: int, frame: types.FrameType | None) -> None:
        raise AssertionError(f"more than {LONGEST} seconds")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def checked(raw: Any, counts: Counter[str]) -> None:
    """Reads a recipe, and counts what happened. What is accepted is finite, and is the same when it is stored and
    read back."""
    try:
        with timed():
            recipe = build_recipe(raw)
    except RecipeError as error:
        assert 0 < len(str(error)) < 110_000
        counts["refused"] += 1
        return
    numbers = flatten(to_dict(recipe)).items()
    assert not [key for key, value in numbers if isinstance(value, float) and not math.isfinite(value)]
    assert build_recipe(parse_yaml(dump_recipe(recipe), "it")) == recipe
    counts["read"] += 1


def import_everything() -> None:
    """Whatever good recipes import on the way, which is not counted."""
    for path in RECIPES:
        with suppress(RecipeError):  # some start from other runs
            load_recipe(path)


def fuzz(change: Callable[[random.Random, dict[str, Any]], None]) -> None:
    """Changes and reads recipes, and says how many of them were read and refused."""
    import_everything()
    raws, counts, slowest = [yaml.safe_load(path.read_text()) for path in RECIPES], Counter[str](), 0.0
    for draw in draws(30):
        raw = copy.deepcopy(draw.choice(raws))
        change(draw, raw)
        start = time.process_time()
        try:
            checked(raw, counts)
        except BaseException:
            print(raw)
            raise
        slowest = max(slowest, time.process_time() - start)
    print(f"{counts['read']} read, {counts['refused']} refused, the slowest in {slowest:.2f} s")
    assert min(counts["read"], counts["refused"]) > 100


@pytest.mark.slow
def test_recipes_with_odd_values_are_read_or_refused_in_words() -> None:
    fuzz(with_odd_values)


@pytest.mark.slow
def test_recipes_with_fitting_values_are_read_or_refused_in_words() -> None:
    """These pass the checks of single values, and meet those of several."""
    known = schemas()
    fuzz(lambda draw, raw: with_fitting_values(draw, raw, known))


@pytest.mark.slow
def test_damaged_texts_are_read_or_refused_in_words(tmp_path: Path) -> None:
    import_everything()
    texts, counts, path = [path.read_bytes() for path in RECIPES], Counter[str](), tmp_path / "fuzz.yaml"
    for draw in draws(30):
        path.write_bytes(mutated(draw, draw.choice(texts)))
        try:
            with timed():
                load_recipe(path)
            counts["read"] += 1
        except RecipeError:
            counts["refused"] += 1
    print(f"{counts['read']} read, {counts['refused']} refused")
    assert min(counts["read"], counts["refused"]) > 100
