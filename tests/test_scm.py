"""The scm objective: the exact consistency function, the conversion, each named part, and what it refuses."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import (
    GAUSSIAN,
    RENOISE,
    GaussianMap,
    M,
    Recorder,
    S,
    consistency_map,
    consistency_networks,
    exact_networks,
    gaussian_batch,
    mixed_teacher,
    one_loss,
    reached,
    spread,
    tiny_backbone,
    tiny_networks,
)
from torch import Tensor, nn

from fastgen.batch import Conditioning
from fastgen.config import build_recipe, load_recipe
from fastgen.denoiser import NO_INPUTS
from fastgen.evaluation.evaluate import evaluate
from fastgen.flow import flow_maps
from fastgen.flow.flow_maps import edm_heun_step, euler_path, heun_step, trig_tangent
from fastgen.modules.heads import LevelWeight
from fastgen.networks import Networks
from fastgen.objectives import SCM
from fastgen.objectives.ladd import Ladd
from fastgen.objectives.rcm import Matching
from fastgen.objectives.scm import States, TrustTurn
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.sampler import load_sampler
from fastgen.schedule import TimeSampler, expand, flow_to_trig, flow_to_trig_velocity, trig_angle, trig_to_flow
from fastgen.train import train

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "recipes/mixture_scm_4step.yaml")
F64 = torch.float64
WARM = TrustTurn("student", ("student",), trust=1.0)
PLAIN = SCM(warmup=0, learned_weight=False, tangent_norm="rms", normaliser=0.1)


# --- the exact function


def exact_rate(sigma_data: float = 1.0):  # type: ignore[no-untyped-def]
    """sigma_d F of the exact consistency function, and the exact dx/da."""
    student, teacher = (network.requires_grad_(False) for network in (consistency_map(), GaussianMap()))

    def rate(x: Tensor, angle: Tensor) -> Tensor:
        x_flow, t = trig_to_flow(x, angle, sigma_data)
        velocity = student(x_flow, t, Conditioning({}), predict="flow_prediction")
        return flow_to_trig_velocity(velocity, x, angle, sigma_data)

    def along(x: Tensor, angle: Tensor) -> Tensor:
        x_flow, t = trig_to_flow(x, angle, sigma_data)
        velocity = teacher(x_flow, t, Conditioning({}), predict="flow_prediction")
        return flow_to_trig_velocity(velocity, x, angle, sigma_data)

    return rate, along


def points(n: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    angle = torch.rand(n, generator=generator, dtype=F64) * 1.5 + 0.05
    return M + torch.randn(n, 2, generator=generator, dtype=F64), angle


@pytest.mark.parametrize("sigma_data", [1.0, 0.5, 1.43])
def test_the_exact_function_has_no_tangent(sigma_data: float) -> None:
    rate, along = exact_rate(sigma_data)
    x, angle = points()
    _, g = trig_tangent(rate, x, angle, along(x, angle))
    assert float(g.abs().max()) < 1e-12
    _, cold = trig_tangent(rate, x, angle, along(x, angle), warmup=0.5)
    assert float(cold.abs().max()) > 0.01


def test_golden_tangent() -> None:
    """F = 0 at a = 0.8, x = 1: -0.596958; and the rate and its clean prediction there."""
    x, angle = torch.ones(1, 1, dtype=F64), torch.tensor([0.8], dtype=F64)
    rate, along = exact_rate()
    _, g = trig_tangent(lambda x, a: 0 * x * expand(a, x), x, angle, along(x, angle))
    assert float(g) == pytest.approx(-0.596958, abs=1e-6)
    assert float(along(x, angle)) == pytest.approx(-0.200187, abs=1e-6)
    clean = torch.cos(angle) * x - torch.sin(angle) * rate(x, angle)
    assert float(clean) == pytest.approx(1.021209, abs=1e-6)


def test_the_tangent_is_cos_a_times_that_of_f() -> None:
    """For any network, against finite differences of f along the trajectory: the sign guard."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).double().requires_grad_(False)
    x, angle = points()
    v = torch.randn(64, 2, dtype=F64)

    def rate(x: Tensor, a: Tensor) -> Tensor:
        return net(torch.cat([x, a[:, None]], 1))

    def f(x: Tensor, a: Tensor) -> Tensor:
        return expand(torch.cos(a), x) * x - expand(torch.sin(a), x) * rate(x, a)

    h = 1e-5
    wanted = expand(torch.cos(angle), x) * (f(x + h * v, angle + h) - f(x - h * v, angle - h)) / (2 * h)
    value, g = trig_tangent(rate, x, angle, v)
    assert torch.equal(value, rate(x, angle))
    assert torch.allclose(g, wanted, atol=1e-8)


