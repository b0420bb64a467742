"""The page of a class that a recipe names: its docstrings, and its keys with defaults and comments."""

import ast
import dataclasses
import inspect
import io
import json
import sys
import tokenize
from collections.abc import Iterator, Mapping
from typing import Any

from fastgen.config.schema import described, page


def module_page(cls: type) -> str:
    return inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")


def first_paragraph(cls: type) -> str:
    return " ".join((module_page(cls) or page(cls)).split("\n\n")[0].split())


def docstrings(cls: type) -> list[str]:
    """What the module and the class say, each once."""
    return list(dict.fromkeys(text for text in (module_page(cls), page(cls)) if text))


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a section. values: its type and range. default: as it is written in a recipe; None: it must be given.
    comment: what stands beside the field, or above it."""

    name: str
    values: str
    default: str | None
    comment: str


def keys(cls: type) -> list[Key]:
    """In the order of the class, those of a base class first."""
    schema, comments = described(cls, {}), dict[str, str]()
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            comments |= field_comments(base)
    required = set(schema.get("required", ()))
    return [
        Key(
            name,
            values(said),
            None if name in required else json.dumps(said.get("default")),
            comments.get(name, ""),
        )
        for name, said in schema["properties"].items()
        if name != "name"
    ]


def values(said: Mapping[str, Any]) -> str:
    """The type and the range of a key, from its JSON schema."""
    if "anyOf" in said:
        return " or ".join(dict.fromkeys(values(part) for part in said["anyOf"]))
    if "enum" in said or "const" in said:
        return ", ".join(str(value) for value in said.get("enum", [said.get("const")]))
    if "$ref" in said:
        return said["$ref"].rpartition("/")[2]
    limits = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    found = [f"{word} {said[key]:g}" for key, word in limits.items() if key in said]
    return " ".join([str(said.get("type", "")), *found]).strip() or "see the page"


def field_comments(cls: type) -> dict[str, str]:
    """The comments of a class's own fields: those that end the lines of a field, and the lines of comments directly
    above it."""
    source = inspect.getsource(cls)
    comments = dict(line_comments(source))
    code = source.splitlines()
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in comments and code[first - 2].lstrip().startswith("#"):
                first -= 1
            lines = [comments[i] for i in range(first, (node.end_lineno or node.lineno) + 1) if i in comments]
            found[node.target.id] = " ".join(line for line in lines if not line.startswith("type: "))
    return found


def line_comments(source: str) -> Iterator[tuple[int, str]]:
    """(line, comment) of a source text."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.removeprefix("#").strip()


def text_page(cls: type) -> str:
    """The page as plain text, for a terminal."""
    lines = ["\n\n".join(docstrings(cls)), "", "Keys:"]
    for key in keys(cls):
        default = "must be given" if key.default is None else f"default {key.default}"
        lines += [f"  {key.name}: {key.values}; {default}", *([f"      {key.comment}"] if key.comment else [])]
    return "\n".join(lines)
