"""ADM and its pre-training ADP against closed forms: what the two ODE steps differ by, what an optimal discriminator
is, where its gradient goes; and who gets gradient in whose turn."""

import dataclasses
import json
import math
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import (
    ONE_STEP,
    TINY,
    AffineStudent,
    ExactFake,
    Given,
    Recorder,
    gaussian,
    guided_pair,
    point_batch,
    reached,
    tiny_backbone,
    tiny_batch,
    tiny_networks,
    touched,
)
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones.sd3 import SD3Config
from fastgen.batch import Batch, Conditioning
from fastgen.config import load_recipe
from fastgen.data.digits import assets_dir, load_digits
from fastgen.denoiser import Denoiser, Inputs
from fastgen.networks import Networks
from fastgen.objectives import ADM, ADP, Objective, Turn
from fastgen.objectives.adp import DigitsNetwork, PictureFeatures, VisionNetwork
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import FlowSchedule, Schedule, TimeSampler, VPSchedule
from fastgen.train import main

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes/mixture_adm_4step.yaml"
POLICY = RolloutPolicy((1.0, 0.6, 0.3))
STDS = (1.3, 0.4)
DEEP = dataclasses.replace(TINY, depth=3)


class Monomials(Denoiser):
    """A feature network without weights: at each of `depths` depths the features of x are x, x^2, ... Keeps what it is
    called with."""

    def __init__(self, degree: int = 1, depths: int = 1):
        super().__init__(nn.Identity(), FlowSchedule(), "sample")
        self.degree, self.depths = degree, depths

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        self.x_t, self.t = x_t, t
        self.features += [torch.cat([x_t**k for k in range(1, self.degree + 1)], 1)[:, None]] * self.depths
        return x_t

    @contextmanager
    def capture(self):  # type: ignore[no-untyped-def]
        self.features: list[Tensor] = []
        yield self.features


class LinearHead(nn.Module):
    """D(x) = w . features: what a discriminator is in closed form."""

    def __init__(self, weight: Sequence[float]):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, features: Sequence[Tensor], stop: Tensor | None = None) -> Tensor:
        return torch.stack([f[:, 0] @ self.weight for f in features], 1)


def step_networks(batch: Batch, fake: Denoiser, teacher: Denoiser, head: nn.Module, **modules: nn.Module) -> Networks:
    x0 = torch.tensor((-0.4, 0.3), dtype=torch.float64) + torch.tensor(STDS, dtype=torch.float64) * batch.normal("x0")
    roles = {"student": Given(x0), "fake_score": fake, "teacher": teacher, "features": Monomials()} | modules
    return Networks(roles | {"discriminator": head}, ONE_STEP)


# --- the two steps


def test_the_two_steps_differ_by_dt_times_the_velocities() -> None:
    """Flow matching, float64: x_fake - x_real = dt (v_real - v_fake), which `step_gap` logs over dt; and the features
    see both at the level t - dt, not t. Fails when D's backbone is told t."""
    objective, batch = ADM(guidance_scale=1.0), point_batch(200)
    fake, teacher = gaussian((-0.4, 0.3), STDS), gaussian((0.7, -1.2), STDS)
    networks = step_networks(batch, fake, teacher, LinearHead((0.0, 0.0)))
    rollout = objective.rollout(networks, batch, grad=False)
    x_t, t = objective.renoised(networks, batch, rollout)
    x_fake, x_real = (objective.take_ode_step(networks, d(x_t, t, batch.cond), x_t, t) for d in (fake, teacher))
    v_fake, v_real = (d(x_t, t, batch.cond, predict="flow_prediction") for d in (fake, teacher))
    error = (x_fake - x_real - (v_real - v_fake) / 64).abs().max().item()
    gap = objective.discriminator_loss(networks, batch).terms["step_gap"]
    seen = networks["features"]
    print(f"error {error:.1e}, levels {t.min():.3f} to {t.max():.3f}, gap {gap:.3f}")
    assert error < 1e-14 and abs(gap - (v_real - v_fake).abs().mean()) < 1e-12
    assert torch.equal(seen.t, t - 1 / 64) and torch.equal(seen.x_t, x_real)
    assert 0.02 <= t.min() < 0.1 and 0.9 < t.max() <= 0.98


