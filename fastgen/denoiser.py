"""The one network contract: an unmodified network behind `forward(x_t, t, cond) -> x0 prediction`."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fastgen.batch import Conditioning
from fastgen.modules.recomputation import checkpointed
from fastgen.modules.sharding import is_sharded
from fastgen.schedule import PredictionType, Schedule


class Denoiser(nn.Module):
    """A network, its schedule and its prediction type.

    Subclasses implement `call_network`, the only place where a family's argument names appear. They list the modules
    whose outputs serve as features (`feature_modules`) and say how wide those are (`feature_dim`)."""

    feature_dim: int
    extra_inputs: "type[ExtraInputs]"  # how the family's time embedder is wrapped; set below

    def __init__(self, network: nn.Module, schedule: Schedule, prediction_type: PredictionType):
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.prediction_type: PredictionType = prediction_type

    def call_network(self, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """The raw network output. timestep is in the network's own unit; like t, or [*t.shape, 1 + n] with n extra
        inputs."""
        raise NotImplementedError

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Conditioning,
        *,
        told_time: Tensor | None = None,
        extras: Mapping[str, Tensor] | None = None,
        predict: PredictionType = "sample",
    ) -> Tensor:
        """Predicts from x_t [B, ...] at noise level t [B] in [0, 1]; the result has the shape of x_t.

        told_time: the level the network is told when it differs from t (a one-step student that starts from pure noise
        but is conditioned on an earlier time). extras: the scalar inputs the network was extended by, each [B]; of a
        two-time network s, the level its jump ends at, each like t.
        predict: what to return; conversions run in at least float32, and differentiably."""
        timestep = self.schedule.network_time(t if told_time is None else told_time)
        if isinstance(self.time_embedding, ExtraInputs) or extras:
            timestep = pack_extras(self.time_embedding, timestep, t, extras or {})
        output = self.call_network(x_t, timestep, cond).to(torch.promote_types(x_t.dtype, torch.float32))
        if predict == self.prediction_type:
            return output
        x0 = self.schedule.to_sample(output, x_t, t, self.prediction_type)
        return self.schedule.from_sample(x0, x_t, t, predict)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the first weight. (diffusers' `dtype` walks through all modules at each call.)"""
        return next(self.network.parameters()).dtype

    @property
    def time_embedding(self) -> nn.Module:
        """The submodule that turns the timestep into an embedding."""
        raise NotImplementedError

    def set_time_embedding(self, module: nn.Module) -> None:
        """Replaces it: how scalar inputs are added. (nn.Module catches assignments before a property setter.)"""
        raise NotImplementedError

    @property
    def feature_modules(self) -> Sequence[nn.Module]:
        """Modules at increasing depth whose outputs are features for a discriminator."""
        raise NotImplementedError

    def add_inputs(self, counts: Mapping[str, int], dim: int, levels: Sequence[str] = ()) -> None:
        """Extends the network by inputs, without changing what it computes. counts: of integers, name -> number of
        values. levels: of continuous ones, any of `LEVELS`. dim: width of its time embedding."""
        self.set_time_embedding(self.extra_inputs(self.time_embedding, dim, counts, levels))

    def per_expert(self, value: float | Sequence[float], t: Tensor) -> float | Tensor:
        """What holds at level t of a value that may differ by expert, such as a guidance scale. One network has one:
        raises ValueError for several."""
        if isinstance(value, Sequence):
            raise ValueError(f"one value is needed, got {list(value)}: this model has a single network")
        return value

    @property
    def captured_modules(self) -> Sequence[nn.Module]:
        """The modules that `capture` listens to: a forward calls as many of them as there are feature_modules."""
        return self.feature_modules

    @property
    def shard_modules(self) -> Sequence[nn.Module]:
        """The modules that are gathered one after the other when the network is divided over processes."""
        return self.feature_modules

    @property
    def is_divided(self) -> bool:
        """Whether processes hold the parameters together, and so have to call the network together."""
        return is_sharded(self)

    def average(self) -> "Denoiser":
        """A copy of itself, the place of its moving average."""
        return deepcopy(self)

    def enable_checkpointing(self) -> None:
        """Computes activations again in the backward pass, block by block."""
        self.network.enable_gradient_checkpointing(gradient_checkpointing_func=checkpointed)  # type: ignore[operator]

    @contextmanager
    def capture(self) -> Iterator[list[Tensor]]:
        """Collects the features [B, N, feature_dim], one entry a depth, of every forward inside the context."""
        features: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            tokens = output if isinstance(output, Tensor) else output[-1]
            if tokens.dim() == 4:  # a feature map [B, feature_dim, H, W]
                tokens = tokens.flatten(2).mT
            features.append(tokens if tokens.dim() == 3 else tokens[:, None])

        def tie(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            for i in range(len(features) - len(self.feature_modules), len(features)):
                features[i] = features[i] + 0 * output.sum().to(features[i].dtype)

        hooks = [module.register_forward_hook(keep) for module in self.captured_modules]
        if self.is_divided:  # the backward pass gathers what lies outside the blocks when it meets the output
            hooks.append(self.register_forward_hook(tie))
        try:
            yield features
        finally:
            for hook in hooks:
                hook.remove()


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


Denoiser.extra_inputs = ExtraInputs


def level_column(name: str, value: Tensor, t: Tensor) -> Tensor:
    """What a branch reads: zero where the input is neutral. s, the level a jump ends at: t - s. guidance, the embedded
    scale w: (w - 1) / 10."""
    return t - value if name == "s" else (value - 1) / 10


def pack_extras(embedding: nn.Module, timestep: Tensor, t: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
    """[*t.shape, 1 + n]: the timestep and the extra scalars in the order of the embedder's tables."""
    tables = dict(embedding.tables.items()) if isinstance(embedding, ExtraInputs) else {}
    if set(extras) != set(tables):
        raise ValueError(f"this network takes the extra inputs {list(tables)}, got {sorted(extras)}")
    columns = [
        level_column(name, extras[name], t) if isinstance(table, LevelInput) else extras[name]
        for name, table in tables.items()
    ]
    return torch.stack([timestep] + [column.to(timestep.dtype) for column in columns], dim=-1)


def add_stop_input(denoiser: Denoiser, num_stops: int, dim: int) -> Denoiser:
    """Lets a denoiser be told at which step of the rollout its input was produced (extra input "stop")."""
    denoiser.add_inputs({"stop": num_stops}, dim)
    return denoiser


def unextended(denoiser: Denoiser) -> list[nn.Parameter]:
    """Its parameters but for the tables of extra inputs, in order: those of the network it was made from."""
    inputs = [m for m in denoiser.modules() if isinstance(m, ExtraInputs)]
    added = {id(p) for m in inputs for p in m.tables.parameters()}
    return [p for p in denoiser.parameters() if id(p) not in added]


def carried_names(own: Iterable[str], given: Iterable[str]) -> dict[str, str]:
    """own name -> given name of the same weight, where one of two students has further inputs, which wrap its time
    embedder. Inputs that only the own one has are left out. Raises ValueError for anything else that differs."""

    def plain(names: Iterable[str]) -> dict[str, str]:
        names = list(names)
        wrapped = {name.partition(".tables.")[0] for name in names if ".tables." in name}
        return {next((n.replace(f"{w}.embedding.", f"{w}.") for w in wrapped if n.startswith(f"{w}.embedding.")), n): n
                for n in names}  # fmt: skip

    mine, theirs = plain(own), plain(given)
    new = {name for name in mine.keys() - theirs.keys() if ".tables." in name or name.startswith("inputs.")}
    if differing := (mine.keys() ^ theirs.keys()) - new:
        raise ValueError(f"the weights are of another network: {', '.join(sorted(differing)[:4])}")
    return {mine[name]: theirs[name] for name in mine.keys() & theirs.keys()}


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
        self.boundaries = tuple(boundaries)
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

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Conditioning,
        *,
        told_time: Tensor | None = None,
        extras: Mapping[str, Tensor] | None = None,
        predict: PredictionType = "sample",
    ) -> Tensor:
        """As Denoiser.forward; t, not told_time, chooses the expert.

        Networks divided over processes are gathered by all of them together: each process then calls every expert that
        any of them has rows for, with a row of its own that adds nothing where it has none."""
        index = self.expert_of(t)
        called = self.called_experts(index)
        if len(called) > 1 and self._captures:
            raise ValueError(
                f"features are of one expert, and the levels of this batch lie on both sides of {self.boundaries}; "
                "draw them within one expert (gan_time.low and gan_time.high of DMD2)"
            )
        if len(called) == 1:
            expert = self.experts[called[0]]
            return expert(x_t, t, cond, told_time=told_time, extras=extras, predict=predict)

        def call(i: int, rows: Tensor) -> Tensor:
            told = None if told_time is None else told_time[rows]
            more = {k: v[rows] for k, v in (extras or {}).items()}
            return self.experts[i](x_t[rows], t[rows], cond.select(rows), told_time=told, extras=more, predict=predict)

        rows = {i: (index == i).nonzero().squeeze(1) for i in called}
        parts = {i: call(i, r if len(r) else torch.zeros_like(index[:1])) for i, r in rows.items()}
        nothing = sum(0 * parts[i].sum() for i in called if not len(rows[i]))
        out = torch.cat([parts[i] for i in called if len(rows[i])]) + nothing
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
        return self._parts[0].time_embedding

    def add_inputs(self, counts: Mapping[str, int], dim: int, levels: Sequence[str] = ()) -> None:
        for expert in self._parts:
            expert.add_inputs(counts, dim, levels)

    @property
    def feature_modules(self) -> Sequence[nn.Module]:
        """The first expert's; all have as many."""
        return self._parts[0].feature_modules

    @property
    def captured_modules(self) -> Sequence[nn.Module]:
        return [module for expert in self._parts for module in expert.feature_modules]

    @property
    def shard_modules(self) -> Sequence[nn.Module]:
        return [module for expert in self._parts for module in expert.shard_modules]

    def enable_checkpointing(self) -> None:
        for expert in self._parts:
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
    def _parts(self) -> list[Denoiser]:
        return list(self.experts)  # type: ignore[arg-type]


def denoisers_of(denoiser: Denoiser) -> list[Any]:
    """A denoiser's experts, from high noise to low; itself if it has none."""
    return list(denoiser.experts) if isinstance(denoiser, Experts) else [denoiser]


def networks_of(denoiser: Denoiser) -> list[Any]:
    """The networks behind a denoiser, from high noise to low."""
    return [part.network for part in denoisers_of(denoiser)]


def embeddings_of(denoiser: Denoiser) -> list[Any]:
    """Their time embedders."""
    return [part.time_embedding for part in denoisers_of(denoiser)]


class TokenHeads(nn.Module):
    """Discriminator heads on features of several depths: logits [B, depths], one an input depth.

    Each head is LayerNorm, Linear, SiLU, mean over tokens, Linear: DMD2's small head on the fake score's features
    (arXiv 2405.14867 Sec. 4.3) for token networks. The layer sizes are ours."""

    def __init__(self, feature_dim: int, depths: int, hidden: int = 64):
        super().__init__()
        self.inner = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(feature_dim), nn.Linear(feature_dim, hidden), nn.SiLU()) for _ in range(depths)
        )
        self.outer = nn.ModuleList(nn.Linear(hidden, 1) for _ in range(depths))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        logits = [outer(inner(f).mean(1)) for f, inner, outer in zip(features, self.inner, self.outer, strict=True)]
        return torch.cat(logits, dim=1)


class LevelWeight(nn.Module):
    """A learned log-weight of a noise level, zero at the start: sines, and a linear layer. [B] in [0, 1] -> [B]

    Of sCM's adaptive weighting (arXiv 2410.11081 Sec. 4.2), e^w square - w: at its optimum the weighted square is 1 at
    every level."""

    def __init__(self) -> None:
        super().__init__()
        self.waves, self.bias = LevelInput(1), nn.Parameter(torch.zeros(1))

    def forward(self, level: Tensor) -> Tensor:
        return (self.waves(level) + self.bias)[:, 0]
