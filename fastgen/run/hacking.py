"""The watch against reward hacking: whether what a student gains in its rewards is still worth having.

A student that games a reward raises it while everything the reward stood for falls (R0, arXiv 2503.13070: HPS up, FID
up). So beside the optimised rewards (`rewards.parts`) the watch scores the same fixed samples by rewards that nothing
optimises (`rewards.held_out`), and measures how far the samples have gone from the anchor, the teacher's own of the
same prompts. Numbers are in standard deviations of the teacher's samples, so that one threshold serves any reward."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastgen.recipe import HealthConfig
from fastgen.rewards import Composite, Score

ADVICE = (
    "strengthen what holds the student to the teacher (dm_weight, anchor_weight), lower reward_weight or "
    "optimizers.student.lr, and continue from an earlier checkpoint (train.resume_from)"
)


def means(scores: Mapping[str, Score]) -> dict[str, float]:
    """The mean of each reward over the samples that have a score; 0 where none has."""
    return {name: float(valid_mean(score)) for name, score in scores.items()}


def spreads(scores: Mapping[str, Score]) -> dict[str, float]:
    """The standard deviation of each, dividing by the count."""
    return {
        name: float(((s.value.double() - valid_mean(s)).square() * s.valid).sum() / s.valid.sum().clamp_min(1)) ** 0.5
        for name, s in scores.items()
    }


def valid_mean(score: Score) -> Tensor:
    return (score.value.double() * score.valid).sum() / score.valid.sum().clamp_min(1)


def anchor_distance(samples: Tensor, anchor: Tensor) -> float:
    """How far apart two sets of samples [N, ...] are, as a share of the anchor's own spread:

        (2 E|x - y| - E|x - x'| - E|y - y'|) / E|y - y'|                              (the energy distance)

    Of one law about 0: the means within a set leave out a sample's distance to itself, so that noise averages 0, while
    samples of one prompt count in E|x - y|, which lowers it a little (-0.008 of 64 digits). float64."""
    x, y = samples.detach().double().flatten(1), anchor.to(samples.device).double().flatten(1)
    between, own, spread = torch.cdist(x, y).mean(), torch.pdist(x).mean(), torch.pdist(y).mean()
    return float((2 * between - own - spread) / spread.clamp_min(1e-12))


def gamed(
    history: Sequence[Mapping[str, float]], spread: Mapping[str, float], rewards: Composite, config: HealthConfig
) -> list[str]:
    """Says where the optimised rewards rise and a held-out one falls.

    history: a row a look, `step` and the mean of each reward; the first is of the student the run started from.
    spread: of the teacher's samples. A held-out reward is compared with the best it ever was, and the optimised ones
    (their weighted sum, each in its own spread) with what they were then."""
    warnings, now = [], history[-1]
    for name in rewards.watched:
        best = max(history, key=lambda row: row[name])
        fallen = (best[name] - now[name]) / max(spread[name], 1e-12)
        gain = {label: (now[label] - best[label]) / max(spread[label], 1e-12) for label in rewards.used(grad=False)}
        total = sum(part.weight * gain[label] for label, part in rewards.used(grad=False).items())
        if fallen > config.held_out_drop and total > 0:
            rises = ", ".join(f"{label} by {value:+.1f}" for label, value in gain.items())
            warnings.append(
                f"the student games its rewards: since step {best['step']:.0f} {name}, which is held out, "
                f"has fallen by {fallen:.1f} of the teacher's standard deviations, and the optimised ones "
                f"moved: {rises}; {ADVICE}"
            )
    return warnings


def left_the_anchor(distance: float, first: float, config: HealthConfig) -> list[str]:
    """first: the distance at the run's start, which a student that is still blurred may have."""
    if distance <= max(config.anchor_distance, first):
        return []
    return [
        f"the student has left the teacher: the distance of their samples is {distance:.2f} of the teacher's own "
        f"spread ({first:.2f} at the start); {ADVICE}"
    ]


def idle_groups(terms: Mapping[str, float], config: HealthConfig) -> list[str]:
    """Groups that say nothing, and advantages that are cut, by the terms that objectives log."""
    warnings = []
    zero = max((v for k, v in terms.items() if k.endswith("/zero_groups")), default=0.0)
    clipped = max((v for k, v in terms.items() if k.endswith("/clipped")), default=0.0)
    if zero > config.zero_groups:
        warnings.append(
            f"in {zero:.0%} of the prompt groups all rewards are equal, so nothing is learned from them; "
            "raise objective.group_size or rollout.eta, or take a reward that differs"
        )
    if clipped > config.clipped:
        warnings.append(
            f"{clipped:.0%} of the advantages are clipped: a few samples decide the update; raise "
            "objective.advantage_clip or train.batch_size, or look at the rewards' outliers"
        )
    return warnings
