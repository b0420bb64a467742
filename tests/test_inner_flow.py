"""Students whose last blocks run several times in each step: the exact head of a Gaussian, what runs how often on real
networks, exports, and the two stages of training."""

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from oracles import reached, tiny_backbone, tiny_batch, tiny_networks
from test_streaming import conditioning, wan
from tiny_wan import tiny_wan
from torch import Tensor

import fastgen.pipelines.inner_flow  # noqa: F401 - diffusers finds the class of an export among the imported modules
from fastgen.backbones.sd3 import SD3Config
from fastgen.backbones.wan import WanConfig
from fastgen.backbones.wan_i2v import WanI2VConfig
from fastgen.batch import Conditioning, Draws
from fastgen.config import load_recipe
from fastgen.config.rollout_checks import with_inner
from fastgen.denoiser import Denoiser, Inputs
from fastgen.modules.inner_flow import Head, average_velocity, integrate
from fastgen.modules.inputs import carried_names
from fastgen.objectives import DMD2
from fastgen.objectives.base import Objective, Turn
from fastgen.objectives.transition_matching import TransitionMatching
from fastgen.policy import InnerFlow
from fastgen.registry import OBJECTIVES, RecipeError, build_section, imported
from fastgen.rollout import RolloutPolicy, backward_simulation, sample
from fastgen.sampling.sampler import load_sampler
from fastgen.schedule import expand
from fastgen.starting.probing import Probe
from fastgen.train import train

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "assets/teachers/digits"
STUDENT = Turn("student", ("student",))
FLOW = InnerFlow(blocks=1, levels=(1.0, 0.6, 0.3))
POLICY = RolloutPolicy((1.0, 0.6), inner=FLOW)
M, RHO = 0.7, 0.3  # mean and variance of a Gaussian target


# --- the exact head


def spread(s: Tensor) -> Tensor:
    """The standard deviation of y_s = (1 - s) y + s noise for y ~ N(M, RHO)."""
    return ((1 - s) ** 2 * RHO + s**2).sqrt()


def exact_head(y: Tensor, s: Tensor, r: Tensor) -> Tensor:
    """h = y_s - s (y_s - X_{s,r}(y_s)) / (s - r), X the map of the flow; E[y | y_s] where s = r."""
    s, r = expand(s, y), expand(r, y)
    moved = (1 - r) * M + spread(r) / spread(s) * (y - (1 - s) * M)
    mean = M + (1 - s) * RHO / spread(s) ** 2 * (y - (1 - s) * M)
    gap = torch.where(s > r, s - r, 1.0)
    return torch.where(s > r, y - s * (y - moved) / gap, mean)


@pytest.mark.parametrize("levels", [(1.0,), (1.0, 0.5), (1.0, 0.9, 0.4, 0.1)])
def test_the_exact_head_draws_from_the_law_in_any_number_of_steps(levels: tuple[float, ...]) -> None:
    noise = torch.randn(64, 3, dtype=torch.float64)
    found = integrate(exact_head, noise, levels)
    print(f"largest error {(found - M - math.sqrt(RHO) * noise).abs().max():.2g}")
    assert torch.allclose(found, M + math.sqrt(RHO) * noise, atol=1e-12)


def test_the_exact_head_is_what_the_loss_regresses_on() -> None:
    """With the means of target and velocity given y_s. The goal is linear in both, so that it is right in the mean."""
    y = torch.randn(256, 1, dtype=torch.float64)
    s, share = torch.rand(2, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64).clamp_min(0.1)
    r = s * share
    target = exact_head(y, s, s)
    velocity = (y - target) / expand(s, y)  # E[noise - target | y_s], as y_s = target + s (noise - target)
    for derivative, least in (("jvp", 1e-10), ("difference", 5e-3)):
        goal = TransitionMatching(derivative=derivative).goal(exact_head, y, s, r, velocity, target)
        error = (goal - exact_head(y, s, r)).abs().max()
        print(f"{derivative}: {error:.2g}")
        assert error < least
    wrong = TransitionMatching(derivative="jvp").goal(
        lambda *a: exact_head(*a) + 0.1 * a[0], y, s, r, velocity, target
    )
    assert (wrong - exact_head(y, s, r) - 0.1 * y).abs().max() > 1e-2


