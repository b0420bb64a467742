"""Scalar inputs of a network besides its noise level: branches of its time embedder, which start at zero."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LEVELS = ("s", "guidance", "num_steps")
FREQUENCIES = tuple(math.pi * 2 ** (-1 + 3 * i / 7) for i in range(8))  # pi / 2 to 4 pi


class ExtraInputs(nn.Module):
    """A time embedder that also reads extra scalars: embedding(t) + sum_i table_i(extra_i).

    The scalars are packed into the timestep tensor, [B, 1 + n] instead of [B], so that JVP and activation
    checkpointing see them. The added branches start at zero: a newly extended network computes what it did before.
    counts: name -> number of values, for integer inputs such as the stop index of a rollout. levels: names of
    continuous inputs."""

    def __init__(self, embedding: nn.Module, dim: int, counts: Mapping[str, int], levels: Sequence[str] = ()):
        """Raises ValueError for names in `levels` that are not in LEVELS."""
        super().__init__()
        if unknown := set(levels) - set(LEVELS):
            raise ValueError(f"the continuous inputs that exist are {list(LEVELS)}, got {sorted(unknown)}")
        self.embedding = embedding
        self.tables = nn.ModuleDict({name: IntegerInput(count, dim) for name, count in counts.items()})
        self.tables.update({name: LevelInput(dim) for name in levels})

    def forward(self, timestep: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        return self.add(self.embedding(timestep[:, 0], *rest, **options), timestep[:, 1:])

    def pack(self, timestep: Tensor, t: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """[*t.shape, 1 + n]: the timestep and the given scalars, in the order of the tables. t: the noise level.
        timestep: in the network's own unit, shaped like t. Raises ValueError if an input is missing or unknown."""
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


class ThousandfoldInputs(ExtraInputs):
    """For networks that multiply their timestep, and with it the scalars in its columns, by 1000 before embedding."""

    def forward(self, timestep: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        return self.add(self.embedding(timestep[:, 0], *rest, **options), timestep[:, 1:] / 1000)


class IntegerInput(nn.Embedding):
    """An embedding with one row per value, zero at the start. It has no derivative with respect to the value."""

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
    """For UNets: their time embedding gets the projected timestep and, as `timestep_cond`, the scalars [B, n], and
    after them what the stock UNet is given there, if it is one that is told a guidance scale."""

    def forward(self, timestep: Tensor, *rest: Tensor) -> Tensor:  # type: ignore[override]
        scalars, own = rest[0].tensor_split([len(self.tables)], dim=1)
        conditions = (own.to(timestep.dtype).contiguous(),) if own.shape[1] else ()
        return self.add(self.embedding(timestep, *conditions), scalars)


class WanExtraInputs(ExtraInputs):
    """ExtraInputs around Wan's condition embedder.

    The network flattens the timesteps it is given, [B, 1 + n] or, if each token has its own level, [B, L (1 + n)].
    This class undoes that. It returns the embedding of one token, which the blocks broadcast, or of all tokens. The
    extra scalars also reach the blocks, because the modulation of the blocks is projected from the sum."""

    def forward(self, timestep: Tensor, *rest: Tensor, timestep_seq_len: int) -> tuple[Tensor, ...]:  # type: ignore[override]
        packed = timestep.unflatten(0, (-1, timestep_seq_len)).unflatten(1, (-1, 1 + len(self.tables)))
        embedder: Any = self.embedding
        times, tokens = packed[..., 0], packed.shape[1]
        embedding, _, *others = embedder(times.flatten(), *rest, timestep_seq_len=tokens)
        embedding = self.add(embedding, packed[..., 1:])
        return embedding, embedder.time_proj(embedder.act_fn(embedding)), *others


class FlatInputs(ExtraInputs):
    """For networks that flatten the timesteps they are given: [B (1 + n)] instead of [B, 1 + n]."""

    def forward(self, timestep: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        return super().forward(timestep.unflatten(0, (-1, 1 + len(self.tables))), *rest, **options)


class SprintInputs(ExtraInputs):
    """ExtraInputs around the time embedder of Sana-Sprint, which returns the embedding and the modulation that it
    projects from it. The extra scalars reach both."""

    def forward(self, timestep: Tensor, *rest: Tensor, **options: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        embedder: Any = self.embedding
        _, embedding = embedder(timestep[:, 0], *rest, **options)
        embedding = self.add(embedding, timestep[:, 1:])
        return embedder.linear(embedder.silu(embedding)), embedding


def level_column(name: str, value: Tensor, t: Tensor) -> Tensor:
    """The value that a branch reads; it is zero where the input is neutral. For s, the level where a jump ends, it is
    t - s. For guidance, the embedded scale w, it is (w - 1) / 10. For num_steps it is 1 / num_steps (ours): zero for
    the teacher's ODE, which has infinitely many."""
    if name == "num_steps":
        return 1 / value
    return t - value if name == "s" else (value - 1) / 10


def unextended(network: nn.Module) -> list[nn.Parameter]:
    """The parameters of the network it was made from, in order: all but the tables of extra inputs."""
    inputs = [m for m in network.modules() if isinstance(m, ExtraInputs)]
    added = {id(p) for m in inputs for p in m.tables.parameters()}
    return [p for p in network.parameters() if id(p) not in added]


def carried_names(own: Iterable[str], given: Iterable[str]) -> dict[str, str]:
    """own name -> given name of the same weight, for two students of which `own` may have more inputs. An added input
    wraps the time embedder, which changes the names of its weights. Inputs that only `own` has are left out. If only
    `own` has experts, each of them takes the weights of the one network. A linear memory, what tells of actions, a
    sound stream, the fusion of an inner flow and the head of a segment flow are left out alike. Raises ValueError if
    the names differ in any other way."""
    mine, theirs = plain_names(own), plain_names(given)
    if not any(name.startswith("experts.") for name in theirs):
        experts = {name.split(".")[1] for name in mine if name.startswith("experts.")}
        theirs = {f"experts.{i}.{name}": stored for i in experts for name, stored in theirs.items()} or theirs
    missing = mine.keys() - theirs.keys()
    parts = ("memory", "actions", "sound", "fusion", "segment_head")
    added = (".tables.", *(f"network.{part}." for part in parts))
    new = {n for n in missing if any(part in n for part in added) or n.startswith("inputs.")}
    if differing := (mine.keys() ^ theirs.keys()) - new:
        raise ValueError(f"the weights belong to another network; they differ in {', '.join(sorted(differing)[:4])}")
    return {mine[name]: theirs[name] for name in mine.keys() & theirs.keys()}


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """The name without the wrapper around an extended time embedder -> the name itself."""
    names = list(names)
    wrapped = {name.partition(".tables.")[0] for name in names if ".tables." in name}
    result = {}
    for name in names:
        prefix = next((w for w in wrapped if name.startswith(f"{w}.embedding.")), None)
        result[name if prefix is None else name.replace(f"{prefix}.embedding.", f"{prefix}.")] = name
    return result
