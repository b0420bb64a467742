"""Running fastgen by path puts its folder on the import path: no name in it may hide another module."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import fastgen


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


def test_the_program_runs_by_path_from_anywhere(project: Path, tmp_path: Path) -> None:
    """From another working directory and isolated from PYTHONPATH: with -E the package is found by the program's own
    path alone, or as it is installed."""
    command = [sys.executable, "-E", str(project / "fastgen" / "train.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert "usage:" in done.stdout + done.stderr and "RECIPE.yaml" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