def test_a_head_that_means_the_first_draw_minus_the_velocity_has_too_little_variance() -> None:
    """u = y_1 - h, for y ~ N(0, 1): h averages E[y | y_tau] over [r, s] along the flow, and samples are
    y_r = y_s - (s - r) (y_1 - h). In closed form h(y_1, 1, 0) = y_1 asinh(1) / sqrt(2)."""
    deviation = lambda t: math.sqrt((1 - t) ** 2 + t**2)  # noqa: E731

    def head(y: float, s: float, r: float, parts: int = 2000) -> float:
        taus = [r + (s - r) * (i + 0.5) / parts for i in range(parts)]
        return y / deviation(s) * sum((1 - tau) / deviation(tau) for tau in taus) / parts

    found = []
    for count in (1, 50):
        y = 1.0
        for s, r in itertools.pairwise([1 - i / count for i in range(count + 1)]):
            y -= (s - r) * (1 - head(y, s, r))
        found.append(y)
    print(f"standard deviations {found}")
    assert found[0] == pytest.approx(math.asinh(1) / math.sqrt(2), abs=1e-4) == pytest.approx(0.623, abs=1e-3)
    assert found[1] == pytest.approx(0.50, abs=0.01)


def test_the_velocity_of_a_head_makes_its_steps() -> None:
    y, head = torch.randn(4, 2, dtype=torch.float64), lambda y, s, r: y.sin() * expand(s + r, y)
    one, half, zero = (y.new_full((4,), level) for level in (1.0, 0.5, 0.0))
    u: Head = average_velocity(head)
    moved = y - 0.5 * u(y, one, half)
    assert torch.allclose(moved - 0.5 * u(moved, half, zero), integrate(head, y, (1.0, 0.5)))


# --- real networks


def students() -> Iterator[Any]:
    yield "wan", wan(layers=3), (3, 4, 4, 4), conditioning()
    backbone: Any = SD3Config(str(DIGITS)).build(torch.device("cpu"), torch.float64, 0)
    digits = backbone.load("student")
    yield "sd3", digits, backbone.latent_shape, backbone.encode_prompts(["a three", "a seven"])
    label = Conditioning({"label": torch.tensor([0, 1])})
    yield "points", tiny_backbone().load("student").double(), (2,), label


STUDENTS = [pytest.param(*values[1:], id=values[0]) for values in students()]


def learned(denoiser: Denoiser) -> Any:
    """A copy with an inner flow that is no longer at its start."""
    student: Any = denoiser.average()
    student.add_inner_flow(FLOW)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in student.network.fusion.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return student.requires_grad_(True)


def drawn(shape: tuple[int, ...], name: str) -> Tensor:
    return Draws(torch.arange(2), shape, 0, torch.float64)(name)


@pytest.mark.parametrize(("denoiser", "shape", "cond"), STUDENTS)
def test_a_fresh_inner_flow_changes_nothing(denoiser: Denoiser, shape: tuple[int, ...], cond: Conditioning) -> None:
    x, noise, t = drawn(shape, "x"), drawn(shape, "noise"), torch.tensor([0.7, 1.0], dtype=torch.float64)
    expected = denoiser(x, t, cond)
    student: Any = denoiser.average()
    student.add_inner_flow(FLOW)
    assert torch.allclose(student(x, t, cond, Inputs(inner=noise)), expected, atol=1e-9)
    assert not torch.allclose(learned(denoiser)(x, t, cond, Inputs(inner=noise)), expected, atol=1e-2)
    names = {name for name in student.state_dict() if "fusion" not in name}
    assert names == set(denoiser.state_dict())  # the weights keep their names
    with pytest.raises(ValueError, match="needs the noise"):
        student(x, t, cond)
    with pytest.raises(ValueError, match="has no inner flow"):
        denoiser(x, t, cond, Inputs(inner=noise))


