"""Stream-R1, ASD, HiAR and Salt: their terms against closed forms on AR(1) videos and Gaussians, and on a tiny real
Wan what a chunk sees and what carries gradient."""

import dataclasses
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import AffineStudent, affine_networks, gaussian, point_batch, reached, tiny_batch, tiny_networks
from test_ar1_streaming import ONE_STEP, LawDenoiser, backbone, batch_of, one_step_student
from test_causal_objectives import videos
from test_streaming import POLICIES, batch, policy, wan
from test_streaming_training import recipe
from tiny_wan import tiny_wan
from torch import Tensor

from fastgen import signals
from fastgen.backbones import ar1_formulas as f
from fastgen.backbones.ar1_denoisers import past_frames, remember
from fastgen.backbones.ar1_law import to_complex, to_latents
from fastgen.batch import Batch, Conditioning, Draws
from fastgen.config import load_recipe
from fastgen.data import AR1Data
from fastgen.denoiser import Denoiser, Inputs
from fastgen.modules.heads import StopHeads
from fastgen.networks import Networks
from fastgen.objectives import ASD, DMD2, SCDMD, HiAR, Salt, StreamR1
from fastgen.objectives.base import Turn
from fastgen.objectives.causal import predict_beside
from fastgen.objectives.salt import AlignTurn, relations
from fastgen.objectives.step_lists import drawn_list
from fastgen.objectives.stream_r1 import saliency, saliency_weight
from fastgen.planning.plan import plan
from fastgen.recipe import Recipe
from fastgen.registry import OBJECTIVES, RecipeError, import_name
from fastgen.rewards import Composite, Scorer
from fastgen.rewards.function import FunctionReward
from fastgen.rollout import Rollout, RolloutPolicy, Step, backward_simulation
from fastgen.schedule import FlowSchedule, TimeSampler
from fastgen.streaming.schedule import ChunkSchedule
from fastgen.train import train

