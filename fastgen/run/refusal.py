"""How the command line refuses something."""

import sys

import typer


def refuse(message: object) -> typer.Exit:
    """Prints why an argument or a recipe is refused. The caller raises what this returns: exit code 2."""
    print(f"refused: {message}", file=sys.stderr)
    return typer.Exit(2)