@pytest.mark.parametrize(("denoiser", "shape", "cond"), STUDENTS)
def test_the_trunk_runs_once_and_the_head_at_every_level(
    denoiser: Denoiser, shape: tuple[int, ...], cond: Conditioning
) -> None:
    student = learned(denoiser)
    network = student.network
    blocks = next(getattr(network, name) for name in ("blocks", "transformer_blocks") if hasattr(network, name))
    calls = [0] * len(blocks)
    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    x, noise, t = drawn(shape, "x"), drawn(shape, "noise"), torch.full((2,), 0.7, dtype=torch.float64)
    whole = student(x, t, cond, Inputs(inner=noise), predict=student.prediction_type)
    assert calls == [1] * (len(blocks) - 1) + [len(FLOW.levels)] and len(blocks) > 1

    def head(y: Tensor, s: Tensor, r: Tensor) -> Tensor:
        inputs = Inputs(inner=y, inner_levels=torch.stack([s, r], -1))
        return student(x, t, cond, inputs, predict=student.prediction_type)

    assert torch.allclose(integrate(head, noise, FLOW.levels), whole, atol=1e-9)  # single calls are those of the whole


@pytest.mark.parametrize(("denoiser", "shape", "cond"), STUDENTS)
def test_gradient_flows_through_all_inner_steps(
    denoiser: Denoiser, shape: tuple[int, ...], cond: Conditioning
) -> None:
    """It reaches every weight, and is the derivative of the whole: by central differences along a direction."""
    student = learned(denoiser)
    x, noise, t = drawn(shape, "x"), drawn(shape, "noise"), torch.full((2,), 0.7, dtype=torch.float64)
    weight, mark = student.network.fusion.tokens.weight, drawn(shape, "mark")
    loss = lambda: (student(x, t, cond, Inputs(inner=noise)) * mark).sum()  # noqa: E731
    loss().backward()
    # labels that are not in the batch, and the text of the last block, have no gradient in the base network either
    base = denoiser.average().requires_grad_(True)
    (base(x, t, cond) * mark).sum().backward()
    without = {name for name, there in reached(base).items() if not there}
    assert {name for name, there in reached(student).items() if not there} <= without
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=weight.dtype)
    expected, values = (weight.grad * direction).sum(), []
    with torch.no_grad():
        for step in (1e-3, -1e-3):
            weight += step * direction
            values.append(loss())
            weight -= step * direction
    found = (values[0] - values[1]) / 2e-3
    print(f"{found:.6g}, by differences {expected:.6g}")
    assert torch.allclose(found, expected, rtol=2e-3)  # Wan computes its norms in float32


def test_checkpointing_gives_the_same_gradient() -> None:
    found = []
    for again in (False, True):
        student = learned(wan(layers=3))
        if again:
            student.enable_checkpointing()
        student.train()
        x, noise = drawn((3, 4, 4, 4), "x"), drawn((3, 4, 4, 4), "noise")
        t = torch.full((2,), 0.7, dtype=torch.float64)
        student(x, t, conditioning(), Inputs(inner=noise)).square().sum().backward()
        found.append([p.grad for p in student.parameters()])
    assert all(torch.allclose(a, b) for a, b in zip(*found, strict=True) if a is not None)


# --- rollouts


def test_a_rollout_is_the_sampler() -> None:
    """The last step of a rollout is the sampler's to the bit, and a sample that stops earlier has the noise of its
    own step."""
    student, batch = learned(tiny_backbone().load("student").double()), tiny_batch(6)
    whole = sample(student, POLICY, batch.cond, batch.normal)
    last = backward_simulation(student, POLICY, batch, torch.ones_like(batch.ids))
    assert torch.equal(last.x, whole)
    stop = torch.tensor([0, 1, 1, 0, 1, 0])
    mixed = backward_simulation(student, POLICY, batch, stop)
    first = student(batch.normal("initial"), torch.ones(6).double(), batch.cond, Inputs(inner=batch.normal("inner0")))
    assert torch.allclose(mixed.x, torch.where(stop[:, None] == 0, first, whole), atol=1e-12)
    other = sample(student, POLICY, batch.cond, lambda name: batch.normal("x" * name.startswith("inner") + name))
    assert (other - whole).abs().max() > 1e-3  # another inner noise, another sample


