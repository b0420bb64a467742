"""Adapters (LoRA) that were trained for the original pipeline, on a student that was distilled from it.

A student has the layers of its teacher, so that a style, a subject or a slider of the teacher fits it. What it does
there is to be measured: the student's weights have moved, and it is not guided, which is what makes many adapters
strong in the teacher."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fastgen.backbones.pipeline import PipelineBackbone
from fastgen.sampling.sampler import Routed, Sampler, sha256
from fastgen.sampling.teacher_first import TeacherFirst

WEIGHTS = "*.safetensors"


class Adapter(NamedTuple):
    """path: a file of safetensors in any layout that diffusers' load_lora_weights reads, or a folder with one such
    file. scale: what its change of the weights is multiplied by; a slider also takes negative ones."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Adapter":
        """From PATH or PATH=SCALE. Raises ValueError if there is no such file, or the scale is no number."""
        path, sign, scale = text.rpartition("=")
        whole = not sign or Path(text).exists()  # a path may have the sign in it
        try:
            adapter = cls(Path(text)) if whole else cls(Path(path), float(scale))
        except ValueError:
            raise ValueError(f"{text}: the scale of an adapter is a number, got {scale}") from None
        if not math.isfinite(adapter.scale):
            raise ValueError(f"{text}: the scale of an adapter must be finite")
        return cls(adapter.file, adapter.scale)

    @property
    def file(self) -> Path:
        """Raises ValueError unless there is exactly one."""
        found = [self.path] if self.path.is_file() else sorted(self.path.glob(WEIGHTS))
        if len(found) != 1 or found[0].suffix != ".safetensors":
            raise ValueError(
                f"{self.path} is neither a file of safetensors nor a folder with one such file; name that of the "
                "adapter"
            )
        return found[0]


class Adapted(Sampler):
    """A sampler whose network has further adapters on it. `facts` says which."""

    def __init__(self, sampler: Sampler, adapters: Sequence[Adapter]):
        super().__init__(
            sampler.backbone,
            sampler.denoiser,
            sampler.policy,
            sampler.guidance_scale,
            sampler.weights_folder,
            sampler.part,
        )
        self.adapters = adapters

    def facts(self) -> dict[str, Any]:
        named = [{"file": a.file.name, "scale": a.scale, "sha256": sha256(a.file)} for a in self.adapters]
        return super().facts() | {"adapters": named}


def with_adapters(sampler: Sampler, adapters: Sequence[Adapter]) -> Sampler:
    """The sampler with these adapters added to its network and text encoders, in place; the sampler itself for none of
    them. Raises ValueError for a file that cannot be read or has no layer of this network, and for samplers that have
    no single stock network."""
    if not adapters:
        return sampler
    backbone = sampler.backbone
    single = not isinstance(sampler, Routed) and len(sampler.denoiser.members) == 1
    if isinstance(sampler, TeacherFirst):
        raise ValueError("the teacher would make the first steps without the adapters; leave out one or the other")
    if not isinstance(backbone, PipelineBackbone) or not backbone.stores_adapters or not single:
        raise ValueError("adapters are added to pipelines of one network, of a class that loads adapters in diffusers")
    network = sampler.denoiser.members[0].network
    with lent(backbone.text_pipeline, backbone.subfolder, network) as pipeline:
        names = own = list(network.peft_config) if hasattr(network, "peft_config") else []
        for i, adapter in enumerate(adapters):
            names = [*names, f"given_{i}"]
            load(pipeline, adapter, names[-1])
            if not any(names[-1] in getattr(module, "lora_A", ()) for module in network.modules()):
                raise ValueError(
                    f"{adapter.file} has no layer of {type(network).__name__}; it is for another pipeline"
                )
        pipeline.set_adapters(names, [1.0] * len(own) + [adapter.scale for adapter in adapters])
    sampler.denoiser.requires_grad_(False).eval()
    return Adapted(sampler, adapters)


@contextmanager
def lent(pipeline: Any, name: str, network: Any) -> Iterator[Any]:
    """The pipeline of text encoders, with the denoising network in it inside the context."""
    before = getattr(pipeline, name, None)
    pipeline.register_modules(**{name: network})
    try:
        yield pipeline
    finally:
        pipeline.register_modules(**{name: before})


def load(pipeline: Any, adapter: Adapter, name: str) -> None:
    file = adapter.file
    try:
        pipeline.load_lora_weights(
            str(file.parent), weight_name=file.name, adapter_name=name, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"{file} cannot be added to this pipeline: {error}") from None
