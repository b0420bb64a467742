"""Each stage of a streaming student on AR(1) videos, against the closed form of where it ends.

Students are read off by their coefficients, so that the numbers below are exact and not those of samples."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from variants import slow

from fastgen import noise
from fastgen.backbones import ar1_formulas as f
from fastgen.backbones.ar1_law import AR1Law, to_complex, to_latents
from fastgen.backbones.ar1_network import FrameMap
from fastgen.backbones.ar1_video import AR1Video, AR1VideoConfig
from fastgen.batch import Batch, Conditioning
from fastgen.config import load_recipe
from fastgen.data import AR1Data
from fastgen.denoiser import Denoiser, Inputs
from fastgen.networks import Networks
from fastgen.objectives import DMD2, RTDMD, Consistency, Objective, ODERegression, ReDMD, StreamR1, TeacherForcing
from fastgen.objectives.base import Loss
from fastgen.recipe import OptimizerConfig
from fastgen.rewards import Composite, Scorer
from fastgen.rewards.ar1_motion import AR1Motion
from fastgen.rollout import RolloutPolicy
from fastgen.run.optimizers import adamw
from fastgen.sampling.sampler import load_sampler
from fastgen.schedule import FlowSchedule, TimeSampler
from fastgen.streaming.schedule import ChunkSchedule
from fastgen.train import train

RECIPES = Path(__file__).parents[1] / "recipes"
CONFIG = AR1VideoConfig(damping=0.9, angles=(0.5,), means=(0.3,), num_frames=7, copies=64, knots=17)
CPU = torch.device("cpu")
ONE_STEP = RolloutPolicy((1.0,), chunks=ChunkSchedule(frames=1, window=2))


def backbone(dtype: torch.dtype = torch.float32, **changes: Any) -> AR1Video:
    return dataclasses.replace(CONFIG, **changes).build(CPU, dtype, 0)


def batch_of(made: AR1Video, rows: int, update: int, data: AR1Data | None = None) -> Batch:
    """The rows of an update, all with label 0, and with data if there is a source."""
    ids = torch.arange(rows) + update * rows
    cond = Conditioning({"label": torch.zeros(rows, dtype=torch.int64)})
    key = noise.make_key("batch", update)
    batch = Batch(ids, key, cond, cond, made.latent_shape, dtype=made.dtype, prompts=("0",) * rows, group=ids)
    if data is None:
        return batch
    stream = data.open(made, 0)
    pair = tuple(x.to(made.dtype) for x in stream.pairs(ids))  # type: ignore[union-attr]
    return dataclasses.replace(batch, latents=stream.latents(ids).to(made.dtype), pairs=pair)  # type: ignore[union-attr, arg-type]


def fit(
    objective: Objective,
    made: AR1Video,
    policy: RolloutPolicy,
    rates: Mapping[str, float],
    updates: int,
    rows: int = 32,
    data: AR1Data | None = None,
    reward: AR1Motion | None = None,
    given: Mapping[str, Denoiser] | None = None,
) -> Networks:
    """Trains with AdamW at rates that fall linearly to zero, as the loop does, without anything around it.

    given: networks in place of those that the objective makes. A role without a rate is not trained."""
    objective.check(policy)
    modules: dict[str, Any] = {"student": objective.make_student(made, policy), "teacher": made.load("teacher")}
    modules |= objective.auxiliary(made, policy) | dict(given or {})
    networks = Networks(modules, policy, Scorer(Composite((reward,)), made.decode) if reward else None)
    configs = {role: OptimizerConfig(lr=lr, betas=(0.0, 0.95), weight_decay=0.0) for role, lr in rates.items()}
    optimizers = {role: adamw(config, modules[role].parameters()) for role, config in configs.items()}
    state, draw = objective.init_state(), 0
    for update in range(updates):
        for turn in objective.turns(update, state):
            for _ in range(turn.updates * (turn.roles[0] in rates)):
                batch, draw = batch_of(made, rows, draw, data), draw + 1
                for role in turn.roles:
                    optimizers[role].zero_grad()
                    optimizers[role].param_groups[0]["lr"] = rates[role] * (1 - update / updates)
                loss = objective.loss(turn, networks, batch, state)
                for part in (loss,) if isinstance(loss, Loss) else loss:
                    part.total.backward()
                for role in turn.roles:
                    optimizers[role].step()
                objective.finish(turn, networks, state)
    return networks


@torch.no_grad()
def coefficients(network: FrameMap, t: float, past: int) -> tuple[Tensor, Tensor]:
    """L [P] and G of a chunk of one frame at level t, for label 0, complex128."""
    level = torch.full((1,), t, dtype=torch.float64)
    lags, gains = network.coefficients(level, 1000 * level, torch.zeros(1, dtype=torch.int64), past, 1)
    return lags[0, 0].to(torch.complex128), gains[0, 0, 0].to(torch.complex128)


def one_step_tables(network: FrameMap) -> list[Tensor]:
    """The weights that hold the coefficients of a first frame, G, and of a later one, L and G."""
    return [network.tables[f"past{past}_frames1"].weight for past in (0, 1)]  # type: ignore[misc]


def entries(weight: Tensor) -> Tensor:
    """[2, entries], the real and imaginary parts of label 0's numbers at the last knot, as a view."""
    return weight.unflatten(0, (CONFIG.law.num_labels + 1, 2, -1))[0, ..., -1]


