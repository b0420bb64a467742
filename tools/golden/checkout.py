"""Pieces of authors' code, taken from a checkout at run time: a module, a function, a class or a method by its name,
and statements of a block where a training loop has no function that could be called. Nothing of it is kept."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any
from unittest.mock import MagicMock

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))


@dataclass(frozen=True)
class Checkout:
    """A checkout of this commit of a repository on GitHub. Paths of its methods are those in the repository."""

    repository: str
    commit: str
    root: Path

    def save(self, name: str, tensors: dict[str, Tensor], source: str) -> None:
        """source: "path, functions" or "path, function (part)" of what was run; several are separated by "; "."""
        from golden_rows import save_golden

        save_golden(name, tensors, self.repository, self.commit, source)

    def make_importable(self, folder: str = "") -> None:
        sys.path.insert(0, str(self.root / folder))

    def module(self, path: str) -> Any:
        """The module of one file, which imports nothing of its own package."""
        spec = importlib.util.spec_from_file_location(Path(path).stem, self.root / path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def define(self, path: str, name: str, known: dict[str, Any]) -> Any:
        """The function or class `f`, or the method `C.f` as a function of self. known: the names that it uses, to
        which its own is added."""
        body: Any = ast.parse((self.root / path).read_text()).body
        *outer, last = name.split(".")
        for part in outer:
            body = next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == part)
        node = next(n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == last)
        kinds = ("classmethod", "staticmethod")
        node.decorator_list = [part for part in node.decorator_list if ast.unparse(part) not in kinds]
        annotations = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
        self._execute(path, [annotations, node], known)
        return known[last]

    def bind(self, self_: Any, path: str, owner: str, names: Iterable[str], known: dict[str, Any]) -> None:
        """Makes methods of the class `owner` those of self_, a stand-in with the attributes that they use."""
        for name in names:
            setattr(self_, name, MethodType(self.define(path, f"{owner}.{name}", dict(known)), self_))

    def execute(self, path: str, first: str, until: str | None, variables: dict[str, Any]) -> None:
        """Executes statements of one block, from the one that begins with `first` to the one before `until` begins;
        without `until`, that one alone."""
        for block in ast.walk(ast.parse((self.root / path).read_text())):
            for body in (getattr(block, "body", None), getattr(block, "orelse", None)):
                texts = [ast.unparse(node) for node in body] if isinstance(body, list) else []
                start = next((i for i, text in enumerate(texts) if text.startswith(first)), len(texts))
                later = (i for i, text in enumerate(texts) if i > start and until and text.startswith(until))
                stop = next(later, start + 1 if until is None and start < len(texts) else start)
                if stop > start:
                    self._execute(path, body[start:stop], variables)  # type: ignore[index]
                    return
        raise ValueError(f"{path}: no block has statements that begin with {first!r} and later {until!r}")

    def _execute(self, path: str, body: list[ast.stmt], variables: dict[str, Any]) -> None:
        module = ast.fix_missing_locations(ast.Module(body, []))
        exec(compile(module, str(self.root / path), "exec"), variables)


def checkout_of(repository: str, commit: str) -> Checkout:
    """The checkout that the command line gives. An export of the commit, which has no history, is taken as it is."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} CHECKOUT, a checkout of {repository} at {commit}")
    root = Path(sys.argv[1]).resolve()
    if not root.is_dir():
        sys.exit(f"{root} is not a folder; give a checkout of {repository} at {commit}")
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if head != commit:
            sys.exit(f"{root} is at {head}; the numbers are of {commit}: check that commit out")
    return Checkout(repository, commit, root)


def stub(*names: str) -> None:
    """Puts modules in which every name exists in the place of imports that what is called does not use."""
    for name in names:
        module = MagicMock(name=name)
        module.__spec__, module.__path__ = None, []
        sys.modules[name] = module


def package(name: str, folder: Path) -> None:
    """A package whose modules are those of the folder, without running its __init__.py."""
    module = ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module
