"""What an objective is: its fields are the hyper-parameters, its methods are the algorithm."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.denoiser import Denoiser
from fastgen.networks import Networks
from fastgen.recipe import Recipe
from fastgen.rollout import RolloutPolicy

State = dict[str, Tensor]

# One scale, or one scale per expert of the teacher, from high noise to low. As in diffusers, 1 means no guidance.
Guidance = Annotated[float, Field(ge=0)] | tuple[Annotated[float, Field(ge=0)], ...]


@dataclass(frozen=True)
class Turn:
    """One part of an update: the roles it trains, and how many inner updates it makes.

    reset: roles that are re-initialised from the teacher, with fresh optimizers, before the turn begins.
    progress: (k, n) uses the learning rates of update k of an n-update run. None uses the learning rates of the
    current update of the whole run.
    one_rollout: all inner updates see the same samples and the rollout that the first of them made; other draws are
    their own.
    collects: before the first loss of an update, `Objective.collect` sees all its micro-batches."""

    name: str
    roles: tuple[str, ...]
    updates: int = 1
    reset: tuple[str, ...] = ()
    progress: tuple[int, int] | None = None
    one_rollout: bool = False
    collects: bool = False


@dataclass(frozen=True)
class Loss:
    """total: the scalar to backpropagate. terms: the detached values to log, by name. Raises ValueError for a term
    that carries gradient: it would keep the graph of the update in memory until it is logged."""

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if attached := [name for name, value in self.terms.items() if value.requires_grad]:
            raise ValueError(f"logged terms must be detached; {', '.join(attached)} carries gradient")


class Objective:
    """A training method. Subclasses are frozen pydantic dataclasses whose fields are the keys of the recipe's
    `objective:` section.

    An objective holds no tensors. What it must remember between turns is its State, a flat dict of tensors. The loop
    checkpoints the State and passes it to every turn; it must stay equal on all processes. The networks of `auxiliary`
    are checkpointed too, whether they are trained or not."""

    name: str
    # Sets of keys with which it can be made, the usual one first, then one for each option that needs or trains
    # something else. What `fastgen objectives` says of an objective is what these instances do.
    examples: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    page: ClassVar[str] = ""  # the document that says more than the docstring, if there is one
    group_size: int = 1  # samples per prompt, all in one micro-batch; Batch.group holds the prompt group of each
    # score: uses the rewards' values; gradient: backpropagates through the differentiable rewards
    reward_use: Literal["none", "score", "gradient"] = "none"
    rewards_required: bool = False
    takes_chunks: bool = False  # whether it can train a student that works chunk by chunk (RolloutPolicy.chunks)
    takes_taught: bool = False  # whether all its networks can learn actions and sound, which a pipeline's own lacks
    # why it cannot, for the refusal
    needs_whole_videos: str = "it calls the student on whole videos, in which frames would see those after them"
    takes_derivatives: bool = False  # whether it differentiates networks along directions, which needs float32
    takes_inputs: bool = False  # whether it can train a student that has the added inputs of RolloutPolicy.inputs
    takes_inner: bool = False  # whether it can train a student with an inner flow (RolloutPolicy.inner)
    needs_inner: bool = False  # whether it trains no other students than these
    takes_segment: bool = False  # whether it trains students that predict whole segments, and no other ones
    takes_step_counts: bool = False  # whether it trains a student for all numbers of RolloutPolicy.step_counts

    @property
    def teacher_guidance(self) -> Guidance:
        """The guidance scale of the teacher that is distilled: the field `guidance_scale`, if the objective has it."""
        return vars(self).get("guidance_scale", 1.0)

    @property
    def learned_levels(self) -> tuple[float, ...] | None:
        """The levels from which the student learns to predict clean data besides those of its policy; None for all.
        With transition: renoise it can be sampled at these, too."""
        return ()

    @property
    def takes_first_timesteps(self) -> bool:
        """Whether the first chunk of a video may have a list of levels of its own."""
        return False

    @property
    def takes_rolling(self) -> bool:
        """Whether the chunks of a video may be in the making together (`ChunkSchedule.order: rolling`)."""
        return self.takes_first_timesteps and vars(self).get("stops", "shared") == "shared"

    @property
    def trained_roles(self) -> tuple[str, ...]:
        """Roles that need an optimizer. They are known before any weight loads, so that a recipe can be checked."""
        raise NotImplementedError

    @property
    def full_roles(self) -> tuple[str, ...]:
        """Trained roles that cannot be adapters: networks that are not copies of the teacher (discriminator heads),
        and networks whose weights are copied, or blended with those of another network."""
        return ()

    @property
    def needs(self) -> frozenset[str]:
        """Fields of Batch that must not be None: any of latents, pixels, pairs."""
        return frozenset()

    def check(self, policy: RolloutPolicy) -> None:
        """Raises ValueError if the objective cannot train a student that samples with this policy."""

    @property
    def unmasked(self) -> str | None:
        """If it shows all chunks of a video what they see in one call, with a mask: the option that does without, such
        as "form: chunks"; else None."""
        return None

    def check_recipe(self, recipe: Recipe) -> None:
        """Raises ValueError if other sections of the recipe do not fit the objective. It is called after those
        sections have been checked, and before any weight loads."""

    def make_student(self, backbone: Backbone, policy: RolloutPolicy) -> Denoiser:
        """A freshly made student: a run starts from it, and its export is read into it. The inputs that the policy
        adds are present, but do not change what the network computes yet."""
        return extended(backbone.load("student"), backbone, policy)

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        """The networks besides student and teacher, freshly made: {role: module}."""
        return {}

    def init_state(self) -> State:
        """What the objective remembers between turns; {} for most."""
        return {}

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        """The turns of student update `step` (0-based), in order. It is called exactly once per update."""
        raise NotImplementedError

    def collect(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> None:
        """Called for every micro-batch before the first `loss` of an update, in turns that say so (`Turn.collects`).
        Makes what the samples of the whole update are compared by (collected.py). What it puts into `batch.shared` is
        there again when `loss` gets the same micro-batch; all micro-batches' entries are kept until then."""

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss | Iterator[Loss]:
        """The loss of one micro-batch of a turn. An iterator gives several losses: each is backpropagated as it comes,
        and terms of the same name are added."""
        raise NotImplementedError

    def finish(self, turn: Turn, networks: Networks, state: State) -> None:
        """Called once after every optimizer step, however many micro-batches it had. References, samplers and other
        moving averages are updated here, in place, and sums collected over micro-batches are added to the running
        statistics."""


def extended(student: Denoiser, backbone: Backbone, policy: RolloutPolicy) -> Denoiser:
    """The student with what the policy adds to its network, which does not change what it computes yet."""
    if policy.inputs:
        student.add_inputs({}, backbone.time_dim_of(student), policy.inputs)
    if policy.chunks is not None and policy.chunks.linear:
        student.add_linear_memory()
    if policy.inner is not None:
        student.add_inner_flow(policy.inner)
    if policy.segment is not None:
        student.add_segment_flow(policy.segment, policy.timesteps)
    return student


def feature_network(backbone: Backbone) -> dict[str, nn.Module]:
    """For `Objective.auxiliary`, where a discriminator reads the features of a frozen network (`Networks.critic`).

    If that network is the teacher, nothing is added. If the teacher is a formula, which has no features, the result
    holds a network fitted to the teacher, in the role "features"."""
    if backbone.teacher_is_base:
        return {}
    return {"features": backbone.load("features").requires_grad_(False).eval()}
