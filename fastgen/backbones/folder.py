"""The files of a diffusers pipeline folder: its index, its components, and whether each can be read as a whole.

What is checked is what is read: the weights of a component are the files that diffusers and transformers open, and
these are opened here first, their headers alone."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from fastgen.registry import nearest, shipped

WEIGHTLESS = (
    "scheduler",
    "guider",
    "tokenizer",
    "feature_extractor",
    "image_processor",
    "processor",
)  # components without weights
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")  # that the stock pipelines do without
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}  # library -> how its weight files begin
OF_PIPELINES = ("ltx2",)  # libraries of an index that are modules of diffusers.pipelines
VARIANTS = (None, "fp16")  # in the order in which they are taken
FLOATING = ("F64", "F32", "F16", "BF16")  # dtypes of weights, as safetensors names them
# these begin the names of our pipeline classes; a stock class's name follows
FLOW_MAP, STREAMING, ROUTED = "FlowMap", "Streaming", "Routed"
INNER_FLOW, SEGMENT_FLOW = "InnerFlow", "SegmentFlow"  # and these those of our network classes
# the stock pipelines of which pipelines.flow_map has a class that gives the network added inputs
WITH_INPUTS = ("StableDiffusion3Pipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline", "WanPipeline")
# what published pipelines of DiT and PixArt call their networks, and the norm_type by which diffusers tells them apart
LEGACY = "Transformer2DModel"
NORMS = {"DiTTransformer2DModel": "ada_norm_zero", "PixArtTransformer2DModel": "ada_norm_single"}
LONGEST_HEADER = 100 << 20  # bytes; the limit of the safetensors format


def local_folder(path: str) -> Path | None:
    """The folder of this path, in the working directory or shipped with fastgen; None if there is none."""
    return next((candidate for candidate in (Path(path), shipped(path)) if candidate.is_dir()), None)


def shipped_pipelines() -> list[str]:
    """The pipelines that ship with fastgen, by the paths that name them in any working directory."""
    root = shipped("")
    return sorted(str(index.parent.relative_to(root)) for index in (root / "assets").rglob("model_index.json"))


def check_source(path: str) -> None:
    """Raises ValueError if a pipeline's path is neither the folder of one nor a hub id."""
    if (folder := local_folder(path)) is not None:
        read_index(folder)
        return
    if Path(path).is_file():
        raise ValueError(
            f"path: {path} is a single file; convert it to a diffusers folder (from_single_file and "
            "save_pretrained of the pipeline), and name that"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise ValueError(
            f"path: {path!r} is neither a folder nor a hub id like org/name; with fastgen ship "
            f"{', '.join(shipped_pipelines())}"
        )
    parent = Path(path).parent
    if parent.is_dir():
        names = sorted(p.name for p in parent.iterdir() if p.is_dir())
        raise ValueError(f"path: the folder {parent} has no {Path(path).name}{nearest(Path(path).name, names)}")


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json of a diffusers pipeline. Raises ValueError if it is missing or unreadable."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise ValueError(f"path: {folder} is not a diffusers pipeline: it has no model_index.json")
    index = read_json(path)
    if not isinstance(index.get("_class_name"), str):
        raise ValueError(f"path: {path} is not a diffusers index; download the pipeline again")
    return index


def read_scheduler(folder: Path) -> dict[str, Any]:
    """scheduler_config.json of a pipeline. Its `_class_name` is the class of model_index.json, which is the one that
    is made."""
    return read_json(folder / "scheduler/scheduler_config.json") | {"_class_name": read_index(folder)["scheduler"][1]}


def stock_class(name: str) -> str:
    """The name of the stock pipeline class that one of our own is made of; any other name is returned as it is."""
    return name.removeprefix(FLOW_MAP).removeprefix(STREAMING).removeprefix(ROUTED)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError, naming the file, if it is missing or holds anything else."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"path: {path.parent} has no {path.name}; download it again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"path: cannot read {path}: {error}; download the pipeline again") from None
    if not isinstance(content, dict):
        raise ValueError(f"path: {path} holds no JSON object; download the pipeline again")
    return content


def read_card(folder: Path) -> dict[str, Any]:
    """The metadata of a pipeline's README.md, which a hub reads; {} if it has none that can be read."""
    path = folder / "README.md"
    found = re.match(r"\s*---\s*\n(.*?)\n---", path.read_text(errors="replace"), re.DOTALL) if path.is_file() else None
    try:
        metadata = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return metadata if isinstance(metadata, dict) else {}


def recommended_call(folder: Path) -> dict[str, float]:
    """The numbers of a call that a pipeline's card recommends, where a hub's own page reads them too:
    `inference.parameters` of its metadata. Of these, scales are at least 0, and others at least 1."""
    found = read_card(folder).get("inference")
    parameters = found.get("parameters") if isinstance(found, dict) else None
    numbers = parameters.items() if isinstance(parameters, dict) else ()
    found = {key: float(n) for key, n in numbers if isinstance(n, int | float) and not isinstance(n, bool)}
    return {key: n for key, n in found.items() if n >= (0 if key.endswith("scale") else 1)}


