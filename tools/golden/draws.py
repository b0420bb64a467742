"""How authors' code is run: on random numbers that are given, and in float64 on the CPU."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

KINDS = {
    **{"randn": "normal", "randn_like": "normal", "rand": "uniform", "rand_like": "uniform"},
    **{"randint": "integer", "randperm": "integer", "multinomial": "integer"},
}


class Random:
    """Numbers of our own, float64, from one generator."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)


class GivenDraws(TorchFunctionMode):
    """Inside, torch's random functions return these tensors in order, in the shape that is asked for; where a size of
    it is 0, in their own. Raises where one is missing, has another number of elements, or is left over."""

    def __init__(self, normal: Sequence[Tensor] = (), uniform: Sequence[Tensor] = (), integer: Sequence[Tensor] = ()):
        super().__init__()
        self.left = {"normal": list(normal), "uniform": list(uniform), "integer": list(integer)}

    def __exit__(self, error: Any, *rest: Any) -> None:
        super().__exit__(error, *rest)
        assert error is not None or not any(self.left.values()), self.left

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = getattr(function, "__name__", ""), kwargs or {}
        if name not in KINDS:
            return function(*args, **options)
        value, shape = self.left[KINDS[name]].pop(0).clone(), shape_of(name, args, options)
        return value.reshape(shape) if shape and all(shape) else value


def shape_of(name: str, args: Any, options: dict[str, Any]) -> tuple[int, ...] | None:
    """The shape that a call of a random function asks for, where its arguments tell it."""
    if name.endswith("_like"):
        return tuple(args[0].shape)
    sizes = [options["size"]] if "size" in options else [a for a in args if isinstance(a, tuple | list)]
    if not sizes and name in ("rand", "randn"):
        sizes = [args]
    return tuple(sizes[0]) if sizes else None


class Float64(TorchFunctionMode):
    """Inside, casts to float32 and to float16 are casts to float64, and a GPU is the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.cuda:
            return args[0]
        function = Tensor.double if function is Tensor.float else function
        return function(*map(replaced, args), **{name: replaced(value) for name, value in (kwargs or {}).items()})


def replaced(value: Any) -> Any:
    if value is torch.float32 or value is torch.float16:
        return torch.float64
    is_cuda = isinstance(value, str | torch.device) and str(value).startswith("cuda")
    return torch.device("cpu") if is_cuda else value
