"""Variants of one test of which a few run with every change, and the others where there is more time."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def mostly_slow(values: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Parameters of a test: those in `quick` as they are, all others marked slow. A tuple is several arguments."""
    return [value if value in quick else slow(value) for value in values]


def slow(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
