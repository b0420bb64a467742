"""ODE regression: knowledge distillation on the teacher's own ODE (arXiv 2101.02388), a warm-up for other methods.

    paper      here                what it is
    theta      networks.student    the student G, initialised from the teacher
    x_T, x_0   batch.pairs         a noise, and the sample to which the guided teacher's sampler takes it
    t          t                   one of the student's timesteps, drawn for each sample

The algorithm, for every student update:
    x_t = the state between the two ends of a pair, at level t
    student <- 1/2 mean |G(x_t, t) - x_0|^2     (FastGen's KD; CausVid and Self-Forcing have no half; DMD has LPIPS)
    the average of the student's weights is updated once.

`states` chooses the state of a pair at levels below t = 1:
    line    alpha x_0 + sigma x_T, on the line between the two ends. Sampling with `ode` passes through these states if
            the student's predictions are right.
    path    the state on the teacher's ODE from x_T, computed by Euler steps during the update. A flow map of the
            teacher's ODE passes through these states.
At t = 1, the only level of a one-step student, the two are the same.

In a video that is made chunk by chunk (`rollout.chunks`), every chunk draws a level of its own, and sees the frames
before it: those of x_0 with `past: clean`, as when it samples; with `past: noisy` those of x_t, at their own levels,
which is the ODE initialisation of CausVid (arXiv 2412.07772) and Self-Forcing. The pairs should be those of a causal
teacher.
Those of a bidirectional one are no function of what the student sees: x_0 depends on later noise, too (Causal Forcing,
arXiv 2602.02214). `backbones.ar1_formulas.ode_initialisation_loss` says how much is lost.

The teacher's ODE sends each noise to one sample. A student with enough capacity and enough pairs learns that map. With
too little capacity the squared error blurs, and with few pairs the student memorises them. Use a few thousand updates,
and then another objective with `init_from`.
"""

from typing import Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen import signals
from fastgen.batch import Batch, Conditioning
from fastgen.denoiser import Denoiser, Inputs
from fastgen.networks import Networks
from fastgen.objectives.base import Guidance, Loss, Objective, State, Turn
from fastgen.objectives.causal import Form, by_frame, check_order, predict_chunks
from fastgen.registry import MOST_STEPS
from fastgen.rollout import RolloutPolicy, draw_stops, predict_x0, transition


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ODERegression(Objective):
    """guidance_scale: the teacher's guidance with states: path. Use the same scale for the pairs.
    past, form: with rollout.chunks, what a chunk sees; see `objectives.causal` for form."""

    page = "docs/flow_maps.md"
    trained_roles = ("student",)
    takes_chunks = True

    name: Literal["ode_regression"] = "ode_regression"
    states: Literal["line", "path"] = "line"  # ours; FastGen stores four states of the path
    path_steps: int = Field(default=16, ge=1, le=MOST_STEPS)  # ours
    guidance_scale: Guidance = 1.0
    # c, ours, in the unit of a root mean square: sqrt(mean e^2 + c^2) - c per sample; None: the square
    huber: float | None = Field(default=None, gt=0)
    past: Literal["clean", "noisy"] = "clean"  # ours; noisy in CausVid and Self-Forcing (ode_regression_self_forcing)
    form: Form = "packed"

    @property
    def unmasked(self) -> str | None:
        return "form: chunks" if self.form == "packed" else None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"pairs"})

    @property
    def takes_first_timesteps(self) -> bool:
        return True

    def check(self, policy: RolloutPolicy) -> None:
        if self.past == "clean":
            check_order(policy)
        if policy.chunks is not None and self.states == "path":
            raise ValueError(
                "the states on the path are those of the teacher's ODE over whole videos; with rollout.chunks use "
                "states: line"
            )
        if policy.chunks is None and (self.form, self.past) != ("packed", "clean"):
            raise ValueError("form and past are for the chunks of a video, and there are none: leave them out")
        if self.past == "noisy" and self.form == "chunks":
            raise ValueError("past: noisy predicts all chunks in one call, which is form: packed; leave form out")
        if self.past == "noisy" and policy.chunks is not None and policy.chunks.context_noise:
            raise ValueError("with past: noisy the past has levels of its own: leave out rollout.chunks.context_noise")

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        return (Turn("student", ("student",)),)

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        assert batch.pairs is not None
        policy = networks.policy
        noise, x0 = batch.pairs
        t = student_levels(policy, batch, noise)
        if self.states == "path":
            x_t = self.path(networks, batch, noise, t)
        else:
            x_t = networks.student.schedule.add_noise(x0, noise, t).to(noise.dtype)
        if policy.chunks is None:
            prediction = predict_x0(networks.student, x_t, t, batch.cond, policy)
        elif self.past == "noisy":
            prediction = networks.student(x_t, t, batch.cond, Inputs(causal=policy.chunks))
        else:
            prediction = predict_chunks(networks.student, policy, batch, x0, x_t, t, batch.cond, self.form)
        square = signals.per_sample_mean((prediction - x0).square())
        total = 0.5 * square.mean()
        if self.huber is not None:
            total = ((square + self.huber**2).sqrt() - self.huber).mean()
        return Loss(total, {"loss": total.detach(), "error": square.mean().sqrt().detach()})

    def path(self, networks: Networks, batch: Batch, x: Tensor, t: Tensor) -> Tensor:
        """`ode_state` of this batch."""
        return ode_state(networks.teacher, x, t, batch.cond, batch.uncond, self.guidance_scale, self.path_steps)


@torch.no_grad()
def ode_state(
    teacher: Denoiser,
    x: Tensor,
    t: Tensor,
    cond: Conditioning,
    uncond: Conditioning,
    guidance_scale: Guidance,
    steps: int,
) -> Tensor:
    """The state at level t [B] on the guided teacher's ODE from noise x [B, ...], by equal Euler steps."""
    for i in range(steps):
        start = 1 - (1 - t) * i / steps
        end = 1 - (1 - t) * (i + 1) / steps
        scale = teacher.per_expert(guidance_scale, start)
        x0 = signals.guided(teacher, x, start, cond, uncond, scale)
        x = transition(teacher.schedule, x0, x, start, end, None).to(x.dtype)
    return x


def student_levels(policy: RolloutPolicy, batch: Batch, like: Tensor) -> Tensor:
    """One of the student's timesteps for each sample, [B], or for each chunk of a video, [B, F]."""
    if policy.chunks is None:
        return like.new_tensor(policy.timesteps)[draw_stops(batch, policy.num_steps, shared=False)]
    split = policy.chunks.split(batch.latent_shape[0])
    drawn = list[Tensor]()
    for frames, u in zip(split, batch.uniform("stop", shape=(len(split),)).unbind(1), strict=True):
        levels = like.new_tensor(policy.of_chunk(frames).timesteps)
        drawn.append(levels[(u * len(levels)).long().clamp(max=len(levels) - 1)])
    return by_frame(torch.stack(drawn, dim=1), policy.chunks, batch.latent_shape[0])
