"""Measures how a reward moved a student on a line, beside what the student's objective asks for.

    python benchmarks/acceptance/measure_tilt.py RUN ...

RUN is the folder of a run of rtdmd on a one-dimensional mixture with one reward, `linear` or `quadratic`. The mean and
standard deviation of the student are printed beside those of two laws, both computed on a grid:

    tilt       p exp(r / beta)
    minimiser  of the second stage's own objective, E_t[(sigma_t / alpha_t)^2 KL_t] - E[r] / beta, found by L-BFGS over
               the logits. It is not the tilt, because the matching term averages over noise levels (see rtdmd.py).

For each law the program prints the offset of the student's mean in standard deviations, and the energy distance
2 int (F_1 - F_2)^2 dx of 40,000 samples to the law. The energy distance of exact samples is about 0.0001."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from fastgen import noise
from fastgen.backbones.gaussian_mixture import Mixture
from fastgen.batch import Conditioning
from fastgen.config import load_stored
from fastgen.objectives.ac_dmd import renoise_level
from fastgen.recipe import Recipe
from fastgen.rollout import sample
from fastgen.run import checkpoint

SAMPLES, POINTS, LEVELS = 40_000, 300, 20
LOW, HIGH = -8.0, 8.0
Law = tuple[Tensor, Tensor]  # the points of a grid and their probabilities


def log_density(mixture: Mixture, y: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """log p_t at points y [N] of a line. alpha and sigma are scalars."""
    ones = torch.ones(len(y), 1, dtype=y.dtype)
    return mixture.log_density(y[:, None], alpha * ones, sigma * ones, torch.zeros(len(y), dtype=torch.int64))


def tilted(mixture: Mixture, reward: Callable[[Tensor], Tensor], strength: float, points: int = 4000) -> Law:
    """The law p exp(strength r)."""
    x = torch.linspace(LOW, HIGH, points, dtype=torch.float64)
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    return x, (log_density(mixture, x, one, zero) + strength * reward(x)).softmax(0)


def minimiser(mixture: Mixture, reward: Callable[[Tensor], Tensor], strength: float) -> Law:
    """The law p on the grid that minimises E_t[(sigma_t / alpha_t)^2 KL(p_t || teacher_t)] - strength E_p[r]."""
    x, start = tilted(mixture, reward, 0.0, POINTS)
    terms = []
    for t in renoise_level(torch.arange(LEVELS).double().add(0.5) / LEVELS, torch.zeros(LEVELS).double()):
        alpha, sigma = 1 - t, t
        low, high = float(alpha * LOW - 5 * sigma), float(alpha * HIGH + 5 * sigma)
        count = int(min(800, max(200, (high - low) / (0.3 * max(float(sigma), 0.03)))))
        y = torch.linspace(low, high, count, dtype=torch.float64)
        step = y[1] - y[0]
        kernel = torch.exp(-0.5 * ((y[:, None] - alpha * x) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi)) * step
        terms.append((kernel, log_density(mixture, y, alpha, sigma) + step.log(), (sigma / alpha) ** 2 / LEVELS))
    logits = start.clamp_min(1e-30).log().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=2000,
        history_size=50,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-10,
        tolerance_change=1e-13,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        p = logits.softmax(0)
        loss = -strength * (p * reward(x)).sum()
        for kernel, log_teacher, weight in terms:
            p_t = kernel @ p
            loss = loss + weight * (p_t * (p_t.clamp_min(1e-300).log() - log_teacher)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return x, logits.detach().softmax(0)


def moments(law: Law) -> tuple[float, float]:
    """Mean and standard deviation."""
    x, p = law
    mean = (x * p).sum()
    return mean.item(), ((x - mean) ** 2 * p).sum().sqrt().item()


def cdf(law: Law, z: Tensor) -> Tensor:
    """The distribution function at points z, linear between the points of the grid."""
    x, p = law
    total, i = p.cumsum(0), torch.searchsorted(x, z).clamp(1, len(x) - 1)
    inside = total[i - 1] + ((z - x[i - 1]) / (x[i] - x[i - 1])).clamp(0, 1) * p[i]
    return torch.where(z < x[0], 0.0, torch.where(z > x[-1], 1.0, inside))


def energy(samples: Tensor, law: Law) -> float:
    """The energy distance 2 int (F_n - F)^2 dx of samples to a law."""
    ordered = samples.sort().values
    low, high = min(ordered[0].item(), LOW), max(ordered[-1].item(), HIGH)
    z = torch.linspace(low, high, 40_001, dtype=torch.float64)
    empirical = torch.searchsorted(ordered, z).double() / len(ordered)
    return float(2 * (empirical - cdf(law, z)).square().sum() * (z[1] - z[0]))


def student_samples(run: Path, recipe: Recipe, backbone: Any) -> Tensor:
    """Samples [SAMPLES], float64, of the moving average in the last checkpoint."""
    student, ids = backbone.load("student"), torch.arange(SAMPLES)
    checkpoint.read_into(checkpoint.complete(run / "checkpoints")[-1], "ema", student.state_dict())
    cond = Conditioning({"label": torch.zeros_like(ids)})
    with torch.no_grad():
        x = sample(student, recipe.rollout, cond, lambda name: noise.normal(ids, (1,), noise.make_key("tilt", name)))
    return x[:, 0].double()


def measure(run: Path) -> dict[str, float]:
    """The student's mean and standard deviation. For each law its own two, the offset of the student's mean in units
    of the law's standard deviation, and the energy distance."""
    recipe = load_stored(run / "recipe.yaml")
    backbone, objective = recipe.backbone.unloaded().build(torch.device("cpu"), torch.float32, 0), recipe.objective
    x = student_samples(run, recipe, backbone)
    part = recipe.rewards.parts[0]  # type: ignore[union-attr]

    def reward(z: Tensor) -> Tensor:
        scores = part.score(z[:, None], [""] * len(z))
        assert isinstance(scores, Tensor)  # `linear` and `quadratic` return nothing else
        return scores

    inverse = objective.critic_weight == "inverse_tilt"
    ratio = objective.reward_weight / objective.dm_weight * recipe.rollout.num_steps
    strength = 1 / objective.reward_temperature if inverse else ratio
    laws = {"tilt": tilted(backbone.law, reward, strength)}
    if not inverse:
        laws["minimiser"] = minimiser(backbone.law, reward, strength)
    found = {"mean": x.mean().item(), "std": x.std().item()}
    for name, law in laws.items():
        mean, std = moments(law)
        found |= {
            f"{name}_mean": mean,
            f"{name}_std": std,
            f"{name}_offset": abs(found["mean"] - mean) / std,
            f"{name}_energy": energy(x, law),
        }
    return found


def report(run: Path) -> str:
    """What is printed of a run."""
    found = measure(run)
    lines = [f"{run}: student {found['mean']:.4f} +- {found['std']:.4f}"]
    for name in ("tilt", "minimiser"):
        if f"{name}_mean" in found:
            mean, std, off, far = (found[f"{name}_{key}"] for key in ("mean", "std", "offset", "energy"))
            lines.append(f"  {name} {mean:.4f} +- {std:.4f}: mean off by {off:.4f} std, energy {far:.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print("\n".join(report(Path(run)) for run in sys.argv[1:]))
