"""The command line. Nothing heavy is imported before a command runs, so that every `--help` answers at once."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastgen.run.options import (
    BatchOption,
    Dtype,
    DtypeOption,
    FirstOption,
    GuidanceOption,
    HeadroomOption,
    NegativeOption,
    OverridesArgument,
    PipelineArgument,
    PriceOption,
    RecipeArgument,
    ScorerOption,
    StepsOption,
    TeacherGuidanceOption,
    TeacherStepsOption,
    TflopsOption,
    UtilisationOption,
    torch_dtype,
)
from fastgen.run.quiet import quiet_libraries
from fastgen.run.refusal import refuse
from fastgen.starting import commands

app = typer.Typer(
    name="fastgen",
    help="Turn a diffusers pipeline into a few-step one, and know that it worked.",
    no_args_is_help=True,
    # Without this, typer imports pydantic for `fastgen train --help`: to convert the values of fastgen's own --help,
    # --version and so on, which are not given. It converts no bool.
    context_settings={"default_map": dict.fromkeys(("help", "asked", "install_completion", "show_completion"), False)},
    pretty_exceptions_enable=False,
)


app.callback(invoke_without_command=True)(commands.version)
app.command()(commands.new)
app.command()(commands.recipes)
app.command()(commands.objectives)
app.command()(commands.schema)


def read(recipe: Path, overrides: list[str] | None) -> Any:
    """The checked recipe. Until then, nothing is imported that takes seconds, except torch if it must."""
    from fastgen.config import load_recipe
    from fastgen.registry import RecipeError

    try:
        return load_recipe(recipe, overrides or [])
    except RecipeError as error:
        raise refuse(error) from None


@app.command(context_settings={"ignore_unknown_options": True})
def train(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Train a recipe. A run that is started again goes on from its last checkpoint."""
    loaded = read(recipe, overrides)
    from fastgen.train import run_program

    raise typer.Exit(run_program(loaded))


@app.command(context_settings={"ignore_unknown_options": True})
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


@app.command(context_settings={"ignore_unknown_options": True})
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
        int, typer.Option(min=1, help="Steps that the teacher's own scheduler takes for an ODE pair.")
    ] = 50,
    guidance_scale: Annotated[
        float, typer.Option(min=0, help="The guidance scale of the teacher for ODE pairs.")
    ] = 1.0,
) -> None:
    """Encode a recipe's prompts and images once, into a folder to train on.

    The command can be interrupted. Started again, it checks the files that are there and makes the others. Several
    processes divide the work: torchrun --nproc_per_node 8 -m fastgen prepare ..."""
    loaded = read(recipe, overrides)
    from fastgen.data import DataError
    from fastgen.data.pairs import PairSettings
    from fastgen.run.prepare import prepare as prepare_folder

    try:
        wanted = PairSettings(pairs, pair_steps, guidance_scale, loaded.seed) if pairs else None
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


