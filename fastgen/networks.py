"""The networks of a run by role, and what is done to them: freezing, counting calls, and moving averages."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from fastgen.batch import Batch
from fastgen.denoiser import Denoiser
from fastgen.modules.recomputation import remembered
from fastgen.modules.sharding import local
from fastgen.rewards import Score, Scorer
from fastgen.rollout import RolloutPolicy


class Networks(Mapping[str, nn.Module]):
    """role -> module. `student` and `teacher` always exist; an objective adds its own (fake_score, discriminator).

    Modules are not wrapped and keep their attributes: the loop itself averages gradients over processes.
    scorer: decodes samples and computes the recipe's rewards; None if the recipe has none.
    restart: `Backbone.restart`; None where videos do not go on."""

    def __init__(
        self,
        modules: dict[str, nn.Module],
        policy: RolloutPolicy,
        scorer: Scorer | None = None,
        restart: Callable[[Tensor], Tensor] | None = None,
    ):
        self.modules = modules
        self.policy = policy
        self.scorer = scorer
        self.restart = restart

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
        """The frozen network whose features a discriminator reads: the teacher or, if the teacher is a formula, the
        network that was fitted to it."""
        return self.modules.get("features", self.teacher)  # type: ignore[return-value]

    def with_policy(self, policy: RolloutPolicy) -> "Networks":
        """The same networks, with another sampler of the student."""
        return Networks(self.modules, policy, self.scorer)

    def rewards(self, x0: Tensor, batch: Batch, grad: bool = False) -> Score:
        """The recipe's rewards for clean samples x0 [B, *latent_shape] of this batch's prompts. Decodes x0 once.

        grad: if set, gradient flows to x0, and only the differentiable parts count. Otherwise there is no gradient.
        Raises ValueError if the run has no rewards."""
        if self.scorer is None:
            raise ValueError("this run has no rewards; add a rewards section to the recipe")
        return self.scorer(x0, batch.prompts, batch.group, grad)


@contextlib.contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Gradient flows through the modules to their inputs, but not to their parameters. This also holds where the
    backward pass recomputes a checkpointed forward."""
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
def counted(networks: Mapping[str, nn.Module]) -> Iterator[list[float]]:
    """Collects the number of samples of every call of a network inside the context. A guided sample counts twice, and
    one with a forward-mode derivative counts once. What the backward pass recomputes is not counted. Of experts, those
    that run are counted, also where other processes need them (`Denoiser.smallest`): then a part of a sample counts as
    a part."""
    rows: list[float] = []
    size = 1  # of one sample, of the call that is running

    def begin(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal size
        size = inputs[0][0].numel()

    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows.append(inputs[0].numel() / size)

    roots = {module.root for module in networks.values() if isinstance(module, Denoiser)}
    hooks = [root.register_forward_pre_hook(begin) for root in roots]
    hooks += [member.register_forward_pre_hook(count) for root in roots for member in root.members]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def blend(kept: Iterable[Tensor], given: Iterable[Tensor], decay: float) -> None:
    """kept <- decay kept + (1 - decay) given, in place, on local shards, which must match."""
    if mine := [local(p) for p in kept]:  # a module may have no parameters
        others = [local(p).detach().to(own.device) for own, p in zip(mine, given, strict=True)]
        torch._foreach_lerp_(mine, others, 1 - decay)


@torch.no_grad()
def move(average: nn.Module, module: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) module, for the parameters; buffers are copied. In place, on local
    shards; both modules must have the same structure and be sharded alike."""
    blend(average.parameters(), module.parameters(), decay)
    for kept, given in zip(average.buffers(), module.buffers(), strict=True):
        kept.copy_(given)


class Ema:
    """Exponential moving average of a network's parameters, in their own dtype, on local shards.

    average <- decay average + (1 - decay) parameter. The decay warms up as min(decay, (1 + n) / (10 + n)) at update n,
    so that a short run is not dominated by its initial weights (the rule of torch_ema and timm)."""

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

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """The average is on this device inside the context, to be sampled, and afterwards where it was."""
        kept = next((p.device for p in self.module.parameters()), device)
        try:
            if kept != device:
                self.module.to(device)
            yield
        finally:
            if kept != device:
                self.module.to(kept)
