"""Any callable as a reward."""

import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.rewards.base import CONFIG, Input, Reward, Score


@dataclass(frozen=True, config=CONFIG)
class FunctionReward(Reward):
    """r(x, prompts) = function(x, prompts): [B], or a Score. function: a callable or, in a recipe, its import path
    `my_module:my_function`. `input` and `differentiable` must be given, because they cannot be read off a function."""

    function: str | Callable[[Tensor, Sequence[str]], Tensor | Score]
    input: Input = Field(kw_only=True)  # type: ignore[misc]
    differentiable: bool = Field(kw_only=True)  # type: ignore[misc]

    @field_validator("function")
    @classmethod
    def _callable(cls, value: Any) -> Any:
        if not callable(imported(value)):
            raise ValueError(f"{value} is not callable; give a function that can be called as f(x, prompts)")
        return value

    def score(self, x: Tensor, prompts: Sequence[str]) -> Tensor | Score:
        return imported(self.function)(x, prompts)

    @property
    def label(self) -> str:
        path = self.function if isinstance(self.function, str) else getattr(self.function, "__name__", "function")
        return path.rpartition(":")[2]


def imported(function: Any) -> Any:
    """Imports the object at an import path. Anything but a text is returned as it is. Raises ValueError if the import
    fails."""
    if not isinstance(function, str):
        return function
    try:
        return pkgutil.resolve_name(function)
    except (Exception, SystemExit) as error:  # the module's own code runs, and may raise anything
        raise ValueError(f"cannot import {function!r}: {error!r}") from None
