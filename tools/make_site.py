"""Build the documentation as a website: docs/, the reports, and pages made from the code itself.

    python tools/make_site.py --output build/site          # then open build/site/index.html
    python tools/make_site.py --output build/site --serve  # shows it at http://127.0.0.1:8000

Pages of objectives come from their docstrings and fields, the table of recipes from their first sentences, the Python
interface from its signatures. A link that leads nowhere ends the build. Needs the extra `dev`."""

import argparse
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import fastgen
from fastgen import api
from fastgen.config.schema import page, recipe_schema
from fastgen.registry import OBJECTIVES, imported
from fastgen.starting.shipped import is_unverified, recipe_files, summary

ROOT = Path(__file__).resolve().parents[1]
KEPT = (".md", ".png", ".py", ".yaml", ".json", ".jsonl")  # what documents link to
FOLDERS = ("docs", "benchmarks", "recipes", "fastgen")
PAGES: dict[str, list[Any]] = {
    "Use it": [
        *("docs/running.md", "docs/multi_node.md", "docs/troubleshooting.md", "docs/data.md", "docs/rewards.md"),
        *("docs/exporting.md", "recipes/index.md"),
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
        "markdown_extensions": ["tables", "toc", "fenced_code", "md_in_html"],
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
        rows.append(f"| [{file.stem}]({file.name}) | {summary(text)} | {'no' if is_unverified(text) else 'yes'} |")
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
    """A page for every objective, and the list of them."""
    schemas, pages = recipe_schema()["$defs"], dict[str, str]()
    rows = ["# Objectives", "", "| objective | what it is |", "|---|---|"]
    for name, path in OBJECTIVES.items():
        cls = imported(path)
        module = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")
        rows.append(f"| [{name}]({name}.md) | {' '.join(module.split(chr(10) * 2)[0].split())} |")
        own = page(cls)
        said = [as_markdown(text) for text in dict.fromkeys((module, own))]
        parts = [f"# {name}", *said, "## Keys", keys(schemas[f"objective.{name}"])]
        source = f"../{cls.__module__.replace('.', '/')}.py"
        pages[f"objectives/{name}.md"] = "\n\n".join([*parts, f"Source: [{cls.__module__}]({source})"]) + "\n"
    return {"objectives/index.md": "\n".join(rows) + "\n", **pages}


def as_markdown(text: str) -> str:
    """A docstring whose indented parts, formulas and listings, are code blocks."""
    lines, indented = list[str](), False
    for line in text.splitlines():
        if line.strip() and line.startswith("    ") != indented:
            indented = not indented
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def keys(schema: Mapping[str, Any]) -> str:
    """The keys of a section as a table."""
    rows = ["| key | values | default |", "|---|---|---|"]
    required = set(schema.get("required", ()))
    for name, said in schema["properties"].items():
        if name != "name":
            default = "needed" if name in required else f"`{json.dumps(said.get('default'))}`"
            rows.append(f"| `{name}` | {values(said)} | {default} |")
    return "\n".join(rows)


def values(said: Mapping[str, Any]) -> str:
    if "anyOf" in said:
        return " or ".join(values(part) for part in said["anyOf"])
    if "enum" in said or "const" in said:
        return ", ".join(f"`{value}`" for value in said.get("enum", [said.get("const")]))
    if "$ref" in said:
        return said["$ref"].rpartition("/")[2]
    limits = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    found = [f"{word} {said[key]:g}" for key, word in limits.items() if key in said]
    return " ".join([str(said.get("type", "")), *found]).strip() or "see the page"


if __name__ == "__main__":
    main()
