"""The consistency objective: closed-form optima of finite grids, its curricula, its phases, and what it refuses."""

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
    average_velocity,
    consistency_map,
    consistency_networks,
    exact_networks,
    gaussian_batch,
    mixed_teacher,
    one_loss,
    spread,
    tiny_backbone,
    tiny_networks,
)
from torch import Tensor, nn

from fastgen.backbones.sd import SDConfig
from fastgen.batch import Batch, Conditioning
from fastgen.config import build_recipe, load_recipe
from fastgen.denoiser import Denoiser, Inputs
from fastgen.evaluation.evaluate import evaluate
from fastgen.flow.time_pairs import GridPairs, ShrinkingPairs, drawn_scale, phase_edges, ratio_gap
from fastgen.modules.lora import LoraConfig
from fastgen.networks import Networks
from fastgen.objectives import Consistency
from fastgen.objectives.consistency import ConsistencyTurn
from fastgen.objectives.ladd import Ladd
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy, sample
from fastgen.sampling.sampler import load_sampler
from fastgen.schedule import FlowSchedule, Schedule, VPSchedule, expand
from fastgen.train import train

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "recipes/mixture_consistency_4step.yaml")
F64 = torch.float64
FOUR = GridPairs(count=4)


def optimal_slopes(n: int) -> Tensor:
    """[n + 1]: prod_i ((1 - t_{i-1}) (1 - t_i) s^2 + t_{i-1} t_i) / S(t_i)^2, the optimum of n intervals."""
    t = torch.linspace(0, 1, n + 1, dtype=F64)
    ratio = ((1 - t[:-1]) * (1 - t[1:]) * S**2 + t[:-1] * t[1:]) / spread(t[1:]) ** 2
    return torch.cat([torch.ones(1, dtype=F64), ratio.cumprod(0)])


class SlopeStudent(Denoiser):
    """f(x, t) = m + slope_i (x - alpha m) at level t = i / n; its n + 1 slopes are its parameters."""

    def __init__(self, slopes: Tensor, schedule: Schedule | None = None):
        super().__init__(nn.Identity(), schedule or FlowSchedule(), "sample")
        self.slopes = nn.Parameter(slopes.clone())

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        index = (t * (len(self.slopes) - 1)).round().long()
        return M + expand(self.slopes[index], x_t) * (x_t - expand(self.schedule.alpha(t), x_t) * M)


def gradient(objective: Consistency, student: SlopeStudent, count: int = 4096, key: int = 0) -> Tensor:
    loss = one_loss(objective, exact_networks(student, RENOISE), gaussian_batch(count, key))
    return torch.autograd.grad(loss, student.slopes)[0]


# --- optima of finite grids


def test_published_standard_deviations_of_finite_grids() -> None:
    """methods: 0.200, 0.341, 0.456, 0.494, 0.499 for N = 2, 4, 16, 128, 1024, against 0.5."""
    found = [float(optimal_slopes(n)[-1]) for n in (2, 4, 16, 128, 1024)]
    assert found == pytest.approx([0.200, 0.341, 0.456, 0.494, 0.499], abs=6e-4)


@pytest.mark.parametrize("distance", ["huber", "square"])
def test_distillation_has_no_loss_at_its_closed_form_optimum(distance: Any) -> None:
    """Four Euler steps: exactly those slopes, and not the exact map's."""
    objective = Consistency(grid=FOUR, distance=distance)
    batch = gaussian_batch(512)
    at = [
        float(one_loss(objective, exact_networks(student, RENOISE), batch))
        for student in (SlopeStudent(optimal_slopes(4)), consistency_map())
    ]
    print(at)
    assert at[0] < 1e-12 and at[1] > 1e-3


def test_the_logged_error_is_the_root_mean_square_of_what_the_loss_weighs() -> None:
    objective, networks = Consistency(grid=FOUR, distance="square"), exact_networks(consistency_map(), RENOISE)
    loss: Any = objective.loss(objective.turns(0, {})[-1], networks, gaussian_batch(512), {})
    assert float(loss.terms["error"]) == pytest.approx(float(loss.total) ** 0.5, rel=1e-6)


