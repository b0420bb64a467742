"""diffusers pipelines of several students, each of which makes the samples of its own prompts.

    from fastgen.pipelines.routed import RoutedStableDiffusion3Pipeline
    pipeline = RoutedStableDiffusion3Pipeline.from_pretrained(folder)

There is such a class, Routed<name>, for every pipeline <name> of diffusers that takes `prompt` or `class_labels`. The
folder is that of a stock pipeline with the first student; further students' networks lie in student_1, student_2, ...,
and fastgen.json has the router. Plain diffusers does not know the class that model_index.json names, so that it does
not give all prompts to the first student."""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from pydantic import TypeAdapter
from torch import nn

import fastgen.pipelines.few_step  # noqa: F401 - diffusers looks its schedulers up among the imported modules
from fastgen.pipelines.router import Router, student_folders

METADATA = "fastgen.json"  # as in `sampling.sampler`, which is above this module
NETWORKS = ("transformer", "transformer_2", "unet")  # what students of a pipeline differ in
PREFIX = "Routed"


class RoutedPipeline:
    """What these pipelines add to the stock ones. All students stay in memory; only the one that works is moved to the
    pipeline's device."""

    router: Router
    students: list[dict[str, nn.Module]]

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Any:
        """Loads a pipeline from a local folder."""
        pipeline = super().from_pretrained(folder, **options)  # type: ignore[misc]
        said = json.loads((Path(folder) / METADATA).read_text())["router"]
        pipeline.router = TypeAdapter(Router).validate_python(said)
        first = {name: found for name in NETWORKS if (found := getattr(pipeline, name, None)) is not None}
        pipeline.students = [first] + [
            {
                name: type(network).from_pretrained(place, subfolder=name, torch_dtype=network.dtype)
                for name, network in first.items()
            }
            for place in student_folders(Path(folder), pipeline.router.num_parts)[1:]
        ]
        return pipeline

    def __call__(self, *args: Any, **options: Any) -> Any:
        """That of the stock pipeline, by the student of the prompts. Raises ValueError if the prompts of a call belong
        to several students, or if there are only their embeddings."""
        said = inspect.signature(super().__call__).bind_partial(*args, **options).arguments  # type: ignore[misc]
        given = said.get("prompt", said.get("class_labels"))
        if given is None:
            raise ValueError("the prompts say which student works: give prompts, not only their embeddings")
        prompts = given if isinstance(given, list | tuple) else [given]
        parts = {self.router.route(str(prompt)) for prompt in prompts}
        if len(parts) > 1:
            raise ValueError(f"these prompts belong to students {sorted(parts)}; call the pipeline once for each")
        for name, network in self.students[parts.pop()].items():
            current = getattr(self, name)
            moved: Any = network.to(current.device)
            setattr(self, name, moved if moved.dtype == current.dtype else moved.to(current.dtype))
        return super().__call__(*args, **options)  # type: ignore[misc]


def __getattr__(name: str) -> type:
    """Routed<name> for a pipeline <name> of diffusers."""
    stock = getattr(diffusers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not (isinstance(stock, type) and issubclass(stock, DiffusionPipeline)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = globals()[name] = type(name, (RoutedPipeline, stock), {"__module__": __name__})
    return made