# --- exports


def test_an_exported_student_is_loaded_by_plain_diffusers(tmp_path: Path) -> None:
    backbone: Any = SD3Config(str(DIGITS)).build(torch.device("cpu"), torch.float32, 0)
    student = learned(backbone.load("student")).float()
    backbone.save_pipeline(student, POLICY, tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["fastgen.pipelines.inner_flow", "InnerFlowSD3Transformer2DModel"]
    assert "import fastgen.pipelines.inner_flow" in backbone.usage(POLICY, tmp_path, False)
    read = backbone.load_exported(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), student.parameters(), strict=True))
    x, noise = (drawn(backbone.latent_shape, name).float() for name in ("x", "noise"))
    cond, t = backbone.encode_prompts(["a three", "a seven"]), torch.tensor([0.7, 1.0])
    expected = student(x, t, cond, Inputs(inner=noise))
    assert torch.equal(read(x, t, cond, Inputs(inner=noise)), expected)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipeline.transformer) is type(student.network)
    pictures = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        call = {"num_inference_steps": 2, "guidance_scale": 1, "output_type": "pt"}
        latents = drawn(backbone.latent_shape, "x").float()[:1]
        pictures.append(pipeline("a three", latents=latents, **call).images)
    assert torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])


def test_an_exported_video_student_is_itself(tmp_path: Path) -> None:
    folder = tiny_wan(tmp_path / "wan", layers=3)
    config = WanConfig(str(folder), height=32, width=32, num_frames=5, max_sequence_length=8)
    backbone = config.build(torch.device("cpu"), torch.float32, 0)
    student = learned(backbone.load("student"))
    backbone.save_pipeline(student, POLICY, tmp_path / "export")
    read, shape = backbone.load_exported(tmp_path / "export"), backbone.latent_shape
    x, noise = drawn(shape, "x").float(), drawn(shape, "noise").float()
    cond, t = backbone.encode_prompts(["a cat runs", "a dog"]), torch.tensor([0.7, 1.0])
    assert torch.equal(read(x, t, cond, Inputs(inner=noise)), student(x, t, cond, Inputs(inner=noise)))
    with pytest.raises(ValueError, match="needs a WanTransformer3DModel there"):
        WanConfig(str(tmp_path / "export"), height=32, width=32, num_frames=5).check()


# --- training


def test_each_stage_trains_its_networks() -> None:
    backbone = tiny_backbone()
    flow = InnerFlow(blocks=1, levels=(1.0, 0.5))
    policy = RolloutPolicy((1.0, 0.5), inner=flow)
    for objective, turn in ((TransitionMatching(diagonal=0.5), STUDENT), (DMD2(), STUDENT)):
        networks = tiny_networks(objective, policy, backbone=backbone)
        loss = objective.loss(turn, networks, tiny_batch(), objective.init_state())
        loss.total.backward()  # type: ignore[union-attr]
        there = reached(networks.student)
        assert there["network.fusion.tokens.weight"] and there["network.inlet.weight"]
        assert not any(
            p.grad is not None for role in networks if role != "student" for p in networks[role].parameters()
        )


@pytest.mark.parametrize("name", with_inner())
def test_every_objective_that_takes_it_gives_the_student_its_noise(name: str) -> None:
    """A network with an inner flow refuses every other call."""
    examples = imported(OBJECTIVES[name]).examples
    objective = build_section("objective", {"name": name, **examples[0]}, OBJECTIVES, Objective)
    probe = Probe(objective)
    vars(probe)["policy"] = replace(probe.policy, inner=InnerFlow(blocks=1))
    objective.check(probe.policy)
    assert probe.evaluations["student"] >= 1


