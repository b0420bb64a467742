"""Several chunks of a video in the making at once (`order: rolling`; Rolling Forcing, arXiv 2509.25161).

With T steps, T chunks are in the making, each one step behind the one before it:

    diagonal 0   chunk 0 at step 0
    diagonal 1   chunk 0 at step 1, chunk 1 at step 0
    ...
    diagonal d   chunks d - T + 1 ... d at steps T - 1 ... 0

One call of the network sees the context and all of them, in both directions, and moves each by its own step. The
oldest is then finished and committed. A chunk is thus decided while later ones are already sketched, at the cost of
one call of T chunks for each chunk. Diagonals go on beyond the end of a video, so that it begins like a longer one."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fastgen.batch import Batch, Conditioning, Draws
from fastgen.denoiser import Denoiser
from fastgen.policy import RolloutPolicy
from fastgen.rollout.passes import Noise, commit
from fastgen.rollout.steps import Rollout, Step, predict_x0, step_to
from fastgen.streaming.context import Context

# the chunks in the making, the oldest first, each [B, frames, ...] at the level of its step
Making = tuple[Tensor, ...]


def diagonal(
    student: Denoiser,
    policy: RolloutPolicy,
    cond: Conditioning,
    noise: Callable[[range], Noise],
    context: Context,
    making: Making,
    grad: bool = False,
) -> tuple[list[Step], Making]:
    """One call on all chunks in the making and a new one. Returns their steps, the oldest chunk's first, and the
    chunks as they leave it; the oldest is clean if it has made its last step. noise(frames): the draws for these."""
    chunks = context.chunks.following(context.frames, len(making) + 1)
    making = (*making, noise(chunks[-1])("initial"))
    places = range(len(chunks) - 1, -1, -1)  # the step that each chunk makes
    levels = making[0].new_tensor((*policy.timesteps, 0.0))
    t, t_next = (
        torch.cat([levels[i + ahead].expand(x.shape[:2]) for i, x in zip(places, making, strict=True)], dim=1)
        for ahead in (0, 1)
    )
    with torch.set_grad_enabled(grad):
        x0 = predict_x0(student, torch.cat(making, dim=1), t, cond, policy, t_next, context)
    steps = []
    for i, frames, x_t, clean in zip(places, chunks, making, x0.split([len(c) for c in chunks], dim=1), strict=True):
        level, following = (levels[j].expand(len(x_t)) for j in (i, i + 1))
        x_next = clean.detach()
        if i + 1 < policy.num_steps:
            draw = partial(noise(frames), f"step{i + 1}")
            x_next = step_to(student.schedule, policy, x_next.to(x_t.dtype), x_t, level, following, draw)
        steps.append(Step(x_t, level, clean, x_next))
    return steps, tuple(step.x_next for step in steps)


def roll(
    student: Denoiser, policy: RolloutPolicy, cond: Conditioning, draws: Draws, context: Context, making: Making
) -> tuple[Sequence[Tensor], Making]:
    """Diagonals until the oldest chunk is finished. Returns what `commit` takes of it, and the later chunks."""
    while True:
        steps, making = diagonal(student, policy, cond, draws.chunk, context, making)
        if len(steps) == policy.num_steps:
            return [making[0]], making[1:]


def rolled(student: Denoiser, policy: RolloutPolicy, batch: Batch, stop: Tensor, grad: bool) -> Rollout:
    """A rollout for training: chunk b stops at step (k - b) mod T, where all entries of stop [B] are k.

    These are the steps on the diagonals k, k + T, k + 2 T, ..., which alone carry gradient: one call for T chunks, and
    each chunk once. The video itself goes on from all steps, without gradient, as the sampler makes it. x is made of
    the clean predictions of the stops. Raises ValueError for stops that differ."""
    assert policy.chunks is not None
    chunks, k = policy.chunks.split(batch.latent_shape[0]), int(stop[0])
    if not bool((stop == k).all()):
        raise ValueError("order: rolling needs one stop for all samples of a batch: set objective.stops: shared")
    context, making, exits = Context(policy.chunks), Making(), list[Step]()
    noise = lambda frames: batch.chunk(frames).normal  # noqa: E731
    number = 0  # of the diagonal
    while True:
        stops = (number - k) % policy.num_steps == 0
        steps, making = diagonal(student, policy, batch.cond, noise, context, making, grad and stops)
        exits += steps if stops else []
        if len(exits) >= len(chunks):
            break
        if len(steps) == policy.num_steps:
            context = commit(student, policy, [making[0]], batch.cond, noise(context.chunk), context)
            making = making[1:]
        number += 1
    exits = exits[: len(chunks)]
    x_t, x0 = (torch.cat([getattr(step, name) for step in exits], dim=1) for name in ("x_t", "x0"))
    zero = torch.zeros_like(exits[-1].t)
    return Rollout(x0, zero, stop, (Step(x_t, exits[-1].t, x0, x0),))
