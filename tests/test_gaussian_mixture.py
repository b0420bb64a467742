"""The analytic teacher against its own calculus, and the small networks made from it."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgen.backbones.gaussian_mixture import (
    AnalyticDenoiser,
    GaussianMixtureConfig,
    Mixture,
    build_mixture,
    fit,
    new_network,
)
from fastgen.backbones.point_network import TimeEmbedding
from fastgen.batch import Conditioning
from fastgen.flow.tangents import tangent
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import FlowSchedule, Schedule, VPSchedule

CLASSED = GaussianMixtureConfig(
    means=((-1.0, 0.5), (2.0, 0.0), (0.3, -1.5)),
    stds=((0.4, 1.1), (0.7, 0.2), (0.9, 0.5)),
    weights=(1, 2, 5),
    classes=(0, 1, 1),
)
SINGLE = GaussianMixtureConfig(means=((0.7, -0.2),), stds=((1.3, 0.4),))
POLICY = RolloutPolicy(timesteps=(1.0, 0.5))
CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def levels(value: float | Tensor, count: int) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).expand(count)


@pytest.fixture(params=["flow", "vp"])
def schedule(request: pytest.FixtureRequest, vp_schedule: VPSchedule) -> Schedule:
    return FlowSchedule() if request.param == "flow" else vp_schedule


def test_score_from_the_posterior_mean_is_the_gradient_of_log_density(schedule: Schedule) -> None:
    """Tweedie: (alpha E[x0 | x_t] - x_t) / sigma^2 = grad log p_t, for every class and the empty prompt, with diagonal
    covariances; float64."""
    mixture = build_mixture(CLASSED)
    label = torch.tensor([0, 1, 2]).repeat_interleave(60)
    t = torch.linspace(0.02, 1.0, 60, dtype=torch.float64).repeat(3)
    x_t = 2 * randn(180, 2)
    alpha, sigma = schedule.coefficients(t, x_t)
    with torch.enable_grad():
        x = x_t.clone().requires_grad_()
        (expected,) = torch.autograd.grad(mixture.log_density(x, alpha, sigma, label).sum(), x)
    score = schedule.score(mixture.posterior_mean(x_t, alpha, sigma, label), x_t, t)
    error = ((score - expected).abs() / expected.abs().clamp_min(1)).max().item()
    print(f"relative {error:.1e}")
    assert error < 1e-8


def test_log_density_is_a_normalised_density() -> None:
    """It integrates to 1 on a grid, for a class and the empty prompt, at the data and at half noise."""
    mixture = build_mixture(CLASSED)
    axis = torch.linspace(-9, 9, 601, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    for label, level in ((1, 0.0), (2, 0.5)):
        alpha, sigma = (levels(v, len(x))[:, None] for v in (1 - level, level))
        density = mixture.log_density(x, alpha, sigma, torch.full((len(x),), label)).exp()
        total = density.sum().item() * (18 / 600) ** 2
        print(f"label {label}, t = {level}: {total:.12f}")
        assert abs(total - 1) < 1e-6


def test_a_class_is_its_components_alone() -> None:
    """Conditioning on class 0 is the single Gaussian it consists of, and class 1 the mixture of its two by weight."""
    x, t = 2 * randn(50, 2), levels(0.4, 50)
    whole = AnalyticDenoiser(build_mixture(CLASSED), FlowSchedule())
    for label, keep in ((0, [0]), (1, [1, 2])):
        part = GaussianMixtureConfig(
            means=tuple(CLASSED.means[k] for k in keep),
            stds=tuple(CLASSED.stds[k] for k in keep),
            weights=tuple((CLASSED.weights or ())[k] for k in keep),
        )
        alone = AnalyticDenoiser(build_mixture(part), FlowSchedule())
        of_class = whole(x, t, Conditioning({"label": torch.full((50,), label)}))
        difference = of_class - alone(x, t, Conditioning({"label": torch.zeros(50, dtype=torch.int64)}))
        assert difference.abs().max() < 1e-12


@pytest.mark.parametrize("t", [0.05, 0.5, 0.98])
def test_single_gaussian_closed_forms(t: float, schedule: Schedule) -> None:
    """E[x0 | x_t] = m + alpha S / V (x_t - alpha m), the noise sigma (x_t - alpha m) / V, and the velocities their
    combinations; V = alpha^2 S + sigma^2."""
    m, s = torch.tensor(SINGLE.means, dtype=torch.float64), torch.tensor(SINGLE.stds, dtype=torch.float64) ** 2
    x, level = 2 * randn(40, 2), levels(t, 40)
    alpha, sigma = schedule.coefficients(level, x)
    v = alpha**2 * s + sigma**2
    x0, noise = m + alpha * s / v * (x - alpha * m), sigma * (x - alpha * m) / v
    expected = {
        "sample": x0,
        "epsilon": noise,
        "flow_prediction": noise - x0,
        "v_prediction": alpha * noise - sigma * x0,
    }
    denoiser = AnalyticDenoiser(build_mixture(SINGLE), schedule)
    for kind, value in expected.items():
        got = denoiser(x, level, Conditioning({"label": torch.zeros(40, dtype=torch.int64)}), predict=kind)
        error = (got - value).abs().max().item()
        print(f"{kind} at {t}: {error:.1e}")
        assert error < 1e-11


def carry(mixture: Mixture, schedule: Schedule, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    return mixture.flow_map(x, schedule.coefficients(t, x), schedule.coefficients(t_next, x))


def test_flow_map_is_a_flow(schedule: Schedule) -> None:
    """Standing still is the identity, two legs are one, the way back inverts, and each point keeps its quantile: the
    standardised (x - alpha m) / sqrt(V) is constant."""
    mixture, x = build_mixture(SINGLE), 2 * randn(40, 2)
    t, r, s = levels(0.95, 40), levels(0.6, 40), levels(0.0, 40)
    middle = carry(mixture, schedule, x, t, r)
    end = carry(mixture, schedule, x, t, s)
    alpha, sigma = schedule.coefficients(t, x)
    standard = (x - alpha * mixture.means) / (alpha**2 * mixture.variances + sigma**2).sqrt()
    errors = {
        "identity": carry(mixture, schedule, x, t, t) - x,
        "two legs": carry(mixture, schedule, middle, r, s) - end,
        "back": carry(mixture, schedule, end, s, t) - x,
        "quantile": mixture.means + mixture.variances.sqrt() * standard - end,
    }
    print({name: f"{e.abs().max().item():.1e}" for name, e in errors.items()})
    assert all(e.abs().max() < 1e-12 for e in errors.values())


def test_flow_map_solves_the_probability_flow_ode() -> None:
    """Its derivative in the target time, by central differences, is the velocity at the point it has reached: in flow
    matching dx/dt = E[noise - x0 | x_t]."""
    mixture, schedule, x, h = build_mixture(SINGLE), FlowSchedule(), 2 * randn(40, 2), 1e-5
    denoiser, cond = AnalyticDenoiser(mixture, schedule), Conditioning({"label": torch.zeros(40, dtype=torch.int64)})
    start = levels(0.9, 40)
    for target in (0.9, 0.5, 0.1):
        up, here, down = (carry(mixture, schedule, x, start, levels(target + d, 40)) for d in (h, 0.0, -h))
        velocity = denoiser(here, levels(target, 40), cond, predict="flow_prediction")
        error = ((up - down) / (2 * h) - velocity).abs().max().item()
        print(f"at {target}: {error:.1e}")
        assert error < 1e-8


def test_flow_map_of_a_mixture_is_refused() -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="no closed form"):
        build_mixture(CLASSED).flow_map(x, (x, x), (x, x))


def test_exact_samples_have_the_moments_of_their_class() -> None:
    """Mean and covariance of 200,000 samples of each label, within 5 standard errors of the mixture's own."""
    mixture, n = build_mixture(CLASSED), 200_000
    for label in range(3):
        x = mixture.sample(torch.arange(n), torch.full((n,), label), key=5)
        weights = mixture.logits[label].exp()
        mean = weights @ mixture.means
        second = (
            torch.einsum("k,ki,kj->ij", weights, mixture.means, mixture.means) + (weights @ mixture.variances).diag()
        )
        cov = second - torch.outer(mean, mean)
        d = x - x.mean(0)
        products = d[:, :, None] * d[:, None, :]
        z_mean = ((x.mean(0) - mean) / x.std(0) * math.sqrt(n)).abs().max().item()
        z_cov = ((products.mean(0) - cov) / products.std(0) * math.sqrt(n)).abs().max().item()
        print(f"label {label}: mean {z_mean:.2f}, covariance {z_cov:.2f} standard errors")
        assert z_mean < 5 and z_cov < 5