def one_step_student(made: AR1Video, lag: complex, gains: tuple[complex, complex]) -> Denoiser:
    """The student u_1 = gains[0] e_1, u_k = lag u_{k-1} + gains[1] e_k."""
    student = made.load("student")
    with torch.no_grad():
        for weight, row in zip(one_step_tables(student.network), ([gains[0]], [lag, gains[1]]), strict=True):
            entries(weight)[:] = torch.view_as_real(torch.tensor(row, dtype=torch.complex128)).T
    return student


@dataclasses.dataclass(frozen=True)
class Sampled:
    """What a student with renoising steps and a window of one past frame makes of noise, exactly.

    variance: [50], of each frame about the mean.  lag: E[u_{k+1} conj(u_k)] / E|u_k|^2.  gains: |G| at each level."""

    variance: Tensor
    lag: complex
    gains: Tensor


def sampled(network: FrameMap, timesteps: tuple[float, ...]) -> Sampled:
    found, gains = [], torch.zeros(0)
    for past in (0, 1):
        lag, variance, gains = 0j, 0.0, torch.zeros(len(timesteps), dtype=torch.float64)
        for i, t in enumerate(timesteps):
            lags, gain = coefficients(network, t, past)
            lag = complex(lags.sum()) + complex(gain) * (1 - t) * lag
            variance = abs(complex(gain)) ** 2 * ((1 - t) ** 2 * variance + t**2)
            gains[i] = gain.abs()
        found.append((lag, variance))
    (_, first), (lag, fresh) = found
    return Sampled(f.rollout_variance(first, fresh, lag, 50), lag, gains)


def covariance_of(network: FrameMap, frames: int) -> Tensor:
    """[F, F], of the videos that a student of one step makes."""
    rows = list[Tensor]()
    for k in range(frames):
        lags, gain = coefficients(network, 1.0, min(k, network.memory))
        row = torch.zeros(frames, dtype=torch.complex128)
        row[k] = gain
        for lag, before in zip(lags, rows[k - len(lags) :], strict=True):
            row = row + lag * before
        rows.append(row)
    student_map = torch.stack(rows)
    return student_map @ student_map.mH


# --- teacher forcing and Self Forcing


