"""The code blocks of README and docs, for tests."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = ("bash", "yaml", "python", "console", "text")  # text: what no program reads
NEEDS = ("a GPU", "the hub", "several GPUs", "several machines", "a browser", "weights of a judge")
PATTERN = re.compile(r"(?ms)^(?:<!-- not run: needs ([^>]*) -->\n+)?[ ]*```(\w*)\n(.*?)^[ ]*```$")
PROGRAMS = ("fastgen", "pip", "make", "torchrun", "accelerate", "srun", "scontrol")
SHIM = """#!/usr/bin/env python3
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""


class Block(NamedTuple):
    """page: relative to the project.  line: where it begins.  needs: why no test runs it, or None."""

    page: str
    line: int
    language: str
    code: str
    needs: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text, name = page.read_text(), str(page.relative_to(ROOT))
    return [
        Block(name, text.count("\n", 0, found.start(2)) + 1, found[2], found[3], found[1])
        for found in PATTERN.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of_language(name: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == name]


def calls_of(block: Block, folder: Path) -> list[list[str]]:
    """The programs that a bash block calls, with their arguments as bash gives them. None of them runs: bash finds
    programs of the same names that only write their arguments down. folder: an empty one."""
    folder.mkdir(parents=True)
    for program in PROGRAMS:
        (folder / program).write_text(SHIM)
        (folder / program).chmod(0o755)
    calls = folder / "calls.jsonl"
    calls.touch()
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-ec", block.code], check=True, env=os.environ | {"PATH": path, "CALLS": str(calls)})
    return [json.loads(line) for line in calls.read_text().splitlines()]
