"""The recipes that ship with fastgen, to be listed and copied."""

import re
from pathlib import Path

from fastgen.data.files import check_output
from fastgen.registry import nearest, shipped

SCHEMA = "recipe.schema.json"  # beside the recipes
MODELINE = "# yaml-language-server: $schema="  # which tells an editor the schema of the file


def recipe_files() -> list[Path]:
    return sorted(shipped("recipes").glob("*.yaml"))


def summary(text: str) -> str:
    """The first sentence of the comment that a recipe begins with, without the mark of one that nobody has run."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith((MODELINE, "# UNVERIFIED")):
            lines.append(line.removeprefix("#").strip())
    return re.split(r"(?<=\.)\s", " ".join(lines), maxsplit=1)[0]


def is_unverified(text: str) -> bool:
    return text.startswith("# UNVERIFIED")


def with_schema(text: str) -> str:
    """The text of a recipe whose schema is named by its absolute path, for a file outside of recipes/."""
    return text.replace(f"{MODELINE}{SCHEMA}", modeline())


def modeline() -> str:
    return f"{MODELINE}{shipped('recipes') / SCHEMA}"


def copy_recipe(name: str, output: Path | None) -> Path:
    """Copies a shipped recipe, by default to NAME.yaml here. Raises ValueError for an unknown name, and if the file
    exists."""
    files = {file.stem: file for file in recipe_files()}
    stem = Path(name).stem
    if stem not in files:
        raise ValueError(f"there is no recipe {stem}{nearest(stem, files)}")
    target = output or Path(f"{stem}.yaml")
    check_output(target, overwrite=False)
    target.write_text(with_schema(files[stem].read_text()))
    return target
