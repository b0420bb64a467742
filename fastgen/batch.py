"""The data that one turn of an objective sees: the conditioning, and whatever else the objective asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgen import noise


class Conditioning(dict[str, Tensor]):
    """Named tensors with a shared batch axis: what a network is conditioned on, besides x_t, t and `denoiser.Inputs`.

    Each backbone has its own keys (SD3: prompt_embeds [B, L, D], pooled [B, P]; a mixture: label [B]). Those of a
    given image begin with image_."""

    def select(self, index: Tensor | slice) -> "Conditioning":
        """Selects rows by integer index, boolean mask or slice."""
        return Conditioning({k: v[index] for k, v in self.items()})

    def repeat(self, times: int) -> "Conditioning":
        """Repeats each row `times` times. The copies of one sample are adjacent, as prompt groups need."""
        return Conditioning({k: v.repeat_interleave(times, dim=0) for k, v in self.items()})

    def to(self, target: torch.device | str | torch.dtype) -> "Conditioning":
        """The rows on another device; or with another dtype, which integers and booleans keep."""
        if isinstance(target, torch.dtype):
            return Conditioning({k: v.to(target) if v.is_floating_point() else v for k, v in self.items()})
        return Conditioning({k: v.to(target) for k, v in self.items()})

    @property
    def nbytes(self) -> int:
        return sum(v.nbytes for v in self.values())

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """Concatenates along the batch axis. Raises ValueError if the keys differ."""
        if any(p.keys() != parts[0].keys() for p in parts):
            keys = [sorted(p.keys()) for p in parts]
            raise ValueError(f"conditionings can only be concatenated if their keys are the same, got {keys}")
        return Conditioning({k: torch.cat([p[k] for p in parts]) for k in parts[0]})


def ragged(rows: Tensor, mask: Tensor) -> list[Tensor]:
    """The rows of a padded tensor [B, L, ...], each without its padding. mask: [B, L], not zero for the first tokens
    of a row, which are kept. A mask without values, as `fastgen plan` gives it, hides nothing."""
    if type(mask) is not Tensor:
        return list(rows.unbind())
    return [row[:length] for row, length in zip(rows.unbind(), mask.bool().sum(1).tolist(), strict=True)]


def known_mask(mask: Tensor) -> Tensor:
    """The mask; for one without values, as `fastgen plan` gives it, one of the same shape that hides nothing. For
    networks that take out the rows that it hides."""
    return mask if type(mask) is Tensor else torch.ones(mask.shape, dtype=torch.bool)


@dataclass(frozen=True)
class Draws:
    """Standard normal draws of some samples by name: draws(name) is [B, *shape], and each name is independent.

    frames: if given, the first axis of `shape` counts these frames of a video, and each frame is drawn by itself. Its
    numbers then depend on (key, name, sample, frame) alone, so that a video is the same whole, in chunks of any size,
    and as the beginning of a longer one."""

    ids: Tensor
    shape: tuple[int, ...]
    key: int | str
    dtype: torch.dtype = torch.float32
    frames: range | None = None

    def __call__(self, name: str) -> Tensor:
        if self.frames is None:
            return noise.normal(self.ids, self.shape, noise.make_key(self.key, name), self.dtype)
        keys = [noise.make_key(self.key, name, frame) for frame in self.frames]
        return torch.stack([noise.normal(self.ids, self.shape[1:], key, self.dtype) for key in keys], dim=1)

    def chunk(self, frames: range) -> "Draws":
        """The draws for these frames of the video."""
        return replace(self, shape=(len(frames), *self.shape[1:]), frames=frames)


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Of latents, pixels and pairs, those that the objective does not list in `needs` are None.

    ids      [B] int64, the global sample number. It determines, together with `key`, every draw made for the sample.
    key      one integer per turn and inner update, the same on all ranks and in all micro-batches.
    cond, uncond   conditioning with the prompt, and with the negative one (empty by default), both of batch size B
             and both with the image that a sample is made from, if the backbone takes one.
    latents  [B, *latent_shape] real data, normalised as the backbone's `encode` returns it.
    pixels   [B, 3, H, W] real images in [0, 1], or [B, F, 3, H, W] videos.
    pairs    (noise, x0), each [B, *latent_shape]: both ends of the teacher's ODE.
    group    [B] int64, the prompt-group id. Samples of a group share their prompt and are all in this batch.
    frames   for a part of a video (`chunk`), which frames it has; None for whole samples.
    shared   what the inner updates of a turn share, if `Turn.one_rollout` says so: the rollout that the first of them
             made. None: every rollout is a new one. In a turn that collects, what `Objective.collect` left here."""

    ids: Tensor
    key: int
    cond: Conditioning
    uncond: Conditioning
    latent_shape: tuple[int, ...]
    prompts: tuple[str, ...] = ()
    latents: Tensor | None = None
    pixels: Tensor | None = None
    pairs: tuple[Tensor, Tensor] | None = None
    group: Tensor | None = None
    dtype: torch.dtype = torch.float32
    frames: range | None = None
    shared: dict[str, object] | None = None

    def chunk(self, frames: range) -> "Batch":
        """These frames of all videos. Noise is drawn by frame (`Draws.frames`), all else is that of the whole."""

        rows = slice(frames.start, frames.stop)
        latents = None if self.latents is None else self.latents[:, rows]
        pairs = None if self.pairs is None else (self.pairs[0][:, rows], self.pairs[1][:, rows])
        shape = (len(frames), *self.latent_shape[1:])
        return replace(self, latents=latents, pairs=pairs, latent_shape=shape, frames=frames)

    def normal(self, name: str, by_group: bool = False, rows: Tensor | None = None) -> Tensor:
        """[B, *latent_shape] standard normal, one draw per sample (or one per group). Each name gives an independent
        draw. rows: indices of the samples to draw for; each of them gets the same numbers as in a draw for the whole
        batch."""
        ids = self._rows(by_group)
        ids = ids if rows is None else ids[rows]
        return Draws(ids, self.latent_shape, self.key, self.dtype, self.frames)(name)

    def uniform(self, name: str, by_group: bool = False, shape: tuple[int, ...] = ()) -> Tensor:
        """[B, *shape] uniform in (0, 1), one draw per sample (or one per group)."""
        return noise.uniform(self._rows(by_group), shape, noise.make_key(self.key, name), self.dtype)

    def integer(self, name: str, high: int) -> int:
        """One integer in [0, high) shared by all samples, micro-batches and ranks of this update."""
        return noise.integer(high, noise.make_key(self.key, name))

    def _rows(self, by_group: bool) -> Tensor:
        if not by_group:
            return self.ids
        if self.group is None:
            raise ValueError("a draw by group needs Batch.group, which this batch does not have")
        return self.group
