"""fastgen: turn a diffusers pipeline into a few-step one, and know that it worked.

`fastgen.distill`, `load`, `evaluate`, `score`, `load_recipe` and `list_objectives` are the Python interface, which
fastgen.api describes."""

from typing import Any

__version__ = "0.2.0"
__all__ = ["distill", "evaluate", "list_objectives", "load", "load_recipe", "score"]


def __getattr__(name: str) -> Any:
    """The functions of fastgen.api, which takes seconds to import, when one of them is used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastgen import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
