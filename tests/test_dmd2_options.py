"""What is made of DMD2: its options (Decoupled DMD, IDA) and the objectives f_distill, re_dmd, sc_dmd and disback.

Against closed forms for Gaussians, in float64. For data N(m, S): V = alpha^2 S + sigma^2 and rho = sigma^2 / V; two
Gaussians with the same S have E_f[x0 | x_t] - E_r[x0 | x_t] = rho (m_f - m_r) everywhere."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from oracles import (
    ONE_STEP,
    AffineStudent,
    ExactFake,
    Given,
    Recorder,
    affine_networks,
    gaussian,
    guided_pair,
    point_batch,
    tiny_batch,
    tiny_networks,
    touched,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from variants import mostly_slow

from fastgen import signals
from fastgen.batch import Batch
from fastgen.config import load_recipe
from fastgen.modules.inputs import unextended
from fastgen.networks import Networks
from fastgen.objectives import DMD2, SCDMD, DisBack, FDistill, ReDMD, Turn
from fastgen.objectives.disback import PathTurn
from fastgen.planning.plan import plan
from fastgen.registry import RecipeError
from fastgen.rewards import Score
from fastgen.rollout import Rollout, RolloutPolicy, Step, backward_simulation, predict_x0, transition
from fastgen.run.checkpoint import complete
from fastgen.schedule import FlowSchedule, TimeSampler, expand
from fastgen.train import train

FOUR_STEPS = RolloutPolicy(timesteps=(1.0, 0.75, 0.5, 0.25))
STUDENT = Turn("student", ("student",))
FAKE = Turn("fake_score", ("fake_score",))
UNIT = 1e9  # a normaliser's floor so high that it is the same for every sample


class Grid(Batch):
    """A batch whose uniform draws are a regular grid, all of them the same one, and whose noise has one name."""

    def uniform(self, name: str, by_group: bool = False) -> Tensor:
        return (torch.arange(len(self.ids), dtype=self.dtype) + 0.5) / len(self.ids)

    def normal(self, name: str, by_group: bool = False, rows: Tensor | None = None) -> Tensor:
        return super().normal("one", by_group, rows)


def grid(batch: Batch) -> Grid:
    return Grid(**vars(batch))


class Product(Grid):
    """Two normal draws, of the student's input and of the renoising, as a product grid of n quantiles each."""

    def normal(self, name: str, by_group: bool = False, rows: Tensor | None = None) -> Tensor:
        n = round(len(self.ids) ** 0.5)
        quantiles = torch.special.ndtri((torch.arange(n, dtype=self.dtype) + 0.5) / n)
        return (quantiles.repeat_interleave(n) if name == "initial" else quantiles.repeat(n))[:, None]


def clean(x: Tensor, t_k: float = 1.0, stop: int = 0) -> Rollout:
    """Samples that a step from level t_k made."""
    t = torch.full((len(x),), t_k, dtype=x.dtype)
    return Rollout(x, 0 * t, torch.full((len(x),), stop), (Step(x, t, x, x),))


# --- f-distill


