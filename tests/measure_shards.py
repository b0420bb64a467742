"""Run under torchrun by test_distributed: a training whose every allocation is counted."""

import json
import sys
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgen import train as program
from fastgen.config import load_recipe
from fastgen.denoiser import Denoiser


class AllocatedBytes(TorchDispatchMode):
    """Sums the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor) and not leaf.is_meta:
                self.count(leaf.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, key, size)

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def main() -> None:
    recipe = load_recipe(sys.argv[1], sys.argv[2:])
    accelerator = program.start(recipe)
    peaks: list[int] = []
    open_data = type(recipe.data).open

    def measured_open(*arguments: Any) -> Any:  # the networks are there, images are not yet
        peaks.append(loading.peak)
        return open_data(*arguments)

    type(recipe.data).open = measured_open
    with AllocatedBytes() as loading:
        run = program.build(recipe, accelerator)
    modules = {**run.networks, "average": run.ema.module}
    for turn in recipe.objective.turns(0, run.state):
        program.update(run, turn, 0, 1)
    parameters = [p for module in modules.values() for p in module.parameters()]
    blocks = [b for m in modules.values() if isinstance(m, Denoiser) for b in m.shard_modules]
    seen = {
        "all_divided": all(isinstance(p, DTensor) for p in parameters),
        "whole": sum(p.numel() * p.element_size() for p in parameters),
        "held": sum(p.to_local().untyped_storage().nbytes() for p in parameters if isinstance(p, DTensor)),
        "peak_while_loading": peaks[0],
        "largest_block": max(sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks),
    }
    folder = program.open_run(recipe, accelerator)
    (folder / f"shards_{accelerator.process_index}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
