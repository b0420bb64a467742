"""The analytic teacher: a mixture of Gaussians whose score, posterior mean and samples are exact at every noise level.

With component weights w_k, means m_k and diagonal covariances S_k, x_t = alpha x0 + sigma noise is again a mixture:
    p_t(x) = sum_k w_k N(x; alpha m_k, V_k),   V_k = alpha^2 S_k + sigma^2
    E[x0 | x_t] = sum_k r_k(x_t) (m_k + alpha S_k V_k^-1 (x_t - alpha m_k)),   r_k the posterior weights.
Students and fake scores are small MLPs. Their "pretrained weights" are a fit to that posterior mean, made in seconds.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastgen import noise
from fastgen.backbones.base import DEFAULT_ROLES, Backbone, BackboneConfig, Output, RoleOptions, check_head
from fastgen.backbones.point_network import PointDenoiser, PointMLP
from fastgen.batch import Conditioning
from fastgen.denoiser import Denoiser, Inputs
from fastgen.modules.experts import Experts
from fastgen.modules.sharding import WeightsError
from fastgen.policy import InnerFlow, SegmentFlow
from fastgen.registry import MOST_BATCH, MOST_UPDATES, MOST_WIDTH
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import FlowSchedule, Schedule

POINTS = """```python
from pathlib import Path

from fastgen.sampling.sampler import load_sampler

points = load_sampler(Path("path/to/this/folder")).sample(prompts=[""] * 8, seeds=range(8))
```"""

Rows = Annotated[tuple[tuple[float, ...], ...], Field(min_length=1)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class GaussianMixtureConfig(BackboneConfig):
    """means: [K][D]. stds: [K], or [K][D] for axis-aligned covariances. weights: [K], normalised; equal if left out.
    classes: [K], class label of each component, 0..C-1; prompts are then "0".."C-1", and the empty prompt is the whole
    mixture. uncond_weights: [K], replaces the weights for the empty prompt (for guidance problems with known answers).
    width, depth: of the MLP. time_frequency: the highest frequency of its time embedding, in units of pi. fit_steps,
    fit_batch_size, fit_lr: for its fit to the teacher."""

    means: Rows
    stds: tuple[float, ...] | Rows
    name: Literal["gaussian_mixture"] = "gaussian_mixture"
    output: ClassVar[Output] = "points"
    can_checkpoint: ClassVar[bool] = False
    has_exact_law: ClassVar[bool] = True
    weights: tuple[float, ...] | None = None
    classes: tuple[Annotated[int, Field(ge=0, le=MOST_BATCH)], ...] | None = None
    uncond_weights: tuple[float, ...] | None = None
    width: int = Field(default=128, ge=1, le=MOST_WIDTH)
    depth: int = Field(default=3, ge=1, le=1000)
    time_frequency: float = Field(default=32.0, gt=0.5)  # the higher, the rougher is a derivative in time
    fit_steps: int = Field(default=2000, ge=0, le=MOST_UPDATES)
    fit_batch_size: int = Field(default=1024, ge=1, le=MOST_BATCH)
    fit_lr: float = Field(default=2e-3, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> "GaussianMixtureConfig":
        count, dim = len(self.means), len(self.means[0])
        for name in ("stds", "weights", "classes", "uncond_weights"):
            value = {
                "stds": self.stds,
                "weights": self.weights,
                "classes": self.classes,
                "uncond_weights": self.uncond_weights,
            }[name]
            if value is not None and len(value) != count:
                raise ValueError(f"{name} has {len(value)} entries but means has {count}; give one for each component")
        if any(len(m) != dim for m in self.means):
            raise ValueError(f"every mean must have the same length, got lengths {[len(m) for m in self.means]}")
        rows = [s if isinstance(s, tuple) else (s,) * dim for s in self.stds]
        if any(len(r) != dim for r in rows):
            raise ValueError(f"a row of stds must have {dim} entries, as the means do")
        if any(value <= 0 for row in rows for value in row):
            raise ValueError("every entry of stds must be positive")
        for name, weights in (("weights", self.weights), ("uncond_weights", self.uncond_weights)):
            if weights is not None and (min(weights) < 0 or sum(weights) <= 0):
                raise ValueError(f"{name} must be non-negative and not all zero")
        if self.classes is not None and set(self.classes) != set(range(len(set(self.classes)))):
            raise ValueError(f"classes must use every label from 0 up, got {sorted(set(self.classes))}")
        return self

    @property
    def num_dims(self) -> int:
        return len(self.means[0])

    def check(self) -> None:
        """Passes always: nothing outside the recipe is needed."""

    def check_export(self, policy: RolloutPolicy) -> None:
        """Passes always: our own folder format can store any policy."""

    def check_experts(self, boundaries: Sequence[float]) -> None:
        """Passes always: our own folder format can store any experts."""

    def check_inner(self, flow: InnerFlow) -> None:
        check_head(flow, self.depth)

    def check_segment(self, flow: SegmentFlow) -> None:
        """Passes always: our own folder format can store it."""

    def unloaded(self) -> "GaussianMixtureConfig":
        return dataclasses.replace(self, fit_steps=0)

    def build(
        self, device: torch.device, dtype: torch.dtype, seed: int, roles: RoleOptions = DEFAULT_ROLES
    ) -> "GaussianMixture":
        return GaussianMixture(self, device, dtype, seed, roles)


class Mixture:
    """The exact mixture. means, stds: [K, D]. logits: [labels, K], log-weights of the components given each label.

    Most methods take the label [B] of each sample. Those that take x_t compute in its dtype."""

    def __init__(self, means: Tensor, stds: Tensor, logits: Tensor):
        self.means, self.variances, self.logits = means, stds**2, logits

    @property
    def num_labels(self) -> int:
        """The number of classes; the label after the last one is that of the empty prompt."""
        return len(self.logits) - 1

    def to(self, like: Tensor) -> "Mixture":
        return Mixture(self.means.to(like), self.variances.to(like).sqrt(), self.logits.to(like))

    def _posterior(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """The log joint density of component and x_t, [B, K], and V, [B, K, D]. alpha, sigma: [B, 1]."""
        v = alpha[:, :, None] ** 2 * self.variances + sigma[:, :, None] ** 2
        z = (x_t[:, None] - alpha[:, :, None] * self.means) ** 2 / v + v.log() + math.log(2 * math.pi)
        return self.logits[label] - 0.5 * z.sum(-1), v

    def log_density(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """log p_t(x_t | label): [B]."""
        return self.to(x_t)._posterior(x_t, alpha, sigma, label)[0].logsumexp(1)

    def posterior_mean(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """E[x0 | x_t, label]: [B, D]."""
        exact = self.to(x_t)
        log_joint, v = exact._posterior(x_t, alpha, sigma, label)
        shrink = alpha[:, :, None] * exact.variances / v
        means = exact.means + shrink * (x_t[:, None] - alpha[:, :, None] * exact.means)
        return (log_joint.softmax(1)[:, :, None] * means).sum(1)

    def flow_map(self, x_t: Tensor, coefficients: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        """Where the probability-flow ODE carries x_t from the level of `coefficients`, (alpha, sigma), to that of
        `target`, (alpha', sigma'). For a single Gaussian, x' = alpha' m + sqrt(V' / V) (x_t - alpha m). Raises
        ValueError for several components."""
        if len(self.means) != 1:
            raise ValueError("the flow map of a mixture with several components has no closed form")
        exact, (alpha, sigma), (alpha2, sigma2) = self.to(x_t), coefficients, target
        ratio = ((alpha2**2 * exact.variances + sigma2**2) / (alpha**2 * exact.variances + sigma**2)).sqrt()
        return alpha2 * exact.means + ratio * (x_t - alpha * exact.means)

    def component(self, label: Tensor, u: Tensor) -> Tensor:
        """Component index [B] for uniform u [B], by the inverse cdf of the weights given the label."""
        cdf = self.logits[label].softmax(1).cumsum(1)
        return (u.to(cdf)[:, None] > cdf).sum(1).clamp(max=len(self.means) - 1)

    def sample(self, ids: Tensor, label: Tensor, key: int) -> Tensor:
        """Exact samples, [B, D] float64, keyed by sample id."""
        k = self.component(label, noise.uniform(ids, (), noise.make_key(key, "component"), torch.float64))
        z = noise.normal(ids, self.means.shape[1:], noise.make_key(key, "normal"), torch.float64)
        return self.means.double()[k] + self.variances.double().sqrt()[k] * z


class AnalyticDenoiser(Denoiser):
    """The mixture as a network without parameters."""

    def __init__(self, mixture: Mixture, schedule: Schedule):
        super().__init__(nn.Identity(), schedule, "sample")
        self.mixture = mixture

    @property
    def time_embedding(self) -> nn.Module:
        return self.network

    @property
    def shard_modules(self) -> Sequence[nn.Module]:
        return []

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        """The exact posterior mean at t. There is no network that could be conditioned on another time."""
        if inputs.given:
            raise ValueError(f"the analytic teacher takes only x_t, t and the label, got also {sorted(inputs.given)}")
        alpha, sigma = self.schedule.coefficients(t, x_t)
        return self.mixture.posterior_mean(x_t, alpha, sigma, cond["label"])


class GaussianMixture(Backbone):
    """The backbone of recipes with `backbone: {name: gaussian_mixture, ...}`. Latents are the points themselves."""

    image_size = None
    lora_targets = ("inlet", "1", "3", "outlet.2")
    stores_adapters = False
    teacher_is_base = False  # the teacher is a formula; the base is the network fitted to it

    def __init__(
        self,
        config: GaussianMixtureConfig,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        roles: RoleOptions = DEFAULT_ROLES,
    ):
        super().__init__(config, device, dtype, roles)
        self.seed = seed
        self.law = build_mixture(config)
        self.schedule = FlowSchedule()
        self.latent_shape = (len(config.means[0]),)
        self.time_dim = config.width
        self._pretrained: PointDenoiser | None = None

    @property
    def num_classes(self) -> int:
        return max(self.config.classes) + 1 if self.config.classes else 0

    def make(self, role: str, dtype: torch.dtype) -> Denoiser:
        if role == "teacher":
            return AnalyticDenoiser(self.law, self.schedule)
        if self._pretrained is None:
            self._pretrained = fit(new_network(self.config, self.schedule), self.law, self.config, self.seed)
        denoiser = new_network(self.config, self.schedule)
        denoiser.load_state_dict(self._pretrained.state_dict())
        return denoiser.to(self.device, dtype)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        names = [str(c) for c in range(self.num_classes)]
        unknown = sorted({p for p in prompts if p and p not in names})
        if unknown:
            raise ValueError(f"prompts of this mixture are class labels {names} or empty, got {unknown[:3]}")
        label = torch.tensor([int(p) if p else self.num_classes for p in prompts], device=self.device)
        return Conditioning({"label": label})

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        return latents

    def teacher_policy(self, num_steps: int) -> RolloutPolicy:
        return RolloutPolicy(timesteps=tuple(1 - i / num_steps for i in range(num_steps)), transition="ode")

    def save_pipeline(self, student: Denoiser, policy: RolloutPolicy, folder: Path) -> None:
        """Writes model.safetensors (the PointMLP; further experts are in model_2.safetensors, ...), config.json (the
        configuration of the mixture), experts.json (the boundaries), inputs.json (the names of the extra inputs),
        inner.json (the inner flow) and segment.json (the segment flow with its levels)."""
        folder.mkdir(parents=True, exist_ok=True)
        for i, part in enumerate(student.members):
            weights = {k: v.contiguous().cpu() for k, v in part.network.state_dict().items()}
            save_file(weights, folder / weight_name(i))
        if student.boundaries:
            (folder / "experts.json").write_text(json.dumps({"boundaries": student.boundaries}) + "\n")
        if policy.inputs:
            (folder / "inputs.json").write_text(json.dumps(policy.inputs) + "\n")
        if policy.inner is not None:
            (folder / "inner.json").write_text(json.dumps(dataclasses.asdict(policy.inner)) + "\n")
        if policy.segment is not None:
            about = {"flow": dataclasses.asdict(policy.segment), "levels": policy.timesteps}
            (folder / "segment.json").write_text(json.dumps(about) + "\n")
        config = {k: v for k, v in vars(self.config).items() if not k.startswith("_")}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def usage(self, policy: RolloutPolicy, folder: Path, adapter: bool) -> str:
        return POINTS

    def load_exported(self, folder: Path) -> Denoiser:
        """The student that save_pipeline wrote, frozen."""
        path = folder / "experts.json"
        boundaries = json.loads(path.read_text())["boundaries"] if path.is_file() else []
        parts = [new_network(self.config, self.schedule) for _ in range(len(boundaries) + 1)]
        inputs, inner, segment = (folder / f"{name}.json" for name in ("inputs", "inner", "segment"))
        for i, part in enumerate(parts):
            if inputs.is_file():
                part.add_inputs({}, self.time_dim, json.loads(inputs.read_text()))
            if inner.is_file():
                part.add_inner_flow(InnerFlow(**json.loads(inner.read_text())))
            if segment.is_file():
                about = json.loads(segment.read_text())
                part.add_segment_flow(SegmentFlow(**about["flow"]), about["levels"])
            path = folder / weight_name(i)
            try:
                part.network.load_state_dict(load_file(path))
            except (SafetensorError, RuntimeError) as error:  # RuntimeError: other names or shapes
                raise WeightsError(f"{path} has not the weights of this student: {error}; export it again") from None
        denoiser: Denoiser = Experts(parts, boundaries) if boundaries else parts[0]
        return denoiser.to(self.device, self.dtype).requires_grad_(False).eval()


def weight_name(expert: int) -> str:
    return f"model_{expert + 1}.safetensors" if expert else "model.safetensors"


def build_mixture(config: GaussianMixtureConfig) -> Mixture:
    """The exact mixture in float64, with one row of log-weights per class, and a last row for the empty prompt."""
    means = torch.tensor(config.means, dtype=torch.float64)
    stds = torch.tensor(config.stds, dtype=torch.float64)
    stds = stds if stds.dim() == 2 else stds[:, None].expand_as(means)
    weights = torch.tensor(config.weights or (1.0,) * len(means), dtype=torch.float64)
    rows = []
    for c in range(max(config.classes) + 1 if config.classes else 0):
        member = torch.tensor(config.classes) == c
        rows.append(torch.where(member, torch.where(weights[member].sum() > 0, weights, 1.0), 0.0))
    rows.append(weights if config.uncond_weights is None else torch.tensor(config.uncond_weights, dtype=torch.float64))
    table = torch.stack(rows)
    return Mixture(means, stds, (table / table.sum(1, keepdim=True)).log())


def new_network(config: GaussianMixtureConfig, schedule: Schedule) -> PointDenoiser:
    mixture = build_mixture(config)
    weights = mixture.logits[-1].exp()[:, None]
    center = (weights * mixture.means).sum(0)
    second = (weights * (mixture.variances + (mixture.means - center) ** 2)).sum(0)
    spread = float((second.mean() + center.square().mean()).sqrt())
    labels = max(config.classes) + 2 if config.classes else 1
    network = PointMLP(len(config.means[0]), labels, config.width, config.depth, spread, config.time_frequency)
    return PointDenoiser(network, schedule)


@torch.enable_grad()
def fit(denoiser: PointDenoiser, mixture: Mixture, config: GaussianMixtureConfig, seed: int) -> PointDenoiser:
    """Fits the network to the exact posterior mean, for uniform t in (0, 1) and every label; deterministic given the
    seed. Uses Adam with cosine decay. The error is measured relative to sigma, as a velocity."""
    generator = torch.Generator().manual_seed(noise.make_key(seed, "fit") % 2**63)
    with torch.no_grad():
        for name, p in denoiser.named_parameters():
            if p.dim() == 2:
                p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[1]))
            elif name.endswith("bias"):
                p.zero_()
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=config.fit_lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(config.fit_steps, 1))
    exact = Mixture(mixture.means.float(), mixture.variances.float().sqrt(), mixture.logits.float())
    labels = denoiser.network.label.num_embeddings
    for step in range(config.fit_steps):
        ids = torch.arange(config.fit_batch_size) + step * config.fit_batch_size
        label = torch.randint(labels, (config.fit_batch_size,), generator=generator)
        x0 = mixture.sample(ids, label, noise.make_key(seed, "fit data")).float()
        t = torch.rand(config.fit_batch_size, generator=generator).clamp_min(1e-3)
        alpha, sigma = denoiser.schedule.coefficients(t, x0)
        x_t = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator)
        target = exact.posterior_mean(x_t, alpha, sigma, label)
        error = (denoiser(x_t, t, Conditioning({"label": label})) - target) / sigma.clamp_min(0.05)
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
        decay.step()
    return denoiser
