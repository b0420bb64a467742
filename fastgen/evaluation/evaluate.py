"""Evaluation: draws samples from prompts and seeds, measures them, and records what repeating the numbers needs."""

import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from functools import partial as bound
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import fastgen
from fastgen import noise
from fastgen.backbones.base import Backbone, Output
from fastgen.data import exact_data, read_prompts
from fastgen.data.controls import all_files, encode_given
from fastgen.evaluation.machine import machine
from fastgen.evaluation.measure import Partial, measure
from fastgen.evaluation.results import Row
from fastgen.evaluation.scoring import check_read, match
from fastgen.metrics import METRICS, Metric, MetricContext, Timing
from fastgen.metrics.features import FeatureNetwork, clip_files, inception_file
from fastgen.metrics.reference import (
    TEACHER,
    Reference,
    check_one_size,
    drawn_reference,
    given_files,
    given_prompts,
    hash_files,
    need_captions,
    open_reference,
    read_images,
    sample_files,
)
from fastgen.metrics.reference import captions as file_captions
from fastgen.pipelines.router import Part
from fastgen.recipe import EvalConfig
from fastgen.sampling.sampler import Sampler
from fastgen.sampling.speed import synchronise

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
    reference = reference or find_reference(backbone.output, config, sampler.part)
    prompts = find_prompts(sampler, config, reference)
    config.check_repeats(prompts)
    readers = [name for name in config.readers() if not METRICS[name].compares_within_prompts]
    check_read(readers, prompts, "the samples have the empty prompt alone")
    images = find_images(sampler, config)
    timing = Timing(sampler.network_evaluations) if "throughput" in config.metrics else None
    context = MetricContext(
        config.num_samples,
        config.seed,
        reference,
        make_features(config, backbone.output, backbone.device, backbone),
        backbone.law,
        timing,
        config.rewards(),
        backbone.device,
        config.choice == "spread" and (config.prompts is not None or config.images is not None),
    )

    draw = bound(draw_samples, sampler, config.seed, prompts, images, timing=timing)
    metrics = make_metrics(config, context, backbone.output)
    if timing is not None and config.num_samples <= config.batch_size:
        draw(0, config.num_samples)  # throughput leaves out the first batch, and here would be no other
    facts = facts_of(sampler, config, reference)
    unfinished = Partial(partial, facts) if partial else None
    values, kept = measure(draw, prompts, metrics, config.batch_size, progress, unfinished)
    return {"metrics": values, **facts}, kept


def facts_of(sampler: Sampler, config: EvalConfig, reference: Reference | None) -> Row:
    """What `evaluate` measures, and how: its result without the numbers. Nothing is sampled."""
    policy, scale, backbone = sampler.policy, sampler.guidance_scale, sampler.backbone
    images = find_images(sampler, config)
    subject = {
        "seeds": "seed + index",
        "weights": sampler.weight_hashes(),
        "policy": {
            "timesteps": list(policy.timesteps),
            "transition": policy.transition,
            "conditioning_time": policy.conditioning_time,
        },
        "guidance_scale": list(scale) if isinstance(scale, Sequence) else float(scale),
        **sampler.facts(),
        **({"negative_prompt": backbone.negative_prompt} if scale != 1 and backbone.negative_prompt else {}),
        **({"images_sha256": hash_files(all_files(images))} if images else {}),
        "device": str(backbone.device),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        **({"machine": machine(backbone.device)} if "throughput" in config.metrics else {}),
    }
    return describe(find_prompts(sampler, config, reference), config, reference, subject)


def draw_samples(
    sampler: Sampler,
    seed: int,
    prompts: Sequence[str],
    images: Sequence[Path] | None,
    start: int,
    stop: int,
    timing: Timing | None = None,
) -> Tensor:
    """Samples start to stop; sample i has the seed `seed + i`. timing: gets the seconds of sampling and decoding. What
    samples are made from is encoded before: a backbone keeps prompts, so that the first sampler would pay for all."""
    given = {} if images is None else {"images": encode_given(sampler.backbone, images[start:stop])}
    if timing is not None:
        sampler.backbone.encode_both(prompts[start:stop], **given)
        synchronise(sampler.backbone.device)
    began = time.perf_counter()
    samples = sampler.sample(prompts[start:stop], range(seed + start, seed + stop), **given)
    if timing is not None:
        timing.batches.append((stop - start, time.perf_counter() - began))
    return samples


def teacher_reference(teacher: Sampler, config: EvalConfig) -> Reference:
    """The teacher's samples of the evaluation's prompts, as a reference. Their seeds come behind the evaluation's."""
    prompts, images = find_prompts(teacher, config, None), find_images(teacher, config)
    seed = config.seed + config.num_samples
    name = f"{teacher.policy.num_steps} steps, guidance scale {teacher.guidance_scale}"

    def facts() -> Row:
        return {
            "reference_sampler": name,
            "reference_teacher": {"weights": teacher.weight_hashes(), **teacher.facts()},
        }

    return drawn_reference(name, prompts, bound(draw_samples, teacher, seed, prompts, images), facts)