PAGE = Path(__file__).parents[1] / "docs/streaming_methods.md"
STUDENT, DISCRIMINATOR = Turn("student", ("student",)), Turn("discriminator", ("discriminator",))
LISTS = ((1.0, 0.8, 0.6, 0.3), (1.0, 0.6), (1.0,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan(tmp_path_factory.mktemp("wan"), layers=2, time_scale=1e-3)


def drawn(count: int, index: int, start: int = 0) -> int:
    """The first key from `start` on with which list `index` of `count` is drawn."""
    keys = (key for key in range(start, start + 1000))
    return next(k for k in keys if drawn_list(dataclasses.replace(batch(2), key=k), (1 / count,) * count) == index)


# --- Stream-R1


def test_the_saliency_weight_has_mean_one_and_follows_the_frames() -> None:
    s = torch.rand(3, 5, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = saliency_weight(s, 0.2, 0.15)
    assert weight.shape == (3, 5, 1, 4, 6)
    assert torch.allclose(weight.mean((1, 2, 3, 4)), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(saliency_weight(1e-12 * s, 0.2, 0.15), weight)  # whatever the unit of the reward
    order = torch.tensor([3, 0, 4, 2, 1])
    assert torch.allclose(saliency_weight(s[:, order], 0.2, 0.15), weight[:, order])
    assert torch.equal(saliency_weight(torch.full_like(s, 0.3), 0.2, 0.15), torch.ones_like(weight))
    assert torch.equal(saliency_weight(torch.zeros_like(s), 0.2, 0.15), torch.ones_like(weight))
    frames = weight.mean((2, 3, 4))  # temporal weights over their mean, as spatial ones have mean 1 in a frame
    assert torch.allclose(frames.amin(1) / frames.amax(1), torch.full((3,), 0.2, dtype=torch.float64))
    floor = (s - s.amin((2, 3), True)) / (s.amax((2, 3), True) - s.amin((2, 3), True)) < 0.15
    least = weight[:, :, 0].amin((2, 3), True).expand(s.shape)
    assert torch.equal(weight[:, :, 0] <= least * (1 + 1e-9), floor)


def test_saliency_of_pictures_is_that_of_their_latent_cell() -> None:
    """4 x 4 pixels per cell: the root of the mean square over a cell, the norm over colours. Of nine pictures, the
    first latent frame is the first one, and each other is four. Eight can only be divided evenly."""
    for picture, of, frame, number in ((0, 9, 0, 1), (1, 9, 1, 4), (4, 9, 1, 4), (5, 9, 2, 4), (7, 8, 2, 3)):
        x0, grad = torch.zeros(1, 3, 16, 2, 2), torch.zeros(1, of, 3, 8, 8)
        grad[0, picture, :, 6, 1] = torch.tensor([3.0, 0.0, 4.0])
        expected = torch.zeros(1, 3, 2, 2)
        expected[0, frame, 1, 0] = 5 / math.sqrt(number * 16)
        assert torch.allclose(saliency(grad, x0, pictures=True), expected)
    latents = torch.randn(1, 3, 16, 2, 2)
    assert torch.allclose(saliency(latents.flatten(1), x0, pictures=False), latents.square().sum(2).sqrt())


def rewards(*parts: tuple[str, int, float]) -> Composite:
    """Linear rewards: `weight` times the sum of frame `frame` of a video of latents."""

    def of(name: str, frame: int) -> Any:
        def function(x: Tensor, prompts: Any) -> Tensor:
            return x[:, frame].flatten(1).sum(1)

        function.__name__ = name
        return function

    made = [FunctionReward(of(n, k), input="latents", differentiable=True, weight=w) for n, k, w in parts]
    return Composite(tuple(made))


def rewarded(composite: Composite, copies: int = 3) -> tuple[Networks, Batch]:
    made = backbone(torch.float64, copies=copies, num_frames=4, means=(0.0,))
    student = one_step_student(made, 0.7, (0.9, 0.4))
    modules = {"student": student, "teacher": made.load("teacher"), "fake_score": LawDenoiser(student, 0.0)}
    return Networks(modules, ONE_STEP, Scorer(composite, made.decode)), batch_of(made, 6, 0)


def test_the_frames_that_a_reward_reads_get_the_weight() -> None:
    """A linear reward of frame 2: the temporal weights are 0.2, 0.2, 1, 0.2 over their mean, and the gradient at the
    student's video is DMD2's times w W."""
    networks, data = rewarded(rewards(("third", 2, 1.0)))
    objective, state = StreamR1(), {"reward": torch.tensor([0.5, 1.0]), "seen": torch.zeros(2)}
    rollout = objective.rollout(networks, data, grad=True)
    weight, terms = objective.reward_weight(networks, data, rollout.x, state)
    r = rollout.x[:, 2].detach().flatten(1).sum(1).float()
    expected = (2 * (r - 0.5)).clamp(-4, 4).exp()[:, None] * torch.tensor([0.2, 0.2, 1.0, 0.2]) / 0.4
    assert not weight.requires_grad and weight.shape == (6, 4, 1, 1, 3)
    assert torch.allclose(weight[:, :, 0, 0], expected[..., None].expand(-1, -1, 3), rtol=1e-5)
    assert terms["saliency_peak"] == pytest.approx(2.5)
    loss = objective.matching_loss(networks, data, rollout, weight)
    (found,) = torch.autograd.grad(loss.total, rollout.x)
    plain, _ = DMD2().score_gradient(networks, data, rollout)
    assert torch.allclose(found, weight * plain / found.numel(), rtol=1e-5, atol=1e-12) and plain.abs().max() > 0.1


def test_weak_axes_say_more_about_where() -> None:
    """Two axes, on frames 0 and 3: the fused saliency of the frames is softmax(-r / T), and of a reward that is to be
    low the sign is turned."""
    for sign in (1.0, -1.0):
        networks, data = rewarded(rewards(("first", 0, 1.0), ("last", 3, sign)))
        x = 0.1 * data.chunk(range(4)).normal("x")
        weight, _ = StreamR1(temporal_floor=1e-6).reward_weight(networks, data, x, StreamR1().init_state())
        r = torch.stack([x[:, 0].flatten(1).sum(1), sign * x[:, 3].flatten(1).sum(1)]).float()
        shares = (-r).softmax(0)
        found = weight[:, 0].flatten(1)[:, 0] / weight[:, 3].flatten(1)[:, 0]
        assert torch.allclose(found, shares[0] / shares[1], rtol=1e-3)


def test_a_part_without_gradient_counts_in_the_reward_alone() -> None:
    composite = rewards(("first", 0, 1.0))
    value = FunctionReward(lambda x, _: torch.full((len(x),), 0.5), input="latents", differentiable=False)
    networks, data = rewarded(Composite((*composite.parts, value)))
    x, state = data.chunk(range(4)).normal("x"), StreamR1().init_state()
    scores, gradients = networks.scorer.gradients(x, data.prompts)  # type: ignore[union-attr]
    assert len(scores) == 2 and list(gradients) == ["first"] and gradients["first"][:, 1:].abs().max() == 0
    weight, terms = StreamR1().reward_weight(networks, data, x, state)
    assert float(terms["reward"]) == pytest.approx(float(x[:, 0].flatten(1).sum(1).mean()) + 0.5, rel=1e-5)
    alone, _ = StreamR1().reward_weight(rewarded(composite)[0], data, x, StreamR1().init_state())
    assert torch.equal(weight, alone)


def test_axes_that_improve_at_different_speeds_lower_every_weight() -> None:
    """The penalty is lambda times the standard deviation of the improvements, once the window is full."""
    networks, data = rewarded(rewards(("first", 0, 1.0), ("last", 3, 1.0)))
    objective, state = StreamR1(window=4, balance=0.5), StreamR1().init_state()
    x = data.chunk(range(4)).normal("x")
    for shift in (0.0, 0.0, 1.0):
        moved = x.clone()
        moved[:, 0] += shift
        for part in (moved, moved + 0.1):  # two micro-batches of an update
            objective.reward_weight(networks, data, part, state)
        objective.finish(STUDENT, networks, state)
    assert state["axes"].shape == (3, 2) and objective.penalty(state) == 0
    means = torch.stack([(x[:, k] + 0.05).flatten(1).sum(1).mean() for k in (0, 3)]).float()
    assert torch.allclose(state["axes"][0], means, rtol=1e-4)
    state["axes"] = torch.tensor([[9.0, 9.0], [0.0, 0.0], [0.0, 2.0], [3.0, 1.0], [5.0, 1.0]])[-4:]
    penalty = objective.penalty(state)  # improvements 4 and 0, whose standard deviation is 2 sqrt 2
    assert float(penalty) == pytest.approx(0.5 * 2 * math.sqrt(2))
    without, _ = StreamR1(window=5).reward_weight(networks, data, 0 * x, dict(state) | {"reward": torch.zeros(2)})
    weight, terms = objective.reward_weight(networks, data, 0 * x, dict(state) | {"reward": torch.zeros(2)})
    assert torch.allclose(weight, without * math.exp(-2 * float(penalty))) and terms["balance_penalty"] == penalty
    objective.reward_weight(networks, data, x, state)
    objective.finish(STUDENT, networks, state)
    assert len(state["axes"]) == 4 and not [name for name in state if name == "axes.seen"]
    before = state["axes"].clone()
    objective.reward_weight(networks, data, x * float("nan"), state)  # no sample is valid, so that there are no means
    objective.finish(STUDENT, networks, state)
    assert torch.equal(state["axes"], before) and "axes.seen" not in state


def test_a_perfect_student_is_left_alone_whatever_the_weights() -> None:
    """With the exact fake score at the teacher's law no sample has gradient, and it has away from it."""
    made = backbone(torch.float64, copies=2, num_frames=4, means=(0.0,))
    rho, found = made.law.rhos[0], []
    for gain in (math.sqrt(f.innovation(rho)), 0.3):
        student = one_step_student(made, rho, (1.0, gain))
        modules = {"student": student, "teacher": made.load("teacher"), "fake_score": LawDenoiser(student, 0.0)}
        networks = Networks(modules, ONE_STEP, Scorer(rewards(("second", 1, 1.0)), made.decode))
        StreamR1().loss(STUDENT, networks, batch_of(made, 32, 0), StreamR1().init_state()).total.backward()
        found.append(max(p.grad.abs().max().item() for p in student.parameters() if p.grad is not None))
    print(f"largest gradient {found}")
    assert found[0] < 1e-6 < 1e-3 < found[1]


# --- ASD


class ExactASD(ASD):
    """Its discriminator is the optimum: the log-ratio of the laws of two steps and of one, at the level of x_t."""

    def step_logits(self, networks: Networks, batch: Batch, x0: Tensor, index: int) -> Tensor:
        student: Any = networks.student
        schedule = FlowSchedule()
        t = self.gan_time(batch.uniform("gan_time"))
        x_t = schedule.add_noise(x0, batch.normal("gan_noise"), t)
        alpha, sigma = (v[:, 0] for v in schedule.coefficients(t, x_t))
        logs = []
        for mean, variance in (
            (student.a[0], student.b[0] ** 2),
            tuple(law[1] for law in student.laws()),
        ):
            spread = alpha**2 * variance.detach() + sigma**2
            logs.append(-0.5 * ((x_t[:, 0] - alpha * mean.detach()) ** 2 / spread + spread.log()))
        return (logs[1] - logs[0])[:, None]


def two_steps(a: float, b: float, second: tuple[float, float]) -> Networks:
    two = RolloutPolicy((1.0, 0.5))
    student = AffineStudent([a, second[0]], [b, second[1]], two)  # type: ignore[arg-type]
    networks = affine_networks(student, gaussian())
    return Networks({**networks, "discriminator": torch.nn.Identity()}, two)


def test_the_optimum_of_asd_is_where_one_step_has_the_law_of_two() -> None:
    """With D's optimum: no gradient where the two laws agree, and elsewhere the one-step law moves to the other."""
    a, b = 0.7, 1.3
    slope = b / math.sqrt(0.25 * b**2 + 0.25)
    same, objective = (a - 0.5 * slope * a, slope), ExactASD(lists=((1.0, 0.5), (1.0,)), asd_weight=1.0)
    data = point_batch(4000, dim=1, uncond=2)
    for second, agree in ((same, True), ((same[0] + 0.5, slope), False)):
        networks = two_steps(a, b, second)
        student: Any = networks.student
        x = objective.whole(networks, data, 1, grad=True).x
        signals.gan_generator_loss(objective.step_logits(networks, data, x, 1)).backward()
        found = (student.a.grad.tolist(), student.b.grad.tolist())
        print(f"agree {agree}: {found}")
        assert found[0][1] == found[1][1] == 0  # the second step is not the one-step student's
        assert max(abs(found[0][0]), abs(found[1][0])) < 1e-12 if agree else found[0][0] < -0.01


def test_asd_adds_its_gan_to_dmd2_for_all_lists_but_the_longest() -> None:
    objective = ExactASD(lists=((1.0, 0.5), (1.0,)), asd_weight=0.3)
    for index in (0, 1):
        key = drawn(2, index)
        data = dataclasses.replace(point_batch(50, dim=1, uncond=2), key=key)
        networks = two_steps(0.2, 0.8, (0.0, 1.0))
        loss = objective.loss(STUDENT, networks, data, {})
        plain = DMD2().student_loss(networks.with_policy(RolloutPolicy(objective.lists[index])), data)
        assert ("gan" in loss.terms) == (index == 1)
        added = 0.3 * loss.terms["gan"] if index else 0.0
        assert float(loss.total) == pytest.approx(float(plain.total + added), rel=1e-9)


def test_the_discriminators_real_samples_are_those_of_more_steps() -> None:
    """Its optimum tells the two apart in their favour, and its loss is that of this optimum."""
    objective, data = ExactASD(lists=((1.0, 0.5), (1.0,))), point_batch(4000, dim=1, uncond=2)
    networks = two_steps(0.7, 1.3, (0.9, 1.0))
    loss = objective.discriminator_loss(networks, data)
    more, fewer = (
        objective.step_logits(networks, data, objective.whole(networks, data, i, grad=False).x, 1) for i in (0, 1)
    )
    assert torch.allclose(loss.total, signals.gan_discriminator_loss(more, fewer))
    assert loss.total < 2 * math.log(2) and loss.terms["logit_gap"] > 0.01


def test_the_discriminator_is_told_the_number_of_steps() -> None:
    """Of its sets of heads, the one of the drawn pair learns. No other network does."""
    objective, heads = ASD(lists=LISTS), set()
    networks = tiny_networks(objective, RolloutPolicy(LISTS[1]))
    for key in range(6):
        for module in networks.values():
            module.zero_grad()
        objective.loss(DISCRIMINATOR, networks, dataclasses.replace(tiny_batch(), key=key), {}).total.backward()
        learning = {name.split(".")[1] for name, moved in reached(networks["discriminator"]).items() if moved}
        assert len(learning) == 1
        heads |= learning
        assert all(p.grad is None for r in ("student", "fake_score") for p in networks[r].parameters())
    assert heads == {"0", "1"}


def test_whole_samples_are_not_the_shared_rollout() -> None:
    networks = two_steps(0.2, 0.8, (0.3, 1.1))
    data = dataclasses.replace(point_batch(8, dim=1), shared={})
    objective = ASD(lists=((1.0, 0.5), (1.0,)))
    first = objective.rollout(networks, data, grad=False).x
    one, two = (objective.whole(networks, data, i, grad=False).x for i in (1, 0))
    assert not torch.equal(one, two) and torch.equal(objective.rollout(networks, data, grad=False).x, first)


def test_asd_reaches_every_chunk_and_its_replay_is_the_same() -> None:
    """On a tiny Wan: the gradient of the GAN of one-step videos, whole graph and replayed."""
    gradients, objective = [], ASD(lists=((1.0, 0.6), (1.0,)), asd_weight=1.0)
    data = dataclasses.replace(batch(4), key=drawn(2, 1))
    for replay in (False, True):
        sampler = policy(ChunkSchedule(frames=2, replay=replay))
        torch.manual_seed(0)
        modules = {"student": wan(), "teacher": wan(), "fake_score": wan()}
        heads = StopHeads(modules["fake_score"].feature_dim, len(modules["fake_score"].feature_modules), 8, 1).double()
        networks = Networks({**modules, "discriminator": heads}, sampler)
        x = objective.whole(networks, data, 1, grad=True).x
        gan = signals.gan_generator_loss(objective.step_logits(networks, data, x, 1))
        (at_x,) = torch.autograd.grad(gan, x, retain_graph=True)
        assert all(at_x[:, k].abs().max() > 0 for k in range(4))
        objective.loss(STUDENT, networks, data, {}).total.backward()
        gradients.append([p.grad for p in modules["student"].parameters() if p.grad is not None])
        assert heads.heads[0].outer[0].weight.grad is None  # type: ignore[union-attr,index]
    scale = max(g.abs().max().item() for g in gradients[0])
    assert scale > 0
    assert max((p - q).abs().max().item() for p, q in zip(*gradients, strict=True)) <= 1e-10 * scale


# --- HiAR


def bidirectional_student(gains: Tensor) -> tuple[Networks, Batch]:
    """AR(1) videos of 4 frames, with pairs of the teacher's ODE; the first step on whole videos has these gains."""
    made = backbone(torch.float64, num_frames=4, copies=2)
    student = made.load("student").double()
    with torch.no_grad():
        table = student.network.tables["past0_frames4"].weight.unflatten(0, (2, 2, -1))  # [labels, parts, entries, K]
        table[0, :, :, -1] = torch.view_as_real(gains.flatten()).T
    sampler = RolloutPolicy((1.0, 0.5), chunks=ChunkSchedule(frames=1, window=2, order="step"))
    networks = Networks(
        {"student": student, "teacher": made.load("teacher"), "fake_score": made.load("teacher")}, sampler
    )
    return networks, batch_of(made, 16, 0, AR1Data(pairs="bidirectional"))


def test_the_forward_kl_is_zero_at_the_teachers_map() -> None:
    """F3: from noise to video it is Sigma^{1/2}. Its gradient reaches the first step on whole videos alone."""
    cov = f.covariance(backbone().law.rhos[0], 4)
    for off, zero in ((0.0, True), (0.1, False)):
        networks, data = bidirectional_student(f.flow_map(cov, 1.0) + off)
        loss = HiAR().forward_kl(networks, data)
        loss.backward()
        learning = {n for n, p in networks.student.named_parameters() if p.grad is not None}
        print(f"off by {off}: {loss.item():.2e}, reaches {learning}")
        assert (loss.item() < 1e-12) == zero and learning == {
            "network.mean.weight",
            "network.tables.past0_frames4.weight",
        }


def test_the_path_ends_where_the_chord_does() -> None:
    """target: path, by more and more steps: (x_{t_1} - t_1 x_1) / (1 - t_1) with the exact x_{t_1} of F3."""
    cov, errors = f.covariance(backbone().law.rhos[0], 4), []
    networks, data = bidirectional_student(cov)
    mean = complex(networks.teacher.law.means[0])  # type: ignore[union-attr,operator]
    for steps in (25, 50):
        x1, x0 = HiAR(target="path", path_steps=steps).ends(networks, data)
        there = 0.5 * mean + f.flow_map(cov, 1.0, 0.5).to(to_complex(x1)) @ to_complex(x1)
        errors.append((x0 - to_latents((there - 0.5 * to_complex(x1)) / 0.5, x1)).abs().max().item())
    print(f"errors {errors}")
    assert errors[1] < 0.6 * errors[0] < 0.1


def test_distribution_matching_leaves_the_first_step_to_the_forward_kl() -> None:
    objective, sampler = HiAR(stops="per_sample"), RolloutPolicy((1.0, 0.8, 0.5, 0.3))
    networks = tiny_networks(objective, sampler)
    stops = [objective.rollout(networks, dataclasses.replace(tiny_batch(), key=k), False).stop for k in range(5)]
    assert set(torch.cat(stops).tolist()) == {1, 2, 3}
    loss = objective.loss(STUDENT, networks, tiny_batch(), {})
    matching = objective.matching_loss(networks, tiny_batch(), objective.rollout(networks, tiny_batch(), True))
    expected = matching.total + 0.1 * loss.terms["forward_kl"]
    assert float(loss.total) == pytest.approx(float(expected), rel=1e-9) and loss.terms["forward_kl"] > 0


def test_the_first_step_is_taught_on_whole_videos() -> None:
    """One call of the stock network, which sees all frames; the chunks are made step first."""
    data, sampler = videos(4), policy(ChunkSchedule(frames=2, order="step"), 1.0, 0.6)
    network, noise = wan(), videos(4).pairs[0]  # type: ignore[index]
    whole = network(noise, torch.ones(2, dtype=torch.float64), data.cond)
    expected = (whole - data.pairs[1]).square().mean()  # type: ignore[index]
    networks = Networks({"student": network, "teacher": network}, sampler)
    assert torch.allclose(HiAR().forward_kl(networks, data), expected)
    causal = network(noise, torch.ones(2, dtype=torch.float64), data.cond, Inputs(causal=sampler.chunks))
    expected = (causal - data.pairs[1]).square().mean()  # type: ignore[index]
    found = HiAR(attention="causal").forward_kl(networks, data)
    assert torch.allclose(found, expected) and found != HiAR().forward_kl(networks, data)


# --- SC-DMD and Salt on chunks


@pytest.mark.parametrize("name", POLICIES)
def test_another_state_of_a_chunk_sees_what_the_rollout_saw(name: str) -> None:
    """Called again at its own inputs, the student predicts what it did, to the bit, for every kind of schedule."""
    chunks = POLICIES[name]
    data, network = batch(7 if chunks.first else 8), wan(linear=chunks.linear).requires_grad_(False)
    sampler = policy(chunks)
    rollout = backward_simulation(network, sampler, data, torch.ones_like(data.ids), grad=False)
    step = rollout.steps[-1]
    again = predict_beside(network, sampler, data, rollout, step.x_t, step.t)
    assert torch.equal(again, rollout.x)


class Straight(Denoiser):
    """Predicts rho times the last frame before the chunk, whatever the chunk is: its velocity is straight."""

    takes_chunks = True

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(1, 1), FlowSchedule(), "sample")

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        remember(inputs, x_t)
        past = past_frames(inputs.context, x_t)
        return 0 * x_t + (0.9 * past[:, -1:] if past.shape[1] else 1.0) + 0 * self.network.weight.sum()

    @property
    def time_embedding(self) -> torch.nn.Module:
        return self.network


def test_a_straight_velocity_has_no_semigroup_loss_on_chunks() -> None:
    """If each chunk has its own past: given none, the composed jump of a later chunk would lead elsewhere."""
    made = backbone(torch.float64, copies=2, num_frames=4)
    sampler = RolloutPolicy((1.0, 0.8, 0.6, 0.3), chunks=ChunkSchedule(frames=1, window=2))
    networks, data = Networks({"student": Straight(), "teacher": made.load("teacher")}, sampler), batch_of(made, 8, 0)
    SCDMD().check(sampler)
    for stop in range(4):
        rollout = backward_simulation(networks.student, sampler, data, torch.full_like(data.ids, stop))
        assert SCDMD().semigroup_loss(networks, data, rollout).abs() < 1e-24


def test_later_chunks_move_no_earlier_part_of_the_semigroup_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other noise in the last chunk leaves the gradient at the chunks before it as it is, to the bit; and the gradient
    reaches the weights through the long jump of every chunk."""
    sampler, plain, found = policy(ChunkSchedule(frames=2), 1.0, 0.8, 0.6, 0.3), Draws.__call__, []

    def noisy(self: Draws, key: str) -> Tensor:
        return plain(self, key) + (1.0 if self.frames is not None and self.frames.start >= 4 else 0.0)

    for draw in (plain, noisy):
        monkeypatch.setattr(Draws, "__call__", draw)
        data, network = batch(6), wan()
        networks = Networks({"student": network, "teacher": network}, sampler)
        rollout = backward_simulation(network, sampler, data, torch.ones_like(data.ids))
        loss = SCDMD().semigroup_loss(networks, data, rollout)
        found.append(torch.autograd.grad(loss, rollout.steps[-1].x0, retain_graph=True)[0])
        loss.backward()
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())
    assert torch.equal(found[0][:, :4], found[1][:, :4]) and not torch.equal(found[0], found[1])
    assert all(found[0][:, k].abs().max() > 0 for k in range(6))


def test_each_update_has_a_list_in_its_share() -> None:
    shares = (0.5, 0.3, 0.2)
    drawn_lists = [drawn_list(dataclasses.replace(batch(2), key=key), shares) for key in range(4000)]
    found = torch.bincount(torch.tensor(drawn_lists), minlength=3) / 4000
    assert torch.allclose(found, torch.tensor(shares), atol=4 * 0.5 / math.sqrt(4000))


@pytest.mark.parametrize("index", range(3))
def test_salt_has_a_term_for_the_longest_and_one_for_the_shortest_list(index: int) -> None:
    """And trains with the list that was drawn: the loss is that of sc_dmd, dmd2, and dmd2 with the alignment."""
    lists = (LISTS[0], (1.0, 0.8, 0.4), LISTS[1])
    objective = Salt(lists=lists, align_start=5)
    networks = tiny_networks(objective, RolloutPolicy(lists[1]))
    own = networks.with_policy(RolloutPolicy(lists[index]))
    turns = objective.turns(4, {}), objective.turns(5, {})
    assert [part[1].aligns for part in turns] == [False, True]  # type: ignore[attr-defined]
    for start in (0, 40, 80):
        data = dataclasses.replace(tiny_batch(), key=drawn(3, index, start))
        early, late = (objective.loss(part[1], networks, data, {}) for part in turns)
        plain = (SCDMD() if index == 0 else DMD2()).loss(STUDENT, own, data, {})
        assert float(early.total) == pytest.approx(float(plain.total), rel=1e-9)
        assert ("semigroup" in late.terms) == (index == 0) and ("alignment" in late.terms) == (index == 2)
        added = 0.1 * late.terms["alignment"] if index == 2 else 0.0
        if index == 2:
            reference = objective.reference(networks, data, 1)
            aligned = objective.alignment(networks, data, objective.rollout(own, data, grad=True), reference)
            assert torch.allclose(late.terms["alignment"], aligned.detach())
        assert float(late.total) == pytest.approx(float(plain.total + added), rel=1e-6)
        fake = objective.loss(Turn("fake_score", ("fake_score",)), networks, data, {})
        assert float(fake.total) == pytest.approx(float(DMD2().fake_loss(own, data).total), rel=1e-9)


def test_the_alignment_compares_relations_of_the_tokens_of_a_frame() -> None:
    """0 for the reference itself, nothing within the margin, gradient to the student's video alone, and samples that
    stop at the first step are left out."""
    network, sampler, data = wan(), policy(ChunkSchedule(frames=2), 1.0, 0.6), batch(4)
    networks = Networks({"student": network, "teacher": wan(seed=1)}, sampler)
    objective = Salt(lists=((1.0, 0.8, 0.4), (1.0, 0.6)), margin=0.0, feature_time=TimeSampler(low=0.1, high=0.2))
    x = data.chunk(range(4)).normal("x").requires_grad_()
    other = data.chunk(range(4)).normal("other")
    level = torch.zeros(2, dtype=torch.float64)
    rollout = Rollout(x, level, torch.tensor([1, 0]), (Step(x, level, x, x),))
    assert objective.alignment(networks, data, rollout, x.detach()) == 0
    loss = objective.alignment(networks, data, rollout, other)
    loss.backward()
    assert loss > 0 and x.grad is not None and x.grad[0].abs().max() > 0 and not x.grad[1].any()
    other = torch.stack([other[0], x[1].detach()])  # whether or not the second counts, the mean is over two
    of_one, of_both = (dataclasses.replace(rollout, stop=torch.tensor([1, stop])) for stop in (0, 1))
    means = [objective.alignment(networks, data, made, other).item() for made in (of_one, of_both)]
    assert means[0] == pytest.approx(means[1], rel=1e-9)
    assert all(p.grad is None for p in networks.teacher.parameters())
    wide = dataclasses.replace(objective, margin=1.99)
    assert wide.alignment(networks, data, rollout, other) == 0
    tokens = torch.tensor([[[3.0, 0.0], [0.0, 2.0], [1.0, 1.0], [1.0, 0.0]]])
    half = 1 / math.sqrt(2)
    expected = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[1.0, half], [half, 1.0]]]])
    assert torch.allclose(relations(tokens, 2), expected)


def test_the_reference_has_the_next_longer_list_and_no_gradient() -> None:
    sampler, data, network = policy(ChunkSchedule(frames=2), 1.0, 0.6), batch(4), wan()
    objective = Salt(lists=((1.0, 0.8, 0.4), (1.0, 0.6)))
    data = dataclasses.replace(data, shared={})
    backward_simulation(network, sampler, data, torch.ones_like(data.ids), grad=False)
    networks = Networks({"student": network, "teacher": network}, sampler)
    found = objective.reference(networks, data, 0)
    longer = dataclasses.replace(sampler, timesteps=(1.0, 0.8, 0.4))
    expected = backward_simulation(network, longer, batch(4), torch.full_like(data.ids, 2), grad=False).x
    assert torch.equal(found, expected) and not found.requires_grad
    assert isinstance(objective.turns(0, {})[1], AlignTurn)


# --- whole runs


def brightness(frames: Tensor, prompts: Any) -> Tensor:
    return frames.flatten(1).mean(1)


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stream_r1": (
        {"window": 2},
        {"rewards": {"parts": [{"name": f"{__name__}:brightness", "input": "frames", "differentiable": True}]}},
    ),
    "asd": ({"lists": [[1.0, 0.6], [1.0]]}, {}),
    "hiar": ({"target": "path", "path_steps": 2}, {"chunks": {"order": "step"}}),
    "sc_dmd": ({}, {"timesteps": [1.0, 0.8, 0.6]}),
    "salt": ({"lists": [[1.0, 0.8, 0.4], [1.0, 0.6]], "align_start": 0}, {}),
    "any_flow": (
        {"on_policy": {"steps": [1, 2]}},
        {"transition": "ode", "two_time": True, "data": {"name": "moving_digits", "videos": 4}},
    ),
}


def run_of(name: str, folder: Path, output: Path, **more: Any) -> Recipe:
    keys, changes = RUNS[name]
    changes = dict(changes)
    rollout = {"timesteps": [1.0, 0.6], "chunks": {"frames": 1, "window": 2} | changes.pop("chunks", {})}
    rollout |= {k: changes.pop(k) for k in ("timesteps", "transition", "two_time") if k in changes}
    objective = {"name": name} | keys | ({} if name == "any_flow" else {"fake_updates": 1})
    trained = import_name("objective", OBJECTIVES[name])(**keys).trained_roles
    changes["optimizers"] = {role: {"lr": 1e-3} for role in trained}
    changes["train"] = {"steps": 2, "batch_size": 2, "num_samples": 2, "sample_every": 0, "checkpoint_every": 1}
    return recipe(folder, output, objective, rollout=rollout, **changes | more)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_is_planned_and_exports(name: str, folder: Path, tmp_path: Path) -> None:
    """On a tiny Wan: the plan has all turns, and the log has the method's own term."""
    made = run_of(name, folder, tmp_path / "run")
    turns = [part.turn.name for part in plan(made, gpu=False).turns]
    assert set(turns) >= {"student"} and all(part.evaluations for part in plan(made, gpu=False).turns)
    run = train(made)
    assert (run / "export/fastgen.json").is_file()
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    terms = {key for row in rows for key in row}
    own = {"stream_r1": "saliency_peak", "hiar": "forward_kl", "sc_dmd": "semigroup", "any_flow": "map"}
    assert name not in own or f"student/{own[name]}" in terms, terms
    assert name != "asd" or "discriminator/logit_gap" in terms


# --- what the documents say


def commands() -> list[list[str]]:
    """The arguments of each `fastgen train` of the page."""
    text = "\n".join(re.findall(r"(?s)```bash\n(.*?)```", PAGE.read_text())).replace("\\\n", " ")
    return [shlex.split(line, comments=True)[2:] for line in text.splitlines() if line.startswith("fastgen train")]


@pytest.mark.parametrize("command", commands(), ids=lambda command: command[:2][-1].rpartition("/")[2])
def test_a_documented_command_loads(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PAGE.parents[1])
    made = load_recipe(Path(command[0]), [*command[1:], "init_from=null"])
    assert made.rollout.chunks is not None


def test_every_method_has_a_command() -> None:
    names = {load_recipe(PAGE.parents[1] / c[0], [*c[1:], "init_from=null"]).objective.name for c in commands()}
    assert names == {"stream_r1", "asd", "hiar", "salt", "sc_dmd", "any_flow"}


# --- refusals


@pytest.mark.parametrize(
    ("objective", "rollout", "words"),
    [
        ({"name": "stream_r1"}, {}, "missing key rewards"),
        ({"name": "asd"}, {}, "at least two lists"),
        ({"name": "asd", "lists": [[1.0, 0.6], [1.0]], "gan_weight": 0.1}, {}, "compares it with itself"),
        ({"name": "asd", "lists": [[1.0, 0.5], [1.0]]}, {}, "must be one of lists"),
        ({"name": "asd", "lists": [[1.0], [1.0, 0.6]]}, {}, "from many steps to few"),
        ({"name": "asd", "lists": [[0.6, 1.0, 0.5], [1.0, 0.6]]}, {}, "lists: .*strictly decreasing"),
        ({"name": "asd", "lists": [[1.0, 0.6], [1.0]], "condition_on_stop": True}, {}, "steps of one list apart"),
        ({"name": "hiar"}, {}, "needs pairs"),
        ({"name": "hiar", "target": "path"}, {"timesteps": [1.0], "chunks": {"frames": 1}}, "at least two"),
        ({"name": "hiar", "target": "path"}, {"timesteps": [0.9, 0.5], "chunks": {"frames": 1}}, "let it start at 1"),
        (
            {"name": "hiar", "target": "path"},
            {"timesteps": [1.0, 0.5], "chunks": {"frames": 1, "first_timesteps": [1.0, 0.8, 0.5]}},
            "one list of levels for all chunks",
        ),
        (
            {"name": "sc_dmd"},
            {"timesteps": [1.0, 0.6, 0.3], "chunks": {"frames": 1, "order": "step"}},
            "leave order out",
        ),
        (
            {"name": "sc_dmd"},
            {"timesteps": [1.0, 0.6, 0.3], "chunks": {"frames": 1, "first_timesteps": [1.0, 0.8]}},
            "one list of levels for all chunks",
        ),
        ({"name": "salt", "lists": [[1.0, 0.6]]}, {}, "with one list use sc_dmd"),
        ({"name": "salt", "lists": [[1.0, 0.8, 0.6], [1.0, 0.6]], "shares": [0.5, 0.6]}, {}, "add up to 1"),
        ({"name": "salt", "lists": [[1.0, 0.6], [1.0]]}, {}, "give three timesteps"),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) and "name" in value else "",
)
def test_what_cannot_be_is_refused(
    objective: dict[str, Any], rollout: dict[str, Any], words: str, folder: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"rollout": rollout} if rollout else {}
    roles = ("student", "fake_score", *(("discriminator",) if objective["name"] == "asd" else ()))
    changes["optimizers"] = {role: {"lr": 1e-3} for role in roles}
    with pytest.raises(RecipeError, match=words):
        recipe(folder, tmp_path / "run", objective, **changes)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("{name: asd, lists: [[1.0, 0.6], [1.0]]}", "reads features.*choose dmd2"),
        ("{name: salt, lists: [[1.0, 0.8, 0.4], [1.0, 0.6], [1.0]]}", "no features to align; set it to 0"),
    ],
)
def test_networks_without_features_are_refused(objective: str, words: str) -> None:
    changes = [f"objective={objective}", "rollout={timesteps: [1.0], chunks: {frames: 1}}"]
    changes += ["optimizers.discriminator={lr: 1e-3}"] * ("asd" in objective)
    with pytest.raises(RecipeError, match=words):
        load_recipe(PAGE.parents[1] / "recipes/ar1_self_forcing_4step.yaml", changes)


def test_stream_r1_weights_frames() -> None:
    with pytest.raises(ValueError, match="or use re_dmd"):
        StreamR1().check(RolloutPolicy((1.0, 0.5)))