def component_entries(folder: Path, index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """component -> (library, class), of those that the pipeline has. An optional one whose folder is missing counts as
    absent. Raises ValueError for any other folder that is missing."""
    found: dict[str, tuple[str, str]] = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or entry[0] is None:
            continue
        if (folder / name).is_dir():
            found[name] = ("diffusers" if entry[0] in OF_PIPELINES else str(entry[0]), str(entry[1]))
        elif name not in OPTIONAL:
            raise ValueError(f"path: {folder} is incomplete: it has no folder {name}; download it again")
    return found


def check_present(folder: Path, index: dict[str, Any], needed: Iterable[str]) -> None:
    """Raises ValueError if the index leaves out, or leaves empty, a component without which the stock pipeline cannot
    be loaded and called with a prompt, the text encoders or others that are `needed`."""
    encoders = [name for name in index if name.startswith(("text_encoder", "tokenizer"))]
    for name in (*needed, "scheduler", *encoders):
        if (index.get(name) or [None])[0] is None:
            raise ValueError(
                f"path: {folder}/model_index.json has no {name}, and without it the stock pipeline cannot be loaded "
                "and called with a prompt; download the whole pipeline, or name the one that this one belongs to"
            )


def check_components(folder: Path, index: dict[str, Any], classes: dict[str, str]) -> None:
    """Raises ValueError, naming the file, if a component cannot be read whole. classes: component -> the class that
    this family of pipelines needs there."""
    for name, (library, class_name) in component_entries(folder, index).items():
        part = folder / name
        if name in classes and class_name != classes[name] and not is_legacy(part, class_name, classes[name]):
            raise ValueError(f"path: {part} is a {class_name}, and this pipeline needs a {classes[name]} there")
        if name.startswith("tokenizer"):
            check_tokenizer(part, class_name)
        elif name.startswith("scheduler"):
            read_json(part / "scheduler_config.json")
        elif not name.startswith(WEIGHTLESS) and name not in OPTIONAL:
            read_json(part / "config.json")
            for path in weight_files(part, library):
                check_weights(path)


def is_legacy(part: Path, class_name: str, needed: str) -> bool:
    """Whether diffusers reads a network of an old class as one of the class that is needed."""
    return (
        class_name == LEGACY and needed in NORMS and read_json(part / "config.json").get("norm_type") == NORMS[needed]
    )


def check_tokenizer(part: Path, class_name: str) -> None:
    """CLIP's prompts are padded to the length that its tokenizer's config gives."""
    if not class_name.startswith("CLIP"):
        return
    length = read_json(part / "tokenizer_config.json").get("model_max_length")
    if not isinstance(length, int) or not 1 <= length <= 10_000:
        raise ValueError(
            f"path: {part}/tokenizer_config.json gives no model_max_length, to which prompts are padded; set it, 77 "
            "for CLIP"
        )


def variant_of(part: Path, library: str) -> str | None:
    """The variant of a component's weights: None for the plain files, "fp16" where only those are there. Raises
    ValueError, saying what is there instead, if the component has no safetensors weights."""
    for variant in VARIANTS:
        if any((part / name).is_file() for name in weight_names(library, variant)):
            return variant
    others = ", ".join(
        sorted(p.name for p in part.glob("*.bin"))[:3] + sorted(p.name for p in part.glob("*.saf*"))[:3]
    )
    single, _ = weight_names(library, None)
    raise ValueError(
        f"path: {part} has no safetensors weights: {single}, or its index, is missing"
        + (f", and {others} is not read" if others else "")
        + "; download the safetensors weights"
    )


def weight_names(library: str, variant: str | None) -> tuple[str, str]:
    """The names of a component's single file of weights and of the index of its shards."""
    stem, infix = STEMS.get(library, STEMS["transformers"]), f".{variant}" if variant else ""
    return f"{stem}{infix}.safetensors", f"{stem}.safetensors.index{infix}.json"


def weight_files(part: Path, library: str = "diffusers") -> list[Path]:
    """The files that hold a component's weights: the one file, or the shards of its index. Where both are there,
    diffusers reads the shards and transformers the file. Raises ValueError if any is missing."""
    single, index = (part / name for name in weight_names(library, variant_of(part, library)))
    if single.is_file() and (library != "diffusers" or not index.is_file()):
        return [single]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"path: {index} lists no shards; download the pipeline again")
    files = [part / str(name) for name in sorted(set(shards.values()))]
    if missing := next((file for file in files if not file.is_file()), None):
        raise ValueError(f"path: {part} has no {missing.name}, which {index.name} lists; download the shard")
    return files


def check_weights(path: Path) -> dict[str, dict[str, Any]]:
    """Reads the header of a safetensors file: tensor -> its dtype, shape and place. Raises ValueError if the file is
    cut short or is none, as a Git LFS pointer is, or if weights in it are not floating-point numbers."""
    again = "download it again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise ValueError(f"path: {path} is a Git LFS pointer, not the weights; fetch them with git lfs pull")
            if length > min(LONGEST_HEADER, size - 8):
                raise ValueError(f"path: {path} is not a safetensors file, or is cut short; {again}")
            header: dict[str, dict[str, Any]] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            dtypes = {name: entry["dtype"] for name, entry in header.items()}
    except OSError as error:
        raise ValueError(f"path: cannot read {path}: {error.strerror}; {again}") from None
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError, UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError(f"path: {path} has a damaged header; {again}") from None
    if size != 8 + length + end:
        raise ValueError(f"path: {path} has {size:,} bytes instead of {8 + length + end:,}; {again}")
    for name, dtype in dtypes.items():
        if name.endswith((".weight", ".bias")) and dtype not in FLOATING:
            raise ValueError(f"path: {path} stores {name} as {dtype}; quantised weights are not supported")
    return header


def boundaries_in(part: Path) -> tuple[float, ...]:
    """The boundaries between the experts in one component, from its config.json; () for one network or a hub id."""
    path = part / "config.json"
    return tuple(read_json(path).get("boundaries", ())) if path.is_file() else ()