def test_on_a_variance_preserving_path_too(vp_schedule: VPSchedule) -> None:
    """LCM's DDIM step: prod (alpha alpha' s^2 + sigma sigma') / (alpha^2 s^2 + sigma^2), and x itself at t = 0."""
    n = 10
    t = torch.linspace(0, 1, n + 1, dtype=F64)
    a, b = vp_schedule.alpha(t), vp_schedule.sigma(t)
    slopes = ((a[1:] * a[:-1] * S**2 + b[1:] * b[:-1]) / (a[1:] ** 2 * S**2 + b[1:] ** 2)).cumprod(0)

    student = SlopeStudent(torch.cat([torch.ones(1, dtype=F64), slopes]), vp_schedule)
    networks = exact_networks(student, RENOISE)
    networks.teacher.schedule = vp_schedule
    objective = Consistency(grid=GridPairs(count=n), distance="square")
    at = [float(one_loss(objective, networks, gaussian_batch(512)).detach())]
    student.slopes.data[1:] *= 1.1
    at.append(float(one_loss(objective, networks, gaussian_batch(512)).detach()))
    print(at)
    assert at[0] < 1e-12 and at[1] > 1e-4


def test_training_has_no_mean_gradient_at_the_same_optimum() -> None:
    """From data the square's mean gradient vanishes there (4 standard errors), and not at the exact map."""
    objective, exact = Consistency(grid=FOUR, teach="data", distance="square"), torch.ones(5, dtype=F64)
    t = torch.linspace(0, 1, 5, dtype=F64)
    for slopes, zero in ((optimal_slopes(4), True), (exact * S / spread(t), False)):
        found = torch.stack([gradient(objective, SlopeStudent(slopes), 1024, key) for key in range(40)])
        errors = (found.mean(0).abs() / (found.std(0) / 40**0.5).clamp_min(1e-12))[1:]
        print([round(float(e), 2) for e in errors])
        assert (float(errors.max()) < 4) == zero


