"""Rewards against closed forms, their composition by hand, and what a recipe may ask of them."""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgen.backbones.sd3 import SD3, SD3Config
from fastgen.backbones.wan import WanConfig
from fastgen.batch import Batch, Conditioning
from fastgen.config import load_recipe
from fastgen.config.stored import changed_keys, dump_recipe, registered_name
from fastgen.data.digits import load_digits, prompt_for
from fastgen.metrics import METRICS, MetricContext
from fastgen.networks import Ema, Networks, move
from fastgen.registry import RecipeError
from fastgen.rewards import REWARDS, Composite, Reward, Score, Scorer
from fastgen.rewards.digit_class import DigitClass, classifier
from fastgen.rewards.digit_stroke import DigitStroke
from fastgen.rewards.function import FunctionReward
from fastgen.rewards.jpeg_size import JpegSize
from fastgen.rewards.linear import Linear
from fastgen.rewards.quadratic import Quadratic
from fastgen.rollout import RolloutPolicy
from fastgen.train import main, train

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
MIXTURE, DIGITS = (ROOT / "recipes" / name for name in ("mixture_dmd2_4step.yaml", "digits_dmd2_4step.yaml"))
ONE_STEP = RolloutPolicy((1.0,))


def column(values: Sequence[float], differentiable: bool = True, **options: Any) -> FunctionReward:
    """A reward of points with these scores, plus the first coordinate."""
    return FunctionReward(
        lambda x, _: x[:, 0] + x.new_tensor(values), input="points", differentiable=differentiable, **options
    )


def scored(composite: Composite, count: int, group: Sequence[int] | None = None) -> Score:
    ids = None if group is None else torch.tensor(group)
    return composite({"points": torch.zeros(count, 2)}, [""] * count, ids)


# --- the rewards


def test_linear_and_quadratic_are_their_closed_forms() -> None:
    """a^T x with gradient a; -1/2 (x - c)^T Q (x - c) with gradient -Q (x - c)."""
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    a, c, q = ([0.5, -2.0, 1.0], [1.0, 0.0, -1.0], [2.0, 0.5, 0.0])
    exact = torch.tensor([a, c, q], dtype=torch.float64)
    for reward, value, gradient in (
        (Linear(tuple(a)), x.detach() @ exact[0], exact[0].expand(7, 3)),
        (Quadratic(tuple(c), tuple(q)), -0.5 * ((x.detach() - exact[1]) ** 2 @ exact[2]), -exact[2] * (x - exact[1])),
    ):
        score = reward(x, [""] * 7)
        assert score.value.dtype == torch.float32 and score.valid.all()
        (got,) = torch.autograd.grad(score.value.sum(), x)
        errors = (score.value - value).abs().max().item(), (got - gradient).abs().max().item()
        print(f"{reward.label}: value {errors[0]:.1e}, gradient {errors[1]:.1e}")
        assert max(errors) < 2e-6


@pytest.mark.parametrize(("reward", "step"), [(DigitStroke(), 1e-2), (DigitClass(), 1e-3)])
def test_the_gradient_of_a_digit_reward_is_its_slope(reward: Reward, step: float) -> None:
    """Central differences along the gradient, of blurred digits, where the classifier is not sure of itself."""
    pixels, labels = load_digits("test")
    x = (0.5 * pixels[:8] + 0.5 * pixels[8:16]).requires_grad_()
    prompts = [prompt_for(int(label)) for label in labels[:8]]
    (grad,) = torch.autograd.grad(reward(x, prompts).value.sum(), x)
    direction = grad / grad.flatten(1).norm(dim=1)[:, None, None, None]
    with torch.no_grad():
        up, down = (reward(x + sign * step * direction, prompts).value for sign in (1, -1))
    slope, length = (up - down) / (2 * step), grad.flatten(1).norm(dim=1)
    print(f"{reward.label}: largest relative error {((slope - length) / length).abs().max():.1e}")
    assert torch.allclose(slope, length, rtol=2e-2)


def test_digit_stroke_is_the_inked_fraction() -> None:
    x = torch.zeros(3, 3, 32, 32, requires_grad=True)
    with torch.no_grad():
        x[1, :, :8] = 1
        x[2] = 1
    value = DigitStroke()(x, [""] * 3).value
    assert value.tolist() == [0, 0.25, 1]
    assert torch.autograd.grad(value.sum(), x)[0].unique().tolist() == pytest.approx([1 / (3 * 32 * 32)])


