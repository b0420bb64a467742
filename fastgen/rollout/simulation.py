"""The loops over the student's steps and, for a video that streams, over its chunks."""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastgen.batch import Batch, Conditioning, Draws
from fastgen.denoiser import Denoiser
from fastgen.modules.recomputation import Replay
from fastgen.policy import RolloutPolicy, TeacherPolicy
from fastgen.rollout.passes import Noise, commit, context_of_stop, contexts_of, left_by_passes
from fastgen.rollout.rolling import Making, roll, rolled
from fastgen.rollout.steps import Rollout, Step, inner_noise, policy_law, predict_x0, step_to, transition
from fastgen.schedule import expand
from fastgen.signals import transition_log_prob
from fastgen.streaming.context import Context


class Chunk(NamedTuple):
    """Finished frames of a video: x0 [B, frames, ...], and the context that they were made with."""

    frames: range
    x0: Tensor
    context: Context


def sample(student: Denoiser, policy: RolloutPolicy, cond: Conditioning, noise: Noise) -> Tensor:
    """Runs the student from noise("initial") through all its steps. Returns clean samples [B, ...], or for a
    TeacherPolicy samples at its final level.

    noise(name) draws [B, ...] standard normal. The fresh noise of the step to timesteps[i] is named "step<i>". A
    student that works in chunks needs `Draws`, which are by frame."""
    if policy.chunks is None:
        return denoise(student, policy, cond, noise)[-1]
    if not isinstance(noise, Draws):
        raise TypeError(f"a student that works in chunks draws its noise by frame, with Draws, not {type(noise)}")
    last = policy.chunks.split(noise.shape[0])[-1]
    parts = list[Tensor]()
    for chunk in sample_chunks(student, policy, cond, noise):
        parts.append(chunk.x0)
        if chunk.frames == last:
            break
    return torch.cat(parts, dim=1)


def sample_chunks(
    student: Denoiser, policy: RolloutPolicy, cond: Conditioning, draws: Draws, context: Context | None = None
) -> Iterator[Chunk]:
    """A video without end, chunk by chunk. context: what came before; None: nothing.

    With `order: step` this is the diagonal of the passes over the video: chunk b has made step s when chunk b + 1
    needs it, and as every pass has a context of its own, the result is that of one pass after the other."""
    assert policy.chunks is not None
    context, making = context or Context(policy.chunks), Making()
    while True:
        frames = context.chunk
        left, making = next_chunk(student, policy, cond, draws, context, making)
        yield Chunk(frames, left[-1], context)
        context = commit(student, policy, left, cond, draws.chunk(frames), context)


def next_chunk(
    student: Denoiser, policy: RolloutPolicy, cond: Conditioning, draws: Draws, context: Context, making: Making
) -> tuple[Sequence[Tensor], Making]:
    """All steps that the next chunk still needs. Returns what `commit` takes, the last entry the finished chunk, and
    the later chunks that are in the making; there are some with `order: rolling` only."""
    if context.chunks.order == "rolling":
        return roll(student, policy, cond, draws, context, making)
    frames = context.chunk
    return denoise(student, policy.of_chunk(frames), cond, draws.chunk(frames), context), making


def denoise(
    student: Denoiser, policy: RolloutPolicy, cond: Conditioning, noise: Noise, context: Context | None = None
) -> deque[Tensor]:
    """All steps of the sampler, for whole samples or, with a context, for the next chunk of a video. Returns what
    `commit` takes; the last entry is the sample."""
    left = deque[Tensor](maxlen=max(1, len(policy.context_levels)))
    contexts = contexts_of(policy, context, policy.num_steps)
    x = noise("initial")
    if isinstance(policy, TeacherPolicy):
        x = policy.initial_scale * x
    for i, level in enumerate(policy.timesteps):
        t = x.new_full((len(x),), level)
        t_next = torch.full_like(t, (*policy.timesteps, 0.0)[i + 1])
        x0 = predict_x0(student, x, t, cond, policy, t_next, contexts[i], inner_noise(policy, noise, i))
        if i + 1 < policy.num_steps:
            x = step_to(student.schedule, policy, x0, x, t, t_next, partial(noise, f"step{i + 1}"))
            left.append(x)
    if isinstance(policy, TeacherPolicy) and policy.final_level:
        x0 = transition(student.schedule, x0, x, t, torch.full_like(t, policy.final_level), None)
    left.append(x0)
    return left


