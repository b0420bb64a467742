"""GDD: a diffusion model is one-step generator enough that a GAN alone distils it (arXiv 2405.20750).

    paper          here                    what it is
    G(80 z)        networks.student        one step from pure noise, initialised from the teacher
    F              pixel_features          frozen image networks (`pixel_network`), or the teacher's own features
    D              discriminator           heads at several depths of F
    gamma          r1_weight               R1 on real samples, every r1_every updates of D
    GDD-I          freeze                  parameters of the student that keep the teacher's values

The algorithm, for every student update:
    x = G(z), z pure noise
    student       <- sum over heads of mean softplus(-D(x))
    discriminator <- sum over heads of mean softplus(D(x)) + mean softplus(-D(real))
                     every r1_every updates: + r1_every gamma / 2 mean |grad D(real)|^2, with D summed over heads
    the average of the student's weights is updated once.

There is no distillation loss. The paper finds that a teacher and a one-step student have different minima, so that a
loss that ties them sample by sample is harmful. What the teacher gives is its weights, and most of them may stay
frozen. `freeze` lists parts of names of parameters: the paper's GDD-I freezes its convolutions (["conv", "proj"]),
which leaves the normalisations, the embeddings and the attention's qkv to learn.

With pixel_network, D sees decoded pictures and no prompts (the paper's has class labels). Without it, D sees samples
renoised to a random level (`time`) through the teacher's own features, with the prompt: this serves latents without a
decoder, and points (ours). The heads are token heads (ours); the paper has those of Projected GAN. A feature network
that FID is measured with, too, makes FID look better than the pictures are.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.denoiser import Denoiser
from fastgen.flow.tangents import math_attention
from fastgen.modules.expert_levels import draw_levels
from fastgen.modules.heads import PictureHeads, TokenHeads
from fastgen.networks import Networks, frozen
from fastgen.objectives.adp import PictureFeatures, check_pixel_network, make_pixel_network
from fastgen.objectives.base import Loss, Objective, State, Turn, feature_network
from fastgen.recipe import Recipe
from fastgen.registry import MOST_STEPS, MOST_UPDATES, MOST_WIDTH
from fastgen.rollout import RolloutPolicy, backward_simulation, draw_stops
from fastgen.schedule import TimeSampler


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class GDD(Objective):
    """pixel_network: `digits`, which is the shipped classifier, or a local folder with a vision model that
    transformers loads and its preprocessor_config.json; None: the teacher's features of renoised samples."""

    trained_roles = ("student", "discriminator")
    needs_whole_videos = "its discriminator compares whole samples, and its student makes them in one step from noise"

    page = "docs/dmd2_family.md"

    name: Literal["gdd"] = "gdd"
    pixel_network: str | None = None
    time: TimeSampler = TimeSampler(low=0.001, high=0.999)  # of renoised samples, without pixel_network; ours
    loss_type: Literal["softplus", "hinge"] = "softplus"  # "ns", the released scripts; hinge is its other choice
    r1_weight: float = Field(default=1e-4, ge=0)  # "r1-gamma=1e-4", the released scripts (in row gdd_ns: 1e-2)
    r1_every: int = Field(default=16, ge=1, le=MOST_UPDATES)  # "16", StyleGAN2's lazy regularisation
    discriminator_updates: int = Field(default=1, ge=1, le=MOST_STEPS)  # per student update; the paper alternates
    freeze: tuple[str, ...] = ()
    head_width: int = Field(default=64, ge=1, le=MOST_WIDTH)  # ours

    @model_validator(mode="after")
    def _network(self) -> "GDD":
        if self.pixel_network is not None:
            check_pixel_network(self.pixel_network)
        if any(not part for part in self.freeze):
            raise ValueError('freeze: "" is in every name, and nothing would learn; give parts of names')
        return self

    @property
    def full_roles(self) -> tuple[str, ...]:
        return ("discriminator", "student") if self.freeze else ("discriminator",)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"latents"})

    def check(self, policy: RolloutPolicy) -> None:
        if policy.num_steps > 1:
            raise ValueError(
                f"gdd trains one step from pure noise, and rollout.timesteps has {policy.num_steps}; give [1.0]"
            )

    def check_recipe(self, recipe: Recipe) -> None:
        if self.pixel_network is not None and recipe.backbone.output != "pixels":
            raise ValueError(
                f"pixel_network: backbone {recipe.backbone.name} gives {recipe.backbone.output}, not pixels; leave it "
                "out, and the discriminator reads the teacher's features"
            )

    def make_student(self, backbone: Backbone, policy: RolloutPolicy) -> Denoiser:
        """The student, with the parameters that `freeze` names as the teacher has them. Raises ValueError if a part
        is in no name, or if nothing is left to learn."""
        student = super().make_student(backbone, policy)
        parameters = dict(student.named_parameters())
        if unused := [part for part in self.freeze if not any(part in name for name in parameters)]:
            raise ValueError(
                f"objective.freeze: no parameter of the student has {', '.join(unused)} in its name; some are called "
                f"{', '.join(list(parameters)[:3])}"
            )
        for name, parameter in parameters.items():
            if any(part in name for part in self.freeze):
                parameter.requires_grad_(False)
        if self.freeze and not any(p.requires_grad for p in parameters.values()):
            raise ValueError("objective.freeze leaves no parameter of the student to learn; name fewer")
        return student

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        if self.pixel_network is None:
            sizes = backbone.make_empty()
            heads = TokenHeads(sizes.feature_dim, len(sizes.feature_modules), self.head_width)
            return {"discriminator": heads} | feature_network(backbone)
        network = make_pixel_network(self.pixel_network)
        return {
            "pixel_features": PictureFeatures(network, backbone.decode),
            "discriminator": PictureHeads(network.feature_dims, self.head_width),  # type: ignore[arg-type]
        }

    def init_state(self) -> State:
        """updates: of the discriminator, which says when R1 is due."""
        return {"updates": torch.zeros((), dtype=torch.int64)}

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        return (Turn("discriminator", ("discriminator",), self.discriminator_updates), Turn("student", ("student",)))

    def finish(self, turn: Turn, networks: Networks, state: State) -> None:
        if turn.name == "discriminator":
            state["updates"] += 1

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        if turn.name == "student":
            return self.student_loss(networks, batch)
        return self.discriminator_loss(networks, batch, self.is_due(state))

    def is_due(self, state: State) -> bool:
        """Whether R1 is due in this update of the discriminator."""
        return int(state["updates"]) % self.r1_every == 0

    def student_loss(self, networks: Networks, batch: Batch) -> Loss:
        return self.generator_loss(networks, batch, self.generated(networks, batch, grad=True))

    def generator_loss(self, networks: Networks, batch: Batch, x: Tensor) -> Loss:
        """The sum over heads of mean softplus(-D(x)), or of -mean D(x), with gradient through the frozen networks."""
        with frozen(*(module for role, module in networks.items() if role != "student")):
            logits = self.logits(networks, batch, x, "gan")
        total = per_head(F.softplus(-logits) if self.loss_type == "softplus" else -logits)
        return Loss(total, {"loss": total.detach()})

    def discriminator_loss(self, networks: Networks, batch: Batch, r1: bool) -> Loss:
        return self.critic_loss(networks, batch, self.generated(networks, batch, grad=False), r1)

    def critic_loss(self, networks: Networks, batch: Batch, x: Tensor, r1: bool) -> Loss:
        """The discriminator's loss of real samples and of generated ones, x. r1: whether this update has the penalty,
        which is r1_every times as large, so that its mean over updates does not depend on r1_every."""
        assert batch.latents is not None
        r1 = r1 and self.r1_weight > 0
        fake = self.logits(networks, batch, x, "gan_fake")
        real = self.logits(networks, batch, batch.latents, "gan_real")
        if self.loss_type == "softplus":
            total = per_head(F.softplus(fake) + F.softplus(-real))
        else:
            total = per_head(F.relu(1 + fake) + F.relu(1 - real))
        terms = {"loss": total.detach(), "logit_gap": (real - fake).mean().detach()}
        if r1:
            penalty = self.r1_penalty(networks, batch)
            total = total + self.r1_every * self.r1_weight / 2 * penalty
            terms["r1"] = penalty.detach()
        return Loss(total, terms)

    def r1_penalty(self, networks: Networks, batch: Batch) -> Tensor:
        """mean |grad D(real)|^2 over samples: D summed over heads, the square over the elements of what D sees, which
        are the pixels or the renoised sample. Attention uses the MATH backend, which can be differentiated twice.
        Where no gradient is recorded, as when `fastgen plan` counts calls, it is 0."""
        assert batch.latents is not None
        with math_attention():
            seen = self.seen(networks, batch, batch.latents, "gan_real").detach().requires_grad_()
            logits = self.logits_of(networks, batch, seen, "gan_real")
            if not torch.is_grad_enabled():
                return 0 * logits.sum()
            (grad,) = torch.autograd.grad(logits.sum(), seen, create_graph=True)
        return grad.flatten(1).square().sum(1).mean()

    def generated(self, networks: Networks, batch: Batch, grad: bool) -> Tensor:
        stop = draw_stops(batch, networks.policy.num_steps, shared=True)
        return backward_simulation(networks.student, networks.policy, batch, stop, grad).x

    def logits(self, networks: Networks, batch: Batch, x0: Tensor, name: str) -> Tensor:
        """D [B, depths] at samples x0."""
        return self.logits_of(networks, batch, self.seen(networks, batch, x0, name), name)

    def seen(self, networks: Networks, batch: Batch, x0: Tensor, name: str) -> Tensor:
        """What D sees of x0: pixels [B, 3, H, W], or x0 renoised with the draws of this name."""
        if self.pixel_network is not None:
            features: Any = networks["pixel_features"]
            return features.pixels(x0)
        t = self.level(networks, batch, name)
        return networks.teacher.schedule.add_noise(x0, batch.normal(f"{name}_noise"), t).to(x0.dtype)

    def logits_of(self, networks: Networks, batch: Batch, seen: Tensor, name: str) -> Tensor:
        """D [B, depths] at what `seen` returned for this name."""
        if self.pixel_network is not None:
            features: Any = networks["pixel_features"]
            return networks["discriminator"](features.of_pixels(seen))
        with networks.critic.capture() as captured:
            networks.critic(seen, self.level(networks, batch, name), batch.cond)
        return networks["discriminator"](captured)

    def level(self, networks: Networks, batch: Batch, name: str) -> Tensor:
        """t [B], to which the draws of this name renoise."""
        return draw_levels(batch, f"{name}_time", self.time, networks.critic)


def per_head(values: Tensor) -> Tensor:
    """The sum over heads of means over samples, of values [B, heads]."""
    return values.mean(0).sum()
