"""Evaluation: draws samples from prompts and seeds, measures them, and records what repeating the numbers needs."""

import dataclasses
import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from functools import partial as bound
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

import fastgen
from fastgen import noise
from fastgen.backbones.base import Backbone, Output
from fastgen.data import exact_data, read_prompts
from fastgen.data.files import check_output, write_json
from fastgen.data.images import encode_files
from fastgen.evaluation.config import merged_scorers
from fastgen.evaluation.measure import KEPT, Partial, measure
from fastgen.evaluation.results import Row, print_results, write_page
from fastgen.metrics import METRICS, Metric, MetricContext, Timing
from fastgen.metrics.features import FeatureNetwork, clip_weights, inception_file
from fastgen.metrics.points import labels_of
from fastgen.metrics.reference import (
    TEACHER,
    Reference,
    check_one_size,
    drawn_reference,
    given_files,
    given_prompts,
    hash_files,
    open_reference,
    read_images,
    sample_files,
)
from fastgen.metrics.reference import captions as file_captions
from fastgen.recipe import EvalConfig
from fastgen.rewards import SCORERS
from fastgen.sampling.original import export_folder, original
from fastgen.sampling.sampler import Sampler, load_sampler, teacher_sampler

T = TypeVar("T")


def evaluate(sampler: Sampler, config: EvalConfig, progress: bool = True, reference: Reference | None = None) -> Row:
    """The result of evaluate_with_samples, without the samples."""
    return evaluate_with_samples(sampler, config, progress, reference=reference)[0]


def evaluate_with_samples(
    sampler: Sampler,
    config: EvalConfig,
    progress: bool = True,
    partial: Path | None = None,
    reference: Reference | None = None,
) -> tuple[Row, Tensor]:
    """Draws num_samples samples and measures them. Returns the result, in plain JSON values, and the first samples (at
    most 64 images, a few frames of 8 videos, or 2,000 points) for a report.

    The same machine, configuration and weights give the same result to the bit, except for throughput's seconds. The
    batch size changes no prompt and no seed. partial: a file for what an interrupted call has gathered, from which a
    later call continues. The caller must remove it. reference: given where the config says "teacher". Raises
    ValueError, before the first sample, for metrics that do not fit the backbone or lack a reference; and for samples
    that are not finite."""
    config.check()
    backbone = sampler.backbone
    reference = reference or find_reference(backbone.output, config)
    prompts = find_prompts(sampler, config, reference)
    images = find_images(sampler, config)
    timing = Timing(sampler.network_evaluations)
    context = MetricContext(
        config.num_samples,
        config.seed,
        reference,
        make_features(config, backbone.output, backbone.device, backbone),
        backbone.law,
        timing,
        config.rewards(),
        backbone.device,
    )

    def draw(start: int, stop: int) -> Tensor:
        began = time.perf_counter()
        samples = draw_samples(sampler, config.seed, prompts, images, start, stop)
        timing.batches.append((stop - start, time.perf_counter() - began))
        return samples

    metrics = make_metrics(config, context, backbone.output)
    if "throughput" in config.metrics and config.num_samples <= config.batch_size:
        draw(0, config.num_samples)  # throughput leaves out the first batch, and here would be no other
    policy, scale = sampler.policy, sampler.guidance_scale
    subject = {
        "seeds": "seed + index",
        "weights": sampler.weight_hashes(),
        "policy": {
            "timesteps": list(policy.timesteps),
            "transition": policy.transition,
            "conditioning_time": policy.conditioning_time,
        },
        "guidance_scale": list(scale) if isinstance(scale, Sequence) else float(scale),
        **({"negative_prompt": backbone.negative_prompt} if scale != 1 and backbone.negative_prompt else {}),
        **({"images_sha256": hash_files(list(dict.fromkeys(images)))} if images else {}),
        **({"reference_sampler": reference.name} if reference and config.reference == TEACHER else {}),
        "device": str(backbone.device),
        "dtype": str(backbone.dtype).removeprefix("torch."),
    }
    facts = describe(prompts, config, subject)
    unfinished = Partial(partial, facts) if partial else None
    values, kept = measure(draw, prompts, metrics, config.batch_size, progress, unfinished)
    return {"metrics": values, **facts}, kept