@app.command()
def sample(
    pipeline: PipelineArgument,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt. May be given several times.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file with one prompt on each line.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help="A picture, or a control video, to make the sample from, for a pipeline that takes one. Give one for "
            "all prompts, or one for each."
        ),
    ] = None,
    num_images: Annotated[int, typer.Option(min=1, help="How many images to make of each prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=1 << 62, help="Image i is drawn with the seed SEED + i.")] = 0,
    output: Annotated[Path, typer.Option(help="The folder for the images, which must be new or empty.")] = Path(
        "samples"
    ),
    num_steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
    negative_prompt: NegativeOption = None,
    dtype: DtypeOption = None,
    batch_size: BatchOption = 16,
    teacher_first: FirstOption = 0,
    teacher_steps: TeacherStepsOption = None,
    teacher_guidance: TeacherGuidanceOption = None,
    views: Annotated[
        bool,
        typer.Option("--views", help="Also write views.png: the clean prediction of each step of the first samples."),
    ] = False,
) -> None:
    """Write images, videos or points that a pipeline samples, and a grid of them, into a folder.

    Each is drawn with a seed of its own, so that it does not depend on the others."""
    from fastgen.sampling.folder import sample_folder

    try:
        count = sample_folder(
            pipeline,
            prompt or [],
            prompts,
            num_images,
            seed,
            output,
            num_steps,
            guidance_scale,
            batch_size,
            negative_prompt,
            image or [],
            torch_dtype(dtype),
            teacher_first,
            teacher_steps,
            teacher_guidance,
            views,
        )
    except ValueError as error:
        raise refuse(error) from None
    print(f"{count} samples in {output}")


@app.command()
def stream(
    pipeline: Annotated[
        Path, typer.Argument(help="A run folder, or its export, of a student that makes videos chunk by chunk.")
    ],
    prompt: Annotated[str, typer.Option(help="What the video begins with.")],
    seconds: Annotated[float, typer.Option(min=0.001, help="How long the video is.")],
    at: Annotated[
        list[str] | None,
        typer.Option(
            help='SECONDS:PROMPT, such as 12:"a red fox": another prompt, from the first chunk on that begins then or '
            "later. May be given several times."
        ),
    ] = None,
    recache: Annotated[
        bool,
        typer.Option("--recache", help="With each new prompt, compute again what the student remembers of the past."),
    ] = False,
    window: Annotated[
        int | None, typer.Option(min=1, help="How many latent frames a chunk sees. By default as in training.")
    ] = None,
    sink: Annotated[
        int | None, typer.Option(min=0, help="How many first latent frames stay visible. By default as in training.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Allow a window or a sink that the student was not trained with.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=1 << 62, help="The seed of the video.")] = 0,
    output: Annotated[Path, typer.Option(help="The video (mp4). It grows as pictures are made.")] = Path("stream.mp4"),
    report: Annotated[Path | None, typer.Option(help="A file for the measured speed (JSON).")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the video and the report.")] = False,
    device: Annotated[str | None, typer.Option(help="cuda or cpu. By default a GPU, if there is one.")] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="The precision of all networks. By default bfloat16 on a GPU and float32 on a CPU."),
    ] = None,
) -> None:
    """Write a video chunk by chunk, as it is made, and say how fast that goes.

    Ctrl-C ends the video; what is written by then can be played."""
    import torch

    from fastgen.data.files import write_json
    from fastgen.sampling.speed import summary
    from fastgen.sampling.stream import StreamRequest, parse_change, stream_video

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    try:
        measured = stream_video(
            StreamRequest(
                path=pipeline,
                prompt=prompt,
                seconds=seconds,
                output=output,
                changes=tuple(parse_change(text) for text in at or ()),
                recache=recache,
                window=window,
                sink=sink,
                force=force,
                seed=seed,
                device=device,
                dtype=getattr(torch, precision),
                report=report,
                overwrite=overwrite,
            )
        )
    except ValueError as error:
        raise refuse(error) from None
    except KeyboardInterrupt:
        print("interrupted before the first pictures", file=sys.stderr)
        raise typer.Exit(130) from None
    if report is not None:
        write_json(report, measured)
    print(f"{summary(measured)}\n{measured['pictures']} pictures in {output}")
    if measured["interrupted"]:
        raise typer.Exit(130)


@app.command(name="eval")
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
            help="How many samples to measure. By default the number in the run's recipe, or all images of a folder.",
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
        typer.Option(help="A file with one prompt on each line, or 'neutral' for the 64 that ship with fastgen."),
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

    The command can be interrupted. Started again, it goes on where it was."""
    from fastgen.evaluation.config import scorer_keys
    from fastgen.evaluation.folders import evaluate_path
    from fastgen.evaluation.results import compare
    from fastgen.registry import RecipeError

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
            scorers=scorer_keys(scorer) if scorer else None,
            teacher_first=teacher_first,
            teacher_steps=None if teacher_steps is None else (teacher_steps,),
            teacher_guidance_scale=teacher_guidance,
        )
    except (RecipeError, ValueError, FileNotFoundError) as error:
        raise refuse(error) from None
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        raise typer.Exit(130) from None


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
def demo(
    pipeline: PipelineArgument,
    host: Annotated[
        str, typer.Option(help="The address to listen at. By default, only this machine sees the page.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen at.")] = 7860,
) -> None:
    """Show a student and its teacher side by side in a browser: prompt, seed, steps, times. Ctrl-C ends it."""
    from fastgen.sampling.demo import serve

    try:
        serve(pipeline, host, port)
    except ValueError as error:
        raise refuse(error) from None


@app.command()
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


def main() -> None:
    """Runs the command that the arguments of the process name."""
    quiet_libraries()
    try:
        app()
    except Exception as error:
        if not in_words(error):
            raise
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(1)


def in_words(error: Exception) -> bool:
    """Whether an error says by itself what is wrong, as that of a file that cannot be read or written. Any other is a
    mistake of fastgen's, whose traceback is needed."""
    from safetensors import SafetensorError

    from fastgen.data.base import DataError
    from fastgen.run.checkpoint import CheckpointError

    return isinstance(error, (OSError, SafetensorError, DataError, CheckpointError))


if __name__ == "__main__":
    main()
