"""Makes one pipeline of several students that were distilled for different prompts."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from fastgen.backbones.folder import FLOW_MAP, ROUTED, STREAMING, read_index
from fastgen.backbones.saving import rename_class
from fastgen.data.files import check_place, unused_sibling
from fastgen.evaluation.numbers import STORED
from fastgen.pipelines.router import Part, Router, student_folders
from fastgen.sampling.original import export_folder
from fastgen.sampling.sampler import METADATA, read_metadata

NETWORKS = ("transformer*", "unet*", "*.safetensors", "experts.json", "inputs.json", "config.json", "model_index.json")


def combine(paths: Sequence[Path], output: Path) -> Path:
    """Writes the students of runs, or of their exports, as one folder with a router. The folder is complete when it
    takes its name.

    Raises ValueError, before anything is written, unless there is exactly one student for each part of one router, all
    of one backbone and one sampler; for adapters; for students whose pipeline class is our own already; and if
    `output` exists."""
    found = [(path, export_folder(path)) for path in paths]
    missing = [str(path) for path, folder in found if folder is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing)}: neither a run with an export nor an export; use `fastgen export` first"
        )
    folders = [folder for _, folder in found if folder is not None]
    metadata = [read_metadata(folder) for folder in folders]
    ordered, router = in_order(folders, metadata)
    check_output_folder(output)
    partial = unused_sibling(output, "partial")
    try:
        shutil.copytree(ordered[0], partial, ignore=shutil.ignore_patterns("samples", "README.md", STORED))
        first = read_metadata(ordered[0])
        about = {key: value for key, value in first.items() if key != "part"} | {"router": asdict(router)}
        (partial / METADATA).write_text(json.dumps(about, indent=2) + "\n")
        for source, place in zip(ordered[1:], student_folders(partial, router.num_parts)[1:], strict=True):
            copy_networks(source, place)
        name = ""
        if (partial / "model_index.json").is_file():
            rename_class(partial, ROUTED)
            name = read_index(partial)["_class_name"]
        (partial / "README.md").write_text(card(router, name))
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def in_order(folders: Sequence[Path], metadata: Sequence[dict[str, Any]]) -> tuple[list[Path], Router]:
    """The exports by the number of their part, and their router."""
    parts = dict[int, Path]()
    routers = list[Router]()
    for folder, about in zip(folders, metadata, strict=True):
        if about.get("part") is None:
            raise ValueError(f"{folder} is a student of all prompts: its recipe has no part:")
        if about.get("lora"):
            raise ValueError(f"{folder} is an adapter; write a whole pipeline first, `fastgen export RUN --merge`")
        if (folder / "model_index.json").is_file() and (name := own_class(folder)):
            raise ValueError(f"{folder} is a {name}, which has no form with several students")
        for key in ("backbone", "policy"):
            if about[key] != metadata[0][key]:
                raise ValueError(f"{folder} and {folders[0]} differ in {key}, which a pipeline has only once")
        part = TypeAdapter(Part).validate_python(about["part"])
        if part.index in parts:
            raise ValueError(f"{folder} and {parts[part.index]} are both student {part.index}")
        parts[part.index] = folder
        routers.append(part.router)
    if any(router != routers[0] for router in routers):
        raise ValueError("these students divide the prompts in different ways: part: differs in more than index")
    missing = sorted(set(range(routers[0].num_parts)) - set(parts))
    if missing:
        raise ValueError(f"students {missing} of {routers[0].num_parts} are missing")
    return [parts[k] for k in sorted(parts)], routers[0]


def own_class(folder: Path) -> str:
    """The name of an export's pipeline class if it is fastgen's own; "" for a stock one."""
    name: str = read_index(folder)["_class_name"]
    return name if name.startswith((FLOW_MAP, STREAMING)) else ""


def check_output_folder(output: Path) -> None:
    """Raises ValueError if the folder is there, or cannot be made."""
    if output.exists():
        raise ValueError(f"{output} exists; choose another folder")
    check_place(output)


def copy_networks(source: Path, place: Path) -> None:
    """Copies what `Backbone.load_exported` reads of a student: its networks and their settings."""
    place.mkdir()
    for entry in {entry for pattern in NETWORKS for entry in source.glob(pattern)}:
        if entry.is_dir():
            shutil.copytree(entry, place / entry.name)
        else:
            shutil.copyfile(entry, place / entry.name)


def card(router: Router, name: str) -> str:
    """The README of a combined folder. name: of the pipeline class; "" for a student of points."""
    load = (
        f'from fastgen.pipelines.routed import {name}\n\npipeline = {name}.from_pretrained("path/to/this/folder")'
        if name
        else 'import fastgen\n\nsampler = fastgen.load("path/to/this/folder")'
    )
    students = "\n".join(f"- student {k}: {rule(router, k)}" for k in range(router.num_parts))
    return f"""# {router.num_parts} students, each for its own prompts

{students}

```python
{load}
```

How each was distilled, and how it is called, its own export says; `recipe.yaml` is that of student 0. A call of a
pipeline takes prompts of one student. It needs fastgen installed: plain diffusers knows of the first student alone.
"""


def rule(router: Router, k: int) -> str:
    """Which prompts student k has, in words."""
    if router.labels is not None:
        own = [label for label in range(router.labels) if router.route(str(label)) == k]
        return f"labels {own[0]} to {own[-1]}"
    if not router.words:
        return f"prompts whose sha256 is {k} modulo {router.num_parts}"
    said = ", ".join(router.words[k])
    if k == router.num_parts - 1:
        return "all other prompts"
    return f"prompts with one of these words, and with none of those before: {said}"