def backward_simulation(
    student: Denoiser,
    policy: RolloutPolicy,
    batch: Batch,
    stop: Tensor,
    grad: bool = True,
    to: Tensor | None = None,
    context: Context | None = None,
) -> Rollout:
    """DMD2's backward simulation: the student is trained on inputs that it made itself   (arXiv 2405.14867 Sec. 4.4)

    For each sample i, runs the sampler without gradient up to step stop[i], then executes that step, with gradient if
    `grad` is set.
    stop: [B] int64 in [0, num_steps). A sample that has reached its stop leaves the batch, so that mixed stops cost no
    more network evaluations than a shared stop of the same mean. With renoise, the noise in the input of the executed
    step is independent of the initial noise, as in DMD2.
    to: [B], the level that the executed step goes to, by the policy's transition with noise of its own ("exit"); x is
    then x_s at s = to. None: x is the clean prediction, and s = 0.
    A policy with chunks makes the video chunk by chunk, as `simulate_chunks` says. context: what came before it, for
    a batch of later frames of a video; None: nothing.
    With `batch.shared`, rollouts without gradient are made once; the stops are then those of the first call."""

    def run() -> Rollout:
        if policy.chunks is None:
            return simulate(student, policy, batch, stop, grad, to)[0]
        if policy.chunks.order == "rolling":
            if to is not None or context is not None:
                raise ValueError("order: rolling makes whole videos, and clean predictions of them")
            return rolled(student, policy, batch, stop, grad)
        return simulate_chunks(student, policy, batch, stop, grad, to, context or Context(policy.chunks))

    return kept(batch, grad, run)


def kept(batch: Batch, grad: bool, run: Callable[[], Rollout]) -> Rollout:
    """The rollout, or with `batch.shared` that of the first call without gradient."""
    if grad or batch.shared is None:
        return run()
    if "rollout" not in batch.shared:
        batch.shared["rollout"] = run()
    rollout = batch.shared["rollout"]
    assert isinstance(rollout, Rollout)
    return rollout


def simulate(
    student: Denoiser,
    policy: RolloutPolicy,
    batch: Batch,
    stop: Tensor,
    grad: bool,
    to: Tensor | None,
    context: Context | None = None,
) -> tuple[Rollout, list[Tensor]]:
    """The backward simulation of whole samples or, with a context, of the next chunk of a video. Also returns what
    `commit` takes."""
    x_in = batch.normal("initial")
    last = farthest(student, stop)
    contexts, states = contexts_of(policy, context, last + 1), list[Tensor]()
    with torch.no_grad():
        for i in range(last):
            reached = stop > i
            # a process without samples left still calls a sharded network, on row 0, and drops the result
            active = reached.nonzero().squeeze(1) if bool(reached.any()) else stop.new_zeros(1)
            x_t, t = x_in[active], x_in.new_full((len(active),), policy.timesteps[i])
            t_next = torch.full_like(t, policy.timesteps[i + 1])
            past = contexts[i]
            past = past if past is None or len(active) == len(stop) else past.select(active)
            inner = inner_noise(policy, partial(batch.normal, rows=active), i)
            x0 = predict_x0(student, x_t, t, batch.cond.select(active), policy, t_next, past, inner).to(x_in.dtype)
            draw = partial(batch.normal, f"step{i + 1}", rows=active)
            x_next = step_to(student.schedule, policy, x0, x_t, t, t_next, draw)
            if bool(reached.any()):
                x_in = x_in.index_copy(0, active, x_next.to(x_in.dtype))
            states.append(x_in)
    t_stop = torch.tensor(policy.timesteps, device=x_in.device, dtype=x_in.dtype)[stop]
    with torch.set_grad_enabled(grad):
        past, inner = context_of_stop(policy, context, stop, last), inner_of_stop(policy, batch, stop, last)
        x0 = predict_x0(student, x_in, t_stop, batch.cond, policy, to, past, inner)
        x = stepped(student, policy, batch, x0, x_in, t_stop, to)
    executed = Step(x_t=x_in, t=t_stop, x0=x0, x_next=x)
    rollout = Rollout(x=x, s=torch.zeros_like(t_stop) if to is None else to, stop=stop, steps=(executed,))
    if len(policy.context_levels) <= 1:
        return rollout, [x0]
    return rollout, left_by_passes(student, policy, batch, stop, executed, states)