RATIOS = torch.logspace(-2, 2, 41, dtype=torch.float64)
DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "rkl": lambda r: -r.log(),
    "kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "sf": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
    "sh": lambda r: 1 - r.sqrt(),
    "jf": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: 0.5 * (r - 2 + 1 / r),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_weight_is_the_second_derivative_times_r_squared(name: signals.Divergence) -> None:
    """f'' by autograd, over four decades of r; js + sf = rkl."""
    r = RATIOS.clone().requires_grad_()
    (first,) = torch.autograd.grad(DIVERGENCES[name](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    h = signals.divergence_weight(name, RATIOS)
    error = ((h - second * RATIOS**2) / h).abs().max().item()
    both = signals.divergence_weight("js", RATIOS) + signals.divergence_weight("sf", RATIOS)
    print(f"{name}: {error:.1e}; js + sf - 1: {(both - 1).abs().max():.1e}")
    assert set(get_args(signals.Divergence)) == set(DIVERGENCES)
    assert error < 1e-12 and (both - 1).abs().max() < 1e-15


def normal_density(x: Tensor, m: float, s: float) -> Tensor:
    return (-0.5 * ((x - m) / s) ** 2).exp() / (s * math.sqrt(2 * math.pi))


SLOPES = {"rkl": 0.4000, "kl": 0.4938, "js": 0.2089, "sf": 0.1911, "jf": 0.8938, "sh": 0.1078, "neyman": 0.3916}


@pytest.mark.parametrize(("name", "slope"), SLOPES.items())
def test_the_weighted_score_difference_is_the_divergences_gradient(name: signals.Divergence, slope: float) -> None:
    """d/dm of D_f(N(0, 1) | N(m, s)) at m = 0.4, s = 0.9, as -E_q[h(r) (s_p - s_q)], against its own difference
    quotient and the table; by quadrature."""
    m, s, x = 0.4, 0.9, torch.linspace(-12, 12, 24001, dtype=torch.float64)
    p, q = normal_density(x, 0, 1), normal_density(x, m, s)

    def divergence(m: float) -> float:
        q = normal_density(x, m, s)
        return torch.trapezoid(q * DIVERGENCES[name](p / q), x).item()

    inside = (x.abs() < 8).double()  # beyond, densities of 1e-20 are rounding
    field = -signals.divergence_weight(name, p / q) * (-x + (x - m) / s**2)
    weighted = torch.trapezoid(inside * q * field, x).item()
    numeric = (divergence(m + 1e-4) - divergence(m - 1e-4)) / 2e-4
    print(f"{name}: weighted {weighted:.4f}, difference quotient {numeric:.4f}, table {slope:.4f}")
    assert abs(weighted - numeric) < 1e-5 and abs(weighted - slope) < 6e-5


def test_an_optimal_discriminator_gives_the_density_ratio() -> None:
    """Free logits on four points, at the minimum of our own discriminator loss: their exp is p / q; and the clamps."""
    p, q = torch.tensor([1, 2, 3, 4]), torch.tensor([4, 3, 2, 1])  # tenths
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    real, fake = torch.arange(4).repeat_interleave(p), torch.arange(4).repeat_interleave(q)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = signals.gan_discriminator_loss(logits[real], logits[fake])
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    ratio = signals.density_ratio(logits[:, None])
    error = (ratio - p / q).abs().max().item()
    print(f"{ratio.tolist()}: {error:.1e}")
    assert error < 1e-5 and not ratio.requires_grad
    two = torch.tensor([[1.0, 3.0], [-90, 0], [90, 0], [float("inf"), 0]])  # two heads each
    assert torch.allclose(signals.density_ratio(two), torch.tensor([math.exp(2), 0.1, 20, 20]))


def test_the_effective_share_counts_equal_weights() -> None:
    weights = torch.tensor([2.0, 2, 0, 0])
    assert signals.effective_share(weights) == 0.5 and signals.effective_share(weights[:2]) == 1
    assert signals.effective_share(0 * weights) == 0


class ExactRatio(FDistill):
    """The ratio of N(0, 1) to an AffineStudent's law, both noised, in place of the discriminator's logits."""

    def discriminator_logits(self, networks: Networks, batch: Batch, x_t: Tensor, t: Tensor, stop: Tensor) -> Tensor:
        student = networks.student
        alpha, sigma = networks.teacher.schedule.coefficients(t, x_t)
        v_p, v_q = alpha**2 + sigma**2, alpha**2 * student.b.detach() ** 2 + sigma**2
        nats = 0.5 * ((x_t - alpha * student.a.detach()) ** 2 / v_q - x_t**2 / v_p + (v_q / v_p).log())
        return nats + torch.tensor([-0.3, 0.3])  # two heads that differ, their mean exact


@pytest.mark.parametrize("name", ["kl", "js", "sf", "jf", "neyman"])
def test_f_distills_loss_follows_the_divergence_it_names(name: signals.Divergence) -> None:
    """The student's gradient in its mean, of the whole loss with an exact ratio and exact networks, against the
    derivative of D_f(p_t | q_t) by quadrature; t within 0.3 +- 1e-6, the normaliser one constant. The ratio hardly
    meets its clamps here. Fails without the weight, with p and q exchanged, or with the weight at another x_t."""
    m, s, t = 0.3, 0.95, 0.3
    student = AffineStudent(m, s)
    time = TimeSampler(low=t - 1e-6, high=t + 1e-6)
    objective = ExactRatio(f_divergence=name, renoise_time=time, normaliser_floor=UNIT)
    networks, batch = affine_networks(student, gaussian(0.0, 1.0)), Product(**vars(point_batch(100**2, dim=1)))
    rollout = objective.rollout(networks, batch, grad=True)
    state = {k: v.double() for k, v in objective.init_state().items()}
    weight, _ = objective.ratio_weight(networks, batch, rollout, state)
    grad, _ = objective.score_gradient(networks, batch, rollout)
    h_at_1 = signals.divergence_weight(name, torch.ones(())).item()
    ours = (expand(weight, grad) * grad).mean().item() * UNIT * h_at_1

    x = torch.linspace(-12, 12, 24001, dtype=torch.float64)
    alpha = 1 - t
    p = normal_density(x, 0, math.sqrt(alpha**2 + t**2))

    def divergence(m: float) -> float:
        q = normal_density(x, alpha * m, math.sqrt(alpha**2 * s**2 + t**2))
        return torch.trapezoid(q * DIVERGENCES[name](p / q), x).item()

    # fake_x0 - real_x0 = sigma^2 / alpha (s_q - s_p), and d/dm = alpha d/dx
    exact = t**2 / alpha**2 * (divergence(m + 1e-4) - divergence(m - 1e-4)) / 2e-4
    print(f"{name}: {ours:.5f}, exactly {exact:.5f}; weights {weight.min():.2f} to {weight.max():.2f}")
    assert abs(ours / exact - 1) < 0.03


def test_reverse_kl_is_dmd2() -> None:
    """h = 1: the same loss to the bit; js is another."""
    networks = tiny_networks(DMD2(gan_weight=0.1), FOUR_STEPS)
    batch = tiny_batch()
    dmd2 = DMD2(gan_weight=0.1).student_loss(networks, batch).total.item()

    def loss(name: signals.Divergence) -> float:
        objective = FDistill(f_divergence=name, gan_weight=0.1)
        state = {k: v.double() for k, v in objective.init_state().items()}
        return objective.loss(STUDENT, networks, batch, state).total.item()

    print(f"dmd2 {dmd2}, rkl {loss('rkl')}, js {loss('js')}")
    assert loss("rkl") == dmd2 != loss("js")


def test_the_ratio_is_read_where_the_scores_are_compared() -> None:
    """The discriminator sees the very (x_t, t) that the teacher sees. Fails if it is given a draw of its own."""
    seen: list[tuple[Tensor, ...]] = []

    class Watched(FDistill):
        def discriminator_logits(self, networks: Networks, batch: Batch, *state: Tensor) -> Tensor:
            seen.append(state[:2])
            return super().discriminator_logits(networks, batch, *state)

    objective = Watched()
    networks = tiny_networks(objective, FOUR_STEPS)
    teacher = Recorder(networks.teacher)
    networks = Networks({**networks, "teacher": teacher}, FOUR_STEPS)
    state = objective.init_state()
    objective.loss(STUDENT, networks, tiny_batch(), state)
    (x_t, t), (x_d, t_d) = teacher.calls[0][:2], seen[0]
    assert torch.equal(x_t, x_d) and torch.equal(t, t_d) and len(seen) == 2  # and once for the GAN term


def test_the_ratios_means_are_kept_by_level_and_folded_once() -> None:
    """Two halves of a batch leave the same sums and weights as the whole; `finish` decays them; the next update
    divides by each level's own mean and by the mean weight. Fails without the bins, or if they moved in the loss."""
    objective = FDistill(ratio_bins=4, ratio_memory=0.5, f_divergence="kl")
    networks, batch = tiny_networks(objective, FOUR_STEPS), tiny_batch(64)
    parts = [
        replace(batch, ids=batch.ids[i], cond=batch.cond.select(i), uncond=batch.uncond.select(i))
        for i in (slice(0, 32), slice(32, 64))
    ]
    rollout = objective.rollout(networks, batch, grad=False)

    def weigh(batch: Batch, state: dict[str, Tensor]) -> Tensor:
        return objective.ratio_weight(networks, batch, objective.rollout(networks, batch, grad=False), state)[0]

    whole, halves = ({k: v.double() for k, v in objective.init_state().items()} for _ in range(2))
    first = weigh(batch, whole)
    both = torch.cat([weigh(part, halves) for part in parts])
    assert torch.allclose(first, both, atol=1e-7) and torch.allclose(whole["seen"], halves["seen"])
    assert torch.equal(whole["ratio"], objective.init_state()["ratio"].double()), "the means moved before finish"

    x_t, t = objective.renoised(networks, batch, rollout)
    ratio = signals.density_ratio(objective.discriminator_logits(networks, batch, x_t, t, rollout.stop)).double()
    level = ((t - 0.02) / 0.96 * 4).long()
    objective.finish(FAKE, networks, whole)
    assert whole["seen"].any(), "the fake score's turn folds nothing"
    objective.finish(STUDENT, networks, whole)
    assert not whole["seen"].any()
    for i in range(4):  # half a sample with r = 1, and those of this level
        sums = torch.stack([0.5 + ratio[level == i].sum(), 0.5 + ratio[level == i].sum(), 0.5 + (level == i).sum()])
        assert torch.allclose(whole["ratio"][:, i], sums, rtol=1e-5)
    total, weights, count = whole["ratio"].clone()
    second = weigh(batch, whole)
    expected = ratio / (total / count)[level] / (weights.sum() / count.sum())
    print(f"level means {(total / count).tolist()}, error {(second - expected).abs().max():.1e}")
    assert torch.allclose(second, expected, rtol=1e-4)


# --- Decoupled DMD


def test_with_a_shared_level_decoupled_dmd_is_dmd2() -> None:
    """A batch whose draws ignore their names renoises both terms alike; from t_k = 1 the levels are the same, too. The
    two fields then differ by the normaliser alone, whose teacher is guided in DMD2 and not here: sample by sample."""
    w, batch = 3.0, grid(point_batch(400, dim=1, uncond=2))
    student = AffineStudent(-1.0, 0.4)
    teacher = Recorder(guided_pair(0.7, -0.1))
    networks = affine_networks(student, teacher)
    x = -1 + 0.4 * batch.normal("initial")
    together, _ = DMD2(guidance_scale=w).score_gradient(networks, batch, clean(x))
    x_t, t = teacher.calls[-1].x_t[:400], teacher.calls[-1].t[:400]
    apart, _ = DMD2(guidance_scale=w, ca_time=TimeSampler()).score_gradient(networks, batch, clean(x))
    assert torch.equal(teacher.calls[-2].x_t, x_t) and torch.allclose(teacher.calls[-1].x_t[:400], x_t, atol=1e-14)
    real, uncond = teacher.denoiser(x_t, t, batch.cond), teacher.denoiser(x_t, t, batch.uncond)
    guided = uncond + w * (real - uncond)
    error = (apart * (x - real).abs() - together * (x - guided).abs()).abs().max().item()
    print(f"{error:.1e}")
    assert error < 1e-12 and together.abs().max() > 0.1


KAPPAS = {0.25: 0.043, 0.5: 0.233, 0.75: 0.613, 1.0: 1.0}


def mean_field(objective: DMD2, a: float, t_k: float = 1.0) -> float:
    """E g for a student N(a, 1.3^2) and a teacher of the same spread, m_c = 0.7 and m_u = -0.1; unnormalised."""
    batch = grid(point_batch(2000, dim=1, uncond=2))
    student = AffineStudent(a, 1.3)
    networks = affine_networks(student, guided_pair(0.7, -0.1))
    rollout = clean(a + 1.3 * batch.normal("initial"), t_k)
    return UNIT * objective.score_gradient(networks, batch, rollout)[0].mean().item()


@pytest.mark.parametrize(("t_k", "kappa"), KAPPAS.items())
def test_the_fixed_point_moves_with_the_level_of_the_guidance(t_k: float, kappa: float) -> None:
    """m* = m_c + (w - 1) (m_c - m_u) kappa, kappa = E rho(ca_time) / E rho(renoise_time): the mean field is linear in
    the student's mean, and this is its root. Fails without the cap at t_k, or with w for w - 1."""
    w = 2.5
    objective = DMD2(guidance_scale=w, ca_time=TimeSampler(), normaliser_floor=UNIT)
    low, high = (mean_field(objective, a, t_k) for a in (0.0, 1.0))
    fixed = low / (low - high)
    measured = (fixed - 0.7) / ((w - 1) * (0.7 + 0.1))
    print(f"t_k = {t_k}: kappa {measured:.4f}, table {kappa}")
    assert abs(measured - kappa) < 6e-4


def test_guidance_alone_has_no_fixed_point() -> None:
    """dm_weight 0: the field is the same wherever the student is, and gradient descent moves its mean in a line, past
    any bound. Fails if dm_weight is ignored."""
    objective = DMD2(guidance_scale=2.5, ca_time=TimeSampler(), normaliser_floor=UNIT, dm_weight=0)
    fields = [mean_field(objective, a) for a in (-3.0, 0.7, 1.9, 40.0)]
    a, path = 0.7, []
    for _ in range(5):
        a -= 10 * mean_field(objective, a)
        path.append(a)
    steps = torch.tensor(path).diff()
    print(f"fields {fields}, path {path}")
    assert max(fields) - min(fields) < 1e-9 and fields[0] < -0.1
    assert torch.allclose(steps, steps[:1]) and path[-1] > 20


def test_the_guidance_term_lies_below_the_step() -> None:
    """t' in [low, high t_k] of each sample's own step, its noise and level independent of the score difference's."""
    teacher = Recorder(guided_pair(0.7, -0.1))
    student, batch = AffineStudent(0.0, 1.0), point_batch(4000, dim=1, uncond=2)
    networks = affine_networks(student, teacher)
    t_k = torch.where(batch.ids % 2 == 0, 0.25, 0.75).double()
    rollout = clean(batch.normal("initial"))
    rollout = replace(rollout, steps=(replace(rollout.steps[0], t=t_k),))
    DMD2(guidance_scale=2.0, ca_time=TimeSampler()).score_gradient(networks, batch, rollout)
    (x_t, t), (x_both, both) = (call[:2] for call in teacher.calls)
    t_ca = both[:4000]
    assert torch.equal(both[4000:], t_ca) and torch.equal(x_both[4000:], x_both[:4000])
    for level in (0.25, 0.75):
        seen = t_ca[t_k == level]
        print(f"t_k = {level}: {seen.min():.3f} to {seen.max():.3f}, mean {seen.mean():.3f}")
        assert 0.02 <= seen.min() < 0.03 and 0.97 * level < seen.max() <= 0.98 * level
        assert abs(seen.mean() - (0.02 + 0.98 * level) / 2) < 0.01
    noises = [
        (x - (1 - level[:, None]) * rollout.x) / level[:, None] for x, level in ((x_t, t), (x_both[:4000], t_ca))
    ]
    for pair in ([t, t_ca / t_k], [n[:, 0] for n in noises]):
        assert abs(torch.corrcoef(torch.stack(pair))[0, 1]) < 0.05


# --- IDA


@pytest.mark.parametrize("told", [False, True])
def test_the_fake_score_is_drawn_to_the_student_after_its_update(told: bool) -> None:
    """fake <- lambda fake + (1 - lambda) student, tensor by tensor; stop tables, which the student lacks, stay. Not
    after the fake score's own turn, and not without the option. Fails if `finish` does nothing."""
    objective = DMD2(ida_decay=0.97, condition_on_stop=told)
    networks = tiny_networks(objective, FOUR_STEPS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for role in ("student", "fake_score"):
            for p in networks[role].parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
    before = copy.deepcopy(dict(networks))
    objective.finish(FAKE, networks, {})
    DMD2(condition_on_stop=told).finish(STUDENT, networks, {})
    unchanged = zip(networks.fake_score.parameters(), before["fake_score"].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in unchanged)
    objective.finish(STUDENT, networks, {})
    fake, was, student = (unextended(n) for n in (networks.fake_score, before["fake_score"], networks.student))  # type: ignore[arg-type]
    assert len(fake) == len(student) == len(list(networks.student.parameters()))
    error = max((f - (0.97 * w + 0.03 * s)).abs().max().item() for f, w, s in zip(fake, was, student, strict=True))
    print(f"{len(fake)} tensors, {error:.1e}")
    assert error < 1e-14
    tables = [(n, p) for n, p in networks.fake_score.named_parameters() if ".tables." in n]
    assert len(tables) == int(told) and all(torch.equal(p, before["fake_score"].get_parameter(n)) for n, p in tables)
    kept = zip(networks.student.parameters(), before["student"].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in kept)


def test_a_sample_that_is_not_finite_costs_its_own_update_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One NaN in the second of four rollouts: the means of the ratio are those of the first update, and the later
    losses are finite."""
    objective, rollout, finite = FDistill(), FDistill.rollout, []
    networks, state = tiny_networks(objective, FOUR_STEPS), objective.init_state()
    factor = torch.ones(32, 1, dtype=torch.float64)
    monkeypatch.setattr(FDistill, "rollout", lambda *a, **k: (lambda r: replace(r, x=r.x * factor))(rollout(*a, **k)))
    for update in range(4):
        factor[0] = float("nan") if update == 1 else 1.0
        before = state["ratio"].clone()
        finite.append(bool(objective.loss(STUDENT, networks, tiny_batch(key=update), state).total.isfinite()))
        objective.finish(STUDENT, networks, state)
        assert state["ratio"].isfinite().all() and not state["seen"].any()
        assert torch.equal(state["ratio"], before) == (update == 1)
    assert finite == [True, False, True, True]


# --- Re-DMD


def linear_reward(x0: Tensor, prompts: Any, group: Any, grad: bool) -> Score:
    """r(x) = 3 x_1, which asks for a mean far from any teacher's here."""
    assert not grad and not torch.is_grad_enabled()
    return Score(3 * x0[:, 0].float(), torch.ones(len(x0), dtype=torch.bool))


def coordinate(x0: Tensor, *_: Any) -> Score:
    return Score(x0[:, 0].float(), torch.ones(len(x0), dtype=torch.bool))


def constant_reward(x0: Tensor, prompts: Any, group: Any, grad: bool) -> Score:
    return Score(torch.full((len(x0),), 5.0), torch.ones(len(x0), dtype=torch.bool))


def doubled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() for k, v in state.items()}


def test_re_dmds_weights_are_exponentials_of_the_centred_reward() -> None:
    """1 until a mean is known, then exp(beta (r - mean)), the exponent within +-4; the mean of the samples so far,
    decayed; unchanged by a constant added to every reward. Fails without the centring or the clamp."""
    objective = ReDMD(beta=2.0, reward_memory=0.5)
    networks = Networks({"student": nn.Identity()}, ONE_STEP, linear_reward)  # type: ignore[arg-type]
    shifted = Networks(
        {"student": nn.Identity()},
        ONE_STEP,
        lambda *a: (lambda s: replace(s, value=s.value + 100))(linear_reward(*a)),  # type: ignore[arg-type]
    )
    batch, state, other = point_batch(256, dim=1), objective.init_state(), objective.init_state()
    x = 0.3 * batch.normal("x")
    r = 3 * x[:, 0].float()
    first, terms = objective.reward_weight(networks, batch, x, state)
    assert torch.equal(first, torch.ones(256)) and terms["effective_share"] == 1
    objective.reward_weight(shifted, batch, x, other)
    for s in (state, other):
        assert not s["reward"].any()
        objective.finish(FAKE, networks, s)
        assert s["seen"][1] == 256
        objective.finish(STUDENT, networks, s)
    weight, terms = objective.reward_weight(networks, batch, x, state)
    exponent = (2 * (r - r.mean())).clamp(-4, 4)
    moved, _ = objective.reward_weight(shifted, batch, x, other)
    print(f"weights {weight.min():.3f} to {weight.max():.1f}, effective share {terms['effective_share']:.3f}")
    assert torch.allclose(weight, exponent.exp(), rtol=1e-4) and torch.allclose(moved, weight, rtol=1e-3)
    assert (exponent.abs() == 4).any() and weight.max() <= math.exp(4) * (1 + 1e-6)
    assert torch.allclose(terms["effective_share"], weight.sum() ** 2 / (256 * (weight**2).sum()))
    assert torch.allclose(terms["reward"], r.mean())
    objective.reward_weight(networks, batch, x + 1, state)  # a second micro-batch of this update
    objective.finish(STUDENT, networks, state)
    expected = (0.5 * r.mean() + r.mean() + (r + 3).mean()) / 2.5
    assert torch.allclose(state["reward"][0] / state["reward"][1], expected, rtol=1e-5)


def test_invalid_rewards_leave_the_loss_and_its_mean() -> None:
    """Weight 0 in the mean over all samples, and no part in the running mean."""

    def half(x0: Tensor, *_: Any) -> Score:
        return Score(torch.zeros(len(x0)), torch.arange(len(x0)) % 2 == 0)

    networks = Networks({"student": nn.Identity()}, ONE_STEP, half)  # type: ignore[arg-type]
    objective, state = ReDMD(), ReDMD().init_state()
    weight, _ = objective.reward_weight(networks, point_batch(6, dim=1), torch.zeros(6, 1), state)
    assert weight.tolist() == [1, 0, 1, 0, 1, 0] and state["seen"].tolist() == [0, 3]


def test_a_constant_reward_makes_re_dmd_dmd2() -> None:
    networks = tiny_networks(DMD2(), FOUR_STEPS)
    networks.scorer = constant_reward  # type: ignore[assignment]
    batch, objective = tiny_batch(), ReDMD()
    state = objective.init_state()
    for _ in range(3):
        loss = objective.loss(STUDENT, networks, batch, state).total
        objective.finish(STUDENT, networks, state)
    assert loss.item() == DMD2().student_loss(networks, batch).total.item()
    networks.scorer = linear_reward  # type: ignore[assignment]
    assert objective.loss(STUDENT, networks, batch, state).total.item() != loss.item()


@pytest.mark.slow
def test_re_dmd_and_dmd2_share_their_stationary_point() -> None:
    """With the exact fake, for N(0.7, 1.3^2) and the reward x, beta = 0.5: at the teacher's law both fields are 0 for
    every sample; away from it the weighted one is another; and trained from N(0, 1) both end at the teacher, not
    at the law tilted by exp(beta r), whose mean is 0.7 + 1.3^2 / 2 = 1.545. Shows what re_dmd is *not*."""
    teacher = gaussian()
    batch = point_batch(500, dim=1)
    both = (DMD2(normaliser_floor=0.1), ReDMD(normaliser_floor=0.1, beta=0.5))
    state = doubled(ReDMD().init_state()) | {"reward": torch.tensor([0.7, 1.0], dtype=torch.float64)}
    for a, b, zero in ((0.7, 1.3, True), (0.2, 1.0, False)):
        student = AffineStudent(a, b)
        networks = affine_networks(student, teacher, scorer=coordinate)
        grads = []
        for objective in both:
            student.zero_grad()
            objective.loss(STUDENT, networks, batch, state).total.backward()
            assert student.a.grad is not None and student.b.grad is not None
            grads.append(torch.cat([student.a.grad, student.b.grad]))
        print(f"at N({a}, {b}^2): dmd2 {grads[0].tolist()}, re_dmd {grads[1].tolist()}")
        assert (max(g.abs().max().item() for g in grads) < 1e-12) == zero
        assert zero or (grads[0] - grads[1]).abs().max() > 0.01
    ends = []
    for objective in both:
        student = AffineStudent(0.0, 1.0)
        networks = affine_networks(student, teacher, scorer=coordinate)
        fit(objective, student, networks, 400)
        ends.append((student.a.item(), abs(student.b.item())))
    print(f"dmd2 ends at {ends[0]}, re_dmd at {ends[1]}")
    assert all(abs(a - 0.7) < 0.02 and abs(b - 1.3) < 0.02 for a, b in ends)


def fit(objective: DMD2, student: AffineStudent, networks: Networks, steps: int, lr: float = 0.02) -> None:
    """Student turns alone, as the loop makes them."""
    state = doubled(objective.init_state())
    optimizer = torch.optim.Adam(student.parameters(), lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=steps)
    for step in range(steps):
        batch = point_batch(torch.arange(256) + 256 * step, key=step, dim=1, uncond=2)
        optimizer.zero_grad()
        objective.loss(STUDENT, networks, batch, state).total.backward()
        optimizer.step()
        decay.step()
        objective.finish(STUDENT, networks, state)


@pytest.mark.slow
def test_f_distill_ends_at_the_teacher() -> None:
    """With an exact ratio and an exact fake, x = a + b z converges to N(0, 1), for forward KL."""
    student = AffineStudent(-1.0, 0.5)
    networks = affine_networks(student, gaussian(0.0, 1.0))
    objective = GanlessRatio(f_divergence="kl", normaliser_floor=0.1)
    fit(objective, student, networks, 350)
    print(f"{student.a.item():+.4f}, {abs(student.b.item()):.4f}")
    assert abs(student.a.item()) < 0.02 and abs(abs(student.b.item()) - 1) < 0.02


class GanlessRatio(ExactRatio):
    """Without the GAN term, whose heads an exact fake does not have."""

    def matching_loss(self, *args: Any, **kwargs: Any) -> Any:
        return DMD2(normaliser_floor=self.normaliser_floor).matching_loss(*args, **kwargs)


# --- SC-DMD


def test_a_straight_velocity_has_no_semigroup_loss() -> None:
    """And a curved one has: the exact velocity of a Gaussian, whose Euler steps do not compose."""
    objective, batch = SCDMD(stops="per_sample"), point_batch(400)
    losses = []
    straight = Given(torch.tensor([0.7, -0.4]).double(), "flow_prediction")
    for student in (straight, gaussian((0.5, -1.0), (0.4, 1.5))):
        networks = Networks({"student": student}, FOUR_STEPS)
        rollout = objective.rollout(networks, batch, grad=False)
        losses.append(objective.semigroup_loss(networks, batch, rollout).item())
    print(f"straight {losses[0]:.1e}, curved {losses[1]:.1e}")
    assert losses[0] < 1e-28 and losses[1] > 1e-5


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_the_jumps_are_levels_below_the_step(stop: int) -> None:
    """t_e is one of the two levels after the next one, or 0, each half of the time; t_m every level between. After the
    last step nothing is left: both are the step's own level, and the loss is exactly that of no jump, 0."""
    batch = point_batch(6000)
    middle, end = SCDMD().jump_indices(batch, torch.full_like(batch.ids, stop), 4)
    seen = {(m, e): n / 6000 for (m, e), n in count(middle, end).items()}
    print(seen)
    expected = {
        0: {(1, 2): 0.5, (1, 3): 0.25, (2, 3): 0.25},
        1: {(2, 3): 0.5, (2, 4): 0.25, (3, 4): 0.25},
        2: {(3, 4): 1.0},
        3: {(3, 3): 1.0},
    }[stop]
    assert seen.keys() == expected.keys() and all(abs(seen[k] - v) < 0.03 for k, v in expected.items())
    if stop == 3:
        networks = tiny_networks(SCDMD(), FOUR_STEPS)
        rollout = SCDMD().rollout(networks, batch, grad=False)
        rollout = replace(rollout, stop=torch.full_like(batch.ids, 3))
        rollout = replace(rollout, steps=(replace(rollout.steps[0], t=torch.full((6000,), 0.25).double()),))
        assert SCDMD().semigroup_loss(networks, batch, rollout) < 1e-28


def count(*columns: Tensor) -> dict[tuple[int, ...], int]:
    rows, numbers = torch.stack(columns, 1).unique(dim=0, return_counts=True)
    return {tuple(r): n for r, n in zip(rows.tolist(), numbers.tolist(), strict=True)}


def test_the_semigroup_gradient_is_that_of_the_long_jump_alone() -> None:
    """Against the same loss whose second velocity and middle state come from a copy of the student: the same gradient,
    which is not zero. Weighted by 1 - t_s. Fails if x_m or v_2 carries gradient, or without the weight."""
    objective, batch = SCDMD(), tiny_batch()
    networks = tiny_networks(objective, FOUR_STEPS)
    other = copy.deepcopy(networks.student)
    batch_stop = torch.full_like(batch.ids, 1)
    student, schedule = networks.student, FlowSchedule()
    rollout = backward_simulation(student, FOUR_STEPS, batch, batch_stop, grad=True)
    objective.semigroup_loss(networks, batch, rollout).backward()
    ours = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in student.parameters()]
    student.zero_grad()

    step = backward_simulation(student, FOUR_STEPS, batch, batch_stop, grad=True).steps[0]
    copied = backward_simulation(other, FOUR_STEPS, batch, batch_stop, grad=True).steps[0]
    levels = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64)
    t_m, t_e = (levels[i] for i in objective.jump_indices(batch, batch_stop, 4))
    x_m = transition(schedule, copied.x0, copied.x_t, copied.t, t_m, None)
    x_e = transition(schedule, predict_x0(other, x_m, t_m, batch.cond, FOUR_STEPS), x_m, t_m, t_e, None)
    error = transition(schedule, step.x0, step.x_t, step.t, t_e, None) - x_e
    (0.25 * error.square().mean()).backward()
    theirs = [p.grad if p.grad is not None else torch.zeros_like(p) for p in student.parameters()]
    size = max(g.abs().max().item() for g in ours)
    worst = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    print(f"size {size:.2e}, error {worst:.1e}")
    assert size > 1e-6 and worst < 1e-12
    total = objective.loss(STUDENT, networks, batch, {})
    plain = DMD2().student_loss(networks, batch)
    assert torch.allclose(total.total - plain.total, 0.2 * total.terms["semigroup"])


