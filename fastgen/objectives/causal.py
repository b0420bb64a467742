"""What objectives on given videos share: a causal network predicts each chunk, given the clean frames before it. The
videos are data or, where a rollout is to be called again at other states (`predict_beside`), the student's own.

Two forms compute the same predictions with the same gradient (tests/test_teacher_forcing.py):
    packed    one call on the clean and the noisy video, with a mask. Not every schedule can be written as one.
    chunks    chunk by chunk, as a rollout goes, for any schedule. What is remembered of the data carries gradient.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fastgen.batch import Batch, Conditioning
from fastgen.denoiser import Denoiser
from fastgen.rollout import Rollout, RolloutPolicy, commit, network_inputs, predict_x0
from fastgen.schedule import PredictionType
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
    s: Tensor | None = None,
    predict: PredictionType = "sample",
) -> Tensor:
    """The predictions [B, F, ...] of all chunks of x_t, each given the frames of x0 before it.

    x0: clean videos [B, F, ...], real or of a rollout.  x_t: noisy ones.  t: [B, F], the same for the frames of a
    chunk.  s: for a student with two times, the level that its jump goes to, shaped like t; None: 0.  predict: the
    prediction type, clean frames by default. In grad mode, what is remembered of x0 carries the network's gradient."""
    assert policy.chunks is not None
    if form == "packed":
        clean = seen_frames(network, policy, batch, x0)
        inputs = replace(network_inputs(policy, t, s), causal=policy.chunks, clean=clean)
        return network(x_t, t, cond, inputs, predict=predict)
    context, predictions, grad = Context(policy.chunks), list[Tensor](), torch.is_grad_enabled()
    for frames in policy.chunks.split(x_t.shape[1]):
        part = slice(frames.start, frames.stop)
        level, end = t[:, frames.start], None if s is None else s[:, frames.start]
        inputs = replace(network_inputs(policy, level, end), context=context)
        predictions.append(network(x_t[:, part], level, cond, inputs, predict=predict))
        if frames.stop < x_t.shape[1]:
            context = commit(network, policy, [x0[:, part]], cond, batch.chunk(frames).normal, context, grad=grad)
    return torch.cat(predictions, dim=1)


def predict_beside(
    student: Denoiser, policy: RolloutPolicy, batch: Batch, rollout: Rollout, x_t: Tensor, t: Tensor
) -> Tensor:
    """The student's clean prediction at other states x_t [B, ...], at level t [B], of the samples of a rollout. Each
    chunk of a video sees what it saw in the rollout: the chunks of rollout.x before it, committed with the same draws.

    The contexts are computed anew, one commit for each chunk. The rollout's `order` must be chunk, so that they are of
    clean frames."""
    if policy.chunks is None:
        return predict_x0(student, x_t, t, batch.cond, policy)
    levels = t[:, None].expand(-1, x_t.shape[1])
    return predict_chunks(student, policy, batch, rollout.x.detach(), x_t, levels, batch.cond, "chunks")


def seen_frames(network: Denoiser, policy: RolloutPolicy, batch: Batch, x0: Tensor) -> Tensor:
    """The videos as later chunks see them: renoised to the schedule's context noise, with the draws of a rollout."""
    assert policy.chunks is not None
    level = policy.chunks.context_noise
    if not level:
        return x0
    noise = batch.chunk(range(x0.shape[1])).normal("context")
    return network.schedule.add_noise(x0, noise, x0.new_full((len(x0),), level)).to(x0.dtype)
