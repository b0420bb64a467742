"""Stream-R1: Re-DMD that also learns where and when the reward looks (formulas from the released code,
github.com/wangbei1/Stream-R1).

    released code     here                what it is
    VQ, MQ, TA        the rewards' parts  the axes m of the reward; r_m is a part's calibrated score, higher is better
    S_m               saliency            size of dr_m / d picture in each latent cell, without gradient to the student
    lambda, T         balance, temperature
    -                 state["axes"]       [updates, axes]: the mean r_m of each of the last updates

Re-DMD multiplies the score difference g of a video by one number. Here every latent cell has its own:
    student <- surrogate of w W g,    w = exp(beta (r - mean r - lambda std_m Delta_m)),  the exponent within +-clip
    S = sum_m softmax_m(-r_m / T) S_m                       a video's weak axes say more about where to learn
    W = temporal x spatial, divided by its mean
    temporal: S averaged over each frame, min-max over the frames, at least temporal_floor
    spatial:  S of each frame, min-max over the frame, at least spatial_floor, divided by the frame's mean
    Delta_m:  the mean of axis m over the newer half of the last `window` updates, minus that over the older half
std_m Delta_m is large while the axes improve at different speeds; it is subtracted from the rewards of the whole
update. The penalty is 0 until `window` updates have been made.

W has mean 1, and is 1 where no cell is more salient than another. As w and W are positive and carry no gradient, the
optimum is the teacher's law, as with Re-DMD (derived): both only say where errors are corrected first.

Departures. The running mean of r and the clip are Re-DMD's (ours). Saliency is pooled to the latent cells, as the root
of a mean square, where the released code interpolates; both have the same unit after the min-max. Parts that are not
differentiable count in r, and have no map.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.batch import Batch
from fastgen.modules.processes import summed
from fastgen.networks import Networks
from fastgen.objectives.base import State, Turn
from fastgen.objectives.re_dmd import ReDMD
from fastgen.rewards import Composite, Score
from fastgen.rollout import RolloutPolicy

AXES, SEEN = "axes", "axes.seen"


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class StreamR1(ReDMD):
    reward_use = "gradient"  # type: ignore[assignment]
    page = "docs/streaming_methods.md"

    takes_inner = False  # it is for students that work in chunks
    name: Literal["stream_r1"] = "stream_r1"  # type: ignore[assignment]
    # lambda, in the unit of the rewards; 0 is off. The released config, as are the other values here
    balance: float = Field(default=0.5, ge=0)
    window: int = Field(default=50, ge=2, le=1000)  # updates; half of them are the newer half
    temperature: float = Field(default=1.0, gt=0)  # T, in the unit of the rewards
    temporal_floor: float = Field(default=0.2, gt=0, le=1)  # of a min-max of 0 to 1
    spatial_floor: float = Field(default=0.15, gt=0, le=1)  # of a min-max of 0 to 1

    def check(self, policy: RolloutPolicy) -> None:
        super().check(policy)
        if policy.chunks is None:
            raise ValueError(
                "stream_r1 weights the frames of a video that is made chunk by chunk: give rollout.chunks, or use "
                "re_dmd"
            )

    def finish(self, turn: Turn, networks: Networks, state: State) -> None:
        super().finish(turn, networks, state)
        if turn.name == "student" and SEEN in state:
            *sums, count = state.pop(SEEN)
            if count:  # an update without a valid sample has no means
                mean = torch.stack(sums)[None] / count
                state[AXES] = torch.cat([state[AXES], mean])[-self.window :] if AXES in state else mean

    def reward_weight(
        self, networks: Networks, batch: Batch, x0: Tensor, state: State
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """w W, [B, F, 1, H, W], and the terms to log."""
        assert networks.scorer is not None
        composite = networks.scorer.composite
        scores, gradients = networks.scorer.gradients(x0.detach(), batch.prompts)
        parts = composite.used(grad=True)
        maps = {name: saliency(g, x0, parts[name].input == "frames") for name, g in gradients.items()}
        score = composite.combined(scores, batch.group)
        axes = axis_values(composite, scores, score.valid, batch.group)
        penalty = self.penalty(state).to(score.value)
        sums = [torch.where(score.valid, value, 0).sum() for value in axes.values()]
        counted = summed(torch.stack([*sums, score.valid.sum().to(sums[0])]))  # over processes
        state[SEEN] = state[SEEN] + counted if SEEN in state else counted
        weak = torch.stack([axes[name] for name in maps]).div(-self.temperature).softmax(0)
        fused = sum(w[:, None, None, None] * s for w, s in zip(weak, maps.values(), strict=True))
        assert isinstance(fused, Tensor)
        where = saliency_weight(fused, self.temporal_floor, self.spatial_floor)
        weight, terms = self.weight_of(score, state, penalty)
        terms |= {"balance_penalty": penalty, "saliency_peak": where.flatten(1).amax(1).mean()}
        return weight[:, None, None, None, None] * where, terms

    def penalty(self, state: State) -> Tensor:
        """lambda std_m Delta_m, scalar; the standard deviation divides by the number of axes minus 1."""
        axes = state.get(AXES)
        if axes is None or len(axes) < self.window or axes.shape[1] < 2:
            return torch.zeros(())
        half = len(axes) // 2
        return self.balance * (axes[half:].mean(0) - axes[:half].mean(0)).std()


def axis_values(
    composite: Composite, scores: dict[str, Score], valid: Tensor, group: Tensor | None
) -> dict[str, Tensor]:
    """r_m [B] by name: calibrated, and negated where a part's weight says that lower is better."""
    parts = composite.used(grad=False)
    calibrated = {name: composite.calibrated(parts[name], score.value, valid, group) for name, score in scores.items()}
    return {name: -value if parts[name].weight < 0 else value for name, value in calibrated.items()}