# --- DisBack


def test_the_target_goes_back_along_the_path() -> None:
    """N - 1, one point every `interval` updates, and the teacher from then on."""
    objective = DisBack(path_length=4, path_every=3, interval=10)
    seen = {k: objective.target(k) for k in (0, 9, 10, 19, 20, 29, 30, 1000)}
    print(seen)
    assert seen == {0: 3, 9: 3, 10: 2, 19: 2, 20: 1, 29: 1, 30: 0, 1000: 0}
    stored = {s: t.point for s in range(12) for t in objective.turns(s, {}) if isinstance(t, PathTurn) and t.point}
    assert stored == {2: 1, 5: 2, 8: 3, 11: 4}
    assert [t.name for t in objective.turns(11, {})] == ["degrade"]
    fake, student = objective.turns(12 + 20, {})
    assert isinstance(student, PathTurn) and student.point == 1 and fake == Turn("fake_score", ("fake_score",), 5)


def test_the_path_is_made_of_the_fake_score() -> None:
    """A degradation update leaves gradient on the fake score alone; every path_every updates it is copied; the last
    point, path[N], is the fake score itself. The student's turn leaves none on the path it aims at."""
    objective = DisBack(path_length=3, path_every=2)
    networks = tiny_networks(objective, FOUR_STEPS)
    assert set(networks) == {"student", "teacher", "fake_score", "path1", "path2"}
    assert not any(p.requires_grad for role in ("path1", "path2") for p in networks[role].parameters())
    assert not any(networks[role].training for role in ("teacher", "path1", "path2")) and networks.student.training
    optimizer = torch.optim.Adam(networks.fake_score.parameters(), 1e-2)
    history = []
    for step in range(6):
        (turn,) = objective.turns(step, {})
        assert turn.roles == ("fake_score",) and turn.updates == 1
        objective.loss(turn, networks, tiny_batch(key=step), {}).total.backward()
        assert touched(networks) == {"fake_score"}
        optimizer.step()
        networks.fake_score.zero_grad()
        objective.finish(turn, networks, {})
        history.append(copy.deepcopy(networks.fake_score.state_dict()))

    def same(role: str, step: int) -> bool:
        return all(torch.equal(v, history[step][k]) for k, v in networks[role].state_dict().items())

    assert same("path1", 1) and same("path2", 3) and not same("path2", 5) and same("fake_score", 5)
    student = objective.turns(6, {})[1]
    objective.loss(student, networks, tiny_batch(), {}).total.backward()
    assert touched(networks) == {"student"} and student == PathTurn("student", ("student",), point=2)


