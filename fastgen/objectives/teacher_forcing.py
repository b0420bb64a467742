"""Teacher forcing and diffusion forcing: a causal student is trained as a diffusion model on real videos.

    paper     here                 what it is
    theta     networks.student     denoiser of a chunk given earlier frames, initialised from the teacher
    x         batch.latents        real videos [B, F, ...]
    x_<i      past                 the frames before chunk i: of the data (teacher forcing), or of x_t at levels of
                                   their own (diffusion forcing, arXiv 2407.01392)

The algorithm, for every student update:
    every chunk of every video draws a level t, and x_t = alpha x + sigma noise
    student <- denoising loss of each chunk at x_t, given its past
    the average of the student's weights is updated once.

At its optimum, with enough steps, the student samples x one chunk after another. It is the stage before Self Forcing:
distribution matching needs a student that is causal already (CausVid, arXiv 2412.07772; Causal Forcing says why). With
few steps its videos drift, because the chunks that it sees then are its own and not the data's;
`backbones.ar1_formulas` says by how much.

A model that has only seen clean frames meets its own, imperfect ones when it samples. With `residual_share`, the past
of a share of the frames carries the error of the student's own prediction of them at x_t (`with_residuals`), as
Matrix-Game 3 re-injects residuals; its abstract says no more, and the formula is ours.

With a clean past, the loss is computed in one masked call or chunk by chunk (`objectives.causal`).
"""

from typing import Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen import signals
from fastgen.batch import Batch, Conditioning
from fastgen.denoiser import Inputs
from fastgen.networks import Networks
from fastgen.objectives.base import Loss, Objective, State, Turn
from fastgen.objectives.causal import Form, by_frame, check_order, predict_chunks
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import PredictionType, TimeSampler
from fastgen.streaming.schedule import ChunkSchedule


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class TeacherForcing(Objective):
    """past: clean is teacher forcing, noisy is diffusion forcing, where all chunks are denoised in one masked call.
    time: the law of the levels.  space: of the loss; None: the student's own prediction type.
    prompt_dropout: the share of samples that train without their prompt, for guidance later.
    residual_share, residual_scale: how many of the frames are seen with an error by later chunks, and how much of it.

    The loss is that of Self-Forcing's code without its weight of levels (teacher_forcing in docs/faithfulness.md)."""

    page = "docs/streaming.md"
    trained_roles = ("student",)
    takes_chunks = True
    takes_taught = True

    name: Literal["teacher_forcing"] = "teacher_forcing"
    past: Literal["clean", "noisy"] = "clean"
    form: Form = "packed"
    time: TimeSampler = TimeSampler(low=0.001, high=0.999)  # ours; Self-Forcing for Wan: uniform with shift 5
    space: PredictionType | None = None
    prompt_dropout: float = Field(default=0.1, ge=0, lt=1)  # ours; AnyFlow's for Wan is 0.1, which no row pins
    residual_share: float = Field(default=0.0, ge=0, le=1)
    residual_scale: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _form(self) -> "TeacherForcing":
        if self.past == "noisy" and self.form == "chunks":
            raise ValueError("past: noisy denoises all chunks in one call, which is form: packed; leave form out")
        return self

    @model_validator(mode="after")
    def _residuals(self) -> "TeacherForcing":
        if self.past == "noisy" and self.residual_share:
            raise ValueError("past: noisy shows noise, and no frame with an error: leave residual_share out")
        return self

    @property
    def unmasked(self) -> str | None:
        return "form: chunks" if self.form == "packed" else None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"latents"})

    def check(self, policy: RolloutPolicy) -> None:
        if policy.chunks is None:
            raise ValueError(
                "teacher_forcing trains a student that works chunk by chunk: say how in rollout.chunks, for example "
                "{frames: 3}"
            )
        if self.past == "clean":
            check_order(policy)
        if policy.inputs:
            raise ValueError(
                "teacher_forcing trains a plain denoiser: leave out two_time, embedded_guidance and embedded_steps"
            )
        if self.past == "noisy" and policy.chunks.context_noise:
            raise ValueError("with past: noisy the past has levels of its own: leave out rollout.chunks.context_noise")

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        return (Turn("student", ("student",)),)

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        assert batch.latents is not None and networks.policy.chunks is not None
        chunks, x = networks.policy.chunks, batch.latents
        t = self.levels(batch, chunks)
        x_t = networks.student.schedule.add_noise(x, batch.normal("noise"), t).to(x.dtype)
        cond = self.dropped(batch)
        if self.past == "clean":
            past = self.with_residuals(networks, batch, x, x_t, t, cond) if self.residual_share else x
            prediction = predict_chunks(networks.student, networks.policy, batch, past, x_t, t, cond, self.form)
        else:
            prediction = networks.student(x_t, t, cond, Inputs(causal=chunks))
        schedule, space = networks.student.schedule, self.space or networks.student.prediction_type
        total = signals.denoising_loss(prediction, x, x_t, t, schedule, space)
        return Loss(total, {"loss": total.detach()})

    @torch.no_grad()
    def with_residuals(
        self, networks: Networks, batch: Batch, x: Tensor, x_t: Tensor, t: Tensor, cond: Conditioning
    ) -> Tensor:
        """x + residual_scale (x0_theta(x_t, t, x_<i) - x) in a share of the frames, and x in the others        (ours)

        x0_theta: what the student now predicts of each frame, at the level that is also trained."""
        guess = predict_chunks(networks.student, networks.policy, batch, x, x_t, t, cond, self.form)
        chosen = batch.uniform("residual", shape=(x.shape[1],)) < self.residual_share
        error = self.residual_scale * (guess - x)
        return (x + error * chosen.view(*chosen.shape, *(1,) * (x.dim() - 2))).to(x.dtype)

    def levels(self, batch: Batch, chunks: ChunkSchedule) -> Tensor:
        """[B, F]: a level for each chunk, the same for its frames."""
        num_frames = batch.latent_shape[0]
        return by_frame(self.time(batch.uniform("time", shape=(len(chunks.split(num_frames)),))), chunks, num_frames)

    def dropped(self, batch: Batch) -> Conditioning:
        """The conditioning, with `batch.uncond` in a share of the samples."""
        if not self.prompt_dropout:
            return batch.cond
        rows = batch.uniform("prompt_dropout") < self.prompt_dropout

        def chosen(key: str) -> Tensor:
            value = batch.cond[key]
            return torch.where(rows.view(-1, *(1,) * (value.dim() - 1)), batch.uncond[key], value)

        return Conditioning({key: chosen(key) for key in batch.cond})
