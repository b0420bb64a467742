"""Pieces of authors' code, taken from a checkout at run time and run on tensors of ours: a module by its path, a
method as a function of self, statements of a training loop. Nothing of it is kept."""

import ast
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))


def checkout_of(repository: str, commit: str) -> Path:
    """The checkout that the command line gives."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} CHECKOUT, a checkout of {repository} at {commit[:12]}")
    return Path(sys.argv[1]).resolve()


def module_at(path: Path) -> ModuleType:
    """A module that imports nothing of its own package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def method(path: Path, name: str, known: dict[str, Any]) -> Callable[..., Any]:
    """The function or class `f`, or the method `Class.f` as a function of self. known: the globals that it uses."""
    body: Any = ast.parse(path.read_text()).body
    *outer, last = name.split(".")
    for part in outer:
        body = next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == part)
    node = next(node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == last)
    node.decorator_list = []
    future: list[ast.stmt] = [ast.ImportFrom("__future__", [ast.alias("annotations")], 0)]
    scope = dict(known)
    exec(compile(ast.fix_missing_locations(ast.Module([*future, node], [])), str(path), "exec"), scope)
    return scope[last]  # type: ignore[no-any-return]


def statements(path: Path, first: str, until: str) -> CodeType:
    """The statements of one block, from the one that begins with `first` to the one before `until` begins."""
    for block in ast.walk(ast.parse(path.read_text())):
        for body in (getattr(block, "body", None), getattr(block, "orelse", None)):
            texts = [ast.unparse(node) for node in body] if isinstance(body, list) else []
            start = next((i for i, text in enumerate(texts) if text.startswith(first)), None)
            stop = next((i for i, text in enumerate(texts) if start is not None and text.startswith(until)), None)
            if stop is not None and isinstance(body, list):
                return compile(ast.Module(body[start:stop], []), str(path), "exec")
    raise ValueError(f"{path}: no block has statements that begin with {first!r} and later {until!r}")


class Torch:
    """torch as a method sees it: on the CPU, in float64, with draws that are given. A function with a list returns its
    next tensor, whatever the arguments; randn and randn_like share one."""

    def __init__(self, normals: list[Tensor] | None = None, **draws: list[Tensor]):
        self.draws = {"randn": normals, "randn_like": normals, **draws}

    def __getattr__(self, name: str) -> Any:
        if name == "device":
            return lambda *_: torch.device("cpu")
        if name == "float32":
            return torch.float64
        given = self.draws.get(name)
        return getattr(torch, name) if given is None else lambda *_, **__: given.pop(0).clone()


@contextmanager
def in_float64() -> Iterator[None]:
    """Where the authors' code casts to float32, `float()` is `double()` here."""
    with patch.object(Tensor, "float", Tensor.double):
        yield


def normals(seed: int) -> Callable[..., Tensor]:
    """A function of a shape: standard normal numbers of our own, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal
