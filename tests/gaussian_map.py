"""An exact flow map behind the Denoiser contract, off by a known amount, for objectives to be tried on."""

import torch
from torch import Tensor, nn

from fastgen.backbones.gaussian_mixture import GaussianMixture, GaussianMixtureConfig
from fastgen.batch import Batch, Conditioning
from fastgen.denoiser import Denoiser
from fastgen.networks import Networks
from fastgen.objectives import Objective, Turn
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import FlowSchedule, expand

M, S = 0.7, 0.5
GAUSSIAN = GaussianMixtureConfig(means=((M, M),), stds=(S,), fit_steps=0, width=16, depth=1)
FOUR = RolloutPolicy((1.0, 0.75, 0.5, 0.25), "ode", two_time=True)
ONE = RolloutPolicy((1.0,), "ode", two_time=True)


def spread(t: Tensor) -> Tensor:
    return ((1 - t) ** 2 * S**2 + t**2).sqrt()


def average(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """u of N(0.7, 0.25) in every coordinate: (x - X_{t,s}(x)) / (t - s), written so that the diagonal has a value."""
    t, s = expand(t, x), expand(s, x)
    ratio = ((t + s) * (1 + S**2) - 2 * S**2) / (spread(t) * (spread(t) + spread(s)))  # (S(t) - S(s)) / S(t) / (t - s)
    return -M + ratio * (x - (1 - t) * M)


class GaussianMap(Denoiser):
    """average(x, t, s) + off * sin(2 x + 3 t - 2 s), the diagonal included. off is its one parameter."""

    def __init__(self, off: float = 0.0):
        super().__init__(nn.Identity(), FlowSchedule(), "flow_prediction")
        self.off = nn.Parameter(torch.tensor(off, dtype=torch.float64))

    def forward(self, x_t, t, cond, *, conditioning_time=None, extras=None, predict="sample"):  # type: ignore[no-untyped-def]
        s = extras["s"] if extras else t
        u = average(x_t, t, s) + self.off * torch.sin(2 * x_t + expand(3 * t - 2 * s, x_t))
        return u if predict == "flow_prediction" else x_t - expand(t, x_t) * u

    @property
    def is_sharded(self) -> bool:
        return False


def exact_networks(off: float = 0.0, policy: RolloutPolicy = FOUR) -> Networks:
    backbone: GaussianMixture = GAUSSIAN.build(torch.device("cpu"), torch.float64, 0)
    return Networks({"student": GaussianMap(off), "teacher": backbone.load("teacher")}, policy)


def gaussian_batch(count: int = 64, key: int = 0, pairs: bool = False) -> Batch:
    """Exact data; pairs: noises and where the exact ODE takes them."""
    ids = torch.arange(count) + count * key
    cond = Conditioning({"label": torch.zeros(count, dtype=torch.int64)})
    batch = Batch(ids, key, cond, cond, (2,), dtype=torch.float64)
    latents, noise = M + S * batch.normal("exact data"), batch.normal("pair noise")
    return Batch(ids, key, cond, cond, (2,), latents=latents, dtype=torch.float64,
                 pairs=(noise, M + S * noise) if pairs else None)  # fmt: skip


def student_loss(objective: Objective, networks: Networks, batch: Batch, step: int = 0) -> Tensor:
    return one_loss(objective, objective.turns(step, {})[-1], networks, batch)


def one_loss(objective: Objective, turn: Turn, networks: Networks, batch: Batch) -> Tensor:
    loss = objective.loss(turn, networks, batch, objective.init_state())
    assert not hasattr(loss, "__next__")
    return loss.total  # type: ignore[union-attr]


def square_growth(objective: Objective, policy: RolloutPolicy = FOUR) -> tuple[float, float]:
    """The loss at the exact map, and how many times it grows when the map is off by ten times more."""
    at = [float(student_loss(objective, exact_networks(off, policy), gaussian_batch(pairs=True)))
          for off in (0.0, 1e-3, 1e-2)]  # fmt: skip
    print(f"at the exact map {at[0]:.1e}, off by 0.001 {at[1]:.2e}, by 0.01 {at[2]:.2e}")
    assert at[1] > 1e-8
    return at[0], at[2] / at[1]