def test_digit_class_is_the_log_probability_of_the_digit_asked_for() -> None:
    """Real digits under their own prompt score near 0, under another's far below log 1/10; twice the size, alike."""
    pixels, labels = load_digits("test")
    right = DigitClass()(pixels, [prompt_for(int(label)) for label in labels]).value
    wrong = DigitClass()(pixels, [prompt_for((int(label) + 1) % 10) for label in labels]).value
    large = torch.nn.functional.interpolate(pixels[:50], scale_factor=2, mode="bilinear")
    again = DigitClass()(large, [prompt_for(int(label)) for label in labels[:50]]).value
    print(f"own digit {right.mean():.3f}, another {wrong.mean():.3f}, enlarged {again.mean():.3f}")
    assert right.max() <= 0 and right.mean() > -0.1 and wrong.mean() < math.log(0.1) and again.mean() > -0.2
    rows = DigitClass()(pixels[:1].expand(10, -1, -1, -1), [prompt_for(i) for i in range(10)]).value
    assert float(rows.exp().sum()) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="no digit word"):
        DigitClass()(pixels[:1], ["a cat"])


def test_gradient_reaches_the_pixels_and_no_parameter() -> None:
    x = load_digits("test")[0][:2].clone().requires_grad_()
    DigitClass()(x, ["a two", "a three"]).value.sum().backward()
    assert x.grad is not None and (x.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in classifier(x.device).parameters())


def test_rewards_run_in_float32_under_autocast() -> None:
    x, prompts = load_digits("test")[0][:4], ["a one"] * 4
    with torch.autocast("cpu", torch.bfloat16):
        low = DigitClass()(x, prompts).value
    assert torch.equal(low, DigitClass()(x, prompts).value)


def test_noise_is_larger_than_a_flat_picture_as_a_jpeg() -> None:
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    x = torch.cat([torch.full((1, 3, 64, 64), 0.5), 0.5 + 0.1 * (noise - 0.5), noise]).requires_grad_()
    compress, grow = JpegSize()(x, [""] * 3).value, JpegSize(compress=False, quality=50)(x, [""] * 3).value
    print(f"-kB/500 at quality 95: {compress.tolist()}")
    assert (compress.diff() < 0).all() and (grow.diff() >= 0).all() and not compress.requires_grad
    assert -0.1 < compress[2] < compress[0] < 0


# --- what is not a score


def test_a_sample_without_a_score_gets_neither_value_nor_gradient() -> None:
    """Not a zero: its flag is down. The logarithm's infinite slope at the masked sample does not reach the input."""
    reward = FunctionReward(lambda x, _: x[:, 0].log(), input="points", differentiable=True)
    x = torch.tensor([[1.0], [0.0], [-1.0], [math.e]], requires_grad=True)
    score = reward(x, [""] * 4)
    assert score.valid.tolist() == [True, False, False, True] and score.value.tolist() == pytest.approx([0, 0, 0, 1])
    score.value.sum().backward()
    assert x.grad is not None and x.grad[:, 0].tolist() == pytest.approx([1, 0, 0, 1 / math.e])
    assert score.terms()["reward"] == pytest.approx(0.5) and score.terms()["reward_valid"] == 0.5


def test_a_reward_that_fails_on_all_samples_logs_no_nan() -> None:
    terms = column([math.nan] * 3)(torch.zeros(3, 1), [""] * 3).terms()
    assert terms == {"reward": 0.0, "reward_valid": 0.0}


def test_a_reward_must_give_one_number_a_sample() -> None:
    wrong = FunctionReward(lambda x, _: x, input="points", differentiable=True)
    with pytest.raises(ValueError, match=r"must give 3 numbers, one per sample, got \[3, 2\]"):
        wrong(torch.zeros(3, 2), [""] * 3)


def test_a_score_of_ones_own_keeps_its_flags_and_parts() -> None:
    def mine(x: Tensor, prompts: Sequence[str]) -> Score:
        return Score(x[:, 0], x[:, 0] > 0, {"half": x[:, 0] / 2})

    composite = Composite(parts=(FunctionReward(mine, input="points", differentiable=True),))
    score = composite({"points": torch.tensor([[1.0], [-1.0]])}, ["", ""])
    assert score.valid.tolist() == [True, False] and score.value.tolist() == [1, 0]
    assert set(score.parts) == {"mine", "mine_half"} and score.parts["mine_half"].tolist() == [0.5, -0.5]


