"""Several networks that share the noise levels, behind the contract of one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fastgen.batch import Conditioning
from fastgen.denoiser import Denoiser, Inputs


class Experts(Denoiser):
    """Networks of one kind that share the noise levels: expert 0 from boundaries[0] up to t = 1, expert i from
    boundaries[i] up to below boundaries[i - 1], the last one below all of them.

    One module and one role; every row of a batch goes to the expert of its level."""

    def __init__(self, experts: Sequence[Denoiser], boundaries: Sequence[float]):
        """Raises ValueError unless there is one boundary less than experts, decreasing, inside (0, 1)."""
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
            raise ValueError(f"the frames of a sample need levels of one expert; the boundaries are {self.boundaries}")
        return index[:, 0]

    def per_expert(self, value: float | Sequence[float], t: Tensor) -> float | Tensor:
        """[B]: the value of each row's expert, where there is one for each."""
        if not isinstance(value, Sequence):
            return value
        if len(value) != len(self.experts):
            raise ValueError(f"{len(self.experts)} experts need as many values, got {list(value)}")
        return torch.tensor(value, device=t.device, dtype=t.dtype)[self.expert_of(t)]

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        """Each row's expert is called; its level t, not the level it is conditioned on, chooses the expert.

        Sharded networks are gathered by all processes together: each process then calls every expert that any of them
        has rows for, with a row that adds nothing where it has none of its own."""
        index = self.expert_of(t)
        called = self.called_experts(index)
        if len(called) > 1 and self._captures:
            raise ValueError(
                f"features are of one expert, and the levels of this batch lie on both sides of {self.boundaries}; "
                "draw them within one expert (gan_time.low and gan_time.high of DMD2)"
            )
        if len(called) == 1:
            return self.experts[called[0]](x_t, t, cond, inputs, predict=self.prediction_type)

        def call(i: int, rows: Tensor) -> Tensor:
            own = inputs.select(rows)
            return self.experts[i](x_t[rows], t[rows], cond.select(rows), own, predict=self.prediction_type)

        rows = {i: (index == i).nonzero().squeeze(1) for i in called}
        outputs = {i: call(i, r if len(r) else torch.zeros_like(index[:1])) for i, r in rows.items()}
        nothing = sum(0 * outputs[i].sum() for i in called if not len(rows[i]))
        out = torch.cat([outputs[i] for i in called if len(rows[i])]) + nothing
        return out[torch.cat(list(rows.values())).argsort()]

    def called_experts(self, index: Tensor) -> list[int]:
        """Those with rows here; where networks are divided, those with rows in any process."""
        if not isinstance(self, FSDPModule):
            return index.unique().tolist()
        counts = torch.bincount(index, minlength=len(self.experts))
        dist.all_reduce(counts)
        return counts.nonzero().squeeze(1).tolist()

    @property
    def time_embedding(self) -> nn.Module:
        """The first expert's; all have one of this kind."""
        return self.members[0].time_embedding

    def add_inputs(self, counts: Mapping[str, int], dim: int, levels: Sequence[str] = ()) -> None:
        for expert in self.members:
            expert.add_inputs(counts, dim, levels)

    @property
    def feature_modules(self) -> Sequence[nn.Module]:
        """The first expert's; all have as many."""
        return self.members[0].feature_modules

    @property
    def captured_modules(self) -> Sequence[nn.Module]:
        return [module for expert in self.members for module in expert.feature_modules]

    @property
    def shard_modules(self) -> Sequence[nn.Module]:
        return [module for expert in self.members for module in expert.shard_modules]

    def enable_checkpointing(self) -> None:
        for expert in self.members:
            expert.enable_checkpointing()

    @contextmanager
    def capture(self) -> Iterator[list[Tensor]]:
        """As for one network. A forward inside whose rows need several experts raises ValueError: their features have
        no common batch."""
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
