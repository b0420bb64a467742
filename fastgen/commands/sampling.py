"""The commands that make samples."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fastgen.commands.options import (
    AdapterOption,
    BatchOption,
    Dtype,
    DtypeOption,
    FirstOption,
    GuidanceOption,
    NegativeOption,
    PipelineArgument,
    StepsOption,
    TeacherGuidanceOption,
    TeacherStepsOption,
    torch_dtype,
)
from fastgen.run.refusal import refuse


def sample(
    pipeline: PipelineArgument,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt. May be given several times.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file with one prompt on each line.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help="A picture, a control video or a sound to make the sample from, for a pipeline that takes one. Give "
            "one for all prompts, or one for each."
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
    adapter: AdapterOption = None,
    views: Annotated[
        bool,
        typer.Option("--views", help="Also write views.png: the clean prediction of each step of the first samples."),
    ] = False,
) -> None:
    """Write images, videos or points that a pipeline samples, and a grid of them, into a folder.

    Each is drawn with a seed of its own, so that it does not depend on the others."""
    from fastgen.sampling.adapters import Adapter
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
            [Adapter.parse(text) for text in adapter or ()],
        )
    except ValueError as error:
        raise refuse(error) from None
    print(f"{count} samples in {output}")


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
    num_steps: Annotated[
        int | None,
        typer.Option(min=1, help="The number of steps of a chunk. Only for a flow map; any other has its own number."),
    ] = None,
    first_steps: Annotated[
        int | None, typer.Option(min=1, help="That of the first chunk, by default as of all. Only for a flow map.")
    ] = None,
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
    sound: Annotated[
        Path | None,
        typer.Option(help="The sound that drives the video (NAME.sound.safetensors), for a student that takes one."),
    ] = None,
    output: Annotated[Path, typer.Option(help="The video (mp4). It grows as pictures are made.")] = Path("stream.mp4"),
    report: Annotated[Path | None, typer.Option(help="A file for the measured speed (JSON).")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the video, its sound and the report.")
    ] = False,
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
                num_steps=num_steps,
                first_steps=first_steps,
                window=window,
                sink=sink,
                force=force,
                seed=seed,
                device=device,
                dtype=getattr(torch, precision),
                report=report,
                overwrite=overwrite,
                sound=sound,
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