@pytest.mark.slow
def test_the_student_follows_the_path_to_the_teacher() -> None:
    """A path of Gaussians with means -2, -1 and then the teacher's 0.7, and the exact fake: the student's mean is at
    each point at the end of its interval. Fails if the path is left out or taken from the other end."""
    interval = 150
    objective = DisBack(path_length=3, path_every=1, interval=interval, normaliser_floor=0.1)
    student = AffineStudent(-3.0, 1.0)
    networks = Networks(
        {
            "student": student,
            "teacher": gaussian(0.7, 1.0),
            "path1": gaussian(-1.0, 1.0),
            "path2": gaussian(-2.0, 1.0),
            "fake_score": ExactFake(student),
        },
        ONE_STEP,
    )
    optimizer, ends = torch.optim.Adam(student.parameters(), 0.02), []
    for update in range(3 * interval + 100):
        turn = objective.turns(objective.degradation + update, {})[1]
        batch = point_batch(torch.arange(128) + 128 * update, key=update, dim=1)
        optimizer.zero_grad()
        objective.loss(turn, networks, batch, {}).total.backward()
        optimizer.step()
        if (update + 1) % interval == 0 or update == 3 * interval + 99:
            ends.append(student.a.item())
    print(f"means {ends}")
    assert all(abs(e - m) < 0.15 for e, m in zip(ends, (-2, -1, 0.7, 0.7), strict=True))


