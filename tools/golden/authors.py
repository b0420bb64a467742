"""What the scripts here share: draws that are given, and functions of a source file that cannot be imported whole."""

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))


@contextmanager
def given_draws(module: Any = torch, **draws: list[Any]) -> Iterator[None]:
    """Within it, these functions of the module return these values in order, whatever their arguments."""
    saved = {name: getattr(module, name) for name in draws}
    for name, values in draws.items():
        left = iter(values)
        setattr(module, name, lambda *args, left=left, **options: next(left))
    try:
        yield
    finally:
        for name, function in saved.items():
            setattr(module, name, function)


def functions(path: Path, names: tuple[str, ...], known: dict[str, Any], owner: str | None = None) -> SimpleNamespace:
    """These functions of a source file, or of its class `owner`, compiled from the checkout at run time without what
    else the file imports. known: the names that they use. Methods take their self as the first argument."""
    body: list[Any] = ast.parse(path.read_text()).body
    if owner is not None:
        body = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == owner).body
    chosen: list[Any] = [node for node in body if isinstance(node, ast.FunctionDef) and node.name in names]
    assert {node.name for node in chosen} == set(names), (path, names)
    for node in chosen:
        node.decorator_list = [d for d in node.decorator_list if ast.unparse(d) != "classmethod"]
    future: list[Any] = [ast.ImportFrom("__future__", [ast.alias("annotations")], 0)]
    module = ast.fix_missing_locations(ast.Module(future + chosen, []))
    scope = dict(known)
    exec(compile(module, str(path), "exec"), scope)
    return SimpleNamespace(**{name: scope[name] for name in names})


def normals(seed: int) -> Any:
    """A function of a shape: standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal
