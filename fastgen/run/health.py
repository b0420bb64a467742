"""The watch over a run, which warns early and in words when a student goes wrong.

Statistics of the student's samples are compared with those of the teacher's, which were made from the same prompts and
noise before the first step. The losses of distribution matching do not show quality, but these statistics show
collapse.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from fastgen.recipe import HealthConfig
from fastgen.rewards import Composite, Score
from fastgen.run import hacking

Statistics = dict[str, float]


def statistics(latents: Tensor, center: float | None = None, scale: float | None = None) -> Statistics:
    """mean, std, diversity and saturation of samples [B, ...].

    diversity: the mean distance between two samples x_i and x_j, per value: sqrt(mean |x_i - x_j|^2).
    saturation: the share of values that are more than 3 scale away from center. center and scale are the teacher's
    mean and std; by default they are the samples' own."""
    x = latents.detach().double().flatten(1)
    center = x.mean().item() if center is None else center
    scale = x.std().item() if scale is None else scale
    pairs = torch.pdist(x) / x.shape[1] ** 0.5
    far = ((x - center).abs() > 3 * scale).double().mean()
    return {"mean": x.mean().item(), "std": x.std().item(), "diversity": pairs.mean().item(), "saturation": far.item()}


@plain_dataclass
class Memory:
    """What the watch remembers; it is stored in checkpoints. reference: the teacher's statistics. reward_spread: the
    standard deviation of each reward over the teacher's samples. rewards: one row per look, with its step, the mean of
    each reward, and the distance of the samples to the anchor. grad_norms: the values of each gradient norm at all
    looks so far. alarmed: whether the last look gave a warning."""

    reference: Statistics = field(default_factory=dict)
    reward_spread: dict[str, float] = field(default_factory=dict)
    rewards: list[dict[str, float]] = field(default_factory=list)
    grad_norms: dict[str, list[float]] = field(default_factory=dict)
    alarmed: bool = False


