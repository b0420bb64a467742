"""The watch against reward hacking: whether the samples really get better while their rewards rise.

A student that games a reward raises it while everything that the reward stood for gets worse (R0, arXiv 2503.13070:
HPS up, FID up). So the watch also scores the same fixed samples with rewards that nothing optimises
(`rewards.held_out`, next to the optimised `rewards.parts`). And it measures how far the samples have moved from the
anchor, which is the teacher's samples for the same prompts. Changes of a reward are given in standard deviations of
that reward over the teacher's samples, so that one threshold serves every reward."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastgen.recipe import HealthConfig
from fastgen.rewards import Composite, Score

ADVICE = (
    "strengthen the term that holds the student to the teacher (objective.dm_weight or objective.anchor_weight), "
    "lower objective.reward_weight or optimizers.student.lr, and continue from an earlier checkpoint "
    "(train.resume_from)"
)


def means(scores: Mapping[str, Score]) -> dict[str, float]:
    """The mean of each reward over the samples with a valid score; without those of which there are none."""
    return {name: float(valid_mean(score)) for name, score in scores.items() if score.valid.any()}


def spreads(scores: Mapping[str, Score]) -> dict[str, float]:
    """The standard deviation of each reward over the samples with a valid score, dividing by their count; without
    those of which there are none."""
    return {
        name: float(((s.value.double() - valid_mean(s)).square() * s.valid).sum() / s.valid.sum()) ** 0.5
        for name, s in scores.items()
        if s.valid.any()
    }


def valid_mean(score: Score) -> Tensor:
    return (score.value.double() * score.valid).sum() / score.valid.sum()


def anchor_distance(samples: Tensor, anchor: Tensor) -> float:
    """How far apart two sets of samples [N, ...] are, relative to the spread of the anchor:

        (2 E|x - y| - E|x - x'| - E|y - y'|) / E|y - y'|                              (the energy distance)

    The value is about 0 for two sets from the same law. The means within a set leave out the distance of a sample to
    itself, so that sampling noise averages to 0. The mean E|x - y| does include pairs of the same prompt, which lowers
    the value a little (-0.008 for 64 digits). Computed in float64."""
    x, y = samples.detach().double().flatten(1), anchor.to(samples.device).double().flatten(1)
    between, within, spread = torch.cdist(x, y).mean(), torch.pdist(x).mean(), torch.pdist(y).mean()
    return float((2 * between - within - spread) / spread.clamp_min(1e-12))


def gamed(
    history: Sequence[Mapping[str, float]], spread: Mapping[str, float], rewards: Composite, config: HealthConfig
) -> list[str]:
    """Warns where a held-out reward has become worse while the optimised rewards have become better. One with a
    negative weight is worse where it is higher.

    history: one row per look, with `step` and the mean of each reward that has one; the first row is the student that
    the run started from. spread: the standard deviation of each reward over the teacher's samples. A held-out reward
    is compared with its best value so far. The optimised rewards (their weighted sum, each in units of its spread) are
    compared with their values at that same look. A reward without a number at a look is left out there."""
    warnings, now, used = list[str](), history[-1], rewards.used(grad=False)
    for name, reward in rewards.watched.items():
        if name not in now or name not in spread:
            continue
        sign, word = (-1, "risen") if reward.weight < 0 else (1, "fallen")
        best = max((row for row in history if name in row), key=lambda row: sign * row[name])
        worse = sign * (best[name] - now[name]) / max(spread[name], 1e-12)
        known = [label for label in used if all(label in values for values in (now, best, spread))]
        gain = {label: (now[label] - best[label]) / max(spread[label], 1e-12) for label in known}
        total = sum(used[label].weight * value for label, value in gain.items())
        if worse > config.held_out_drop and total > 0:
            rises = ", ".join(f"{label} by {value:+.1f}" for label, value in gain.items())
            warnings.append(
                f"the student games its rewards: since step {best['step']:.0f} {name}, which is held out, "
                f"has {word} by {worse:.1f} standard deviations of the teacher's samples, while the optimised "
                f"rewards changed ({rises}); {ADVICE}"
            )
    return warnings


def left_the_anchor(distance: float, first: float, config: HealthConfig) -> list[str]:
    """Warns where the samples are too far from the teacher's. first: the distance at the start of the run, which is
    always allowed, because a student that is still blurred may start far away."""
    if distance <= max(config.anchor_distance, first):
        return []
    return [
        f"the student has left the teacher: the distance between their samples is {distance:.2f} of the spread of the "
        f"teacher's ({first:.2f} at the start); {ADVICE}"
    ]


def idle_groups(terms: Mapping[str, float], config: HealthConfig) -> list[str]:
    """Warns, from the terms that objectives log, of groups that teach nothing and of advantages that are clipped."""
    warnings = []
    zero = max((v for k, v in terms.items() if k.endswith("/zero_groups")), default=0.0)
    clipped = max((v for k, v in terms.items() if k.endswith("/clipped")), default=0.0)
    if zero > config.zero_groups:
        warnings.append(
            f"in {zero:.0%} of the prompt groups all rewards are equal, so nothing is learned from them; "
            "raise objective.group_size or rollout.eta, or use a reward that differs between samples"
        )
    if clipped > config.clipped:
        warnings.append(
            f"{clipped:.0%} of the advantages are clipped: a few samples decide the update; raise "
            "objective.advantage_clip or train.batch_size, or look for outliers of the rewards"
        )
    return warnings
