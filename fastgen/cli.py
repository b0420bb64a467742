"""The command line. Nothing heavy is imported before a command runs."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    name="fastgen",
    help="Turn a diffusers pipeline into a few-step one, and know that it worked.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

PathArgument = Annotated[
    Path, typer.Argument(help="A run folder, an exported folder, or a diffusers pipeline folder.")
]
StepsOption = Annotated[int | None, typer.Option(min=1, help="Steps, of a plain pipeline or a flow map.")]
GuidanceOption = Annotated[float | None, typer.Option(min=0, help="Guidance scale, for a plain pipeline.")]
ScorerOption = Annotated[
    list[str] | None,
    typer.Option(help="NAME=PATH, a folder or hub id of a scorer, or NAME.KEY=VALUE; may be given several times."),
]
BatchOption = Annotated[int, typer.Option(min=1, help="Samples at a time; does not change the result.")]


def refuse(message: object) -> typer.Exit:
    """Prints why an argument or recipe is refused; raise what it returns: exit code 2."""
    print(f"refused: {message}", file=sys.stderr)
    return typer.Exit(2)


@app.command(context_settings={"ignore_unknown_options": True})
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value, the value read as YAML.")] = None,
) -> None:
    """Train a recipe; a run that is started again continues."""
    from fastgen.train import main

    raise typer.Exit(main([str(recipe), *(overrides or [])]))


@app.command(context_settings={"ignore_unknown_options": True})
def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe, YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value, the value read as YAML.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="How many share the run.")] = 1,
    memory: Annotated[float | None, typer.Option(min=0, help="GB of one; says what would make it fit.")] = None,
) -> None:
    """What a recipe needs: parameters, bytes, activations, network evaluations. Loads nothing, downloads nothing."""
    from rich.console import Console

    from fastgen.config import load_recipe
    from fastgen.planning.plan import plan as plan_recipe
    from fastgen.planning.report import report
    from fastgen.registry import RecipeError

    try:
        report(plan_recipe(load_recipe(recipe, overrides or []), gpus), memory and memory * 1e9, Console())
    except (RecipeError, ValueError) as error:
        raise refuse(error) from None


@app.command(context_settings={"ignore_unknown_options": True})
def prepare(
    recipe: Annotated[Path, typer.Argument(help="A recipe, YAML, whose data has prompts or images.")],
    output: Annotated[Path, typer.Option(help="Folder to write, or to continue.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value, the value read as YAML.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of what is stored.")] = "float32",
    shard_size: Annotated[int, typer.Option(min=1, help="Rows of a file.")] = 256,
    pairs: Annotated[int, typer.Option(min=0, help="ODE pairs of the teacher to sample as well.")] = 0,
    pair_steps: Annotated[int, typer.Option(min=1, help="Steps of the teacher's own scheduler for them.")] = 50,
    guidance_scale: Annotated[float, typer.Option(min=0, help="Guidance of the teacher for them.")] = 1.0,
) -> None:
    """Encode a recipe's prompts and images once; started again, it verifies and continues."""
    from fastgen.config import load_recipe
    from fastgen.data import DataError
    from fastgen.data.pairs import PairSettings
    from fastgen.registry import RecipeError
    from fastgen.run.prepare import prepare as prepare_folder

    try:
        loaded = load_recipe(recipe, overrides or [])
        wanted = PairSettings(pairs, pair_steps, guidance_scale, loaded.seed) if pairs else None
        manifest = prepare_folder(loaded, output, dtype, shard_size, wanted)
    except (RecipeError, ValueError) as error:
        raise refuse(error) from None
    except DataError as error:
        print(f"stopped: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print(f"interrupted; run the same command again to continue {output}", file=sys.stderr)
        raise typer.Exit(130) from None
    count = (manifest["pairs"] or {"count": 0})["count"]
    print(f"{manifest['num_samples']} samples, {manifest['num_prompts']} prompts and {manifest['num_pictures']} "
          f"latents{f' and {count} pairs' if count else ''} in {output}; train on them with "
          f"\"data={{name: prepared, folder: {output}}}\"")  # fmt: skip


@app.command()
def sample(
    pipeline: PathArgument,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file, one prompt a line.")] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Images of each prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Image i has seed SEED + i.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the images, which must be new or empty.")] = Path("samples"),
    num_steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
    batch_size: BatchOption = 16,
) -> None:
    """Write images (or points) and a grid, one seed an image."""
    from fastgen.sampling.folder import sample_folder

    try:
        texts = sample_folder(
            pipeline, prompt or [], prompts, num_images, seed, output, num_steps, guidance_scale, batch_size
        )
    except ValueError as error:
        raise refuse(error) from None
    print(f"{texts} samples in {output}")


