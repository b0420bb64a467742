"""The networks of a run by role: which are trained, at what rate, and the student's moving average."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.batch import Batch
from fastgen.denoiser import Denoiser
from fastgen.recomputation import remembered
from fastgen.rewards import Score, Scorer
from fastgen.rollout import RolloutPolicy
from fastgen.sharding import local


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class OptimizerConfig:
    """AdamW with a linear warm-up and a decay towards zero at the last student update.

    The rate at student update k of n is lr * min(1, (k + 1) / warmup) * decay(k / n), where decay is 1 (constant),
    falls linearly to 0, or follows half a cosine to 0, over the last `decay_fraction` of the run."""

    lr: float = Field(gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: float = Field(default=0.01, ge=0)
    eps: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=10.0, gt=0)
    warmup: int = Field(default=0, ge=0)
    decay: Literal["constant", "linear", "cosine"] = "constant"
    decay_fraction: float = Field(default=1.0, gt=0, le=1)

    def build(self, parameters: Iterator[nn.Parameter]) -> torch.optim.AdamW:
        return torch.optim.AdamW(parameters, self.lr, self.betas, self.eps, self.weight_decay)

    def rate(self, update: int, total: int) -> float:
        """The learning rate at 0-based student update `update` of `total`."""
        start = 1 - self.decay_fraction
        progress = min(max((update / total - start) / self.decay_fraction, 0.0), 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        decay = {"constant": 1.0, "linear": 1 - progress, "cosine": cosine}[self.decay]
        return self.lr * decay * (min(1.0, (update + 1) / self.warmup) if self.warmup else 1.0)


class Networks(Mapping[str, nn.Module]):
    """role -> module. `student` and `teacher` are always there; an objective adds its own (fake_score, discriminator).

    No role is wrapped: the loop averages gradients over processes itself, so a module keeps its attributes.
    scorer: the recipe's rewards behind the backbone's decoder, where there are any."""

    def __init__(self, modules: dict[str, nn.Module], policy: RolloutPolicy, scorer: Scorer | None = None):
        self.modules = modules
        self.policy = policy
        self.scorer = scorer

    def __getitem__(self, role: str) -> nn.Module:
        return self.modules[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    @property
    def student(self) -> Denoiser:
        return self.modules["student"]  # type: ignore[return-value]

    @property
    def teacher(self) -> Denoiser:
        return self.modules["teacher"]  # type: ignore[return-value]

    @property
    def fake_score(self) -> Denoiser:
        return self.modules["fake_score"]  # type: ignore[return-value]

    def rewards(self, x0: Tensor, batch: Batch, grad: bool = False) -> Score:
        """The recipe's rewards of clean samples x0 [B, *latent_shape] made for this batch's prompts, decoded once.

        grad: gradient flows to x0, and the value is that of the differentiable parts alone; otherwise nothing does.
        Raises ValueError if the run has no rewards."""
        if self.scorer is None:
            raise ValueError("this run has no rewards; give the recipe a rewards section")
        return self.scorer(x0, batch.prompts, batch.group, grad)


@contextlib.contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Gradient passes through the modules to their inputs, and none is left on their parameters; also where a
    checkpointed forward is repeated in the backward pass."""
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        with remembered(lambda: frozen(*modules)):
            yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


@contextlib.contextmanager
def counted(networks: Mapping[str, nn.Module]) -> Iterator[list[int]]:
    """Collects how many samples every call of a denoiser inside the context is given; guided, a sample counts twice,
    and with a forward-mode derivative once. What the backward pass computes again is not counted."""
    rows: list[int] = []
    denoisers = [module for module in networks.values() if isinstance(module, Denoiser)]
    hooks = [m.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0]))) for m in denoisers]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def blend(kept: Iterable[Tensor], given: Iterable[Tensor], decay: float) -> None:
    """kept <- decay kept + (1 - decay) given, in place, each process what it holds; divided alike."""
    if mine := [local(p) for p in kept]:  # a stand-in has no parameters
        torch._foreach_lerp_(mine, [local(p).detach() for p in given], 1 - decay)


@torch.no_grad()
def move(average: nn.Module, module: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) module, over the parameters, each process moving what it holds; buffers
    are copied. In place, for modules of the same structure, divided alike."""
    blend(average.parameters(), module.parameters(), decay)
    for kept, given in zip(average.buffers(), module.buffers(), strict=True):
        kept.copy_(given)


class Ema:
    """Exponential moving average of a network's parameters, in their own dtype, each process averaging what it holds.

    average <- decay average + (1 - decay) parameter. The decay warms up as min(decay, (1 + n) / (10 + n)) at update n,
    so that a short run is not dominated by its first weights (the rule of torch_ema and timm)."""

    def __init__(self, average: Denoiser, module: nn.Module, decay: float):
        self.module = average.requires_grad_(False).eval()
        self.decay = decay
        self.updates = 0
        self.move(module, 0.0)

    def update(self, module: nn.Module) -> None:
        self.move(module, min(self.decay, (1 + self.updates) / (10 + self.updates)))
        self.updates += 1

    def move(self, module: nn.Module, decay: float) -> None:
        move(self.module, module, decay)
