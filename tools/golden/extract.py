"""Pieces of authors' code that is not importable on its own, taken from a checkout at run time and executed with
tensors of ours as its variables: functions, methods, and statements of a training loop. No code of theirs is kept."""

import ast
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any


class Given:
    """A module in which some names mean something else. A list stands for a function that returns its entries, one a
    call: the random draws of the authors' code, in their order."""

    def __init__(self, module: Any, **replaced: Any):
        self._module, self._replaced = module, replaced

    def __getattr__(self, name: str) -> Any:
        if name not in self._replaced:
            return getattr(self._module, name)
        value = self._replaced[name]
        return (lambda *_, **__: value.pop(0)) if isinstance(value, list) else value


def commit(checkout: Path) -> str:
    return subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()


def defined(path: Path, name: str, namespace: dict[str, Any]) -> Callable[..., Any]:
    """The function `f`, the class `C`, or the method `C.f` as a function of self, with these globals."""
    body: Any = ast.parse(path.read_text()).body
    *outer, last = name.split(".")
    for part in outer:
        body = next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == part)
    node = next(n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == last)
    if isinstance(node, ast.FunctionDef):
        node.returns = None
        for argument in node.args.args + node.args.kwonlyargs:
            argument.annotation = None
    exec(compiled([node], path), namespace)
    return namespace[last]  # type: ignore[no-any-return]


def statements(path: Path, first: str, until: str) -> CodeType:
    """The statements of one block, from the one that begins with `first` to the one before `until` begins."""
    for block in ast.walk(ast.parse(path.read_text())):
        for body in (getattr(block, "body", None), getattr(block, "orelse", None)):
            texts = [ast.unparse(node) for node in body] if isinstance(body, list) else []
            start = next((i for i, text in enumerate(texts) if text.startswith(first)), None)
            if start is None:
                continue
            stop = next((i for i, text in enumerate(texts) if i > start and text.startswith(until)), None)
            if stop is not None:
                return compiled(body[start:stop], path)  # type: ignore[index]
    raise ValueError(f"{path}: no block has statements that begin with {first!r} and later {until!r}")


def compiled(body: list[ast.stmt], path: Path) -> CodeType:
    return compile(ast.Module(body, type_ignores=[]), str(path), "exec")
