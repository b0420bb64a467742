"""Loading a component of a pipeline, with all its weights and no others."""

from pathlib import Path
from typing import Any

from fastgen.backbones.folder import INNER_FLOW, OF_PIPELINES, SEGMENT_FLOW, read_json, variant_of
from fastgen.modules.sharding import WeightsError

UNEXPECTED = {"diffusers": ("unexpected_keys",)}  # text encoders may store buffers that newer classes lack


def diffusers_class(name: str) -> Any:
    """A class of diffusers, which takes seconds to import: not before a recipe is known to be good."""
    import diffusers

    try:
        return getattr(diffusers, name)
    except AttributeError:
        raise WeightsError(
            f"path: diffusers {diffusers.__version__} has no class {name}, which the pipeline names"
        ) from None


def component_class(library: str, name: str) -> Any:
    """The class of a component that model_index.json names: of transformers, of diffusers, or of one of its pipelines.
    Raises WeightsError if diffusers has no such class."""
    if library in OF_PIPELINES:
        from importlib import import_module

        return getattr(import_module(f"diffusers.pipelines.{library}"), name)
    if library == "transformers":
        import transformers

        return getattr(transformers, name)
    return diffusers_class(name)


def read_network(class_name: str, source: str | Path, name: str, options: dict[str, Any]) -> Any:
    """A pipeline's denoising network: of diffusers' class, or of the class of ours that an export names, which is made
    of that one."""
    path = Path(source) / name / "config.json"
    stored = str(read_json(path).get("_class_name")) if path.is_file() else ""
    cls = diffusers_class(class_name)
    if stored.startswith(INNER_FLOW):
        from fastgen.pipelines import inner_flow  # with diffusers

        cls = inner_flow.CLASSES[class_name]
    elif stored.startswith(SEGMENT_FLOW):
        from fastgen.pipelines import segment_flow  # with diffusers

        cls = segment_flow.CLASSES[class_name]
    return read_component(cls, source, name, options)


def read_component(cls: Any, source: str | Path, name: str, options: dict[str, Any]) -> Any:
    """A network of a pipeline with all its weights. Of a folder that has them in float16 only, these are read.

    Raises WeightsError if the stored tensors are not those of the network that config.json describes: diffusers and
    transformers would draw the missing ones at random."""
    part = Path(source) / name
    try:
        library = "transformers" if cls.__module__.startswith("transformers.") else "diffusers"
        variant = variant_of(part, library) if part.is_dir() else None
        network, info = cls.from_pretrained(
            source, subfolder=name, variant=variant, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise WeightsError(f"path: cannot load {name} of {source} as a {cls.__name__}: {error}") from None
    for kind in ("missing_keys", "mismatched_keys", "error_msgs", *UNEXPECTED.get(cls.__module__.split(".")[0], ())):
        if found := sorted(map(str, info.get(kind) or ())):
            raise WeightsError(
                f"path: the weights of {name} in {source} are not those of the {cls.__name__} in its config.json: "
                f"{kind.replace('_', ' ')} {', '.join(found[:4])}{' ...' if len(found) > 4 else ''}"
            )
    return network
