"""The network of AR(1) videos: linear in the frames, with a table of complex coefficients for each noise level.

For a stated prompt, the optimum of every denoiser and of every few-step student is linear in the frames that it sees.
So is this network, and a test can read its coefficients and compare them with a formula."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastgen.backbones import ar1_formulas
from fastgen.backbones.ar1_law import AR1Law, to_complex, to_latents
from fastgen.modules.inputs import ExtraInputs


class Knots(nn.Module):
    """The time embedder: weights of linear interpolation between evenly spaced levels, [B] -> [B, count].
    timestep: in [0, 1000]."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def forward(self, timestep: Tensor) -> Tensor:
        place = timestep[:, None] / 1000 * (self.count - 1)
        return (1 - (place - torch.arange(self.count, device=place.device)).abs()).clamp_min(0)


class KnotInputs(ExtraInputs):
    """The time embedder of a network that is told an integer, such as the stop index: each of its values has tables
    of coefficients of its own, which start at zero and are added to the network's. (A shift of the embedding would
    change the coefficients of all levels alike, and the law of each stop needs its own at every level.)

    outputs: the names of the network's tables, and how many numbers each gives.  counts: name -> number of values."""

    def __init__(self, embedding: Knots, outputs: Mapping[str, int], counts: Mapping[str, int]):
        super().__init__(embedding, embedding.count, {})
        for name, count in counts.items():
            self.tables[name] = nn.ModuleDict({k: zeros(count * embedding.count, n) for k, n in outputs.items()})
        self.counts = dict(counts)

    def add(self, embedding: Tensor, columns: Tensor) -> Tensor:
        return embedding

    def added(self, table: str, timestep: Tensor, weights: Tensor) -> Tensor:
        """What is added to a table's numbers, [B, n]. timestep: [B, 1 + inputs].  weights: of the knots, [B, K]."""
        total = weights.new_zeros(())
        for column, (name, count) in enumerate(self.counts.items()):
            linear = self.tables[name][table]  # type: ignore[index]
            value = nn.functional.one_hot(timestep[:, 1 + column].round().long(), count).to(linear.weight.dtype)
            own = (value[:, :, None] * weights[:, None].to(value)).flatten(1)
            total = total + linear(own).to(weights)
        return total