# --- several as one


FIRST, SECOND, THIRD = [1.0, 2.0, 3.0, 4.0], [4.0, 0.0, 2.0, -1.0], [0.0, 1.0, 5.0, 4.0]


def test_aggregates_by_hand() -> None:
    """w_k r_k: their sum, their minimum, and their mean minus their standard deviation over the parts."""
    parts = (column(FIRST), column(SECOND, weight=2.0), column(THIRD, weight=-1.0))
    values = torch.tensor([FIRST, SECOND, THIRD]) * torch.tensor([[1.0], [2.0], [-1.0]])
    mean = values.mean(0)
    expected = {
        "sum": values.sum(0),
        "min": values.min(0).values,
        "mean_minus_std": mean - ((values - mean) ** 2).mean(0).sqrt(),
    }
    for name, value in expected.items():
        for order in itertools.permutations(parts):
            got = scored(Composite(parts=order, aggregate=name), 4)  # type: ignore[arg-type]
            assert torch.allclose(got.value, value, atol=1e-6), name
    raw = scored(Composite(parts=parts), 4).parts
    assert [raw[name].tolist() for name in raw] == [FIRST, SECOND, THIRD] and len(raw) == 3


@pytest.mark.parametrize("aggregate", ["min", "mean_minus_std"])
def test_identical_parts_collapse_and_a_common_shift_passes(aggregate: Any) -> None:
    """Also in the gradient: the root of a zero variance has none of its own."""
    x = torch.zeros(4, 2, requires_grad=True)
    same = Composite(parts=(column(FIRST),) * 3, aggregate=aggregate)
    value = same({"points": x}, [""] * 4, grad=True).value
    assert torch.allclose(value, torch.tensor(FIRST))
    assert torch.allclose(torch.autograd.grad(value.sum(), x)[0][:, 0], torch.ones(4))
    parts = [column(v) for v in (FIRST, SECOND, THIRD)]
    shifted = [column([v + 7 for v in values]) for values in (FIRST, SECOND, THIRD)]
    before, after = (scored(Composite(parts=tuple(p), aggregate=aggregate), 4).value for p in (parts, shifted))
    assert torch.allclose(after, before + 7, atol=1e-5)
    mean = torch.tensor([FIRST, SECOND, THIRD]).mean(0)
    assert (before <= mean).all() and (before < mean - 0.1).any()


def test_zscore_by_hand() -> None:
    parts = (column(FIRST, mean=2.0, std=0.5), column(SECOND, std=4.0, weight=3.0))
    expected = (torch.tensor(FIRST) - 2) / 0.5 + 3 * torch.tensor(SECOND) / 4
    assert torch.allclose(scored(Composite(parts=parts, calibration="zscore"), 4).value, expected)
    with pytest.raises(ValueError, match=r"zscore needs parts\.1\.std \(quadratic\)"):
        Composite(parts=(Linear((1.0,), std=1.0), Quadratic((0.0,), (1.0,))), calibration="zscore")


GROUPS = [3, 8, 3, 8, 3, 8]


def test_group_calibration_by_hand_and_under_affine_maps() -> None:
    values = torch.tensor([1.0, -5.0, 2.0, 0.0, 6.0, 2.0])
    got = scored(Composite(parts=(column(values.tolist()),), calibration="group"), 6, GROUPS).value
    for rows in ([0, 2, 4], [1, 3, 5]):
        own = values[rows]
        assert torch.allclose(got[rows], (own - own.mean()) / own.std(correction=0), atol=1e-6)
    for scale, shift in ((0.01, 100.0), (1e4, -3.0)):
        moved = column((values * scale + shift).tolist())
        again = scored(Composite(parts=(moved,), calibration="group"), 6, GROUPS).value
        print(f"r -> {scale} r + {shift}: {(again - got).abs().max():.1e}")
        assert torch.allclose(again, got, atol=2e-3)
    with pytest.raises(ValueError, match=r"needs Batch\.group"):
        scored(Composite(parts=(column(FIRST),), calibration="group"), 4)


