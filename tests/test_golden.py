"""Ours against the numbers that the authors' code gave on the same tensors."""

import importlib
from pathlib import Path

import pytest
from golden_rows import BOUND, COMPARISONS, FOLDER, load_golden

for module in sorted(Path(__file__).parent.glob("golden_*.py")):
    importlib.import_module(module.stem)


def test_every_file_has_a_comparison() -> None:
    assert {file.stem for file in FOLDER.glob("*.safetensors")} == set(COMPARISONS)


@pytest.mark.parametrize("name", sorted(COMPARISONS))
def test_ours_equals_the_authors(name: str) -> None:
    assert COMPARISONS[name].error() < BOUND


def test_the_documented_table_is_this_one() -> None:
    page = (Path(__file__).parents[1] / "docs/faithfulness.md").read_text()
    page = page.partition("<!-- table -->")[2].partition("<!-- end of table -->")[0]
    documented = {line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| `")}
    assert documented == {f"`{name}`" for name in COMPARISONS}


def test_sources_say_repository_commit_and_function() -> None:
    for name in COMPARISONS:
        source = load_golden(name).source
        repository, rest = source.split("@")
        commit, function = rest.split(": ", 1)
        assert repository.count("/") == 1 and len(commit) == 12 and function, source
