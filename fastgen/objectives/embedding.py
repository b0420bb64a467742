"""Embedding Loss: the distance of the student's samples from real data in the features of several networks
(arXiv 2604.22379; only its abstract is public, so that everything below its idea is derived).

    paper      here              what it is
    psi_j      features          networks with random weights, new ones for every update; or one frozen network
    x_i, y_i   x, real           the student's clean samples, and real data, which need not belong together
    lambda     weight            of this term beside the loss of another objective
    L_EL       student_loss      mean over j of MMD^2(psi_j(x), psi_j(y))

    MMD^2 = mean_{i != i'} k(x_i, x_i') + mean_{i != i'} k(y_i, y_i') - 2 mean_{i, j} k(x_i, y_j)

There is no adversary: psi_j is not trained, and the statistic is unbiased for any number of samples. It is zero on
average where the two laws are equal, so a value may be below 0. It compares the samples of one micro-batch on one
process. A larger micro-batch has less variance; more processes have the same expectation.

Like `Ladd`, this is a term that objectives take as an option: dmd2 and all that is made of it, and consistency.
`embedding_loss` trains with it alone. Prompts are not compared, except by a frozen network that reads them: random
networks match the law of all samples together.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen import noise
from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.modules.expert_levels import SHARES
from fastgen.networks import Networks, frozen
from fastgen.objectives.base import Loss, feature_network
from fastgen.recipe import Recipe
from fastgen.registry import MOST_STEPS, MOST_WIDTH
from fastgen.schedule import TimeSampler

Kernel = Callable[[Tensor], Tensor]  # of squared distances [n, m] between rows of features
POOLED = 4  # the largest side of a random network's feature map
DEPTHS = 3  # random network j has 1 + j % DEPTHS layers


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Embedding:
    """weight: lambda, the factor of the term. No value of the paper is public: begin where both gradients are alike.
    features: random networks, or those of the frozen teacher at all its depths (of the network fitted to it, where
    the teacher is a formula).
    networks, width: how many random networks an update has, and their channels.
    kernel: rbf, the mean of Gaussians whose standard deviations are `bandwidths` times the root of the median squared
    distance of samples to real data; or linear, which compares the mean features alone.
    time: the law of the level to which both sides are renoised, one level for an update. None: clean samples."""

    weight: float = Field(default=1.0, gt=0)
    features: Literal["random", "teacher"] = "random"
    networks: int = Field(default=4, ge=1, le=MOST_STEPS)  # J; ours
    width: int = Field(default=64, ge=1, le=MOST_WIDTH)  # ours
    kernel: Literal["rbf", "linear"] = "rbf"  # ours
    bandwidths: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(0.5, 1.0, 2.0), min_length=1)  # ours
    time: TimeSampler | None = None  # ours

    @model_validator(mode="after")
    def _possible(self) -> "Embedding":
        if self.features == "teacher" and self.time is None:
            raise ValueError(
                "features: teacher are those of noised samples, which are what the teacher has seen: give time, such "
                "as {low: 0.02, high: 0.5}"
            )
        if self.features == "teacher" and (self.networks, self.width) != (4, 64):
            raise ValueError("networks and width are those of random networks: leave them out with features: teacher")
        if self.kernel == "linear" and self.bandwidths != (0.5, 1.0, 2.0):
            raise ValueError("bandwidths are those of kernel rbf: leave them out with kernel: linear")
        return self

    def networks_needed(self, backbone: Backbone) -> dict[str, nn.Module]:
        """The frozen network whose features are compared, where it is not the teacher itself: {role: module}."""
        return feature_network(backbone) if self.features == "teacher" else {}

    def student_loss(
        self, networks: Networks, batch: Batch, x: Tensor, real: Tensor, level: Tensor | None = None
    ) -> Tensor:
        """Scalar: the mean MMD^2 between x and real, [B, ...] each. Gradient flows to x alone.

        level: [B], the level that x is at, to which real is then noised; None: x is clean."""
        schedule = networks.teacher.schedule
        if level is not None:
            real = schedule.add_noise(real, batch.normal("embedding_level"), level)
        t = None
        if self.time is not None:
            share = (batch.integer("embedding_time", SHARES) + 0.5) / SHARES
            low = torch.zeros_like(batch.ids, dtype=batch.dtype) if level is None else level
            t = torch.maximum(low, self.time(torch.full_like(low, share)))
            x, real = (
                schedule.renoise(v, batch.normal(f"embedding_{name}"), low, t).to(v.dtype)
                for name, v in (("fake", x), ("real", real))
            )
        distances = [
            mmd(ours, theirs, self.kernel_for) for ours, theirs in self.pairs(networks, batch, x, real.detach(), t)
        ]
        return torch.stack(distances).mean()

    def pairs(
        self, networks: Networks, batch: Batch, x: Tensor, real: Tensor, t: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The features of x and of real, [B, D] each, of one network or depth after the other."""
        if self.features == "random":
            for j in range(self.networks):
                psi = partial(random_features, key=noise.make_key(batch.key, "embedding", j), width=self.width)
                yield psi(x, layers=1 + j % DEPTHS), psi(real, layers=1 + j % DEPTHS)
            return
        assert t is not None
        with frozen(networks.critic):
            with networks.critic.capture() as ours:
                networks.critic(x, t, batch.cond)
            with torch.no_grad(), networks.critic.capture() as theirs:
                networks.critic(real, t, batch.cond)
        for one, other in zip(ours, theirs, strict=True):
            yield one.mean(1), other.mean(1)

    def kernel_for(self, square: Tensor) -> Kernel:
        """The kernel, whose bandwidths are multiples of the root of the median of these squared distances [n, m]."""
        if self.kernel == "linear":
            return linear
        median = square.detach().median().clamp_min(1e-12)
        return partial(rbf, variances=tuple(b**2 * median for b in self.bandwidths))


