"""AnyFlow on video chunks: an any-step flow map of each chunk given the ones before it (arXiv 2605.13724; formulas
from its code, github.com/NVlabs/AnyFlow, whose causal model is called FAR).

    released code                     here               what it is
    u(x, t, r)                        u(x, t, s)         the student, told where its jump ends
    clean_hidden_states               batch.latents      real videos, whose frames a chunk sees as its past
    diffusion and consistency ratio   pairs              half of the samples have s = t, a quarter s = 0
    compute_central_difference        derivative         of u along (noise - x0, 1)

The law of a chunk given its past has a probability-flow ODE, and this ODE has a flow map. It is learned as that of a
whole sample is, with every chunk seeing real earlier frames (teacher forcing):
    x_t = (1 - t) x0 + t noise,   v = noise - x0
    s = t:   student <- |u(x_t, t, t) - v|^2
    s < t:   student <- |u(x_t, t, s) - sg[v - (t - s) Du]|^2,   Du = d_t u + grad u . v       (form: mean_flow)
The square of a jump is multiplied by sg(mean |r|^2 of the diagonal / (|r|^2 + floor))^power, so that jumps, whose
targets are the student's own, count as much as the diagonal and not more. With power: 0 they are not weighted. All
frames of a video share t and s. The other forms are those of flow_map.py, with the student's own diagonal as the
velocity: semigradient differentiates along s, and progressive needs no derivative.

With `on_policy`, each chunk is then also made by the jumps 1 -> t_k -> t_{k+1} -> 0, given the chunks that the student
made before it, and the whole video is matched to the bidirectional teacher. Gradient flows through the three jumps of
every chunk, and not from one chunk to another.

`teach: teacher` is refused: the velocity of a bidirectional teacher is that of a whole video, not of a chunk given its
past. On AR(1) videos the exact map of each chunk is known, and it satisfies every identity here.

Departures. The code weights levels by t sqrt(1 - t); here all have the same weight. Its mean over the diagonal is that
of all processes, and here that of the micro-batch. It fuses guidance into the map; here there is none in the map, and
`on_policy.guidance_scale` in the teacher. It also trains on long videos, whose oldest frames are compressed.
"""

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.batch import Batch
from fastgen.denoiser import Inputs
from fastgen.flow import flow_maps
from fastgen.flow.flow_maps import AverageVelocity, average_velocity
from fastgen.flow.tangents import Backend, tangent
from fastgen.flow.time_pairs import TimePairs
from fastgen.networks import Networks
from fastgen.objectives.causal import Form as Causal
from fastgen.objectives.causal import check_order, predict_chunks
from fastgen.objectives.flow_map import ANY_FLOW_TIME, FlowMap, OnPolicy, jumped
from fastgen.rollout import RolloutPolicy, commit
from fastgen.streaming.context import Context


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class AnyFlow(FlowMap):
    """causal: how the chunks of real videos are computed, see `objectives.causal`."""

    takes_chunks = True

    examples = ({}, {"on_policy": {}})
    page = "docs/streaming_methods.md"

    name: Literal["any_flow"] = "any_flow"  # type: ignore[assignment]
    form: Literal["mean_flow", "semigradient", "progressive"] = "mean_flow"  # type: ignore[assignment]
    teach: Literal["self"] = "self"  # type: ignore[assignment]
    source: Literal["data"] = "data"  # type: ignore[assignment]
    # shift 5; half of the samples on the diagonal, a quarter to 0: the released config
    pairs: TimePairs = TimePairs(time=ANY_FLOW_TIME, diagonal=0.5, to_zero=0.25)
    power: float = Field(default=1.0, ge=0, le=1)  # of a jump's weight, see above: the released code
    floor: float = Field(default=1e-5, gt=0)  # of |r|^2, here a sum over a sample, in the code a mean
    derivative: Backend = "difference"  # central differences of 5e-3: the released config
    causal: Causal = "packed"

    def check(self, policy: RolloutPolicy) -> None:
        super().check(policy)
        if policy.chunks is None:
            raise ValueError(
                "any_flow trains a student that works chunk by chunk: give rollout.chunks, or use flow_map"
            )
        check_order(policy)
        if policy.chunks.replay:
            raise ValueError(
                "rollout.chunks.replay repeats one step of each chunk, and on_policy has gradient in three: leave "
                "it out"
            )

    @property
    def unmasked(self) -> str | None:
        return "causal: chunks" if self.causal == "packed" else None

    def reduced(self, residual: Tensor, on_diagonal: Tensor) -> Tensor:
        square = residual.flatten(1).square().sum(1)
        known, on = square.detach(), on_diagonal.to(square)
        level = torch.where(on_diagonal.any(), (on * known).sum() / on.sum().clamp_min(1), known.mean())
        return (square * torch.where(on_diagonal, 1.0, (level / (known + self.floor)) ** self.power)).mean()

    def map_of(self, networks: Networks, batch: Batch, rows: Tensor) -> AverageVelocity:
        assert batch.latents is not None
        student, policy = networks.student, networks.policy
        flow_maps.require_flow(student)
        own = replace(batch, ids=batch.ids[rows], latents=batch.latents[rows], cond=batch.cond.select(rows))

        def u(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            assert own.latents is not None
            t, s = (level[:, None].expand(-1, x.shape[1]) for level in (t, s))
            past = own.latents.to(x.dtype)
            return predict_chunks(
                student, policy, own, past, x, t, own.cond, self.causal, s, predict="flow_prediction"
            )

        return u

    def jump_residual(
        self, networks: Networks, batch: Batch, rows: Tensor, u: AverageVelocity, x: Tensor, t: Tensor, s: Tensor
    ) -> Tensor:
        if self.form != "mean_flow":
            return super().jump_residual(networks, batch, rows, u, x, t, s)
        assert batch.latents is not None
        v = batch.normal("noise", rows=rows) - batch.latents[rows]
        differentiate = partial(tangent, backend=self.derivative)
        return u(x, t, s) - flow_maps.eulerian_target(u, x, t, s, v, differentiate=differentiate)

    def rollout(self, networks: Networks, batch: Batch, config: OnPolicy) -> Tensor:
        policy = networks.policy
        assert policy.chunks is not None
        stops, context, parts = self.stops(policy, batch, config), Context(policy.chunks), list[Tensor]()
        chunks = policy.chunks.split(batch.latent_shape[0])
        for frames in chunks:
            noise = batch.chunk(frames).normal
            u = average_velocity(networks.student, batch.cond, Inputs(context=context))
            parts.append(jumped(u, noise("initial"), stops))
            if frames != chunks[-1]:
                context = commit(networks.student, policy, [parts[-1].detach()], batch.cond, noise, context)
        return torch.cat(parts, dim=1)
