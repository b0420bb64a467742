"""Truncated training: the second stage of a consistency model, at high noise alone (TCM, arXiv 2410.14895).

    the authors     here                what it is
    t'              level               the lowest level that is trained, which is the lower end of `time`
    first stage     networks["first"]   the student at the end of the first stage, frozen
    boundary_prob   share               the share of the samples that have t = t'
    w_boundary      weight              the weight of their mean loss

The algorithm, for every student update after the first stage:
    t ~ `time` in [t', T], or t = t' for a share of the samples;  s < t as in the first stage
    target = first(x_s, s) where s < t',  else sg f(x_s, s)
    student <- mean of the loss over the other samples + weight * its mean over those at t'

The student no longer spends capacity on levels below t', where it would only denoise. What it predicts there is never
used: targets below t' are those of the first stage, and the sampler calls it at t' or above (`rollout.timesteps`). The
samples at t' tie it to the first stage. Without them, s is nearly always above t', and a student that gives the same
sample everywhere has next to no loss.

A part of the consistency objective, which has the loss, the laws of s and the weights of pairs. Each mean is taken
with the expected number of its samples, so that an update of several micro-batches is the same as one of a single
batch. A first stage of the same run hands over the student's own weights; the authors continue from their average, as
a run does that begins with init_from. Numbers are those of the released code for CIFAR-10, whose sigma is for data of
standard deviation 0.5; the paper's text has not been read.
"""

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.batch import Batch
from fastgen.flow.time_pairs import ShrinkingPairs, places
from fastgen.recipe import Recipe
from fastgen.registry import MOST_UPDATES
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import TimeSampler, expand


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Truncation:
    """begin: the updates of the first stage, at the beginning of this run. 0: init_from names the run that made it."""

    begin: int = Field(default=0, ge=0, le=MOST_UPDATES)
    # "truncated log-Student-t", df 0.01, mean 0, scale 0.2, from t' = 1 to 80, which are the levels 2/3 and 160/161
    time: TimeSampler = TimeSampler("log_student_t", 2 / 3, 160 / 161, mean=0.0, std=0.2, sigma_data=0.5, df=0.01)
    share: float = Field(default=0.25, gt=0, lt=1)  # "boundary_prob 0.25"
    weight: float = Field(default=0.1, gt=0)  # "w_boundary 0.1"

    @model_validator(mode="after")
    def _level(self) -> "Truncation":
        if not self.level:
            raise ValueError("truncation trains levels from time.low on, which must be above 0: nothing lies below 0")
        return self

    @property
    def level(self) -> float:
        """t'."""
        return self.time.low

    def check(self, policy: RolloutPolicy) -> None:
        """Raises ValueError if the sampler calls the student where it is not trained."""
        if policy.timesteps[-1] < self.level:
            raise ValueError(
                f"truncation trains levels from {self.level:.4g} on, the lower end of its time, and rollout.timesteps "
                f"goes down to {policy.timesteps[-1]:g}; leave out the lower ones, or lower truncation.time.low"
            )

    def check_recipe(self, recipe: Recipe) -> None:
        """Raises ValueError if there is no first stage, or no second one."""
        if not self.begin and recipe.init_from is None:
            raise ValueError(
                "truncation.begin: 0 starts from a first stage that is done: name its run in init_from, or give the "
                "number of updates that this run makes of it"
            )
        if self.begin >= recipe.train.steps:
            raise ValueError(
                f"truncation.begin: {self.begin} is not within this run's train.steps, {recipe.train.steps}; lower it"
            )

    def boundary(self, batch: Batch) -> Tensor:
        """[B] bool: the samples whose t is t'. Every batch on every process has their share, up to a sample or two."""
        return places(batch, "boundary") < self.share

    def levels(self, batch: Batch, pairs: ShrinkingPairs, update: int) -> tuple[Tensor, Tensor]:
        """t in [t', 1) and s < t, [B] each."""
        t = torch.where(self.boundary(batch), self.level, self.time(batch.uniform("pair")).double())
        t = t.clamp(max=1 - 1e-6)  # s belongs to a sigma, which is infinite at 1
        return t.to(batch.dtype), pairs.below(t, update).to(batch.dtype)

    def weights(self, batch: Batch) -> Tensor:
        """[B]: with these, a mean over all samples is the mean over the others plus `weight` times that at t'."""
        at_boundary = self.boundary(batch)
        other = 1 / (1 - self.share)
        return other + (self.weight / self.share - other) * at_boundary.to(batch.dtype)

    def target(self, s: Tensor, first: Tensor, student: Tensor) -> Tensor:
        """The target [B, ...] for points at s [B]: that of the first stage below t'."""
        return torch.where(expand(s < self.level, first), first, student)
