"""The contract of every network: `forward(x_t, t, cond, inputs) -> prediction`, around an unmodified network."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.batch import Conditioning
from fastgen.modules.inner_flow import Fusion
from fastgen.modules.inputs import ExtraInputs
from fastgen.modules.recomputation import checkpointed
from fastgen.modules.segment_flow import Segment, SegmentHead
from fastgen.modules.sharding import is_sharded
from fastgen.policy import InnerFlow, SegmentFlow
from fastgen.schedule import PredictionType, Schedule
from fastgen.signals import affine
from fastgen.streaming.context import Context
from fastgen.streaming.schedule import ChunkSchedule

Memory = list[tuple[Tensor, Tensor]]  # keys and values of a chunk, [B, tokens, heads, D], per layer

EMBEDDED = ("s", "guidance", "num_steps", "stop")  # the inputs that reach a network through its time embedder


@dataclass(frozen=True)
class Inputs:
    """What a network is given besides x_t, its level t and the conditioning. Fields that are None are not given.

    time: [B], the level that the network is conditioned on, where it differs from t (a one-step student that starts
    from pure noise but is conditioned on a lower level).
    s: shaped like t, the level at which the jump of a two-time network ends.
    guidance: [B], the guidance scale, for a network that has it as an input.
    num_steps: [B], floating-point, the number of steps that the student samples with.
    stop: [B] int64, the index of the rollout step that made the sample.
    context: x_t is the chunk of a video that comes next, and this is the memory of the frames before it.
    causal: x_t is a whole video, [B, F, ...], and each chunk of this schedule sees itself and its past.
    clean: with causal, the video [B, F, ...] whose frames are seen as past instead of those of x_t (teacher forcing),
    at the schedule's context noise.
    inner: for a network with an inner flow, the noise [B, ...] from which that flow begins; with inner_levels, its
    state y_s.
    inner_levels: [B, 2], the levels s and r of a single call of the head, in the place of the whole inner flow.
    memory: a list to which the network appends what later chunks need of this one, per layer (`Denoiser.remember`).
    segment: a list to which a network that predicts the flow of a whole segment appends it. The network then returns
    the prediction at t itself, and otherwise the one that leads to the segment's end in one ode step.

    To add a kind of input, add a field here and read it in the families that support it."""

    time: Tensor | None = None
    s: Tensor | None = None
    guidance: Tensor | None = None
    num_steps: Tensor | None = None
    stop: Tensor | None = None
    context: Context | None = None
    causal: ChunkSchedule | None = None
    clean: Tensor | None = None
    inner: Tensor | None = None
    inner_levels: Tensor | None = None
    memory: Memory | None = None
    segment: list[Segment] | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The fields that are not None."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def embedded(self) -> dict[str, Tensor]:
        """The given fields that reach the network through its time embedder."""
        return {name: value for name, value in self.given.items() if name in EMBEDDED}

    @property
    def streams(self) -> bool:
        """Whether the network is asked to work as a causal one."""
        return self.context is not None or self.causal is not None

    def select(self, rows: Tensor | slice) -> "Inputs":
        """The inputs of some rows of the batch."""
        selected: dict[str, Any] = {
            name: value[rows] for name, value in self.given.items() if isinstance(value, Tensor)
        }
        context = None if self.context is None else self.context.select(rows)
        return dataclasses.replace(self, context=context, **selected)


NO_INPUTS = Inputs()


class Denoiser(nn.Module):
    """A network, its schedule and its prediction type.

    Of the forward pass, subclasses implement only `call_network`, where a family's argument names appear and nowhere
    else. They also list the modules whose outputs serve as features (`feature_modules`), and say how wide these are
    (`feature_dim`)."""

    feature_dim: int
    extra_inputs: type[ExtraInputs] = ExtraInputs  # how the family's time embedder is extended
    takes_chunks = False  # whether the family reads Inputs.context, causal, clean and memory
    # for a network that was distilled from guidance: the scale it is told where Inputs.guidance gives none
    guidance: float | None = None
    # of what a sharded network gathers, where that is not what it stores: its forwards then run under autocast
    gathered_dtype: torch.dtype | None = None

    def __init__(self, network: nn.Module, schedule: Schedule, prediction_type: PredictionType):
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.prediction_type: PredictionType = prediction_type

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        """The network's own output at x_t [B, ...], in the denoiser's prediction type and any floating-point dtype.

        A family passes `self.timestep(t, inputs)` to its network. A wrapper passes on the arguments it was given."""
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

        t: [B], or [B, F] where each frame of a video has its own level.
        predict: the prediction type to return. Conversions run in at least float32 and are differentiable.
        No subclass overrides this method: it does what is common to all networks. Raises ValueError if inputs of
        streaming are given to a family that has none, unless an inner flow, and no other network, gets noise, and if
        a network that predicts no segments is asked for one."""
        if inputs.streams and not self.takes_chunks:
            raise ValueError(f"{type(self).__name__} is no causal network: it cannot work chunk by chunk")
        network = self._modules.get("network")  # a wrapper has none of its own, and passes its arguments on
        if network is not None and isinstance(getattr(network, "fusion", None), Fusion) != (inputs.inner is not None):
            raise ValueError(
                "this network has no inner flow, and takes no noise of one (Inputs.inner)"
                if inputs.inner is not None
                else "this network has an inner flow, and needs the noise that it begins with (Inputs.inner)"
            )
        own_head = isinstance(getattr(network, "segment_head", None), SegmentHead)
        if network is not None and inputs.segment is not None and not own_head:
            raise ValueError("this network predicts no segments (Inputs.segment)")
        output = self.call_network(x_t, t, cond, inputs).to(torch.promote_types(x_t.dtype, torch.float32))
        if predict == self.prediction_type:
            return output
        x0 = self.schedule.to_sample(output, x_t, t, self.prediction_type)
        return self.schedule.from_sample(x0, x_t, t, predict)

    def guide(
        self, on: Tensor, off: Tensor, scale: Tensor, x_t: Tensor, t: Tensor, predict: PredictionType = "sample"
    ) -> Tensor:
        """Classifier-free guidance by the family's rule; here off + scale (on - off)            (arXiv 2207.12598)

        on, off: predictions at x_t with and without the prompt, [B, ...]. scale: broadcasts over them. predict: their
        type. The rule above is the same in every type, because conversions are affine in the prediction. A rule that
        is not affine belongs to the network's own type: a family overrides this method and converts."""
        return affine(on, off, scale)

    def remember(
        self,
        x: Tensor,
        t: Tensor,
        cond: Conditioning,
        context: Context,
        inputs: Inputs = NO_INPUTS,
        grad: bool = False,
    ) -> Memory:
        """What later chunks need of the next chunk x [B, frames, ...], which is clean or at level t [B], per layer.

        It is a forward like any other, so that hooks gather sharded weights and count it, and its prediction is
        dropped. grad: whether gradient flows from later chunks to the network through what it remembers of this
        one."""
        memory: Memory = []
        with torch.set_grad_enabled(grad):
            self(x, t, cond, dataclasses.replace(inputs, context=context, memory=memory))
        return memory

    def commit(
        self,
        x: Tensor,
        t: Tensor,
        cond: Conditioning,
        context: Context,
        inputs: Inputs = NO_INPUTS,
        grad: bool = False,
    ) -> Context:
        """The context with the next chunk added, as `remember` takes it. `context` itself does not change."""
        return context.committed(self.remember(x, t, cond, context, inputs, grad))

    def timestep(self, t: Tensor, inputs: Inputs) -> Tensor:
        """The input of the network's time embedder: the timestep in the network's own unit, shaped like t, or packed
        with the n embedded inputs, [*t.shape, 1 + n]. Raises ValueError for inputs that were not added to the
        network."""
        timestep = self.schedule.network_time(t if inputs.time is None else inputs.time)
        if self.is_extended:
            return self.time_embedding.pack(timestep, t, inputs.embedded)  # type: ignore[operator]
        if inputs.embedded:
            raise ValueError(f"this network takes no extra inputs, got {sorted(inputs.embedded)}")
        return timestep

    def tell(self, guidance: float | None) -> None:
        """Sets the guidance scale that a network distilled from guidance is told; None for any other network."""
        self.guidance = guidance

    def told_guidance(self, t: Tensor, inputs: Inputs) -> tuple[Tensor | None, Inputs]:
        """For a network that was distilled from guidance: the scale [B] it is told, and the inputs that are left. A
        scale that was added to the network as an extra input stays there. (None, inputs) for other networks."""
        if self.guidance is None:
            return None, inputs
        default = torch.full_like(t, self.guidance)
        if inputs.guidance is None or (self.is_extended and "guidance" in self.time_embedding.tables):  # type: ignore[operator]
            return default, inputs
        return inputs.guidance, dataclasses.replace(inputs, guidance=None)

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the first weight that is not stored in float8, whose layers compute in that of the others.
        (diffusers' `dtype` walks through all modules on every call.)"""
        return next(p.dtype for p in self.network.parameters() if p.dtype.itemsize > 1)

    @property
    def time_embedding(self) -> nn.Module:
        """The submodule that turns the timestep into an embedding."""
        raise NotImplementedError

    def set_time_embedding(self, module: nn.Module) -> None:
        """Replaces it, to add scalar inputs. (A property setter would not do: nn.Module handles assignments first.)"""
        raise NotImplementedError

    @property
    def is_extended(self) -> bool:
        """Whether extra inputs were added to the network."""
        return isinstance(self.time_embedding, ExtraInputs)

    @property
    def feature_modules(self) -> Sequence[nn.Module]:
        """Modules at increasing depth whose outputs are features for a discriminator."""
        raise NotImplementedError

    def add_inputs(self, counts: Mapping[str, int], dim: int, levels: Sequence[str] = ()) -> None:
        """Adds inputs to the network, without changing what it computes. counts: integer inputs, name -> number of
        values. levels: continuous inputs, any of `modules.inputs.LEVELS`. dim: the width of the time embedding."""
        self.set_time_embedding(self.extra_inputs(self.time_embedding, dim, counts, levels))

    def add_linear_memory(self) -> None:
        """Gives a causal network what `ChunkSchedule.linear` needs, without changing what it computes."""
        raise ValueError(f"chunks.linear: {type(self).__name__} has no linear memory; leave it out")

    def add_inner_flow(self, flow: InnerFlow) -> None:
        """Makes the last blocks of the network the head of an inner flow, without changing what it computes."""
        raise ValueError(f"inner: {type(self).__name__} has no inner flow; leave it out")

    def add_segment_flow(self, flow: SegmentFlow, levels: Sequence[float]) -> None:
        """Makes the network predict the flow of whole segments between these levels, beginning with, or near, what it
        predicts now."""
        raise ValueError(f"segment: {type(self).__name__} predicts no segments; leave it out")

    def per_expert(self, value: float | Sequence[float], t: Tensor) -> float | Tensor:
        """The value to use at level t of a setting that may differ by expert, such as a guidance scale. A single
        network has a single value: raises ValueError for several."""
        if isinstance(value, Sequence):
            raise ValueError(f"this model has a single network, so it takes one value, got {list(value)}")
        return value

    def smallest(self, x_t: Tensor, t: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Inputs]:
        """The smallest part of one sample x_t [1, ...] that the network takes, with its levels and inputs: for calls
        that only serve to gather and reduce sharded weights together with other processes. By default all of it."""
        return x_t, t, inputs

    @property
    def root(self) -> "Denoiser":
        """The denoiser that is called in the end: itself; for an adapter, the base that it is on."""
        return self

    @property
    def members(self) -> list[Any]:
        """One denoiser per expert, from high noise to low; a denoiser of a single network lists itself."""
        return [self]

    @property
    def boundaries(self) -> tuple[float, ...]:
        """The noise levels that separate its experts, decreasing; () for a single network."""
        return ()

    def merged(self) -> "Denoiser":
        """Itself; for an adapter, a copy of the base with the adapter added into its weights."""
        return self

    @property
    def is_adapter(self) -> bool:
        """Whether its parameters are those of an adapter, on a base that other roles share."""
        return False

    def feature_tokens(self, output: Tensor | tuple[Tensor, ...]) -> Tensor:
        """What `capture` keeps of a captured module's output: the last tensor of several. A family overrides this if
        the output holds more than the image or video."""
        return output if isinstance(output, Tensor) else output[-1]

    @property
    def captured_modules(self) -> Sequence[nn.Module]:
        """The modules whose outputs `capture` collects. A forward calls as many of them as `feature_modules` has."""
        return self.feature_modules

    @property
    def shard_modules(self) -> Sequence[nn.Module]:
        """The modules whose parameters are gathered one at a time when the network is sharded over processes. A module
        inside another one comes before it; see `modules.sharding.units`."""
        return self.feature_modules

    @property
    def is_sharded(self) -> bool:
        """Whether the parameters are sharded over processes, which then have to call the network together."""
        return is_sharded(self)

    def average(self) -> "Denoiser":
        """A copy of itself, to hold its moving average."""
        return deepcopy(self)

    def enable_checkpointing(self) -> None:
        """Makes the backward pass recompute activations, block by block."""
        self.network.enable_gradient_checkpointing(gradient_checkpointing_func=checkpointed)  # type: ignore[operator]

    @contextmanager
    def capture(self) -> Iterator[list[Tensor]]:
        """Collects the features of every forward inside the context, one [B, N, feature_dim] tensor per depth."""
        features: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            tokens = self.feature_tokens(output)
            if tokens.dim() == 4:  # a feature map [B, feature_dim, H, W]
                tokens = tokens.flatten(2).mT
            features.append(tokens if tokens.dim() == 3 else tokens[:, None])

        def tie(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            for i in range(len(features) - len(self.feature_modules), len(features)):
                features[i] = features[i] + 0 * output.sum().to(features[i].dtype)

        hooks = [module.register_forward_hook(keep) for module in self.captured_modules]
        if self.is_sharded:  # the backward pass gathers the weights outside the blocks when it reaches the output
            hooks.append(self.register_forward_hook(tie))
        try:
            yield features
        finally:
            for hook in hooks:
                hook.remove()