def zeros(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.zeros_(linear.weight)
    return linear


class FrameMap(nn.Module):
    """Predicts C clean frames, a chunk or a whole video, from noisy ones x and from P earlier frames p:

        x0_i = m + sum_j L_ij (p_j - m) + sum_k G_ik (x_k - alpha m),   complex coefficients L and G

    m is a number per label. For each label and each P and C, L and G are interpolated between their values at the
    knots, and preconditioned like EDM's networks (arXiv 2206.00364 Table 1) for data of variance 1, with v = alpha^2 +
    sigma^2:

        L = sigma / sqrt(v) L',   G = alpha / v + sigma / v G',   L' and G' from the table.

    frames: the largest C.  memory: the largest P; of more earlier frames, the last ones are read."""

    def __init__(self, frames: int, memory: int, labels: int, knots: int):
        super().__init__()
        self.frames, self.memory, self.labels, self.knots = frames, memory, labels, knots
        self.time: nn.Module = Knots(knots)
        self.mean = nn.Embedding(labels, 2)
        shapes = [(past, count) for past in range(memory + 1) for count in range(1, frames + 1)]
        self.tables = nn.ModuleDict(
            {table_name(p, c): nn.Linear(knots, labels * 2 * c * (p + c), bias=False) for p, c in shapes}
        )

    def coefficients(self, t: Tensor, timestep: Tensor, label: Tensor, past: int, count: int) -> tuple[Tensor, Tensor]:
        """L [B, C, P] and G [B, C, C], complex64 or complex128, for P = past and C = count. t: [B], the level.
        timestep: what the time embedder is given for it, [B], or [B, 1 + n] with n extra inputs."""
        weights, name = self.time(timestep).to(self.mean.weight.dtype), table_name(past, count)
        table = self.tables[name](weights)
        if isinstance(self.time, KnotInputs):
            table = table + self.time.added(name, timestep, weights)
        rows = table.unflatten(1, (self.labels, 2, count, past + count))[torch.arange(len(t), device=t.device), label]
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        sigma = t.to(rows.dtype)[:, None, None]
        variance = (1 - sigma) ** 2 + sigma**2
        lags, gains = torch.complex(rows[:, 0], rows[:, 1]).split([past, count], dim=2)
        skip = (1 - sigma) / variance * torch.eye(count, dtype=rows.dtype, device=t.device)
        return sigma / variance.sqrt() * lags, skip + sigma / variance * gains

    def forward(self, x: Tensor, t: Tensor, timestep: Tensor, label: Tensor, past: Tensor) -> Tensor:
        """x: [B, C, 2, H, W] at level t [B].  past: [B, P, 2, H, W], earlier frames in order. Returns the clean
        frames, like x, in at least float32. Raises ValueError for more frames than there are tables for."""
        if x.shape[1] > self.frames:
            raise ValueError(
                f"this network predicts at most {self.frames} frames at once, got {x.shape[1]}; raise "
                "backbone.num_frames, or make chunks shorter"
            )
        seen = past[:, max(past.shape[1] - self.memory, 0) :]
        lags, gains = self.coefficients(t, timestep, label, seen.shape[1], x.shape[1])
        mean = torch.view_as_complex(self.mean(label).to(gains.real.dtype))[:, None, None]
        alpha = (1 - t).to(gains.real.dtype)[:, None, None]
        centred = torch.cat([to_complex(seen) - mean, to_complex(x) - alpha * mean], dim=1).to(gains.dtype)
        return to_latents(mean + torch.cat([lags, gains], dim=2) @ centred, x)

    @torch.no_grad()
    def set_exact(self, law: AR1Law, causal: bool) -> None:
        """Makes it the exact linear denoiser of the law at the knots, for every label, and for the empty prompt too.

        causal: whether chunks use the frames before them: this is the optimum of teacher forcing. Otherwise it is a
        bidirectional teacher's network, for which C frames are a video of their own, and L = 0."""
        sigma = torch.linspace(0, 1, self.knots, dtype=torch.float64)
        sigma[0] = 1e-3  # the limit for sigma -> 0, where the table is multiplied by sigma
        for label in range(self.labels):
            self.mean.weight[label] = torch.view_as_real(torch.tensor(law.second_order(label, 1)[0]))
        for past in range(self.memory + 1):
            for count in range(1, self.frames + 1):
                rows = [exact_rows(law, label, sigma, past, count, causal) for label in range(self.labels)]
                weight = self.tables.get_parameter(f"{table_name(past, count)}.weight")
                weight.copy_(torch.stack(rows).flatten(2).mT.flatten(0, 1))


def table_name(past: int, count: int) -> str:
    return f"past{past}_frames{count}"


def exact_rows(law: AR1Law, label: int, sigma: Tensor, past: int, count: int, causal: bool) -> Tensor:
    """L' and G' of the exact denoiser at levels sigma [K], before preconditioning: [K, 2, C, P + C] float64."""
    seen = past if causal else 0
    levels = torch.cat([sigma.new_zeros(len(sigma), seen), sigma[:, None].expand(-1, count)], dim=1)
    exact = ar1_formulas.gains(law.second_order(label, seen + count)[1], levels)[:, seen:]
    level = sigma[:, None, None]
    variance = (1 - level) ** 2 + level**2
    gains = (exact[:, :, seen:] - (1 - level) / variance * torch.eye(count)) * variance / level
    lags = exact[:, :, :seen] * variance.sqrt() / level
    lags = torch.cat([lags.new_zeros(len(sigma), count, past - seen), lags], dim=2)
    return torch.view_as_real(torch.cat([lags, gains], dim=2)).movedim(-1, 1)
