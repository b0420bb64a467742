"""What an objective is: its fields are its hyper-parameters, its methods the algorithm."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.denoiser import Denoiser
from fastgen.networks import Networks
from fastgen.recipe import Recipe
from fastgen.rollout import RolloutPolicy

State = dict[str, Tensor]

# One scale, or one per expert of the teacher, from high noise to low. The convention is diffusers': 1 is no guidance.
Guidance = Annotated[float, Field(ge=0)] | tuple[Annotated[float, Field(ge=0)], ...]


@dataclass(frozen=True)
class Turn:
    """One player's move: the roles it updates, how many inner updates it makes, and the roles that are re-initialised
    from the teacher, with fresh optimizers, before it begins.

    progress: (k, n), the learning rates are those of update k of a run of n; None: of this update of the whole run."""

    name: str
    roles: tuple[str, ...]
    updates: int = 1
    reset: tuple[str, ...] = ()
    progress: tuple[int, int] | None = None


@dataclass(frozen=True)
class Loss:
    """total: scalar to backpropagate. terms: what is logged, detached, as it is."""

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


class Objective:
    """A training method. Subclasses are frozen pydantic dataclasses: the recipe's `objective:` section is their
    fields.

    Holds no tensors. What it must remember between turns is its State, a flat dict of tensors which the loop
    checkpoints and hands to every turn; it must stay equal on all processes. The networks of `auxiliary` are
    checkpointed as well, trained or not."""

    name: str
    group_size: int = 1  # samples of one prompt, all in the same micro-batch; Batch.group tells them apart
    reward_use: Literal["none", "score", "gradient"] = "none"  # gradient: backpropagates through differentiable ones
    rewards_required: bool = False
    takes_inputs: bool = False  # whether it can train a student that is told more than its time (RolloutPolicy.inputs)

    @property
    def trained_roles(self) -> tuple[str, ...]:
        """Roles that need an optimizer; known before any weight loads, so that a recipe can be checked."""
        raise NotImplementedError

    @property
    def full_roles(self) -> tuple[str, ...]:
        """Trained roles that cannot be adapters: networks that are not copies of the teacher (discriminator heads), or
        whose weights are blended with another's or copied."""
        return ()

    @property
    def needs(self) -> frozenset[str]:
        """Fields of Batch that must be there: any of latents, pixels, pairs."""
        return frozenset()

    def check(self, policy: RolloutPolicy) -> None:
        """Raises ValueError if the objective cannot train a student that samples like this."""

    def check_recipe(self, recipe: Recipe) -> None:
        """Raises ValueError if other sections of the recipe do not fit; called when they have been checked, before any
        weight loads."""

    def make_student(self, backbone: Backbone, policy: RolloutPolicy) -> Denoiser:
        """The student, freshly made: where a run starts, and what its export is read into. It has the policy's further
        inputs, which change nothing yet."""
        student = backbone.load("student")
        if policy.inputs:
            student.add_inputs({}, backbone.time_dim, policy.inputs)
        return student

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        """The networks beside student and teacher, freshly made: {role: module}."""
        return {}

    def init_state(self) -> State:
        """What the objective remembers; {} for most."""
        return {}

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        """The moves of student update `step` (0-based), in order. Called exactly once for every update."""
        raise NotImplementedError

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss | Iterator[Loss]:
        """The loss of one micro-batch of a turn; or several, each backpropagated as it comes (terms of a name add)."""
        raise NotImplementedError

    def finish(self, turn: Turn, networks: Networks, state: State) -> None:
        """Called once after every optimizer step, however many micro-batches it had: where references, samplers and
        other averages move (in place), and where running statistics are folded."""


def feature_network(backbone: Backbone) -> dict[str, nn.Module]:
    """For `Objective.auxiliary`, where a discriminator reads a frozen network's features (`Networks.critic`): nothing
    if that is the teacher; the network fitted to it, in the role "features", if the teacher is a formula."""
    if backbone.teacher_is_base:
        return {}
    return {"features": backbone.load("features").requires_grad_(False).eval()}