def evaluate_images_with_samples(
    folder: Path,
    config: EvalConfig,
    progress: bool = True,
    partial: Path | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Row, Tensor]:
    """Like evaluate_with_samples, but for num_samples images of a folder, which are sorted by name. The prompts are
    those of the config (`image_prompts`), otherwise the captions next to the images, otherwise empty. device: for the
    scorers and inception.

    Raises ValueError if there are too few images, or no prompts for scorers that compare pictures with prompts."""
    config.check()
    files = sample_files(folder)
    if len(files) < config.num_samples:
        raise ValueError(f"{folder} has {len(files)} images, fewer than num_samples = {config.num_samples}")
    prompts, files = image_prompts(files, config), chosen(files, config)
    check_one_size(files)
    check_read(config.readers(), prompts, f"{folder} has no captions")
    reference = find_reference("pixels", config)
    features = make_features(config, "pixels", device)
    context = MetricContext(
        config.num_samples,
        config.seed,
        reference,
        features,
        rewards=config.rewards(),
        device=device,
        spread=config.choice == "spread",
    )
    metrics = make_metrics(config, context, "pixels")
    facts = describe(prompts, config, reference, {"images_sha256": hash_files(files), "device": str(device)})
    unfinished = Partial(partial, facts) if partial else None
    values, kept = measure(
        lambda start, stop: read_images(files[start:stop]), prompts, metrics, config.batch_size, progress, unfinished
    )
    return {"metrics": values, **facts}, kept


def find_reference(output: Output, config: EvalConfig, part: Part | None = None) -> Reference | None:
    """The images that samples are compared with, chosen if there are more than samples. part: of one of several
    students, who is compared with images of its own prompts."""
    if output != "pixels" and config.reference is not None:
        instead = "; points are compared with their exact distribution" if output == "points" else ""
        raise ValueError(f"eval.reference is for images, but the samples here are {output}; leave it out{instead}")
    if config.reference == TEACHER:
        raise ValueError("reference: teacher is for runs, exports and pipelines; give a folder of images")
    if config.reference is None:
        return None
    reference = open_reference(config.reference)
    reference = reference if part is None else of_part(reference, part)
    return reference if len(reference) <= config.num_samples else reference.selected(config.rows(len(reference)))


def of_part(reference: Reference, part: Part) -> Reference:
    """The images whose captions belong to the part; all of a reference that has none."""
    if not any(reference.prompts):
        return reference
    rows = [i for i, prompt in enumerate(reference.prompts) if part.has(prompt)]
    if not rows:
        raise ValueError(f"no image of {reference.name} belongs to student {part.index} by its caption; give others")
    return reference.selected(rows)


def find_prompts(sampler: Sampler, config: EvalConfig, reference: Reference | None) -> list[str]:
    """One prompt per sample; for one of several students, only prompts that it is for."""
    found: Sequence[str]
    if config.prompts is not None:
        found = read_prompts(config.prompts)
    elif config.images is not None:
        found = given_prompts(config.images)
    elif reference is not None:
        found = reference.prompts
        if sampler.backbone.config.takes_prompts:
            need_captions(found, reference.name)
    elif sampler.backbone.law is not None:
        seed = noise.make_key(config.seed, "eval prompts")
        found = exact_data(sampler.backbone).open(sampler.backbone, seed).prompts(torch.arange(config.num_samples))
    else:
        raise ValueError(
            "there are no prompts to sample: give eval.prompts, or eval.reference, whose prompts are then used"
        )
    if sampler.part is not None:
        if config.images is not None:
            raise ValueError("the pictures of eval.images cannot be divided by prompt among several students")
        found = [prompt for prompt in found if sampler.part.has(prompt)]
        if not found:
            raise ValueError(f"none of the prompts belongs to student {sampler.part.index}; give others")
    return chosen(found, config)


def find_images(sampler: Sampler, config: EvalConfig) -> list[Path] | None:
    """The picture that each sample is made from; None for a backbone that takes none."""
    if (config.images is not None) != sampler.backbone.takes_given:
        name, kind = sampler.backbone.config.name, ", ".join(sampler.backbone.config.given)
        raise ValueError(
            f"backbone {name} makes its samples from {kind}: give eval.images, their folder"
            if sampler.backbone.takes_given
            else f"backbone {name} makes its samples from prompts alone; leave out eval.images"
        )
    return None if config.images is None else chosen(given_files(config.images), config)


def image_prompts(files: Sequence[Path], config: EvalConfig) -> list[str]:
    """The prompts of the images that are measured, of all images of a folder: those of the config, one for each image
    of the folder or one for all, otherwise the captions next to the images. Raises ValueError for another number."""
    if config.prompts is None:
        return chosen(file_captions(files), config)
    source = config.prompts if isinstance(config.prompts, str) else "prompts"
    return chosen(match(read_prompts(config.prompts), len(files), source), config)


def chosen(values: Sequence[T], config: EvalConfig) -> list[T]:
    """That of each sample."""
    return [values[i] for i in config.rows(len(values))]


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


def describe(
    prompts: Sequence[str], config: EvalConfig, reference: Reference | None, subject: Mapping[str, Any]
) -> Row:
    """What was measured, and everything that is needed to measure it again: the result without its numbers."""
    packages = ["torch", "torchvision", "diffusers", "transformers", "torchmetrics"]
    packages += ["open_clip_torch"] * ("hpsv2" in config.metrics)
    versions = {name: version(name) for name in packages}
    networks = {name: reward.facts() for name, reward in config.rewards().items()}
    if config.inception_weights is not None:
        networks["inception"] = {"weights": hash_files([inception_file(config.inception_weights)])}
    if config.clip is not None:
        networks["clip"] = {"files": hash_files(clip_files(config.clip))}
    return {
        "num_samples": config.num_samples,
        "seed": config.seed,
        **subject,
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "reference": config.reference,
        **({} if reference is None else reference.facts()),
        "choice": config.choice,
        "features": config.features if any(METRICS[name].output == "pixels" for name in config.metrics) else None,
        "batch_size": config.batch_size,
        "threads": torch.get_num_threads(),
        **({"scorers": networks} if networks else {}),
        "versions": {"fastgen": fastgen.__version__, "python": platform.python_version(), **versions},
    }
