"""pi-Flow: a student that predicts a flow for each of its steps, and imitates the teacher along it (arXiv 2510.14974;
its code, Lakonik/piFlow).

    paper or code         here                 what it is
    G_phi                 networks.student     predicts the flow of a segment in one call, with Inputs.segment
    pi(x, t)              segment.velocity     its velocity at any state of the segment (modules/segment_flow.py)
    x_t_src, raw_t_src    x, segment.top       where a segment begins
    policy_detached       frozen               the flow without gradient, which leads to the states
    u                     velocity             the teacher's velocity, guided
    x_t_a, x_t_b          x at a, and at b     a state, and where the teacher's Euler step from it ends

For a segment of length L, with share = max(0, 1 - updates / teacher_updates) and l = L - window:
    student's gaps: the differences of `states` sorted uniform draws in [0, (1 - share) l]
    teacher's gaps: those of `states` - 1 draws in [0, share l], the last one up to its end
    for each state:
        a = last level - student's gap,   x <- the flow of `frozen` to a
        b = a - teacher's gap
        loss += 1/2 mean |u(x, a) - mean velocity of the segment's flow from (x, a) to b - window|^2 / states
        x <- x + (b - a) u(x, a)
    student <- sum over segments of L loss

At first the teacher makes all steps between the states, and at last the student, whose errors then do not add up. No
gradient goes through what leads to a state. Where the student's velocity is the teacher's at every state, its flow is
the teacher's ODE. Without data, all segments of a rollout from noise are trained in one update, one call each, and
each begins where the one before it ended. With data, the sample is noised to the top of one segment, drawn in
proportion to its length.

Departures. Levels are the network's; the code's are unshifted (they are warped by FLUX's shift afterwards). Flows are
integrated by midpoints instead of Euler steps. The code multiplies its loss by 30.
"""

from collections.abc import Iterator
from dataclasses import dataclass as plain
from typing import Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen import signals
from fastgen.batch import Batch
from fastgen.denoiser import Inputs
from fastgen.flow.flow_maps import SHORTEST
from fastgen.modules.segment_flow import Mixture, Segment, follow
from fastgen.networks import Networks
from fastgen.objectives.base import Guidance, Loss, Objective, State, Turn
from fastgen.registry import MOST_UPDATES
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import expand

WINDOW_SUBSTEPS = 4  # of the mean velocity over the window alone; ours


