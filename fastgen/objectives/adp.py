"""ADP: Adversarial Distillation Pre-training, the first stage of DMDX (arXiv 2507.18569). By `init_from`, ADM follows.

    paper            here                  what it is
    G_theta          networks.student      told its true level, so that any sampler may follow
    (x_T, x_0)       batch.pairs           a noise, and where the guided teacher's ODE takes it
    D_tau1           latent_discriminator  heads at several depths of the frozen teacher, on x renoised to t'
    D_tau2           pixel_discriminator   heads at several depths of a frozen image network (SAM), on decoded pictures
    lambda_1, _2     latent_weight, pixel_weight

The algorithm, for every student update:
    x_t = alpha(t) x_0 + sigma(t) x_T, between the two ends of a pair, at t = 1 - u^3, u uniform: mostly noise
    x   = the student's clean prediction at x_t
    discriminator_updates times: both discriminators <- hinge of the pair's x_0 against x, no gradient to the student
    once:                        student             <- -(lambda_1 mean D_tau1(x) + lambda_2 mean D_tau2(x))
    the average of the student's weights moves, once.

The paper trains on no squared error, which blurs: the student may answer with any sample the discriminators take for
the teacher's. Both see x_0 and x of one pair at the same t' and with the same fresh noise (ours).

The mixture teacher is a formula without features, as in adm.py; its points are no pictures: pixel_weight 0.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.data.digits import IMAGE_SIZE, load_classifier
from fastgen.modules.heads import PictureHeads, TokenHeads
from fastgen.networks import Networks, frozen
from fastgen.objectives.base import Loss, Objective, State, Turn, feature_network
from fastgen.recipe import Recipe
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import TimeSampler


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ADP(Objective):
    """pixel_network: `digits`, the shipped classifier; or a local folder of a vision model that transformers loads
    (SAM, DINOv2, CLIP, ViT, ...), with its preprocessor_config.json."""

    name: Literal["adp"] = "adp"
    latent_weight: float = Field(default=0.85, gt=0)  # lambda_1, "0.85"
    pixel_weight: float = Field(default=0.15, ge=0)  # lambda_2, "0.15"
    pixel_network: str | None = None  # SAM's image encoder in the paper
    time_power: float = Field(default=3.0, gt=0)  # "t <- (1 - (t / T)^3) T"
    latent_time: TimeSampler = TimeSampler(low=0.001, high=0.999)  # t'; ours
    discriminator_updates: int = Field(default=1, ge=1)  # ours
    head_width: int = Field(default=64, ge=1)  # ours
    r1_weight: float = Field(default=0.0, ge=0)  # ours, on D_tau1, as in adm.py; 0: the paper's loss
    r1_noise: float = Field(default=0.1, gt=0)  # FastGen's

    @model_validator(mode="after")
    def _pixels(self) -> "ADP":
        if (self.pixel_weight > 0) != (self.pixel_network is not None):
            raise ValueError(
                f"pixel_weight {self.pixel_weight:g} and pixel_network {self.pixel_network} do not go together: name "
                "a network (digits, or the folder of a vision model), or set pixel_weight: 0 and leave it out"
            )
        folder = Path(self.pixel_network or "digits")
        files = ("config.json", "preprocessor_config.json")
        if folder != Path("digits") and (missing := [n for n in files if not (folder / n).is_file()]):
            raise ValueError(f"pixel_network: {folder} has no {missing[0]}; give digits, or a local vision model")
        return self

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return ("student", *self.full_roles)

    @property
    def full_roles(self) -> tuple[str, ...]:
        return ("latent_discriminator", "pixel_discriminator") if self.pixel_weight else ("latent_discriminator",)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"pairs"})

    def check(self, policy: RolloutPolicy) -> None:
        if policy.conditioning_time is not None:
            raise ValueError("adp tells the student its true level; remove rollout.conditioning_time")

    def check_recipe(self, recipe: Recipe) -> None:
        if self.pixel_weight and recipe.backbone.output != "pixels":
            raise ValueError(
                f"pixel_weight: backbone {recipe.backbone.name} gives {recipe.backbone.output}, not "
                "pixels; set it to 0"
            )

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        sizes = backbone.make_empty()
        heads = TokenHeads(sizes.feature_dim, len(sizes.feature_modules), self.head_width)
        modules: dict[str, nn.Module] = {"latent_discriminator": heads}
        modules |= feature_network(backbone)
        if self.pixel_network is not None:
            network = DigitsNetwork() if self.pixel_network == "digits" else VisionNetwork(Path(self.pixel_network))
            modules["pixel_features"] = PictureFeatures(network.requires_grad_(False).eval(), backbone.decode)
            modules["pixel_discriminator"] = PictureHeads(network.feature_dims, self.head_width)
        return modules

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        return (Turn("discriminator", self.full_roles, self.discriminator_updates), Turn("student", ("student",)))

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        return (self.student_loss if turn.name == "student" else self.discriminator_loss)(networks, batch)

    def student_loss(self, networks: Networks, batch: Batch) -> Loss:
        """-(lambda_1 mean D_tau1 + lambda_2 mean D_tau2), the gradient passing through the frozen networks."""
        x = self.generated(networks, batch)
        with frozen(*(module for role, module in networks.items() if role != "student")):
            latent = signals.hinge_generator_loss(self.latent_logits(networks, batch, x))
            pixel = signals.hinge_generator_loss(self.pixel_logits(networks, x)) if self.pixel_weight else 0 * latent
            total = self.latent_weight * latent + self.pixel_weight * pixel
        return Loss(total, self.logged(total, latent, pixel))

    def discriminator_loss(self, networks: Networks, batch: Batch) -> Loss:
        """The hinge of both, the pair's x0 being real; weighted alike, which Adam does not see."""
        assert batch.pairs is not None
        with torch.no_grad():
            real, x = batch.pairs[1], self.generated(networks, batch)
        real_logits, logits = (self.latent_logits(networks, batch, x0) for x0 in (real, x))
        latent = signals.hinge_discriminator_loss(real_logits, logits)
        pixel = 0 * latent
        if self.pixel_weight:
            pixel = signals.hinge_discriminator_loss(*(self.pixel_logits(networks, x0) for x0 in (real, x)))
        total = self.latent_weight * latent + self.pixel_weight * pixel
        terms = self.logged(total, latent, pixel) | {"logit_gap": (real_logits - logits).mean().detach()}
        if self.r1_weight:
            moved = self.latent_logits(networks, batch, real, self.r1_noise * batch.normal("r1"))
            penalty = (moved - real_logits).square().mean()
            total, terms["r1"] = total + self.r1_weight * penalty, penalty.detach()
        return Loss(total, terms)

    def generated(self, networks: Networks, batch: Batch) -> Tensor:
        """The student's clean prediction [B, ...] between the ends of the pairs, at warped levels."""
        assert batch.pairs is not None
        noise, x0 = batch.pairs
        t = 1 - batch.uniform("t") ** self.time_power
        return networks.student(networks.student.schedule.add_noise(x0, noise, t), t, batch.cond)

    def latent_logits(self, networks: Networks, batch: Batch, x0: Tensor, offset: Tensor | float = 0) -> Tensor:
        """D_tau1 [B, depths] of x0 renoised to t'; offset: added to what the frozen backbone is shown."""
        backbone, t = networks.critic, self.latent_time(batch.uniform("latent_time"))
        x_t = networks.teacher.schedule.add_noise(x0, batch.normal("latent_noise"), t) + offset
        with backbone.capture() as features:
            backbone(x_t, t, batch.cond)
        return networks["latent_discriminator"](features)

    def pixel_logits(self, networks: Networks, x0: Tensor) -> Tensor:
        """D_tau2 [B, depths] of x0, decoded."""
        return networks["pixel_discriminator"](networks["pixel_features"](x0))

    def logged(self, total: Tensor, latent: Tensor, pixel: Tensor) -> dict[str, Tensor]:
        parts = {"latent": latent.detach(), "pixel": pixel.detach()} if self.pixel_weight else {}
        return {"loss": total.detach()} | parts