def draw_samples(
    sampler: Sampler, seed: int, prompts: Sequence[str], images: Sequence[Path] | None, start: int, stop: int
) -> Tensor:
    """Samples start to stop; sample i has the seed `seed + i`."""
    given = {} if images is None else {"images": encode_files(sampler.backbone, images[start:stop])}
    return sampler.sample(prompts[start:stop], range(seed + start, seed + stop), **given)


def teacher_reference(teacher: Sampler, config: EvalConfig) -> Reference:
    """The teacher's samples of the evaluation's prompts, as a reference. Their seeds come behind the evaluation's."""
    prompts, images = find_prompts(teacher, config, None), find_images(teacher, config)
    seed = config.seed + config.num_samples
    name = f"{teacher.policy.num_steps} steps, guidance scale {teacher.guidance_scale}"
    return drawn_reference(name, prompts, bound(draw_samples, teacher, seed, prompts, images))


def evaluate_images_with_samples(
    folder: Path,
    config: EvalConfig,
    progress: bool = True,
    partial: Path | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Row, Tensor]:
    """Like evaluate_with_samples, but for the first num_samples images of a folder, sorted by name. The prompts are
    those of the config, otherwise the captions next to the images, otherwise empty. device: for the scorers and
    inception.

    Raises ValueError if there are too few images, or no prompts for scorers that compare pictures with prompts."""
    config.check()
    files = sample_files(folder)
    if len(files) < config.num_samples:
        raise ValueError(f"{folder} has {len(files)} images, fewer than num_samples = {config.num_samples}")
    files = files[: config.num_samples]
    check_one_size(files)
    prompts = image_prompts(files, config)
    readers = [name for name, reward in config.rewards().items() if reward.reads_prompts]
    if readers and not any(prompts):
        raise ValueError(
            f"{readers[0]} compares pictures with prompts, but {folder} has no captions; give "
            "eval.prompts or --prompts FILE"
        )
    reference = find_reference("pixels", config)
    features = make_features(config, "pixels", device)
    context = MetricContext(
        config.num_samples, config.seed, reference, features, rewards=config.rewards(), device=device
    )
    metrics = make_metrics(config, context, "pixels")
    facts = describe(prompts, config, {"images_sha256": hash_files(files), "device": str(device)})
    unfinished = Partial(partial, facts) if partial else None
    values, kept = measure(
        lambda start, stop: read_images(files[start:stop]), prompts, metrics, config.batch_size, progress, unfinished
    )
    return {"metrics": values, **facts}, kept


def find_reference(output: Output, config: EvalConfig) -> Reference | None:
    if output != "pixels" and config.reference is not None:
        instead = "; points are compared with their exact distribution" if output == "points" else ""
        raise ValueError(f"eval.reference is for images, but the samples here are {output}; leave it out{instead}")
    if config.reference == TEACHER:
        raise ValueError("reference: teacher is for runs, exports and pipelines; give a folder of images")
    return None if config.reference is None else open_reference(config.reference)


def find_prompts(sampler: Sampler, config: EvalConfig, reference: Reference | None) -> list[str]:
    """One prompt per sample."""
    if config.prompts is not None:
        return repeat(read_prompts(config.prompts), config.num_samples)
    if config.images is not None:
        return repeat(given_prompts(config.images), config.num_samples)
    if reference is not None:
        return repeat(reference.prompts, config.num_samples)
    if sampler.backbone.law is not None:
        seed = noise.make_key(config.seed, "eval prompts")
        return exact_data(sampler.backbone).open(sampler.backbone, seed).prompts(torch.arange(config.num_samples))
    raise ValueError(
        "there are no prompts to sample: give eval.prompts, or eval.reference, whose prompts are then used"
    )


def find_images(sampler: Sampler, config: EvalConfig) -> list[Path] | None:
    """The picture that each sample is made from; None for a backbone that takes none."""
    if (config.images is not None) != sampler.backbone.takes_image:
        name = sampler.backbone.config.name
        raise ValueError(
            f"backbone {name} makes its samples from images: give eval.images, a folder of pictures"
            if sampler.backbone.takes_image
            else f"backbone {name} makes its samples from prompts alone; leave out eval.images"
        )
    return None if config.images is None else repeat(given_files(config.images), config.num_samples)


