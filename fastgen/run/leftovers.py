"""What a kill leaves behind: files and folders under temporary names. They are put back or removed when a run starts.

Only names that fastgen gives to temporary files are touched, and only in the run's own folder, which is locked."""

import re
import shutil
from pathlib import Path

from fastgen.data.files import TEMPORARY
from fastgen.run.checkpoint import GOING, PREFIX
from fastgen.sampling.sampler import METADATA

REPLACED = "replaced"  # in the name of an earlier export while the new one takes its place
CHECKPOINT = re.compile(rf"{PREFIX}\d{{8,}}(\.partial|(\.[0-9a-f]{{8}})?{re.escape(GOING)})")


def restore(folder: Path) -> None:
    """Puts an export back that a kill has left under its temporary name, between two renames."""
    left = [p for p in folder.parent.glob(f".{folder.name}.{REPLACED}-*") if (p / METADATA).is_file()]
    if left and not folder.exists():
        max(left, key=lambda p: p.stat().st_mtime).rename(folder)


def leftovers(run: Path) -> list[Path]:
    """The temporary files and folders in a run folder, at its top and among its samples and checkpoints."""
    places = [(run, TEMPORARY), (run / "samples", TEMPORARY), (run / "checkpoints", CHECKPOINT)]
    return [p for place, name in places if place.is_dir() for p in place.iterdir() if name.fullmatch(p.name)]


def clean(run: Path) -> None:
    """Restores the export, and removes all leftovers."""
    restore(run / "export")
    for left in leftovers(run):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
