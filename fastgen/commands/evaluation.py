"""The commands that measure samples and score pictures."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from fastgen.commands.options import (
    AdapterOption,
    BatchOption,
    DtypeOption,
    FirstOption,
    GuidanceOption,
    NegativeOption,
    ScorerOption,
    StepsOption,
    TeacherGuidanceOption,
    TeacherStepsOption,
    torch_dtype,
)
from fastgen.run.refusal import refuse


def evaluate(
    path: Annotated[
        Path,
        typer.Argument(
            help="A run folder, a pipeline folder or a folder of images, to be measured; or a results file (.json), "
            "to be compared with others."
        ),
    ],
    others: Annotated[
        list[Path] | None, typer.Argument(help="More results files, to be compared on one page.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="What to measure: names with commas between them. By default the metrics of the run's recipe."
        ),
    ] = None,
    num_samples: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="How many samples to measure. By default the number in the run's recipe, or all images of a folder, "
            "or 599 of any other pipeline.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=1 << 62, help="Sample i is drawn with the seed SEED + i.")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="The file for the results (JSON). An HTML page is written beside it.")
    ] = Path("results.json"),
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A file with one prompt on each line, or 'neutral' for the 64 that ship with fastgen. For a folder "
            "of images: one for each of them, in the order of their names, or one for all."
        ),
    ] = None,
    choice: Annotated[
        Literal["spread", "first"] | None,
        typer.Option(
            help="Which of a longer list of prompts or pictures are taken: spread over it, by the seed, or the first "
            "ones. By default as the run's recipe says, or else spread."
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="A folder of pictures, or of control videos, to make the samples from, for a pipeline that takes one."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="What to compare with: a folder of real images, 'teacher' for its samples, or 'digits'."),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(help="The network whose features are compared: 'digits', 'inception', 'clip' or 'latents'."),
    ] = None,
    inception_weights: Annotated[
        str | None, typer.Option(help="The weights of inception: a local file, or ORG/NAME/FILE.pth on the hub.")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="The CLIP whose features are compared: a folder, or a hub id.")
    ] = None,
    scorer: ScorerOption = None,
    num_steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
    negative_prompt: NegativeOption = None,
    dtype: DtypeOption = None,
    teacher_first: FirstOption = 0,
    teacher_steps: TeacherStepsOption = None,
    teacher_guidance: TeacherGuidanceOption = None,
    adapter: AdapterOption = None,
    student_only: Annotated[
        bool,
        typer.Option("--student-only", help="Leave out the rows of a student's teacher, and its model card as it is."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the results file and the page if they exist.")
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many samples are computed at a time. By default the number in the run's recipe."
        ),
    ] = None,
) -> None:
    """Measure a run, a pipeline or a folder of images: print a table, write the results and an HTML page.

    A student stands beside its teacher, at the numbers of steps that the run's recipe gives (eval.teacher_steps), and
    its model card gets the numbers of both.

    The command can be interrupted. Started again, it goes on where it was."""
    from fastgen.evaluation.config import scorer_keys
    from fastgen.evaluation.folders import evaluate_path
    from fastgen.evaluation.results import compare
    from fastgen.registry import RecipeError
    from fastgen.sampling.adapters import Adapter

    try:
        if path.suffix == ".json":
            compare([path, *(others or [])], output.with_suffix(".html"), overwrite)
            return
        if others:
            raise ValueError("several paths are compared only when they are results files (.json)")
        evaluate_path(
            path,
            metrics=metrics,
            num_samples=num_samples,
            seed=seed,
            output=output,
            prompts=prompts,
            choice=choice,
            images=images,
            reference=reference,
            features=features,
            inception_weights=inception_weights,
            clip=clip,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            dtype=torch_dtype(dtype),
            batch_size=batch_size,
            overwrite=overwrite,
            student_only=student_only,
            scorers=scorer_keys(scorer) if scorer else None,
            teacher_first=teacher_first,
            teacher_steps=None if teacher_steps is None else (teacher_steps,),
            teacher_guidance_scale=teacher_guidance,
            adapters=[Adapter.parse(text) for text in adapter or ()],
        )
    except (RecipeError, ValueError, FileNotFoundError) as error:
        raise refuse(error) from None
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        raise typer.Exit(130) from None


def score(
    images: Annotated[Path, typer.Argument(help="A folder of images.")],
    metrics: Annotated[
        str, typer.Option(help="The scorers, names with commas between them, such as clip_score,hpsv2.")
    ],
    prompts: Annotated[
        str | None,
        typer.Option(
            help="A file with one prompt for each image, or with one for all. By default each image's caption, "
            "which is in the .txt file of the same name."
        ),
    ] = None,
    scorer: ScorerOption = None,
    output: Annotated[Path, typer.Option(help="The file for the scores of each image (JSON).")] = Path("scores.json"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    batch_size: BatchOption = 16,
) -> None:
    """Score the images of a folder one by one: print a table, write all scores."""
    import torch

    from fastgen.evaluation.config import scorer_keys
    from fastgen.evaluation.scoring import score_folder, score_table
    from fastgen.run.terminal import console, print_table

    names = [name.strip() for name in metrics.split(",") if name.strip()]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        keys = scorer_keys(scorer or [])
        result = score_folder(images, names, keys, prompts, output, batch_size, device, overwrite=overwrite)
    except ValueError as error:
        raise refuse(error) from None
    print_table(score_table(result), console())
    print(f"scores of each image in {output}")
