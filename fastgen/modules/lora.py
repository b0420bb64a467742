"""Roles as LoRA adapters on one copy of the weights.

The teacher is the base with every adapter off; student and fake score are adapters on it. Each forward runs for one
role: `SharedBase.using(role)` switches the layers while it runs, and again whenever activation checkpointing
recomputes it in the backward pass. Every adapter keeps `requires_grad`. peft's own `set_adapter` clears it on the
other adapters, and gradients of a graph that was built before the switch are then lost without a warning.
"""

import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.batch import Conditioning
from fastgen.denoiser import Denoiser, Inputs
from fastgen.modules.lora_config import LoraConfig
from fastgen.modules.recomputation import remembered
from fastgen.modules.sharding import local, own_slice
from fastgen.noise import make_key
from fastgen.schedule import PredictionType

AVERAGE = "average"  # the adapter that holds the student's moving average
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Place = tuple[nn.Module, str]  # of a parameter: its module, and its name there


class SharedBase:
    """A frozen denoiser with one adapter per role. dtype: of the adapters; the base keeps its own."""

    def __init__(self, denoiser: Denoiser, default_targets: Sequence[str], dtype: torch.dtype = torch.float32):
        self.denoiser = denoiser.requires_grad_(False).eval()
        self.dtype = dtype
        self.default_targets = tuple(default_targets)
        self.configs: dict[str, LoraConfig] = {}
        self.inputs: dict[str, tuple[Mapping[str, int], int, Sequence[str]]] = {}  # role -> how add_inputs extended it
        self.guidance: dict[str | None, float] = {}  # role -> the scale its network is told, see Denoiser.tell
        self._layers: list[Any] = []  # peft's, which hold the adapters
        self._places: dict[str, dict[str, Place]] = {}  # role -> name of a parameter -> where it is
        self._embeddings: dict[str | None, list[nn.Module]] = {None: self.embeddings()}  # one per expert
        self._role: str | None = None

    def add(self, role: str, config: LoraConfig) -> "LoraDenoiser":
        """A new adapter, which does not change the output yet. Raises ValueError if a target matches no layer."""
        from peft import LoraConfig as PeftLoraConfig  # takes seconds to import
        from peft import inject_adapter_in_model

        chosen = self.layers(role, config.targets)
        alpha = config.rank if config.alpha is None else config.alpha
        peft_config = PeftLoraConfig(r=config.rank, lora_alpha=alpha, target_modules=chosen)  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are intended
            empty = next(self.denoiser.parameters()).is_meta  # then the adapter is on the meta device too
            inject_adapter_in_model(peft_config, self.denoiser, adapter_name=role, low_cpu_mem_usage=empty)
        for name, p in self.denoiser.named_parameters():
            if is_adapter_parameter(name, role):
                p.data = p.data.to(self.dtype)
        self.configs[role] = config
        self._layers = [m for m in self.denoiser.modules() if is_adapter_layer(m)]
        self.refresh()
        self.switch(None)
        for r in self.configs:
            for p in self.parameters(r).values():
                p.requires_grad_(r != AVERAGE)
        return LoraDenoiser(self, role)

    def layers(self, role: str, targets: Sequence[str] | None) -> list[str]:
        """The names of the layers that these targets choose. Raises ValueError if a target chooses none, or one of
        which peft has no adapter that could be merged."""
        kinds = (nn.Linear,) if targets is None else (nn.Linear, *CONVOLUTIONS)
        found = {n.removesuffix(".base_layer"): m for n, m in self.denoiser.named_modules() if isinstance(m, kinds)}
        if targets is None:
            return [n for n in found if any(ends(n, target) for target in self.default_targets)]
        for target in targets:
            chosen = [n for n in found if ends(n, target)]
            if not chosen:
                raise ValueError(f"lora.{role}.targets: no linear layer's or convolution's name ends with {target!r}")
            for name in chosen:
                if not adaptable(found[name]):
                    raise ValueError(
                        f"lora.{role}.targets: {target!r} chooses {name}, a convolution with groups, a dilation or "
                        "padding other than zeros, whose adapter cannot be added into its weights; leave it out"
                    )
        return [n for n in found if any(ends(n, target) for target in targets)]

    def role(self, role: str, config: LoraConfig) -> "LoraDenoiser":
        """The adapter of this role; it is added on first use."""
        return LoraDenoiser(self, role) if role in self.configs else self.add(role, config)

    def refresh(self) -> None:
        """Looks up where the adapters' parameters are."""
        found = places(self.denoiser)
        self._places = {
            role: {n.replace(f".{role}.", "."): place for n, place in found.items() if is_adapter_parameter(n, role)}
            for role in self.configs
        }
        for role in self.inputs:
            tables = self.tables(role)
            added = places(tables[0] if len(tables) == 1 else nn.ModuleList(tables))
            self._places[role] |= {f"inputs.{name}": place for name, place in added.items()}

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The adapter's own parameters, named as in the base, without the adapter's name. They are looked up at every
        call: while a sharded block runs, also in the backward pass, whole ones are in their place."""
        return {name: getattr(module, own) for name, (module, own) in self._places[role].items()}

    def base_parameters(self) -> list[nn.Parameter]:
        """The weights that all roles share."""
        return [p for name, p in self.denoiser.named_parameters() if ".lora_" not in name]

    def switch(self, role: str | None) -> None:
        """Turns on the role's adapter and time embedder, and all others off. None: the base alone."""
        for layer in self._layers:  # not with peft's set_adapter, see the top of this file
            values = {"_disable_adapters": role is None, "_active_adapter": [] if role is None else [role]}
            vars(layer).update(values)  # without nn.Module's __setattr__: there are hundreds of layers
        if len(self._embeddings) > 1:
            embeddings = self._embeddings.get(role, self._embeddings[None])
            for member, embedding in zip(self.denoiser.members, embeddings, strict=True):
                member.set_time_embedding(embedding)
        self.denoiser.tell(self.guidance.get(role))
        self._role = role

    def add_inputs(self, role: str, counts: Mapping[str, int], dim: int, levels: Sequence[str] = ()) -> None:
        """Adds inputs for one role, which gets a time embedder of its own, around the shared one; of experts, for each
        of them. Their tables are where the base is, unless it has no weights yet (`with_tables`)."""
        self.switch(None)
        device = next(self.denoiser.parameters()).device
        self.denoiser.add_inputs(counts, dim, levels)
        self.inputs[role] = (counts, dim, levels)
        self._embeddings[role] = self.embeddings()
        for table in self.tables(role):
            table.to("cpu" if device.type == "meta" else device, self.dtype)
        self.refresh()
        self.switch(None)

    def embeddings(self) -> list[nn.Module]:
        """The time embedders that are in place, one per expert."""
        return [member.time_embedding for member in self.denoiser.members]

    def tables(self, role: str) -> list[nn.Module]:
        """The tables of a role's added inputs, of each expert."""
        return [embedding.tables for embedding in self._embeddings[role]]  # type: ignore[misc]

    @contextmanager
    def with_tables(self) -> Iterator[None]:
        """Inside, the tables of all roles are parts of the network, to be sharded and moved with it."""
        for number, member in enumerate(self.denoiser.members):
            member.role_tables = nn.ModuleDict({role: self.tables(role)[number] for role in self.inputs})
        try:
            yield
        finally:
            for member in self.denoiser.members:
                del member.role_tables

    @contextmanager
    def using(self, role: str | None) -> Iterator[None]:
        """Forwards inside, and their recomputations, use the role's adapter; with None, the base alone."""
        before = self._role
        self.switch(role)
        try:
            with remembered(lambda: self.using(role)):
                yield
        finally:
            self.switch(before)

    def unload(self, role: str) -> Denoiser:
        """A copy of the base with the role's adapter added into its weights, and no adapters."""
        with self.using(role):  # with its own time embedder
            whole = deepcopy(self.denoiser)
        for name, layer in list(whole.named_modules()):
            if is_adapter_layer(layer):
                layer.merge(adapter_names=[role])
                whole.set_submodule(name, layer.get_base_layer())
        return whole


