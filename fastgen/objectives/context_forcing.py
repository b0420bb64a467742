"""Context Forcing: a causal student is matched to a causal teacher, chunk by chunk (arXiv 2602.06028).

    paper             here                            what it is
    student           networks.student                causal few-step generator; its memory is that of its schedule
    context teacher   context_teacher, or teacher     causal denoiser of a chunk, given the clean frames before it
    fake score        networks.fake_score             the same of the student's videos, trained online
    context           rollout.x                       the student's own frames: both scores are given all of them

Self Forcing's teacher judges a video as a whole, so that it can be no longer than the teacher's. A causal teacher
judges each chunk x_j given what came before it, at any length. With both scores given the student's own past,

    g_j = (mu_fake - mu_real)(x_j renoised to t | x_<j) / mean|x - mu_real|

is DMD2's gradient of sum_j E KL(q(x_j | x_<j) || p(x_j | x_<j)), which is the KL divergence of the whole videos by the
chain rule (derived), up to the gradient through x_<j, which is left out. So its optimum is the teacher's law of videos
of any length. The teacher may see farther back than the student, which then learns to keep in its memory (window,
sink, `slow`, `linear`) what the teacher uses; that is the paper's point.

From the paper's abstract and from summaries of the paper, which we have not read whole; the formulas are derived. By
these, a first stage matches short videos, as Self Forcing does here, and the teacher is trained to continue videos
from imperfect context, for which there is nothing here. Its slow memory is `rollout.chunks.slow`, by a rule of ours.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.denoiser import Denoiser, Inputs
from fastgen.networks import Networks
from fastgen.objectives.causal import check_order
from fastgen.objectives.dmd2 import DMD2
from fastgen.objectives.fake_score import denoising_loss, make_fake_score
from fastgen.recipe import Recipe
from fastgen.rollout import Rollout, RolloutPolicy
from fastgen.sampling.sampler import METADATA, read_metadata
from fastgen.streaming.schedule import MOST_FRAMES, ChunkSchedule


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ContextForcing(DMD2):
    """teacher_from: a run of teacher_forcing, or its export, whose student is the causal teacher and the start of the
    fake score. None: the pipeline's own network, which must then be causal, as that of ar1_video is.
    teacher_window: how many frames the teacher sees, the chunk included; None: all."""

    examples = ({},)
    page = "docs/streaming.md"

    takes_inner = False  # it is for students that work in chunks
    takes_taught = True
    name: Literal["context_forcing"] = "context_forcing"  # type: ignore[assignment]
    teacher_from: str | None = None
    teacher_window: int | None = Field(default=None, ge=1, le=MOST_FRAMES)

    @property
    def full_roles(self) -> tuple[str, ...]:
        return (*super().full_roles, "fake_score")

    def check(self, policy: RolloutPolicy) -> None:
        super().check(policy)
        if policy.chunks is None:
            raise ValueError("context_forcing is for students that work in chunks: give rollout.chunks, or use dmd2")
        check_order(policy)
        for key in ("gan_weight", "ca_time", "ida_decay", "embedding"):
            if getattr(self, key):
                raise ValueError(f"{key} is a term on whole videos, and context_forcing compares chunks: leave it out")
        self.schedule(policy)

    def check_recipe(self, recipe: Recipe) -> None:
        super().check_recipe(recipe)
        if self.teacher_from is None:
            if recipe.backbone.name != "ar1_video":
                raise ValueError(
                    "objective.teacher_from: the pipeline's own network sees all frames in both directions; give a "
                    "run of teacher_forcing with this pipeline"
                )
            return
        if self.condition_on_stop:
            raise ValueError(
                "objective.condition_on_stop: a network that sees a video and its clean past in one call takes no "
                "input besides the level; leave it out"
            )
        folder = export_of(self.teacher_from)
        if not (folder / METADATA).is_file():
            raise ValueError(f"objective.teacher_from: {self.teacher_from} is neither a finished run nor an export")
        if not read_metadata(folder)["policy"].get("chunks"):
            raise ValueError(f"objective.teacher_from: the student of {self.teacher_from} does not work in chunks")

    def schedule(self, policy: RolloutPolicy) -> ChunkSchedule:
        """What the teacher and the fake score see of the frames before a chunk."""
        assert policy.chunks is not None
        return ChunkSchedule(frames=policy.chunks.frames, first=policy.chunks.first, window=self.teacher_window)

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        if self.teacher_from is None:
            return {"fake_score": make_fake_score(backbone, policy, self.condition_on_stop)}
        folder = export_of(self.teacher_from)
        fake_score = backbone.load_start(folder).requires_grad_(True).train()
        return {"fake_score": fake_score, "context_teacher": backbone.load_start(folder).requires_grad_(False)}

    @torch.no_grad()
    def score_gradient(self, networks: Networks, batch: Batch, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        x_t, t = self.renoised(networks, batch, rollout)
        fake = networks.fake_score(x_t, t, batch.cond, self.told(networks, rollout))
        teacher: Denoiser = networks.get("context_teacher", networks.teacher)  # type: ignore[assignment]
        # guidance doubles the rows of x_t, and those of its past with them
        past = rollout.x if self.guidance_scale == 1 else torch.cat([rollout.x, rollout.x])
        predict = partial(teacher, inputs=self.seen(networks, past))
        scale = teacher.per_expert(self.guidance_scale, t)
        interval, rescale = self.guidance_interval, self.guidance_rescale
        real = signals.guided(predict, x_t, t, batch.cond, batch.uncond, scale, interval, rescale)
        return self.field(rollout.x, fake, real), signals.lag_terms(rollout.x, fake, real)

    def fake_denoising(self, networks: Networks, batch: Batch, rollout: Rollout) -> Tensor:
        """The denoising loss of every chunk of the student's videos, given the frames before it."""
        within, inputs = self.level_range(networks.policy, rollout), self.told(networks, rollout)
        return denoising_loss(networks, batch, rollout.x, self.fake_time, self.fake_space, inputs, within)

    def seen(self, networks: Networks, past: Tensor) -> Inputs:
        """What makes a call on whole videos one on each of their chunks, given the frames of `past` before it."""
        return Inputs(causal=self.schedule(networks.policy), clean=past)

    def told(self, networks: Networks, rollout: Rollout) -> Inputs:
        """The inputs of the fake score."""
        stop = rollout.stop if self.condition_on_stop else None
        return replace(self.seen(networks, rollout.x), stop=stop)


def export_of(path: str) -> Path:
    """The export of a run, or the folder itself."""
    return Path(path) / "export" if (Path(path) / "export").is_dir() else Path(path)
