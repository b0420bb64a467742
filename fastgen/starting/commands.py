"""The commands that help with a first recipe. Like fastgen.cli, it imports nothing heavy before a command runs."""

from pathlib import Path
from typing import Annotated

import typer

import fastgen
from fastgen.run.refusal import refuse


def version(asked: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Turn a diffusers pipeline into a few-step one, and know that it worked."""
    if asked:
        print(f"fastgen {fastgen.__version__}")
        raise typer.Exit


def recipes(
    name: Annotated[str | None, typer.Argument(help="One that ships, to copy it here.")] = None,
    output: Annotated[Path | None, typer.Option(help="The file to write. By default NAME.yaml.")] = None,
) -> None:
    """List the recipes that ship with fastgen, or copy one of them to change it."""
    from fastgen.starting import shipped

    if name is not None:
        try:
            print(f"copied to {shipped.copy_recipe(name, output)}")
        except ValueError as error:
            raise refuse(error) from None
        return
    from rich.table import Table

    from fastgen.run.terminal import console

    table = Table("recipe", "what it does", "run to its end")
    for file in shipped.recipe_files():
        text = file.read_text()
        table.add_row(file.stem, shipped.summary(text), "" if shipped.is_unverified(text) else "yes")
    console().print(table)


def schema(
    output: Annotated[Path | None, typer.Option(help="The file to write. By default it is printed.")] = None,
) -> None:
    """Write the JSON schema of recipes, with which an editor completes and checks them."""
    from fastgen.config.schema import recipe_schema_text
    from fastgen.data.files import replace_file

    text = recipe_schema_text()
    if output is None:
        print(text, end="")
    else:
        replace_file(output, text)
