"""Combines several rewards into one, and prepares a student's samples for them."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, InstanceOf, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.modules.recomputation import checkpointed
from fastgen.rewards.base import CONFIG, Reward, Score
from fastgen.signals import group_moments


@dataclass(frozen=True, config=CONFIG)
class Composite:
    """The recipe's `rewards:` section. r_k is the score of part k, w_k its weight, and g the sample's prompt group.

    calibration   none:   c_k = r_k
                  zscore: c_k = (r_k - mean_k) / std_k, with the part's own mean and std
                  group:  c_k = (r_k - mean_g r_k) / std_g r_k, over the group's valid samples; 0 if they are equal
    aggregate, with v_k = w_k c_k
                  sum:            sum_k v_k
                  min:            min_k v_k
                  mean_minus_std: mean_k v_k - std_k v_k                                 (arXiv 2312.09244)

    Standard deviations divide by the count. A group's mean and std carry no gradient, so the gradient of c_k is that
    of r_k divided by the std.
    held_out: rewards that are not optimised. The health watch monitors them in addition to the parts. Of their weights
    only the sign counts.
    Raises ValueError for zscore without every part's std, and for a held-out reward that is among the parts."""

    parts: Annotated[tuple[InstanceOf[Reward], ...], Field(min_length=1)]
    held_out: tuple[InstanceOf[Reward], ...] = ()
    calibration: Literal["none", "zscore", "group"] = "none"
    aggregate: Literal["sum", "min", "mean_minus_std"] = "sum"

    @model_validator(mode="after")
    def _calibrated(self) -> "Composite":
        if self.calibration == "zscore":
            for i, part in enumerate(self.parts):
                if part.std is None:
                    raise ValueError(
                        f"calibration zscore needs parts.{i}.std ({part.label}): measure the mean and std of "
                        "its score over the teacher's samples, or set calibration to none or group"
                    )
        plain = [dataclasses.replace(part, weight=1.0, mean=0.0, std=None) for part in self.parts]
        for i, part in enumerate(self.held_out):
            if dataclasses.replace(part, weight=1.0, mean=0.0, std=None) in plain:
                raise ValueError(
                    f"held_out.{i}: {part.label} is among the parts, so it is not held out; choose another"
                )
        return self

    def used(self, grad: bool) -> dict[str, Reward]:
        """The parts by their names in logs; with `grad`, only the differentiable ones."""
        return {name: p for name, p in self._named(self.parts).items() if p.differentiable or not grad}

    @property
    def watched(self) -> dict[str, Reward]:
        """The held-out rewards by their names in logs."""
        return self._named(self.held_out, "held_out_")

    @staticmethod
    def _named(rewards: Sequence[Reward], prefix: str = "") -> dict[str, Reward]:
        labels = [reward.label for reward in rewards]
        names = [name if labels.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(labels)]
        return {prefix + name: reward for name, reward in zip(names, rewards, strict=True)}

    def __call__(
        self, inputs: Mapping[str, Tensor], prompts: Sequence[str], group: Tensor | None = None, grad: bool = False
    ) -> Score:
        """inputs: {a part's `input`: [B, ...]}. group: [B] int64, the prompt group of each sample. Groups must be
        complete. Only calibration `group` reads it.

        Returns the composite value, and each part's own score before calibration and weight. With `grad`, only the
        differentiable parts are used, and the value carries gradient to the inputs. A sample is valid if all parts
        that are used are valid.

        Raises ValueError if `grad` is set and no part is differentiable, or if calibration is `group` and no groups
        are given."""
        used = self.used(grad)
        if not used:
            raise ValueError(f"no gradient: none of {', '.join(self.used(False))} is differentiable")
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            return self.combined({name: part(inputs[part.input], prompts) for name, part in used.items()}, group)

    def combined(self, scores: Mapping[str, Score], group: Tensor | None = None) -> Score:
        """The composite of the scores of some parts, by their names in logs. It carries the gradient of their values,
        except in its own parts."""
        valid = torch.stack([score.valid for score in scores.values()]).all(0)
        parts = self.used(grad=False)
        values = [parts[n].weight * self.calibrated(parts[n], s.value, valid, group) for n, s in scores.items()]
        total = self.aggregated(torch.stack(values))
        outer = {name: score.value.detach() for name, score in scores.items()}
        inner = {f"{name}_{key}": part for name, score in scores.items() for key, part in score.parts.items()}
        return Score(torch.where(valid, total, 0), valid, outer | inner)

    def calibrated(self, part: Reward, value: Tensor, valid: Tensor, group: Tensor | None) -> Tensor:
        """c_k: [B] float32."""
        if self.calibration == "none":
            return value
        if self.calibration == "zscore":
            assert part.std is not None
            return (value - part.mean) / part.std
        if group is None:
            raise ValueError("calibration group needs Batch.group, the prompt group of every sample")
        mean, std = group_moments(value.detach(), group, valid)
        return torch.where(std > 0, (value - mean) / torch.where(std > 0, std, 1), 0).float()

    def aggregated(self, values: Tensor) -> Tensor:
        """Combines the values v_k of the parts, [K, B], into [B]."""
        if self.aggregate == "sum":
            return values.sum(0)
        if self.aggregate == "min":
            return values.amin(0)
        variance = values.var(0, correction=0)
        spread = torch.where(variance > 0, variance, 1).sqrt() * (variance > 0)  # the root has no finite gradient at 0
        return values.mean(0) - spread