def test_components_are_drawn_by_weight() -> None:
    """Inverse cdf: an even grid of u gives the weights to one part in the grid; a component of weight 0 never."""
    u = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000
    drawn = build_mixture(CLASSED).component(torch.full((8000,), 2), u)
    assert torch.equal(torch.bincount(drawn), torch.tensor([1000, 2000, 5000]))
    config = GaussianMixtureConfig(((0.0,), (1.0,), (2.0,)), (1, 1, 1), weights=(0, 1, 0))
    assert (build_mixture(config).component(torch.zeros(8000, dtype=torch.int64), u) == 1).all()


def test_a_sample_depends_only_on_its_id_label_and_key() -> None:
    mixture = build_mixture(CLASSED)
    ids, label = torch.tensor([9, 2, 40, 7, 11]), torch.tensor([0, 1, 2, 2, 1])
    x = mixture.sample(ids, label, 3)
    order = torch.tensor([4, 0, 3, 1, 2])
    assert torch.equal(mixture.sample(ids[order], label[order], 3), x[order])
    assert torch.equal(mixture.sample(ids[2:3], label[2:3], 3), x[2:3])
    assert not torch.equal(mixture.sample(ids, label, 4), x)


def test_guidance_problems_can_be_posed() -> None:
    """uncond_weights replaces the empty prompt's weights, also with components that no class draws: here class 0 is
    N(m_c, S) and the empty prompt N(m_u, S)."""
    config = GaussianMixtureConfig(
        ((1.0, 0.0), (-1.0, 0.5)), (0.5, 0.5), weights=(1, 0), classes=(0, 1), uncond_weights=(0, 1)
    )
    denoiser = AnalyticDenoiser(build_mixture(config), FlowSchedule())
    x, t = randn(30, 2), levels(0.5, 30)
    for label, mean in ((0, (1.0, 0.0)), (2, (-1.0, 0.5))):
        alone = AnalyticDenoiser(build_mixture(GaussianMixtureConfig((mean,), (0.5,))), FlowSchedule())
        got = denoiser(x, t, Conditioning({"label": torch.full((30,), label)}))
        assert (got - alone(x, t, Conditioning({"label": torch.zeros(30, dtype=torch.int64)}))).abs().max() < 1e-12


