"""ADP: Adversarial Distillation Pre-training, the first stage of DMDX (arXiv 2507.18569). ADM continues its run by
`init_from`.

    paper            here                  what it is
    G_theta          networks.student      conditioned on its true level, so that any sampler may be trained next
    (x_T, x_0)       batch.pairs           a noise, and the sample to which the guided teacher's ODE takes it
    D_tau1           latent_discriminator  heads at several depths of the frozen teacher, on x renoised to t'
    D_tau2           pixel_discriminator   heads at several depths of a frozen image network (SAM), on decoded pictures
    lambda_1, _2     latent_weight, pixel_weight

The algorithm, for every student update:
    x_t = alpha(t) x_0 + sigma(t) x_T, between the two ends of a pair, at t = 1 - u^3, u uniform: mostly noise
    x   = the student's clean prediction at x_t
    discriminator_updates times: both discriminators <- hinge loss of the pair's x_0 (real) against x (fake), without
                                                        gradient to the student
    once:                        student             <- -(lambda_1 mean D_tau1(x) + lambda_2 mean D_tau2(x))
    the average of the student's weights is updated once.

The paper has no squared error, because it blurs: the student may give any sample that the discriminators take for one
of the teacher's. Both discriminators see x_0 and x of one pair at the same level t' and with the same fresh noise
(ours).

The mixture teacher is a formula without features; see adm.py for what D reads then. Its points are not pictures, so
set pixel_weight to 0.
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
from fastgen.modules.expert_levels import draw_levels
from fastgen.modules.heads import PictureHeads, TokenHeads
from fastgen.networks import Networks, frozen
from fastgen.objectives.base import Loss, Objective, State, Turn, feature_network
from fastgen.recipe import Recipe
from fastgen.registry import MOST_STEPS, MOST_WIDTH
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import TimeSampler


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ADP(Objective):
    """pixel_network: `digits`, which is the shipped classifier, or a local folder with a vision model that
    transformers loads (SAM, DINOv2, CLIP, ViT, ...) and its preprocessor_config.json."""

    examples = ({"pixel_weight": 0.0}, {"pixel_network": "digits"})
    needs_whole_videos = (
        "given real frames, as in its pairs, a right student makes chunks that do not continue each other, and a "
        "discriminator of whole videos would tell it from the teacher; use adm, on rollouts"
    )

    name: Literal["adp"] = "adp"
    # lambda_1 and lambda_2 of the paper, of two mean hinge losses; nothing public pins them
    latent_weight: float = Field(default=0.85, gt=0)
    pixel_weight: float = Field(default=0.15, ge=0)
    pixel_network: str | None = None  # SAM's image encoder in the paper
    time_power: float = Field(default=3.0, gt=0)  # "t <- (1 - (t / T)^3) T", the paper; nothing public pins it
    latent_time: TimeSampler = TimeSampler(low=0.001, high=0.999)  # t'; ours
    discriminator_updates: int = Field(default=1, ge=1, le=MOST_STEPS)  # ours
    head_width: int = Field(default=64, ge=1, le=MOST_WIDTH)  # ours
    r1_weight: float = Field(default=0.0, ge=0)  # ours, on D_tau1, as in adm.py; 0: the paper's loss
    r1_noise: float = Field(default=0.1, gt=0)  # FastGen's, in units of x_t, as in adm.py

    @model_validator(mode="after")
    def _pixels(self) -> "ADP":
        if (self.pixel_weight > 0) != (self.pixel_network is not None):
            raise ValueError(
                f"pixel_weight {self.pixel_weight:g} and pixel_network {self.pixel_network} do not go together: give "
                "pixel_network (digits, or the folder of a vision model), or set pixel_weight: 0 and leave "
                "pixel_network out"
            )
        if self.pixel_network is not None:
            check_pixel_network(self.pixel_network)
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
            raise ValueError("adp conditions the student on its true level; remove rollout.conditioning_time")

    def check_recipe(self, recipe: Recipe) -> None:
        if self.pixel_weight and recipe.backbone.output != "pixels":
            raise ValueError(
                f"pixel_weight: backbone {recipe.backbone.name} gives {recipe.backbone.output}, not "
                "pixels; set pixel_weight to 0, and leave pixel_network out"
            )

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        sizes = backbone.make_empty()
        heads = TokenHeads(sizes.feature_dim, len(sizes.feature_modules), self.head_width)
        modules: dict[str, nn.Module] = {"latent_discriminator": heads}
        modules |= feature_network(backbone)
        if self.pixel_network is not None:
            network = make_pixel_network(self.pixel_network)
            modules["pixel_features"] = PictureFeatures(network, backbone.decode)
            modules["pixel_discriminator"] = PictureHeads(network.feature_dims, self.head_width)
        return modules

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        return (Turn("discriminator", self.full_roles, self.discriminator_updates), Turn("student", ("student",)))

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        if turn.name == "student":
            return self.student_loss(networks, batch)
        return self.discriminator_loss(networks, batch)

    def student_loss(self, networks: Networks, batch: Batch) -> Loss:
        """-(lambda_1 mean D_tau1 + lambda_2 mean D_tau2). The gradient passes through the frozen networks."""
        x = self.generated(networks, batch)
        with frozen(*(module for role, module in networks.items() if role != "student")):
            latent = signals.hinge_generator_loss(self.latent_logits(networks, batch, x))
            pixel = signals.hinge_generator_loss(self.pixel_logits(networks, x)) if self.pixel_weight else 0 * latent
            total = self.latent_weight * latent + self.pixel_weight * pixel
        return Loss(total, self.loss_terms(total, latent, pixel))

    def discriminator_loss(self, networks: Networks, batch: Batch) -> Loss:
        """The hinge losses of both discriminators, with the pair's x0 as the real sample.

        They are added with the weights of the student's loss, which makes no difference to Adam."""
        assert batch.pairs is not None
        real = batch.pairs[1]
        with torch.no_grad():
            fake = self.generated(networks, batch)
        real_logits = self.latent_logits(networks, batch, real)
        fake_logits = self.latent_logits(networks, batch, fake)
        latent = signals.hinge_discriminator_loss(real_logits, fake_logits)
        if self.pixel_weight:
            pixel = signals.hinge_discriminator_loss(
                self.pixel_logits(networks, real), self.pixel_logits(networks, fake)
            )
        else:
            pixel = 0 * latent
        total = self.latent_weight * latent + self.pixel_weight * pixel
        terms = self.loss_terms(total, latent, pixel) | {"logit_gap": (real_logits - fake_logits).mean().detach()}
        if self.r1_weight:
            perturbed_logits = self.latent_logits(networks, batch, real, self.r1_noise * batch.normal("r1"))
            penalty = (perturbed_logits - real_logits).square().mean()
            total = total + self.r1_weight * penalty
            terms["r1"] = penalty.detach()
        return Loss(total, terms)

    def generated(self, networks: Networks, batch: Batch) -> Tensor:
        """The student's clean prediction [B, ...] at x_t, between the two ends of each pair, t = 1 - u^time_power."""
        assert batch.pairs is not None
        noise, x0 = batch.pairs
        t = 1 - batch.uniform("t") ** self.time_power
        x_t = networks.student.schedule.add_noise(x0, noise, t)
        return networks.student(x_t, t, batch.cond)

    def latent_logits(self, networks: Networks, batch: Batch, x0: Tensor, offset: Tensor | float = 0) -> Tensor:
        """D_tau1 [B, depths] at x0 renoised to t'. offset: added to the renoised sample, for the R1 penalty."""
        t = draw_levels(batch, "latent_time", self.latent_time, networks.critic)
        x_t = networks.teacher.schedule.add_noise(x0, batch.normal("latent_noise"), t) + offset
        with networks.critic.capture() as features:
            networks.critic(x_t, t, batch.cond)
        return networks["latent_discriminator"](features)

    def pixel_logits(self, networks: Networks, x0: Tensor) -> Tensor:
        """D_tau2 [B, depths] at the decoded picture of x0."""
        return networks["pixel_discriminator"](networks["pixel_features"](x0))

    def loss_terms(self, total: Tensor, latent: Tensor, pixel: Tensor) -> dict[str, Tensor]:
        """The terms to log: the total and, where both parts are used, each part."""
        terms = {"loss": total.detach()}
        if self.pixel_weight:
            terms |= {"latent": latent.detach(), "pixel": pixel.detach()}
        return terms