def test_the_exact_map_has_no_loss_when_the_solver_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the grid, the phases and the end: the semigroup. A perturbed map's square grows as the square."""

    def exact_step(_: Consistency, networks: Networks, batch: Batch, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return x - expand(t - s, x) * average_velocity(x, t, s)

    monkeypatch.setattr(Consistency, "solver_step", exact_step)
    for grid in (FOUR, GridPairs(count=7, spacing="karras")):
        objective, at = Consistency(grid=grid, distance="square"), []
        for off in (0.0, 1e-3, 1e-2):
            networks = consistency_networks(off)
            at.append(float(one_loss(objective, networks, gaussian_batch(256))))
        print(at)
        assert at[0] < 1e-12 and 90 < at[2] / at[1] < 110


def test_heuns_optimum_is_closer_to_the_exact_map() -> None:
    """Eight intervals: the residual of the exact map falls by more than ten."""
    at = {}
    for solver in ("euler", "heun"):
        objective = Consistency(grid=GridPairs(count=8), solver=solver, distance="square")  # type: ignore[arg-type]
        at[solver] = float(one_loss(objective, consistency_networks(), gaussian_batch(512)))
    print(at)
    assert at["heun"] < at["euler"] / 10


def test_several_steps_of_the_solver_lessen_the_bias() -> None:
    """Euler's is of first order: four steps an interval, a quarter of the error, a sixteenth of its square."""
    at = []
    for steps in (1, 2, 4):
        objective = Consistency(grid=GridPairs(count=16), solver_steps=steps, distance="square")
        at.append(float(one_loss(objective, consistency_networks(), gaussian_batch(512))))
    print(at)
    assert at[0] > 3 * at[1] > 9 * at[2]


def test_phases_have_their_own_optimum_and_edges_are_identities() -> None:
    """Two phases of two Euler steps: jumps to the edge at the closed form of two steps have no loss, whatever the
    network predicts below the edge."""

    class ToEdge(Denoiser):
        """Predicts the x0 whose ode step to the edge of t's phase is the two-step Euler solution."""

        def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
            t, edge = expand(t, x_t), expand(phase_edges(t, 2)[0], x_t)
            x, at, from_above = x_t, t, (t * 4).round() % 2 == 0  # at the upper edge there are two steps, else one
            for level in (torch.where(from_above, (t + edge) / 2, edge), edge):
                x, at = x - (at - level) * average_velocity(x, at, at), level
            return (x_t - x) / (t - edge)

    objective = Consistency(grid=FOUR, phases=(2,))
    student = Recorder(ToEdge(nn.Identity(), FlowSchedule(), "flow_prediction"))
    batch = gaussian_batch(256)
    assert float(one_loss(objective, exact_networks(student, RENOISE), batch)) < 1e-12
    below = student.calls[0].t  # the target network is called at s, whose value counts only inside the phase
    assert set(below.tolist()) <= {0.001, 0.25, 0.5, 0.75}
    one = dataclasses.replace(objective, phases=(1,))
    assert float(one_loss(one, exact_networks(student, RENOISE), batch)) > 1e-2


def test_tscds_end_lies_between_the_edge_and_s() -> None:
    """With end: uniform one interval a phase leaves nothing but the teacher's own step as target."""
    objective = Consistency(grid=FOUR, phases=(4,), end="uniform", distance="square")
    turn = objective.turns(0, {})[-1]
    assert isinstance(turn, ConsistencyTurn)
    student, batch = consistency_map(), gaussian_batch(256)
    networks = exact_networks(student, RENOISE)
    points = objective.endpoints(turn, networks, batch, {})
    t, s = FOUR(batch, 0)
    assert torch.equal(points.end, s) and torch.allclose(points.upper, t) and torch.allclose(points.gap, t - s)
    noise = batch.normal("noise")
    x = student.schedule.add_noise(batch.latents, noise, t)  # type: ignore[arg-type]
    assert torch.allclose(points.target, objective.solver_step(networks, batch, x, t, s))
    wide = dataclasses.replace(objective, phases=(2,))
    end = wide.endpoints(wide.turns(0, {})[-1], networks, batch, {}).end  # type: ignore[arg-type]
    low = phase_edges(t, 2)[0]
    inside = s > low
    assert bool((end >= low).all()) and bool((end <= s).all())
    assert bool((end[inside] > low[inside]).all()) and bool((end[inside] < s[inside]).all())
    edge = dataclasses.replace(wide, end="edge")
    assert torch.equal(edge.endpoints(edge.turns(0, {})[-1], networks, batch, {}).end, low)  # type: ignore[arg-type]


# --- curricula


def test_published_numbers_of_intervals() -> None:
    """CM, N levels: 2, 76, 107, 151 at k / K = 0, 1/4, 1/2, 1. iCT: 11 at first, 1281 at last."""
    cm = GridPairs(count=1, last=150, updates=1000)
    assert [cm.intervals(k) + 1 for k in (0, 250, 500, 1000, 5000)] == [2, 76, 107, 151, 151]
    ict = GridPairs(count=10, last=1280, updates=8000, growth="doubling")
    assert [ict.intervals(k) + 1 for k in (0, 999, 1000, 7000, 9000)] == [11, 11, 21, 1281, 1281]


def test_grids_go_from_zero_to_one_and_pairs_are_neighbours() -> None:
    batch = gaussian_batch(4000)
    for grid in (FOUR, GridPairs(count=18, spacing="karras"), GridPairs(count=10, shift=3.0)):
        levels = grid.levels(0)
        assert levels[0] == 0 and levels[-1] == 1 and bool((levels.diff() > 0).all())
        t, s = grid(batch, 0)
        place = torch.searchsorted(levels, t)
        assert torch.equal(levels[place], t) and torch.equal(levels[place - 1], s)
        share = torch.bincount(place, minlength=len(levels))[1:] / 4000
        assert float((share - 1 / (len(levels) - 1)).abs().max()) < 0.03
    assert float(GridPairs(count=18, spacing="karras", sigma_data=1.0).levels(0)[9]) == pytest.approx(0.715, abs=0.01)
    assert float(GridPairs(count=10, shift=3.0).levels(0)[5]) == pytest.approx(0.75)


def test_only_the_ends_of_the_karras_grid_are_moved() -> None:
    """CM's 40 levels: sigma_1 = 0.0037, sigma_38 = 69, for data of std 0.5; and what the two ends stand for."""
    grid = GridPairs(count=39, spacing="karras")
    levels = grid.levels(0)
    sigma = 0.5 * levels / (1 - levels)
    assert float(sigma[1]) == pytest.approx(0.0037, abs=1e-4) and float(sigma[38]) == pytest.approx(69.0, abs=0.5)
    assert grid.end_ratios(0) == (0.004, 160.0)
    assert GridPairs(count=4).end_ratios(0) == (0.0, pytest.approx(7.0))  # 0.875 / 0.125


def test_the_published_weight_is_a_gap_of_sigma() -> None:
    """iCT, ECT: 1 / (sigma_t - sigma_s); the share of the weight at sigma > 10 is small."""
    batch, t = gaussian_batch(20000), torch.tensor([0.5, 1.0, 0.5], dtype=F64)
    s = torch.tensor([0.0, 0.75, 0.25], dtype=F64)
    assert ratio_gap(t, s, (0.1, 9.0)).tolist() == pytest.approx([0.9, 6.0, 2 / 3])
    for pairs in (
        {"shrinking": ShrinkingPairs(period=10)},
        {"grid": GridPairs(count=40, spacing="karras", time=ShrinkingPairs(period=1).time)},
    ):
        shares = []
        for weight in ("gap", "level_gap"):
            objective = Consistency(teach="data", weight=weight, **pairs)  # type: ignore[arg-type]
            t, s = objective.levels(batch, RENOISE, 0)
            w = objective.pair_weight(t, s, 0)
            assert bool((w > 0).all()) and bool(w.isfinite().all())
            shares.append(float(w[0.5 * t / (1 - t) > 10].sum() / w.sum()))
        print(shares)
        assert shares[0] < 2e-3 and shares[1] > 0.05


def test_icts_intervals_are_those_a_lognormal_draw_falls_in() -> None:
    from fastgen.schedule import TimeSampler

    law = TimeSampler("logit_normal", 0.0, 1.0, mean=-1.1, std=2.0, sigma_data=0.5)
    grid = GridPairs(count=10, spacing="karras", time=law)
    t, _ = grid(gaussian_batch(20000), 0)
    levels = grid.levels(0)
    ratio = (0.5 * levels / (1 - levels)).log()
    cdf = torch.special.ndtr((ratio + 1.1) / 2.0)
    share = torch.bincount(torch.searchsorted(levels, t), minlength=11)[1:] / 20000
    print((share - cdf.diff()).abs().max())
    assert float((share - cdf.diff()).abs().max()) < 0.015


def test_ects_gap_narrows_by_stages() -> None:
    pairs, batch = ShrinkingPairs(period=10), gaussian_batch(2000)
    gaps, ratios = [], []
    for update in (0, 9, 10, 80, 100000):
        t, s = pairs(batch, update)
        assert bool((s < t).all()) and bool((s >= 0).all())
        gaps.append(float((t - s).mean()))
        ratios.append(float((s / (1 - s) / (t / (1 - t))).max()))
    assert gaps[0] == gaps[1] > gaps[2] > gaps[3] > gaps[4] > 0
    assert ratios[-1] == pytest.approx(0.999, abs=1e-9)


def test_phases_follow_each_other() -> None:
    objective = Consistency(grid=FOUR, phases=(4, 2, 1), phase_updates=10, end="uniform")
    assert [objective.turns(k, {})[0].phases for k in (0, 9, 10, 19, 20, 500)] == [4, 4, 2, 2, 1, 1]  # type: ignore[attr-defined]
    assert [objective.turns(k, {})[0].update for k in (0, 7)] == [0, 7]  # type: ignore[attr-defined]


def test_weights_and_distances() -> None:
    from fastgen.flow.flow_maps import pseudo_huber

    error, one = torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=F64), torch.ones(2, dtype=F64)
    assert float(pseudo_huber(error, 0.0, one)) == pytest.approx((5 + 0.5) / 2)
    c = 0.1 * 2**0.5
    wanted = (math.hypot(5, c) - c + 2 * (math.hypot(0.5, c) - c)) / 2
    assert float(pseudo_huber(error, 0.1, torch.tensor([1.0, 2.0], dtype=F64))) == pytest.approx(wanted)
    student, batch = consistency_map(), gaussian_batch(64)
    plain = Consistency(grid=FOUR, distance="square")
    weighed = dataclasses.replace(plain, weight="level_gap")
    losses = [one_loss(o, exact_networks(student, RENOISE), batch) for o in (plain, weighed)]
    assert float(losses[1] / losses[0]) == pytest.approx(4.0)
    size = error.abs()
    found = pseudo_huber(error, 0.1, torch.tensor([1.0, 2.0], dtype=F64), elementwise=True)
    wanted = ((size[0] ** 2 + 0.01).sqrt() - 0.1).mean() / 2 + ((size[1] ** 2 + 0.01).sqrt() - 0.1).mean()
    assert float(found) == pytest.approx(float(wanted))
    mean = Consistency(grid=FOUR, distance="elementwise_huber", huber=0.0)
    points = mean.endpoints(mean.turns(0, {})[-1], exact_networks(student, RENOISE), batch, {})  # type: ignore[arg-type]
    wanted = (points.student - points.target).abs().mean()
    assert torch.allclose(one_loss(mean, exact_networks(student, RENOISE), batch), wanted)


