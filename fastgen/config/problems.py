"""Gathers what is wrong with a recipe."""

from collections.abc import Iterator
from contextlib import contextmanager

from fastgen.registry import RecipeError


class Problems:
    """Collects what is wrong with a recipe, so that all of it is said at once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def noting(self, section: str = "") -> Iterator[None]:
        """Notes a refusal inside the block, and goes on after it. section: what a ValueError's message begins with."""
        try:
            yield
        except RecipeError as error:
            self.lines += str(error).splitlines()
        except ValueError as error:
            self.lines += [f"{section}: {line}" for line in str(error).splitlines()]
        except OSError as error:  # such as a name that is too long for a file
            self.lines.append(f"{section}: cannot read {error.filename}: {error.strerror}".removeprefix(": "))

    def refuse(self) -> None:
        """Raises RecipeError if anything was noted. A message that nobody would read to its end is cut."""
        lines = [line if len(line) <= 2000 else f"{line[:2000]}..." for line in dict.fromkeys(self.lines)]
        if len(lines) > 50:
            lines[50:] = [f"and {len(lines) - 50:,} more mistakes"]
        if lines:
            raise RecipeError("\n".join(lines))