def places(module: nn.Module) -> dict[str, Place]:
    """Where the parameters of a module are, by name."""
    return {
        f"{prefix}.{own}".removeprefix("."): (part, own)
        for prefix, part in module.named_modules()
        for own, _ in part.named_parameters(recurse=False)
    }


def ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def adaptable(layer: nn.Module) -> bool:
    """Whether the adapter that peft makes for this layer is a change of its weights."""
    if not isinstance(layer, CONVOLUTIONS):
        return True
    return layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"


def is_adapter_layer(module: nn.Module) -> bool:
    """Whether this is a layer that peft has put an adapter on."""
    layers = sys.modules.get("peft.tuners.tuners_utils")
    return layers is not None and isinstance(module, layers.BaseTunerLayer)


def is_adapter_parameter(name: str, role: str) -> bool:
    return f".lora_A.{role}." in name or f".lora_B.{role}." in name


class LoraDenoiser(Denoiser):
    """One role of a shared base, behind the ordinary contract. role None: the base itself, frozen.

    Its parameters are only those of its adapter; the base is not a submodule."""

    takes_chunks = True  # if the shared network does

    def __init__(self, shared: SharedBase, role: str | None):
        nn.Module.__init__(self)
        self.__dict__["shared"] = shared
        self.role = role
        self.schedule = shared.denoiser.schedule
        self.prediction_type = shared.denoiser.prediction_type
        self.feature_dim = shared.denoiser.feature_dim
        self.shared: SharedBase

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        with self.shared.using(self.role):
            return self.shared.denoiser(x_t, t, cond, inputs, predict=self.prediction_type)

    def guide(
        self, on: Tensor, off: Tensor, scale: Tensor, x_t: Tensor, t: Tensor, predict: PredictionType = "sample"
    ) -> Tensor:
        return self.shared.denoiser.guide(on, off, scale, x_t, t, predict)

    def tell(self, guidance: float | None) -> None:
        if guidance is not None:
            self.shared.guidance[self.role] = guidance

    def merged(self) -> Denoiser:
        assert self.role is not None
        return self.shared.unload(self.role)

    @property
    def is_adapter(self) -> bool:
        return self.role is not None

    @property
    def boundaries(self) -> tuple[float, ...]:
        return self.shared.denoiser.boundaries

    @property
    def time_embedding(self) -> nn.Module:
        with self.shared.using(self.role):
            return self.shared.denoiser.time_embedding

    def add_inputs(self, counts: Mapping[str, int], dim: int, levels: Sequence[str] = ()) -> None:
        assert self.role is not None
        self.shared.add_inputs(self.role, counts, dim, levels)

    @property
    def feature_modules(self) -> Sequence[nn.Module]:
        return self.shared.denoiser.feature_modules

    @property
    def captured_modules(self) -> Sequence[nn.Module]:
        return self.shared.denoiser.captured_modules

    def capture(self) -> AbstractContextManager[list[Tensor]]:  # type: ignore[override]
        return self.shared.denoiser.capture()

    def per_expert(self, value: float | Sequence[float], t: Tensor) -> float | Tensor:
        return self.shared.denoiser.per_expert(value, t)

    @property
    def is_sharded(self) -> bool:
        return self.shared.denoiser.is_sharded

    @property
    def root(self) -> Denoiser:
        return self.shared.denoiser

    @property
    def gathered_dtype(self) -> torch.dtype | None:  # type: ignore[override]
        return self.shared.denoiser.gathered_dtype

    def enable_checkpointing(self) -> None:
        self.shared.denoiser.enable_checkpointing()

    def named_parameters(  # type: ignore[override]
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        if self.role is not None:
            for name, p in self.shared.parameters(self.role).items():
                yield (f"{prefix}.{name}" if prefix else name), p

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:  # type: ignore[override]
        return {name: p.detach() for name, p in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args: object, **kwargs: object) -> None:  # type: ignore[override]
        """In place. Raises ValueError if names or shapes differ."""
        own = dict(self.named_parameters())
        if own.keys() != state_dict.keys():
            raise ValueError(f"the adapter weights are for other layers: {sorted(own.keys() ^ state_dict.keys())[:4]}")
        for name, p in own.items():
            local(p).copy_(own_slice(state_dict[name], p))

    def average(self) -> "LoraDenoiser":
        """A second, frozen adapter of the same shape, to hold this one's moving average."""
        assert self.role is not None
        average = self.shared.add(AVERAGE, self.shared.configs[self.role])
        if self.role in self.shared.inputs:
            average.add_inputs(*self.shared.inputs[self.role])
        average.tell(self.shared.guidance.get(self.role))
        return average

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Draws A uniformly in +- 1 / sqrt(number of inputs), as nn.Linear and convolutions do, and sets B to zero, so
        that the network computes what the base does. The draw depends only on the seed, the role and the layer."""
        for name, p in self.named_parameters():
            if ".lora_A." not in name:  # B, and the tables of extra inputs
                local(p).zero_()
                continue
            generator = torch.Generator().manual_seed(make_key(seed, self.role or "", name) % 2**63)
            drawn = (2 * torch.rand(p.shape, generator=generator) - 1) / math.prod(p.shape[1:]) ** 0.5
            local(p).copy_(own_slice(drawn, p))
