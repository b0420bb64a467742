"""The teacher, the networks and the data of AR(1) videos against the formulas of `ar1_formulas`."""

import cmath
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import RunFresh
from torch import Tensor

from fastgen.backbones import ar1_formulas as f
from fastgen.backbones.ar1_law import to_complex
from fastgen.backbones.ar1_video import AR1Video, AR1VideoConfig
from fastgen.backbones.base import RoleOptions
from fastgen.batch import Conditioning, Draws
from fastgen.data import AR1Data
from fastgen.denoiser import Inputs
from fastgen.modules.inputs import unextended
from fastgen.modules.lora import LoraConfig
from fastgen.rollout import RolloutPolicy, network_inputs, sample
from fastgen.schedule import FlowSchedule
from fastgen.streaming.context import Context
from fastgen.streaming.schedule import ChunkSchedule

CONFIG = AR1VideoConfig(damping=0.9, angles=(0.5, -0.3), means=(1.0, (-0.5, 2.0)), num_frames=6, copies=2)
CPU = torch.device("cpu")
EMPTY = 2  # the label of the empty prompt
ONE_BY_ONE = ChunkSchedule(frames=1)


def backbone(**changes: Any) -> AR1Video:
    return dataclasses.replace(CONFIG, **changes).build(CPU, torch.float64, 0)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prompt(label: int | Tensor, count: int = 0) -> Conditioning:
    return Conditioning({"label": torch.full((count,), label) if isinstance(label, int) else label})


def levels(value: float, count: int) -> Tensor:
    return torch.full((count,), value, dtype=torch.float64)


# --- the law and the teacher


def test_exact_videos_have_the_moments_of_their_label() -> None:
    """Mean, variance and covariances over frames, within four standard errors; the copies are independent."""
    law, n = backbone().law, 40_000
    for label in range(3):
        x = law.sample(torch.arange(n), torch.full((n,), label), key=3)
        mean, cov = law.second_order(label, 6)
        z = to_complex(x) - mean
        products = torch.einsum("njc,nkc->njkc", z, z.conj()) / 2
        off = (products[..., 0].mean(0) - cov).abs() / products[..., 0].std(0) * n**0.5
        drift = z.mean(0).abs() / z.std(0) * n**0.5
        print(f"label {label}: covariance {off.max():.2f}, mean {drift.max():.2f} standard errors")
        assert off.max() < 4.5 and drift.max() < 4.5
        if label < EMPTY:
            between = (z[:, :, 0] * z[:, :, 1].conj()).mean(0).abs() / 2 * n**0.5
            assert between.max() < 4.5


def test_a_video_depends_on_its_id_label_and_key_and_begins_a_longer_one() -> None:
    law = backbone().law
    ids, label = torch.tensor([9, 2, 40, 7]), torch.tensor([0, 1, 2, 1])
    x = law.sample(ids, label, 3)
    assert x.shape == (4, 6, 2, 1, 2) and x.dtype == torch.float64
    assert torch.equal(law.sample(ids[[3, 0]], label[[3, 0]], 3), x[[3, 0]])
    assert torch.equal(law.sample(ids, label, 3, num_frames=50)[:, :6], x)
    assert not torch.equal(law.sample(ids, label, 4), x)


