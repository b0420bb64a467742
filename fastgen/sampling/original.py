"""What an export was distilled from."""

from pathlib import Path

from fastgen.backbones import BACKBONES
from fastgen.backbones.base import BackboneConfig
from fastgen.config import load_stored
from fastgen.recipe import Recipe
from fastgen.registry import build_section
from fastgen.sampling.sampler import METADATA, read_metadata


def export_folder(path: Path) -> Path | None:
    """The export of a run, or the export that `path` is; None for anything else."""
    return next((folder for folder in (path / "export", path) if (folder / METADATA).is_file()), None)


def original(folder: Path) -> tuple[BackboneConfig, Recipe]:
    """The backbone section of an export's teacher, and the recipe of its run. Raises ValueError if the teacher's files
    are gone."""
    config = build_section("backbone", read_metadata(folder)["backbone"], BACKBONES, BackboneConfig)
    config.check()
    return config, load_stored(folder / "recipe.yaml")