@pytest.mark.slow
def test_teacher_forcing_ends_at_the_exact_conditional() -> None:
    """The recipe, from the bidirectional teacher's network: the coefficients of F2, and the drift of F4."""
    recipe = load_recipe(RECIPES / "ar1_teacher_forcing.yaml", ["backbone.angles=[0.5]", "backbone.means=[1.0]"])
    made, policy = backbone(knots=recipe.backbone.knots, copies=recipe.backbone.copies), recipe.rollout
    objective: TeacherForcing = recipe.objective
    networks = fit(objective, made, policy, {"student": recipe.optimizers["student"].lr}, 150, 32, AR1Data())
    law, got = made.law, sampled(networks.student.network, policy.timesteps)
    s2 = f.innovation(law.rhos[0])
    k = f.denoiser_gain(torch.tensor(policy.timesteps), s2)
    g2 = f.sampled_variance(policy.timesteps, k, "renoise")
    first = f.sampled_variance(policy.timesteps, f.denoiser_gain(torch.tensor(policy.timesteps), 1.0), "renoise")
    expected = f.rollout_variance(first, g2, law.rhos[0], 50)
    error, drift = (got.gains - k).abs().max().item(), (got.variance - expected).abs().max().item()
    print(f"gains {got.gains.tolist()}, F2's {k.tolist()}; frame 50 {got.variance[-1]:.4f}, F4's {g2 / s2:.4f}")
    assert error < 0.02 and abs(got.lag - law.rhos[0]) < 0.02 and drift < 0.02


@pytest.mark.slow
def test_self_forcing_turns_denoiser_gains_into_flow_map_gains(tmp_path: Path) -> None:
    """Line 13, the recipe on one prompt and with fewer updates: trained on 7 frames from the optimum of teacher
    forcing, every frame has variance 1, also those far beyond, and every gain is kappa of F5 in modulus. (The phase of
    a gain is free: the noise that it multiplies has the same law in every phase.)"""
    changes = ["backbone.angles=[0.5]", "backbone.means=[1.0]", "train.steps=128", "train.batch_size=48"]
    changes += [f"optimizers.{role}.decay_fraction=0.5" for role in ("student", "fake_score")]
    changes += [
        "objective.fake_updates=3",
        "train.eval_every=0",
        "eval.teacher_steps=[]",
        "health.every=0",
        f"output_dir={tmp_path}/run",
    ]
    recipe = load_recipe(RECIPES / "ar1_self_forcing_4step.yaml", changes)
    made, timesteps = backbone(knots=recipe.backbone.knots, pretrained="causal"), recipe.rollout.timesteps
    before = sampled(made.load("student").network, timesteps)
    got = sampled(load_sampler(train(recipe) / "export").denoiser.network, timesteps)
    rho = made.law.rhos[0]
    kappa = f.flow_map_gain(torch.tensor(timesteps), f.innovation(rho))
    for name, row in (("teacher forcing", before), ("Self Forcing", got)):
        print(
            f"{name}: frames 1 to 7 off by {(row.variance[:7] - 1).abs().max():.4f}, frame 50 "
            f"{row.variance[-1]:.4f}, lag off by {abs(row.lag - rho):.4f}, gains {row.gains.tolist()}"
        )
    assert before.variance[-1] < 0.1  # where teacher forcing fades to
    assert (got.variance[:7] - 1).abs().max() < 0.03 and abs(got.variance[-1] - 1) < 0.05
    assert abs(got.lag - rho) < 0.01 and (got.gains / kappa - 1).abs().max() < 0.05


# --- initialisation: the teacher's ODE, and consistency


