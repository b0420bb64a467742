"""The commands that train, and that prepare a training."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fastgen.commands.options import (
    Dtype,
    HeadroomOption,
    OverridesArgument,
    PriceOption,
    RecipeArgument,
    TflopsOption,
    UtilisationOption,
)
from fastgen.run.refusal import refuse


def read(recipe: Path, overrides: list[str] | None) -> Any:
    """The checked recipe. Until then, nothing is imported that takes seconds, except torch if it must."""
    from fastgen.config import load_recipe
    from fastgen.registry import RecipeError

    try:
        return load_recipe(recipe, overrides or [])
    except RecipeError as error:
        raise refuse(error) from None


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Python does not look for unused objects inside. The imports of a plan make a million objects that stay, and it
    takes 2 s of processor time to look through them again and again."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def train(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Train a recipe. A run that is started again goes on from its last checkpoint."""
    loaded = read(recipe, overrides)
    from fastgen.train import run_program

    raise typer.Exit(run_program(loaded))


def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    gpus: Annotated[int, typer.Option(min=1, help="The number of GPUs that share the run.")] = 1,
    memory: Annotated[
        float | None,
        typer.Option(min=0, help="The memory of one GPU, in GB. The plan then says which changes would make it fit."),
    ] = None,
    headroom: HeadroomOption = 0.05,
    tflops: TflopsOption = None,
    utilisation: UtilisationOption = 0.4,
    price: PriceOption = None,
) -> None:
    """Print what a recipe needs: parameters, memory, network evaluations and, for GPUs of a stated speed, time and
    price. No weights are loaded or downloaded."""
    with garbage_kept():
        loaded = read(recipe, overrides)
        from fastgen.planning.cost import Speed
        from fastgen.planning.plan import plan as plan_recipe
        from fastgen.planning.report import report
        from fastgen.run.terminal import console

        try:
            speed = Speed(tflops, utilisation, price) if tflops else None
            report(plan_recipe(loaded, gpus), memory and memory * 1e9, console(), headroom, speed)
        except ValueError as error:
            raise refuse(error) from None


def prepare(
    recipe: RecipeArgument,
    output: Annotated[Path, typer.Option(help="The folder to write, or to continue.")],
    overrides: OverridesArgument = None,
    dtype: Annotated[
        Dtype,
        typer.Option(help="The type in which prompt embeddings and latents are stored."),
    ] = "float32",
    shard_size: Annotated[
        int, typer.Option(min=1, help="Rows in one file, which is also the most that an interruption loses.")
    ] = 256,
    pairs: Annotated[
        int, typer.Option(min=0, help="How many ODE pairs to make as well: a noise and the teacher's sample from it.")
    ] = 0,
    pair_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps that the teacher's own scheduler takes for an ODE pair. By default 50."),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0, help="The guidance scale of the teacher for ODE pairs. By default 1.")
    ] = None,
) -> None:
    """Encode a recipe's prompts and images once, into a folder to train on.

    The command can be interrupted. Started again, it checks the files that are there and makes the others. Several
    processes divide the work: torchrun --nproc_per_node 8 -m fastgen prepare ..."""
    loaded = read(recipe, overrides)
    from fastgen.data import DataError
    from fastgen.data.pairs import PairSettings
    from fastgen.run.prepare import prepare as prepare_folder

    try:
        if not pairs and (pair_steps, guidance_scale) != (None, None):
            raise ValueError("--pair-steps and --guidance-scale are of ODE pairs; give --pairs, how many to make")
        scale = 1.0 if guidance_scale is None else guidance_scale
        wanted = PairSettings(pairs, pair_steps or 50, scale, loaded.seed) if pairs else None
        manifest = prepare_folder(loaded, output, dtype, shard_size, wanted)
    except ValueError as error:
        raise refuse(error) from None
    except DataError as error:
        print(f"stopped: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print(f"interrupted; run the same command again to continue {output}", file=sys.stderr)
        raise typer.Exit(130) from None
    kind = "images" if manifest.get("only_images") else "latents"
    counts = (
        f"{manifest['num_samples']} samples, {manifest['num_prompts']} prompts and {manifest['num_pictures']} {kind}"
    )
    if manifest["pairs"]:
        counts += f" and {manifest['pairs']['count']} pairs"
    if os.environ.get("RANK", "0") == "0":  # the first of several processes
        print(f'{counts} in {output}; train on them with "data={{name: prepared, folder: {output}}}"')