@app.command(name="eval")
def evaluate(
    path: Annotated[
        Path, typer.Argument(help="A pipeline, a run or a folder of images; or results to compare (.json).")
    ],
    others: Annotated[list[Path] | None, typer.Argument(help="More results files, to compare on one page.")] = None,
    metrics: Annotated[str | None, typer.Option(help="Comma-separated; a run's own by default.")] = None,
    num_samples: Annotated[int | None, typer.Option(min=2)] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Sample i has seed SEED + i.")] = None,
    output: Annotated[Path, typer.Option(help="Results, JSON; an HTML page is written beside it.")] = Path(
        "results.json"
    ),
    prompts: Annotated[Path | None, typer.Option(help="A file, one prompt a line; 'neutral' ships with it.")] = None,
    reference: Annotated[str | None, typer.Option(help="'digits', or a folder of real images.")] = None,
    features: Annotated[str | None, typer.Option(help="Feature network of fid: digits or inception.")] = None,
    inception_weights: Annotated[
        str | None,
        typer.Option(help="Inception's weights: a local file, or ORG/NAME/FILE.pth on the hub."),
    ] = None,
    scorer: ScorerOption = None,
    num_steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Measure a pipeline, a run or a folder of images; print a table, write JSON and a page. It can be interrupted."""
    from fastgen.evaluation.config import scorer_keys
    from fastgen.evaluation.evaluate import compare, evaluate_path
    from fastgen.registry import RecipeError

    try:
        if path.suffix == ".json":
            compare([path, *(others or [])], output.with_suffix(".html"))
            return
        if others:
            raise ValueError("several paths are compared only when they are results files (.json)")
        evaluate_path(
            path, metrics=metrics, num_samples=num_samples, seed=seed, output=output, prompts=prompts,
            reference=reference, features=features, inception_weights=inception_weights, num_steps=num_steps,
            guidance_scale=guidance_scale, batch_size=batch_size, scorers=scorer_keys(scorer) if scorer else None,
        )  # fmt: skip
    except (RecipeError, ValueError, FileNotFoundError) as error:
        raise refuse(error) from None
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        raise typer.Exit(130) from None


@app.command()
def score(
    images: Annotated[Path, typer.Argument(help="A folder of images.")],
    metrics: Annotated[str, typer.Option(help="Comma-separated scorers: clip_score, hpsv2, ...")],
    prompts: Annotated[
        str | None, typer.Option(help="A file, one prompt for each image or one for all; by default the captions.")
    ] = None,
    scorer: ScorerOption = None,
    output: Annotated[Path, typer.Option(help="Scores of each image, JSON.")] = Path("scores.json"),
    batch_size: BatchOption = 16,
) -> None:
    """Score the images of a folder one by one; print a table, write JSON."""
    import torch
    from rich.console import Console

    from fastgen.evaluation.config import scorer_keys
    from fastgen.evaluation.scoring import score_folder, score_table

    names = [name.strip() for name in metrics.split(",") if name.strip()]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        result = score_folder(images, names, scorer_keys(scorer or []), prompts, output, batch_size, device)
    except ValueError as error:
        raise refuse(error) from None
    Console().print(score_table(result))
    print(f"scores of each image in {output}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder with at least one checkpoint.")],
    output: Annotated[Path | None, typer.Option(help="Folder to write; the run's export/ by default.")] = None,
    merge: Annotated[bool, typer.Option(help="Add a LoRA run's adapter into the weights: a whole pipeline.")] = False,
) -> None:
    """Write the moving average of a run's last checkpoint as a pipeline (or LoRA) that plain diffusers loads."""
    from fastgen.registry import RecipeError
    from fastgen.run.export import export_run

    try:
        print(f"exported to {export_run(run, output, merge)}")
    except (RecipeError, ValueError) as error:
        raise refuse(error) from None


def main() -> None:
    app()


if __name__ == "__main__":
    main()