# --- networks


class Dropping(SlopeStudent):
    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        x0 = super().call_network(x_t, t, cond, inputs)
        return x0 * nn.functional.dropout(torch.ones_like(x_t), 0.5, self.training)


def test_both_evaluations_draw_the_same_dropout() -> None:
    """f(x_t) and f(x_s) of data at neighbouring levels differ by O(1 / n), and by O(1) with other dropout."""
    slopes = S / spread(torch.linspace(0, 1, 1001, dtype=F64))
    objective = Consistency(grid=GridPairs(count=1000), teach="data", distance="square")
    loss = one_loss(objective, exact_networks(Dropping(slopes), RENOISE), gaussian_batch(256))
    print(float(loss))
    assert float(loss) < 1e-2


def real_networks(objective: Consistency, policy: RolloutPolicy, lora: bool = False) -> Networks:
    adapters = {"student": LoraConfig(rank=2)} if lora else {}
    backbone = tiny_backbone(dataclasses.replace(GAUSSIAN, classes=(0,)), adapters=adapters)
    return tiny_networks(objective, policy, backbone=backbone)


@pytest.mark.parametrize(
    ("options", "told", "lora"),
    [
        ({}, None, False),
        ({"target_decay": 0.9}, None, False),
        ({"gan": Ladd(weight=0.1)}, None, False),
        ({"guidance_range": (1.0, 4.0)}, 2.0, False),
        ({}, None, True),
    ],
    ids=["plain", "target", "adversarial", "guidance", "adapter"],
)
def test_each_turn_moves_its_own_networks(options: dict[str, Any], told: float | None, lora: bool) -> None:
    policy = RolloutPolicy(RENOISE.timesteps, embedded_guidance=told)
    objective = Consistency(grid=FOUR, teach="teacher", **options)
    networks, state = real_networks(objective, policy, lora), objective.init_state()
    with torch.no_grad():
        for p in networks.student.parameters():
            p.add_(0.05 * torch.randn_like(p))
    for turn in objective.turns(0, state):
        loss = objective.loss(turn, networks, gaussian_batch(), state)
        loss.total.backward()  # type: ignore[union-attr]
        assert not any(term.requires_grad for term in loss.terms.values())  # type: ignore[union-attr]
        for role, module in networks.items():
            got = {n for n, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}
            missing = {n for n, _ in module.named_parameters()} - got
            if role in turn.roles:
                assert missing <= {"network.label.weight", "outer.0.bias"}, missing  # the hinge is linear at first
            else:
                assert not got, role
            module.zero_grad()