@pytest.mark.slow
@pytest.mark.parametrize("pairs", ["bidirectional", "causal"])
def test_bidirectional_pairs_lose_what_f7_says_and_causal_ones_nothing(pairs: Any) -> None:
    """Line 14: a student of one step that sees its noise and all earlier frames, 8 frames."""
    made = backbone(num_frames=8, memory=7)
    policy = RolloutPolicy((1.0,), chunks=ChunkSchedule(frames=1))
    networks = fit(ODERegression(), made, policy, {"student": 0.05}, 200, 64, AR1Data(pairs=pairs))
    rho = made.law.rhos[0]
    cov = f.covariance(rho, 8)
    root = f.flow_map(cov, 1.0) if pairs == "bidirectional" else torch.linalg.cholesky(cov)
    expected = f.ode_initialisation_loss(rho, 8) if pairs == "bidirectional" else torch.zeros(8)
    lost = torch.zeros(8, dtype=torch.float64)
    for i in range(8):
        lags, gain = coefficients(networks.student.network, 1.0, i)
        error = root[i] - lags @ root[:i]
        error[i] -= gain
        lost[i] = error.abs().square().sum() / (f.innovation(rho) if i else 1)
    print(f"{pairs}: lost {[round(v, 3) for v in lost.tolist()]}, F7 {[round(v, 3) for v in expected.tolist()]}")
    assert (lost - expected).abs().max() < 0.01


@pytest.mark.slow
def test_causal_consistency_loses_almost_nothing() -> None:
    """Line 14: from the optimum of teacher forcing, on data alone. On a grid of n intervals the gain at t = 1 is the
    root of the variance times the cosines between neighbouring points of the ray (derived), which tends to F3's."""
    made, intervals = backbone(pretrained="causal", copies=32, knots=33), 32
    objective = Consistency(teach="data", grid={"count": intervals}, distance="square")  # type: ignore[arg-type]
    networks = fit(objective, made, ONE_STEP, {"student": 0.02}, 400, 48, AR1Data())
    rho, t = made.law.rhos[0], torch.linspace(0, 1, intervals + 1, dtype=torch.float64)
    for past, variance in ((0, 1.0), (1, f.innovation(rho))):
        point = torch.stack([(1 - t) * math.sqrt(variance), t])
        point = point / point.norm(dim=0)
        optimum = math.sqrt(variance) * (point[:, 1:] * point[:, :-1]).sum(0).prod().item()
        lags, gain = coefficients(networks.student.network, 1.0, past)
        off = (rho - lags.sum()).abs().square() if past else 0.0
        lost = float(off + (math.sqrt(variance) - gain).abs().square()) / variance
        print(f"past {past}: gain {gain:.4f}, optimum {optimum:.4f}, F3's {math.sqrt(variance):.4f}; lost {lost:.4f}")
        assert lost < 0.01 and abs(gain - optimum) < 0.02


# --- the gradient of distribution matching


class LawDenoiser(Denoiser):
    """The fake score at its optimum: the exact denoiser of what a student of one step makes, at its coefficients of
    the moment."""

    def __init__(self, student: Denoiser, mean: complex):
        super().__init__(torch.nn.Identity(), FlowSchedule(), "sample")
        self.student, self.mean = [student], mean  # in a list: not a submodule

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        cov = covariance_of(self.student[0].network, x_t.shape[1])
        gains = f.gains(cov, t[:, None].expand(-1, x_t.shape[1]))
        alpha = (1 - t)[:, None, None]
        return to_latents(self.mean + gains @ (to_complex(x_t.double()) - alpha * self.mean), x_t)


