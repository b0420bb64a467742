"""Scalars that a network is told beside its level: branches added to its time embedder, which start at zero."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LEVELS = ("s", "guidance")
FREQUENCIES = tuple(math.pi * 2 ** (-1 + 3 * i / 7) for i in range(8))  # pi / 2 to 4 pi


class ExtraInputs(nn.Module):
    """A time embedder that also reads extra scalars: embedding(t) + sum_i table_i(extra_i).

    The scalars travel inside the timestep tensor, [B, 1 + n] instead of [B], so that JVP and activation checkpointing
    see them. The added branches start at zero: a freshly extended network is exactly the one it was made from.
    counts: name -> number of values, for integer inputs such as the stop index of a rollout. levels: names of
    continuous inputs."""

    def __init__(self, embedding: nn.Module, dim: int, counts: Mapping[str, int], levels: Sequence[str] = ()):
        """Raises ValueError for a level that is none of LEVELS."""
        super().__init__()
        if unknown := set(levels) - set(LEVELS):
            raise ValueError(f"continuous inputs are {list(LEVELS)}, got {sorted(unknown)}")
        self.embedding = embedding
        self.tables = nn.ModuleDict({name: IntegerInput(count, dim) for name, count in counts.items()})
        self.tables.update({name: LevelInput(dim) for name in levels})

    def forward(self, timestep: Tensor, *rest: Tensor) -> Tensor:
        return self.add(self.embedding(timestep[:, 0], *rest), timestep[:, 1:])

    def pack(self, timestep: Tensor, t: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """[*t.shape, 1 + n]: the timestep and the given scalars, in the order of the tables. t: the noise level.
        timestep: in the network's own unit, shaped like t. Raises ValueError unless every input is given."""
        tables = dict(self.tables.items())
        if set(given) != set(tables):
            raise ValueError(f"this network takes the extra inputs {list(tables)}, got {sorted(given)}")
        columns = [
            level_column(name, given[name], t) if isinstance(table, LevelInput) else given[name]
            for name, table in tables.items()
        ]
        return torch.stack([timestep] + [column.to(timestep.dtype) for column in columns], dim=-1)

    def add(self, embedding: Tensor, columns: Tensor) -> Tensor:
        """embedding [..., dim] plus the branches of the extra scalars, columns [..., n]."""
        for column, table in enumerate(self.tables.values()):
            embedding = embedding + table(columns[..., column]).to(embedding.dtype)
        return embedding


class IntegerInput(nn.Embedding):
    """A row for each value, all zero at the start. No derivative with respect to the value."""

    def __init__(self, count: int, dim: int):
        super().__init__(count, dim, _weight=torch.zeros(count, dim))

    def forward(self, value: Tensor) -> Tensor:
        return super().forward(value.round().long())


class LevelInput(nn.Linear):
    """A zero-initialised linear layer on sin(f z) and 1 - cos(f z), which vanish at z = 0. The frequencies f are low,
    so that a derivative with respect to z does not amplify what the network has not learned."""

    def __init__(self, dim: int):
        super().__init__(2 * len(FREQUENCIES), dim, bias=False)
        nn.init.zeros_(self.weight)

    def forward(self, value: Tensor) -> Tensor:
        """value: [...], float. Returns [..., dim]; the waves are computed in the dtype of value."""
        angle = value[..., None] * torch.tensor(FREQUENCIES, device=value.device, dtype=value.dtype)
        return super().forward(torch.cat([angle.sin(), 1 - angle.cos()], dim=-1).to(self.weight.dtype))


class UNetExtraInputs(ExtraInputs):
    """A UNet gives its time embedding the projected timestep and, in `timestep_cond`, the extra scalars [B, n]."""

    def forward(self, timestep: Tensor, *rest: Tensor) -> Tensor:
        return self.add(self.embedding(timestep), rest[0])


class WanExtraInputs(ExtraInputs):
    """ExtraInputs around Wan's condition embedder.

    The network flattens the timesteps it is given, [B, 1 + n] or, with a level for each token, [B, L (1 + n)]; this
    undoes that, and returns the embedding of one token, which the blocks broadcast, or of all. The extra scalars reach
    the blocks as well: their modulation is projected from the sum."""

    def forward(self, timestep: Tensor, *rest: Tensor, timestep_seq_len: int) -> tuple[Tensor, ...]:  # type: ignore[override]
        packed = timestep.unflatten(0, (-1, timestep_seq_len)).unflatten(1, (-1, 1 + len(self.tables)))
        embedder: Any = self.embedding
        times, tokens = packed[..., 0], packed.shape[1]
        embedding, _, *others = embedder(times.flatten(), *rest, timestep_seq_len=tokens)
        embedding = self.add(embedding, packed[..., 1:])
        return embedding, embedder.time_proj(embedder.act_fn(embedding)), *others


def level_column(name: str, value: Tensor, t: Tensor) -> Tensor:
    """What a branch reads: zero where the input is neutral. s, the level a jump ends at: t - s. guidance, the embedded
    scale w: (w - 1) / 10."""
    return t - value if name == "s" else (value - 1) / 10


def unextended(network: nn.Module) -> list[nn.Parameter]:
    """Its parameters but for the tables of extra inputs, in order: those of the network it was made from."""
    inputs = [m for m in network.modules() if isinstance(m, ExtraInputs)]
    added = {id(p) for m in inputs for p in m.tables.parameters()}
    return [p for p in network.parameters() if id(p) not in added]


def carried_names(own: Iterable[str], given: Iterable[str]) -> dict[str, str]:
    """own name -> given name of the same weight, where one of two students has more inputs than the other: an added
    input wraps the time embedder, which changes the names of its weights. Inputs that only the own student has are
    left out. Raises ValueError if anything else differs."""
    mine, theirs = plain_names(own), plain_names(given)
    new = {name for name in mine.keys() - theirs.keys() if ".tables." in name or name.startswith("inputs.")}
    if differing := (mine.keys() ^ theirs.keys()) - new:
        raise ValueError(f"the weights are of another network: {', '.join(sorted(differing)[:4])}")
    return {mine[name]: theirs[name] for name in mine.keys() & theirs.keys()}


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """name without the wrapper around an extended time embedder -> name."""
    names = list(names)
    wrapped = {name.partition(".tables.")[0] for name in names if ".tables." in name}
    result = {}
    for name in names:
        prefix = next((w for w in wrapped if name.startswith(f"{w}.embedding.")), None)
        result[name if prefix is None else name.replace(f"{prefix}.embedding.", f"{prefix}.")] = name
    return result
