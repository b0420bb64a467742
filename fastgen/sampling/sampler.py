"""Sampling from a run, an export or any supported pipeline folder, with one seed per sample."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones import BACKBONES
from fastgen.backbones.base import Backbone, BackboneConfig
from fastgen.backbones.folder import read_index, recommended_call
from fastgen.backbones.pipeline_config import PipelineConfig, family_configs
from fastgen.batch import Conditioning, Draws
from fastgen.denoiser import NO_INPUTS, Denoiser, Inputs, Memory
from fastgen.pipelines.router import Part, Router, student_folders
from fastgen.registry import build_section, current_names, here_or_shipped
from fastgen.rollout import RolloutPolicy, sample
from fastgen.rollout.passes import Noise
from fastgen.streaming.context import Context

SIZES = ("height", "width", "num_frames", "max_sequence_length")  # arguments of a call that are keys of a backbone
METADATA = "fastgen.json"  # in an exported folder: the policy that the student was trained with, and its backbone


class Guided(nn.Module):
    """A denoiser with classifier-free guidance, which is called like a plain denoiser. uncond: the unconditional
    conditioning of the batch. scale: one number, or one per expert."""

    def __init__(self, denoiser: Denoiser, uncond: Conditioning, scale: float | Sequence[float]):
        super().__init__()
        self.denoiser, self.uncond, self.scale, self.schedule = denoiser, uncond, scale, denoiser.schedule

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs = NO_INPUTS) -> Tensor:
        """The guided x0 prediction. Raises ValueError if inputs are given: only students take them, and are not
        guided."""
        if other := inputs.given.keys() - {"context"}:
            raise ValueError(f"a guided denoiser takes no inputs, got {sorted(other)}")
        scale = self.denoiser.per_expert(self.scale, t)
        predict = partial(self.denoiser, inputs=inputs)
        return signals.guided(predict, x_t, t, cond, self.uncond, scale)

    def remember(
        self,
        x: Tensor,
        t: Tensor,
        cond: Conditioning,
        context: Context,
        inputs: Inputs = NO_INPUTS,
        grad: bool = False,
    ) -> Memory:
        """That of both halves of the guided batch: with the prompt, then without."""
        both = Conditioning.cat([cond, self.uncond])
        return self.denoiser.remember(torch.cat([x, x]), torch.cat([t, t]), both, context, inputs, grad)


@contextlib.contextmanager
def outputs_kept(network: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """Appends what the network returns, inside the context, to a list."""
    hook = network.register_forward_hook(lambda _network, _inputs, output: seen.append(output))
    try:
        yield
    finally:
        hook.remove()


class Sampler:
    """Maps prompts and seeds to pixels, frames or points, with a denoiser, its backbone and its policy.
    guidance_scale: one number, or one per expert, from high noise to low. part: the prompts that a student is for, if
    it is one of several; an evaluation measures these. said: what a result also says of its networks."""

    def __init__(
        self,
        backbone: Backbone,
        denoiser: Denoiser,
        policy: RolloutPolicy,
        guidance_scale: float | Sequence[float] = 1.0,
        weights: Path | None = None,
        part: Part | None = None,
        said: Mapping[str, Any] | None = None,
    ):
        self.backbone, self.denoiser, self.policy, self.guidance_scale = backbone, denoiser, policy, guidance_scale
        self.weights_folder, self.part, self.said = weights, part, said or {}

    @property
    def network_evaluations(self) -> int:
        """Network evaluations per sample; a guided step counts twice. With chunks, they are per chunk, and include
        those that commit it."""
        evaluations = self.policy.num_steps + len(self.policy.context_levels)
        return evaluations * (1 if self.guidance_scale == 1 else 2)

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], seeds: Sequence[int], images: Conditioning | None = None) -> Tensor:
        """The samples, decoded by the backbone, float32, on the CPU: pixels [B, 3, H, W] or frames [B, F, 3, H, W] in
        [0, 1], or points [B, D]. A sample depends on its prompt, seed and image alone, up to the rounding of batched
        kernels. images: rows of `Backbone.encode_images`, one for each prompt, if the backbone takes images."""
        return self.backbone.decode(self.latents(prompts, seeds, images=images)).float().cpu()

    @torch.no_grad()
    def latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        key: int | str = "sample",
        images: Conditioning | None = None,
        seen: list[Tensor] | None = None,
    ) -> Tensor:
        """The same samples before decoding: [B, *latent_shape], on the backbone's device. Each key gives independent
        noise. seen: a list that gets the clean prediction of each step."""
        backbone = self.backbone
        cond, uncond = backbone.encode_both(prompts, images)
        ids = torch.tensor(list(seeds), dtype=torch.int64, device=backbone.device)
        return self.run(cond, uncond, Draws(ids, backbone.latent_shape, key, backbone.dtype), seen)

    @property
    def levels(self) -> list[float]:
        """The noise level of each step."""
        return list(self.policy.timesteps)

    def run(self, cond: Conditioning, uncond: Conditioning, noise: Noise, seen: list[Tensor] | None = None) -> Tensor:
        """The same samples from conditioning with and without the prompts, and from draws of noise."""
        gathered = self.denoiser.gathered_dtype
        network = self.denoiser if self.guidance_scale == 1 else Guided(self.denoiser, uncond, self.guidance_scale)
        kind = self.backbone.device.type
        with (
            contextlib.nullcontext() if seen is None else outputs_kept(network, seen),
            torch.autocast(kind, gathered, enabled=gathered is not None, cache_enabled=False),
        ):
            return sample(network, self.policy, cond, noise)  # type: ignore[arg-type]

    def with_policy(self, policy: RolloutPolicy) -> "Sampler":
        """The same networks with another policy."""
        weights, scale = self.weights_folder, self.guidance_scale
        return Sampler(self.backbone, self.denoiser, policy, scale, weights, self.part, self.said)

    def facts(self) -> dict[str, Any]:
        """What a result says of how samples were made, besides policy, guidance scale and weights."""
        return {**self.said, **({} if self.part is None else {"part": dataclasses.asdict(self.part)})}

    def weight_hashes(self) -> dict[str, str]:
        """The sha256 of every weight file, by its path in the folder; {} if there is no folder."""
        if self.weights_folder is None:
            return {}
        files = sorted(self.weights_folder.rglob("*.safetensors"))
        return {str(f.relative_to(self.weights_folder)): sha256(f) for f in files}


class Routed(Sampler):
    """Several students, each of which makes the samples of the prompts that the router gives it. They have one
    backbone and one policy. weights: the folder of all of them."""

    def __init__(self, students: Sequence[Sampler], router: Router, weights: Path | None = None):
        first = students[0]
        super().__init__(first.backbone, first.denoiser, first.policy, first.guidance_scale, weights)
        self.students, self.router = students, router

    @torch.no_grad()
    def latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        key: int | str = "sample",
        images: Conditioning | None = None,
        seen: list[Tensor] | None = None,
    ) -> Tensor:
        if seen is not None:
            raise ValueError("the steps of several students cannot be shown together; name one of them")
        parts = torch.tensor([self.router.route(prompt) for prompt in prompts])
        made: dict[int, Tensor] = {}
        for part in parts.unique().tolist():
            rows = (parts == part).nonzero()[:, 0]
            own = [(prompts[i], seeds[i]) for i in rows.tolist()]
            given = None if images is None else images.select(rows)
            latents = self.students[part].latents([p for p, _ in own], [s for _, s in own], key, given)
            made |= dict(zip(rows.tolist(), latents, strict=True))
        return torch.stack([made[i] for i in range(len(prompts))])

    def facts(self) -> dict[str, Any]:
        return {"router": dataclasses.asdict(self.router)}


def teacher_sampler(
    backbone: Backbone,
    num_steps: int,
    guidance_scale: float | Sequence[float],
    teacher: Denoiser | None = None,
    weights: Path | None = None,
    part: Part | None = None,
    said: Mapping[str, Any] | None = None,
) -> Sampler:
    """Samples the teacher as its stock pipeline does. The teacher is loaded if it is not given."""
    teacher = teacher or backbone.load("teacher")
    return Sampler(backbone, teacher, backbone.teacher_policy(num_steps), guidance_scale, weights, part, said)


def read_metadata(folder: Path, several: bool = False) -> dict[str, Any]:
    """What an export says of itself. The folder may come from anybody: a backbone that names a module to import is
    refused. several: whether it may hold several students with a router. Raises ValueError for both, and for a file
    that is not such metadata."""
    path = folder / METADATA
    try:
        metadata = json.loads(path.read_text())
        name = metadata["backbone"]["name"]
        metadata["policy"]["timesteps"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not describe an export of fastgen: {error!r}; export the run again") from None
    if name not in BACKBONES:
        raise ValueError(
            f"{path} names the backbone {name!r}, which is not one of {', '.join(BACKBONES)}; an export may not name "
            "code to import"
        )
    if "router" in metadata and not several:
        raise ValueError(f"{folder} holds several students, and one is needed here; give that one's own export")
    return metadata


def load_sampler(
    path: Path,
    *,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    image: bool = False,
    references: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Sampler:
    """The sampler of a run folder (its export), an exported folder, or a plain diffusers pipeline folder. dtype: of
    all its networks, by default `usual_dtype`.

    num_steps, guidance_scale and negative_prompt are for a plain pipeline; by default they are those of its call in
    diffusers. An export has its own, and asking for others raises ValueError, except for the numbers of steps that
    `RolloutPolicy.can_make`. So does a negative prompt without guidance, and a folder that is none of these. image:
    whether samples are to be made from images, for a plain pipeline that can do both. references: the number of
    reference pictures of the control videos that samples are to be made from, for a plain pipeline that takes some;
    None if from none."""
    if num_steps is not None and num_steps < 1:
        raise ValueError(f"a sample has one step at least, got num_steps {num_steps}")
    device, folder = torch.device(device), source_of(path)
    if (folder / METADATA).is_file():
        metadata = read_metadata(folder, several=True)
        policy = RolloutPolicy(**current_names("rollout", metadata["policy"]))
        num_steps = policy.num_steps if num_steps is None else num_steps
        if not policy.can_make(num_steps) or guidance_scale not in (None, 1.0) or negative_prompt:
            own = " or ".join(str(n) for n in policy.step_counts or (policy.num_steps,))
            raise ValueError(
                f"{folder} was distilled to {own} steps without guidance; leave out the number of steps, "
                "the guidance scale and the negative prompt"
            )
        policy = policy.with_steps(num_steps)
        whole = "path" in metadata["backbone"] and not metadata.get("lora")  # the export itself is a complete pipeline
        location = {"path": str(folder)} if whole else {}
        config = build_section("backbone", metadata["backbone"] | location, BACKBONES, BackboneConfig)
        backbone = config.build(device, dtype or usual_dtype(config, device), 0)
        if (said := metadata.get("router")) is not None:
            router = TypeAdapter(Router).validate_python(said)
            places = student_folders(folder, router.num_parts)
            students = [Sampler(backbone, backbone.load_exported(place), policy) for place in places]
            return Routed(students, router, folder)
        part = metadata.get("part")
        part = None if part is None else TypeAdapter(Part).validate_python(part)
        return Sampler(backbone, backbone.load_exported(folder), policy, 1.0, folder, part)
    section: Any = dataclasses.replace(pipeline_config(folder, image), negative_prompt=negative_prompt or "")
    section = section if references is None else section.with_control(references)
    section.check()
    backbone = section.build(device, dtype or usual_dtype(section, device), 0)
    steps, scale = backbone.stock_call
    scale = scale if guidance_scale is None else guidance_scale
    if negative_prompt and scale == 1:
        raise ValueError("a negative prompt is what guidance leads away from: give a guidance scale other than 1")
    return Sampler(backbone, backbone.load("teacher"), backbone.teacher_policy(num_steps or steps), scale, folder)


def source_of(path: Path) -> Path:
    """The export of a run folder, an exported folder, or a diffusers pipeline folder, in the working directory or
    among the files that ship with fastgen. Raises ValueError for anything else."""
    found = here_or_shipped(path)
    folder = found / "export" if (found / "export" / METADATA).is_file() else found
    if (folder / METADATA).is_file() or (folder / "model_index.json").is_file():
        return folder
    if (path / "checkpoints").is_dir():
        raise ValueError(
            f"{path} is a run without an export; write that of its last checkpoint: fastgen export {path}"
        )
    raise ValueError(f"{path} is neither a run, an export nor a diffusers pipeline folder")


def usual_dtype(config: BackboneConfig, device: torch.device) -> torch.dtype:
    """The dtype in which a backbone's denoising network is stored, but float32 instead of float16 on a CPU, where
    convolutions in float16 are tens of times slower."""
    stored = config.build(torch.device("cpu"), torch.float32, 0).stored_dtype
    return torch.float32 if device.type == "cpu" and stored == torch.float16 else stored


def sha256(path: Path) -> str:
    """Of a file, which is read once as long as it stays as it is."""
    about = path.stat()
    return read_sha256(path, about.st_size, about.st_mtime_ns)


@cache
def read_sha256(path: Path, size: int, changed: int) -> str:
    """size, changed: what tells two states of the file apart."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pipeline_config(folder: Path, image: bool = False) -> PipelineConfig:
    """The backbone section that loads this diffusers folder; if several can, the one that makes samples from images or
    not, as `image` says. Raises ValueError if no supported family does."""
    index, families = read_index(folder), [cls for _, cls in family_configs()]
    fitting = sorted((cls for cls in families if cls.loads(index)), key=lambda cls: cls.takes_image != image)
    if not fitting:
        known = ", ".join(name for cls in families for name in cls.pipelines)
        raise ValueError(f"{folder} contains a {index['_class_name']}; supported are {known}")
    return fitting[0](path=str(folder))


def recommended_config(folder: Path) -> tuple[PipelineConfig, dict[str, Any]]:
    """`pipeline_config` with what the pipeline's card recommends (`recommended_call`): sizes, and the guidance scale
    of networks that are told one. Also these keys alone. Raises ValueError if they do not fit, too."""
    config, said = pipeline_config(folder), recommended_call(folder)
    known = {field.name for field in dataclasses.fields(config)}
    settings: dict[str, Any] = {key: int(said[key]) for key in SIZES if key in known and key in said}
    backbone: Any = config.build(torch.device("cpu"), torch.float32, 0)
    if "guidance_scale" in said and backbone.guidance_told("teacher") not in (None, said["guidance_scale"]):
        settings["guidance"] = dict.fromkeys(("student", "teacher", "fake_score"), said["guidance_scale"])
    try:
        return dataclasses.replace(config, **settings), settings
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"{folder / 'README.md'}: inference.parameters: {where} {first['input']} does not fit: {first['msg']}"
        ) from None