def test_the_target_network_follows_the_student_from_where_it_starts() -> None:
    """mu^((s_0) / N(k)) on a growing grid; the first loss is already that of the student's own weights."""
    objective = Consistency(grid=GridPairs(count=1, last=7, updates=4), target_decay=0.5)
    networks, state = real_networks(objective, RENOISE), objective.init_state()
    weight = networks.student.network.inlet.weight  # type: ignore[union-attr]
    target = networks["target"].network.inlet.weight  # type: ignore[union-attr]
    with torch.no_grad():
        weight.add_(1.0)
    (turn,) = objective.turns(0, state)
    objective.loss(turn, networks, gaussian_batch(), state)
    assert torch.equal(target, weight)
    for update in range(3):
        before, n = target.detach().clone(), objective.grid.intervals(update) + 1  # type: ignore[union-attr]
        with torch.no_grad():
            weight.add_(1.0)
        objective.finish(turn, networks, state)
        decay = 0.5 ** (2 / n)
        assert torch.allclose(target, decay * before + (1 - decay) * weight) and int(state["updates"]) == update + 1
        objective.loss(turn, networks, gaussian_batch(), state)
        assert not torch.equal(target, weight)


def test_guidance_is_drawn_by_sample_and_told() -> None:
    """LCM: the teacher is guided by the scale that the student is told."""
    teacher, batch, student = mixed_teacher(), gaussian_batch(64, uncond=2), Recorder(consistency_map())
    objective = Consistency(grid=FOUR, guidance_range=(2.0, 6.0))
    networks = exact_networks(student, RolloutPolicy((1.0,), embedded_guidance=3.0))
    networks.modules["teacher"] = teacher
    turn = objective.turns(0, {})[-1]
    assert isinstance(turn, ConsistencyTurn)
    objective.endpoints(turn, networks, batch, {})
    w = drawn_scale(batch, (2.0, 6.0))
    assert len(student.calls) == 2 and all(torch.equal(call.inputs.guidance, w) for call in student.calls)  # type: ignore[arg-type]
    assert float(w.min()) > 2 and float(w.max()) < 6 and float(w.std()) > 0.8
    t, s = FOUR(batch, 0)
    x = batch.normal("x")
    found = objective.solver_step(networks, batch, x, t, s)
    on, off = (teacher(x, t, c, predict="flow_prediction") for c in (batch.cond, batch.uncond))
    wanted = x - (t - s)[:, None] * (off + w[:, None] * (on - off))
    assert torch.allclose(found, wanted)
    heun = dataclasses.replace(objective, solver="heun").solver_step(networks, batch, x, t, s)
    assert not torch.allclose(heun, wanted) and (heun - wanted).abs().mean() < 1.0
    untold = consistency_networks()
    untold.modules["teacher"] = teacher
    objective.endpoints(turn, untold, batch, {})  # LCM-LoRA: the range is drawn, the student is told nothing