def saliency(grad: Tensor, x0: Tensor, pictures: bool) -> Tensor:
    """[B, F, H, W]: the size of a reward's gradient in each cell of the latents x0 [B, F, C, H, W].

    grad: with respect to decoded pictures [B, T, 3, h, w], or to the latents in any shape. Over the pixels of a cell
    it is the root of the mean square; over channels, the norm. Where T = 1 + n (F - 1), as with a causal VAE, the
    first latent frame is that of the first picture alone, and each other one of n pictures."""
    _, frames, _, high, wide = x0.shape
    if not pictures:
        return grad.reshape(x0.shape).float().square().sum(2).sqrt()
    square = grad.float().square().sum(2)
    if frames == 1 or (square.shape[1] - 1) % (frames - 1):
        return F.adaptive_avg_pool3d(square, (frames, high, wide)).sqrt()
    first, later = square[:, :1], square[:, 1:]
    pooled = [F.adaptive_avg_pool3d(x, (n, high, wide)) for x, n in ((first, 1), (later, frames - 1))]
    return torch.cat(pooled, dim=1).sqrt()


def saliency_weight(saliency: Tensor, temporal_floor: float, spatial_floor: float) -> Tensor:
    """W [B, F, 1, H, W] of a saliency [B, F, H, W], with mean 1 in each video."""
    temporal = min_max(saliency.mean((2, 3)), (1,)).clamp_min(temporal_floor)
    spatial = min_max(saliency, (2, 3)).clamp_min(spatial_floor)
    weight = temporal[:, :, None, None] * spatial / spatial.mean((2, 3), keepdim=True)
    return (weight / weight.mean((1, 2, 3), keepdim=True))[:, :, None]


def min_max(value: Tensor, dims: tuple[int, ...]) -> Tensor:
    """(value - min) / (max - min) over these axes; 1 where all values are the same, up to rounding."""
    low, high = value.amin(dims, keepdim=True), value.amax(dims, keepdim=True)
    spread = high - low
    varies = spread > 1e-6 * high.abs()
    return torch.where(varies, (value - low) / torch.where(varies, spread, 1), 1.0)
