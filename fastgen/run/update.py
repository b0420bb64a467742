"""One optimizer step for the roles of a turn: micro-batches, gradients over all processes, clipping, and the step."""

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastgen.batch import Batch
from fastgen.networks import counted
from fastgen.objectives import Loss, Turn
from fastgen.run.averaging import Overlap, average_gradients
from fastgen.run.build import TrainingError, TrainingRun
from fastgen.run.distributed import forget_forwards, mean_terms, reduce_in_backward


def update(
    run: TrainingRun, turn: Turn, position: int, key: int, shared: Sequence[dict[str, object]] = ()
) -> tuple[dict[str, Tensor], bool]:
    """One optimizer step for the roles of a turn: accumulate, average over processes, clip, step.

    Returns the mean terms, and whether the step was made. It is skipped if a gradient is not finite.

    Sample number position + i belongs to micro-batch i // (batch_size * processes), which is split over the processes
    in order. So the samples of an update, and the noise of each of them, do not depend on how the update is divided.
    shared: what each micro-batch shares with those of the turn's other inner updates (`Batch.shared`), if anything.
    In a turn that collects, the objective sees all micro-batches before its first loss.
    Raises TrainingError if too many of the turn's updates in a row were skipped."""
    config, objective, accelerator = run.recipe.train, run.recipe.objective, run.accelerator
    terms: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=accelerator.device))
    if turn.collects:
        shared = shared or [{} for _ in range(config.accumulate)]
    batches: Iterable[Batch] = (micro_batch(run, position, key, i, shared) for i in range(config.accumulate))
    if turn.collects:
        batches = list(batches)
        for batch in batches:
            with config.autocast(accelerator.device.type), counted(run.networks) as rows:
                objective.collect(turn, run.networks, batch, run.state)
            terms["evaluations"] = terms["evaluations"] + sum(rows) / len(batch.ids) / config.accumulate
    trained = {role: [p for g in run.optimizers[role].param_groups for p in g["params"]] for role in turn.roles}
    overlap: Overlap | None = None
    for index, batch in enumerate(batches, 1):
        if run.strategy == "fsdp" and config.accumulate > 1:
            reduce_in_backward(run.sharded, config.reduce_gradients == "micro_batch" or index == config.accumulate)
        with config.autocast(accelerator.device.type), counted(run.networks) as rows:
            losses = objective.loss(turn, run.networks, batch, run.state)
            if index == config.accumulate and isinstance(losses, Loss) and overlaps(run, turn):
                overlap = Overlap(p for parameters in trained.values() for p in parameters)
            for loss in [losses] if isinstance(losses, Loss) else losses:
                with overlap or contextlib.nullcontext():
                    (loss.total / config.accumulate).backward()
                for name, value in loss.terms.items():
                    terms[name] = terms[name] + value.detach().float() / config.accumulate
        terms["evaluations"] = terms["evaluations"] + sum(rows) / len(batch.ids) / config.accumulate
    forget_forwards(run.sharded)
    if accelerator.num_processes > 1:
        if overlap is not None:
            overlap.finish(accelerator)
        else:
            for parameters in trained.values():
                average_gradients(parameters, accelerator)
        terms = mean_terms(terms)
    norms = {role: gradient_norm(parameters) for role, parameters in trained.items()}
    finite = all(bool(norm.isfinite()) for norm in norms.values())
    for role, parameters in trained.items():
        if finite:
            with_grad = [p for p in parameters if p.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(with_grad, run.recipe.optimizers[role].max_grad_norm, norms[role])
            run.optimizers[role].step()
            terms[f"grad_norm_{role}"] = norms[role]
        run.optimizers[role].zero_grad()
    if run.watch.count_skips(turn.name, not finite) > run.recipe.health.max_skipped:
        bad = ", ".join(role for role, norm in norms.items() if not norm.isfinite())
        raise TrainingError(
            f"the gradient of {bad} was not finite in {run.recipe.health.max_skipped + 1} updates in a row; "
            f"lower optimizers.{turn.roles[0]}.lr, continue from an earlier checkpoint (train.resume_from), and "
            "check that the teacher's samples in samples/teacher.png look right"
        )
    if not finite:
        return {"skipped": torch.ones((), device=accelerator.device), "evaluations": terms["evaluations"]}, False
    return terms | {"skipped": torch.zeros((), device=accelerator.device)}, True


def overlaps(run: TrainingRun, turn: Turn) -> bool:
    """Whether gradients can be averaged while the last backward pass runs: those of whole networks that one pass
    completes. Not with replayed rollouts, which make passes of their own, and not with experts, most of which have no
    gradient to send."""
    chunks = run.recipe.rollout.chunks
    whole = run.strategy == "ddp" and not (chunks is not None and chunks.replay)
    return whole and not any(getattr(run.networks[role], "boundaries", ()) for role in turn.roles)


def micro_batch(run: TrainingRun, position: int, key: int, index: int, shared: Sequence[dict[str, object]]) -> Batch:
    """This process's part of micro-batch number `index` of the update whose samples begin at `position`."""
    size, accelerator = run.recipe.train.batch_size, run.accelerator
    first = position + (index * accelerator.num_processes + accelerator.process_index) * size
    batch = run.batches.batch(first, keep=position)
    return dataclasses.replace(batch, key=key, shared=shared[index] if shared else None)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients of a role, over all processes."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
