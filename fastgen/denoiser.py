"""The one network contract: `forward(x_t, t, cond, inputs) -> prediction` around an unmodified network."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.batch import Conditioning
from fastgen.modules.inputs import ExtraInputs
from fastgen.modules.recomputation import checkpointed
from fastgen.modules.sharding import is_sharded
from fastgen.schedule import PredictionType, Schedule

EMBEDDED = ("s", "guidance", "stop")  # the inputs that reach a network through its time embedder


@dataclass(frozen=True)
class Inputs:
    """What a network is told besides x_t, its level t and the conditioning. A field that is None is not told.

    time: [B], the level the network is conditioned on, where it differs from t (a one-step student that starts from
    pure noise but is conditioned on an earlier level).
    s: like t, the level at which the jump of a two-time network ends.
    guidance: [B], the guidance scale of a network that has it as an input.
    stop: [B] int64, the index of the rollout step that made the sample.

    A new kind of input is a new field here, read by the families that understand it."""

    time: Tensor | None = None
    s: Tensor | None = None
    guidance: Tensor | None = None
    stop: Tensor | None = None

    @property
    def given(self) -> dict[str, Tensor]:
        """The fields that are told."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def embedded(self) -> dict[str, Tensor]:
        """Those of the given fields that reach the network through its time embedder."""
        return {name: value for name, value in self.given.items() if name in EMBEDDED}

    def select(self, rows: Tensor | slice) -> "Inputs":
        """The inputs of some samples of the batch."""
        return Inputs(**{name: value[rows] for name, value in self.given.items()})


NO_INPUTS = Inputs()


class Denoiser(nn.Module):
    """A network, its schedule and its prediction type.

    Subclasses implement `call_network`, the only place where a family's argument names appear, and nothing else of the
    forward pass. They also list the modules whose outputs serve as features (`feature_modules`) and say how wide those
    are (`feature_dim`)."""

    feature_dim: int
    extra_inputs: type[ExtraInputs] = ExtraInputs  # how the family's time embedder is extended

    def __init__(self, network: nn.Module, schedule: Schedule, prediction_type: PredictionType):
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.prediction_type: PredictionType = prediction_type

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        """The network's own output at x_t [B, ...], in the denoiser's prediction type and any floating-point dtype.

        A family passes `self.timestep(t, inputs)` to its network; a wrapper passes its arguments on."""
        raise NotImplementedError

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Conditioning,
        inputs: Inputs = NO_INPUTS,
        *,
        predict: PredictionType = "sample",
    ) -> Tensor:
        """Predicts from x_t [B, ...] at noise level t in [0, 1]; the result has the shape of x_t.

        t: [B], or [B, F] where the frames of a video have their own levels.
        predict: what to return. Conversions run in at least float32, and are differentiable.
        No subclass overrides this: what is common to all networks happens here, once."""
        output = self.call_network(x_t, t, cond, inputs).to(torch.promote_types(x_t.dtype, torch.float32))
        if predict == self.prediction_type:
            return output
        x0 = self.schedule.to_sample(output, x_t, t, self.prediction_type)
        return self.schedule.from_sample(x0, x_t, t, predict)

    def timestep(self, t: Tensor, inputs: Inputs) -> Tensor:
        """What the network's time embedder is given: the timestep in the network's own unit, shaped like t, or packed
        with the embedded inputs, [*t.shape, 1 + n]. Raises ValueError for inputs the network was not extended by."""
        timestep = self.schedule.network_time(t if inputs.time is None else inputs.time)
        if self.is_extended:
            return self.time_embedding.pack(timestep, t, inputs.embedded)  # type: ignore[operator]
        if inputs.embedded:
            raise ValueError(f"this network takes the extra inputs [], got {sorted(inputs.embedded)}")
        return timestep

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
    def is_extended(self) -> bool:
        """Whether inputs were added to the network."""
        return isinstance(self.time_embedding, ExtraInputs)

    @property
    def feature_modules(self) -> Sequence[nn.Module]:
        """Modules at increasing depth whose outputs are features for a discriminator."""
        raise NotImplementedError

    def add_inputs(self, counts: Mapping[str, int], dim: int, levels: Sequence[str] = ()) -> None:
        """Extends the network by inputs, without changing what it computes. counts: of integers, name -> number of
        values. levels: of continuous inputs, any of `modules.inputs.LEVELS`. dim: the width of its time embedding."""
        self.set_time_embedding(self.extra_inputs(self.time_embedding, dim, counts, levels))

    def per_expert(self, value: float | Sequence[float], t: Tensor) -> float | Tensor:
        """The value that holds at level t, of one that may differ by expert, such as a guidance scale. One network has
        one value: raises ValueError for several."""
        if isinstance(value, Sequence):
            raise ValueError(f"one value is needed, got {list(value)}: this model has a single network")
        return value

    @property
    def members(self) -> list[Any]:
        """The denoisers of its networks, from high noise to low: itself, unless it has several experts."""
        return [self]

    @property
    def boundaries(self) -> tuple[float, ...]:
        """The levels between its experts, decreasing; () for one network."""
        return ()

    def merged(self) -> "Denoiser":
        """Itself or, of an adapter, a copy of the base with the adapter added into its weights."""
        return self

    @property
    def is_adapter(self) -> bool:
        """Whether its parameters are an adapter's, on a base that other roles share."""
        return False

    @property
    def captured_modules(self) -> Sequence[nn.Module]:
        """The modules that `capture` listens to: a forward calls as many of them as there are feature_modules."""
        return self.feature_modules

    @property
    def shard_modules(self) -> Sequence[nn.Module]:
        """The modules that are gathered one after the other when the network is sharded over processes."""
        return self.feature_modules

    @property
    def is_sharded(self) -> bool:
        """Whether processes hold the parameters together, and so have to call the network together."""
        return is_sharded(self)

    def average(self) -> "Denoiser":
        """A copy of itself, in which its moving average is kept."""
        return deepcopy(self)

    def enable_checkpointing(self) -> None:
        """Recomputes activations in the backward pass, block by block."""
        self.network.enable_gradient_checkpointing(gradient_checkpointing_func=checkpointed)  # type: ignore[operator]

    @contextmanager
    def capture(self) -> Iterator[list[Tensor]]:
        """Collects the features of every forward inside the context: one [B, N, feature_dim] tensor per depth."""
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
        if self.is_sharded:  # the backward pass gathers what lies outside the blocks when it meets the output
            hooks.append(self.register_forward_hook(tie))
        try:
            yield features
        finally:
            for hook in hooks:
                hook.remove()