def test_levels_are_those_of_the_inner_grid() -> None:
    objective, batch = TransitionMatching(diagonal=0.5), tiny_batch(400)
    s, r = objective.levels(batch, (1.0, 0.5))
    off = r < s
    assert 0.4 < off.double().mean() < 0.6
    assert torch.equal(r[off], torch.where(s[off] > 0.5, 0.5, 0.0).to(r)) and torch.equal(r[~off], s[~off])
    assert (s > 0.5).double().mean() == pytest.approx(0.75, abs=0.07)  # uniform, shifted by 3


MIXTURE = ("train.batch_size=64", "backbone.fit_steps=50", "eval.num_samples=64", "eval.quick_num_samples=64")


@pytest.mark.slow
def test_the_stages_follow_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two updates of each, from the shipped recipes; the second stage begins with the weights of the first."""
    monkeypatch.chdir(ROOT)
    quick = (*MIXTURE, "train.steps=2", "eval.teacher_steps=[]", "health.every=0", "train.ema_decay=0")
    first = train(load_recipe("recipes/mixture_transition_matching_2step.yaml", [*quick, f"output_dir={tmp_path}/a"]))
    second = [*quick, f"output_dir={tmp_path}/b", f"init_from={first}", "optimizers.student.lr=1e-7"]
    run = train(load_recipe("recipes/mixture_tmd_2step.yaml", second))
    samplers = [load_sampler(folder / "export") for folder in (first, run)]
    a, b = (sampler.denoiser.state_dict() for sampler in samplers)
    assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
    assert a["network.fusion.tokens.weight"].abs().max() > 0
    with pytest.raises(RecipeError, match=r"has an inner flow; set rollout\.inner as there"):
        load_recipe("recipes/mixture_dmd2_4step.yaml", [f"init_from={first}"])
    assert samplers[1].sample(prompts=[""] * 4, seeds=range(4)).shape == (4, 2)


def test_a_student_without_an_inner_flow_is_a_start() -> None:
    base = tiny_backbone().load("student")
    given = set(base.state_dict())
    base.add_inner_flow(FLOW)
    own = set(base.state_dict())
    assert set(carried_names(own, given)) == given == {name for name in own if ".fusion." not in name}
    with pytest.raises(ValueError, match="another network"):
        carried_names(given, own)


# --- refusals

BASE = "recipes/mixture_dmd2_4step.yaml"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["rollout.inner={blocks: 3}"], "3 of the network's 3 blocks.*at most 2"),
        (["rollout.inner={levels: [0.9, 0.5]}"], "begins with noise, at level 1"),
        (["rollout.inner={levels: [1.0, 0.5, 0.7]}"], "strictly decreasing"),
        (["rollout.inner={blocks: 1}", "rollout.two_time=true"], "leave out two_time"),
        (["rollout.inner={blocks: 1}", "objective.ida_decay=0.9"], "cannot train a student with an inner flow.*dmd2"),
        (["rollout.inner={blocks: 1}", "objective.name=sc_dmd"], "objective sc_dmd cannot train a student with"),
        (["rollout.inner={blocks: 1}", "lora={student: {rank: 2}}"], "weights that no adapter has"),
    ],
)
def test_what_cannot_be_is_refused(changes: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(RecipeError, match=words):
        load_recipe(BASE, changes)


def test_transition_matching_needs_an_inner_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(RecipeError, match=r"give rollout\.inner, such as"):
        load_recipe("recipes/mixture_transition_matching_2step.yaml", ["rollout.inner=null"])
    with pytest.raises(RecipeError, match="backbone sd has no student with an inner flow"):
        load_recipe("recipes/sd15_dmd2_1step.yaml", ["rollout.inner={blocks: 1}"])
    with pytest.raises(ValueError, match="backbone wan_i2v has no student with an inner flow"):
        WanI2VConfig("org/wan").check_inner(FLOW)
    student = learned(wan(layers=3))
    video = drawn((3, 4, 4, 4), "x")
    with pytest.raises(ValueError, match="one level for all frames"):
        student(video, torch.ones(2, 3), conditioning(), Inputs(inner=video))