def image_prompts(files: Sequence[Path], config: EvalConfig) -> list[str]:
    """One prompt per image: those of the config, otherwise the captions next to the images."""
    return repeat(file_captions(files) if config.prompts is None else read_prompts(config.prompts), len(files))


def repeat(values: Sequence[T], count: int) -> list[T]:
    return [values[i % len(values)] for i in range(count)]


def make_features(
    config: EvalConfig,
    output: Output,
    device: torch.device | str,
    backbone: Backbone | None = None,
) -> FeatureNetwork | None:
    """backbone: whose VAE gives latents. The digits network stays on the CPU, where it is fast enough
    and always gives the same numbers."""
    if output != "pixels":
        return None
    weights = config.inception_weights or config.clip
    chosen = "cpu" if config.features == "digits" else device
    encode = backbone.encode if backbone and config.features == "latents" else None
    return FeatureNetwork(config.features, weights, chosen, config.batch_size, encode)


def make_metrics(config: EvalConfig, context: MetricContext, output: Output) -> list[Metric]:
    for name in config.metrics:
        if METRICS[name].output not in (output, "any"):
            fitting = [n for n, metric in METRICS.items() if metric.output in (output, "any")]
            raise ValueError(
                f"metric {name} measures {METRICS[name].output}, but the samples here are {output}; choose from "
                f"{', '.join(fitting)}"
            )
    return [METRICS[name](context) for name in config.metrics]


def describe(prompts: Sequence[str], config: EvalConfig, subject: Mapping[str, Any]) -> Row:
    """What was measured, and everything that is needed to measure it again: the result without its numbers."""
    packages = ["torch", "torchvision", "diffusers", "transformers", "torchmetrics"]
    packages += ["open_clip_torch"] * ("hpsv2" in config.metrics)
    versions = {name: version(name) for name in packages}
    networks = {name: reward.facts() for name, reward in config.rewards().items()}
    if config.inception_weights is not None:
        networks["inception"] = {"weights": hash_files([inception_file(config.inception_weights)])}
    if config.clip is not None:
        networks["clip"] = {"weights": hash_files(clip_weights(config.clip))}
    return {
        "num_samples": config.num_samples,
        "seed": config.seed,
        **subject,
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "reference": config.reference,
        "features": config.features if any(METRICS[name].output == "pixels" for name in config.metrics) else None,
        "batch_size": config.batch_size,
        "threads": torch.get_num_threads(),
        **({"scorers": networks} if networks else {}),
        "versions": {"fastgen": fastgen.__version__, "python": platform.python_version(), **versions},
    }


def exact_points(backbone: Backbone, config: EvalConfig, sampler: Sampler) -> Tensor:
    """Exact samples with the labels of the first evaluated samples, which are drawn behind those."""
    prompts = find_prompts(sampler, config, None)[: KEPT[2]]
    key = noise.make_key(config.seed, "exact", 0)
    labels = labels_of(backbone.law, prompts)
    return backbone.law.sample(torch.arange(len(prompts)), labels, key).flatten(1).float()


