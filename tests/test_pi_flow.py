"""Students that predict the flow of a whole segment: the exact mixture, the flow between levels, real networks,
exports, and the objective that teaches them."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from oracles import reached, tiny_backbone, tiny_batch, tiny_networks
from torch import Tensor

import fastgen.pipelines.segment_flow  # noqa: F401 - diffusers finds the class of an export among the imported modules
from fastgen import signals
from fastgen.backbones.gaussian_mixture import GaussianMixtureConfig, build_mixture
from fastgen.backbones.sd3 import SD3Config
from fastgen.backbones.wan import WanConfig
from fastgen.batch import Batch, Conditioning, Draws
from fastgen.config import load_recipe
from fastgen.denoiser import Denoiser, Inputs
from fastgen.modules.inputs import carried_names
from fastgen.modules.segment_flow import Line, Mixture, Segment, ends, follow, followed
from fastgen.objectives.base import Loss, State, Turn
from fastgen.objectives.pi_flow import PiFlow, drawn_tops, mean_velocity
from fastgen.policy import SegmentFlow
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy, backward_simulation, sample
from fastgen.sampling.sampler import load_sampler
from fastgen.schedule import FlowSchedule
from fastgen.train import train

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "assets/teachers/digits"
STUDENT = Turn("student", ("student",))
LEVELS = (1.0, 0.6)
FLOWS = [SegmentFlow("mixture", 3, 8), SegmentFlow("line", 4, 8)]
MIXTURE = GaussianMixtureConfig(
    means=((1.0, 0.0), (-1.0, 0.5), (0.3, -1.2)), stds=(0.3, 0.3, 0.3), weights=(1, 2, 3), width=16, fit_steps=20
)
LAW = build_mixture(MIXTURE)
SCHEDULE = FlowSchedule()


def drawn(shape: tuple[int, ...], name: str, count: int = 2) -> Tensor:
    return Draws(torch.arange(count), shape, 0, torch.float64)(name)


# --- the flow


def posterior(x: Tensor, top: Tensor, bottom: Tensor) -> Mixture:
    """The law of x0 given x at level `top`, for x0 of LAW."""
    alpha, sigma = SCHEDULE.coefficients(top, x)
    log_joint, v = LAW._posterior(x, alpha, sigma, torch.zeros(len(x), dtype=torch.int64))
    means = LAW.means + alpha[:, :, None] * LAW.variances / v * (x[:, None] - alpha[:, :, None] * LAW.means)
    std = (LAW.variances * sigma[:, :, None] ** 2 / v).sqrt()[:, :1, :1]
    return Mixture(top, bottom, x, means, log_joint.log_softmax(1)[:, :, None], std.log())


def test_the_exact_mixture_gives_the_teacher_at_every_later_state() -> None:
    """One call tells the whole flow, at states that have nothing to do with where it began."""
    x, y, draw = drawn((2,), "x", 64), drawn((2,), "y", 64), torch.rand(2, 64, dtype=torch.float64)
    top = 0.5 + 0.5 * draw[0]
    t = top * draw[1].clamp_min(0.05)
    alpha, sigma = SCHEDULE.coefficients(t, y)
    expected = LAW.posterior_mean(y, alpha, sigma, torch.zeros(64, dtype=torch.int64))
    segment = posterior(x, top, torch.zeros_like(top))
    print(f"largest error {(segment.x0(y, t) - expected).abs().max():.2g}")
    assert torch.allclose(segment.x0(y, t), expected, atol=1e-12)
    assert torch.allclose(segment.velocity(y, t), (y - expected) / t[:, None], atol=1e-9)
    wrong = replace(segment, log_std=segment.log_std + 0.1)
    assert (wrong.x0(y, t) - expected).abs().max() > 1e-2


def test_its_flow_is_the_ode_of_the_teacher() -> None:
    """A single Gaussian's in closed form: in one call from noise to data, with an error that falls with the square of
    the substeps."""
    law = build_mixture(GaussianMixtureConfig(means=((0.7, -0.2),), stds=(0.5,)))
    x, one = drawn((2,), "x", 8), torch.ones(8, dtype=torch.float64)
    zero = torch.zeros_like(one)
    means, width = law.means.expand(8, 1, 2), law.variances.sqrt()[:, :1].expand(8, 1, 1)
    segment = Mixture(one, zero, x, means, torch.zeros(8, 1, 1, dtype=torch.float64), width.log())
    expected = law.flow_map(x, SCHEDULE.coefficients(one, x), SCHEDULE.coefficients(zero, x))
    errors = [(follow(segment, x, one, zero, n) - expected).abs().max() for n in (64, 128)]
    print(f"errors {errors}")
    assert errors[0] < 2e-3 and errors[1] == pytest.approx(float(errors[0] / 4), rel=0.2)
    parts = follow(segment, follow(segment, x, one, 0.5 * one, 64), 0.5 * one, zero, 64)
    assert torch.allclose(parts, follow(segment, x, one, zero, 128))
    assert torch.equal(followed(segment, x, 64), follow(segment, x, one, zero, 64))  # the step ends at 0


def test_a_line_is_linear_between_its_points() -> None:
    """With two points the flow has a closed form: with x0 = a + b t, x_s = (s/t) x + a (1 - s/t) + s b log(t/s)."""
    a, b, x = (drawn((3,), name) for name in "abx")
    top, bottom = (torch.tensor(values, dtype=torch.float64) for values in ([0.9, 0.8], [0.3, 0.4]))
    t, s = top[:, None], bottom[:, None]
    line = Line(top, bottom, torch.stack([a + b * t, a + b * s], dim=1))
    assert torch.allclose(line.x0(x, 0.6 * torch.ones_like(top)), a + 0.6 * b)
    expected = (s / t) * x + a * (1 - s / t) + s * b * (t / s).log()
    found = follow(line, x, top, bottom, 1000)
    print(f"error {(found - expected).abs().max():.2g}")
    assert torch.allclose(found, expected, atol=1e-6)
    jump = followed(line, x, 1000)
    assert torch.allclose((s / t) * x + (1 - s / t) * jump, found)
    three = Line(top, bottom, torch.stack([a, b, x], dim=1))
    places = [three.x0(a, at) for at in (top, (top + bottom) / 2, bottom)]
    assert all(torch.allclose(found, point) for found, point in zip(places, (a, b, x), strict=True))


def test_hidden_components_have_no_part_in_it() -> None:
    x, y = drawn((2,), "x", 3), drawn((2,), "y", 3)
    segment = posterior(x, torch.ones(3).double(), torch.zeros(3).double())
    hidden = torch.tensor([[True, False, False], [False, True, True], [True, True, True]])
    found, t = segment.without(hidden), torch.full((3,), 0.5).double()
    assert torch.equal(found.x0(y, t)[2], segment.x0(y, t)[2])  # all hidden: none is
    moved = replace(segment, means=segment.means + 5 * hidden[:, :, None])
    assert torch.allclose(moved.without(hidden).x0(y, t)[:2], found.x0(y, t)[:2])


def test_a_segment_ends_at_the_next_level() -> None:
    t = torch.tensor([1.0, 0.601, 0.599, 0.25])
    assert torch.allclose(ends(t, (1.0, 0.6, 0.25)), torch.tensor([0.6, 0.25, 0.25, 0.0]))


# --- real networks


def students() -> Iterator[Any]:
    backbone: Any = SD3Config(str(DIGITS)).build(torch.device("cpu"), torch.float64, 0)
    digits = backbone.load("student")
    yield "sd3", digits, backbone.latent_shape, backbone.encode_prompts(["a three", "a seven"])
    label = Conditioning({"label": torch.tensor([0, 1])})
    yield "points", tiny_backbone().load("student").double(), (2,), label


CASES = [pytest.param(flow, *values[1:], id=f"{values[0]}-{flow.kind}") for values in students() for flow in FLOWS]


def learned(denoiser: Denoiser, flow: SegmentFlow) -> Any:
    """A copy with a segment flow that is no longer at its start."""
    student: Any = denoiser.average()
    student.add_segment_flow(flow, LEVELS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in student.network.segment_head.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return student.requires_grad_(True)


@pytest.mark.parametrize(("flow", "denoiser", "shape", "cond"), CASES)
def test_a_fresh_one_makes_nearly_the_steps_of_before(
    flow: SegmentFlow, denoiser: Denoiser, shape: tuple[int, ...], cond: Conditioning
) -> None:
    x, t = drawn(shape, "x"), torch.tensor([0.6, 1.0], dtype=torch.float64)
    expected, student = denoiser(x, t, cond), denoiser.average()
    student.add_segment_flow(flow, LEVELS)
    least = 0.25 if flow.kind == "mixture" else 1e-6
    assert (student(x, t, cond) - expected).square().mean().sqrt() < least * expected.square().mean().sqrt()
    assert {n for n in student.state_dict() if "segment_head" not in n} == set(denoiser.state_dict())
    with pytest.raises(ValueError, match="predicts no segments"):
        denoiser(x, t, cond, Inputs(segment=[]))


@pytest.mark.parametrize(("flow", "denoiser", "shape", "cond"), CASES)
def test_its_step_is_the_flow_of_the_segment_that_it_hands_out(
    flow: SegmentFlow, denoiser: Denoiser, shape: tuple[int, ...], cond: Conditioning
) -> None:
    student, handed = learned(denoiser, flow), list[Segment]()
    x, t = drawn(shape, "x"), torch.tensor([0.6, 1.0], dtype=torch.float64)
    at_top = student(x, t, cond, Inputs(segment=handed))
    segment, bottom = handed[0], torch.tensor([0.0, 0.6], dtype=torch.float64)
    assert torch.allclose(segment.top, t) and torch.allclose(segment.bottom, bottom)
    assert torch.allclose(at_top, segment.x0(x, t), atol=1e-9)
    x0, place = student(x, t, cond), (-1, *[1] * len(shape))
    ratio = (bottom / t).reshape(place)
    assert torch.allclose(ratio * x + (1 - ratio) * x0, follow(segment, x, t, bottom, flow.substeps), atol=1e-9)
    assert isinstance(segment, Mixture if flow.kind == "mixture" else Line)
    points = segment.means if isinstance(segment, Mixture) else segment.points  # type: ignore[attr-defined]
    assert points.shape == (2, flow.size, *shape) and (points[:, 0] - points[:, 1]).abs().max() > 1e-2
    if isinstance(segment, Mixture):
        assert torch.allclose(segment.log_weights.exp().sum(1), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.kind)
def test_a_patch_of_every_prediction_is_where_the_stock_one_is(flow: SegmentFlow) -> None:
    """Heads with the weights of the last layer predict what it predicts, at every pixel of the latent."""
    backbone: Any = SD3Config(str(DIGITS)).build(torch.device("cpu"), torch.float64, 0)
    student, handed = backbone.load("student"), list[Segment]()
    student.add_segment_flow(flow, LEVELS)
    head, last = student.network.segment_head, student.network.proj_out
    with torch.no_grad():
        head.more.bias.copy_(last.bias.repeat(flow.size - 1))
    cond = backbone.encode_prompts(["a three", "a seven"])
    student(drawn(backbone.latent_shape, "x"), torch.ones(2).double(), cond, Inputs(segment=handed))
    points = vars(handed[0])["means" if flow.kind == "mixture" else "points"]
    assert torch.allclose(points, points[:, :1].expand_as(points), atol=1e-9)


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.kind)
def test_an_exported_student_is_loaded_by_plain_diffusers(flow: SegmentFlow, tmp_path: Path) -> None:
    backbone: Any = SD3Config(str(DIGITS)).build(torch.device("cpu"), torch.float32, 0)
    policy = RolloutPolicy(LEVELS, transition="ode", segment=flow)
    student = learned(backbone.load("student"), flow).float()
    backbone.save_pipeline(student, policy, tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["fastgen.pipelines.segment_flow", "SegmentFlowSD3Transformer2DModel"]
    assert "import fastgen.pipelines.segment_flow" in backbone.usage(policy, tmp_path, False)
    read = backbone.load_exported(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), student.parameters(), strict=True))
    cond = backbone.encode_prompts(["a three", "a seven"])
    latents = drawn(backbone.latent_shape, "initial").float()
    expected = backbone.decode(sample(student, policy, cond, lambda name: latents), clamp=False)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    call = {"num_inference_steps": 2, "guidance_scale": 1, "output_type": "pt"}
    pictures = pipeline(["a three", "a seven"], latents=latents, **call).images
    print(f"largest difference {(pictures - expected.clamp(0, 1)).abs().max():.2g}")
    assert torch.allclose(pictures, expected.clamp(0, 1), atol=1e-4)


# --- training


def exact_segments(networks: Any) -> None:
    """The student predicts the exact law of x0 given its x."""

    def call(x: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        segment = posterior(x, t, ends(t, LEVELS))
        if inputs.segment is None:
            return followed(segment, x, 32)
        inputs.segment.append(segment)
        return segment.x0(x, t)

    networks.student.call_network = call


def total(objective: PiFlow, networks: Any, batch: Batch, state: State) -> Tensor:
    losses: Any = objective.loss(STUDENT, networks, batch, state)
    return losses.total if isinstance(losses, Loss) else sum(loss.total for loss in losses)


def updated(count: int) -> State:
    return {"updates": torch.tensor(count)}


@pytest.mark.parametrize("data", [False, True])
def test_the_exact_student_has_no_loss(data: bool) -> None:
    """At the states of its own flow; another one has some. Over a teacher's Euler step, the mean velocity of the exact
    flow is not the teacher's velocity at its beginning."""
    backbone = tiny_backbone(MIXTURE)
    policy = RolloutPolicy(LEVELS, transition="ode", segment=SegmentFlow("mixture", 3, 64))
    objective = PiFlow(states=3, dropout=0, window=0, data=data, teacher_updates=10)
    networks, losses = tiny_networks(objective, policy, backbone=backbone), list[float]()
    batch = replace(tiny_batch(), cond=Conditioning({"label": torch.zeros_like(tiny_batch().ids)}))
    for change in (lambda _networks: None, exact_segments):
        change(networks)
        losses += [float(total(objective, networks, batch, updated(count)).detach()) for count in (10, 0)]
    print(losses)
    assert min(losses[0], losses[1], losses[3]) > 1e-3 and losses[2] < 1e-12


