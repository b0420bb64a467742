"""Arguments and options that several commands of the command line share."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

Dtype = Literal["float32", "bfloat16", "float16"]
RecipeArgument = Annotated[
    Path,
    typer.Argument(
        help="A recipe (YAML): a file, or the path of one that ships, like recipes/digits_quickstart.yaml."
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the recipe, each written dotted.key=value. The value is read as YAML."),
]
PipelineArgument = Annotated[
    Path,
    typer.Argument(
        help="A run folder, an exported pipeline, or any diffusers pipeline folder; also one that ships with fastgen, "
        "such as assets/emoji/teacher."
    ),
]
StepsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="The number of steps. Only for a pipeline that was not distilled, a flow map, or a student of several "
        "numbers (rollout.step_counts); any other has its own number.",
    ),
]
GuidanceOption = Annotated[
    float | None, typer.Option(min=0, help="The guidance scale. Only for a pipeline that was not distilled.")
]
NegativeOption = Annotated[
    str | None,
    typer.Option(help="What guidance leads away from, a prompt. Only for a pipeline that was not distilled."),
]
ScorerOption = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=PATH says where a scorer's weights are, a folder or a hub id; NAME.KEY=VALUE sets another of its "
        "keys. May be given several times."
    ),
]
BatchOption = Annotated[
    int, typer.Option(min=1, help="How many samples are computed at a time. The results do not depend on it.")
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        help="The precision of all networks. By default that in which the denoising network is stored; on a CPU, "
        "float32 instead of float16."
    ),
]
FirstOption = Annotated[
    int,
    typer.Option(
        min=0, help="How many of a student's first steps its teacher makes instead, which gives its diversity back."
    ),
]
TeacherStepsOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="The teacher's steps for a whole sample. By default the most of the recipe's eval.teacher_steps."
    ),
]
TeacherGuidanceOption = Annotated[
    float | None, typer.Option(min=0, help="The teacher's guidance scale. By default that of the recipe.")
]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        help="PATH or PATH=SCALE: an adapter (LoRA) of the original pipeline, a safetensors file or a folder with "
        "one, to be added to the network. May be given several times."
    ),
]

HeadroomOption = Annotated[
    float, typer.Option(min=0, max=0.9, help="The share of a GPU's memory that is to stay free, for fragmentation.")
]
TflopsOption = Annotated[
    float | None,
    typer.Option(min=0.001, help="The peak speed of one GPU in the run's precision, in TFLOP/s, to know the time."),
]
UtilisationOption = Annotated[
    float, typer.Option(min=0.001, max=1, help="The share of its peak speed that a GPU reaches.")
]
PriceOption = Annotated[float | None, typer.Option(min=0, help="The price of one GPU for an hour.")]


def torch_dtype(name: str | None) -> Any:
    """The torch.dtype of this name; None for None. torch, which takes seconds to import, is imported only here."""
    if name is None:
        return None
    import torch

    return getattr(torch, name)