def inner_of_stop(policy: RolloutPolicy, batch: Batch, stop: Tensor, last: int) -> Tensor | None:
    """The noise of the inner flow of each sample's executed step; None without one."""
    noise = inner_noise(policy, batch.normal, 0)
    for step in range(1, last + 1):
        own = inner_noise(policy, batch.normal, step)
        if noise is not None and own is not None:
            noise = torch.where(expand(stop == step, noise), own, noise)
    return noise


def stepped(
    student: Denoiser, policy: RolloutPolicy, batch: Batch, x0: Tensor, x_t: Tensor, t: Tensor, to: Tensor | None
) -> Tensor:
    """What a rollout returns of its executed step: x at the level `to`, or the clean prediction itself."""
    return x0 if to is None else step_to(student.schedule, policy, x0, x_t, t, to, lambda: batch.normal("exit"))


def simulate_chunks(
    student: Denoiser,
    policy: RolloutPolicy,
    batch: Batch,
    stop: Tensor,
    grad: bool,
    to: Tensor | None,
    context: Context,
) -> Rollout:
    """Self Forcing's rollout: each chunk is simulated given the chunks that the student made before it.

    All chunks stop at the same step (arXiv 2506.08009 Algorithm 1), except that a first chunk with its own levels
    stops at a step of its own. What later chunks see of a chunk is its clean prediction, without gradient; with
    `order: step` they see in each pass what the sampler would show them there (HiAR).
    The executed steps of all chunks are one Step of the whole video; its t is that of the last chunk."""
    assert policy.chunks is not None
    begin, parts, left = context, list[Rollout](), list[list[Tensor]]()
    chunks = policy.chunks.after(context.frames, batch.latent_shape[0])
    replay = grad and policy.chunks.replay
    if replay and student.is_sharded:
        raise ValueError("sharded networks cannot replay: FSDP reduces gradients once per backward pass")
    for frames in chunks:
        own, part = policy.of_chunk(frames), batch.chunk(frames)
        own_stop = stop if own is policy else torch.full_like(stop, batch.integer("first_stop", own.num_steps))
        rollout, states = simulate(student, own, part, own_stop, grad and not replay, to, context)
        parts.append(rollout)
        left.append([state.detach() for state in states])
        if frames != chunks[-1]:
            context = commit(student, policy, left[-1], batch.cond, part.normal, context)
    steps = [part.steps[-1] for part in parts]
    if replay:
        exits = replayed(student, policy, batch, stop, steps, left, to, begin)
        steps = [replace(step, x0=x0, x_next=x) for step, (x0, x) in zip(steps, exits, strict=True)]
    x_t, x0, x = (torch.cat([getattr(step, name) for step in steps], dim=1) for name in ("x_t", "x0", "x_next"))
    return Rollout(x, parts[-1].s, stop, (Step(x_t, steps[-1].t, x0, x),))