@pytest.mark.slow
@pytest.mark.parametrize("replay", [slow(False), True], ids=["whole graph", "replay"])
def test_the_gradient_of_the_rollout_is_f6_in_expectation(replay: bool) -> None:
    """Line 15: DMD2 through the engine for a student of one step, with the exact scores and no normaliser, on 200,000
    videos. What later chunks see of a chunk is a constant, so that this is F6 with detached contexts."""
    made, t, lag, gains = backbone(torch.float64, copies=50), 0.6, 0.7 + 0.1j, (0.9, 0.3 + 0.1j)
    student = one_step_student(made, lag, gains)
    frame_gains = torch.tensor([gains[0], *[gains[1]] * 6], dtype=torch.complex128)
    rho = made.law.rhos[0]
    by_lag, by_gain = f.dmd_gradient(rho, lag, frame_gains, t)
    attached = f.dmd_gradient(rho, lag, frame_gains, t, attached=True)[0]
    expected = torch.stack([by_gain[0], by_lag, by_gain[1:].sum()])
    fake = LawDenoiser(student, made.law.means[0])
    chunks = dataclasses.replace(ONE_STEP.chunks, replay=replay)  # type: ignore[type-var]
    networks = Networks(
        {"student": student, "teacher": made.load("teacher"), "fake_score": fake},
        dataclasses.replace(ONE_STEP, chunks=chunks),
    )
    floor = 1e6  # above every distance, so that all gradients are divided by this number
    objective = DMD2(renoise_time=TimeSampler(low=t, high=t + 1e-9), normaliser_floor=floor)
    turn, found = objective.turns(0, {})[1], []
    for update in range(40):
        student.zero_grad()
        objective.loss(turn, networks, batch_of(made, 100, update), {}).total.backward()
        grads = torch.cat([entries(w.grad) for w in one_step_tables(student.network)], dim=1)  # type: ignore[arg-type]
        # the surrogate is a mean over frames and channels, and the channels have twice the moments of CN(0, 1)
        found.append(torch.complex(*grads) * floor * 7)
    samples = torch.stack(found)
    error = samples.std(0) / math.sqrt(len(samples))
    z = (samples.mean(0) - expected).abs() / error
    print(f"{z.tolist()} standard errors of {(error / expected.abs()).tolist()} of the gradient")
    assert z.max() < 4
    assert (samples.mean(0)[1] - attached).abs() > 8 * error[1]  # it would be seen if contexts carried gradient


# --- rewards


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", [ReDMD(beta=1e-9), ReDMD(beta=0.5), StreamR1(beta=0.5)], ids=["plain", "Re-DMD", "Stream-R1"]
)
def test_rewarded_weights_end_where_dmd_does(objective: ReDMD) -> None:
    """Line 16: with the exact fake score, weights exp(beta r), by frame or not, change the way from a wrong student
    and not its end, F5's fixed point."""
    made = backbone(copies=1, means=(0.0,))
    rho = made.law.rhos[0]
    student = one_step_student(made, 0.7 + 0.3j, (0.8, 0.3))
    given = {"student": student, "fake_score": LawDenoiser(student, 0.0)}
    fit(objective, made, ONE_STEP, {"student": 0.02}, 120, 512, reward=AR1Motion(0.5), given=given)
    got = sampled(student.network, (1.0,))
    print(f"variances {got.variance[:7].tolist()}, lag off by {abs(got.lag - rho):.4f}")
    assert (got.variance[:7] - 1).abs().max() < 0.02 and abs(got.lag - rho) < 0.02


@pytest.mark.slow
def test_an_inverse_tilt_reaches_the_tilted_law() -> None:
    """Line 16: RTDMD's first stage with the critic weighted by exp(-r / beta), in four frames. The tilted law is not
    stationary: every frame has its own coefficients."""
    frames, beta, phase = 4, 10.0, 0.2
    made = backbone(num_frames=frames, memory=frames - 1, copies=1, means=(0.0,), pretrained="causal")
    rho, form = made.law.rhos[0], f.motion_form(frames, phase)
    tilt: dict[str, Any] = {"critic_weight": "inverse_tilt", "reward_temperature": beta, "consistency_weight": 0.0}
    objective = RTDMD(guidance_scale=1.0, fake_updates=4, **tilt)
    policy = RolloutPolicy((1.0,), chunks=ChunkSchedule(frames=1))
    networks = fit(objective, made, policy, {"student": 2e-2, "fake_score": 2e-2}, 150, 1024, reward=AR1Motion(phase))
    got, plain = covariance_of(networks.student.network, frames), f.covariance(rho, frames)
    expected = torch.linalg.inv(f.tilted_precision(rho, form, 1 / beta))

    def reward(cov: Tensor) -> float:
        return float((cov @ form).diagonal().real.sum())

    print(f"mean reward {reward(got):.3f}, tilted {reward(expected):.3f}, teacher {reward(plain):.3f}")
    print(f"variances {got.diagonal().real.tolist()}, tilted {expected.diagonal().real.tolist()}")
    assert abs(reward(got) / reward(expected) - 1) < 0.05
    assert ((got - expected).abs() / expected.abs().max()).max() < 0.05
    assert reward(expected) > 1.2 * reward(plain)