class Watch:
    """Looks at a run every `health.every` updates."""

    def __init__(self, config: HealthConfig):
        self.config = config
        self.memory = Memory()
        self.skipped = dict[str, int]()  # turn -> how many of its updates were skipped in a row
        self.anchor: Tensor | None = None  # the teacher's samples, set if the run has rewards

    @property
    def alarmed(self) -> bool:
        """Whether the last look gave a warning, or updates are being skipped."""
        return self.memory.alarmed or any(self.skipped.values())

    def recall(self, memory: Mapping[str, Any]) -> None:
        self.memory = Memory(**memory)

    def count_skips(self, turn: str, skipped: bool) -> int:
        """Counts an update of a turn. Returns how many of this turn's updates have been skipped in a row."""
        self.skipped[turn] = self.skipped.get(turn, 0) + 1 if skipped else 0
        return self.skipped[turn]

    def look(
        self, step: int, samples: Tensor, terms: Mapping[str, float], movement: Mapping[str, float]
    ) -> tuple[Statistics, list[str]]:
        """Compares the student's samples [B, ...], and the mean of the logged terms since the last row, with what is
        healthy.

        movement: role -> relative change of its weights since the last look. Returns the statistics and the warnings.
        Samples that are washed out or look alike give no warning until `health.grace` updates have passed."""
        teacher = self.memory.reference
        seen = statistics(samples, teacher["mean"], teacher["std"])
        warnings = self.running_away(seen) + self.lagging(terms) + self.moving(movement) + self.growing(terms)
        warnings += hacking.idle_groups(terms, self.config)
        if step > self.config.grace:
            warnings += self.collapsed(seen)
        self.memory.alarmed = bool(warnings)
        return seen, warnings

    def look_at_rewards(
        self, step: int, samples: Tensor, scores: Mapping[str, Score], rewards: Composite
    ) -> tuple[Statistics, list[str]]:
        """Compares the rewards of the same samples (optimised and held out), and the distance of the samples to the
        anchor, with those of earlier looks. The first look, before the first update, only records them."""
        assert self.anchor is not None
        row = {"anchor_distance": hacking.anchor_distance(samples, self.anchor)} | hacking.means(scores)
        self.memory.rewards.append({"step": float(step)} | row)
        warnings = hacking.gamed(self.memory.rewards, self.memory.reward_spread, rewards, self.config)
        first = self.memory.rewards[0]["anchor_distance"]
        warnings += hacking.left_the_anchor(row["anchor_distance"], first, self.config)
        self.memory.alarmed |= bool(warnings)
        return row, warnings

    def running_away(self, seen: Statistics) -> list[str]:
        """Warns of samples outside the teacher's range."""
        config, teacher, warnings = self.config, self.memory.reference, []
        if not all(map(math.isfinite, seen.values())):
            return [
                "the student's samples are not finite; lower optimizers.student.lr and continue from the last good "
                "checkpoint (train.resume_from)"
            ]
        shift, std = abs(seen["mean"] - teacher["mean"]) / teacher["std"], seen["std"] / teacher["std"]
        if shift > config.mean_shift:
            warnings.append(
                f"the student's samples have drifted: their mean is off by {shift:.1f} standard deviations of the "
                "teacher's samples (colour or brightness runs away); lower optimizers.student.lr or raise "
                "objective.fake_updates"
            )
        if std > config.std_ratio[1] or seen["saturation"] > teacher["saturation"] + config.saturation:
            warnings.append(
                f"the student's samples are over-saturated: their standard deviation is {std:.2f} times the "
                f"teacher's, and {seen['saturation']:.1%} of their values are far out; lower guidance_scale, or use "
                "guidance_rescale or guidance_interval, and lower optimizers.student.lr"
            )
        return warnings

    def collapsed(self, seen: Statistics) -> list[str]:
        """Warns of samples without contrast, or without variety."""
        config, teacher, warnings = self.config, self.memory.reference, []
        std, diversity = (seen[k] / max(teacher[k], 1e-12) for k in ("std", "diversity"))
        if std < config.std_ratio[0]:
            warnings.append(
                f"the student's samples are washed out (grey, blurred or empty): their standard deviation is "
                f"{std:.2f} times the teacher's; check that the student trains, lower optimizers.student.lr, or raise "
                "objective.fake_updates"
            )
        if diversity < config.diversity_ratio:
            warnings.append(
                f"the student's samples look alike (mode collapse): the distances between them are {diversity:.2f} "
                "times those between the teacher's; raise objective.fake_updates, lower optimizers.student.lr, or "
                "add the discriminator"
            )
        return warnings

    def lagging(self, terms: Mapping[str, float]) -> list[str]:
        lag = max((abs(v) for k, v in terms.items() if k.endswith("/fake_lag")), default=0.0)
        if lag <= self.config.fake_lag:
            return []
        return [
            f"the fake score does not follow the student: its own error is {lag:.1f} times the gradient; raise "
            "objective.fake_updates or optimizers.fake_score.lr, or lower optimizers.student.lr"
        ]

    def moving(self, movement: Mapping[str, float]) -> list[str]:
        """Warns of roles whose weights hardly move (float32 resolves relative changes of 1e-7) or move too far. Also
        warns of a student that moves further than the fake score."""
        (low, high), warnings = self.config.movement, []
        for role, moved in movement.items():
            if moved < low:
                warnings.append(
                    f"{role} is not learning: its weights changed by {moved:.1g} of their size since the "
                    f"last look; raise optimizers.{role}.lr"
                )
            if moved > high:
                warnings.append(
                    f"{role} forgets what it started from: its weights changed by {moved:.1f} times their "
                    f"size since the last look; lower optimizers.{role}.lr"
                )
        student, fake = movement.get("student", 0.0), movement.get("fake_score", 0.0)
        if fake > low and student > self.config.lead * fake:
            warnings.append(
                f"the student runs ahead of the fake score: its weights moved {student / fake:.1f} times as far "
                "since the last look; lower optimizers.student.lr, or raise optimizers.fake_score.lr or "
                "objective.fake_updates"
            )
        return warnings

    def growing(self, terms: Mapping[str, float]) -> list[str]:
        """Warns of roles whose gradient norm is far above its median so far. The first three looks only record it."""
        warnings = []
        for name, value in terms.items():
            if "/grad_norm_" not in name:
                continue
            history = self.memory.grad_norms.setdefault(name, [])
            usual = sorted(history)[len(history) // 2] if len(history) >= 3 else float("inf")
            if value > self.config.grad_growth * usual:
                role = name.rpartition("grad_norm_")[2]
                warnings.append(
                    f"the gradient of {role} has grown to {value / usual:.0f} times its median so far; lower "
                    f"optimizers.{role}.lr"
                )
            history.append(value)
        return warnings
