"""Centred reward distillation against its closed forms: the tilt of a finite set, the zero of the loss on a Gaussian,
centring within prompts, the anchor; and who moves, when, and who gets gradient.

For N(m, S), V = alpha^2 S + sigma^2 and the same noise for a whole prompt, x0 - E[x0 | x_t] centred within the prompt
is sigma^2 / V times x0 centred: a prediction that is shifted by delta has beta r_theta = 2 beta delta x0 / (D V) there
(flow matching, w = 1), whatever law x0 has."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import AffineStudent, Recorder, gaussian, grouped_batch, tiny_backbone, tiny_networks
from safetensors.torch import load_file
from torch import Tensor, nn

from fastgen.backbones.gaussian_mixture import Mixture, build_mixture
from fastgen.batch import Batch, Conditioning
from fastgen.config import load_recipe
from fastgen.denoiser import Denoiser, Inputs
from fastgen.metrics.energy_distance import mean_distance
from fastgen.modules.lora import LoraConfig
from fastgen.networks import Networks
from fastgen.objectives import CRD, Turn
from fastgen.objectives.crd import Decay, centring_weights, implicit_reward, matching_loss
from fastgen.registry import RecipeError
from fastgen.rewards import Score
from fastgen.rollout import RolloutPolicy, sample
from fastgen.sampling.sampler import load_sampler
from fastgen.signals import group_mean, guided
from fastgen.train import train

ROOT = Path(__file__).parents[1]
TURN = Turn("student", ("student",))
FEW = RolloutPolicy(timesteps=(1.0, 0.6, 0.3))
UNANCHORED: dict[str, Any] = {"group_size": 4, "anchor_weight": 0.0, "self_normalised": False}
Reward = Callable[[Tensor], Tensor]


def first(x: Tensor) -> Tensor:
    return x[:, 0]


def scorer(reward: Reward, valid: Tensor | None = None) -> Any:
    """What Networks takes for the recipe's rewards."""

    def score(x0: Tensor, prompts: Sequence[str], group: Tensor | None, grad: bool) -> Score:
        return Score(reward(x0.detach()).float(), torch.ones(len(x0), dtype=torch.bool) if valid is None else valid)

    return score


def moved_networks(
    objective: CRD, reward: Reward = first, policy: RolloutPolicy = FEW, adapter: LoraConfig | None = None
) -> Networks:
    backbone = tiny_backbone(adapters={"student": adapter} if adapter else {})
    networks = tiny_networks(objective, policy, scorer(reward), backbone)
    with torch.no_grad():
        for p in networks.student.parameters():  # as after init_from: not the pretrained weights
            p.add_(0.1 * torch.randn_like(p))
    return networks


def backward(objective: CRD, networks: Networks, batch: Batch, state: dict[str, Tensor] | None = None) -> float:
    """The total loss, its gradient left on the networks."""
    for p in networks.student.parameters():
        p.grad = None
    total = 0.0
    for loss in objective.loss(TURN, networks, batch, objective.init_state() if state is None else state):
        loss.total.backward()
        total += loss.total.item()
    return total


def gradient(networks: Networks) -> Tensor:
    return torch.cat([p.grad.flatten() for p in networks.student.parameters() if p.grad is not None])


def distance(a: nn.Module, b: nn.Module) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a.parameters(), b.parameters(), strict=True))


# --- the finite set