def rewarded(plain: Tensor, form: Tensor, strength: float) -> Tensor:
    """The covariance at which the matching term's gradient, averaged over AC-DMD's levels, is the reward's:

    E_t[(1 - t) M_t] = strength B,   M_t of F6   (derived)"""
    t = (0.01 + 0.99 * (torch.arange(64, dtype=torch.float64) + 0.5) / 64).clamp(0.02, 0.98)
    levels = t[:, None].expand(-1, len(plain))
    root = torch.view_as_real(torch.linalg.cholesky(plain)).clone(memory_format=torch.contiguous_format)
    settings: dict[str, Any] = {"tolerance_grad": 0, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    solver = torch.optim.LBFGS([root.requires_grad_()], max_iter=100, **settings)

    def made() -> Tensor:
        student_map = torch.tril(torch.view_as_complex(root))
        return student_map @ student_map.mH

    def distance() -> Tensor:
        solver.zero_grad()
        gap = f.gains(made(), levels) - f.gains(plain, levels)
        square = (((1 - t)[:, None, None] * gap).mean(0) - strength * form).abs().square().sum()
        square.backward()
        return square

    solver.step(distance)
    assert distance() < 1e-10
    return made().detach()


@pytest.mark.slow
def test_a_reward_through_the_last_steps_ends_where_the_whole_gradient_would() -> None:
    """RTDMD's second stage without a policy gradient, in four frames, with the exact fake score: although what the
    reward says does not flow through contexts, the student ends at the minimum of the loss."""
    frames, strength, phase = 4, 0.05, 0.2
    made = backbone(num_frames=frames, memory=frames - 1, copies=1, means=(0.0,), pretrained="causal")
    form, plain = f.motion_form(frames, phase), f.covariance(made.law.rhos[0], frames)
    policy = RolloutPolicy((1.0,), chunks=ChunkSchedule(frames=1))
    student = made.load("student")
    options: dict[str, Any] = {"reward_weight": strength / (2 * frames), "reward_hinge": None, "dm_weight": 1.0}
    objective = RTDMD(stage=2, selected_steps=0, group_size=1, guidance_scale=1.0, normalise=False, **options)
    given = {"student": student, "fake_score": LawDenoiser(student, 0.0)}
    fit(objective, made, policy, {"student": 0.05}, 100, 512, reward=AR1Motion(phase), given=given)
    got, expected = covariance_of(student.network, frames), rewarded(plain, form, strength)

    def reward(cov: Tensor) -> float:
        return float((cov @ form).diagonal().real.sum())

    print(f"mean reward {reward(got):.3f}, expected {reward(expected):.3f}, teacher {reward(plain):.3f}")
    print(f"variances {got.diagonal().real.tolist()}, expected {expected.diagonal().real.tolist()}")
    assert ((got - expected).abs() / expected.abs().max()).max() < 0.05
    assert reward(expected) > 1.3 * reward(plain)


def test_the_reward_is_its_form() -> None:
    law: AR1Law = backbone().law
    x = law.sample(torch.arange(5), torch.zeros(5, dtype=torch.int64), 0)
    u = to_complex(x) / math.sqrt(2)
    expected = torch.einsum("nja,jk,nka->n", u.conj(), f.motion_form(7, 0.4), u).real
    assert torch.allclose(AR1Motion(0.4).score(x, ()), expected)
    with pytest.raises(ValueError, match="ar1_video"):
        AR1Motion(0.4).check(type("Other", (), {"name": "wan", "output": "frames"}))  # type: ignore[arg-type]