# --- who gets gradient, what is refused, and the loop itself


@pytest.mark.parametrize(
    "objective",
    [
        FDistill(condition_on_stop=True, stops="per_sample", guidance_scale=2.0),
        ReDMD(stops="per_sample"),
        SCDMD(stops="per_sample", condition_on_stop=True),
        DMD2(ca_time=TimeSampler(), guidance_scale=3.0, ida_decay=0.9, condition_on_stop=True),
    ],
    ids=lambda o: o.name,
)
def test_each_turn_reaches_its_own_roles(objective: DMD2) -> None:
    networks = tiny_networks(objective, FOUR_STEPS)
    networks.scorer = linear_reward  # type: ignore[assignment]
    state = doubled(objective.init_state())
    for turn in objective.turns(0, state):
        loss = objective.loss(turn, networks, tiny_batch(), state)
        loss.total.backward()
        assert touched(networks) == set(turn.roles)
        assert not any(term.requires_grad for term in loss.terms.values())
        for module in networks.values():
            module.zero_grad()
        objective.finish(turn, networks, state)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective.name=f_distill", "objective.gan_weight=0"], "gan_weight must be above 0"),
        (["objective.name=f_distill", "objective.f_divergence=pearson"], "f_divergence"),
        (["objective.f_divergence=js"], "unknown key objective.f_divergence"),
        (["objective.name=re_dmd"], "missing key rewards"),
        (["rewards={parts: [{name: linear, direction: [1.0, 0.0]}]}"], "uses none"),
        (["objective.name=sc_dmd", "rollout.timesteps=[1.0, 0.5]"], "give three timesteps"),
        (["objective.name=sc_dmd", "rollout.timesteps=[0.9]"], "give three timesteps"),
        (["objective.name=disback"], "condition_on_stop"),
        (["objective.name=disback", "objective.condition_on_stop=false", "train.steps=500"], "train.steps is 500"),
        (
            ["objective.name=disback", "objective.condition_on_stop=false", "lora={fake_score: {rank: 2}}"],
            "can be adapters are student",
        ),
        (["objective.ca_time={}"], "guidance_scale 1 has none"),
        (["objective.ca_time={}", "objective.guidance_scale=2", "objective.guidance_rescale=0.5"], "leave out"),
        (
            ["objective.ca_time={}", "objective.guidance_scale=2", "objective.guidance_interval=[0.2, 0.8]"],
            "leave out",
        ),
        (["objective.ca_time={low: 0.3}", "objective.guidance_scale=2"], "no noise level below that of the last step"),
        (["objective.dm_weight=0.5"], "give ca_time"),
        (["objective.ida_decay=1.0"], "ida_decay"),
        (["objective.ida_decay=0.97", "lora={student: {rank: 2}}"], "can be adapters are none"),
        (["objective.ida_decay=0.97", "lora={fake_score: {rank: 2}}"], "can be adapters are none"),
    ],
)
def test_wrong_combinations_are_refused_before_anything_loads(
    mixture_recipe: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(mixture_recipe, overrides)


SMALL = [
    "backbone.width=16",
    "backbone.depth=2",
    "backbone.fit_steps=5",
    "train.batch_size=8",
    "train.log_every=1",
    "train.sample_every=0",
    "train.eval_every=0",
    "eval.teacher_steps=[2]",
    "eval.num_samples=20",
    "eval.quick_num_samples=20",
    "health.every=2",
    "optimizers.student.decay=constant",
    "optimizers.fake_score.decay=constant",
]
LOOPS: Mapping[str, list[str]] = {
    "f_distill": ["optimizers.discriminator={lr: 1e-3}"],
    "re_dmd": ["rewards={parts: [{name: linear, direction: [1.0, 0.0]}]}"],
    "sc_dmd": ["objective.ida_decay=0.9"],
    "disback": ["objective.condition_on_stop=false", "objective.path_length=2", "objective.path_every=1"],
}


@pytest.mark.parametrize("name", mostly_slow(LOOPS, ["disback"]))
def test_the_loop_trains_and_resumes_it(
    name: str, mixture_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four updates at once equal two and two, to the bit, the objective's memory included (of DisBack three and one).
    While it degrades the teacher, the student, which rests, is not reported as one that does not learn."""
    common = [*SMALL, f"objective.name={name}", *LOOPS[name], "train.checkpoint_every=2"]

    def run(folder: str, steps: int) -> Path:
        overrides = [*common, f"output_dir={tmp_path / folder}", f"train.steps={steps}"]
        return train(load_recipe(mixture_recipe, overrides))

    whole = run("whole", 4)
    run("parts", 3 if name == "disback" else 2)
    parts = run("parts", 4)
    a, b = (complete(f / "checkpoints")[-1] for f in (whole, parts))
    files = sorted(f.name for f in a.glob("*.safetensors"))
    for file in files:
        one, other = load_file(a / file), load_file(b / file)
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one), file
    assert {f"{role}.safetensors" for role in load_recipe(whole / "recipe.yaml").objective.trained_roles} <= set(files)
    assert "student is not learning" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_plan_has_the_turns_of_later_updates_too(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    overrides = ["objective.name=disback", *LOOPS["disback"], "train.batch_size=2", "train.steps=10"]
    planned = plan(load_recipe("recipes/digits_dmd2_4step.yaml", overrides), gpu=False)
    assert [part.turn.name for part in planned.turns] == ["degrade", "fake_score", "student"]
    assert all(part.evaluations for part in planned.turns)