def test_pcms_adversarial_term_looks_within_the_phase() -> None:
    """Both are at the lower edge, and renoised to levels of the phase; the student's side has gradient through D."""
    objective = Consistency(grid=FOUR, phases=(2,), gan=Ladd(weight=0.1))
    networks = real_networks(objective, RolloutPolicy((1.0, 0.5), "ode"))
    seen: list[Tensor] = []
    hook = networks.critic.register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    for turn in objective.turns(0, {}):
        loss = objective.loss(turn, networks, gaussian_batch(256), {})
        assert ("gan" in loss.terms) == (turn.name == "student")  # type: ignore[union-attr]
    hook.remove()
    low, high = phase_edges(FOUR(gaussian_batch(256), 0)[0], 2)
    assert len(seen) == 3
    for t in seen:
        assert bool((t >= low).all()) and bool((t <= high).all()) and float(t.std()) > 0.1
    plain = dataclasses.replace(objective, gan=None)
    turn = objective.turns(0, {})[-1]
    losses = [float(one_loss(o, networks, gaussian_batch(), turn)) for o in (objective, plain)]
    assert losses[0] != losses[1]


# --- samplers


@pytest.mark.parametrize(
    "policy",
    [
        RENOISE,
        RolloutPolicy((1.0,)),
        RolloutPolicy((1.0, 0.75, 0.5, 0.25), "tcd", 0.3),
        RolloutPolicy((1.0, 0.75, 0.5, 0.25), "tcd", 0.9),
    ],
    ids=["renoise", "one", "tcd 0.3", "tcd 0.9"],
)
def test_samplers_keep_the_law_where_their_steps_do(policy: RolloutPolicy) -> None:
    """Renoising of the exact consistency function; tcd of jumps that are exact at every level."""

    def end(t: Tensor) -> Tensor:
        """The level below the next one that a tcd step jumps to from t."""
        if policy.transition == "renoise":
            return torch.zeros_like(t)
        below = [level for level in (*policy.timesteps, 0.0) if level < float(t[0]) - 1e-9]
        return torch.full_like(t, (1 - policy.eta) * below[0])  # type: ignore[operator]

    n = 60_000
    draws = {f"step{i}": i for i in range(5)} | {"initial": 0}

    def noise(name: str) -> Tensor:
        return torch.randn(n, 1, generator=torch.Generator().manual_seed(draws[name]), dtype=F64)

    found = sample(GaussianMap(end=end), policy, Conditioning({"label": torch.zeros(n, dtype=torch.int64)}), noise)
    print(float(found.mean()), float(found.std()))
    assert float(found.mean()) == pytest.approx(M, abs=0.008) and float(found.std()) == pytest.approx(S, abs=0.006)