def check_pixel_network(name: str) -> None:
    """Raises ValueError if this is neither `digits` nor the folder of a vision model."""
    if name == "digits":
        return
    for file in ("config.json", "preprocessor_config.json"):
        if not (Path(name) / file).is_file():
            raise ValueError(
                f"pixel_network: {name} has no {file}; give digits, or the folder of a local vision model"
            )


def make_pixel_network(name: str) -> "DigitsNetwork | VisionNetwork":
    """The frozen network of this name, `digits` or a folder."""
    network = DigitsNetwork() if name == "digits" else VisionNetwork(Path(name))
    return network.requires_grad_(False).eval()


class PictureFeatures(nn.Module):
    """Decodes latents and returns the features of the pictures in a frozen image network: one [B, N, dim] tensor per
    depth.

    Runs in at least float32, also under autocast. The pictures are not clamped to [0, 1], because a clamp has no
    gradient outside that range."""

    def __init__(self, network: nn.Module, decode: Callable[..., Tensor]):
        super().__init__()
        self.network, self.decode = network, decode

    def forward(self, latents: Tensor) -> list[Tensor]:
        return self.of_pixels(self.pixels(latents))

    def pixels(self, latents: Tensor) -> Tensor:
        """The decoded pictures [B, 3, H, W], in at least float32."""
        with torch.autocast(latents.device.type, enabled=False):
            pixels = self.decode(latents, clamp=False)
            return pixels.to(torch.promote_types(pixels.dtype, torch.float32))

    def of_pixels(self, pixels: Tensor) -> list[Tensor]:
        """The features of pictures [B, 3, H, W]."""
        with torch.autocast(pixels.device.type, enabled=False):
            return self.network(pixels)


