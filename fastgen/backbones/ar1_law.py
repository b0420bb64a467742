"""The law of the AR(1) videos of each prompt, on real latents: densities, exact denoisers, exact samples and pairs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgen import noise
from fastgen.backbones import ar1_formulas
from fastgen.batch import Draws


def to_complex(latents: Tensor) -> Tensor:
    """Latents [B, F, 2, H, W] as complex frames [B, F, H W], complex128 (complex64 for float32 and below)."""
    exact = latents.to(torch.promote_types(latents.dtype, torch.float32))
    return torch.complex(exact[:, :, 0], exact[:, :, 1]).flatten(2)


def to_latents(frames: Tensor, like: Tensor) -> Tensor:
    """The inverse of `to_complex`, for as many frames as there are: [B, F, 2, H, W] in the precision of `frames`."""
    return torch.stack([frames.real, frames.imag], dim=2).unflatten(3, like.shape[3:])


class AR1Law:
    """The videos of each label: frames z_k = m + u_k of `ar1_formulas`, as latents [B, F, 2, 1, copies], each channel
    of variance 1 about the mean. The copies of a sample share its label and are otherwise independent.

    rhos, means: [labels] complex. The label after the last one is that of the empty prompt: a label at random."""

    def __init__(self, rhos: Sequence[complex], means: Sequence[complex], num_frames: int, copies: int):
        self.rhos = tuple(complex(r) for r in rhos)
        self.means = tuple(complex(m) for m in means)
        self.shape = (num_frames, 2, 1, copies)

    @property
    def num_labels(self) -> int:
        """The number of labels without that of the empty prompt."""
        return len(self.rhos)

    def labels_of(self, prompts: Sequence[str]) -> Tensor:
        """[B] int64: the label that each prompt names. Raises ValueError for other prompts."""
        known = {"": self.num_labels} | {str(label): label for label in range(self.num_labels)}
        if unknown := sorted({prompt for prompt in prompts if prompt not in known}):
            raise ValueError(f"prompts of these videos are labels {list(known)[1:]} or empty, got {unknown[:3]}")
        return torch.tensor([known[prompt] for prompt in prompts], dtype=torch.int64)

    def members(self, label: int) -> range:
        """The labels that a sample with this label may have."""
        return range(label, label + 1) if label < self.num_labels else range(self.num_labels)

    def log_density(self, x: Tensor, levels: Tensor, label: int, positions: Sequence[int] | None = None) -> Tensor:
        """log p(x | label) [B] of noisy frames x [B, F, 2, H, W] at levels [B, F], for a stated label: with V = D
        Sigma D + T, sum over copies of -1/2 y^H V^-1 y - log det V - F log 2 pi, y = z - D m. Computed in float64."""
        d, noise_matrix = ar1_formulas.level_matrices(levels)
        cov = ar1_formulas.covariance(self.rhos[label], positions or x.shape[1]).to(d)
        v = d @ cov @ d + noise_matrix
        y = to_complex(x.double()) - (1 - levels.double())[:, :, None] * self.means[label]
        square = (y.conj() * torch.linalg.solve(v, y)).real.sum((1, 2))
        normaliser = torch.linalg.slogdet(v).logabsdet + y.shape[1] * math.log(2 * math.pi)
        return -0.5 * square - y.shape[2] * normaliser

    def posterior_mean(
        self, x: Tensor, levels: Tensor, label: Tensor, positions: Sequence[int] | None = None
    ) -> Tensor:
        """E[z | x, label], like x [B, F, 2, H, W], in float64 (F1 of `ar1_formulas`).

        levels: [B, F], a level per frame; 0 says that the frame is known.  label: [B].  positions: of the frames in
        time; None: 0, 1, 2, ...  For the empty prompt, the labels' means are weighted with their probabilities given
        x."""
        weights = self.label_weights(x, levels, label, positions)
        y = to_complex(x.double())
        mean = torch.zeros_like(y)
        different, row = torch.unique(levels.double(), dim=0, return_inverse=True)
        for k, (rho, m) in enumerate(zip(self.rhos, self.means, strict=True)):
            rows = weights[:, k].nonzero().squeeze(1)
            gains = ar1_formulas.gains(ar1_formulas.covariance(rho, positions or x.shape[1]), different)[row[rows]]
            centred = y[rows] - (1 - levels[rows].double())[:, :, None] * m
            mean = mean.index_add(0, rows, weights[rows, k, None, None] * (m + gains @ centred))
        return to_latents(mean, x)

    def label_weights(
        self, x: Tensor, levels: Tensor, label: Tensor, positions: Sequence[int] | None = None
    ) -> Tensor:
        """[B, labels] float64: the probability of each label given the noisy frames; 1 for a stated label."""
        unstated = label == self.num_labels
        weights = nn.functional.one_hot(label, self.num_labels + 1)[:, :-1].double()
        if bool(unstated.any()):
            rows = unstated.nonzero().squeeze(1)
            logs = [self.log_density(x[rows], levels[rows], k, positions) for k in range(self.num_labels)]
            weights[rows] = torch.stack(logs, dim=1).softmax(1)
        return weights

    def sample(self, ids: Tensor, label: Tensor, key: int, num_frames: int | None = None) -> Tensor:
        """Exact videos [B, F, 2, 1, copies] float64, keyed by sample and frame: a longer video begins with the
        shorter. num_frames: F; None: that of the backbone."""
        u = noise.uniform(ids, (), noise.make_key(key, "label"), torch.float64)
        stated = torch.where(label < self.num_labels, label, (u * self.num_labels).long())
        table = torch.tensor((self.rhos, self.means), dtype=torch.complex128, device=ids.device)
        rho, mean = table[:, stated, None]
        scale = (1 - rho.abs() ** 2).sqrt()
        fresh = Draws(ids, self.shape, key, torch.float64).chunk(range(num_frames or self.shape[0]))("frames")
        frames: list[Tensor] = []
        for w in to_complex(fresh).unbind(1):
            frames.append(rho * frames[-1] + scale * w if frames else w)
        return to_latents(torch.stack(frames, dim=1) + mean[:, None], fresh)

    def pair(self, ids: Tensor, label: Tensor, key: int, causal: bool) -> tuple[Tensor, Tensor]:
        """(noise, x0), both ends of the teacher's probability-flow ODE, exactly: x0 = m + Sigma^{1/2} noise for the
        bidirectional teacher, and frame by frame z_k = m + rho u_{k-1} + s noise_k for the causal one (F3). The noise
        is what `Draws` of this key gives a sampler to start from. Raises ValueError for the empty prompt, whose flow
        map has no closed form."""
        if bool((label == self.num_labels).any()):
            raise ValueError("the flow map of the empty prompt has no closed form: give every sample a label")
        fresh = Draws(ids, self.shape, key, torch.float64).chunk(range(self.shape[0]))("initial")
        e, z = to_complex(fresh), torch.zeros_like(to_complex(fresh))
        for k, (rho, mean) in enumerate(zip(self.rhos, self.means, strict=True)):
            cov = ar1_formulas.covariance(rho, self.shape[0]).to(e)
            root = torch.linalg.cholesky(cov) if causal else ar1_formulas.flow_map(cov, 1.0)
            z = torch.where((label == k)[:, None, None], mean + root @ e, z)
        return fresh, to_latents(z, fresh)

    def second_order(self, label: int, positions: int | Sequence[int]) -> tuple[complex, Tensor]:
        """The mean of a frame, and the covariance [F, F] of the frames at these positions, for a label: m and Sigma.
        For the empty prompt, Sigma is the average over the labels plus the variance between their means."""
        which = self.members(label)
        mean = sum(self.means[k] for k in which) / len(which)
        covs = [ar1_formulas.covariance(self.rhos[k], positions) + abs(self.means[k] - mean) ** 2 / 2 for k in which]
        return mean, torch.stack(covs).mean(0)
