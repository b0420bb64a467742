"""The watch against reward hacking: its numbers in closed form; quiet where the anchor holds, loud where not."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgen import signals
from fastgen.backbones.gaussian_mixture import GaussianMixture, GaussianMixtureConfig
from fastgen.config import load_recipe
from fastgen.data import MixtureData, make_batch
from fastgen.recipe import HealthConfig
from fastgen.registry import RecipeError
from fastgen.rewards import Composite, Score, Scorer
from fastgen.rewards.digit_class import DigitClass
from fastgen.rewards.digit_stroke import DigitStroke
from fastgen.rewards.linear import Linear
from fastgen.run import checkpoint, hacking
from fastgen.run.build import TrainingError
from fastgen.run.health import Watch
from fastgen.train import train

torch.set_num_threads(1)

TILT = Path(__file__).parents[1] / "recipes/gaussian_rtdmd_tilt.yaml"
SHORT = [
    "train.sample_every=0",
    "train.eval_every=0",
    "eval.num_samples=64",
    "eval.quick_num_samples=64",
    "train.steps=40",
    "train.checkpoint_every=20",
    "train.batch_size=64",
    "health.every=10",
    "health.num_samples=64",
    "init_from=null",
    "rewards.held_out=[{name: quadratic, center: [0.7], curvature: [1.0]}]",
    "health.grace=1000",
]
pytestmark = pytest.mark.usefixtures("fit_once")


def test_the_distance_to_the_anchor_is_the_energy_distance() -> None:
    """Of unit Gaussians in many dimensions, d apart in each: 2 (sqrt(1 + d^2 / 2) - 1) of the spread; 0 of one."""
    x, y = torch.randn(2, 200, 400, generator=torch.Generator().manual_seed(0))
    for d in (0.0, 0.5, 1.0):
        found = hacking.anchor_distance(x + d, y)
        print(f"shift {d}: {found:.4f}")
        assert found == pytest.approx(2 * ((1 + d**2 / 2) ** 0.5 - 1), abs=0.01)


def history(*rows: tuple[float, float]) -> list[dict[str, float]]:
    return [{"step": 10.0 * i, "digit_stroke": s, "held_out_digit_class": c} for i, (s, c) in enumerate(rows)]


def test_a_held_out_reward_that_falls_while_the_others_rise_is_said() -> None:
    """Against its best look, not its first; not while nothing is gained; not within the threshold."""
    rewards = Composite((DigitStroke(),), held_out=(DigitClass(),))
    spread = {"digit_stroke": 0.1, "held_out_digit_class": 2.0}

    def said(*rows: tuple[float, float]) -> list[str]:
        return hacking.gamed(history(*rows), spread, rewards, HealthConfig())

    assert said((0.3, -1.0)) == [] and said((0.3, -1.0), (0.5, -1.5)) == []
    assert said((0.3, -1.0), (0.2, -4.0)) == []
    warnings = said((0.3, -3.0), (0.35, 0.0), (0.6, -3.0))
    assert len(warnings) == 1 and "since step 10 held_out_digit_class" in warnings[0]
    assert "fallen by 1.5" in warnings[0] and "digit_stroke by +2.5" in warnings[0]
    less = Composite((DigitStroke(weight=-1.0),), held_out=(DigitClass(),))
    assert hacking.gamed(history((0.3, 0.0), (0.6, -3.0)), spread, less, HealthConfig()) == []


def test_a_held_out_reward_of_which_less_is_better_is_watched_the_other_way_round() -> None:
    rewards, spread = Composite((DigitStroke(),), held_out=(DigitClass(weight=-1.0),)), {"digit_stroke": 0.1}
    spread |= {"held_out_digit_class": 2.0}
    better, worse = history((0.3, 0.0), (0.6, -9.0)), history((0.3, 0.0), (0.2, -1.0), (0.6, 3.0))
    assert hacking.gamed(better, spread, rewards, HealthConfig()) == []
    (said,) = hacking.gamed(worse, spread, rewards, HealthConfig())
    assert "since step 10 held_out_digit_class" in said and "has risen by 2.0 standard deviations" in said


def test_a_reward_that_no_sample_has_is_left_out() -> None:
    """Its mean is not 0, which may be better than every score."""
    none, some = Score(torch.zeros(2), torch.zeros(2).bool()), Score(torch.ones(2), torch.ones(2).bool())
    for measured in (hacking.means, hacking.spreads):
        assert measured({"none": none, "some": some}).keys() == {"some"}
    rewards, spread = Composite((DigitStroke(),), held_out=(DigitClass(),)), {"held_out_digit_class": 1.0}
    unknown = {"step": 5.0, "digit_stroke": 0.1}
    whole = [*history((0.3, -3.0), (0.6, -3.1)), unknown]
    for rows in ([unknown, *history((0.3, -3.0), (0.6, -3.1))], whole):
        assert hacking.gamed(rows, spread | {"digit_stroke": 0.1}, rewards, HealthConfig()) == []
    falling = [unknown, *history((0.3, -3.0), (0.6, -5.0))]
    assert len(hacking.gamed(falling, spread | {"digit_stroke": 0.1}, rewards, HealthConfig())) == 1
    assert hacking.gamed(falling, {"digit_stroke": 0.1}, rewards, HealthConfig()) == []
    assert hacking.gamed(falling, spread, rewards, HealthConfig()) == []


def test_distance_idle_groups_and_clipping_are_said() -> None:
    config = HealthConfig()
    assert hacking.left_the_anchor(0.29, 0.0, config) == [] == hacking.left_the_anchor(0.9, 1.0, config)
    assert "has left the teacher" in hacking.left_the_anchor(0.4, 0.0, config)[0]
    assert hacking.idle_groups({"student/zero_groups": 0.5, "student/clipped": 0.2}, config) == []
    both = hacking.idle_groups({"student/zero_groups": 0.6, "student/clipped": 0.3}, config)
    assert "in 60% of the prompt groups" in both[0] and "30% of the advantages" in both[1]


def test_terms_of_groups_by_hand() -> None:
    """Three groups: one equal in both rewards, one in which a reward differs, one with a single valid sample."""
    group, valid = torch.tensor([4, 4, 7, 7, 9, 9]), torch.tensor([True] * 5 + [False])
    parts = {"a": torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0, 8.0]), "b": torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 5.0])}
    terms = signals.group_terms(parts, group, valid, torch.tensor([0.0, 0, 5, -5, 1, 5]), clip=5.0)
    assert float(terms["zero_groups"]) == pytest.approx(2 / 3) and float(terms["clipped"]) == pytest.approx(2 / 5)


def test_means_and_spreads_leave_out_what_has_no_score() -> None:
    score = Score(torch.tensor([1.0, 3.0, 0.0]), torch.tensor([True, True, False]))
    assert hacking.means({"a": score}) == {"a": 2.0} and hacking.spreads({"a": score}) == {"a": 1.0}


def test_groups_are_whole_in_every_process_and_micro_batch() -> None:
    """However 64 samples in groups of 8 are divided; a batch that would divide a group is refused."""
    config = GaussianMixtureConfig(means=((0.0,),), stds=(1.0,))
    backbone = GaussianMixture(config, torch.device("cpu"), torch.float32, 0)
    stream = MixtureData().open(backbone, 0)
    for processes in (1, 2, 4):
        size = 16
        for first in range(0, 64, processes * size):
            for process in range(processes):
                start = first + process * size
                batch = make_batch(stream, backbone, torch.arange(start, start + size), 0, frozenset(), 8)
                assert batch.group is not None
                counts = batch.group.unique(return_counts=True)[1]
                prompts = [set(batch.prompts[i : i + 8]) for i in range(0, size, 8)]
                assert counts.tolist() == [8, 8] and all(len(p) == 1 for p in prompts)
    with pytest.raises(ValueError, match="split a prompt group of 8"):
        make_batch(stream, backbone, torch.arange(4, 20), 0, frozenset(), 8)


def test_the_decoders_activations_are_computed_again() -> None:
    """With gradient the decoder runs once forward and once in the backward pass; the gradient is the same."""
    calls: list[bool] = []

    def decode(x: Tensor, clamp: bool) -> Tensor:
        calls.append(clamp)
        return (3 * x).tanh()

    scorer = Scorer(Composite((Linear((1.0, 2.0)),)), decode)
    x = torch.randn(4, 2, requires_grad=True)
    value = scorer(x, [""] * 4, None, grad=True).value
    assert calls == [False]
    value.sum().backward()
    assert calls == [False, False] and x.grad is not None
    expected = torch.tensor([1.0, 2.0]) * 3 * (1 - (3 * x.detach()).tanh() ** 2)
    assert torch.allclose(x.grad, expected, atol=1e-5)
    scorer(x, [""] * 4, None, grad=False)
    assert calls == [False, False, True]


def test_recipes_with_held_out_rewards(project: Path) -> None:
    recipe = project / "recipes/digits_rtdmd_stroke.yaml"
    plain = ["init_from=null", "objective.stage=2"]
    loaded = load_recipe(recipe, [*plain, "rewards.held_out=[{name: digit_class}]"])
    assert loaded.rewards is not None and list(loaded.rewards.watched) == ["held_out_digit_class"]
    for override, words in (
        (
            "rewards.held_out=[{name: digit_stroke, weight: 2}]",
            "digit_stroke is among the parts",
        ),
        ("rewards.held_out=[{name: digit_clas}]", r"rewards\.held_out\.0\.name.*digit_class"),
        ("rewards.held_out=[{name: linear, direction: [1]}]", r"rewards\.held_out\.0: linear reads points"),
        ("rewards.held_out=[{name: clip_score, path: nowhere}]", r"rewards\.held_out\.0: path: 'nowhere' is neither"),
    ):
        with pytest.raises(RecipeError, match=words):
            load_recipe(recipe, [*plain, override])
    with pytest.raises(RecipeError, match="only the watch uses it"):
        load_recipe(recipe, [*plain, "rewards.held_out=[{name: digit_class}]", "health.every=0"])


def looks(folder: Path) -> list[dict[str, float]]:
    rows = map(json.loads, (folder / "log.jsonl").open())
    return [row for row in rows if "health/anchor_distance" in row]


@pytest.mark.slow
def test_the_watch_is_quiet_with_the_anchor_and_stops_without(tmp_path: Path) -> None:
    """RTDMD's second stage on a Gaussian, from the teacher's own weights. What the watch remembers is in the
    checkpoint, so that a run that is continued goes on with it."""
    healthy = train(load_recipe(TILT, [*SHORT, f"output_dir={tmp_path / 'on'}", "train.steps=20"]))
    remembered = checkpoint.counters_of(healthy / "checkpoints/step_00000020")["watch"]["rewards"]
    assert [row["step"] for row in remembered] == [0, 10, 20]
    train(load_recipe(TILT, [*SHORT, f"output_dir={tmp_path / 'on'}"]))
    seen = looks(healthy)
    print(seen)
    assert [row["step"] for row in seen] == [10, 20, 30, 40] and not (healthy / "warnings.log").exists()
    assert {"health/linear", "health/held_out_quadratic"} <= set(seen[0])
    off = [
        "objective.dm_weight=1e-6",
        "objective.reward_weight=3",
        "objective.policy_weight=3",
        "optimizers.student.lr=3e-3",
        "health.stop=true",
        "health.anchor_distance=1e9",
        "health.mean_shift=100",
        "health.std_ratio=[0.01, 100]",
        "health.saturation=10",
        "health.lead=1e9",
        "health.fake_lag=1e9",
    ]
    with pytest.raises(TrainingError, match=r"health\.stop: the student games its rewards"):
        train(load_recipe(TILT, [*SHORT, f"output_dir={tmp_path / 'off'}", *off]))
    said = (tmp_path / "off" / "warnings.log").read_text()
    print(said)
    assert "held_out_quadratic, which is held out, has fallen" in said and len(looks(tmp_path / "off")) < 4


def test_looking_at_rewards_measures_the_anchor_too() -> None:
    watch = Watch(HealthConfig())
    watch.anchor = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    rewards, scores = Composite((DigitStroke(),)), {"digit_stroke": Score(torch.ones(64), torch.ones(64).bool())}
    assert watch.look_at_rewards(0, watch.anchor, scores, rewards)[1] == [] and not watch.alarmed
    row, warnings = watch.look_at_rewards(10, watch.anchor + 1, scores, rewards)
    assert row["digit_stroke"] == 1 and "has left the teacher" in warnings[0] and watch.alarmed
    assert [r["step"] for r in watch.memory.rewards] == [0, 10]