def test_angles_and_states_convert_back() -> None:
    for sigma_data in (1.0, 0.5):
        angle = torch.linspace(0, math.pi / 2, 9, dtype=F64)
        x = torch.randn(9, 3, dtype=F64)
        x_flow, t = trig_to_flow(x, angle, sigma_data)
        assert torch.allclose(trig_angle(t, sigma_data), angle, atol=1e-12)
        assert torch.allclose(flow_to_trig(x_flow, angle, sigma_data), x)


# --- the loss


@pytest.mark.parametrize("source", ["data", "trajectory"])
@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_the_exact_function_has_no_loss(source: Any, sigma_data: float) -> None:
    """The loss at F^- is |g / (|g| + c)|^2: nearly quadratic while |g| is far below c."""
    objective = dataclasses.replace(PLAIN, source=source, sigma_data=sigma_data)
    at = [float(one_loss(objective, consistency_networks(off), gaussian_batch(), WARM)) for off in (0.0, 1e-4, 1e-3)]
    print(at)
    assert at[0] < 1e-15 and 80 < at[2] / at[1] < 110


def test_from_data_the_mean_gradient_vanishes_at_the_exact_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the tangent's normalisation, which weighs by the noise (4 standard errors of 60 batches)."""
    monkeypatch.setattr(flow_maps, "trig_tangent", lambda *args, **kwargs: scaled(trig_tangent(*args, **kwargs)))

    def scaled(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pair[0], 1e-6 * pair[1]  # far below c: the normalisation is the factor 1 / c

    objective = dataclasses.replace(PLAIN, teach="data")
    networks, found = consistency_networks(), []
    del networks.modules["teacher"]
    for key in range(60):
        loss = one_loss(objective, networks, gaussian_batch(key=key), WARM)
        found.append(float(torch.autograd.grad(loss, networks.student.off)[0]) * 1e5)  # type: ignore[arg-type]
    mean = torch.tensor(found)
    error = float(mean.mean().abs() / (mean.std() / 60**0.5))
    print(f"{error:.2f} standard errors, one batch {mean.std():.3f}")
    assert error < 4 and float(mean.std()) > 1e-3


def test_the_gradient_is_that_of_the_pseudo_objective() -> None:
    """d loss / d theta = -2 mean g_normalised . dF / d theta: F^- and g are constants."""
    networks, batch = consistency_networks(0.05), gaussian_batch()
    states = PLAIN.noised(networks, batch)
    total, terms = PLAIN.consistency_loss(networks, states, 1.0)
    (found,) = torch.autograd.grad(total, networks.student.off)  # type: ignore[arg-type]
    angle = trig_angle(states.t)
    x = flow_to_trig(states.x, angle)
    rate = PLAIN.trig_velocity(networks.student, states.cond, NO_INPUTS)
    _, g = trig_tangent(rate, x, angle, flow_to_trig_velocity(states.velocity, x, angle))
    size = g.square().mean(1, keepdim=True).sqrt()
    assert torch.allclose(terms["tangent"], size.mean())
    live = rate(x, angle)
    (wanted,) = torch.autograd.grad(-2 * (g / (size + 0.1) * live).mean(), networks.student.off)  # type: ignore[arg-type]
    assert torch.allclose(found, wanted)


def test_the_derivative_is_trusted_by_degrees() -> None:
    objective = SCM(warmup=4)
    assert [objective.turns(k, {})[-1].trust for k in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]  # type: ignore[attr-defined]
    assert SCM(warmup=0).turns(0, {})[-1].trust == 1.0  # type: ignore[attr-defined]
    cold = TrustTurn("student", ("student",), trust=0.0)
    networks, batch = consistency_networks(), gaussian_batch()
    assert float(one_loss(PLAIN, networks, batch, WARM)) < 1e-15 < float(one_loss(PLAIN, networks, batch, cold))


def test_rcms_warm_up_keeps_the_whole_derivative() -> None:
    """At r = 1 it is sCM's; at r = 0 the pull is cos a, not cos^2 a, and dF/da is there; between, x is scaled by r."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).double().requires_grad_(False)
    x, angle = points()
    v = torch.randn(64, 2, dtype=F64)
    cos, sin = (expand(f(angle), x) for f in (torch.cos, torch.sin))

    def g(warmup: float, whole: bool) -> Tensor:
        rate = lambda x, a: net(torch.cat([x, a[:, None]], 1))  # noqa: E731
        return trig_tangent(rate, x, angle, v, warmup, whole_derivative=whole)[1]

    assert torch.allclose(g(1.0, True), g(1.0, False))
    pull = net(torch.cat([x, angle[:, None]], 1)) - v
    derivative = -cos * sin * x - g(1.0, False) - cos**2 * pull
    wanted = -cos * (1 - (0.3 * sin) ** 2).sqrt() * pull - 0.3 * cos * sin * x - derivative
    assert torch.allclose(g(0.3, True), wanted)
    networks, batch = consistency_networks(0.3), gaussian_batch()
    half = TrustTurn("student", ("student",), trust=0.5)
    forms = [dataclasses.replace(PLAIN, warmup_form=form) for form in ("scm", "rcm")]
    losses = [float(one_loss(form, networks, batch, half).detach()) for form in forms]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_the_tangent_has_norm_one_and_squares_are_summed_on_request() -> None:
    """l2: |g| / (|g| + c), whatever the number of elements; rms: a root mean square. sum: D times the mean."""
    networks, batch = consistency_networks(0.3), gaussian_batch()
    states = PLAIN.noised(networks, batch)

    def loss(**options: Any) -> Tensor:
        return dataclasses.replace(PLAIN, **options).consistency_loss(networks, states, 1.0)[0].detach()

    angle = trig_angle(states.t)
    x = flow_to_trig(states.x, angle)
    rate = PLAIN.trig_velocity(networks.student, states.cond, NO_INPUTS)
    _, g = trig_tangent(rate, x, angle, flow_to_trig_velocity(states.velocity, x, angle))
    for name, size in (("l2", g.norm(dim=1)), ("rms", g.square().mean(1).sqrt())):
        wanted = (g / (size + 0.1)[:, None]).square().mean()
        assert torch.allclose(loss(tangent_norm=name), wanted)
        assert torch.allclose(loss(tangent_norm=name, reduction="sum"), 2 * wanted)


def test_without_trust_the_student_is_a_denoiser_of_the_teachers_velocity() -> None:
    """At r = 0 the loss vanishes where F is the teacher's own, whose derivative does not count."""
    networks = exact_networks(GaussianMap(), RENOISE)  # told no s: the velocity
    cold = TrustTurn("student", ("student",), trust=0.0)
    assert float(one_loss(PLAIN, networks, gaussian_batch(), cold)) < 1e-15


def test_the_learned_weight_has_its_optimum_where_the_weighted_square_is_one() -> None:
    """d / dw of e^w p square - w is p e^w square - 1; p = 1 / (sigma_d tan a)."""
    objective = SCM(warmup=0, sigma_data=0.5)
    networks, batch = consistency_networks(0.3), gaussian_batch()
    networks.modules["weighting"] = LevelWeight().double()
    total = one_loss(objective, networks, batch, WARM)
    (found,) = torch.autograd.grad(total, networks["weighting"].bias)  # type: ignore[arg-type]
    states = objective.noised(networks, batch)
    angle = trig_angle(states.t, 0.5)
    plain = dataclasses.replace(objective, learned_weight=False)
    squares = [plain.consistency_loss(networks, row(states, i), 1.0)[0].detach() for i in range(len(states.t))]
    wanted = (torch.stack(squares) / (0.5 * torch.tan(angle))).mean() - 1
    assert float(found) == pytest.approx(float(wanted))


def row(states: States, i: int) -> States:
    one = slice(i, i + 1)
    return States(states.x[one], states.t[one], states.velocity[one], states.cond.select(one), NO_INPUTS)


def test_a_sample_that_is_not_finite_does_not_count() -> None:
    networks, batch = consistency_networks(0.3), gaussian_batch()
    states = PLAIN.noised(networks, batch)
    states.velocity[3] = math.nan
    total, _ = PLAIN.consistency_loss(networks, states, 1.0)
    assert bool(torch.isfinite(total))


def test_the_differences_backend_is_close_to_the_derivative() -> None:
    networks, batch = consistency_networks(0.3), gaussian_batch()

    def loss(**options: Any) -> float:
        return float(one_loss(dataclasses.replace(PLAIN, **options), networks, batch, WARM))

    found = [loss(derivative=backend) for backend in ("jvp", "difference")]
    assert found[0] == pytest.approx(found[1], rel=1e-2) and found[0] != found[1]
    wide = loss(derivative="difference", difference_step=0.3)
    assert abs(wide - found[0]) > 10 * abs(found[1] - found[0])


# --- where x comes from


def test_levels_have_the_papers_law() -> None:
    """sigma_d tan a is lognormal(-1, 1.4) at the authors' sigma_d = 0.5; the angle is that of latents of std 1."""
    t = SCM().time(gaussian_batch(20000).uniform("time"))
    ratio = torch.tan(trig_angle(t, 1.0)).mul(0.5).log()
    assert float(ratio.mean()) == pytest.approx(-1, abs=0.03) and float(ratio.std()) == pytest.approx(1.4, abs=0.03)


def test_a_trajectory_is_the_teachers_with_a_level_in_each_interval() -> None:
    """TBCM: many steps lie on the exact curve from the same noise; every state has the teacher's velocity there; a
    rotation of the TrigFlow state is the Euler step."""
    networks, batch = consistency_networks(), gaussian_batch(32)
    errors = []
    for steps in (16, 64):
        objective = dataclasses.replace(PLAIN, source="trajectory", trajectory_steps=steps, trajectory_shift=2.5)
        assert objective.needs == frozenset()
        states = objective.trajectory(networks, batch)
        assert len(states.t) == 32 * steps
        t, x0 = states.t.reshape(steps, 32), batch.normal("initial")
        assert bool((t[1:] <= t[:-1]).all())
        edges = torch.linspace(1, 0, steps + 1, dtype=F64)
        edges = 2.5 * edges / (1 + 1.5 * edges)
        assert bool((t <= edges[:-1, None] + 1e-9).all()) and bool((t >= edges[1:, None] - 1e-9).all())
        exact = (1 - states.t)[:, None] * M + spread(states.t)[:, None] * x0.repeat(steps, 1)
        errors.append(float((states.x - exact).abs().mean()))
        v = networks.teacher(states.x, states.t, states.cond, predict="flow_prediction")
        assert torch.allclose(states.velocity, v)
    print(errors)
    assert errors[1] < errors[0] / 3 < 0.03
    angle, h = trig_angle(states.t[:32]), 0.01
    x = flow_to_trig(states.x[:32], angle)
    rotated = math.cos(h) * x - math.sin(h) * flow_to_trig_velocity(states.velocity[:32], x, angle)
    stepped, t = trig_to_flow(rotated, angle - h)
    assert torch.allclose(stepped, states.x[:32] - (states.t[:32] - t)[:, None] * states.velocity[:32])


def test_solver_steps() -> None:
    """Euler and Heun on dx/dt = x: first and second order. Heun in sigma on a Gaussian: second order, and Euler's step
    from t = 1."""
    x, t = torch.ones(1, 1, dtype=F64), torch.ones(1, dtype=F64)
    exact = math.exp(-0.1)
    (path,) = euler_path(lambda x, t: x, x, [t - 0.1])
    heun = heun_step(lambda x, t: x, x, t, t - 0.1)
    assert float(path[0]) == pytest.approx(0.9) and float(heun) == pytest.approx(exact, abs=2e-4)
    velocity: Any = lambda x, t: GaussianMap()(x, t, Conditioning({}), predict="flow_prediction")  # noqa: E731
    x, start, errors = torch.full((1, 2), 1.4, dtype=F64), torch.tensor([0.9], dtype=F64), []
    for end in (0.8, 0.85):
        stop = torch.tensor([end], dtype=F64)
        exact_end = (1 - end) * M + (x - 0.1 * M) * spread(stop) / spread(start)
        errors.append(float((edm_heun_step(velocity, x, start, stop) - exact_end).abs().max()))
    print(errors)
    assert errors[0] < 5e-3 and errors[1] < errors[0] / 6
    one, low = torch.ones(1, dtype=F64), torch.full((1,), 0.6, dtype=F64)
    assert torch.equal(edm_heun_step(velocity, x, one, low), euler_path(velocity, x, [low])[0][0])


@pytest.mark.parametrize("source", ["data", "trajectory"])
def test_guidance_is_drawn_by_sample_and_told(source: Any) -> None:
    batch, teacher = gaussian_batch(16, uncond=2), mixed_teacher()
    networks = consistency_networks(0.0, RolloutPolicy((1.0,), embedded_guidance=3.0))
    networks.modules["teacher"] = teacher
    objective = dataclasses.replace(PLAIN, source=source, guidance_range=(2.0, 6.0), trajectory_steps=4)
    objective.check(networks.policy)
    states = objective.trajectory(networks, batch) if source == "trajectory" else objective.noised(networks, batch)
    w = states.inputs.guidance
    times = 4 if source == "trajectory" else 1
    assert torch.equal(w, (2 + 4 * batch.uniform("guidance")).repeat(times))
    uncond = Conditioning.cat([batch.uncond] * times)
    on, off = (teacher(states.x, states.t, c, predict="flow_prediction") for c in (states.cond, uncond))
    assert torch.allclose(states.velocity, off + w[:, None] * (on - off))
    untold = consistency_networks()
    untold.modules["teacher"] = teacher
    assert objective.noised(untold, batch).inputs == NO_INPUTS


# --- adversarial and distribution matching


GAN = dataclasses.replace(PLAIN, gan=Ladd(weight=0.5))
RCM = SCM(warmup=2, learned_weight=False, matching=Matching(fake_updates=3), matching_weight=0.5)


def moved_networks(objective: SCM) -> Networks:
    """Small networks, the student's weights off their start."""
    backbone = tiny_backbone(dataclasses.replace(GAUSSIAN, classes=(0,)))
    networks = tiny_networks(objective, RENOISE, backbone=backbone)
    with torch.no_grad():
        for p in networks.student.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return networks


@pytest.mark.parametrize(
    "objective",
    [SCM(warmup=0), GAN, RCM, dataclasses.replace(PLAIN, source="trajectory")],
    ids=["plain", "adversarial", "matching", "trajectory"],
)
def test_each_turn_moves_its_own_networks(objective: SCM) -> None:
    networks = moved_networks(objective)
    assert set(objective.trained_roles) <= set(networks) | {"weighting"}
    for turn in objective.turns(5, {}):
        loss = objective.loss(turn, networks, gaussian_batch(), {})
        loss.total.backward()
        assert not any(term.requires_grad for term in loss.terms.values())
        for role, module in networks.items():
            missing = {name for name, found in reached(module).items() if not found}
            if role in turn.roles:
                assert missing <= {"network.label.weight", "outer.0.bias"}, missing  # the hinge is linear at first
            else:
                assert not any(reached(module).values()), role
            module.zero_grad()
    roles = [role for turn in objective.turns(5, {}) for role in turn.roles]
    assert sorted(roles) == sorted(objective.trained_roles)


def test_matching_waits_for_the_tangent() -> None:
    """rCM: sCM alone while the tangent warms up, then DMD2's turns and its loss, matching_weight times."""
    assert [turn.name for turn in RCM.turns(0, {})] == ["student"]
    assert [(turn.name, turn.updates) for turn in RCM.turns(1, {})] == [("fake_score", 3), ("student", 1)]
    networks, batch = moved_networks(RCM), gaussian_batch()
    cold, warm = (RCM.turns(step, {})[-1] for step in (0, 1))
    assert "dm_grad" not in RCM.loss(cold, networks, batch, {}).terms
    loss = RCM.loss(warm, networks, batch, {})
    assert RCM.matching is not None and "dm_grad" in loss.terms
    alone = dataclasses.replace(RCM, matching=None)
    wanted = one_loss(alone, networks, batch, warm) + 0.5 * 2 * RCM.matching.student_loss(networks, batch).total
    assert torch.allclose(loss.total, wanted)


def test_the_matching_term_is_summed_where_the_square_is() -> None:
    """The ratio of rCM's two terms does not depend on the reduction."""
    networks, batch, warm = moved_networks(RCM), gaussian_batch(), RCM.turns(1, {})[-1]
    mean = one_loss(RCM, networks, batch, warm)
    total = one_loss(dataclasses.replace(RCM, reduction="sum"), networks, batch, warm)
    assert torch.allclose(total, 2 * mean)


def test_matching_simulates_at_random_levels() -> None:
    """rCM: levels fall from 1 by a running minimum, each sample has its own, and the number of calls is shared. The
    last call alone has gradient; the two turns of an update draw the same kind of simulation."""
    matching = Matching(simulation_time=TimeSampler(low=0.1, high=0.9), simulation_steps=3)
    student = Recorder(consistency_map())
    networks, counts = exact_networks(student, RENOISE), set()
    for key in range(12):
        batch = gaussian_batch(64, key)
        student.calls.clear()
        rollout = matching.rollout(networks, batch, grad=True)
        levels = [call.t for call in student.calls]
        counts.add(len(levels))
        assert bool((rollout.stop == len(levels) - 1).all()) and bool((levels[0] == 1).all())
        draws = [matching.simulation_time(batch.uniform(f"simulation_time{i}")) for i in range(1, len(levels))]  # type: ignore[misc]
        for i, level in enumerate(levels[1:]):
            assert torch.equal(level, torch.stack(draws[: i + 1]).amin(0))
        assert torch.equal(rollout.steps[-1].t, levels[-1]) and rollout.x.requires_grad
        assert not rollout.steps[-1].x_t.requires_grad
        assert not matching.rollout(networks, batch, grad=False).x.requires_grad
    assert counts == {1, 2, 3}
    fixed = Matching(simulation_time=None)
    student.calls.clear()
    fixed.rollout(networks, gaussian_batch(64), grad=False)
    assert set(torch.cat([call.t for call in student.calls]).tolist()) <= set(RENOISE.timesteps)


@pytest.mark.parametrize("keys", [{"embedding": {}}, {"simulation_time": None, "student_input": "data"}])
def test_matching_is_given_the_data_that_it_needs(keys: dict[str, Any]) -> None:
    assert SCM(source="trajectory", matching=Matching(**keys)).needs == {"latents"}
    assert SCM(source="trajectory", matching=Matching()).needs == SCM(source="trajectory").needs == set()


def test_matching_shares_a_simulation_on_request() -> None:
    for share in (False, True):
        fake_turn = SCM(matching=Matching(share_rollout=share), warmup=0).turns(0, {})[0]
        assert fake_turn.name == "fake_score" and fake_turn.one_rollout == share
    networks = exact_networks(consistency_map(), RENOISE)
    batch = dataclasses.replace(gaussian_batch(8), shared={})
    first = Matching().rollout(networks, batch, grad=False)
    assert Matching().rollout(networks, dataclasses.replace(batch, key=5), grad=False) is first
    assert Matching().rollout(networks, dataclasses.replace(batch, key=5), grad=True) is not first


def test_the_adversarial_term_moves_samples_where_d_is_higher() -> None:
    """Heads that read the first coordinate's sign: descent of the student's term raises it."""
    networks, batch = consistency_networks(), gaussian_batch(256)
    networks.modules |= GAN.gan.networks(tiny_backbone(GAUSSIAN))  # type: ignore[union-attr]
    networks.modules["features"].double()
    networks.modules["discriminator"] = First()
    networks["features"].network.blocks[0] = First()  # type: ignore[union-attr]
    generated = GAN.generated(networks, batch)
    started = float((generated - (M + S * batch.normal("noise"))).abs().amax(1).lt(1e-9).double().mean())
    assert started == pytest.approx(0.5, abs=0.1)  # max_time: those from pure noise
    gan = Ladd(weight=1.0)
    direct = -gan.logits(networks, batch, generated, "gan", None, None).mean()
    assert torch.equal(gan.student_loss(networks, batch, generated), direct)
    hinge = dataclasses.replace(gan, generator="hinge").student_loss(networks, batch, generated)
    logits = gan.logits(networks, batch, generated, "gan", None, None)
    assert bool((logits > 1).any()) and torch.allclose(hinge, torch.relu(1 - logits).mean())


class First(nn.Module):
    def forward(self, x: Any) -> Tensor:
        return x[-1].mean(1)[:, :1] if isinstance(x, list) else x


def test_the_discriminators_hinge_and_its_further_fakes() -> None:
    networks, batch = moved_networks(GAN), gaussian_batch(64)
    gan = Ladd(weight=0.5)
    fake, real = batch.latents + 3, batch.latents  # type: ignore[operator]
    fakes, reals = (
        gan.logits(networks, batch, x, f"gan_{name}", None, None) for x, name in ((fake, "fake"), (real, "real"))
    )
    wanted = torch.relu(1 + fakes).mean() + torch.relu(1 - reals).mean()
    fake, real = (x.clone().requires_grad_() for x in (fake, real))
    loss = gan.discriminator_loss(networks, batch, fake, real)
    loss.total.backward()
    assert torch.allclose(loss.total, wanted) and fake.grad is None and real.grad is None
    assert torch.allclose(loss.terms["logit_gap"], reals.mean() - fakes.mean())
    assert not any(term.requires_grad for term in loss.terms.values())
    label = torch.arange(64) % 2
    mixed = dataclasses.replace(batch, cond=Conditioning({"label": label}))
    more = dataclasses.replace(gan, mismatched=True)
    others = gan.logits(networks, mixed, real, "gan_other", None, None, roll=-1)
    fakes, reals = (
        gan.logits(networks, mixed, x, f"gan_{name}", None, None) for x, name in ((fake, "fake"), (real, "real"))
    )
    wanted = torch.relu(1 + torch.cat([fakes, others])).mean() + torch.relu(1 - reals).mean()
    total = more.discriminator_loss(networks, mixed, fake, real).total
    total.backward()
    assert torch.allclose(total, wanted) and fake.grad is None and real.grad is None
    straight = gan.logits(networks, mixed, real, "gan_other", None, None)
    assert not torch.allclose(straight, others)


# --- refusals


def test_what_cannot_be_is_refused() -> None:
    for text, lines in {
        "does not call the teacher": ["objective.teach=data", "objective.source=trajectory"],
        "low < high": ["objective.guidance_range=[4.0, 2.0]"],
        "use renoise": ["rollout.transition=ode"],
        "not conditioned on the level where": ["rollout.two_time=true"],
        "rollout.embedded_guidance 3": ["rollout.embedded_guidance=3.0"],
        "matching.gan_weight": ["objective.matching={gan_weight: 0.1}"],
        "speak of the student's own levels": ["objective.matching={condition_on_stop: true}"],
        "renoise_range and student_input speak": ["objective.matching={renoise_range: step}"],
        "leave them out, or set simulation_time": ["objective.matching={student_input: data}"],
        "make it at least 2, and better 32": [
            "objective.matching={embedding: {}}",
            "train.batch_size=1",
            "optimizers.fake_score={lr: 1.0e-3}",
        ],
        "would hide from it": [
            "objective.matching={guidance_scale: 1.0}",
            "rollout={timesteps: [1.0], conditioning_time: 0.4}",
        ],
        "prompts of other samples.*batch_size is 1": [
            "objective.gan={weight: 0.5, mismatched: true}",
            "train.batch_size=1",
            "optimizers.discriminator={lr: 1.0e-3}",
        ],
        "sigma_data is the unit of mean": ["objective.time={law: uniform, sigma_data: 0.5}"],
    }.items():
        with pytest.raises(RecipeError, match=text):
            load_recipe(RECIPE, lines)
    fake = "optimizers.fake_score={lr: 1.0e-3}"
    recipe = load_recipe(RECIPE, ["objective.matching={fake_updates: 2}", fake])
    assert recipe.objective.matching.fake_updates == 2
    load_recipe(RECIPE, ["objective.gan={weight: 0.5}", "optimizers.discriminator={lr: 1.0e-3}"])


@pytest.mark.slow
def test_a_short_run_learns(tmp_path: Path) -> None:
    """A two-component mixture, 600 updates, four steps; the run resumes with its networks."""
    raw: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "backbone": {
            "name": "gaussian_mixture",
            "means": [[1.0, 0.0], [-1.0, 0.0]],
            "stds": [0.3, 0.3],
            "width": 64,
            "fit_steps": 300,
        },
        "rollout": {"timesteps": [1.0, 0.75, 0.5, 0.25]},
        "data": {"name": "mixture"},
        "objective": {
            "name": "scm",
            "warmup": 400,
            "derivative": "difference",
            "difference_step": 0.2,
            "time": {"law": "logit_normal", "low": 0.0, "high": 1.0, "mean": 0.0, "std": 1.6},
        },
        "optimizers": {"student": {"lr": 1e-3, "decay": "cosine", "weight_decay": 0.0}, "weighting": {"lr": 1e-3}},
        "train": {"steps": 600, "batch_size": 256, "sample_every": 0, "checkpoint_every": 300, "log_every": 100},
        "eval": {"metrics": ["energy_distance"], "num_samples": 2000, "quick_num_samples": 2000, "batch_size": 2000},
    }
    recipe = build_recipe(raw)
    run = train(recipe)
    found = evaluate(load_sampler(run), recipe.eval, progress=False)["metrics"]["energy_distance"]
    print(found)
    assert found < 0.05
