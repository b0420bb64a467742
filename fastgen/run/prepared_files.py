"""The files that `fastgen prepare` writes, each with the function that makes its bytes."""

import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fastgen.backbones.pipeline import PipelineBackbone
from fastgen.batch import Conditioning
from fastgen.data.pair_sampling import sample_pairs
from fastgen.data.pairs import PairSettings
from fastgen.data.readers import Readers
from fastgen.data.samples import Samples, encode_given_picture, encode_picture
from fastgen.data.shard_rows import fold, latents_of, packed, shard_name
from fastgen.sampling.sampler import teacher_sampler

ENCODED_AT_ONCE = 32  # prompts in one batch, as in PipelineBackbone

Make = Callable[[], bytes]


def prompt_files(
    backbone: PipelineBackbone,
    samples: Samples,
    prompts: Sequence[str],
    dtype: torch.dtype,
    shard_size: int,
    lengths: dict[str, int],
    bar: Any,
) -> dict[str, tuple[int, Make]]:
    """The files of prompts and samples: name -> its number of rows, and the function that makes its bytes."""
    files: dict[str, tuple[int, Make]] = {
        "prompts.jsonl": (len(prompts), partial(prompt_lines, prompts)),
        "samples.safetensors": (len(samples.prompts), partial(sample_rows, samples, prompts)),
    }
    for i, rows in enumerate(spans(len(prompts), shard_size)):
        make = partial(encode_prompts, backbone, prompts[rows.start : rows.stop], dtype, lengths, bar)
        files[shard_name("prompts", i)] = (len(rows), make)
    return files


def picture_files(
    kind: str, backbone: PipelineBackbone, samples: Samples, dtype: torch.dtype, shard_size: int, bar: Any
) -> dict[str, tuple[int, Make]]:
    """The files of the pictures, as in `prompt_files`. kind: "latents", or "images" for what networks are told of
    them."""
    encode = partial({"latents": encode_pictures, "images": encode_given_pictures}[kind], Readers())
    groups: dict[str, Sequence[int]] = {kind: range(samples.num_pictures)}
    if samples.sizes:
        groups = dict(zip(map(latents_of, samples.sizes), (m.tolist() for m in samples.of_buckets()), strict=True))
    files: dict[str, tuple[int, Make]] = {}
    for name, pictures in groups.items():
        for i, rows in enumerate(spans(len(pictures), shard_size)):
            of_shard = pictures[rows.start : rows.stop]
            files[shard_name(name, i)] = (len(rows), partial(encode, backbone, samples, of_shard, dtype, bar))
    return files


def pair_files(
    backbone: PipelineBackbone, samples: Samples, pairs: PairSettings, dtype: torch.dtype, shard_size: int, bar: Any
) -> dict[str, tuple[int, Make]]:
    """The files of the ODE pairs, as in `prompt_files`. Raises ValueError if the teacher's sampler draws noise."""
    if backbone.teacher_policy(pairs.steps).transition != "ode":
        raise ValueError("pairs need the teacher's ODE, but its own scheduler is stochastic; use another pipeline")
    sample_of = pairs.samples(len(samples.prompts))
    prompts = [samples.prompts[i] for i in sample_of.tolist()]
    teacher = cache(lambda: teacher_sampler(backbone, pairs.steps, pairs.guidance_scale))  # loaded only if needed

    def images(rows: range) -> Conditioning | None:
        if not backbone.takes_given:
            return None
        pictures = samples.shown(sample_of[list(rows)], torch.tensor(rows) // len(samples.prompts))
        return Conditioning.cat([encode_given_picture(backbone, samples.read_given(i)) for i in pictures])

    def make(rows: range) -> bytes:
        return packed({"x0": sample_pairs(teacher(), prompts, rows, pairs.key, bar, images).to(dtype)})

    spanned = enumerate(spans(pairs.count, shard_size))
    return {shard_name("pairs", i): (len(rows), partial(make, rows)) for i, rows in spanned}


def prompt_lines(prompts: Sequence[str]) -> bytes:
    return "".join(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in prompts).encode()


def sample_rows(samples: Samples, prompts: Sequence[str]) -> bytes:
    """prompt [N] and, with images, picture [N]: the row of each sample's prompt and of its picture."""
    row = {prompt: i for i, prompt in enumerate(prompts)}
    tensors = {"prompt": torch.tensor([row[p] for p in samples.prompts])}
    if samples.pictures is not None:
        tensors["picture"] = samples.pictures
    if samples.bucket_of is not None:
        tensors["bucket"] = samples.bucket_of
    return save(tensors)


@torch.no_grad()
def encode_prompts(
    backbone: PipelineBackbone, prompts: Sequence[str], dtype: torch.dtype, lengths: dict[str, int], bar: Any
) -> bytes:
    """Encodes the prompts of one shard. lengths: key -> token count, filled in here. Padding is stored only once."""
    chunks = []
    with backbone.encoding():
        for span in spans(len(prompts), ENCODED_AT_ONCE):
            rows = backbone.encode_chunk(list(prompts[span.start : span.stop]))
            chunks.append({k: v.cpu() for k, v in rows.items()})
            bar.update(len(span))
    joined = {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}
    for key, value in joined.items():
        if value.dim() == 3:
            check_length(lengths, key, value.shape[1])
    return packed({key: narrowed(fold(value), dtype).contiguous() for key, value in joined.items()})


def check_length(lengths: dict[str, int], key: str, length: int) -> None:
    """Notes the number of tokens of some prompts. Raises ValueError if others have another."""
    if lengths.setdefault(key, length) != length:
        raise ValueError(
            f"{key} has {length} tokens for these prompts and {lengths[key]} for others; only prompts that are all "
            "padded to one length can be prepared"
        )


def narrowed(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts tokens [n, L, D] to the stored dtype. Everything else in a prompt's conditioning is left as it is: it
    is small, and it may be sizes, which a narrow dtype would round."""
    return rows.to(dtype) if rows.dim() == 3 and rows.is_floating_point() else rows


def encode_pictures(
    readers: Readers,
    backbone: PipelineBackbone,
    samples: Samples,
    pictures: Sequence[int],
    dtype: torch.dtype,
    bar: Any,
) -> bytes:
    """Encodes the pictures of one shard: latents [n, *latent_shape]."""
    latents = []
    for given in readers.each(samples.read_data, pictures):
        latents.append(encode_picture(backbone, given).to(dtype))
        bar.update()
    return packed({"latents": torch.stack(latents)})


def encode_given_pictures(
    readers: Readers,
    backbone: PipelineBackbone,
    samples: Samples,
    pictures: Sequence[int],
    dtype: torch.dtype,
    bar: Any,
) -> bytes:
    """Encodes the pictures, control videos or sounds of one shard: the rows of `Backbone.encode_images`."""
    rows = []
    for given in readers.each(samples.read_given, pictures):
        rows.append(encode_given_picture(backbone, given).to(dtype))
        bar.update()
    return packed(Conditioning.cat(rows))


def spans(count: int, size: int) -> list[range]:
    return [range(i, min(i + size, count)) for i in range(0, count, size)]
