"""What objectives on given videos share: a causal network predicts each chunk, given the clean frames before it.

Two forms compute the same predictions with the same gradient (tests/test_teacher_forcing.py):
    packed    one call on the clean and the noisy video, with a mask. Not every schedule can be written as one.
    chunks    chunk by chunk, as a rollout goes, for any schedule. What is remembered of the data carries gradient.
"""

from typing import Literal

import torch
from torch import Tensor

from fastgen.batch import Batch, Conditioning
from fastgen.denoiser import Denoiser, Inputs
from fastgen.rollout import RolloutPolicy, commit
from fastgen.streaming.context import Context
from fastgen.streaming.schedule import ChunkSchedule

Form = Literal["packed", "chunks"]


def check_order(policy: RolloutPolicy) -> None:
    """Raises ValueError for a policy whose chunks see noisy earlier frames."""
    if policy.chunks is not None and policy.chunks.order == "step":
        raise ValueError(
            "with rollout.chunks.order: step a chunk sees noisy earlier frames, and this objective gives it clean "
            "ones: leave order out in this stage"
        )


def by_frame(values: Tensor, chunks: ChunkSchedule, num_frames: int) -> Tensor:
    """[B, F]: one value for each chunk, [B, chunks], given to all of its frames."""
    lengths = torch.tensor([len(frames) for frames in chunks.split(num_frames)], device=values.device)
    return values.repeat_interleave(lengths, dim=1)


def predict_chunks(
    network: Denoiser,
    policy: RolloutPolicy,
    batch: Batch,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    cond: Conditioning,
    form: Form = "packed",
) -> Tensor:
    """The clean predictions [B, F, ...] of all chunks of x_t, each given the frames of x0 before it.

    x0: real videos [B, F, ...].  x_t: noisy ones.  t: [B, F], the same for the frames of a chunk."""
    assert policy.chunks is not None
    if form == "packed":
        return network(x_t, t, cond, Inputs(causal=policy.chunks, clean=seen_frames(network, policy, batch, x0)))
    context, predictions = Context(policy.chunks), list[Tensor]()
    for frames in policy.chunks.split(x_t.shape[1]):
        part = slice(frames.start, frames.stop)
        predictions.append(network(x_t[:, part], t[:, frames.start], cond, Inputs(context=context)))
        if frames.stop < x_t.shape[1]:
            context = commit(network, policy, [x0[:, part]], cond, batch.chunk(frames).normal, context, grad=True)
    return torch.cat(predictions, dim=1)


def seen_frames(network: Denoiser, policy: RolloutPolicy, batch: Batch, x0: Tensor) -> Tensor:
    """The videos as later chunks see them: renoised to the schedule's context noise, with the draws of a rollout."""
    assert policy.chunks is not None
    level = policy.chunks.context_noise
    if not level:
        return x0
    noise = batch.chunk(range(x0.shape[1])).normal("context")
    return network.schedule.add_noise(x0, noise, x0.new_full((len(x0),), level)).to(x0.dtype)