def evaluate_path(
    path: Path,
    *,
    output: Path | None = None,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    overwrite: bool = True,
    **options: Any,
) -> Row:
    """`fastgen eval`: measures a run folder, an export, a diffusers pipeline folder or a folder of images.

    options: fields of EvalConfig; None means not given. metrics may be one text, "a,b". If the folder has a
    recipe.yaml, the fields that are not given come from its `eval:` section. Without a recipe, images are compared
    with the held-out digits unless reference or prompts say otherwise, and all images of a folder are measured.
    device: by default a GPU if there is one.

    Prints a table. output: a JSON file, which is written together with an HTML page of the same stem. An interrupted
    evaluation leaves <stem>.partial.safetensors there; the same call continues from it and gives the same result.
    Raises ValueError for anything that does not fit."""
    path = Path(path)
    if output is not None:
        if Path(output).suffix == ".html":
            raise ValueError(
                f"--output is the results file, such as {Path(output).with_suffix('.json')}; the page is made"
            )
        for file in (Path(output), Path(output).with_suffix(".html")):
            check_output(file, overwrite)
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}")
    given = {k: str(v) if isinstance(v, Path) else v for k, v in options.items() if v is not None}
    config, own = path_config(path, given)
    config.check()
    samples, captions = dict[str, Tensor](), dict[str, list[str]]()
    name, started = path.resolve().name, time.perf_counter()
    partial = None if output is None else Path(output).with_suffix(".partial.safetensors")
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if is_image_folder(path):
        if (num_steps, guidance_scale, negative_prompt) != (None, None, None):
            raise ValueError(
                f"{path} is a folder of images, and nothing is sampled; leave out the number of steps, the guidance "
                "scale and the negative prompt"
            )
        result, samples[name] = evaluate_images_with_samples(path, config, progress, partial, chosen)
        captions[name] = image_prompts(sample_files(path)[: config.num_samples], config)
    else:
        sampler = load_sampler(
            path,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            image=config.images is not None,
            device=chosen,
            dtype=dtype,
        )
        if (
            not own
            and sampler.backbone.output == "pixels"
            and {config.reference, config.prompts, config.images} == {None}
        ):
            config = dataclasses.replace(config, reference="digits")
        reference = None
        if config.reference == TEACHER:
            reference = teacher_reference(teacher_of(path, sampler, config), config)
        result, samples[name] = evaluate_with_samples(sampler, config, progress, partial, reference)
        captions[name] = find_prompts(sampler, config, reference or find_reference(sampler.backbone.output, config))
        if sampler.backbone.law is not None:
            samples["exact"] = exact_points(sampler.backbone, config, sampler)
    result = {"name": name, **result}
    print_results([result])
    counted = "; images_per_second leaves out loading and the first batch" if "throughput" in config.metrics else ""
    print(f"{config.num_samples} samples in {time.perf_counter() - started:.0f} seconds, with loading{counted}")
    if output is not None:
        write_json(Path(output), result)
        write_page(Path(output).with_suffix(".html"), [result], samples, captions)
    if partial is not None:
        partial.unlink(missing_ok=True)
    return result


def teacher_of(path: Path, sampler: Sampler, config: EvalConfig) -> Sampler:
    """The teacher of a run or an export, as its stock pipeline samples. Any other pipeline is its own teacher."""
    given, folder = config.teacher_guidance_scale, export_folder(path)
    if folder is None:
        backbone, teacher, scale = sampler.backbone, sampler.denoiser, sampler.guidance_scale
    else:
        section, recipe = original(folder)
        backbone = section.build(sampler.backbone.device, sampler.backbone.dtype, 0)
        teacher, scale = backbone.load("teacher"), recipe.teacher_guidance
    steps = max(config.teacher_steps, default=50)
    return teacher_sampler(backbone, steps, scale if given is None else given, teacher)


def is_image_folder(path: Path) -> bool:
    return not any((path / name).is_file() for name in ("model_index.json", "fastgen.json", "recipe.yaml"))


def path_config(path: Path, given: Mapping[str, Any]) -> tuple[EvalConfig, bool]:
    """The evaluation config of a folder, and whether the folder has a recipe.yaml."""
    values: dict[str, Any] = {}
    own = (path / "recipe.yaml").is_file()
    if own:
        # Only this section is read, because files that only training needs may be missing.
        values = (yaml.safe_load((path / "recipe.yaml").read_text()) or {}).get("eval") or {}
    elif is_image_folder(path):
        values = {"num_samples": len(sample_files(path))}
    values |= {**given, "scorers": merged_scorers(values.get("scorers", {}), given.get("scorers", {}))}
    if isinstance(values.get("metrics"), str):
        values["metrics"] = tuple(name.strip() for name in values["metrics"].split(",") if name.strip())
    if not own and is_image_folder(path) and not set(values.get("metrics", ())) <= set(SCORERS):
        values = {"reference": "digits"} | values
    if "metrics" not in values:
        raise ValueError(
            f"no metrics are given, neither as --metrics a,b nor by a recipe.yaml in {path}; choose from "
            f"{', '.join(METRICS)}"
        )
    try:
        return TypeAdapter(EvalConfig).validate_python(values), own
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise ValueError("\n".join(line.removeprefix(": ") for line in lines)) from None