class PictureFeatures(nn.Module):
    """Features of latents' decoded pictures in a frozen image network: [B, N, dim], one entry a depth. At least in
    float32, also under autocast, and without the clamp to [0, 1], which has no gradient where it acts."""

    def __init__(self, network: nn.Module, decode: Callable[..., Tensor]):
        super().__init__()
        self.network, self.decode = network, decode

    def forward(self, latents: Tensor) -> list[Tensor]:
        with torch.autocast(latents.device.type, enabled=False):
            pixels = self.decode(latents, clamp=False)
            return self.network(pixels.to(torch.promote_types(pixels.dtype, torch.float32)))


class DigitsNetwork(nn.Module):
    """The convolutions of the shipped classifier; not the layer after them, with which FD is measured."""

    feature_dims = (16, 32, 64)

    def __init__(self) -> None:
        super().__init__()
        trunk = load_classifier().trunk
        self.stages = nn.ModuleList(trunk[i : i + 3] for i in (0, 3, 6))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        h, features = resized(pixels, IMAGE_SIZE).mean(1, keepdim=True), []
        for stage in self.stages:
            h = stage(h)
            features.append(h.flatten(2).mT)
        return features


class VisionNetwork(nn.Module):
    """The image encoder of a local transformers model: SAM's as in the paper, or any other whose hidden states are
    tokens; pictures are resized and normalised as its preprocessor_config.json says. Four depths, evenly spaced."""

    def __init__(self, folder: Path):
        super().__init__()
        from transformers import AutoModel

        model: Any = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        names = ("vision_encoder", "vision_model")  # of models that also read prompts or text
        self.encoder = next((getattr(model, name) for name in names if hasattr(model, name)), model)
        config, settings = self.encoder.config, json.loads((folder / "preprocessor_config.json").read_text())
        self.size = config.image_size
        mean, std = (torch.tensor(settings[name])[:, None, None] for name in ("image_mean", "image_std"))
        self.mean, self.std = nn.Buffer(mean, persistent=False), nn.Buffer(std, persistent=False)
        layers = config.num_hidden_layers
        self.depths = sorted({max(1, round(layers * i / 4)) for i in (1, 2, 3, 4)})
        self.feature_dims = (config.hidden_size,) * len(self.depths)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x = (resized(pixels, self.size) - self.mean) / self.std
        states = self.encoder(x, output_hidden_states=True).hidden_states
        return [states[i].flatten(1, -2) for i in self.depths]


def resized(pixels: Tensor, size: int) -> Tensor:
    if pixels.shape[-2:] == (size, size):
        return pixels
    return F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
