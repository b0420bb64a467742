"""The networks of a run by role: which are trained, at what rate, and the student's moving average."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from fastgen.batch import Batch
from fastgen.denoiser import Denoiser
from fastgen.modules.recomputation import remembered
from fastgen.modules.sharding import local
from fastgen.rewards import Score, Scorer
from fastgen.rollout import RolloutPolicy


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

    @property
    def critic(self) -> Denoiser:
        """The frozen network whose features a discriminator reads: the teacher, or the network fitted to it where the
        teacher is a formula."""
        return self.modules.get("features", self.teacher)  # type: ignore[return-value]

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
