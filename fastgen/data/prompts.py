"""Prompts without images, for objectives that need no real data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from fastgen.backbones.base import Backbone
from fastgen.data.samples import Samples, SampleSource
from fastgen.data.tables import TABLES, read_captions, read_lines
from fastgen.registry import shipped

NEUTRAL = Path(__file__).with_name("neutral.txt")  # 64 prompts, ours


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PromptData(SampleSource):
    """prompts: a list of prompts; a text file with one prompt per line; a csv, tsv, jsonl or parquet file with a
    column of prompts; or "neutral", the 64 prompts that ship with fastgen. A path that is not there is looked for
    among the files that ship with fastgen, such as assets/moving_digits_prompts.txt.
    column: the name of that column; by default the first of `prompt`, `caption` and `text` that exists."""

    prompts: str | tuple[str, ...]
    column: str | None = None
    name: Literal["prompts"] = "prompts"

    def check(self, backbone: Any) -> None:
        backbone.check_prompts(read_prompts(self.prompts, self.column))

    def samples(self, backbone: Backbone) -> Samples:
        return Samples(read_prompts(self.prompts, self.column))


def prompt_file(pipeline: str) -> str | None:
    """The file of prompts that a pipeline knows: prompts.txt in its folder or beside it, or one that ships for it."""
    folder = Path(pipeline)
    places = (folder / "prompts.txt", folder.parent / "prompts.txt", Path("assets", f"{folder.name}_prompts.txt"))
    return next((str(p) for p in places if p.is_file() or shipped(p).is_file()), None)


def read_prompts(prompts: str | Sequence[str], column: str | None = None) -> list[str]:
    """Returns a list as it is, or reads the prompts of a file (see PromptData). Raises ValueError if there are no
    prompts, or if an entry of the file is not a prompt; the message names its line or row."""
    if not isinstance(prompts, str):
        if column is not None:
            raise ValueError("column: a list of prompts has no columns; leave column out")
        if not prompts:
            raise ValueError("there are no prompts: the list is empty")
        return list(prompts)
    path = NEUTRAL if prompts == "neutral" and not Path(prompts).exists() else Path(prompts)
    if not path.exists() and shipped(path).is_file():
        path = shipped(path)
    if not path.is_file():
        raise ValueError(
            f"there is no prompt file at {prompts}; give a txt, csv, tsv, jsonl or parquet file, or a list"
        )
    if path.suffix.lower() in TABLES:
        found = read_captions(path, column)
        blank = next((i for i, prompt in enumerate(found, 1) if not prompt.strip()), None)
        if blank is not None:
            raise ValueError(f"row {blank} of {path} has an empty prompt; remove the row")
        return found
    if path.suffix.lower() not in ("", ".txt"):
        raise ValueError(f"prompts are read from txt, csv, tsv, jsonl and parquet files, not from {path.name}")
    if column is not None:
        raise ValueError(f"column: the text file {path} has no columns; leave column out")
    found = read_lines(path)
    if not found:
        raise ValueError(f"there are no prompts in {path}: the file is empty")
    return found