SMALL = dataclasses.replace(CLASSED, width=48, depth=2, fit_steps=500, fit_batch_size=256, fit_lr=5e-3)


@pytest.mark.slow
def test_the_fitted_network_is_close_to_the_teacher() -> None:
    """Mean squared error of the x0 prediction, over all times and labels, below 1 % of the data's variance, and half
    of what is left when training four times shorter."""
    backbone = SMALL.build(CPU, torch.float32, 0)
    short = dataclasses.replace(SMALL, fit_steps=125).build(CPU, torch.float32, 0)
    teacher = backbone.load("teacher")
    ids = torch.arange(4000)
    label = ids % 3
    x0, t = backbone.law.sample(ids, label, 77).float(), torch.linspace(0.01, 1.0, 4000)
    noise = randn(4000, 2).float()
    x_t, cond = backbone.schedule.add_noise(x0, noise, t), Conditioning({"label": label})
    with torch.no_grad():
        exact = teacher(x_t, t, cond)
        error, before = (((b.load("student")(x_t, t, cond) - exact) ** 2).mean().item() for b in (backbone, short))
    variance = x0.var(0).mean().item()
    print(f"{error / variance:.2e} of the variance, {before / variance:.2e} after a quarter of the steps")
    assert error < 0.01 * variance and error < 0.5 * before


def test_the_fit_depends_on_the_seed_alone() -> None:
    """Not on the state of torch's global generator: runs that start differently share their pretrained weights."""
    config = dataclasses.replace(SMALL, fit_steps=3)
    weights = []
    for seed, state in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(state)
        schedule = FlowSchedule()
        weights.append(fit(new_network(config, schedule), build_mixture(config), config, seed).state_dict())
    same = [name for name in weights[0] if torch.equal(weights[0][name], weights[1][name])]
    assert same == list(weights[0]), f"differ: {sorted(set(weights[0]) - set(same))}"
    assert not torch.equal(weights[0]["network.inlet.weight"], weights[2]["network.inlet.weight"])


