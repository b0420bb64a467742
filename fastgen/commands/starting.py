"""The commands that help with a first recipe. Like fastgen.cli, it imports nothing heavy before a command runs."""

from pathlib import Path
from typing import Annotated

import typer

import fastgen
from fastgen.commands.options import ScorerOption
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
    from fastgen.config.schema import is_schema, recipe_schema_text
    from fastgen.data.files import check_output, replace_file

    text = recipe_schema_text()
    if output is None:
        print(text, end="")
        return
    try:
        if output.is_file() and not is_schema(output):
            raise ValueError(f"{output} exists, and holds no schema; choose another --output")
        check_output(output, overwrite=True)
    except ValueError as error:
        raise refuse(error) from None
    replace_file(output, text)


def objectives(
    name: Annotated[str | None, typer.Argument(help="One of them, to read its page.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the table, or one row of it, as JSON.")] = False,
) -> None:
    """List what each objective needs, trains, gives and costs, or print the page of one.

    networks held: those of the teacher's size, with the moving average. evaluations: of networks for a sample in an
    update of a four-step student, with a guided teacher."""
    from fastgen.registry import OBJECTIVES, nearest, resolve
    from fastgen.run.terminal import console, print_table

    try:
        if name is not None and name not in OBJECTIVES and ":" not in name:
            raise ValueError(f"there is no objective {name}{nearest(name, OBJECTIVES)}")
        if name is not None and not json:
            from fastgen.objectives.base import Objective
            from fastgen.starting.pages import text_page

            print(text_page(resolve("objective", name, OBJECTIVES, Objective)))
            return
        from fastgen.starting.objectives import as_json, as_table, summary

        rows = [summary(chosen) for chosen in ([name] if name is not None else OBJECTIVES)]
    except ValueError as error:
        raise refuse(error) from None
    if json:
        print(as_json(rows))
    else:
        print_table(as_table(rows), console())


def new(
    pipeline: Annotated[
        str,
        typer.Argument(
            help="A diffusers pipeline: a folder, a hub id, or one that ships with fastgen, assets/emoji/teacher or "
            "assets/teachers/digits, which these names find from any folder."
        ),
    ],
    steps: Annotated[int, typer.Option(min=1, help="The number of steps of the student.")] = 4,
    objective: Annotated[str, typer.Option(help="The method.")] = "dmd2",
    prompts: Annotated[str | None, typer.Option(help="A file of prompts: txt, csv, tsv, jsonl or parquet.")] = None,
    images: Annotated[
        str | None, typer.Option(help="A folder of pictures with captions, for methods that train on pictures.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=1, help="GB of one GPU. By default those of the GPU here, or else 80.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="The number of GPUs.")] = 1,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="The teacher's. By default the one that the pipeline's card recommends (inference.parameters in its "
            "metadata), or that of its own call.",
        ),
    ] = None,
    scorer: ScorerOption = None,
    output: Annotated[Path, typer.Option(help="The file to write, which must not exist.")] = Path("recipe.yaml"),
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Ask for steps, method, prompts and GPUs.")
    ] = False,
) -> None:
    """Write a complete recipe for a pipeline, with a comment for every choice."""
    from fastgen.data.files import check_output, replace_file

    try:
        check_output(output, overwrite=False)
        if interactive:
            steps, objective = typer.prompt("steps", steps, type=int), typer.prompt("method", objective)
            prompts = typer.prompt("a file of prompts (nothing: those that ship)", prompts or "") or None
            gpus = typer.prompt("number of GPUs", gpus, type=int)
        from fastgen.evaluation.config import scorer_keys
        from fastgen.starting.new import Wishes, first_recipe, next_commands

        keys = scorer_keys(scorer or [])
        wishes = Wishes(pipeline, steps, objective, prompts, images, memory, gpus, keys, guidance_scale)
        text, plan = first_recipe(wishes)
    except ValueError as error:
        raise refuse(error) from None
    replace_file(output, text)
    print(f"wrote {output}; by its plan, {plan.peak / 1e9:.1f} GB on each of {gpus} GPU(s). Then:")
    for command in next_commands(output, plan.recipe):
        print(f"  {command}")