def test_the_mean_velocity_over_a_short_time_is_the_velocity() -> None:
    """In float32, where the levels of the teacher's shortest steps round to one another."""
    segment = posterior(drawn((2,), "x", 4), torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
    segment = replace(segment, **{name: value.float() for name, value in vars(segment).items()})
    x, t = drawn((2,), "y", 4).float(), torch.full((4,), 0.7)
    s = t - torch.tensor([0.0, 1e-9, 1e-5, 0.01])
    found, here = mean_velocity(segment, x, t, s, 16), segment.velocity(x, t)
    assert found.isfinite().all() and torch.equal(found[:3], here[:3])
    assert torch.allclose(found[3], here[3], rtol=0.2) and not torch.equal(found[3], here[3])


def test_the_loss_is_the_velocity_error_at_the_states_of_the_student() -> None:
    """By hand, with one state: the flow to it has no gradient, and dropout hides components from that flow alone."""
    policy = RolloutPolicy((1.0,), transition="ode", segment=SegmentFlow("mixture", 3, 16))
    objective = PiFlow(states=1, teacher_updates=0, dropout=0.5, window=0.1)
    networks, batch = tiny_networks(objective, policy), tiny_batch()
    found = total(objective, networks, batch, updated(0))
    found.backward()
    weight = networks.student.network.segment_head.log_std.weight
    gradient, weight.grad = weight.grad.clone(), None

    handed, x, one = list[Segment](), batch.normal("initial"), torch.ones(len(batch.ids), dtype=batch.dtype)
    networks.student(x, one, batch.cond, Inputs(segment=handed))
    segment: Any = handed[0]
    t = 1 - 0.9 * batch.uniform("student_states0", shape=(1,))[:, 0]
    hidden = segment.without(batch.uniform("components0", shape=(3,)) < 0.5)
    state = follow(hidden, x, one, t, 16).detach()
    x0 = signals.guided(networks.teacher, state, t, batch.cond, batch.uncond, 1.0)
    mean = (state - follow(segment, state, t, t - 0.1, 4)) / 0.1
    expected = 0.5 * ((state - x0) / t[:, None] - mean).square().mean()
    assert torch.allclose(found, expected)
    expected.backward()
    assert torch.allclose(weight.grad, gradient) and gradient.abs().max() > 0


def test_each_segment_of_a_rollout_counts_by_its_length_and_data_are_drawn_by_it() -> None:
    """For levels 1 and 0.6: 0.4 times the loss of the first segment and 0.6 times that of the second, which begins
    where the first one ends. A segment that data were drawn for has no such factor."""
    policy = RolloutPolicy(LEVELS, transition="ode", segment=SegmentFlow("mixture", 3, 8))
    objective = PiFlow(teacher_updates=10)
    networks, batch, state = tiny_networks(objective, policy), tiny_batch(), updated(5)
    x, expected = batch.normal("initial"), torch.zeros((), dtype=torch.float64)
    for i, (level, length) in enumerate(zip(LEVELS, (0.4, 0.6), strict=True)):
        error, _, x = objective.segment_loss(networks, batch, state, str(i), x, x.new_full((len(x),), level))
        expected = expected + length * error.mean()
    assert torch.allclose(total(objective, networks, batch, state), expected)
    t = drawn_tops(batch, policy)
    noised = (1 - t[:, None]) * batch.latents + t[:, None] * batch.normal("noise")
    error = objective.segment_loss(networks, batch, state, "", noised, t)[0]
    assert torch.allclose(total(replace(objective, data=True), networks, batch, state), error.mean())


def test_the_teacher_makes_the_first_steps_and_the_student_the_later_ones() -> None:
    objective, batch, length = PiFlow(states=3, teacher_updates=10, window=0.1), tiny_batch(400), 0.6
    one = torch.ones(400, dtype=torch.float64)
    segment = posterior(drawn((2,), "x", 400), one, (1 - length) * one)
    for count, share in ((0, 1.0), (5, 0.5), (10, 0.0), (20, 0.0)):
        gaps = objective.gaps(batch, updated(count), "", segment, 16)
        assert (gaps.student >= 0).all() and (gaps.teacher >= 0).all() and (gaps.window == 0.1).all()
        assert torch.allclose(gaps.teacher.sum(1), share * (length - 0.1) * one)  # it goes on to the end of its share
        assert (gaps.student.sum(1) <= (1 - share) * (length - 0.1) + 1e-12).all()
        assert (gaps.student.sum(1) > 0).all() == (share < 1)
        assert gaps.substeps == (16 if share else 4)
    assert PiFlow(window=0.0, teacher_updates=0).gaps(batch, updated(0), "", segment, 16).substeps == 0
    assert (PiFlow(window=0.9).gaps(batch, updated(0), "", segment, 16).window == segment.top - segment.bottom).all()


def test_segments_are_drawn_in_proportion_to_their_length() -> None:
    tops = drawn_tops(tiny_batch(2000), RolloutPolicy((1.0, 0.7, 0.2), transition="ode", segment=FLOWS[0]))
    shares = [float((tops == top).double().mean()) for top in (1.0, 0.7, 0.2)]
    assert shares == pytest.approx([0.3, 0.5, 0.2], abs=0.03) and sum(shares) == 1


def test_segments_of_a_rollout_follow_each_other() -> None:
    """Without a teacher's steps and without dropout, each begins where the sampler calls the network."""
    policy = RolloutPolicy(LEVELS, transition="ode", segment=SegmentFlow("line", 3, 8))
    objective = PiFlow(teacher_updates=0, dropout=0)
    networks, batch, calls = tiny_networks(objective, policy), tiny_batch(6), list[Tensor]()
    networks.student.register_forward_hook(lambda _module, args, _out: calls.append(args[0]))
    list(objective.loss(STUDENT, networks, batch, updated(0)))  # type: ignore[arg-type]
    steps = sample(networks.student, replace(policy, timesteps=LEVELS), batch.cond, batch.normal)
    assert len(calls) == 4 and torch.equal(calls[0], calls[2]) and steps.shape == calls[1].shape
    assert torch.allclose(calls[1], calls[3], atol=1e-2)  # the flow is the same, in other substeps


def test_gradient_reaches_the_student_alone_and_data_are_optional() -> None:
    policy = RolloutPolicy(LEVELS, transition="ode", segment=SegmentFlow("mixture", 3, 4))
    objective = PiFlow()
    networks = tiny_networks(objective, policy)
    total(objective, networks, replace(tiny_batch(), latents=None), updated(0)).backward()
    there = reached(networks.student)
    assert all(there[f"network.{n}.weight"] for n in ("inlet", "segment_head.more", "segment_head.weights"))
    assert not any(p.grad is not None for role in networks if role != "student" for p in networks[role].parameters())
    assert not objective.needs and PiFlow(data=True).needs == {"latents"}
    state = updated(3)
    objective.finish(STUDENT, networks, state)
    assert state["updates"] == 4


def test_a_rollout_is_the_sampler() -> None:
    flow = SegmentFlow("mixture", 3, 8)
    policy = RolloutPolicy(LEVELS, transition="ode", segment=flow)
    student, batch = learned(tiny_backbone().load("student").double(), flow), tiny_batch(6)
    whole = sample(student, policy, batch.cond, batch.normal)
    assert torch.equal(backward_simulation(student, policy, batch, torch.ones_like(batch.ids)).x, whole)


def test_a_run_is_stored_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    quick = ["train.steps=2", "train.batch_size=32", "backbone.fit_steps=20", "eval.num_samples=64", "health.every=0"]
    quick += ["eval.quick_num_samples=64", "eval.teacher_steps=[]", "rollout.segment.substeps=4"]
    run = train(load_recipe("recipes/mixture_pi_flow_4step.yaml", [*quick, f"output_dir={tmp_path}/a"]))
    sampler = load_sampler(run / "export")
    assert sampler.sample(prompts=[""] * 4, seeds=range(4)).shape == (4, 2)
    assert sampler.denoiser.network.levels == (1.0, 0.75, 0.5, 0.25)
    assert sampler.policy.segment == SegmentFlow("mixture", 8, 4)
    again = [f"init_from={run}", f"output_dir={tmp_path}/b"]
    for change in ("rollout.segment.size=4", "rollout.segment.kind=line"):
        with pytest.raises(RecipeError, match=r"predicts segments as a mixture of 8; make rollout\.segment\.kind"):
            load_recipe("recipes/mixture_pi_flow_4step.yaml", [*again, change])
    with pytest.raises(RecipeError, match="predicts segments as a mixture of 8"):
        load_recipe("recipes/mixture_dmd2_4step.yaml", again)
    load_recipe("recipes/mixture_pi_flow_4step.yaml", [*again, "rollout.timesteps=[1.0, 0.5]"])


def test_a_student_without_it_is_a_start() -> None:
    base = tiny_backbone().load("student")
    given = set(base.state_dict())
    base.add_segment_flow(FLOWS[0], LEVELS)
    own = set(base.state_dict())
    assert set(carried_names(own, given)) == given == {name for name in own if "segment_head" not in name}
    with pytest.raises(ValueError, match="another network"):
        carried_names(given, own)


# --- refusals


@pytest.mark.parametrize(
    ("recipe", "changes", "words"),
    [
        (
            "mixture_pi_flow_4step",
            ["rollout.transition=renoise"],
            "predicts a deterministic flow: set transition: ode",
        ),
        ("mixture_pi_flow_4step", ["rollout.two_time=true"], "leave out two_time"),
        ("mixture_pi_flow_4step", ["rollout.inner={blocks: 1}"], "leave out inner"),
        ("mixture_pi_flow_4step", ["rollout.segment.size=1"], "greater than or equal to 2"),
        ("mixture_pi_flow_4step", ["rollout.segment=null"], r"give rollout\.segment, such as"),
        ("mixture_pi_flow_4step", ["lora={student: {rank: 2}}"], "weights that no adapter has"),
        (
            "mixture_dmd2_4step",
            ["rollout.segment={size: 4}", "rollout.transition=ode"],
            "leave it out, or use pi_flow",
        ),
        ("sd15_dmd2_1step", ["rollout.segment={size: 4}", "rollout.transition=ode"], "leave it out, or use pi_flow"),
    ],
)
def test_what_cannot_be_is_refused(
    recipe: str, changes: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(RecipeError, match=words):
        load_recipe(f"recipes/{recipe}.yaml", changes)


def test_families_without_it_say_so() -> None:
    with pytest.raises(ValueError, match="backbone wan has no student that predicts segments"):
        WanConfig("org/wan").check_segment(FLOWS[0])
