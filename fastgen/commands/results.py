"""The commands that hand a student on."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fastgen.commands.options import Dtype, torch_dtype
from fastgen.run.refusal import refuse


def export(
    run: Annotated[Path, typer.Argument(help="A run folder with at least one checkpoint.")],
    output: Annotated[
        Path | None, typer.Option(help="The folder to write. By default the folder export in the run folder.")
    ] = None,
    merge: Annotated[
        bool, typer.Option(help="Add the adapter of a LoRA run into the weights, which gives a whole pipeline.")
    ] = False,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="The type in which the student's networks are stored, by default as those of its teacher, and an "
            "adapter as it was trained. Text encoders and VAE are copied as they are."
        ),
    ] = None,
    form: Annotated[
        Literal["diffusers", "lora", "checkpoint", "diffusion_model", "fp8", "gguf"],
        typer.Option(help="Another program's file, of the last checkpoint or of an export: docs/exporting.md."),
    ] = "diffusers",
    steps: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="With --form: another number of steps, if the student can. May be given several times."
        ),
    ] = None,
) -> None:
    """Write the student of a run's last checkpoint as a pipeline (or LoRA) that plain diffusers loads.

    Its weights are the moving average that the run keeps of them."""
    from fastgen.registry import RecipeError

    try:
        if form == "diffusers":
            from fastgen.run.export import export_run

            if steps:
                raise ValueError("--steps is for the files of other programs; give --form")
            folder = export_run(run, output, merge, dtype=torch_dtype(dtype))
        else:
            from fastgen.exporting.forms import export_form  # with diffusers

            if dtype:
                raise ValueError("--dtype is for a diffusers folder; leave out --form or --dtype")

            folder = export_form(run, form, output, merge, steps or ())
        print(f"exported to {folder}")
    except (RecipeError, ValueError) as error:
        raise refuse(error) from None


def combine(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders, or exports, one for each part of the prompts (the key part)."),
    ],
    output: Annotated[Path, typer.Option(help="The folder to write.")],
) -> None:
    """Write several students, each distilled for its own prompts, as one pipeline that routes prompts to them."""
    from fastgen.run.combine import combine as combine_runs

    try:
        print(f"combined in {combine_runs(runs, output)}")
    except ValueError as error:
        raise refuse(error) from None


def push(
    run: Annotated[Path, typer.Argument(help="A run folder, or an export.")],
    repository: Annotated[str, typer.Argument(help="The repository on the hub, NAME/REPOSITORY.")],
    private: Annotated[bool, typer.Option("--private", help="Nobody else sees a repository that is made.")] = False,
) -> None:
    """Upload an export with its model card to the hub."""
    from fastgen.run.push import push as push_export

    try:
        print(f"uploaded to {push_export(run, repository, private)}")
    except ValueError as error:
        raise refuse(error) from None
