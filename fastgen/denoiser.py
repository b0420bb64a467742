"""The one network contract: an unmodified network behind `forward(x_t, t, cond) -> x0 prediction`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastgen.batch import Conditioning
from fastgen.schedule import PredictionType, Schedule


class Denoiser(nn.Module):
    """A network, its schedule and its prediction type.

    Subclasses implement `call_network`, the only place where a family's argument names appear. They list the modules
    whose outputs serve as features (`feature_modules`) and say how wide those are (`feature_dim`)."""

    feature_dim: int

    def __init__(self, network: nn.Module, schedule: Schedule, prediction_type: PredictionType):
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.prediction_type: PredictionType = prediction_type

    def call_network(self, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """The raw network output. timestep is in the network's own unit; [B], or [B, 1 + n] with n extra inputs."""
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
        but is conditioned on an earlier time). extras: the scalar inputs the network was extended by, each [B].
        predict: what to return; conversions run in at least float32, and differentiably."""
        timestep = self.schedule.network_time(t if told_time is None else told_time)
        if isinstance(self.time_embedding, ExtraInputs) or extras:
            timestep = pack_extras(self.time_embedding, timestep, extras or {})
        output = self.call_network(x_t, timestep, cond).to(torch.promote_types(x_t.dtype, torch.float32))
        if predict == self.prediction_type:
            return output
        x0 = self.schedule.to_sample(output, x_t, t, self.prediction_type)
        return self.schedule.from_sample(x0, x_t, t, predict)

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

    @contextmanager
    def capture(self) -> Iterator[list[Tensor]]:
        """Collects the features [B, N, feature_dim], one entry a depth, of every forward inside the context."""
        features: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            tokens = output if isinstance(output, Tensor) else output[-1]
            features.append(tokens if tokens.dim() == 3 else tokens[:, None])

        hooks = [module.register_forward_hook(keep) for module in self.feature_modules]
        try:
            yield features
        finally:
            for hook in hooks:
                hook.remove()


class ExtraInputs(nn.Module):
    """A time embedder that also reads extra scalars: embedding(t) + sum_i table_i(extra_i).

    The scalars travel inside the timestep tensor, [B, 1 + n] instead of [B], so that JVP and activation checkpointing
    see them. The added branches start at zero: a freshly extended network is exactly the one it was made from.
    counts: name -> number of values, for integer inputs such as the stop index of a rollout."""

    def __init__(self, embedding: nn.Module, dim: int, counts: Mapping[str, int]):
        super().__init__()
        self.embedding = embedding
        self.tables = nn.ModuleDict({n: nn.Embedding(c, dim, _weight=torch.zeros(c, dim)) for n, c in counts.items()})

    def forward(self, timestep: Tensor, *rest: Tensor) -> Tensor:
        out = self.embedding(timestep[:, 0], *rest)
        for column, table in enumerate(self.tables.values(), start=1):
            out = out + table(timestep[:, column].round().long())
        return out


def pack_extras(embedding: nn.Module, timestep: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
    """[B, 1 + n]: the timestep and the extra scalars in the order of the embedder's tables."""
    expected = list(embedding.tables) if isinstance(embedding, ExtraInputs) else []
    if set(extras) != set(expected):
        raise ValueError(f"this network takes the extra inputs {expected}, got {sorted(extras)}")
    return torch.stack([timestep] + [extras[name].to(timestep.dtype) for name in expected], dim=1)


def add_stop_input(denoiser: Denoiser, num_stops: int, dim: int) -> Denoiser:
    """Lets a denoiser be told at which step of the rollout its input was produced (extra input "stop")."""
    denoiser.set_time_embedding(ExtraInputs(denoiser.time_embedding, dim, {"stop": num_stops}))
    return denoiser


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
