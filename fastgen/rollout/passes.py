"""What the chunks of a video see of those before them, and what they leave for those after them.

With `order: chunk` all steps of a chunk see one context, of clean frames. With `order: step` every step is a pass over
the video, with a context of its own that shows it the earlier chunks at the level that the step goes to. The contexts
of the passes are kept together, as layers of one (`Context.layers`)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fastgen.batch import Batch, Conditioning
from fastgen.denoiser import Denoiser, Memory
from fastgen.policy import RolloutPolicy
from fastgen.rollout.steps import Step, network_inputs, step_to
from fastgen.streaming.context import Context

Noise = Callable[[str], Tensor]


def contexts_of(policy: RolloutPolicy, context: Context | None, num_steps: int) -> list[Context | None]:
    """What each of the first steps of a chunk sees: one context for all, or that of the step's own pass."""
    if context is None or len(policy.context_levels) == 1:
        return [context and context.memoised()] * num_steps
    return [context.layers(i, num_steps) for i in range(num_steps)]


def context_of_stop(policy: RolloutPolicy, context: Context | None, stop: Tensor, last: int) -> Context | None:
    """What the executed steps see: the context or, with `order: step`, that of each sample's own pass. last: the
    index of the last pass that the context knows."""
    if context is None or len(policy.context_levels) == 1:
        return context
    return context.layers(last if bool((stop == last).all()) else stop, last + 1)


def commit(
    student: Denoiser,
    policy: RolloutPolicy,
    left: Sequence[Tensor],
    cond: Conditioning,
    noise: Noise,
    context: Context,
    grad: bool = False,
) -> Context:
    """The context with a finished chunk added, at the policy's `context_levels`.

    left: what each pass over the video left of the chunk, [B, frames, ...]: with `order: chunk` the clean frames; with
    `order: step` x at the levels that the steps go to, clean after the last step. Clean frames are renoised to the
    schedule's context noise with the draw "context". They get no gradient; grad: whether the student's memory does."""
    memory: Memory = []
    for i, (x, level) in enumerate(zip(left, policy.context_levels, strict=False)):
        x, t = x.detach(), x.new_full((len(x),), level)
        if level and i + 1 == len(policy.context_levels):
            x = student.schedule.add_noise(x, noise("context"), t)
        memory += student.remember(x, t, cond, context.layers(i, len(left)), network_inputs(policy, t), grad)
    return context.committed(memory, len(left))


def recommitted(
    student: Denoiser,
    policy: RolloutPolicy,
    held: Sequence[range],
    left: Callable[[range], Sequence[Tensor]],
    cond: Conditioning,
    noise: Callable[[range], Noise],
    frames: int,
) -> Context:
    """The context after `frames` frames, computed again with this student and conditioning (LongLive's recache, arXiv
    2509.22622).

    The frames that it holds are committed once more in order, each part of `held` at the place where the next chunk
    sees it, and each sees those before it. While no frame has left the window, the same student and conditioning give
    the context that was there. left(part), noise(part): what `commit` takes for these frames. Raises ValueError as
    `ChunkSchedule.check_recache` does."""
    assert policy.chunks is not None
    chunks = policy.chunks
    chunks.check_recache()
    again = Context(chunks)
    for part in held:
        own = replace(chunks, frames=len(part), first=None, window=None)
        again = replace(again, chunks=own, frames=part.start)
        again = commit(student, policy, left(part), cond, noise(part), again)
    return Context(chunks, again.blocks, frames)


@torch.no_grad()
def left_by_passes(
    student: Denoiser, policy: RolloutPolicy, batch: Batch, stop: Tensor, executed: Step, states: Sequence[Tensor]
) -> list[Tensor]:
    """With `order: step`, what `commit` takes: x after each pass up to that of the last stop.

    states: x after each pass but the last, for the samples that made it. A sample whose stop is i leaves in pass i
    what the sampler would leave there; what stands for it in later passes is never read."""
    left = [*states, executed.x0.detach()]
    for i in set(stop.tolist()) - {policy.num_steps - 1}:
        rows = (stop == i).nonzero().squeeze(1)
        x0, x_t, t = (part[rows].detach() for part in (executed.x0, executed.x_t, executed.t))
        t_next = torch.full_like(t, policy.timesteps[i + 1])
        draw = partial(batch.normal, f"step{i + 1}", rows=rows)
        x_next = step_to(student.schedule, policy, x0.to(x_t.dtype), x_t, t, t_next, draw)
        left[i] = left[i].index_copy(0, rows, x_next.to(left[i].dtype))
    return left
