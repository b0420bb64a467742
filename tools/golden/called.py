"""What the scripts of the distribution-matching family share: how authors' code is imported and called.

Their code casts to float32 in places and draws from torch's global generator. Under `called_with`, `float()` means
`double()`, and every draw is the next of the tensors that the script gives."""

import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

DRAWS = {
    "randn": "normals",
    "randn_like": "normals",
    "randint": "integers",
    "rand": "uniforms",
    "rand_like": "uniforms",
}


def checkout_of(repository: str, commit: str) -> Path:
    """The checkout that the command line gives; its folder becomes importable."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} CHECKOUT, a checkout of {repository} at {commit[:12]}")
    checkout = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(checkout))
    return checkout


def stub(*names: str) -> None:
    """Puts empty modules in the place of imports that what is called does not use."""
    for name in names:
        module = MagicMock(name=name)
        module.__spec__, module.__path__ = None, []
        sys.modules[name] = module


def package(name: str, folder: Path) -> None:
    """A package whose modules are those of the folder, without running its __init__.py."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


def module_at(path: Path) -> Any:
    """The module of one file, imported by itself."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def called_with(
    normals: Sequence[Tensor] = (), integers: Sequence[Tensor | int] = (), uniforms: Sequence[Tensor] = ()
) -> Iterator[None]:
    """Inside, `float()` is `double()` and torch's draws are these, in order. Raises where a draw is missing, has
    another number of elements, or is left over."""
    left = {"normals": list(normals), "integers": list(integers), "uniforms": list(uniforms)}

    def draw(name: str) -> Any:
        def next_draw(*args: Any, **options: Any) -> Tensor:
            value = torch.as_tensor(left[DRAWS[name]].pop(0))
            like = args[0] if args and isinstance(args[0], Tensor) else None
            size = options.get("size", args[2] if name == "randint" and len(args) > 2 else None)
            shape = like.shape if like is not None else size
            return value.clone() if shape is None else value.clone().reshape(tuple(shape))

        return next_draw

    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.Tensor, "float", torch.Tensor.double))
        for name in DRAWS:
            stack.enter_context(patch.object(torch, name, draw(name)))
        yield
    assert not any(left.values()), {name: len(values) for name, values in left.items()}


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers of our own, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients_of(network: Any, loss: Tensor) -> Tensor:
    """The gradient of a loss with respect to all parameters of a GoldenNetwork, as one vector."""
    network.zero_grad()
    loss.backward()
    return network.flat().clone()