class StraightThroughClamp(torch.autograd.Function):
    """Clamps to [0, 1]. The gradient is that of the identity."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Applies a composite to a backbone's latents. decode: `Backbone.decode`."""

    composite: Composite
    decode: Callable[..., Tensor]

    def __call__(self, x0: Tensor, prompts: Sequence[str], group: Tensor | None, grad: bool) -> Score:
        """x0: [B, *latent_shape] clean samples. They are decoded once and without autocast, so that a reward sees what
        an evaluation sees. Pictures are clamped to [0, 1]; with `grad`, the clamp has the gradient of the identity."""
        return self.composite(self.seen(x0, self.composite.used(grad).values(), grad), prompts, group, grad)

    @torch.no_grad()
    def each(self, x0: Tensor, prompts: Sequence[str]) -> dict[str, Score]:
        """The scores of all parts and all held-out rewards, by name, neither calibrated nor weighted."""
        rewards = self.composite.used(grad=False) | self.composite.watched
        inputs = self.seen(x0, rewards.values(), grad=False)
        return {name: reward(inputs[reward.input], prompts) for name, reward in rewards.items()}

    def gradients(self, x0: Tensor, prompts: Sequence[str]) -> tuple[dict[str, Score], dict[str, Tensor]]:
        """The scores of all parts, neither calibrated nor weighted, and of the differentiable ones the gradient with
        respect to what the part reads, by name. x0 is decoded once, and no gradient goes through the decoder."""
        parts = self.composite.used(grad=False)
        seen, scores, gradients = self.seen(x0, parts.values(), grad=False), dict[str, Score](), dict[str, Tensor]()
        for name, part in parts.items():
            read = seen[part.input].detach().requires_grad_(part.differentiable)
            with torch.set_grad_enabled(part.differentiable):
                score = part(read, prompts)
            if part.differentiable:
                (gradients[name],) = torch.autograd.grad(score.value.sum(), read)
            scores[name] = dataclasses.replace(score, value=score.value.detach())
        return scores, gradients

    def seen(self, x0: Tensor, rewards: Iterable[Reward], grad: bool) -> dict[str, Tensor]:
        """What these rewards read, by their `input`. With `grad`, the decoder's activations are not stored but
        recomputed in the backward pass, so that they do not add to those of the student and of the rewards."""
        inputs = {"latents": x0}
        grad = grad and torch.is_grad_enabled()
        with torch.set_grad_enabled(grad), torch.autocast(x0.device.type, enabled=False):
            for kind in sorted({reward.input for reward in rewards} - {"latents"}):
                if not grad:
                    inputs[kind] = self.decode(x0, clamp=True)
                else:
                    decoded = checkpointed(partial(self.decode, clamp=False), x0)
                    inputs[kind] = decoded if kind == "points" else StraightThroughClamp.apply(decoded)  # type: ignore[no-untyped-call]
        return inputs