def replayed(
    student: Denoiser,
    policy: RolloutPolicy,
    batch: Batch,
    stop: Tensor,
    steps: Sequence[Step],
    left: Sequence[Sequence[Tensor]],
    to: Tensor | None,
    begin: Context,
) -> list[tuple[Tensor, Tensor]]:
    """(x0, x) of each chunk with the gradient of its executed step, at the memory of one chunk's graph.

    steps: the executed steps, computed without gradient.  left: what the chunks left for `commit`.  begin: the context
    of the first chunk. The backward pass
    makes the chunks again in order. It executes each step with gradient, passes back what has arrived for its x0, and
    commits the chunk. As contexts carry no gradient, this is the gradient of the whole graph  (replayed
    back-propagation, RELIC, arXiv 2512.04040; derived)"""
    chunks = begin.chunks.after(begin.frames, batch.latent_shape[0])

    def replay(grads: Sequence[Tensor]) -> None:
        context = begin
        for frames, step, states, grad in zip(chunks, steps, left, grads, strict=True):
            seen = context_of_stop(policy, context, stop, len(states) - 1)
            with torch.enable_grad():
                x0 = predict_x0(student, step.x_t, step.t, batch.cond, policy.of_chunk(frames), to, seen)
            x0.backward(grad)
            context = commit(student, policy, states, batch.cond, batch.chunk(frames).normal, context)

    outputs = Replay.apply(replay, torch.zeros((), requires_grad=True), *(step.x0 for step in steps))
    return [
        (x0, stepped(student, policy.of_chunk(frames), batch.chunk(frames), x0, step.x_t, step.t, to))
        for frames, step, x0 in zip(chunks, steps, outputs, strict=True)
    ]


def trajectory(
    student: Denoiser, policy: RolloutPolicy, batch: Batch, shared_steps: Collection[int] = (), log_prob: bool = True
) -> Rollout:
    """Runs the whole sampler and keeps every step: x is the clean sample, and steps[i] is the step at timesteps[i].

    shared_steps: indices i of the steps whose transition noise is shared by all samples of a prompt group (SubGRPO,
    arXiv 2605.26108). Differences within a group are then due to the other steps. The initial noise is never shared.
    log_prob: whether each stochastic step carries the log-probability of its draw, `signals.transition_log_prob` with
    its defaults. The last step is deterministic and has none. Call this under no_grad; it is not meant for gradient.
    """
    x, steps = batch.normal("initial"), list[Step]()
    for i, level in enumerate(policy.timesteps):
        t = x.new_full((len(x),), level)
        t_next = torch.full_like(t, (*policy.timesteps, 0.0)[i + 1])
        x0 = predict_x0(student, x, t, batch.cond, policy, t_next).to(x.dtype)
        if i + 1 == policy.num_steps:
            steps.append(Step(x, t, x0, x0))
            break
        fresh = batch.normal(f"step{i + 1}", by_group=i in shared_steps)
        mean, std = policy_law(student.schedule, policy, x0, x, t, t_next)
        x_next = mean + std * fresh
        scored = transition_log_prob(x_next, mean, std) if log_prob and policy.transition != "ode" else None
        steps.append(Step(x, t, x0, x_next, scored))
        x = x_next
    last = steps[-1]
    return Rollout(last.x0, torch.zeros_like(last.t), torch.full_like(batch.ids, len(steps) - 1), tuple(steps))


def farthest(student: Denoiser, stop: Tensor) -> int:
    """The largest stop index; over all processes if the network is sharded, as they must call it equally often."""
    last = stop.max()
    if student.is_sharded:
        dist.all_reduce(last, dist.ReduceOp.MAX)
    return int(last)


def draw_stops(batch: Batch, num_steps: int, shared: bool, by_group: bool = False) -> Tensor:
    """[B] int64 stop indices: one for the whole update (DMD2), or one per sample, keyed by the sample's id, or one per
    prompt group."""
    if shared:
        return torch.full_like(batch.ids, batch.integer("stop", num_steps))
    return (batch.uniform("stop", by_group) * num_steps).long().clamp(max=num_steps - 1)