def test_a_group_of_equal_scores_is_zero_and_not_a_nan() -> None:
    """Equal up to rounding, which division by their spread would make whole numbers; so is a group of one."""
    values = [0.1, 1.0, 0.1, 2.0, 0.1 + 1e-9, 5.0]
    composite = Composite(parts=(column(values),), calibration="group")
    x = torch.zeros(6, 2, requires_grad=True)
    score = composite({"points": x}, [""] * 6, torch.tensor(GROUPS), grad=True)
    assert score.valid.all() and score.value[::2].tolist() == [0, 0, 0] and score.value[1::2].abs().min() > 0.1
    (grad,) = torch.autograd.grad(score.value.sum(), x)
    spread = torch.tensor(values[1::2]).std(correction=0)
    assert (grad[::2] == 0).all() and torch.allclose(grad[1::2, 0], 1 / spread)  # the statistics carry none
    assert scored(composite, 6, range(6)).value.tolist() == [0] * 6


def test_an_invalid_sample_is_out_of_its_group_and_out_of_every_part() -> None:
    nan = math.nan
    parts = (column([1.0, 2.0, nan, 3.0, 5.0, 9.0]), column([0.0, 1.0, 2.0, nan, 4.0, 3.0]))
    score = scored(Composite(parts=parts, calibration="group"), 6, [0, 0, 0, 1, 1, 1])
    assert score.valid.tolist() == [True, True, False, False, True, True]
    assert score.value.tolist() == pytest.approx([-2, 2, 0, 0, 0, 0]) and score.value.isfinite().all()


def test_only_differentiable_parts_enter_with_gradient() -> None:
    composite = Composite(parts=(column(FIRST), column(SECOND, differentiable=False), column(THIRD)))
    x = torch.zeros(4, 2, requires_grad=True)
    inputs, prompts = {"points": x}, [""] * 4
    plain, live = composite(inputs, prompts), composite(inputs, prompts, grad=True)
    assert not plain.value.requires_grad and live.value.requires_grad
    assert plain.value.tolist() == torch.tensor([FIRST, SECOND, THIRD]).sum(0).tolist()
    assert live.value.tolist() == torch.tensor([FIRST, THIRD]).sum(0).tolist() and len(live.parts) == 2
    assert not any(part.requires_grad for part in live.parts.values())
    with pytest.raises(ValueError, match="differentiable"):
        Composite(parts=(JpegSize(),))(inputs, prompts, grad=True)


# --- on a student's samples


class Decoder:
    """Twice the latents, so that some pixels lie beyond [0, 1]; counts its calls."""

    calls = 0

    def __call__(self, latents: Tensor, clamp: bool = True) -> Tensor:
        self.calls += 1
        return (2 * latents).clamp(0, 1) if clamp else 2 * latents


