"""Samples ODE pairs from the teacher. Stored pairs are read by pairs.py, which needs no sampler."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastgen.backbones.base import Backbone
from fastgen.batch import Conditioning
from fastgen.data.pairs import Pairs, PairSettings
from fastgen.run.terminal import progress_bar
from fastgen.sampling.sampler import Sampler, teacher_sampler

AT_ONCE = 32  # pairs per batch; a fixed number, so that an interruption does not change their last bits


def pair_samples(
    sampler: Sampler, prompts: Sequence[str], ids: Sequence[int], key: int, images: Conditioning | None = None
) -> Tensor:
    """The teacher's samples x0 [B, *latent_shape], made from the `pair_noise` of these ids for these prompts, and from
    these images, if the backbone takes some."""
    return sampler.latents(prompts, ids, key, images)


def sample_pairs(
    sampler: Sampler,
    prompts: Sequence[str],
    rows: range,
    key: int,
    bar: Any,
    images: Callable[[range], Conditioning | None] = lambda rows: None,
) -> Tensor:
    """x0 [len(rows), *latent_shape] of the pairs `rows`, on the CPU. prompts: one for each of all pairs. images: gives
    those of some pairs, if the backbone takes images."""
    parts = []
    for first in range(rows.start, rows.stop, AT_ONCE):
        chunk = range(first, min(first + AT_ONCE, rows.stop))
        parts.append(pair_samples(sampler, prompts[chunk.start : chunk.stop], chunk, key, images(chunk)).cpu())
        bar.update(len(chunk))
    return torch.cat(parts)


def made_pairs(settings: PairSettings, prompts: Sequence[str], backbone: Backbone) -> Pairs:
    """Pairs that are kept in memory. All of them are sampled when the first one is read."""

    @cache
    def made() -> Tensor:
        sampler = teacher_sampler(backbone, settings.steps, settings.guidance_scale)
        pair_prompts = [prompts[i] for i in settings.samples(len(prompts)).tolist()]
        with progress_bar(settings.count, "sampling pairs", "pair") as bar:
            return sample_pairs(sampler, pair_prompts, range(settings.count), settings.key, bar)

    return Pairs(settings, len(prompts), backbone, lambda rows: made()[list(rows)])