class DigitsNetwork(nn.Module):
    """The convolutions of the shipped classifier, without the layer after them, which measures FD."""

    feature_dims = (16, 32, 64)

    def __init__(self) -> None:
        super().__init__()
        trunk = load_classifier().trunk
        self.stages = nn.ModuleList(trunk[i : i + 3] for i in (0, 3, 6))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        h = resize(pixels, IMAGE_SIZE).mean(1, keepdim=True)
        features = []
        for stage in self.stages:
            h = stage(h)
            features.append(h.flatten(2).mT)
        return features


class VisionNetwork(nn.Module):
    """The image encoder of a local transformers model: SAM's, as in the paper, or any other whose hidden states are
    tokens. Pictures are resized and normalised as its preprocessor_config.json says. Features come from four evenly
    spaced depths."""

    def __init__(self, folder: Path):
        super().__init__()
        from transformers import AutoModel

        model: Any = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        names = ("vision_encoder", "vision_model")  # the image encoder of models that also read prompts or text
        self.encoder = next((getattr(model, name) for name in names if hasattr(model, name)), model)
        config = self.encoder.config
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        self.size = config.image_size
        self.mean = nn.Buffer(torch.tensor(settings["image_mean"])[:, None, None], persistent=False)
        self.std = nn.Buffer(torch.tensor(settings["image_std"])[:, None, None], persistent=False)
        layers = config.num_hidden_layers
        self.depths = sorted({max(1, round(layers * i / 4)) for i in (1, 2, 3, 4)})
        self.feature_dims = (config.hidden_size,) * len(self.depths)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x = (resize(pixels, self.size) - self.mean) / self.std
        states = self.encoder(x, output_hidden_states=True).hidden_states
        return [states[i].flatten(1, -2) for i in self.depths]


def resize(pixels: Tensor, size: int) -> Tensor:
    """[B, C, size, size] by bilinear interpolation with antialiasing; unchanged where the size is right already."""
    if pixels.shape[-2:] == (size, size):
        return pixels
    return F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
