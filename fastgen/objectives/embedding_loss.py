"""Embedding Loss alone: the student's samples are matched to real data in features of untrained networks
(arXiv 2604.22379, without the objective it is added to there).

    paper      here              what it is
    G_theta    networks.student  few-step generator, initialised from the teacher
    L_EL       embedding         MMD^2 between samples and real data, see embedding.py

The algorithm, for every student update:
    x = rollout of the student to a random stop, with gradient through the last executed step, as in DMD2
    student <- weight * mean_j MMD^2(psi_j(x), psi_j(real data))
    the average of the student's weights is updated once.

There is no fake score, and the teacher is called only with `embedding.features: teacher`. With `stops: shared` the
samples of an update are those of one step, so that each step is matched to the data by itself.
"""

from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import nn

from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.networks import Networks
from fastgen.objectives.base import Loss, Objective, State, Turn
from fastgen.objectives.embedding import Embedding, check_batch, with_embedding
from fastgen.recipe import Recipe
from fastgen.rollout import RolloutPolicy, backward_simulation, draw_stops


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class EmbeddingLoss(Objective):
    takes_inputs = True
    takes_chunks = True

    page = "docs/dmd2_family.md"

    name: Literal["embedding_loss"] = "embedding_loss"
    embedding: Embedding = Embedding()
    stops: Literal["shared", "per_sample"] = "shared"  # shared: one stop index per update, each step by itself

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return ("student",)

    @property
    def takes_first_timesteps(self) -> bool:
        return True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"latents"})

    def check_recipe(self, recipe: Recipe) -> None:
        check_batch(self.embedding, recipe)

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        return self.embedding.networks_needed(backbone)

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        return (Turn("student", ("student",)),)

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        stop = draw_stops(batch, networks.policy.num_steps, shared=self.stops == "shared")
        rollout = backward_simulation(networks.student, networks.policy, batch, stop)
        return with_embedding(self.embedding, networks, batch, rollout.x, rollout.x.new_zeros(()), {})