def test_the_teachers_score_is_the_gradient_of_the_log_density() -> None:
    """Tweedie with a level per frame, D E[z | x] = x + T grad log p(x), also for the empty prompt, whose density is
    the even mixture of the labels'."""
    made = backbone()
    teacher, law = made.load("teacher"), made.law
    label = torch.tensor([0, 1, EMPTY]).repeat_interleave(30)
    x, t = (
        2 * randn(90, 6, 2, 1, 2),
        torch.rand(90, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    )
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        each = torch.stack([law.log_density(leaf, t, k) for k in range(2)], dim=1)
        stated = torch.where(label[:, None] == torch.arange(2), each, -torch.inf)
        (score,) = torch.autograd.grad(torch.where((label == EMPTY)[:, None], each, stated).logsumexp(1).sum(), leaf)
    alpha, sigma = FlowSchedule().coefficients(t, x)
    error = (alpha * teacher(x, t, prompt(label)) - (x + sigma**2 * score)).abs().max().item()
    print(f"{error:.1e}")
    assert error < 1e-10


def test_the_log_density_is_normalised() -> None:
    """One frame, one copy: its integral on a grid."""
    law = backbone(num_frames=1, copies=1).law
    axis = torch.linspace(-8, 8, 401, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)[:, None, :, None, None]
    for t in (0.0, 0.5):
        total = law.log_density(x, levels(t, len(x))[:, None], 1).exp().sum().item() * (16 / 400) ** 2
        assert total == pytest.approx(1, abs=1e-6)


def commit_all(denoiser: Any, x0: Tensor, cond: Conditioning, chunks: ChunkSchedule) -> list[Context]:
    """The contexts before each chunk of a given video."""
    contexts = [Context(chunks)]
    for chunk in chunks.split(x0.shape[1])[:-1]:
        part = x0[:, chunk.start : chunk.stop]
        contexts.append(denoiser.commit(part, levels(chunks.context_noise, len(x0)), cond, contexts[-1]))
    return contexts


SCHEDULES = {
    "everything": ChunkSchedule(frames=2),
    "one past frame": ChunkSchedule(frames=2, window=3),
    "window and sink": ChunkSchedule(frames=2, window=5, sink=2),
    "window and sink, absolute": ChunkSchedule(frames=2, window=5, sink=2, positions="absolute"),
}


@pytest.mark.parametrize("label", [0, EMPTY])
def test_the_causal_teacher_needs_one_frame_and_no_sink(label: int) -> None:
    """Line 11: for a stated prompt every window that shows one clean frame gives the same conditional (F2), and a sink
    changes nothing, wherever it is put; a window of the chunk alone gives the marginal. For the empty prompt more past
    tells more about the motion."""
    made = backbone(num_frames=8)
    teacher, law = made.load("teacher"), made.law
    ids = torch.arange(20)
    x0, cond = law.sample(ids, torch.full_like(ids, label), 1), prompt(label, 20)
    t = levels(0.6, 20)
    x_t = FlowSchedule().add_noise(x0, randn(*x0.shape), t)
    found = {}
    for name, chunks in SCHEDULES.items() | {("alone", ChunkSchedule(frames=2, window=2))}:
        contexts = commit_all(teacher, x0, cond, chunks)
        parts = [teacher(x_t[:, 2 * i : 2 * i + 2], t, cond, Inputs(context=c)) for i, c in enumerate(contexts)]
        found[name] = torch.cat(parts, dim=1)
        taught = teacher(
            x_t, t, cond, Inputs(causal=chunks, clean=x0)
        )  # the same in one call, as teacher forcing does
        assert (taught - found[name]).abs().max() < 1e-12
    marginal = torch.cat([law.posterior_mean(p, t[:, None].expand(-1, 2), cond["label"]) for p in x_t.split(2, 1)], 1)
    assert (found["alone"] - marginal).abs().max() < 1e-12
    apart = {name: (x - found["everything"]).abs().max().item() for name, x in found.items()}
    print({name: f"{a:.1e}" for name, a in apart.items()})
    assert apart["alone"] > 0.1
    if label == EMPTY:
        assert apart["one past frame"] > 1e-3
        return
    assert max(apart[name] for name in SCHEDULES) < 1e-12
    powers, s = f.conditional(law.rhos[0], 2)
    gain = 0.4 * s @ torch.linalg.inv(0.16 * s + 0.36 * torch.eye(2, dtype=torch.float64))
    mu = law.means[0] + powers[:, None] * (to_complex(x0)[:, 3:4] - law.means[0])
    expected = mu + gain @ (to_complex(x_t)[:, 4:6] - 0.4 * mu)
    assert (to_complex(found["everything"])[:, 4:6] - expected).abs().max() < 1e-12


def test_noisy_context_is_told_to_the_teacher() -> None:
    """F8: with context noise the conditional mean is F1's at that level, and its error is what F8 says."""
    made, tau, n = backbone(num_frames=4, copies=16), 0.4, 4000
    teacher, law, chunks = made.load("teacher"), made.law, ChunkSchedule(frames=1, context_noise=0.4)
    ids = torch.arange(n)
    x0, cond = law.sample(ids, torch.zeros_like(ids), 1), prompt(0, n)
    noisy = FlowSchedule().add_noise(x0, randn(*x0.shape), levels(tau, n))
    context = commit_all(teacher, noisy, cond, chunks)[-1]
    mean = teacher(randn(n, 1, 2, 1, 16, seed=5), levels(1.0, n), cond, Inputs(context=context))
    error = (mean - x0[:, 3:]).square().mean((1, 2, 3)).flatten()
    expected = f.prediction_error(f.covariance(law.rhos[0], 4), [tau] * 3)
    z = abs(error.mean().item() - expected) / (error.std().item() / len(error) ** 0.5)
    print(f"{error.mean():.4f}, F8 {expected:.4f}, {z:.2f} standard errors")
    assert z < 4


def test_diffusion_forcing_sees_noisy_chunks_at_their_levels() -> None:
    """Without `clean`, a chunk sees the noisy chunks before it, at their own levels, and nothing after it."""
    made = backbone()
    teacher, law, t = made.load("teacher"), made.law, torch.rand(10, 6, dtype=torch.float64)
    x, cond = randn(10, 6, 2, 1, 2), prompt(1, 10)
    got = teacher(x, t, cond, Inputs(causal=ChunkSchedule(frames=2)))
    for stop in (2, 4, 6):
        expected = law.posterior_mean(x[:, :stop], t[:, :stop], cond["label"])[:, stop - 2 :]
        assert (got[:, stop - 2 : stop] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("causal", [False, True])
def test_pairs_are_the_ends_of_the_teachers_ode(causal: bool) -> None:
    """F3: what our own sampler makes of the same noise with 40 and 80 Euler steps, whole or frame by frame, comes
    nearer as the steps do."""
    made, errors = backbone(), []
    ids, label = torch.arange(16), torch.arange(16) % 2
    noise, x0 = made.law.pair(ids, label, 7, causal)
    draws = Draws(ids, made.latent_shape, 7, torch.float64).chunk(range(6))
    assert torch.equal(noise, draws("initial"))
    for steps in (40, 80):
        policy = dataclasses.replace(made.teacher_policy(steps), chunks=ONE_BY_ONE if causal else None)
        errors.append((sample(made.load("teacher"), policy, prompt(label), draws) - x0).abs().max().item())
    print(f"{errors[0]:.4f} with 40 steps, {errors[1]:.4f} with 80")
    assert errors[0] < 0.3 and errors[1] < 0.6 * errors[0]
    with pytest.raises(ValueError, match="empty prompt"):
        made.law.pair(ids, torch.full_like(ids, EMPTY), 7, causal)


@pytest.mark.slow
@pytest.mark.parametrize(("transition", "limit"), [("renoise", 0.060), ("ode", 0.062)])
def test_few_step_teacher_forcing_drifts_as_f4_says(transition: Any, limit: float) -> None:
    """Line 12: the teacher-forcing optimum, sampled by the engine with four steps and a window of one past frame, at
    frames 1 to 50 within 1 %. The first frame has the gains of the marginal."""
    made, n = backbone(num_frames=50, copies=2000), 60
    law = made.law
    timesteps = (1.0, 0.9375, 0.8333333333333334, 0.625)
    policy = RolloutPolicy(timesteps, transition, chunks=ChunkSchedule(frames=1, window=2))
    draws = Draws(torch.arange(n), made.latent_shape, 5, torch.float64)
    x = to_complex(sample(made.load("teacher"), policy, prompt(0, n), draws)) - law.means[0]
    found = x.abs().square().mean((0, 2)) / 2
    s2 = f.innovation(law.rhos[0])
    first = f.sampled_variance(timesteps, f.denoiser_gain(timesteps, 1.0), transition)
    g2 = f.sampled_variance(timesteps, f.denoiser_gain(timesteps, s2), transition)
    error = (found / f.rollout_variance(first, g2, law.rhos[0], 50) - 1).abs().max().item()
    print(f"{transition}: at frame 50 {found[-1]:.4f}, F4's limit {g2 / s2:.4f}; largest error {error:.2%}")
    assert error < 0.01 and g2 / s2 == pytest.approx(limit, abs=0.001)
    lag = (x[:, 1:] * x[:, :-1].conj()).mean((0, 2)) / x[:, :-1].abs().square().mean((0, 2))
    assert (lag - law.rhos[0]).abs().max() < 0.01  # it fades and moves as it should


# --- the networks


def test_a_causal_network_is_the_teacher_at_its_knots() -> None:
    """Every past, every chunk length, stated prompts: the linear network computes the exact conditional at its knots,
    and nearly so between them; the coefficients are read as F2's."""
    made = backbone(pretrained="causal", knots=9)
    student, teacher, law = made.load("student"), made.load("teacher"), made.law
    label = torch.arange(40) % 2
    x0, cond = law.sample(torch.arange(40), label, 1), prompt(label)
    for chunks in (
        ChunkSchedule(frames=1),
        ChunkSchedule(frames=2),
        ChunkSchedule(frames=1, first=5),
        ChunkSchedule(frames=6),
    ):
        for t, bound in ((1.0, 1e-12), (0.375, 1e-12), (0.43, 0.02)):
            x_t = FlowSchedule().add_noise(x0, randn(*x0.shape), levels(t, 40))
            inputs = Inputs(causal=chunks, clean=x0)
            gap = (student(x_t, levels(t, 40), cond, inputs) - teacher(x_t, levels(t, 40), cond, inputs)).abs().max()
            assert gap < bound, (chunks.frames, t, gap)
    t, k = levels(0.375, 1), f.denoiser_gain(0.375, f.innovation(law.rhos[1]))
    lag, gain = student.network.coefficients(t, 1000 * t, torch.tensor([1]), 1, 1)
    assert (gain.item() - k).abs() < 1e-12 and abs(lag.item() / (1 - 0.625 * gain.item()) - law.rhos[1]) < 1e-12


def test_a_bidirectional_network_knows_no_past() -> None:
    """The teacher of the whole video, and of a chunk as a video of its own; the empty prompt's is the best linear
    one."""
    made = backbone()
    student, teacher = made.load("student"), made.load("teacher")
    x, t, label = randn(30, 6, 2, 1, 2), levels(0.25, 30), torch.arange(30) % 2
    assert (student(x, t, prompt(label)) - teacher(x, t, prompt(label))).abs().max() < 1e-10
    context = student.commit(x[:, :2], levels(0, 30), prompt(label), Context(ChunkSchedule(frames=2)))
    chunk, alone = x[:, 2:4], Inputs(context=Context(ChunkSchedule(frames=2)))
    assert torch.equal(
        student(chunk, t, prompt(label), Inputs(context=context)), student(chunk, t, prompt(label), alone)
    )
    mean, cov = made.law.second_order(EMPTY, 6)
    gains = f.gains(cov, t[:1, None].expand(-1, 6))
    best = mean + gains @ (to_complex(x) - 0.75 * mean)
    assert (to_complex(student(x, t, prompt(EMPTY, 30))) - best).abs().max() < 1e-10


def test_a_rollout_of_the_engine_reads_the_chunks_it_committed() -> None:
    """Sampling chunk by chunk = predicting each chunk given the earlier ones, in one call: three chunk lengths, seen
    through a context, and through teacher forcing on the finished video."""
    made = backbone(pretrained="causal")
    student, cond = made.load("student"), prompt(0, 5)
    for chunks in (ChunkSchedule(frames=1), ChunkSchedule(frames=2), ChunkSchedule(frames=2, first=4, window=6)):
        policy = RolloutPolicy((1.0,), chunks=chunks)
        draws = Draws(torch.arange(5), made.latent_shape, 1, torch.float64)
        video = sample(student, policy, cond, draws)
        again = student(draws.chunk(range(6))("initial"), levels(1, 5), cond, Inputs(causal=chunks, clean=video))
        assert torch.allclose(video, again, atol=1e-12)


def test_gradients_reach_every_coefficient_that_is_used() -> None:
    made = backbone()
    student = made.load("student")
    x, label = randn(30, 6, 2, 1, 2), torch.arange(30) % 3
    chunks = ChunkSchedule(frames=3)
    out = student(x, torch.linspace(0, 1, 30, dtype=torch.float64), prompt(label), Inputs(causal=chunks, clean=x))
    out.square().sum().backward()
    used = {n for n, p in student.network.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert used == {"mean.weight", "tables.past0_frames3.weight", "tables.past1_frames3.weight"}


def test_what_the_networks_cannot_do_is_said() -> None:
    made = backbone()
    student, teacher, cond, x = made.load("student"), made.load("teacher"), prompt(0, 3), randn(3, 6, 2, 1, 2)
    each = torch.rand(3, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="one level for all frames"):
        student(x, each, cond)
    with pytest.raises(ValueError, match="diffusion forcing"):
        student(x, each, cond, Inputs(causal=ONE_BY_ONE))
    with pytest.raises(ValueError, match="at most 6 frames"):
        student(torch.cat([x, x], 1), levels(1, 3), cond)
    with pytest.raises(ValueError, match="gan_weight"):
        _ = student.feature_modules
    with pytest.raises(ValueError, match="'stop'"):
        teacher(x, levels(1, 3), cond, Inputs(stop=torch.zeros(3, dtype=torch.int64)))


# --- the backbone


def test_roles_are_separate_copies() -> None:
    made = backbone()
    student, fake = made.load("student"), made.load("fake_score")
    for a, b in zip(student.parameters(), fake.parameters(), strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr() and a.requires_grad
    assert not list(made.load("teacher").parameters())


@pytest.mark.parametrize("policy", [RolloutPolicy((1.0, 0.5)), RolloutPolicy((1.0, 0.5), "ode", two_time=True)])
def test_an_export_is_the_same_student(tmp_path: Path, policy: RolloutPolicy) -> None:
    made = backbone()
    student = made.load("student")
    if policy.inputs:
        student.add_inputs({}, made.time_dim, policy.inputs)
    made.save_pipeline(student, policy, tmp_path / "export")
    other = backbone(means=(0.0, 0.0)).load_exported(tmp_path / "export")
    x, t = randn(9, 6, 2, 1, 2), torch.linspace(0.1, 1, 9, dtype=torch.float64)
    inputs, cond = network_inputs(policy, t), prompt(torch.arange(9) % 3)
    assert torch.equal(student(x, t, cond, inputs), other(x, t, cond, inputs))
    assert not any(p.requires_grad for p in other.parameters()) and not other.training
    assert AR1VideoConfig(**json.loads((tmp_path / "export/config.json").read_text())) == CONFIG


def test_the_fake_score_may_be_told_the_stop() -> None:
    """Each stop has tables of its own. They are zero at the start, change what that stop gives and nothing else, and
    do not count as weights of the network that was extended."""
    made = backbone()
    fake, plain = made.load("fake_score"), made.load("fake_score")
    fake.add_inputs({"stop": 4}, made.time_dim)
    x, t, cond = randn(8, 6, 2, 1, 2), levels(0.5, 8), prompt(0, 8)
    inputs = Inputs(stop=torch.arange(8) % 4)
    assert torch.equal(fake(x, t, cond, inputs), plain(x, t, cond))
    fake(x[:1], t[:1], cond.select(slice(1)), Inputs(stop=torch.tensor([2]))).square().sum().backward()
    weight = fake.network.time.tables["stop"]["past0_frames6"].weight  # type: ignore[union-attr, index]
    used = (weight.grad.unflatten(1, (4, -1)) != 0).flatten(2).any(0).any(1)  # type: ignore[union-attr]
    assert used.tolist() == [False, False, True, False]
    with torch.no_grad():
        weight.add_(weight.grad)  # type: ignore[arg-type]
    changed = (fake(x, t, cond, inputs) != plain(x, t, cond)).flatten(1).any(1)
    assert changed.tolist() == [stop == 2 for stop in inputs.stop.tolist()]  # type: ignore[union-attr]
    same = zip(unextended(fake), plain.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    with pytest.raises(ValueError, match="not both"):
        plain.add_inputs({"stop": 4}, made.time_dim, ("s",))


@pytest.mark.slow  # peft takes seconds to import
def test_adapters_of_the_networks_share_one_base() -> None:
    """A student that is an adapter starts as the pretrained network; gradient reaches the adapter alone."""
    adapters = {"student": LoraConfig(rank=2)}
    made = CONFIG.build(CPU, torch.float64, 0, RoleOptions(adapters=adapters))
    student, x, t = made.load("student"), randn(8, 6, 2, 1, 2), levels(0.5, 8)
    student.reset(0)  # type: ignore[attr-defined]
    out = student(x, t, prompt(0, 8), Inputs(causal=ChunkSchedule(frames=3), clean=x))
    plain = backbone().load("student")
    assert torch.equal(out, plain(x, t, prompt(0, 8), Inputs(causal=ChunkSchedule(frames=3), clean=x)))
    out.square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())
    assert all(p.grad is None for p in student.shared.base_parameters())  # type: ignore[attr-defined]


def test_data_are_exact_videos_of_labels_in_equal_shares() -> None:
    made = backbone()
    stream = AR1Data().open(made, 0)
    positions = torch.arange(4000)
    labels = made.law.labels_of(stream.prompts(positions))
    assert 0.45 < labels.double().mean() < 0.55 and labels.max() == 1
    x = to_complex(stream.latents(positions))  # type: ignore[arg-type]
    for k in range(2):
        assert (x[labels == k].mean() - made.law.means[k]).abs() < 0.1
    for pairs in ("causal", "bidirectional"):
        stream = AR1Data(pairs=pairs).open(made, 0)
        noise, x0 = stream.pairs(positions)  # type: ignore[misc]
        assert noise.shape == x0.shape == (4000, *made.latent_shape)
    with pytest.raises(ValueError, match="needs the ar1_video backbone"):
        AR1Data().check(type("Other", (), {"name": "wan"}))


def test_points_are_flattened_latents_and_back() -> None:
    made, x = backbone(), randn(3, 6, 2, 1, 2)
    assert made.decode(x).shape == (3, CONFIG.num_dims)
    assert torch.equal(made.encode(made.decode(x)), x)


def test_prompts_are_labels() -> None:
    made = backbone()
    assert made.encode_prompts(["1", "", "0"])["label"].tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match="'2'"):
        made.encode_prompts(["1", "2"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"damping": 1.0}, "damping"),
        ({"damping": -0.1}, "damping"),
        ({"angles": ()}, "angles"),
        ({"angles": (0.1,)}, "angles has 1 entries and means has 2"),
        ({"means": (0.0, (1.0, 2.0, 3.0))}, "means"),
        ({"means": (0.0, float("nan"))}, "means"),
        ({"num_frames": 0}, "num_frames"),
        ({"copies": 0}, "copies"),
        ({"knots": 1}, "knots"),
        ({"pretrained": "none"}, "pretrained"),
    ],
)
def test_impossible_videos_are_refused_by_field(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AR1VideoConfig(**{"damping": 0.9, "angles": (0.1, 0.2), "means": (0.0, 1.0)} | change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ({"frames": 4}, "the nearest lengths are 4 or 8; change backbone.num_frames"),
        ({"frames": 2, "sink": 2, "window": 4, "sink_decay": 0.5}, "sink_decay"),
        ({"frames": 2, "window": 4, "recall": 1}, r"chunks\.recall .* leave it out"),
        ({"frames": 2, "attention": {"layout": "top_k", "density": 0.5}}, "no attention"),
    ],
)
def test_impossible_chunks_are_refused(chunks: dict[str, Any], words: str) -> None:
    CONFIG.check_chunks(RolloutPolicy((1.0,), chunks=ChunkSchedule(frames=2, first=4, window=5, sink=1)))
    with pytest.raises(ValueError, match=words):
        CONFIG.check_chunks(RolloutPolicy((1.0,), chunks=ChunkSchedule(**chunks)))


def test_one_call_on_a_whole_video_has_no_slow_memory_and_no_8_bits() -> None:
    """A network that is told no positions sees a sink as it does chunk by chunk."""
    for kept, words in (({"slow": 2}, "moves or changes"), ({"cache_dtype": "int8"}, "8 bits"), ({"sink": 1}, None)):
        chunks = ChunkSchedule(**{"frames": 1, "window": 4, **kept})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=words) if words else contextlib.nullcontext():
            CONFIG.check_mask(chunks)


@pytest.mark.slow
def test_the_analytic_backbone_imports_no_diffusers(tmp_path: Path, run_fresh: RunFresh) -> None:
    code = "import sys, fastgen.backbones.ar1_video; print(sorted({'diffusers', 'transformers'} & set(sys.modules)))"
    done = run_fresh(code, tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
    assert cmath.isclose(CONFIG.law.rhos[0], cmath.rect(0.9, 0.5))