def finite(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """log p_old and R of six items for each of two prompts, [12] each, and the prompts."""
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(2, 6, generator=generator, dtype=torch.float64).log_softmax(1).flatten()
    reward = torch.rand(12, generator=generator, dtype=torch.float64)
    return old, reward, torch.arange(12) // 6


def tilted(old: Tensor, reward: Tensor, beta: float) -> Tensor:
    return (old + reward / beta).reshape(2, 6).log_softmax(1).flatten()


@pytest.mark.parametrize(("loss_type", "temperature"), [("mse", None), ("mse", 0.0), ("mse", 0.7), ("bce", None)])
def test_the_minimum_on_a_finite_set_is_the_tilted_law(loss_type: Any, temperature: float | None) -> None:
    """p_old exp(R / beta) / Z, however often each item is drawn, for both losses and all centring weights; found by
    Newton's method from p_old."""
    old, reward, group = finite()
    beta, clip = 0.7, 5.0
    exact = tilted(old, reward, beta)
    for draws in ((1,) * 12, (1, 5, 2, 9, 1, 1, 3, 1, 1, 7, 2, 4)):
        drawn = torch.arange(12).repeat_interleave(torch.tensor(draws))
        advantage = (2 * reward - 1)[drawn] * clip
        used, groups = torch.ones(len(drawn), dtype=torch.bool), group[drawn]
        weights = centring_weights(advantage - group_mean(advantage, groups), groups, used, temperature)
        logits = old.clone()

        def slope(logits: Tensor) -> Tensor:
            logits = logits.clone().requires_grad_()
            ratio = logits.reshape(2, 6).log_softmax(1).flatten() - old
            loss = matching_loss(ratio[drawn], reward[drawn], groups, used, beta, weights, loss_type)  # noqa: B023
            return torch.autograd.grad(loss, logits)[0]

        for _ in range(8):  # differences, as the means are detached; a prompt's logits may have a constant added
            change = [(slope(logits + h) - slope(logits - h)) / 2e-4 for h in 1e-4 * torch.eye(12).double()]
            solution = torch.linalg.lstsq(torch.stack(change, 1), slope(logits)[:, None], driver="gelsd").solution
            logits = logits - solution[:, 0]
        found = logits.reshape(2, 6).log_softmax(1).flatten()
        error = (found.exp() - exact.exp()).abs().max().item()
        moved = (old.exp() - exact.exp()).abs().max().item()
        print(f"{loss_type} {temperature} drawn {len(drawn)}: {error:.1e} of {moved:.2f}")
        assert error < 5e-15 and moved > 0.05


def test_centring_is_within_prompts() -> None:
    """Rewards of two prompts that differ by a constant: at the tilted law the loss is 0, and centring over the whole
    batch instead is wrong by the difference of the two log Z. Fails if `group` is not used."""
    old, reward, group = finite()
    reward = reward + 3 * group
    ratio, used = tilted(old, reward, 1.0) - old, torch.ones(12, dtype=torch.bool)
    one = torch.zeros_like(group)
    by_prompt, whole = (
        matching_loss(ratio, reward, g, used, 1.0, centring_weights(reward, g, used, None)).item()
        for g in (group, one)
    )
    print(f"by prompt {by_prompt:.1e}, over the batch {whole:.2f}")
    assert by_prompt < 1e-28 and whole > 1.0


def test_centring_weights() -> None:
    """Uniform; softmax(A / tau) and softmax(-A / tau) within each prompt; the two signs; unused samples have none."""
    advantage = torch.tensor([1.0, -1.0, 2.0, 300.0, -300.0, 0.0], dtype=torch.float64)
    group, used = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([True, True, False, True, True, True])
    assert centring_weights(advantage, group, used, None)[0].tolist() == [1, 1, 0, 1, 1, 1]
    plus, minus = centring_weights(advantage, group, used, 0.0)
    assert plus.tolist() == [1, 0, 0, 1, 0, 0] and minus.tolist() == [0, 1, 0, 0, 1, 0]
    for weight, sign in zip(centring_weights(advantage, group, used, 0.5), (1, -1), strict=True):
        exact = (sign * advantage[:2] / 0.5).softmax(0)
        assert torch.allclose(weight[:2] / weight[:2].sum(), exact) and weight[2] == 0
        assert bool(weight.isfinite().all()) and weight[3:].sum() == 1


@pytest.mark.parametrize("temperature", [None, 0.0, 5.0])
def test_the_centring_means_carry_no_gradient(temperature: float | None) -> None:
    """dL / d r_theta,i = 2 beta / n (beta (r_i - mean_g r) - (R_i - mean_g R)), averaged over the sets of weights:
    nothing flows through mean_g. Fails if a mean is not detached; at tau = 5 that changes the gradient by 3 %."""
    generator = torch.Generator().manual_seed(3)
    implicit = torch.randn(12, generator=generator, dtype=torch.float64)
    advantage = 2 * torch.randn(12, generator=generator, dtype=torch.float64)
    group, used, beta, reward = torch.arange(12) // 6, torch.ones(12, dtype=torch.bool), 0.7, advantage / 10 + 0.5
    weights = centring_weights(advantage, group, used, temperature)
    leaf = implicit.clone().requires_grad_()
    found = torch.autograd.grad(matching_loss(leaf, reward, group, used, beta, weights), leaf)[0]
    expected, live = torch.zeros(12, dtype=torch.float64), implicit.clone().requires_grad_()
    with_gradient = torch.zeros((), dtype=torch.float64)
    for weight in weights:
        share = weight / weight.reshape(2, 6).sum(1).repeat_interleave(6)

        def centre(value: Tensor) -> Tensor:
            return value - (share * value).reshape(2, 6).sum(1).repeat_interleave(6)  # noqa: B023

        expected += 2 * beta / 12 * (beta * centre(implicit) - centre(reward)) / len(weights)
        with_gradient = with_gradient + (beta * centre(live) - centre(reward)).square().mean() / len(weights)
    other = torch.autograd.grad(with_gradient, live)[0]
    away = ((other - expected).norm() / expected.norm()).item()
    print(f"tau {temperature}: with gradient through the means {away:.3f} away")
    assert torch.allclose(found, expected, atol=1e-14)
    assert away < 1e-12 if temperature is None else away > 0.02  # the plain mean is detached by itself


def test_the_temperature_is_in_the_unit_of_r() -> None:
    """The weights are softmax(+-R / 0.5), for every clip. Fails if they are softmax(+-A / 0.5)."""
    for clip in (5.0, 2.0):
        objective = CRD(**UNANCHORED | {"temperature": 0.5, "clip": clip})
        networks, batch = moved_networks(objective), grouped_batch(8, 4, dim=2)
        with torch.no_grad():
            networks["reference"].load_state_dict(networks.student.state_dict())
        x0 = sample(networks.student, FEW, batch.cond, batch.normal).detach()
        advantage = torch.linspace(-1.7, 1.9, 8, dtype=torch.float64)
        score = Score(advantage, torch.ones(8, dtype=torch.bool))
        loss = objective.draw_loss(networks, batch, x0, advantage, score, 0.6, "x").terms["matching"].item()
        reward, expected = (advantage / (2 * clip) + 0.5).reshape(2, 4), 0.0
        for sign in (1, -1):  # r_theta is 0 where the student is the reference
            mean = ((sign * reward / 0.5).softmax(1) * reward).sum(1, keepdim=True)
            expected += (reward - mean).square().mean().item() / 2
        assert loss == pytest.approx(clip * expected, rel=1e-12)


# --- the implicit reward and the Gaussian


@pytest.mark.parametrize("self_normalised", [True, False])
def test_the_implicit_reward_is_zero_where_the_student_is_the_reference(self_normalised: bool) -> None:
    """To the bit; its gradient there is not zero, so that training can begin, and w carries none."""
    generator = torch.Generator().manual_seed(0)
    old, star = (torch.randn(5, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    v = old.clone().requires_grad_()
    r = implicit_reward(v, old, star, self_normalised)
    assert torch.equal(r, torch.zeros(5, dtype=torch.float64))
    r.sum().backward()
    weight = (old - star).abs().flatten(1).mean(1)[:, None, None] if self_normalised else 1.0
    assert v.grad is not None and torch.allclose(v.grad, -2 * (old - star) / 12 / weight)
    closer = implicit_reward(old + 0.1 * (star - old), old, star, False)
    assert torch.allclose(closer, (1 - 0.9**2) * (old - star).square().flatten(1).mean(1))


LEVELS = (1.0, 0.8, 0.6, 0.4, 0.2)
MEAN, STD, DIRECTION = (torch.tensor(v, dtype=torch.float64) for v in ((0.7, -0.3), (1.0, 0.5), (1.0, 0.5)))


POLICY = RolloutPolicy(LEVELS, transition="ode")


def exact_student(shift: Tensor | float = 0.0) -> AffineStudent:
    """The posterior mean of N(MEAN, STD^2), slope x + offset at every level, and a shift."""
    t = torch.tensor(LEVELS, dtype=torch.float64)[:, None]
    slope = (1 - t) * STD**2 / ((1 - t) ** 2 * STD**2 + t**2)
    return AffineStudent(MEAN - slope * (1 - t) * MEAN + shift, slope, POLICY)


def copied_networks(student: AffineStudent) -> Networks:
    copies = {role: exact_student().requires_grad_(False) for role in ("reference", "sampler", "teacher")}
    return Networks({"student": student, **copies}, POLICY, scorer(lambda x: x @ DIRECTION))


def derived_shift(beta: float, std: Tensor | float, clip: float = 5.0) -> Tensor:
    """D V_t a / (4 clip beta std): [levels, 2]."""
    t = torch.tensor(LEVELS, dtype=torch.float64)[:, None]
    return 2 * ((1 - t) ** 2 * STD**2 + t**2) * DIRECTION / (4 * clip * beta * std)


def test_the_loss_on_a_gaussian_is_zero_at_the_derived_shift_and_not_at_the_tilt() -> None:
    """At every level and noise, for samples of another law; and the gain is then 1. The shift of p_old exp(R / beta),
    sigma^2 S a / (2 clip beta std V), is another function of t: its loss is not zero. Fails with noise of its own for
    each sample, or without the factors 2 clip and D."""
    objective, batch = CRD(**UNANCHORED | {"group_size": 8, "beta": 0.3}), grouped_batch(160, 8, dim=2)
    x0 = 0.4 * batch.normal("elsewhere") - 1
    reward = x0 @ DIRECTION
    std = reward.std()
    advantage = (reward - group_mean(reward, batch.group)) / std  # type: ignore[arg-type]
    assert advantage.abs().max() < 5
    t = torch.tensor(LEVELS, dtype=torch.float64)[:, None]
    tilt = t**2 * STD**2 * DIRECTION / (3.0 * std * ((1 - t) ** 2 * STD**2 + t**2))
    score = Score(reward, torch.ones(160, dtype=torch.bool))

    def losses(shift: Tensor | float) -> list[tuple[float, float]]:
        networks = copied_networks(exact_student(shift))
        found = [objective.draw_loss(networks, batch, x0, advantage, score, level, "x") for level in LEVELS]
        return [(loss.total.item(), loss.terms["gain"].item()) for loss in found]

    exact, none, other = losses(derived_shift(0.3, std)), losses(0.0), losses(tilt)
    print(f"derived {max(v for v, _ in exact):.1e}, unmoved {none[0][0]:.3f}, the tilt's {[v for v, _ in other]}")
    assert all(abs(v) < 1e-25 and abs(gain - 1) < 1e-12 for v, gain in exact)
    assert all(v > 0.1 and gain == 0 for v, gain in none)
    assert max(v for v, _ in other) > 0.05


@pytest.mark.slow
def test_training_on_a_gaussian_reaches_the_derived_shift() -> None:
    """With a fixed reference, from its own moving sampler. The std of A is that of centred rewards: of 24, sqrt(23/24)
    of the sampler's. Affine students, 150 updates."""
    student = exact_student()
    networks = copied_networks(student)
    objective = CRD(
        beta=0.2,
        self_normalised=False,
        anchor_weight=0,
        std="within_groups",
        reference_decay=Decay(first=1.0),
        sampler_decay=Decay(first=0.5),
    )
    optimizer = torch.optim.Adam(student.parameters(), 0.05, betas=(0.9, 0.95))
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=150)
    state = objective.init_state()
    for step in range(150):
        backward(objective, networks, grouped_batch(240, 24, step, 2, first=240 * step), state)
        optimizer.step()
        decay.step()
        objective.finish(TURN, networks, state)
    batch = grouped_batch(20_000, 24, 999, 2, first=20_000 * 999)

    def law(network: nn.Module) -> Tensor:
        with torch.no_grad():
            return sample(network, networks.policy, batch.cond, batch.normal)  # type: ignore[arg-type]

    start = law(exact_student())
    std = start.std(0)
    wanted = law(exact_student(derived_shift(0.2, (std * DIRECTION).norm() * (23 / 24) ** 0.5)))
    found = law(student)
    error = ((found.mean(0) - wanted.mean(0)) / std).abs().max().item()
    moved = ((wanted.mean(0) - start.mean(0)) / std).abs().max().item()
    away = energy_distance(found[:1500], wanted[1500:3000])
    spread = ((found.std(0) - std) / std).abs().max().item()
    print(f"mean off by {error:.3f} std after a shift of {moved:.2f}, std by {spread:.3f}; energy distance {away:.4f}")
    assert error < 0.05 and away < 0.01 and spread < 0.05 and moved > 0.9


# --- rewards


@pytest.mark.parametrize("std", ["batch", "within_groups"])
def test_an_update_of_two_micro_batches_has_the_advantages_of_one(std: Any) -> None:
    """Of 16 samples whose prompts differ much, at once and in halves: collected, then used. Without collecting, a half
    has another standard deviation. What was collected is gone after the update."""
    objective = CRD(group_size=4, std=std)
    networks, whole = moved_networks(objective, lambda x: x[:, 0] + 3 * x[:, 1].sign()), grouped_batch(16, 4, dim=2)
    (turn,) = objective.turns(0, {})
    state = objective.init_state()
    exact, _ = objective.advantage(whole, objective.samples(networks, whole, state)[1], state)
    halves = [dataclasses.replace(grouped_batch(8, 4, dim=2, first=first), shared={}) for first in (0, 8)]
    for half in halves:
        objective.collect(turn, networks, half, state)
    for half, expected in zip(halves, exact.split(8), strict=True):
        score = objective.samples(networks, half, state)[1]
        assert torch.allclose(objective.advantage(half, score, state)[0], expected, atol=1e-6)
        assert not torch.allclose(objective.advantage(half, score, objective.init_state())[0], expected, atol=1e-2)
        loss = next(iter(objective.loss(turn, networks, half, state)))
        assert loss.total.requires_grad
    objective.finish(turn, networks, state)
    assert state.keys() == {"updates"}


@pytest.mark.parametrize("std", ["group", "within_groups"])
def test_an_update_of_four_micro_batches_has_the_gradient_of_one(std: Any) -> None:
    """The rewards of the first prompt are all equal and those of another are partly invalid, so that a mean over the
    samples of a micro-batch that are used would be another one, in the matching and in the anchor."""
    objective = CRD(group_size=4, std=std, jitter=0.1)
    networks = moved_networks(objective)
    (turn,) = objective.turns(0, {})
    reward = torch.tensor([1.0, 1, 1, 1, 0, 2, 1, 4, 5, 1, 0, 0, 2, 0, 1, 3])

    def score(x0: Tensor, ids: Tensor) -> Score:
        return Score(reward[ids], ids % 16 < 14)

    def update(parts: int) -> Tensor:
        size, state = 16 // parts, objective.init_state()
        batches = [dataclasses.replace(grouped_batch(size, 4, dim=2, first=size * i), shared={}) for i in range(parts)]
        for batch in batches:
            networks.scorer = lambda x0, prompts, group, grad, ids=batch.ids: score(x0, ids)  # type: ignore[assignment]
            objective.collect(turn, networks, batch, state)
        networks.student.zero_grad()
        for batch in batches:
            for loss in objective.loss(turn, networks, batch, state):
                (loss.total / parts).backward()
        return gradient(networks)

    whole, divided = update(1), update(4)
    error = (whole - divided).norm() / whole.norm()
    print(f"{std}: gradients differ by {error:.1e}")
    assert error < 1e-6


def test_a_function_of_the_prompt_added_to_the_rewards_changes_nothing() -> None:
    """Loss and gradient, to the bit: rewards are multiples of 2^-10, the function an integer a prompt. Fails when
    advantages are of the batch."""
    objective = CRD(group_size=4)
    networks = moved_networks(objective)
    batch = grouped_batch(16, 4, dim=2)
    offset = torch.tensor([7.0, -30.0, 100.0, 2.0], dtype=torch.float64).repeat_interleave(4)
    found = []
    for add in (torch.zeros_like(offset), offset):
        networks.scorer = scorer(lambda x, add=add: (x[:, 0] * 1024).round() / 1024 + add)
        found.append((backward(objective, networks, batch), gradient(networks)))
    error = (found[0][1] - found[1][1]).abs().max().item()
    print(f"gradient {found[0][1].norm():.3f}, changed by {error:.1e}")
    assert found[0][0] == found[1][0] and error == 0 and found[0][1].norm() > 1e-3


def test_samples_without_a_reward_are_as_if_they_were_not_there() -> None:
    """Invalid samples leave loss, gradient and denominators, in the matching and in the anchor; a NaN reward behind
    the mask does not matter. Fails if either term does not read `valid`."""
    objective = CRD(group_size=4, jitter=0.1)
    networks = moved_networks(objective)
    batch = grouped_batch(16, 4, dim=2)
    valid = torch.ones(16, dtype=torch.bool)
    valid[[1, 6, 7, 12, 13, 14, 15]] = False
    with torch.no_grad():
        x0 = sample(networks["sampler"], FEW, batch.cond, batch.normal)  # type: ignore[arg-type]
    rows = valid.nonzero()[:, 0]
    kept = dataclasses.replace(
        batch,
        ids=batch.ids[rows],
        cond=batch.cond.select(rows),
        uncond=batch.uncond.select(rows),
        group=batch.group[rows],  # type: ignore[index]
    )
    with torch.no_grad():
        networks["reference"].load_state_dict(networks.student.state_dict())
    state = {"updates": torch.ones((), dtype=torch.int64)}
    networks.scorer = scorer(lambda x: torch.where(valid, x0[:, 0], torch.nan).nan_to_num(50.0), valid)
    masked = backward(objective, networks, batch, state), gradient(networks)
    networks.scorer = scorer(lambda x: x0[rows, 0])
    alone = backward(objective, networks, kept, state), gradient(networks)
    error = (masked[1] - alone[1]).abs().max().item()
    print(f"loss {masked[0]:.4f} and {alone[0]:.4f}; gradient differs by {error:.1e}")
    assert abs(masked[0] - alone[0]) < 1e-12 and error < 1e-12


def test_a_prompt_whose_rewards_are_equal_is_not_matched() -> None:
    """It neither adds a loss of 0 to the mean nor pulls the student back to the reference; with all prompts like that
    there is no matching gradient."""
    objective = CRD(**UNANCHORED)
    networks = moved_networks(objective)
    batch = grouped_batch(8, 4, dim=2)
    half = torch.arange(8) < 4
    networks.scorer = scorer(lambda x: torch.where(half, x[:, 0], 3.0))
    with_equal = backward(objective, networks, batch)
    rows = half.nonzero()[:, 0]
    alone = dataclasses.replace(
        batch,
        ids=batch.ids[rows],
        cond=batch.cond.select(rows),
        group=batch.group[rows],  # type: ignore[index]
    )
    networks.scorer = scorer(first)
    assert abs(with_equal - backward(objective, networks, alone)) < 1e-12
    networks.scorer = scorer(lambda x: torch.full((8,), 3.0))
    assert backward(objective, networks, batch) == 0 and not gradient(networks).any()


# --- the anchor


class Shifted(Denoiser):
    """The teacher guided at `scale`, plus a trainable shift of each sample's prediction."""

    def __init__(self, teacher: Denoiser, batch: Batch, scale: float):
        super().__init__(nn.Identity(), teacher.schedule, "sample")
        self.teacher, self.batch, self.scale = [teacher], batch, scale
        self.shift = nn.Parameter(torch.zeros(len(batch.ids), *batch.latent_shape, dtype=torch.float64))

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        return guided(self.teacher[0], x_t, t, cond, self.batch.uncond, self.scale) + self.shift


def test_the_anchor_is_least_at_the_guided_teacher_and_strongest_for_high_rewards() -> None:
    """Its gradient is 0 at v_u + 4.5 (v_c - v_u) and not at another scale; for equal distances it is proportional to
    c_min + R (1 - c_min), c_min = 1e-4 / kl, and the same for all rewards with anchor_floor 1. Fails without guidance,
    or with kl c constant."""
    objective, batch = CRD(group_size=4), grouped_batch(16, 4, dim=2)
    networks = moved_networks(objective)
    advantage = batch.normal("advantage")[:, 0]
    score = Score(advantage, torch.ones(16, dtype=torch.bool))
    x0 = batch.normal("x0")

    def pull(scale: float, shift: float, objective: CRD = objective) -> Tensor:
        student = Shifted(networks.teacher, batch, scale)
        with torch.no_grad():
            student.shift += shift
        them = Networks({**networks, "student": student, "reference": student}, FEW)
        whole, matching = (
            torch.autograd.grad(o.draw_loss(them, batch, x0, advantage, score, 0.6, "x").total, student.shift)[0]
            for o in (objective, dataclasses.replace(objective, anchor_weight=0.0))
        )
        return (whole - matching)[:, 0]

    at, off = pull(4.5, 0.0).abs().max().item(), pull(3.5, 0.0).abs().max().item()
    print(f"at the guided teacher {at:.1e}, at another scale {off:.1e}")
    assert at < 1e-12 and off > 1e-4
    reward = advantage / 10 + 0.5
    for floor, wanted in ((None, 1e-3 + reward * (1 - 1e-3)), (0.25, 0.25 + 0.75 * reward), (1.0, 0 * reward + 1)):
        found = pull(4.5, 0.3, dataclasses.replace(objective, anchor_floor=floor))
        exact = 0.1 * wanted * 2 * 0.3 / 0.6**2 / (16 * 2)  # kl c d/dx of mean over elements and samples, v = -x0 / t
        assert torch.allclose(found, exact, rtol=1e-9)


# --- moving averages


def test_decays_at_their_corners() -> None:
    old, sampler = CRD().reference_decay, CRD().sampler_decay
    assert [round(old(n), 6) for n in (0, 75, 100, 150, 10**6)] == [0.25, 0.625, 0.75, 0.999, 0.999]
    assert [round(sampler(n), 6) for n in (0, 75, 100, 209, 10**6)] == [0.0, 0.0, 0.1875, 0.999, 0.999]
    assert {Decay(first=1.0)(n) for n in (0, 5, 10**6)} == {1.0}
    with pytest.raises(ValueError, match="rises"):
        Decay(first=0.5, last=0.4)


def test_sampler_and_reference_follow_the_student_each_at_its_own_decay() -> None:
    """They begin as the student that init_from left, not as the pretrained weights; then average <- d average +
    (1 - d) student after update n. Fails if the sampler is the reference, or if finish does not move them."""
    objective = CRD(group_size=4, sampler_decay=Decay(slope=0.1, delay=2, last=0.15))
    networks = moved_networks(objective)
    state = objective.init_state()
    assert distance(networks["reference"], networks.student) > 0.05
    backward(objective, networks, grouped_batch(8, 4, dim=2), state)
    start = [p.detach().clone() for p in networks.student.parameters()]
    assert all(distance(networks[role], networks.student) == 0 for role in ("reference", "sampler"))
    expected = {"reference": start[0], "sampler": start[0]}
    for n in (1, 2, 3, 4):
        with torch.no_grad():
            for p in networks.student.parameters():
                p.add_(n)
        objective.finish(TURN, networks, state)
        now = next(networks.student.parameters()).detach()
        for role, d in (("reference", 0.25 + 0.005 * n), ("sampler", (0.0, 0.0, 0.1, 0.15)[n - 1])):
            expected[role] = d * expected[role] + (1 - d) * now
            assert torch.allclose(next(networks[role].parameters()), expected[role], atol=1e-12)
        backward(objective, networks, grouped_batch(8, 4, dim=2), state)  # a later update copies nothing
    assert distance(networks["sampler"], networks["reference"]) > 0.1 and int(state["updates"]) == 4


def test_samples_come_from_the_sampler_and_errors_from_the_reference() -> None:
    """What the reward is asked about is the sampler's, whatever the reference is."""
    objective = CRD(**UNANCHORED)
    networks = moved_networks(objective)
    batch, seen = grouped_batch(8, 4, dim=2), list[Tensor]()

    def reward(x: Tensor) -> Tensor:
        seen.append(x)
        return x[:, 0]

    networks.scorer = scorer(reward)
    state = {"updates": torch.ones((), dtype=torch.int64)}
    losses = []
    for role in (None, "reference", "sampler"):
        if role:
            with torch.no_grad():
                for p in networks[role].parameters():
                    p.add_(0.05)
        losses.append(backward(objective, networks, batch, state))
        with torch.no_grad():
            assert torch.equal(seen[-1], sample(networks["sampler"], FEW, batch.cond, batch.normal))  # type: ignore[arg-type]
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert len({round(v, 9) for v in losses}) == 3


def test_only_the_student_gets_gradient() -> None:
    """Every parameter of it, and nothing else does; the roles are those the recipe may train."""
    objective = CRD(group_size=4)
    networks = moved_networks(objective)
    backward(objective, networks, grouped_batch(8, 4, dim=2))
    assert objective.trained_roles == ("student",) and objective.turns(3, {}) == (
        dataclasses.replace(TURN, collects=True),
    )
    assert set(networks) == {"student", "teacher", "reference", "sampler"}
    reached = {n: p.grad is not None and bool(p.grad.any()) for n, p in networks.student.named_parameters()}
    assert all(v for n, v in reached.items()), reached
    assert all(p.grad is None for role in networks if role != "student" for p in networks[role].parameters())


def test_a_students_adapter_has_adapters_for_copies() -> None:
    """With LoRA the two are further adapters on the shared base, and become the student's in the first update."""
    objective = CRD(group_size=4)
    networks = moved_networks(objective, adapter=LoraConfig(rank=2))
    assert {len(list(networks[role].parameters())) for role in ("student", "reference", "sampler")} == {2 * 6}
    backward(objective, networks, grouped_batch(8, 4, dim=2))
    assert all(distance(networks[role], networks.student) == 0 for role in ("reference", "sampler"))
    assert gradient(networks).any()
    assert all(p.grad is None for role in ("reference", "sampler") for p in networks[role].parameters())


# --- levels


@pytest.mark.parametrize("jitter", [0.0, 0.2])
def test_levels_are_the_students_own_and_shared_within_prompts(jitter: float) -> None:
    """Every level once, or `draws` of them in a cycle that begins anywhere. t and noise are the same for all samples
    of a prompt; t is off a level by at most the fraction `jitter`, and at most 1. Fails with draws by sample."""
    objective = CRD(**UNANCHORED | {"jitter": jitter})
    networks = moved_networks(objective)
    batch = grouped_batch(16, 4, dim=2)
    losses = list(objective.loss(TURN, networks, batch, objective.init_state()))
    with torch.no_grad():
        x0 = sample(networks["sampler"], FEW, batch.cond, batch.normal)  # type: ignore[arg-type]
    student = Recorder(networks.student)
    networks.modules["student"] = student
    again = list(objective.loss(TURN, networks, batch, {"updates": torch.ones((), dtype=torch.int64)}))
    assert [a.total.item() for a in again] == [a.total.item() for a in losses] and len(losses) == 3
    near = [min(FEW.timesteps, key=lambda level, t=t: abs(level - t[0].item())) for _, t, *_ in student.calls]
    assert sorted(near, reverse=True) == list(FEW.timesteps)
    for level, (x_t, t, *_) in zip(near, student.calls, strict=True):
        assert ((t - level).abs() <= jitter * level + 1e-12).all() and t.max() <= 1
        noise = ((x_t - (1 - t[:, None]) * x0) / t[:, None]).reshape(4, 4, 2)
        assert torch.allclose(noise, noise[:, :1].expand_as(noise)) and (noise[0, 0] - noise[1, 0]).abs().max() > 0.1
        assert torch.equal(t.reshape(4, 4), t.reshape(4, 4)[:, :1].expand(4, 4))
        assert (len(t.unique()) > 1) == (jitter > 0)
    student.calls.clear()
    more = dataclasses.replace(objective, draws=7, jitter=0.0)
    assert len(list(more.loss(TURN, networks, batch, {"updates": torch.ones(())}))) == 7
    counts = [sum(float(call.t[0]) == level for call in student.calls) for level in FEW.timesteps]
    assert sorted(counts) == [2, 2, 3]


def test_the_number_of_draws_does_not_scale_the_loss() -> None:
    """Losses and terms of an update add to the mean over draws; the reward's are those of the samples."""
    objective = CRD(group_size=4, jitter=0.1)
    networks = moved_networks(objective)
    batch = grouped_batch(400, 4, dim=2)
    totals = []
    for draws in (3, 30):
        found = list(dataclasses.replace(objective, draws=draws).loss(TURN, networks, batch, objective.init_state()))
        assert len(found) == draws
        assert abs(sum(loss.terms["reward_valid"].item() for loss in found) - 1) < 1e-6
        assert all(abs(loss.terms["loss"] - loss.total.detach()) < 1e-12 for loss in found)
        totals.append(sum(loss.total.item() for loss in found))
    print(totals)
    assert abs(totals[1] / totals[0] - 1) < 0.2


# --- recipes

CHEAP = [
    "backbone.width=16",
    "backbone.fit_steps=20",
    "backbone.fit_batch_size=32",
    "objective.group_size=4",
    "train.batch_size=8",
    "train.steps=4",
    "train.log_every=1",
    "train.sample_every=0",
    "train.eval_every=0",
    "train.checkpoint_every=2",
    "eval.num_samples=64",
    "eval.quick_num_samples=64",
    "eval.teacher_steps=[]",
    "optimizers.student.decay=constant",
    "rollout.timesteps=[1.0, 0.5]",
    "health.every=0",
]


@pytest.mark.slow
def test_the_averages_and_their_count_survive_a_restart(tmp_path: Path) -> None:
    """Four updates, and two, a restart and two more, end with the same bits in every file."""

    def run(name: str, *more: str) -> dict[str, Tensor]:
        overrides = [*CHEAP, f"output_dir={tmp_path / name}", *more]
        folder = train(load_recipe(ROOT / "recipes/mixture_crd.yaml", overrides)) / "checkpoints"
        last = sorted(folder.iterdir())[-1]
        return {f"{f.stem}.{k}": v for f in last.glob("*.safetensors") for k, v in load_file(f).items()}

    whole = run("whole")
    run("parts", "train.steps=2")
    parts = run("parts")
    assert whole["objective.updates"] == 4
    assert {"reference", "sampler", "student", "ema"} <= {name.partition(".")[0] for name in whole}
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    inlet = "network.inlet.weight"
    assert not torch.equal(whole[f"reference.{inlet}"], whole[f"student.{inlet}"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rewards=null"], "missing key rewards"),
        (["train.batch_size=100"], "whole groups of objective.group_size 24"),
        (["objective.group_size=1"], "objective.group_size"),
        (["objective.reference_decay.first=1.5"], "reference_decay.first"),
        (["objective.reference_decay={frist: 1}"], "did you mean 'first'"),
        (["objective.temperature=-1"], "objective.temperature"),
        (["optimizers.reference={lr: 1e-3}"], "optimizers.reference"),
    ],
)
def test_impossible_recipes_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(ROOT / "recipes/mixture_crd.yaml", overrides)


def compounded_law(
    mixture: Mixture, label: int, levels: Sequence[float], direction: Tensor, kl: float, count: int = 800
) -> tuple[Tensor, Tensor]:
    """Samples [count, 2] of where a moving reference and a constant anchor leave a many-step student (derived), and of
    the teacher sampled at the same levels. With E over x_t's origin among the student's own samples x0, pointwise

        E[A (x0_hat - x0) | x_t] + kl (x0_hat - x0_hat_ref) = 0

    found by iterating samples -> predictions -> samples. A of a group of 24 is sqrt(23 / 24) of the whole law's."""
    draws = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(count).double()
    noise, labels = torch.special.ndtri(draws.clamp(1e-9, 1 - 1e-9)), torch.full((count,), label)

    def walk(x0: Tensor | None) -> Tensor:
        x = noise
        for level, after in zip(levels, (*levels[1:], 0.0), strict=True):
            sigma = torch.full((count, 1), level, dtype=torch.float64)
            prediction = mixture.posterior_mean(x, 1 - sigma, sigma, labels)
            if x0 is not None:
                reward = x0 @ direction
                advantage = (23 / 24) ** 0.5 * (reward - reward.mean()) / reward.std(correction=0)
                origin = (-torch.cdist(x, (1 - level) * x0).square() / (2 * level**2)).softmax(1)
                pulled = origin @ (advantage[:, None] * x0) + kl * prediction
                prediction = pulled / (origin @ advantage + kl)[:, None]
            x = after / level * x + (1 - after / level) * prediction
        return x

    x0 = start = walk(None)
    for _ in range(15):
        x0 = (x0 + walk(x0)) / 2
    return x0, start


@pytest.mark.slow
def test_a_moving_reference_compounds_until_the_anchor_holds_it(tmp_path: Path) -> None:
    """The recipe, at half its length, reaches its own fixed point for each prompt: the means within 0.05 standard
    deviations and the energy distance below 0.01, after the reward's mean rose by 0.3. That the law is near
    p_ref exp(A / kl) is only printed."""
    overrides = [
        "train.steps=150",
        "train.sample_every=0",
        "train.eval_every=0",
        "train.checkpoint_every=0",
        "eval.teacher_steps=[]",
        "health.every=0",
        f"output_dir={tmp_path / 'run'}",
    ]
    recipe = load_recipe(ROOT / "recipes/mixture_crd.yaml", overrides)
    sampler, mixture = load_sampler(train(recipe)), build_mixture(recipe.backbone)
    kl, direction = recipe.objective.anchor_weight, torch.tensor([1.0, 0.0], dtype=torch.float64)
    for label in (0, 1):
        wanted, start = compounded_law(mixture, label, recipe.rollout.timesteps, direction, kl)
        found = sampler.sample([str(label)] * 2000, range(2000)).double()
        std = wanted.std(0)
        error = ((found.mean(0) - wanted.mean(0)) / std).abs().max().item()
        moved = ((wanted.mean(0) - start.mean(0)) / std)[0].item()
        rate, spread = 1 / (kl * std[0]), mixture.variances[:, 0]
        weights = (mixture.logits[label] + mixture.means[:, 0] * rate + spread * rate**2 / 2).softmax(0)
        tilt = weights @ (mixture.means[:, 0] + spread * rate)
        away = energy_distance(found, wanted)
        rewards = [x[:, 0].mean().item() for x in (found, wanted)]
        print(f"prompt {label}: mean off by {error:.3f} std, shift {moved:.2f}; energy distance {away:.4f}")
        print(f"  mean reward {rewards[0]:.3f}, derived {rewards[1]:.3f}, of the tilt {tilt:.3f}")
        assert error < 0.05 and away < 0.01 and moved > 0.25


def energy_distance(x: Tensor, y: Tensor) -> float:
    return 2 * mean_distance(x, y) - mean_distance(x) - mean_distance(y)


def test_the_affine_student_starts_as_the_posterior_mean() -> None:
    """Exactly, so that what the oracles of the Gaussian find is about CRD alone."""
    teacher, batch = gaussian(MEAN.tolist(), STD.tolist()), grouped_batch(20)
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for level in LEVELS:
        t = torch.full((20,), level, dtype=torch.float64)
        assert torch.allclose(exact_student()(x, t, batch.cond), teacher(x, t, batch.cond))
