"""The student's sampler as data: its noise levels, its transition, its inputs, and its chunks if it streams."""

import itertools
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from fastgen.streaming.schedule import ChunkSchedule

# input of the network (`RolloutPolicy.inputs`) -> the key that adds it
INPUT_KEYS = {"s": "two_time", "guidance": "embedded_guidance", "num_steps": "embedded_steps"}


def check_decreasing(levels: tuple[float, ...], name: str) -> None:
    """Raises ValueError unless these noise levels lie in (0, 1] and decrease."""
    if any(not 0 < t <= 1 for t in levels):
        raise ValueError(f"every {name} must lie in (0, 1], got {list(levels)}")
    if any(a <= b for a, b in itertools.pairwise(levels)):
        raise ValueError(f"{name}s must be strictly decreasing, got {list(levels)}")


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class InnerFlow:
    """How the last blocks of the student's network make several steps in each step of the sampler
    (TMD, arXiv 2601.09881; `modules.inner_flow`).

    blocks: how many of its last blocks form the head; 5 of the 30 of Wan 2.1 1.3B in the paper.
    levels: of the head's calls, strictly decreasing from 1; the end point 0 is implied. There are two of them there,
    and four for 14B."""

    blocks: int = Field(default=5, ge=1, le=1000)
    levels: Annotated[tuple[float, ...], Field(min_length=1, max_length=100)] = (1.0, 0.5)

    @field_validator("levels")
    @classmethod
    def _from_noise(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        check_decreasing(value, "level")
        if value[0] != 1:
            raise ValueError(f"an inner flow begins with noise, at level 1, got {list(value)}")
        return value


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class SegmentFlow:
    """What the student predicts in one call: a flow for every level down to the next call's
    (pi-Flow, arXiv 2510.14974; `modules.segment_flow`).

    kind: mixture = a Gaussian mixture of `size` components at every place of the latent, from which a velocity follows
          at every later state (GMFlow); line = clean predictions at `size` levels of the segment, with lines between
          them (DX).
    size: 8 components, or 10 levels, in the paper.
    substeps: into which a sampler divides that flow, by the midpoint rule (the paper: 128 Euler steps). They call no
          network."""

    kind: Literal["mixture", "line"] = "mixture"
    size: int = Field(default=8, ge=2, le=1000)
    substeps: int = Field(default=32, ge=1, le=1000)


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class RolloutPolicy:
    """The student's sampler. It is stored with the weights, so that a student is sampled as it was trained.

    timesteps: noise levels at which the network is called, strictly decreasing in (0, 1]; the end point 0 is implied.
    transition: renoise = x0 plus fresh noise at the next level (DMD2, consistency models);
                ode = x0 plus the network's own noise prediction (DDIM, which for flow matching is Euler);
                cps = x0 plus a mixture of both noises with the same total, see `transition_law` (RTDMD, Flow-CPS);
                tcd = an ode step to below the next level, then fresh noise up to it, see `jump_law` (TCD, CTM).
    eta: for cps and tcd only, strictly between 0 (the same as ode) and 1 (the same as renoise).
    conditioning_time: for one-step students only, the level that the network is conditioned on while its input is pure
               noise (for DMD2's one-step SDXL student, step 399 of 1000).
    two_time: the network is also conditioned on the level s where its step ends (a flow map). This is the level of the
               next call for ode, the one below it that tcd jumps to, and 0 for renoise. As x0 = x_t - t u, the ode
               step is then the jump x_t - (t - s) u.
    embedded_guidance: the guidance scale given to a network that has it as an input, when it samples.
    step_counts: the numbers of steps that an ode student can be sampled with, on the grid of `with_steps`, for
               objectives that train one model for several; () for that of timesteps alone.
    embedded_steps: the network is also conditioned on the number of steps that it samples with (TDM-unify).
    chunks: for a causal video student, how it makes a video chunk by chunk (`streaming.schedule.ChunkSchedule`).
    inner: how the last blocks of the network make several steps in each step; None: they are called once.
    segment: what the network predicts of the levels down to the next one; None: one clean prediction."""

    timesteps: Annotated[tuple[float, ...], Field(min_length=1)]
    transition: Literal["renoise", "ode", "cps", "tcd"] = "renoise"
    eta: float | None = Field(default=None, gt=0, lt=1)
    conditioning_time: float | None = Field(default=None, gt=0, le=1)
    two_time: bool = False
    embedded_guidance: float | None = Field(default=None, ge=0)
    chunks: ChunkSchedule | None = None
    step_counts: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = ()
    embedded_steps: bool = False
    inner: InnerFlow | None = None
    segment: SegmentFlow | None = None

    @field_validator("timesteps")
    @classmethod
    def _decreasing(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        check_decreasing(value, "timestep")
        return value

    @model_validator(mode="after")
    def _chunks(self) -> "RolloutPolicy":
        if self.chunks is None:
            return self
        if self.conditioning_time is not None:
            raise ValueError(
                "conditioning_time is for images made in one step; leave it out, or leave out rollout.chunks"
            )
        if self.chunks.first_timesteps is not None:
            try:
                self._decreasing(self.chunks.first_timesteps)
            except ValueError as error:
                raise ValueError(f"chunks.first_timesteps: {error}") from None
        return self

    @model_validator(mode="after")
    def _one_step(self) -> "RolloutPolicy":
        if self.conditioning_time is not None and len(self.timesteps) != 1:
            raise ValueError(
                f"conditioning_time is for one-step students, and there are {len(self.timesteps)} timesteps; give one "
                "timestep or remove conditioning_time"
            )
        if (self.eta is not None) != (self.transition in ("cps", "tcd")):
            raise ValueError(
                "transition: cps or tcd needs an eta (0.9 in RTDMD, 0.3 in TCD), and the others take none; got "
                f"transition: {self.transition} and eta: {self.eta}"
            )
        if self.two_time and (self.transition == "cps" or self.conditioning_time is not None):
            raise ValueError(
                "two_time needs transition: ode or tcd (or renoise, whose steps all end at 0) and no "
                f"conditioning_time; got transition: {self.transition} and conditioning_time: {self.conditioning_time}"
            )
        return self

    @model_validator(mode="after")
    def _counts(self) -> "RolloutPolicy":
        if not self.step_counts:
            if self.embedded_steps:
                raise ValueError("embedded_steps tells the student one of step_counts: give step_counts too")
            return self
        if len(set(self.step_counts)) != len(self.step_counts) or self.num_steps not in self.step_counts:
            raise ValueError(
                f"step_counts must be different numbers of steps, among them the {self.num_steps} of timesteps, got "
                f"{list(self.step_counts)}"
            )
        if self.transition != "ode" or self.timesteps[0] != 1 or self.conditioning_time is not None or self.chunks:
            raise ValueError(
                "step_counts needs transition: ode, timesteps that begin at 1, no conditioning_time and no chunks"
            )
        return self

    @model_validator(mode="after")
    def _inner(self) -> "RolloutPolicy":
        others = {"chunks": self.chunks, "conditioning_time": self.conditioning_time} | dict.fromkeys(self.inputs, 1)
        if self.inner is not None and (found := [INPUT_KEYS.get(k, k) for k, value in others.items() if value]):
            raise ValueError(
                f"inner is for a student of whole samples that is told its level alone: leave out {', '.join(found)}"
            )
        return self

    @model_validator(mode="after")
    def _segment(self) -> "RolloutPolicy":
        if self.segment is None:
            return self
        if self.transition != "ode":
            raise ValueError(f"segment predicts a deterministic flow: set transition: ode, got {self.transition}")
        names = ("chunks", "conditioning_time", "inner", "step_counts")
        others = {name: getattr(self, name) for name in names} | dict.fromkeys(self.inputs, 1)
        if found := [INPUT_KEYS.get(k, k) for k, value in others.items() if value]:
            raise ValueError(
                "segment is for a student of whole samples with one list of timesteps, which is told its level alone: "
                f"leave out {', '.join(found)}"
            )
        return self

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def of_chunk(self, frames: range) -> "RolloutPolicy":
        """The sampler of one chunk: that of the first chunk has its own levels if `chunks.first_timesteps` says so."""
        first = self.chunks.first_timesteps if self.chunks is not None and frames.start == 0 else None
        return self if first is None else replace(self, timesteps=first)

    @property
    def context_levels(self) -> tuple[float, ...]:
        """The levels at which a chunk is committed, once for every pass over the video; () without chunks."""
        if self.chunks is None:
            return ()
        passes = self.timesteps[1:] if self.chunks.order == "step" else ()
        return (*passes, self.chunks.context_noise)

    @property
    def transition_eta(self) -> float:
        """The eta of `transition_law`: 0 for ode, 1 for renoise. Raises ValueError for tcd, which has another law."""
        if self.transition == "tcd":
            raise ValueError(
                "this objective needs every step to have the same share of fresh noise, and with transition: tcd the "
                "share differs from step to step; use cps, renoise or ode"
            )
        return {"ode": 0.0, "renoise": 1.0}.get(self.transition, self.eta or 0.0)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The continuous inputs that the student has besides its time, any of `modules.inputs.LEVELS`."""
        guidance = ("guidance",) * (self.embedded_guidance is not None)
        return ("s",) * self.two_time + guidance + ("num_steps",) * self.embedded_steps

    @property
    def any_step(self) -> bool:
        """Whether the student can sample with any number of steps, by the jumps of a flow map."""
        return self.two_time and self.transition in ("ode", "tcd")

    def can_make(self, num_steps: int) -> bool:
        """Whether the student can be sampled with this number of steps (`with_steps`)."""
        any_number = self.any_step and self.timesteps[0] == 1 and num_steps >= 1
        return any_number or num_steps in (self.num_steps, *self.step_counts)

    def with_steps(self, num_steps: int) -> "RolloutPolicy":
        """The same sampler with another number of steps n, on the grid k u / (1 + (k - 1) u), u = 1, ..., 1 / n. Its
        shift k is the one that the first two of this policy's timesteps have, or 1 (a uniform grid) if there is only
        one. With its own number of steps, this returns the policy itself. Raises ValueError if the student cannot make
        that number of steps."""
        if num_steps == self.num_steps:
            return self
        if not self.can_make(num_steps):
            own = " or ".join(str(n) for n in self.step_counts or (self.num_steps,))
            raise ValueError(
                f"this student was distilled to {own} steps, and {num_steps} are asked for; leave out the number of "
                "steps"
            )
        shift = 1.0
        if self.num_steps > 1:
            u, t = 1 - 1 / self.num_steps, self.timesteps[1]
            shift = t * (1 - u) / (u * (1 - t))
        grid = (1 - i / num_steps for i in range(num_steps))
        return replace(self, timesteps=tuple(shift * u / (1 + (shift - 1) * u) for u in grid))

    def with_counts(self, num_steps: int | None, first_steps: int | None) -> "RolloutPolicy":
        """The same sampler with these numbers of steps of a sample, or of a chunk, and of the first chunk; None leaves
        them. Raises ValueError as `with_steps` and `with_first_steps` do."""
        policy = self if first_steps is None else self.with_first_steps(first_steps)
        return policy if num_steps is None else policy.with_steps(num_steps)

    def with_first_steps(self, num_steps: int) -> "RolloutPolicy":
        """The same sampler of chunks, with another number of steps for the first chunk, on this policy's grid
        (`with_steps`). Raises ValueError for a policy without chunks, and for a student with steps of its own."""
        if self.chunks is None:
            raise ValueError("this student makes its samples whole: there is no first chunk with steps of its own")
        if not self.any_step:
            raise ValueError(
                "this student was distilled to its own steps, also of the first chunk; only a flow map takes others"
            )
        return replace(self, chunks=replace(self.chunks, first_timesteps=self.with_steps(num_steps).timesteps))


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class TeacherPolicy(RolloutPolicy):
    """The deterministic sampling of a stock scheduler, which need not start from the law of x_t or end at clean data.

    initial_scale: factor on the initial noise. It is sigma(timesteps[0]) where EulerDiscreteScheduler starts from
        sigma_max.
    final_level: the level that the last step goes to. It is that of step 0 where DDIMScheduler has
        set_alpha_to_one: false."""

    initial_scale: float = Field(default=1.0, gt=0)
    final_level: float = Field(default=0.0, ge=0, le=1)
