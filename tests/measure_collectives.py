"""For test_sharding: what the updates of a sharded run gather and reduce, beside the least.

The least, for networks that are gathered unit by unit and freed again: every unit once for a forward, once more for
the backward pass through it, and one reduction of every unit of the turn's roles an update."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgen.config import build_recipe
from fastgen.denoiser import Denoiser
from fastgen.modules.sharding import units, whole
from fastgen.objectives import Turn
from fastgen.recipe import Recipe
from fastgen.run.build import TrainingRun, build
from fastgen.run.distributed import gathered_dtype, start
from fastgen.train import reset_roles, update

KINDS = {"_allgather_base_": "gather", "_reduce_scatter_base_": "reduce", "allreduce_": "all_reduce"}


class Collectives(TorchDispatchMode):
    """Counts the calls of collectives and the bytes of whole tensors in them, by what they do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "c10d" and name in KINDS:
            kind = KINDS[name]
            tensors = args[1] if kind == "reduce" else args[0]  # what is reduced, what is gathered
            self.calls[kind] += 1
            self.bytes[kind] += sum(t.nbytes for t in ([tensors] if isinstance(tensors, Tensor) else tensors))
        return function(*args, **(kwargs or {}))


@contextmanager
def least(run: TrainingRun, turn: Turn, counts: Collectives) -> Iterator[None]:
    """Counts the least instead, from the forwards of every unit inside the context."""
    hooks, reduced = [], dict[nn.Module, int]()
    trained = {p for role in turn.roles for p in run.networks[role].parameters()}
    for root in run.sharded:
        for part, own in units(root, root.shard_modules if isinstance(root, Denoiser) else ()):
            size = sum(p.numel() * (gathered_dtype(run.recipe) or p.dtype).itemsize for p in own)
            grads = sum(p.numel() * p.dtype.itemsize for p in own if p in trained)

            def called(module: nn.Module, _: Any, out: Any, size: int = size, grads: int = grads) -> None:
                if not size or torch._C._current_graph_task_id() != -1:  # a recomputation
                    return
                backward = any(t.requires_grad for t in tree_leaves(out) if isinstance(t, Tensor))
                counts.calls["gather"] += 1 + backward
                counts.bytes["gather"] += (1 + backward) * size
                if backward and grads:
                    reduced[module] = grads

            hooks.append(part.register_forward_hook(called))
    yield
    for hook in hooks:
        hook.remove()
    counts.calls["reduce"], counts.bytes["reduce"] = len(reduced), sum(reduced.values())


def measure(recipe: Recipe, updates: int) -> tuple[dict[str, Any], TrainingRun]:
    """Counts of the last of some updates, by turn: kind -> (calls, bytes, least calls, least bytes)."""
    run = build(recipe, start(recipe))
    found = dict[str, Any]()
    for step in range(updates):
        for turn in recipe.objective.turns(step, run.state):
            reset_roles(run, turn, step)
            counts, fewest = Collectives(), Collectives()
            with least(run, turn, fewest), counts:
                terms, _ = update(run, turn, 8 * step, 1 + step)
            found[turn.name] = {
                kind: (counts.calls[kind], counts.bytes[kind], fewest.calls[kind], fewest.bytes[kind])
                for kind in ("gather", "reduce")
            } | {"evaluations": float(terms["evaluations"]), "all_reduce": counts.calls["all_reduce"]}
    found["remembered"] = max(len(m._get_fsdp_state()._comm_ctx.post_forward_order) for m in called_roots(run))
    return found, run


def called_roots(run: TrainingRun) -> list[nn.Module]:
    return [m for m in run.sharded if m._get_fsdp_state()._is_root]


def weights(run: TrainingRun) -> dict[str, Tensor]:
    return {f"{r}.{n}": whole(p.detach()) for r in run.optimizers for n, p in run.networks[r].named_parameters()}


def measure_all(result: Path, cases: list[tuple[dict[str, Any], int]]) -> None:
    """In each of several processes: the counts of every case, a recipe and its updates, and the largest difference of
    its trained weights from those of the first case."""
    found, first = [], dict[str, Tensor]()
    for raw, updates in cases:
        counts, run = measure(build_recipe(raw), updates)
        now = weights(run)
        first = first or now
        counts["difference"] = max((float((now[k] - first[k]).abs().max()) for k in now if k in first), default=0.0)
        found.append(counts)
    if os.environ["RANK"] == "0":
        result.write_text(json.dumps(found))
