"""What the comparisons of distribution matching share (golden_dmd.py and its siblings).

Students, teachers and fake scores are GoldenNetworks with the seeds 0, 1 and 2."""

import torch
from golden_rows import Golden, GoldenDenoiser, GoldenNetwork
from torch import Tensor, nn

from fastgen.networks import Networks
from fastgen.rollout import Rollout, RolloutPolicy, Step
from fastgen.schedule import PredictionType, Schedule, TimeSampler

WHOLE = TimeSampler(low=0.0, high=1.0)  # the level of a uniform draw is the draw itself
ADDED_GUIDANCE = "their guidance is cond + w (cond - uncond); our scale is w + 1"
SHIFTED = TimeSampler(low=0.02, high=0.98, shift=5.0, ends="clamp")  # Self-Forcing's law, and that of what follows it


class Tapped(GoldenNetwork):
    """A GoldenNetwork whose features pass through a module, where hooks find them."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.tap = nn.Identity()

    def hidden(self, x: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None) -> Tensor:
        return self.tap(super().hidden(x, t, cond, s))


class Tappable(GoldenDenoiser):
    @property
    def feature_modules(self) -> list[nn.Module]:
        return [self.network.tap]  # type: ignore[list-item]


class MeanHead(nn.Module):
    """Logits [B, 1]: a linear map of the mean feature."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, features: list[Tensor]) -> Tensor:
        return (features[0].mean(1) @ self.weight)[:, None]


def make_networks(
    policy: RolloutPolicy,
    schedule: Schedule | None = None,
    kind: PredictionType = "flow_prediction",
    head: Tensor | None = None,
) -> Networks:
    roles = ("student", "teacher", "fake_score")
    modules: dict[str, nn.Module] = {role: Tappable(Tapped(seed), kind, schedule) for seed, role in enumerate(roles)}
    if head is not None:
        modules["discriminator"] = MeanHead(head)
    return Networks(modules, policy)


def gradient(module: nn.Module, loss: Tensor) -> Tensor:
    loss.backward()
    assert isinstance(module, GoldenDenoiser)
    return module.network.flat()  # type: ignore[operator]


def beside(loss: Tensor, gradient: Tensor, golden: Golden) -> tuple[Tensor, Tensor]:
    """Ours and theirs: the loss and the gradient, each divided by the size of theirs so that both count."""
    ours, theirs = ((loss, gradient), (golden["loss"], golden["gradient"]))
    scales = [value.norm() for value in theirs]
    pair = [torch.cat([v.reshape(-1) / s for v, s in zip(side, scales, strict=True)]) for side in (ours, theirs)]
    return pair[0], pair[1]


def finished(x: Tensor, stop: int = 0, t: float = 1.0) -> Rollout:
    """A rollout that ended with these clean samples."""
    level, stops = torch.full((len(x),), t, dtype=x.dtype), torch.full((len(x),), stop)
    return Rollout(x, torch.zeros_like(level), stops, (Step(x, level, x, x),))