def batch_of(prompts: Sequence[str], shape: tuple[int, ...]) -> Batch:
    ids, none = torch.arange(len(prompts)), Conditioning()
    return Batch(ids=ids, key=0, cond=none, uncond=none, latent_shape=shape, prompts=tuple(prompts), group=ids // 2)


def test_networks_decode_once_for_all_rewards_and_only_where_one_asks() -> None:
    decoder, batch = Decoder(), batch_of(["a one"] * 4, (3, 32, 32))
    norm = FunctionReward(lambda x, _: x.flatten(1).norm(dim=1), input="latents", differentiable=True)
    parts = (DigitStroke(), DigitClass(), JpegSize(), norm)
    networks = Networks({}, ONE_STEP, Scorer(Composite(parts=parts), decoder))
    score = networks.rewards(torch.rand(4, 3, 32, 32, requires_grad=True), batch)
    assert decoder.calls == 1 and not score.value.requires_grad
    assert list(score.parts) == ["digit_stroke", "digit_class", "jpeg_size", "<lambda>"]
    Networks({}, ONE_STEP, Scorer(Composite(parts=(norm,)), decoder)).rewards(torch.rand(4, 3, 32, 32), batch)
    assert decoder.calls == 1
    with pytest.raises(ValueError, match="no rewards"):
        Networks({}, ONE_STEP).rewards(torch.rand(4, 3, 32, 32), batch)


def test_rewards_see_clamped_pixels_and_the_gradient_passes_the_clamp() -> None:
    networks = Networks({}, ONE_STEP, Scorer(Composite(parts=(DigitStroke(),)), Decoder()))
    x0 = torch.full((2, 3, 4, 4), 0.9, requires_grad=True)  # 1.8 when decoded
    live = networks.rewards(x0, batch_of(["", ""], (3, 4, 4)), grad=True)
    plain = networks.rewards(x0, batch_of(["", ""], (3, 4, 4)))
    assert live.value.tolist() == plain.value.tolist() == [1.0, 1.0]
    (grad,) = torch.autograd.grad(live.value.sum(), x0)
    assert torch.allclose(grad, torch.full_like(grad, 2 / 48))
    with torch.no_grad():
        assert not networks.rewards(x0, batch_of(["", ""], (3, 4, 4)), grad=True).value.requires_grad


def test_points_are_not_clamped() -> None:
    networks = Networks({}, ONE_STEP, Scorer(Composite(parts=(Linear((1.0, -1.0)),)), lambda x, clamp=True: x))
    x0 = torch.tensor([[5.0, -3.0]], requires_grad=True)
    assert networks.rewards(x0, batch_of([""], (2,)), grad=True).value.tolist() == [8.0]


def test_rewards_through_the_decoder_of_the_digits() -> None:
    """The value is the same with and without gradient; the decoder keeps none."""
    backbone = SD3(SD3Config(path="assets/teachers/digits"), torch.device("cpu"), torch.float32)
    pixels, labels = load_digits("test")
    prompts = [prompt_for(int(label)) for label in labels[:4]]
    networks = Networks({}, ONE_STEP, Scorer(Composite(parts=(DigitStroke(), DigitClass())), backbone.decode))
    x0 = backbone.encode(pixels[:4]).requires_grad_()
    batch = batch_of(prompts, tuple(x0.shape[1:]))
    plain, live = networks.rewards(x0, batch), networks.rewards(x0, batch, grad=True)
    print(f"stroke and class {[p.tolist() for p in plain.parts.values()]}")
    assert torch.allclose(plain.value, live.value, atol=1e-5) and (plain.parts["digit_class"] > -1).all()
    live.value.sum().backward()
    assert x0.grad is not None and (x0.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(p.grad is None for p in backbone.vae.parameters())
    beyond = backbone.decode(3 * x0.detach(), clamp=False)
    assert torch.equal(beyond.clamp(0, 1), backbone.decode(3 * x0.detach())) and beyond.max() > 1


def test_move_is_the_step_of_the_average() -> None:
    """average <- 0.75 average + 0.25 module; buffers are copied."""
    a, b = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with torch.no_grad():
        b.weight += 4
        b.running_mean += 2
    move(a, b, 0.75)
    assert a.weight.tolist() == [2, 2, 2] and a.running_mean.tolist() == [2, 2, 2] and a.weight.requires_grad
    average = Ema(nn.Linear(2, 2), b_linear := nn.Linear(2, 2), 0.5)  # type: ignore[arg-type]
    assert torch.equal(average.module.weight, b_linear.weight)


# --- in a recipe


MODULE = """
import dataclasses
from typing import Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from fastgen.objectives import Loss, Objective, Turn
from fastgen.rewards import Reward
from fastgen.rollout import backward_simulation, draw_stops


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Bump(Reward):
    width: float = Field(gt=0)
    input = "points"
    differentiable = True

    def score(self, x, prompts):
        return torch.exp(-x.square().sum(1) / self.width)


def height(x, prompts):
    return x[:, 1]


number = 3


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Ascent(Objective):
    reward_use = "gradient"
    rewards_required = True
    trained_roles = ("student",)
    name: Literal["ascent"] = "ascent"
    group_size: int = Field(default=1, ge=1)

    def turns(self, step, state):
        return (Turn("student", ("student",)),)

    def loss(self, turn, networks, batch, state):
        stop = draw_stops(batch, networks.policy.num_steps, shared=False)
        x0 = backward_simulation(networks.student, networks.policy, batch, stop).x
        score = networks.rewards(x0, batch, grad=True)
        return Loss(-score.value.sum() / score.valid.sum(), score.terms())


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Scored(Ascent):
    reward_use = "score"
"""
ASCENT = ("objective={name: my_rewards:Ascent}", "optimizers={student: {lr: 1e-2}}")
LINEAR = "{name: linear, direction: [1.0, 0.0]}"


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    (tmp_path / "my_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)

    def refusal(*overrides: str, recipe: Path = MIXTURE) -> str:
        with pytest.raises(RecipeError) as caught:
            load_recipe(recipe, [*ASCENT, *overrides])
        print(caught.value)
        return str(caught.value)

    return refusal


def parts(*entries: str, **options: str) -> str:
    rest = "".join(f", {key}: {value}" for key, value in options.items())
    return f"rewards={{parts: [{', '.join(entries)}]{rest}}}"


def test_rewards_of_a_recipe_load_and_come_back_from_a_dump(tmp_path: Path, refused: Callable[..., str]) -> None:
    """Shipped ones, a class and a function of one's own; without the section nothing changes."""
    section = parts(
        LINEAR,
        "{name: quadratic, center: [0, 1], curvature: [1, 2], weight: -1e-1}",
        "{name: my_rewards:Bump, width: 2, mean: 1}",
        "{name: my_rewards:height, input: points, differentiable: true}",
        aggregate="mean_minus_std",
    )
    recipe = load_recipe(MIXTURE, [*ASCENT, section])
    assert isinstance(recipe.rewards, Composite)
    assert list(recipe.rewards.used(False)) == ["linear", "quadratic", "bump", "height"]
    score = scored(recipe.rewards, 3)
    assert [part.tolist()[0] for part in score.parts.values()] == pytest.approx([0, -1, 1, 0])
    text = dump_recipe(recipe)
    (tmp_path / "recipe.yaml").write_text(text)
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == recipe and dump_recipe(again) == text and changed_keys(recipe, again) == []
    assert "my_rewards:Bump" in text and "my_rewards:height" in text and "aggregate: mean_minus_std" in text
    other = load_recipe(MIXTURE, [*ASCENT, parts(LINEAR)])
    assert "rewards.parts" in changed_keys(recipe, other)
    assert load_recipe(MIXTURE).rewards is None


def test_what_is_wrong_with_a_reward_is_named_by_its_path(refused: Callable[..., str]) -> None:
    for section, words in (
        (parts("{name: linear, direction: [1, 0], weigth: 2}"), "unknown key rewards.parts.0.weigth; did you mean 'w"),
        (parts(LINEAR, agregate="sum"), "unknown key rewards.agregate; did you mean 'aggregate'"),
        (parts(LINEAR, "{name: digit_strok}"), "rewards.parts.1.name: unknown name 'digit_strok'; did you mean 'di"),
        (parts("{name: linear, direction: up}"), "rewards.parts.0.direction: Input should be a valid tuple, got 'up'"),
        (parts("{name: linear}"), "rewards.parts.0.direction: Field required"),
        (parts("{name: linear, direction: [1, 0], weight: true}"), "rewards.parts.0.weight: a number is needed"),
        (parts("{name: linear, direction: [1, 0], std: 0}"), "rewards.parts.0.std: Input should be greater than 0"),
        (parts("{name: my_rewards:Bump, width: -1}"), "rewards.parts.0.width: Input should be greater than 0"),
        (parts("{name: my_rewards:none, input: points}"), "rewards.parts.0.name: cannot import 'my_rewards:none'"),
        (parts("{name: my_rewards:Ascent}"), "must be a pydantic dataclass that derives from Reward"),
        (parts("{name: my_rewards:height}"), "rewards.parts.0.input: Field required"),
        (parts("{name: my_rewards:height, input: pictures, differentiable: true}"), "rewards.parts.0.input: Input"),
        (parts("{name: my_rewards:height, function: x}"), "rewards.parts.0.function: the name, my_rewards:height"),
        (parts("{name: my_rewards:number, input: points, differentiable: true}"), "my_rewards:number is not callable"),
        (parts("{name: function, function: 'no:f', input: points, differentiable: true}"), "cannot import 'no:f'"),
        (parts(LINEAR, aggregate="median"), "rewards.aggregate: Input should be 'sum', 'min' or 'mean_minus_std'"),
        (parts("linear"), "rewards.parts.0 must be a section with a name, one of linear, quadratic"),
        ("rewards={parts: []}", "rewards.parts must be a list of rewards, each with a name, one of linear"),
        ("rewards={aggregate: min}", "rewards.parts must be a list of rewards"),
        ("rewards=3", "rewards: "),
    ):
        assert words in refused(section), section


def test_rewards_that_do_not_fit_are_refused_before_weights_load(
    tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """By the program with exit code 2; nothing is written."""
    scored_only = "objective.name=my_rewards:Scored"
    twelve = ("objective.group_size=12", "train.batch_size=48")
    for recipe, overrides, words in (
        (MIXTURE, [], "missing key rewards: objective ascent needs a reward"),
        (MIXTURE, [parts("{name: digit_stroke}")], "rewards.parts.0: digit_stroke reads pixels, but backbone gau"),
        (MIXTURE, [parts("{name: linear, direction: [1]}")], "direction has 1 numbers, but the mixture's points"),
        (DIGITS, [parts(LINEAR)], "rewards.parts.0: linear reads points, but backbone sd3 gives pixels"),
        (DIGITS, [parts("{name: jpeg_size}")], "through rewards, and none of jpeg_size is differentiable"),
        (MIXTURE, [parts(LINEAR, calibration="zscore")], "rewards: calibration zscore needs parts.0.std (linear)"),
        (MIXTURE, [parts(LINEAR, calibration="group")], "rewards.calibration: group compares the samples of a prompt"),
        (MIXTURE, [parts(LINEAR), "objective.group_size=5"], "train.batch_size: 512 does not hold whole groups of"),
    ):
        assert main([str(recipe), f"output_dir={tmp_path / 'run'}", *ASCENT, *overrides]) == 2, words
        error = capsys.readouterr().err
        print(error)
        assert error.startswith("refused: ") and words in error and not (tmp_path / "run").exists()
    assert main([str(MIXTURE), f"output_dir={tmp_path / 'run'}", parts(LINEAR)]) == 2
    assert "rewards: objective dmd2 uses none; leave the section out" in capsys.readouterr().err
    load_recipe(DIGITS, [*ASCENT, scored_only, parts("{name: jpeg_size}")])
    load_recipe(DIGITS, [*ASCENT, parts("{name: jpeg_size}", "{name: digit_stroke}")])
    load_recipe(MIXTURE, [*ASCENT, parts(LINEAR, calibration="group"), *twelve])
    latents = "{name: function, function: 'my_rewards:height', input: latents, differentiable: true}"
    for recipe in (MIXTURE, DIGITS):
        load_recipe(recipe, [*ASCENT, parts(latents)])


def test_frames_are_not_pixels(refused: Callable[..., str]) -> None:
    """A reward on pictures is refused on a video model by the config alone."""
    with pytest.raises(ValueError, match="reads pixels, but backbone wan gives frames"):
        DigitStroke().check(WanConfig(path="org/name"))


def test_an_objective_ascends_its_reward(tmp_path: Path, refused: Callable[..., str]) -> None:
    """From the recipe through the loop: the student's points move along a, and the log names every part."""
    tiny = [
        "backbone.width=16",
        "backbone.fit_steps=20",
        "backbone.fit_batch_size=32",
        "train.batch_size=32",
        "train.steps=8",
        "train.log_every=2",
        "train.sample_every=0",
        "train.eval_every=0",
        "eval.num_samples=64",
        "train.checkpoint_every=0",
        "eval.quick_num_samples=64",
        "eval.teacher_steps=[]",
        "health.every=0",
    ]
    section = parts(LINEAR, "{name: my_rewards:height, input: points, differentiable: false}")
    folder = train(load_recipe(MIXTURE, [*ASCENT, *tiny, section, f"output_dir={tmp_path / 'run'}"]))
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    rewards = [row["student/reward"] for row in rows if "student/reward" in row]
    print(f"reward {rewards}")
    assert rewards[-1] > rewards[0] + 0.5 and {"student/reward_linear", "student/reward_valid"} <= rows[0].keys()
    assert "student/reward_height" not in rows[0]


def test_every_reward_is_registered_by_its_label() -> None:
    for cls in (Linear, Quadratic, DigitClass, DigitStroke, JpegSize, FunctionReward):
        assert registered_name(cls) in REWARDS
    assert [r.label for r in (DigitClass(), DigitStroke(), JpegSize())] == ["digit_class", "digit_stroke", "jpeg_size"]


@pytest.mark.parametrize("reward", [DigitStroke(), DigitClass(), JpegSize()])
def test_a_reward_is_a_metric(reward: Reward) -> None:
    pixels, labels = load_digits("test")
    prompts = [prompt_for(int(label)) for label in labels]
    metric = METRICS[reward.label](MetricContext(100, 0))
    for start in (0, 64):
        metric.update(pixels[start : min(start + 64, 100)], prompts[start : min(start + 64, 100)])
    values = reward(pixels[:100], prompts[:100]).value
    got = metric.compute()
    print(got)
    assert set(got) == set(metric.directions)
    assert list(got.values()) == pytest.approx([values.mean().item(), values.std(correction=0).item()], rel=1e-5)
    with pytest.raises(ValueError, match="at least one sample"):
        METRICS[reward.label](MetricContext(1, 0)).compute()
