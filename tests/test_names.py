"""Running fastgen by path puts its folder on the import path: no name in it may hide another module."""

import importlib.metadata
import sys
from pathlib import Path

import pytest

import fastgen
from fastgen.train import main


def top_level_names() -> set[str]:
    """What `import name` would find with fastgen/ itself on the import path."""
    entries = [p for p in Path(fastgen.__file__).parent.iterdir() if not p.name.startswith("__")]
    names = {p.stem for p in entries if p.suffix == ".py"} | {p.name for p in entries if p.is_dir()}
    assert {"train", "backbones", "noise"} <= names
    return names


def test_no_module_hides_one_of_the_standard_library() -> None:
    assert top_level_names() & set(sys.stdlib_module_names) == set()


def test_no_module_hides_an_installed_package() -> None:
    installed = set(importlib.metadata.packages_distributions()) - {"fastgen"}
    assert {"torch", "diffusers", "pydantic"} <= installed
    assert top_level_names() & installed == set()


def test_the_program_says_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    """That it also runs by its path from anywhere is a test of test_config.py."""
    assert main(["--help"]) == 0 and "RECIPE.yaml" in "".join(capsys.readouterr())
    assert main([]) == 2 and "RECIPE.yaml" in capsys.readouterr().err
