"""Build the documentation as a website: docs/, the reports, and pages made from the code itself.

    python tools/make_site.py --output build/site          # then open build/site/index.html
    python tools/make_site.py --output build/site --serve  # shows it at http://127.0.0.1:8000

Pages of objectives come from their docstrings and fields, the table of recipes from their first sentences, the Python
interface from its signatures. A link that leads nowhere ends the build. Needs the extra `dev`."""

import argparse
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

import fastgen
from fastgen import api
from fastgen.registry import OBJECTIVES, imported
from fastgen.starting.objectives import COLUMNS, Summary, summary
from fastgen.starting.pages import docstrings, keys
from fastgen.starting.shipped import is_unverified, recipe_files
from fastgen.starting.shipped import summary as recipe_summary

ROOT = Path(__file__).resolve().parents[1]
KEPT = (".md", ".png", ".py", ".yaml", ".json", ".jsonl")  # what documents link to
FOLDERS = ("docs", "benchmarks", "recipes", "fastgen")
OBJECTIVES_INTRODUCTION = """`fastgen objectives` prints this table, and `fastgen objectives NAME` a page.
Networks held are those of the teacher's size, with the moving average of the student. Evaluations are those of
networks for a sample in an update of a four-step student, with the defaults of the objective and a guided teacher.
[choosing.md](../docs/choosing.md) says which one to take."""
PAGES: dict[str, list[Any]] = {
    "Use it": [
        *("docs/choosing.md", "docs/cost.md", "docs/running.md", "docs/multi_node.md", "docs/troubleshooting.md"),
        *("docs/faq.md", "docs/data.md", "docs/rewards.md", "docs/exporting.md", "recipes/index.md"),
    ],
    "Methods": [
        *("objectives/index.md", "docs/dmd2_family.md", "docs/flow_maps.md", "docs/streaming.md"),
        "docs/streaming_methods.md",
    ],
    "Extend it": ["docs/new_objective.md", "docs/contracts.md", "docs/architecture.md", "api.md", "CONTRIBUTING.md"],
    "Evidence": [
        *("docs/faithfulness.md", "benchmarks/acceptance/report.md", "benchmarks/leaderboard/report.md"),
        *("docs/sparse_attention.md", "CHANGELOG.md"),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build/site")
    parser.add_argument("--serve", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_source(work / "source")
        (work / "mkdocs.yml").write_text(yaml.safe_dump(config(work / "source", args.output.resolve())))
        command = ["serve"] if args.serve else ["build", "--strict", "--quiet"]
        program = [sys.executable, "-m", "mkdocs", *command, "-f", str(work / "mkdocs.yml")]
        done = subprocess.run(program, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})  # an advertisement
    sys.exit(done.returncode)


def config(source: Path, output: Path) -> dict[str, Any]:
    return {
        "site_name": "fastgen",
        "site_description": "Turn a diffusers pipeline into a few-step one, and know that it worked.",
        "docs_dir": str(source),
        "site_dir": str(output),
        "use_directory_urls": False,
        "theme": {
            "name": "material",
            "font": False,  # those of the reader's system; nothing is loaded from elsewhere
            "features": ["navigation.tabs", "navigation.indexes", "content.code.copy", "search.suggest"],
            "palette": [
                {"media": "(prefers-color-scheme: light)", "scheme": "default", "primary": "indigo"},
                {"media": "(prefers-color-scheme: dark)", "scheme": "slate", "primary": "indigo"},
            ],
        },
        "markdown_extensions": ["tables", "toc", "pymdownx.highlight", "pymdownx.superfences", "md_in_html"],
        "validation": {"links": {"not_found": "warn", "anchors": "warn", "unrecognized_links": "warn"}},
        "nav": [{"Start": "index.md"}, *({name: pages} for name, pages in PAGES.items())],
    }


def write_source(source: Path) -> None:
    """The documents at the places that they have in the repository, so that their links hold, and the made pages."""
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in KEPT and "__pycache__" not in path.parts:
                copy(path, source / path.relative_to(ROOT))
    for path in (ROOT / "assets").glob("*.png"):
        copy(path, source / path.relative_to(ROOT))
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        copy(ROOT / name, source / name)
    readme = (ROOT / "README.md").read_text()
    (source / "index.md").write_text(readme.replace("](recipes)", "](recipes/index.md)"))
    made = {"recipes/index.md": recipes_page(), "api.md": api_page(), **objective_pages()}
    for name, text in made.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)


def copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)