@pytest.mark.parametrize("schedule", [FlowSchedule(), "vp"], ids=["flow", "vp"])
def test_the_step_is_one_of_the_probability_flow_ode(schedule: Schedule | str, vp_schedule: VPSchedule) -> None:
    """Against the exact flow map of a Gaussian: the error of a single step falls with the square of dt."""
    schedule = vp_schedule if isinstance(schedule, str) else schedule
    teacher, cond = gaussian((0.7, -1.2), STDS, schedule), Conditioning({"label": torch.zeros(99).long()})
    networks, t = Networks({"teacher": teacher}, ONE_STEP), torch.linspace(0.2, 0.9, 99, dtype=torch.float64)
    x = torch.randn(99, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = []
    for n in (64, 256):
        stepped = ADM(ode_step=1 / n).take_ode_step(networks, teacher(x, t, cond), x, t)
        ends = schedule.coefficients(t, x), schedule.coefficients(t - 1 / n, x)
        errors.append((stepped - teacher.mixture.flow_map(x, *ends)).abs().mean().item())
    print(f"dt = 1/64: {errors[0]:.1e}, dt = 1/256: {errors[1]:.1e}")
    assert errors[0] < 5e-3 and 12 < errors[0] / errors[1] < 20


def test_where_fake_and_teacher_agree_the_discriminator_learns_nothing() -> None:
    """fake = teacher: x_fake = x_real in every element; L_D = 2 at D = 0; and while |D| < 1 its gradient is exactly
    zero, sample by sample, as both steps start from one x_t. Fails when each has a renoising of its own."""
    batch, head = point_batch(200), LinearHead((0.1, -0.05))
    teacher = gaussian((0.7, -1.2), STDS)
    networks = step_networks(batch, gaussian((0.7, -1.2), STDS), teacher, head)
    objective = ADM(guidance_scale=1.0)
    loss = objective.discriminator_loss(networks, batch)
    loss.total.backward()
    assert head.weight.grad is not None and loss.terms["step_gap"] == 0
    print(f"L_D {loss.total.item():.15f}, |D| to {loss.terms['logit_size']:.2f}, gradient {head.weight.grad.tolist()}")
    assert abs(loss.total.item() - 2) < 1e-15 and bool((head.weight.grad == 0).all())
    zero = step_networks(batch, gaussian((-0.4, 0.3), STDS), teacher, LinearHead((0.0, 0.0)))
    assert objective.discriminator_loss(zero, batch).total == 2


@pytest.mark.parametrize(("w", "same"), [(2.5, True), (1.0, False)])
def test_the_teachers_step_is_guided_and_the_fakes_is_not(w: float, same: bool) -> None:
    """Between equal covariances guidance is a shifted Gaussian: a fake score there takes the guided teacher's steps.
    Fails when the teacher is not guided."""
    m_c, m_u, fake_mean = (0.7, -1.2), (-0.1, 0.5), (1.9, -3.75)  # m_c + 1.5 (m_c - m_u)
    teacher, batch = guided_pair(m_c, m_u, STDS), point_batch(50, uncond=2)
    networks = step_networks(batch, gaussian(fake_mean, STDS), teacher, LinearHead((0.0, 0.0)))
    gap = ADM(guidance_scale=w).discriminator_loss(networks, batch).terms["step_gap"].item()
    print(f"w = {w}: {gap:.1e}")
    assert (gap < 1e-12) == same and (same or gap > 0.1)


# --- what the discriminator becomes


def test_the_discriminators_optimum_points_from_fake_to_teacher() -> None:
    """Two Gaussians of one covariance: v_fake - v_real = rho_t (m_r - m_f) / t is the same at every x. A linear D then
    has the optimum w = dt M^-1 E[v_fake - v_real] / (2 r1_weight), M = r1_noise^2 E[n n^T], at which the gradient of
    hinge and R1 is zero. Fails when the penalty, its weight or its noise is left out."""
    m_r, m_f, batch = torch.tensor((0.7, -1.2)), torch.tensor((-0.4, 0.3)), point_batch(4000)
    objective = ADM(guidance_scale=1.0, r1_weight=2.0, r1_noise=0.2)
    t = objective.renoise_time(batch.uniform("renoise_time"))[:, None]
    variance = torch.tensor(STDS, dtype=torch.float64) ** 2
    rho = t**2 / ((1 - t) ** 2 * variance + t**2)
    velocities = (rho * (m_r - m_f) / t).mean(0)
    n = batch.normal("r1")
    moment = objective.r1_noise**2 * n.T @ n / len(n)
    optimum = torch.linalg.solve(moment, velocities) / 64 / (2 * objective.r1_weight)
    head = LinearHead(optimum.tolist())
    networks = step_networks(batch, gaussian(m_f.tolist(), STDS), gaussian(m_r.tolist(), STDS), head)
    loss = objective.discriminator_loss(networks, batch)
    loss.total.backward()
    assert loss.terms["loss"] == pytest.approx(2 - loss.terms["logit_gap"])  # the hinges, where all |D| < 1
    assert head.weight.grad is not None
    direction = torch.cosine_similarity(optimum, velocities, dim=0).item()
    print(f"w {optimum.tolist()}, along the velocities {direction:.4f}, gradient {head.weight.grad.abs().max():.1e}")
    assert head.weight.grad.abs().max() < 1e-8 and direction > 0.99 and loss.terms["logit_size"] < 0.5


@pytest.mark.slow
def test_student_and_discriminator_together_reach_the_teacher() -> None:
    """The game in one dimension, from N(-1, 0.4^2) to the teacher's N(0.7, 1.3^2): D is a quadratic, which here can
    represent the difference of the two scores, and is penalised; both players Adam."""
    student, head = AffineStudent(-1.0, 0.4), LinearHead((0.0, 0.01))
    modules: dict[str, nn.Module] = {"student": student, "teacher": gaussian(), "discriminator": head}
    networks = Networks(modules | {"fake_score": ExactFake(student), "features": Monomials(2)}, ONE_STEP)
    objective = ADM(guidance_scale=1.0, r1_weight=10.0)
    players = {"discriminator": head, "student": student}
    optimizers = {n: torch.optim.Adam(m.parameters(), betas=(0.0, 0.99)) for n, m in players.items()}
    for step in range(250):
        for group in (g for o in optimizers.values() for g in o.param_groups):
            group["lr"] = 0.03 * (1 - step / 250)
        for i, (name, optimizer) in enumerate(optimizers.items()):
            batch = point_batch(torch.arange(256) + 256 * step, key=2 * step + i, dim=1)
            optimizer.zero_grad()
            turn = Turn(name, (name,))
            objective.loss(turn, networks, batch, {}).total.backward()
            optimizer.step()
    a, b = student.a.item(), abs(student.b.item())
    print(f"mean off by {a - 0.7:+.1e}, standard deviation by {b - 1.3:+.1e}")
    assert abs(a - 0.7) < 0.03 and abs(b - 1.3) < 0.03


# --- who gets gradient


def deep_networks(objective: Objective, policy: RolloutPolicy = POLICY) -> Networks:
    return tiny_networks(objective, policy, backbone=tiny_backbone(DEEP))


def all_reached(module: nn.Module) -> bool:
    """Whether all parameters but the constants of heads hold a gradient that is more than rounding."""
    found = reached(module, 1e-14)
    return all(found[name] or ("outer" in name and name.endswith("bias")) for name in found)


STOPS: dict[str, Any] = {"stops": "per_sample", "condition_on_stop": True, "guidance_scale": 2.0, "r1_weight": 1.0}


@pytest.mark.parametrize("options", [{}, STOPS], ids=["paper", "by stop"])
@pytest.mark.parametrize("role", ["student", "fake_score", "discriminator"])
def test_a_turn_leaves_gradient_on_its_role_alone(role: str, options: dict[str, Any]) -> None:
    """Every tensor of the role is reached, heads of all depths and stops among them, and no other network holds so
    much as a zero gradient. Fails without `frozen` in the student's turn. The constant of a head has none: while
    |D| < 1 it cancels in the hinge, and always in R1."""
    objective = ADM(**options)
    networks = deep_networks(objective)
    assert set(networks) == {"teacher", "features", *objective.trained_roles}
    turn = next(turn for turn in objective.turns(0, {}) if turn.roles == (role,))
    loss = objective.loss(turn, networks, tiny_batch(), {})
    loss.total.backward()
    assert all_reached(networks[role]) and touched(networks) == {role}
    assert not any(value.requires_grad for value in loss.terms.values())
    trainable = {r for r, m in networks.items() if any(p.requires_grad for p in m.parameters())}
    assert trainable == set(objective.trained_roles)


def test_the_students_gradient_is_that_of_the_discriminator_at_the_fakes_step() -> None:
    """Along itself, by central differences of -mean D(x_fake) with D, backbone and fake score held: it passes through
    all of them, the ODE step and x_t. One step, whose gradient is not truncated. Fails when the fake score is called
    without gradient."""
    networks, objective, batch = deep_networks(ADM(), ONE_STEP), ADM(ode_step=0.2, renoise_time=HIGH), tiny_batch()
    parameters = list(networks.student.parameters())
    gradient = torch.autograd.grad(objective.student_loss(networks, batch).total, parameters)
    length = math.sqrt(sum(float(g.square().sum()) for g in gradient))
    losses = []
    for step in (1e-5, -2e-5, 1e-5):
        for p, g in zip(parameters, gradient, strict=True):
            p.data += step / length * g
        losses.append(objective.student_loss(networks, batch).total.item())
    slope = (losses[0] - losses[1]) / 2e-5
    print(f"length {length:.5f}, slope off by {slope / length - 1:.1e}")
    assert length > 1e-4 and abs(slope / length - 1) < 1e-6


HIGH = TimeSampler(low=0.3, high=0.9)


@pytest.mark.parametrize("objective", [ADM(**STOPS), ADP(pixel_weight=0, r1_weight=1.0)], ids=["adm", "adp"])
def test_a_batch_in_two_halves_gives_the_same_gradients(objective: Objective) -> None:
    networks = deep_networks(objective)
    whole = tiny_batch()
    assert whole.pairs is not None
    noise, x0 = whole.pairs
    for turn in objective.turns(0, {}):
        found = []
        for parts in (slice(0, 32),), (slice(0, 16), slice(16, 32)):
            for rows in parts:
                fields = {"ids": whole.ids[rows], "cond": whole.cond.select(rows), "uncond": whole.uncond.select(rows)}
                batch = Batch(**{**vars(whole), **fields, "pairs": (noise[rows], x0[rows])})
                (objective.loss(turn, networks, batch, {}).total / len(parts)).backward()  # type: ignore[union-attr]
            found.append([p.grad for role in turn.roles for p in networks[role].parameters()])
            for role in turn.roles:
                networks[role].zero_grad()
        error = max((a - b).abs().max().item() for a, b in zip(*found, strict=True))
        print(f"{turn.name}: {error:.1e}")
        assert error < 1e-13


def test_each_depth_and_each_stop_has_a_head_of_its_own() -> None:
    """Logits [B, depths]. Moving the heads of one stop changes that stop's samples; those of one depth, its column."""
    objective = ADM(**STOPS)
    networks, batch = deep_networks(objective), tiny_batch()
    stop = objective.rollout(networks, batch, grad=False).stop
    x, t = batch.normal("x"), objective.renoise_time(batch.uniform("t"))
    before = objective.logits(networks, batch, x, t, stop)
    with torch.no_grad():
        networks["discriminator"].heads[1].outer[2].bias += 1  # type: ignore[index,union-attr]
    moved = objective.logits(networks, batch, x, t, stop) != before
    assert before.shape == (32, DEEP.depth)
    assert torch.equal(moved[:, 2], stop == 1) and not moved[:, :2].any() and 0 < moved[:, 2].sum() < 32


def test_the_teachers_own_features_where_it_has_some() -> None:
    """A teacher that is a network is the backbone itself: no copy is made, and D reads its blocks."""
    backbone = SD3Config(path=str(assets_dir() / "teachers/digits")).build(torch.device("cpu"), torch.float32, 0)
    modules: dict[str, nn.Module] = {"student": backbone.load("student"), "teacher": backbone.load("teacher")}
    modules |= ADM(guidance_scale=1.0).auxiliary(backbone, POLICY)
    assert set(modules) == {"student", "teacher", "fake_score", "discriminator"}
    networks, ids = Networks(modules, POLICY), torch.arange(2)
    cond = backbone.encode_prompts(["a one", "a two", "", ""])
    batch = Batch(ids, 0, cond.select(slice(0, 2)), cond.select(slice(2, 4)), backbone.latent_shape, group=ids)
    for role, turn in zip(("student", "discriminator"), ADM().turns(0, {})[1:], strict=True):
        ADM().loss(turn, networks, batch, {}).total.backward()
        assert touched(networks) == {role} and sum(reached(networks[role], 1e-14).values()) > 10
        networks[role].zero_grad()


# --- ADP


def test_the_levels_of_pre_training_are_mostly_noise() -> None:
    """t = 1 - u^3, and the student sees add_noise(x0, noise, t) of its pair. Fails with uniform levels."""
    objective, batch = ADP(pixel_weight=0), tiny_batch(count=4000)
    student = Recorder(AffineStudent(0.0, 1.0))
    objective.generated(Networks({"student": student}, ONE_STEP), batch)
    x_t, t = student.calls[0][:2]
    assert batch.pairs is not None and torch.equal(t, 1 - batch.uniform("t") ** 3)
    noise, x0 = batch.pairs
    assert torch.allclose(x_t, (1 - t[:, None]) * x0 + t[:, None] * noise, atol=1e-14)
    print(f"mean {t.mean():.3f}, below one half {(t < 0.5).double().mean():.3f}")
    assert abs(t.mean() - 0.75) < 0.02 and abs((t < 0.5).double().mean() - (1 - 0.5 ** (1 / 3))) < 0.02


class Decoded(nn.Module):
    """Stands in for a picture network: two depths of the `pixels` themselves."""

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return [pixels[:, None], pixels[:, None] ** 2]


def with_pixels() -> tuple[Networks, Batch, ADP]:
    """The tiny mixture with a decoder that doubles, and a picture network on what it gives."""
    objective = ADP(pixel_network="digits", r1_weight=1.0)
    networks = dict(deep_networks(ADP(pixel_weight=0), ONE_STEP))
    networks["pixel_features"] = PictureFeatures(Decoded(), lambda z, clamp: (2 * z).clamp(0, 1) if clamp else 2 * z)
    networks["pixel_discriminator"] = LinearHead((0.3, -0.2))
    return Networks(networks, ONE_STEP), tiny_batch(), objective


def test_the_two_discriminators_weigh_85_to_15() -> None:
    """Both turns' totals, from their logged parts; the student's by hand. Fails with other weights, or when either
    discriminator is left out."""
    networks, batch, objective = with_pixels()
    assert (ADP(pixel_network="digits").latent_weight, ADP(pixel_network="digits").pixel_weight) == (0.85, 0.15)
    assert batch.pairs is not None
    x = objective.generated(networks, batch)
    by_hand = -(
        0.85 * objective.latent_logits(networks, batch, x).mean() + 0.15 * objective.pixel_logits(networks, x).mean()
    )
    student = objective.student_loss(networks, batch)
    assert abs(student.total - by_hand) < 1e-12
    loss = objective.discriminator_loss(networks, batch)
    total = 0.85 * loss.terms["latent"] + 0.15 * loss.terms["pixel"] + loss.terms["r1"]
    assert abs(loss.total - total) < 1e-12
    pixel = signals.hinge_discriminator_loss(*(objective.pixel_logits(networks, z) for z in (batch.pairs[1], x)))
    assert abs(loss.terms["pixel"] - pixel) < 1e-12
    real, fake = (objective.latent_logits(networks, batch, z) for z in (batch.pairs[1], x))
    assert abs(loss.terms["latent"] - signals.hinge_discriminator_loss(real, fake)) < 1e-12
    assert abs(loss.terms["latent"] - signals.hinge_discriminator_loss(fake, real)) > 1e-6
    assert abs(loss.terms["logit_gap"] - (real - fake).mean()) < 1e-12
    moved = objective.latent_logits(networks, batch, batch.pairs[1], objective.r1_noise * batch.normal("r1"))
    assert abs(loss.terms["r1"] - (moved - real).square().mean()) < 1e-12 < loss.terms["r1"]


def test_pictures_are_judged_without_a_clamp() -> None:
    """Which has no gradient where it acts."""
    networks, _, _ = with_pixels()
    latents = torch.tensor([[-1.0, 2.0]])
    assert torch.equal(networks["pixel_features"](latents)[0], 2 * latents[:, None])


@pytest.mark.parametrize("turn", ["student", "discriminator"])
def test_a_turn_of_pre_training_leaves_gradient_on_its_roles_alone(turn: str) -> None:
    """In the student's, through the decoder and both frozen backbones; all depths of both discriminators in theirs."""
    networks, batch, objective = with_pixels()
    found = next(t for t in objective.turns(0, {}) if t.name == turn)
    objective.loss(found, networks, batch, {}).total.backward()
    assert touched(networks) == set(found.roles)
    assert all(all_reached(networks[role]) for role in found.roles)


def test_a_student_that_repeats_the_pairs_is_not_told_apart() -> None:
    """x = x0: real and fake logits agree exactly, as t' and noise are shared; the hinges are 2 and R1 0 in mean."""
    networks, batch, objective = with_pixels()
    assert batch.pairs is not None
    networks = Networks(dict(networks) | {"student": Given(batch.pairs[1])}, ONE_STEP)
    loss = objective.discriminator_loss(networks, batch)
    assert loss.terms["logit_gap"] == 0 and loss.terms["latent"] == 2


def test_the_digits_network_sees_three_depths_of_the_classifier() -> None:
    pixels, network = load_digits("test")[0][:3].clone().requires_grad_(), DigitsNetwork()
    features = network(pixels)
    assert [tuple(f.shape) for f in features] == [(3, 256, 16), (3, 64, 32), (3, 16, 64)]
    assert torch.allclose(features[2], network(pixels[:, :1])[2], atol=1e-6)  # grey, whatever the number of channels
    features[-1].sum().backward()
    assert pixels.grad is not None and bool(pixels.grad.any())
    assert network(torch.rand(1, 3, 64, 64))[0].shape == (1, 256, 16)


@pytest.mark.parametrize("kind", ["vit", "sam"])
def test_a_local_vision_model_is_the_picture_network(kind: str, tmp_path: Path) -> None:
    """Of random weights: hidden states at four depths, of pictures resized and normalised as its folder says."""
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    if kind == "vit":
        config = transformers.ViTConfig(**sizes, intermediate_size=32)
        transformers.ViTModel(config).save_pretrained(tmp_path)
    else:
        vision = transformers.SamVisionConfig(
            **sizes, output_channels=8, mlp_dim=32, window_size=2, global_attn_indexes=[3]
        )
        decoder = transformers.SamMaskDecoderConfig(hidden_size=8, mlp_dim=16, num_attention_heads=2)
        prompts = transformers.SamPromptEncoderConfig(hidden_size=8, image_size=32, patch_size=8)
        config = transformers.SamConfig(
            vision_config=vision, mask_decoder_config=decoder, prompt_encoder_config=prompts
        )
        model = transformers.SamModel(config)
        for p in model.parameters():  # its own are of size 1e-10
            torch.nn.init.normal_(p, std=0.2)
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no preprocessor_config"):
        ADP(pixel_network=str(tmp_path))
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert ADP(pixel_network=str(tmp_path)).pixel_weight == 0.15
    network = VisionNetwork(tmp_path).eval()
    pixels = torch.rand(2, 3, 40, 40, requires_grad=True)
    features = network(pixels)
    assert len(features) == len(network.feature_dims) == 4 and not torch.equal(features[0], features[1])
    assert all(f.shape == (2, 16 + (kind == "vit"), 16) for f in features)
    features[0].square().sum().backward()
    assert pixels.grad is not None and bool(pixels.grad.any())
    exact = torch.rand(2, 3, 32, 32)
    normalised = (exact - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / 0.5
    first = network.encoder(normalised, output_hidden_states=True).hidden_states[1].flatten(1, -2)
    assert (network(exact)[0] - first).abs().max() < 1e-6


# --- what a recipe may say


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (ADM, {"ode_step": 0.02}, "renoise_time.low 0.02"),
        (ADM, {"ode_step": 0.0}, "ode_step"),
        (ADM, {"guidance_scale": -1.0}, "guidance_scale"),
        (ADM, {"r1_noise": 0.0}, "r1_noise"),
        (ADM, {"discriminator_updates": 0}, "discriminator_updates"),
        (ADP, {}, "pixel_weight 0.15 and pixel_network None do not go together"),
        (ADP, {"pixel_weight": 0, "pixel_network": "digits"}, "do not go together"),
        (ADP, {"pixel_network": "no/such/folder"}, "no/such/folder has no config.json"),
        (ADP, {"pixel_weight": 0, "time_power": 0}, "time_power"),
    ],
)
def test_impossible_settings_are_refused(cls: type, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cls(**options)


ADP_RECIPE = [
    "objective={name: adp, pixel_weight: 0}",
    "rollout={timesteps: [1.0]}",
    "optimizers={student: {lr: 1e-3}, latent_discriminator: {lr: 1e-3}}",
]


def test_what_a_recipe_gets_wrong_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of points, a told time, and data without pairs."""
    pixels = [
        "objective={name: adp, pixel_network: digits}",
        "rollout={timesteps: [1.0]}",
        "optimizers={student: {lr: 1}, latent_discriminator: {lr: 1}, pixel_discriminator: {lr: 1}}",
    ]
    monkeypatch.chdir(ROOT)
    for overrides, words in [
        (pixels, "backbone gaussian_mixture gives points, not pixels"),
        ([*ADP_RECIPE, "rollout.conditioning_time=0.4"], "remove rollout.conditioning_time"),
        ([*ADP_RECIPE, "data={name: prompts, prompts: [a]}"], "needs pairs, which data prompts does not provide"),
    ]:
        with pytest.raises(RecipeError, match=words):
            load_recipe(RECIPE, overrides)


def test_the_order_of_the_turns() -> None:
    """The paper's: fake score, generator, discriminator."""
    turns = ADM(fake_updates=3, discriminator_updates=2).turns(0, {})
    assert [(t.name, t.roles, t.updates) for t in turns] == [
        ("fake_score", ("fake_score",), 3),
        ("student", ("student",), 1),
        ("discriminator", ("discriminator",), 2),
    ]
    assert ADM().ode_step == 1 / 64 and ADM().needs == frozenset() and ADP(pixel_weight=0).needs == {"pairs"}


def test_pre_training_then_matching(tmp_path: Path) -> None:
    """Through the loop, which checks at the first update that each turn moves its roles and no other: ADP, and ADM
    from where it ended."""
    small = [
        "backbone.fit_steps=0",
        "backbone.width=16",
        "train.batch_size=16",
        "train.steps=1",
        "train.eval_every=0",
        "train.sample_every=0",
        "eval.num_samples=20",
        "eval.quick_num_samples=20",
        "eval.teacher_steps=[2]",
        "data={name: mixture, pair_steps: 3}",
    ]
    first, second = tmp_path / "adp", tmp_path / "adm"
    assert main([str(RECIPE), *small, *ADP_RECIPE, f"output_dir={first}"]) == 0
    policy = ["rollout={timesteps: [1.0]}", f"output_dir={second}", f"init_from={first}"]
    assert main([str(RECIPE), *small, *policy]) == 0
    rows = [json.loads(line) for line in (second / "log.jsonl").read_text().splitlines()]
    assert {"fake_score/loss", "student/loss", "discriminator/step_gap"} <= rows[0].keys()