def with_embedding(
    embedding: Embedding | None, networks: Networks, batch: Batch, x: Tensor, total: Tensor, terms: dict[str, Tensor]
) -> Loss:
    """A student's loss with the embedding loss of its clean samples x [B, ...] added to it, if there is one."""
    if embedding is not None:
        assert batch.latents is not None
        distance = embedding.student_loss(networks, batch, x, batch.latents)
        total = total + embedding.weight * distance
        terms = terms | {"embedding": distance.detach()}
    return Loss(total, terms | {"loss": total.detach()})


def check_batch(embedding: Embedding | None, recipe: Recipe) -> None:
    """Raises ValueError where a micro-batch has no two samples to compare."""
    if embedding is not None and recipe.train.batch_size < 2:
        raise ValueError(
            f"the embedding loss compares the samples of a micro-batch with each other, and train.batch_size is "
            f"{recipe.train.batch_size}; make it at least 2, and better 32"
        )


def mmd(x: Tensor, y: Tensor, kernel_for: Callable[[Tensor], Kernel]) -> Tensor:
    """The unbiased MMD^2 between the laws of x [n, D] and y [m, D], n and m at least 2 (a U-statistic).

    kernel_for: makes the kernel from the squared distances [n, m] of x to y, which are means over the D features."""
    n, both = len(x), torch.cat([x, y]).to(torch.promote_types(x.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):  # distances are small differences of large products
        gram = both @ both.T
    length = gram.diagonal()
    square = (length[:, None] + length[None] - 2 * gram).clamp_min(0) / both.shape[1]
    k = kernel_for(square[:n, n:])(square)
    return off_diagonal_mean(k[:n, :n]) + off_diagonal_mean(k[n:, n:]) - 2 * k[:n, n:].mean()


def off_diagonal_mean(k: Tensor) -> Tensor:
    return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))


def rbf(square: Tensor, variances: tuple[Tensor | float, ...]) -> Tensor:
    """mean over v of exp(-square / (2 v))."""
    return torch.stack([(-square / (2 * v)).exp() for v in variances]).mean(0)


def linear(square: Tensor) -> Tensor:
    """-square / 2. In MMD^2, whose coefficients sum to 0 for every sample, it is the product of the features."""
    return -square / 2


def random_features(x: Tensor, key: int, width: int, layers: int) -> Tensor:
    """[B, D]: what a network with random weights makes of points [B, D], latents [B, C, H, W] or videos
    [B, F, C, H, W], frame by frame.

    Each layer is a linear map (points) or a 3 x 3 convolution, and a SiLU; a feature map is halved after a layer until
    its sides are at most 4. Weights have the variance 2 / fan-in, and biases the variance 1. They depend on the key
    alone, so that all processes and micro-batches have the same network."""
    if x.dim() > 4:
        return random_features(x.flatten(0, 1), key, width, layers).reshape(len(x), -1)
    h, kernel = x, (3, 3) if x.dim() == 4 else ()
    for i in range(layers):
        shape = (h.shape[1], *kernel)
        channels = torch.arange(width, device=x.device)
        weight = noise.normal(channels, shape, noise.make_key(key, "weight", i), torch.float32).to(h)
        weight = weight * (2 / weight[0].numel()) ** 0.5
        bias = noise.normal(channels, (), noise.make_key(key, "bias", i), torch.float32).to(h)
        h = F.silu(F.conv2d(h, weight, bias, padding=1) if kernel else F.linear(h, weight, bias))
        if kernel and max(h.shape[2:]) > POOLED:
            h = F.avg_pool2d(h, 2, ceil_mode=True)
    if kernel and max(h.shape[2:]) > POOLED:
        rows, columns = (min(side, POOLED) for side in h.shape[2:])
        h = F.adaptive_avg_pool2d(h, (rows, columns))
    return h.flatten(1)