def recipes_page() -> str:
    rows = [
        "# Recipes",
        "",
        "`fastgen recipes NAME` copies one of them.",
        "",
        "| recipe | what it does | has been run |",
        "|---|---|---|",
    ]
    for file in recipe_files():
        text = file.read_text()
        rows.append(
            f"| [{file.stem}]({file.name}) | {recipe_summary(text)} | {'no' if is_unverified(text) else 'yes'} |"
        )
    return "\n".join(rows) + "\n"


def api_page() -> str:
    """Every function of the Python interface, with its signature and what it says of itself."""
    parts = ["# Python interface", f"```text\n{inspect.cleandoc(api.__doc__ or '')}\n```"]
    for name in fastgen.__all__:
        function = getattr(api, name)
        parts.append(f"## `fastgen.{name}`\n\n```python\nfastgen.{name}{inspect.signature(function)}\n```")
        parts.append(as_markdown(inspect.cleandoc(function.__doc__ or "")))
    return "\n\n".join(parts) + "\n"


def objective_pages() -> dict[str, str]:
    """A page for every objective, and the table of them."""
    summaries, pages = [summary(name) for name in OBJECTIVES], dict[str, str]()
    for row in summaries:
        cls = imported(OBJECTIVES[row.name])
        calls = ", ".join(f"{role} {n:.3g}" for role, n in row.evaluations.items())
        cells = [(head, cell(row)) for head, cell in COLUMNS.items() if head not in ("objective", "page")]
        facts = [f"| {head} | {calls if head == 'evaluations' else value} |" for head, value in cells]
        more = f"\n\nMore: [{row.page}](../{row.page})" if row.page.endswith(".md") else ""
        parts = [
            f"# {row.name}",
            "\n".join(["| | |", "|---|---|", *facts]) + more,
            *map(as_markdown, docstrings(cls)),
            "## Keys",
            key_table(cls),
            f"Source: [{cls.__module__}](../{cls.__module__.replace('.', '/')}.py)",
        ]
        pages[f"objectives/{row.name}.md"] = "\n\n".join(parts) + "\n"
    return {"objectives/index.md": objectives_page(summaries), **pages}


def objectives_page(summaries: Sequence[Summary]) -> str:
    heads = [head for head in COLUMNS if head != "page"]
    rows = ["# Objectives", "", OBJECTIVES_INTRODUCTION, "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in summaries:
        cells = [COLUMNS[head](row) for head in heads[1:]]
        rows.append(f"| [{row.name}]({row.name}.md) | {' | '.join(cells)} |")
    rows += ["", "| objective | what it is |", "|---|---|"]
    rows += [f"| [{row.name}]({row.name}.md) | {row.does} |" for row in summaries]
    return "\n".join(rows) + "\n"


def as_markdown(text: str) -> str:
    """A docstring whose indented parts, formulas and listings, are code blocks."""
    lines, indented = list[str](), False
    for line in text.splitlines():
        if line.strip() and line.startswith("    ") != indented:
            indented = not indented
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def key_table(cls: type) -> str:
    """The keys of a class, with their defaults and the comments beside them."""
    rows = ["| key | values | default | |", "|---|---|---|---|"]
    for key in keys(cls):
        default = "needed" if key.default is None else f"`{key.default}`"
        rows.append(f"| `{key.name}` | {key.values} | {default} | {escaped(key.comment)} |")
    return "\n".join(rows)


def escaped(text: str) -> str:
    """A comment in a cell of a table, where | and * mean themselves."""
    return re.sub(r"([|*_<\[\]])", r"\\\1", text)


if __name__ == "__main__":
    main()
