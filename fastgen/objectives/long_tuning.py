"""Streaming long tuning: Self Forcing on videos that are longer than the teacher's (LongLive, arXiv 2509.22622).

    paper              here                   what it is
    -                  state["past.latents"]  the frames of the running videos that the next update needs: those that
                                              the next chunk sees, and the last two, [N, F', ...]
    -                  state["frames"]        how many latent frames the running videos have; 0: they begin anew
    KV recache         rollout.recommitted    the context, computed again from these frames
    prompt switch      switch                 the running videos go on with another prompt

A teacher of F frames cannot judge a video of 4 F. So a video is kept running over the updates: each update makes the
next F - 1 frames, given what the student sees of those before them, and matches this part alone,

    y = [r(x_past), x_new],   r = `Backbone.restart`: the last picture before it, as a first latent frame

to the teacher with DMD2's loss. A picture is decoded from its latent frame and those before it, so that r sees the
last two, also where a narrow window shows the next chunk fewer. r(x_past) carries no gradient. After `longest` frames
the videos begin anew, and so they do after an update in which one of them is not finite. The student thus meets its
own errors after many chunks, at the cost of a short video an update.

Departures. What is kept over an update are clean latents, not keys and values: the context is computed again with the
present weights, so that it is never stale, and a state of a few frames is checkpointed instead of gigabytes. This is
also what LongLive does where a prompt switches, and here a switch needs nothing else. All inner updates of the fake
score see the same past, and the student's update moves the videos on, with the frames of its own rollout. LongLive
trains LoRA adapters in this stage; here that is a matter of the recipe.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.batch import Batch
from fastgen.networks import Networks
from fastgen.objectives.base import Loss, State, Turn
from fastgen.objectives.dmd2 import DMD2
from fastgen.objectives.replay import append, conditioned, conditioning, rows_of
from fastgen.recipe import Recipe
from fastgen.registry import MOST_STEPS
from fastgen.rollout import Rollout, RolloutPolicy, backward_simulation, draw_stops, recommitted
from fastgen.streaming.schedule import ChunkSchedule

PAST, NEXT = "past.", "next."  # rows of the state: of the running videos, and of what this update made of them
LATENTS = "latents"  # the name of their frames; the others are conditionings
PARTS = 10_000  # of the probability of a switch
LAST = 2  # latent frames that a picture is decoded from, at least; from one alone it is another picture


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class LongTuning(DMD2):
    examples = ({},)
    page = "docs/streaming.md"

    takes_inner = False  # it is for students that work in chunks
    name: Literal["long_tuning"] = "long_tuning"  # type: ignore[assignment]
    # latent frames after which the videos begin anew; 240 in LongLive's code, whose first stage has 21
    longest: int = Field(default=240, ge=2, le=MOST_STEPS)
    # the probability that the videos of an update go on with each other's prompts. LongLive switches once in a video
    switch: float = Field(default=0.0, ge=0, le=1)

    def check(self, policy: RolloutPolicy) -> None:
        super().check(policy)
        chunks = policy.chunks
        if chunks is None:
            raise ValueError("long_tuning is for students that work in chunks: give rollout.chunks, or use dmd2")
        if (chunks.first or chunks.frames) != 1:
            raise ValueError(
                "long_tuning judges later parts of a video with their first latent frame given, so that the first "
                f"chunk must be one frame: set rollout.chunks.first: 1 (it is {chunks.first or chunks.frames})"
            )
        if chunks.order != "chunk":
            raise ValueError(
                "long_tuning keeps clean frames between updates, and with rollout.chunks.order: "
                f"{chunks.order} later chunks see noisy ones: leave order out"
            )
        chunks.check_recache()
        if self.gan_weight or (self.embedding is not None and self.embedding.features == "teacher"):
            raise ValueError(
                "in long_tuning the videos go on with their own prompts, under which a network would see the real "
                "videos of other prompts: leave out gan_weight, and embedding with features: teacher"
            )

    def check_recipe(self, recipe: Recipe) -> None:
        super().check_recipe(recipe)
        try:
            sizes = recipe.backbone.unloaded()
        except ValueError:
            return  # a hub id of which nothing is known here; its first update refuses what does not fit
        self.check_length(sizes.build(torch.device("cpu"), torch.float32, 0).latent_shape[0])

    def check_length(self, frames: int) -> None:
        """Raises ValueError if a video of the teacher, of so many latent frames, is already as long as any video."""
        if frames >= self.longest:
            raise ValueError(
                f"objective.longest: {self.longest} latent frames are not more than the teacher's {frames}, so that "
                "no video would ever go on; raise it, or use dmd2"
            )

    def init_state(self) -> State:
        return {name: torch.zeros((), dtype=torch.int64) for name in ("frames", "next_frames", "switches")}

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        frames, grad = int(state["frames"]), turn.name == "student"
        self.check_length(batch.latent_shape[0])
        past, batch = past_of(batch, state)
        part = self.part(networks, batch, past, frames, grad)
        if not grad:
            return self.critic_loss(networks, batch, part)
        self.keep(networks.policy, batch, past, part, state)
        loss = self.matching_loss(networks, batch, part)
        return Loss(loss.total, loss.terms | {"frames": loss.total.new_tensor(float(frames))})

    def part(self, networks: Networks, batch: Batch, past: Tensor | None, frames: int, grad: bool) -> Rollout:
        """A video of the teacher's length: a new one, or what comes after the first `frames` frames, of which `past`
        are those that `needed` lists."""
        student, policy = networks.student, networks.policy
        stop = draw_stops(batch, policy.num_steps, shared=self.stops == "shared")
        if past is None:
            return backward_simulation(student, policy, batch, stop, grad)
        assert policy.chunks is not None and networks.restart is not None
        held, known = policy.chunks.held(frames), needed(policy.chunks, frames)
        left = lambda part: [past[:, [known.index(frame) for frame in part]]]  # noqa: E731
        noise = lambda part: batch.chunk(part).normal  # noqa: E731
        context = recommitted(student, policy, held, left, batch.cond, noise, frames)
        later = replace(batch, latent_shape=(batch.latent_shape[0] - 1, *batch.latent_shape[1:]))
        rollout = backward_simulation(student, policy, later, stop, grad, context=context)
        with torch.no_grad():
            first = networks.restart(past).to(rollout.x)
        return replace(rollout, x=torch.cat([first, rollout.x], dim=1))

    def keep(self, policy: RolloutPolicy, batch: Batch, past: Tensor | None, part: Rollout, state: State) -> None:
        """Adds the micro-batch's rows of what the next update goes on from."""
        assert policy.chunks is not None
        new = part.x.detach() if past is None else part.x.detach()[:, 1:]
        before = int(state["frames"])
        after = before + new.shape[1]
        known = [*needed(policy.chunks, before), *range(before, after)]
        latents = new if past is None else torch.cat([past, new], dim=1)
        rows = [known.index(frame) for frame in needed(policy.chunks, after)]
        append(state, NEXT, {LATENTS: latents[:, rows], **conditioning(batch)})
        state["next_frames"].fill_(after)
        state["switches"].fill_(batch.integer("switch", PARTS) < self.switch * PARTS)

    def finish(self, turn: Turn, networks: Networks, state: State) -> None:
        super().finish(turn, networks, state)
        if turn.name != "student":
            return
        rows, frames = rows_of(state, NEXT), int(state["next_frames"])
        for name in [name for name in state if name.startswith((PAST, NEXT))]:
            del state[name]
        goes_on = frames < self.longest and all(bool(value.isfinite().all()) for value in rows.values())
        state["frames"].fill_(frames if goes_on else 0)
        for name, value in rows.items() if goes_on else ():
            switched = bool(state["switches"]) and name != LATENTS
            state[PAST + name] = value.roll(1, 0) if switched else value


def past_of(batch: Batch, state: State) -> tuple[Tensor | None, Batch]:
    """The kept frames [B, F', ...] of this micro-batch's videos, and the batch with their conditionings; None and the
    batch itself if they begin anew."""
    rows = {name: value[batch.ids % len(value)] for name, value in rows_of(state, PAST).items()}
    return (rows[LATENTS], conditioned(batch, rows)) if rows else (None, batch)


def needed(chunks: ChunkSchedule, frames: int) -> list[int]:
    """The frames of a video of so many that its continuation needs: those that the next chunk sees, and the last."""
    seen = {frame for part in chunks.held(frames) for frame in part}
    return sorted(seen.union(range(max(0, frames - LAST), frames)))