def test_roles_are_separate_copies_of_the_same_weights() -> None:
    """student and fake_score start equal, share no tensor and are trainable; the teacher has no parameters."""
    backbone = dataclasses.replace(SMALL, fit_steps=0).build(CPU, torch.float64, 0)
    student, fake = backbone.load("student"), backbone.load("fake_score")
    for a, b in zip(student.parameters(), fake.parameters(), strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
        assert a.requires_grad and b.requires_grad and a.dtype == torch.float64
    assert not list(backbone.load("teacher").parameters())


def test_a_slower_time_embedding_has_a_smoother_derivative_in_time() -> None:
    """Of embeddings with the same weights: the root mean square of d/dt falls with the fastest frequency."""
    fast, slow = TimeEmbedding(16, 32.0), TimeEmbedding(16, 4.0)
    slow.load_state_dict(fast.state_dict())
    t = torch.linspace(0, 1, 200)
    rough = []
    for embedding, fastest in ((fast, 32.0), (slow, 4.0)):
        assert torch.isclose(embedding.frequencies.max(), torch.tensor(fastest * math.pi))
        _, derivative = tangent(embedding, (1000 * t,), (torch.full_like(t, 1000),))
        rough.append(derivative.square().mean().sqrt().item())
    print(f"root mean square of the derivative {rough[0]:.3f}, slower {rough[1]:.3f}")
    assert rough[1] < rough[0] / 3


@pytest.mark.parametrize("time_frequency", [32.0, 4.0])
def test_export_round_trip_is_equal(tmp_path: Path, time_frequency: float) -> None:
    """save_pipeline then load_exported: the same weights and outputs, frozen; config.json builds the same config."""
    config = dataclasses.replace(SMALL, fit_steps=0, time_frequency=time_frequency)
    backbone = config.build(CPU, torch.float32, 3)
    student = backbone.load("student")
    backbone.save_pipeline(student, POLICY, tmp_path / "export")
    other = dataclasses.replace(config).build(CPU, torch.float32, 99).load_exported(tmp_path / "export")
    x, t = randn(10, 2).float(), torch.linspace(0.1, 1, 10)
    cond = Conditioning({"label": torch.arange(10) % 3})
    assert torch.equal(student(x, t, cond), other(x, t, cond))
    assert not any(p.requires_grad for p in other.parameters()) and not other.training
    assert GaussianMixtureConfig(**json.loads((tmp_path / "export" / "config.json").read_text())) == config


def test_prompts_are_class_labels() -> None:
    """ "0".."C-1" and the empty prompt; another prompt is refused by name."""
    backbone = dataclasses.replace(SMALL, fit_steps=0).build(CPU, torch.float32, 0)
    assert backbone.encode_prompts(["1", "", "0"])["label"].tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match="'2'"):
        backbone.encode_prompts(["1", "2"])


REFUSALS = {
    "stds": [{"stds": (1.0, 1.0)}, {"stds": (1.0, 1.0, -0.1)}, {"stds": (1.0, 0.0, 1.0)}, {"stds": ((1.0,),) * 3}],
    "weights": [{"weights": (1, 2)}, {"weights": (1, -1, 1)}, {"weights": (0, 0, 0)}],
    "uncond_weights": [{"uncond_weights": (1, 2)}, {"uncond_weights": (1, -1, 1)}],
    "classes": [{"classes": (0, 1)}, {"classes": (0, 2, 2)}, {"classes": (1, 1, 1)}, {"classes": (-1, 0, 0)}],
    "mean": [{"means": ((0.0, 0.0), (1.0, 1.0), (2.0,))}],
    "means": [{"means": ()}],
    "width": [{"width": 0}],
}


@pytest.mark.parametrize(("field", "change"), [(f, c) for f, cs in REFUSALS.items() for c in cs])
def test_impossible_mixtures_are_refused_by_field(field: str, change: dict[str, object]) -> None:
    """Wrong lengths, stds that are not positive, weights that are none, classes with gaps: the field is named."""
    good = {"means": ((0.0, 0.0), (1.0, 1.0), (2.0, 0.0)), "stds": (1.0, 1.0, 1.0), "classes": (0, 1, 1)}
    GaussianMixtureConfig(**good)
    with pytest.raises(ValueError, match=rf"\b{field}\b"):
        GaussianMixtureConfig(**good | change)


@pytest.mark.parametrize("field", ["means", "stds", "weights"])
def test_numbers_that_are_not_finite_are_refused(field: str) -> None:
    good = {"means": ((0.0,), (1.0,)), "stds": (1.0, 1.0), "weights": (1.0, 1.0)}
    bad = {"means": ((math.nan,), (1.0,)), "stds": (1.0, math.nan), "weights": (math.inf, 1.0)}
    with pytest.raises(ValueError, match=field):
        GaussianMixtureConfig(**good | {field: bad[field]})
