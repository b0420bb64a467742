"""The licence of a student: that of its teacher, from whose weights it is made, as far as that folder says it."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgen.backbones.folder import local_folder, read_card

KEYS = ("license", "license_name", "license_link")  # of a card's metadata
TEXTS = ("NOTICE*", "LICENSE*", "LICENCE*")  # files of a pipeline's folder that go with its weights


@dataclasses.dataclass(frozen=True)
class Licence:
    """metadata: what a hub reads; the words "other" and "unknown" are the hub's. said: a sentence for the card."""

    metadata: Mapping[str, Any]
    said: str


def licence_of(source: str) -> Licence:
    """The licence of a student of the pipeline `source`, a folder or a hub id: what the metadata of the teacher's own
    card states; else the licence texts in its folder, by their names; else none is stated, and none is made up."""
    made = f"The student is made from the weights of {source}, and stays under their licence"
    folder = local_folder(source)
    if folder is None:
        return Licence({}, f"{made}, which the page of {source} states.")
    stated, files = stated_licence(folder), [file.name for file in licence_texts(folder)]
    listed = ", ".join(f"[{name}]({name})" for name in files)
    if stated:
        name = stated.get("license_name", stated["license"])
        return Licence(stated, f"{made}: `{name}`, as its card states{f'; see {listed}' if files else ''}.")
    if files:
        named = {"license": "other", "license_name": f"see-{files[0].partition('.')[0].lower()}"}
        return Licence(named | {"license_link": files[0]}, f"{made}: see {listed}, of the teacher's folder.")
    return Licence(
        {"license": "other", "license_name": "unknown"},
        f"{made}, which is not known here: its folder has no card with a licence, and no licence text. Look it up "
        "where the weights come from, and state it here before you hand the student on.",
    )


def stated_licence(folder: Path) -> dict[str, Any]:
    """What the metadata of a pipeline's README.md states; {} for one without a licence."""
    found = read_card(folder)
    return {key: found[key] for key in KEYS if found.get(key)} if found.get("license") else {}


def licence_texts(folder: Path) -> list[Path]:
    return [file for pattern in TEXTS for file in sorted(folder.glob(pattern)) if file.is_file()]


def copy_licence_texts(source: str, folder: Path) -> None:
    """Copies those of the pipeline `source` into a folder, if it is a folder here."""
    teacher = local_folder(source)
    for file in licence_texts(teacher) if teacher else ():
        shutil.copyfile(file, folder / file.name)