# --- refusals


def test_what_cannot_be_is_refused() -> None:
    grid = "objective.grid={count: 8}"
    for text, lines in {
        "give exactly one": ["objective.shrinking={period: 5}"],
        "does not call the teacher": ["objective.teach=data", "objective.solver=heun"],
        "low < high": ["objective.guidance_range=[4.0, 2.0]"],
        "several entries need phase_updates": ["objective.phases=[4, 2]"],
        "use renoise": ["rollout.transition=ode"],
        "edge to edge": ["objective.phases=[2]"],
        "is not conditioned on the level where": ["rollout.two_time=true"],
        "rollout.embedded_guidance 3": ["rollout.embedded_guidance=3.0"],
        "last must be at least count": ["objective.grid={count: 8, last: 4, updates: 5}"],
        "leave it out with spacing": ["objective.grid={count: 8, spacing: karras, shift: 3.0}"],
        "roles that can be adapters are none": ["objective.target_decay=0.9", "lora={student: {rank: 4}}"],
        "needs an eta": ["rollout.transition=tcd"],
        "prompts of other samples.*batch_size is 1": [
            grid,
            "objective.gan={weight: 0.1, mismatched: true}",
            "train.batch_size=1",
            "optimizers.discriminator={lr: 1.0e-3}",
        ],
    }.items():
        with pytest.raises(RecipeError, match=text):
            load_recipe(RECIPE, lines)
    load_recipe(RECIPE, [grid, "objective.phases=[4]", "rollout.transition=ode"])
    load_recipe(RECIPE, [grid, "objective.guidance_range=[1.0, 5.0]", "rollout.embedded_guidance=3.0"])
    load_recipe(RECIPE, [grid, "objective.end=uniform", "rollout={timesteps: [1.0, 0.5], transition: tcd, eta: 0.3}"])
    load_recipe(RECIPE, [grid, "lora={student: {rank: 4}}"])


def test_exports_hold_what_a_stock_scheduler_does() -> None:
    """And of told guidance, what our own pipeline classes do (tests/test_two_time.py)."""
    digits = ROOT / "recipes/digits_consistency_4step.yaml"
    tcd = "rollout={timesteps: [1.0, 0.75, 0.5, 0.25], transition: tcd, eta: 0.3}"
    with pytest.raises(RecipeError, match="no transition: tcd; use renoise or ode"):
        load_recipe(digits, [tcd, "objective.end=uniform"])
    sd = dataclasses.replace(load_recipe(digits), backbone=SDConfig(path="some/hub-id"))
    for options in (
        {"grid": GridPairs(count=18, spacing="karras")},
        {"shrinking": ShrinkingPairs(period=5)},
        {"grid": FOUR, "solver": "heun"},
        {"grid": FOUR, "weight": "gap"},
    ):
        with pytest.raises(ValueError, match="on backbone sd the grid is uniform"):
            Consistency(**options).check_recipe(sd)
    Consistency(grid=GridPairs(count=50)).check_recipe(sd)


def test_objectives_that_follow_the_share_of_noise_refuse_tcd() -> None:
    policy = RolloutPolicy((1.0, 0.5), "tcd", 0.3)
    with pytest.raises(ValueError, match="differs from step to step"):
        assert policy.transition_eta
    with pytest.raises(RecipeError, match="differs from step to step"):
        load_recipe(ROOT / "recipes/mixture_rtdmd_4step.yaml", ["rollout.transition=tcd"])


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
            "name": "consistency",
            "grid": {"count": 4},
            "solver": "heun",
            "solver_steps": 2,
            "distance": "square",
        },
        "optimizers": {"student": {"lr": 1e-3, "decay": "cosine", "weight_decay": 0.0}},
        "train": {"steps": 600, "batch_size": 256, "sample_every": 0, "checkpoint_every": 300, "log_every": 100},
        "eval": {"metrics": ["energy_distance"], "num_samples": 2000, "quick_num_samples": 2000, "batch_size": 2000},
    }
    recipe = build_recipe(raw)
    run = train(recipe)
    found = evaluate(load_sampler(run), recipe.eval, progress=False)["metrics"]["energy_distance"]
    print(found)
    assert found < 0.03
