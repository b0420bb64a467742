"""Several networks, each for its own range of noise levels, behind the contract of a single one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgen.batch import Conditioning
from fastgen.denoiser import Denoiser, Inputs
from fastgen.schedule import PredictionType


class Experts(Denoiser):
    """Networks of one kind, each for its own range of noise levels. Expert 0 is for t >= boundaries[0], expert i for
    boundaries[i] <= t < boundaries[i - 1], and the last expert for t below all boundaries.

    Together they are one module and one role. Each row of a batch goes to the expert for its level."""

    takes_chunks = True  # if the experts do

    def __init__(self, experts: Sequence[Denoiser], boundaries: Sequence[float]):
        """Raises ValueError unless the boundaries are one fewer than the experts, and decrease inside (0, 1)."""
        nn.Module.__init__(self)
        edges = [1.0, *boundaries, 0.0]
        if len(experts) != len(boundaries) + 1 or not all(low < high for high, low in pairwise(edges)):
            wanted = f"{len(experts) - 1} boundaries, decreasing in (0, 1)"
            raise ValueError(f"{len(experts)} experts need {wanted}, got {list(boundaries)}")
        self.experts = nn.ModuleList(experts)
        self._boundaries = tuple(boundaries)
        self.schedule, self.prediction_type = experts[0].schedule, experts[0].prediction_type
        self.feature_dim = experts[0].feature_dim
        self._captures = 0

    def expert_of(self, t: Tensor) -> Tensor:
        """The index of each row's expert: [B] int64. Raises ValueError if the frames of a sample, t [B, F], differ."""
        index = torch.stack([t < b for b in self.boundaries]).sum(0)
        if index.dim() == 1:
            return index
        if bool((index != index[:, :1]).any()):
            raise ValueError(f"the frames of a sample need one expert, but lie on both sides of {self.boundaries}")
        return index[:, 0]

    def per_expert(self, value: float | Sequence[float], t: Tensor) -> float | Tensor:
        """[B]: for each row, the value of its expert. A single value is returned as it is."""
        if not isinstance(value, Sequence):
            return value
        if len(value) != len(self.experts):
            raise ValueError(f"{len(self.experts)} experts need as many values or a single one, got {list(value)}")
        return torch.tensor(value, device=t.device, dtype=t.dtype)[self.expert_of(t)]

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        """Calls the expert of each row. It is chosen by the level t, not by the level the network is conditioned on.

        All processes gather a sharded network together. Each process then calls every expert that has rows on any
        process. Where it has none itself, it calls the expert with the smallest part of one row that the family takes
        (`Denoiser.smallest`), whose output is multiplied by zero. Objectives that draw levels by `draw_levels` need
        one expert at a time."""
        if inputs.memory is not None:
            return self.call_all(x_t, t, cond, inputs)
        index = self.expert_of(t)
        called = self.called_experts(index)
        if len(called) > 1 and self._captures:
            raise ValueError(
                f"features come from a single expert, and the levels of this batch lie on both sides of "
                f"{self.boundaries}; an objective draws them within one expert by `draw_levels`, if their law is the "
                "same for all samples"
            )
        if len(called) == 1:
            return self.experts[called[0]](x_t, t, cond, self.own(inputs, called[0]), predict=self.prediction_type)

        def call(i: int, rows: Tensor) -> Tensor:
            given = self.own(inputs, i).select(rows)
            return self.experts[i](x_t[rows], t[rows], cond.select(rows), given, predict=self.prediction_type)

        def join(i: int) -> Tensor:
            x, level, given = self.members[i].smallest(x_t[:1], t[:1], self.own(inputs, i).select(slice(1)))
            return self.experts[i](x, level, cond.select(slice(1)), given, predict=self.prediction_type)

        rows = {i: (index == i).nonzero().squeeze(1) for i in called}
        outputs = {i: call(i, r) if len(r) else join(i) for i, r in rows.items()}
        nothing = sum(0 * outputs[i].sum() for i in called if not len(rows[i]))
        out = torch.cat([outputs[i] for i in called if len(rows[i])]) + nothing
        return out[torch.cat(list(rows.values())).argsort()]

    def guide(
        self, on: Tensor, off: Tensor, scale: Tensor, x_t: Tensor, t: Tensor, predict: PredictionType = "sample"
    ) -> Tensor:
        """The rule of the first expert; the others have the same."""
        return self.members[0].guide(on, off, scale, x_t, t, predict)

    def own(self, inputs: Inputs, i: int) -> Inputs:
        """The inputs of expert i: of the context of a video, its own layers."""
        if inputs.context is None:
            return inputs
        return replace(inputs, context=inputs.context.layers(i, len(self.experts)))

    def call_all(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        """Calls every expert, as each of them has to remember the chunk that is committed, whatever its level."""
        outputs = [
            expert(x_t, t, cond, self.own(inputs, i), predict=self.prediction_type)
            for i, expert in enumerate(self.experts)
        ]
        return outputs[-1]

    def called_experts(self, index: Tensor) -> list[int]:
        """The experts that have rows on this process or, if the networks are sharded, on any process."""
        if not self.is_sharded:
            return index.unique().tolist()
        counts = torch.bincount(index, minlength=len(self.experts))
        dist.all_reduce(counts)
        return counts.nonzero().squeeze(1).tolist()

    @property
    def time_embedding(self) -> nn.Module:
        """That of the first expert; the others have one of the same kind."""
        return self.members[0].time_embedding

    def add_inputs(self, counts: Mapping[str, int], dim: int, levels: Sequence[str] = ()) -> None:
        for expert in self.members:
            expert.add_inputs(counts, dim, levels)

    def add_linear_memory(self) -> None:
        for expert in self.members:
            expert.add_linear_memory()

    @property
    def feature_modules(self) -> Sequence[nn.Module]:
        """Those of the first expert; each of the others has as many."""
        return self.members[0].feature_modules

    @property
    def captured_modules(self) -> Sequence[nn.Module]:
        return [module for expert in self.members for module in expert.feature_modules]

    @property
    def shard_modules(self) -> Sequence[nn.Module]:
        """Also what an expert has outside its blocks, so that a call of one expert gathers nothing of the others."""
        return [module for expert in self.members for module in (*expert.shard_modules, expert)]

    def enable_checkpointing(self) -> None:
        for expert in self.members:
            expert.enable_checkpointing()

    @contextmanager
    def capture(self) -> Iterator[list[Tensor]]:
        """As for a single network. A forward inside raises ValueError if its rows need several experts, because their
        features would not form one batch."""
        self._captures += 1
        try:
            with super().capture() as features:
                yield features
        finally:
            self._captures -= 1

    @property
    def members(self) -> list[Any]:
        return list(self.experts)

    @property
    def boundaries(self) -> tuple[float, ...]:
        return self._boundaries