@plain(frozen=True)
class Gaps:
    """How far the student's flow leads to each state, and the teacher's step from it: [B, states] levels each.
    window: [B], over which the mean velocity is taken besides. substeps: of this mean; 0: it is over no time at all,
    so that it is the velocity itself."""

    student: Tensor
    teacher: Tensor
    window: Tensor
    substeps: int


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class PiFlow(Objective):
    trained_roles = ("student",)
    takes_segment = True

    page = "docs/flow_maps.md"

    name: Literal["pi_flow"] = "pi_flow"
    guidance_scale: Guidance = 1.0  # of the teacher (the released FLUX configs have none; their teacher is told 3.5)
    # the defaults are those of the released configs for FLUX, configs/piflux/gmflux_k8_piid_4step_32gpus.py
    states: int = Field(default=4, ge=1, le=100)  # of a segment
    # in levels, at most the segment's length; there 3 of 128 substeps of a unit of time before FLUX's shift
    window: float = Field(default=3 / 128, ge=0, lt=1)
    teacher_updates: int = Field(default=2000, ge=0, le=MOST_UPDATES)  # until the teacher makes no more steps
    dropout: float = Field(default=0.1, ge=0, lt=1)  # of a mixture's components, in the flow that leads to the states
    data: bool = False  # whether segments begin with noised data

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"latents"} if self.data else ())

    def check(self, policy: RolloutPolicy) -> None:
        if policy.segment is None:
            raise ValueError(
                "pi_flow trains a student that predicts whole segments: give rollout.segment, such as "
                "{kind: mixture, size: 8}"
            )

    def init_state(self) -> State:
        return {"updates": torch.zeros((), dtype=torch.int64)}

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        return (Turn("student", ("student",)),)

    def finish(self, turn: Turn, networks: Networks, state: State) -> None:
        state["updates"] += 1

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss | Iterator[Loss]:
        return self.of_data(networks, batch, state) if self.data else self.of_rollout(networks, batch, state)

    def of_data(self, networks: Networks, batch: Batch, state: State) -> Loss:
        """The loss of one segment, from data that are noised to its top. Its length is in how often it is drawn."""
        assert batch.latents is not None
        t = drawn_tops(batch, networks.policy)
        x = networks.teacher.schedule.add_noise(batch.latents, batch.normal("noise"), t)
        loss = self.segment_loss(networks, batch, state, "", x, t)[0].mean()
        return Loss(loss, {"loss": loss.detach()})

    def of_rollout(self, networks: Networks, batch: Batch, state: State) -> Iterator[Loss]:
        """The losses of the segments of a rollout from noise, one after the other, each times its length."""
        x = batch.normal("initial")
        for i, t in enumerate(networks.policy.timesteps):
            error, segment, x = self.segment_loss(networks, batch, state, str(i), x, x.new_full((len(x),), t))
            loss = (error * (segment.top - segment.bottom)).mean()
            yield Loss(loss, {"loss": loss.detach()})

    def segment_loss(
        self, networks: Networks, batch: Batch, state: State, name: str, x: Tensor, t: Tensor
    ) -> tuple[Tensor, Segment, Tensor]:
        """The loss [B] of the segment that begins at x [B, ...] and t [B], the segment, and the state at its end.
        name: of the segment, for its draws."""
        flow, handed = networks.policy.segment, list[Segment]()
        assert flow is not None
        networks.student(x, t, batch.cond, Inputs(segment=handed))
        segment, error = handed[0], torch.zeros_like(t)
        frozen = self.exploring(segment.detached(), batch, name)
        gaps = self.gaps(batch, state, name, segment, flow.substeps)
        for to_state, to_end in zip(gaps.student.unbind(1), gaps.teacher.unbind(1), strict=True):
            with torch.no_grad():
                a, b = t - to_state, t - to_state - to_end
                x = follow(frozen, x, t, a, flow.substeps).to(x.dtype)
                velocity = teacher_velocity(networks, batch, x, a, self.guidance_scale)
            predicted = mean_velocity(segment, x, a, b - gaps.window, gaps.substeps)
            error = error + 0.5 * signals.per_sample_mean((velocity - predicted).square()) / self.states
            x, t = x + expand(b - a, x) * velocity, b
        with torch.no_grad():
            return error, segment, follow(frozen, x, t, segment.bottom, flow.substeps).to(x.dtype)

    def exploring(self, segment: Segment, batch: Batch, name: str) -> Segment:
        """The segment without some of a mixture's components, drawn for each sample."""
        if not isinstance(segment, Mixture) or not self.dropout:
            return segment
        drawn = batch.uniform(f"components{name}", shape=(segment.means.shape[1],))
        return segment.without(drawn < self.dropout)

    def gaps(self, batch: Batch, state: State, name: str, segment: Segment, substeps: int) -> Gaps:
        """As the docstring of the module says. substeps: of a mean velocity over the teacher's steps."""
        length = segment.top - segment.bottom
        window = length.clamp(max=self.window)
        share = max(0.0, 1 - float(state["updates"]) / self.teacher_updates) if self.teacher_updates else 0.0
        left = (length - window)[:, None]
        mine = batch.uniform(f"student_states{name}", shape=(self.states,)).sort(1)[0] * (1 - share) * left
        theirs = batch.uniform(f"teacher_states{name}", shape=(self.states - 1,)).sort(1)[0] * share * left
        start = torch.zeros_like(left)
        student, teacher = mine.diff(dim=1, prepend=start), theirs.diff(dim=1, prepend=start, append=share * left)
        return Gaps(student, teacher, window, substeps if share else WINDOW_SUBSTEPS if self.window else 0)


def drawn_tops(batch: Batch, policy: RolloutPolicy) -> Tensor:
    """[B]: the tops of segments, drawn in proportion to their lengths: where a uniform level in [0, 1] lies."""
    tops = torch.tensor(policy.timesteps, device=batch.ids.device, dtype=batch.dtype)
    level = batch.uniform("segment") * tops[0]
    return tops[(level[:, None] <= tops).sum(1) - 1]


def teacher_velocity(networks: Networks, batch: Batch, x: Tensor, t: Tensor, scale: Guidance) -> Tensor:
    """The teacher's guided velocity at x [B, ...] and t [B]."""
    teacher = networks.teacher
    x0 = signals.guided(teacher, x, t, batch.cond, batch.uncond, teacher.per_expert(scale, t))
    return (x - x0) / expand(t, x)


def mean_velocity(segment: Segment, x: Tensor, t: Tensor, s: Tensor, substeps: int) -> Tensor:
    """The mean velocity of the segment's flow from x [B, ...] at t to s, [B] each; without substeps, and over less
    than SHORTEST, where the difference would be rounding, the velocity at t. Gradient flows to what predicted the
    segment."""
    velocity = segment.velocity(x, t)
    if not substeps:
        return velocity
    gap = expand(t - s, x)
    mean = (x - follow(segment, x, t, s, substeps)) / gap.clamp_min(SHORTEST)
    return torch.where(gap < SHORTEST, velocity, mean)
