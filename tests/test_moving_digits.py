"""Moving digits: the videos and prompts, their data source, and the three metrics on exact synthetic videos."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_wan import tiny_wan
from torch import Tensor

from fastgen import noise
from fastgen.backbones.gaussian_mixture import GaussianMixtureConfig
from fastgen.backbones.wan import WanConfig
from fastgen.config import load_recipe
from fastgen.data import MovingDigitsData, make_batch
from fastgen.data.digits import DIGIT_WORDS, load_digits
from fastgen.data.moving_digits import DIRECTIONS, SPEEDS, Scenes, draw_scenes, places, prompt_for, render, told
from fastgen.metrics import METRICS, Metric, MetricContext

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]


def scenes(count: int = 64, split: str = "test") -> tuple[Scenes, list[str]]:
    drawn = draw_scenes(torch.arange(count), 3, split)
    return drawn, drawn.prompts(torch.ones(count, 3, dtype=torch.bool))


def run(name: str, videos: Tensor, prompts: list[str], size: int = 16) -> dict[str, float]:
    """The metric's numbers; it is stopped and restored on the way."""
    metric: Metric = METRICS[name](MetricContext(len(videos), 0))
    for start in range(0, len(videos), size):
        metric.update(videos[start : start + size], prompts[start : start + size])
        again = METRICS[name](MetricContext(len(videos), 0))
        again.restore(metric.state(), prompts[: start + size])
        metric = again
    result = metric.compute()
    assert set(result) == set(metric.directions) and all(type(value) is float for value in result.values())
    return result


# --- videos and prompts


def test_prompts_say_what_happens_and_unstated_parts_are_left_out():
    assert prompt_for("seven", "right", "fast") == "a seven moving right, fast"
    assert prompt_for("seven", None, "slowly") == "a seven moving, slowly"
    assert prompt_for(None, "up", None) == "a digit moving up"
    assert told("A Seven moving RIGHT, fast") == (7, (0, 1), 1.0)
    assert told("a digit moving") == (None, None, None) == told("")
    drawn, prompts = scenes(200)
    for i, said in enumerate(map(told, prompts)):
        assert said.digit == drawn.labels[i]
        assert torch.equal(torch.tensor(said.direction) * said.speed, drawn.velocity[i])
    assert {said.direction for said in map(told, prompts)} == set(DIRECTIONS.values())
    assert {said.speed for said in map(told, prompts)} == set(SPEEDS.values())


def test_a_video_depends_on_its_id_alone_and_a_longer_one_begins_with_it():
    whole = render(draw_scenes(torch.arange(8), 5), 25)
    alone = render(draw_scenes(torch.tensor([6]), 5), 9)
    assert whole.shape == (8, 25, 3, 32, 32) and whole.min() >= 0 and whole.max() <= 1
    assert torch.equal(whole[6:7, :9], alone)
    assert not torch.equal(whole, render(draw_scenes(torch.arange(8), 6), 25))


def test_digits_move_at_the_told_velocity_and_turn_round_at_the_borders():
    drawn, _ = scenes(200)
    corner = places(drawn, 60)
    assert corner.min() >= 0 and corner.max() <= 16 and torch.equal(drawn.start % 2, torch.zeros(200, 2))
    assert torch.equal(corner[:, 5], drawn.start + 5 * drawn.velocity)  # no bounce before that
    steps = corner.diff(dim=1).abs().sum(2)
    assert torch.equal(steps, drawn.velocity.abs().sum(1, keepdim=True).expand_as(steps))
    assert all((corner[:, :, axis] == edge).any() for axis in (0, 1) for edge in (0, 16))


def test_pictures_hold_the_digit_where_it_should_be():
    drawn, _ = scenes(8)
    video, corner = render(drawn, 25), places(drawn, 25)
    for i, k in ((0, 0), (3, 4), (7, 24)):
        row, column = corner[i, k].tolist()
        if row % 1 == column % 1 == 0:
            cut = video[i, k, 0, int(row) : int(row) + 16, int(column) : int(column) + 16]
            torch.testing.assert_close(cut, drawn.digits[i])
    torch.testing.assert_close(video.sum((2, 3, 4)), 3 * drawn.digits.sum((1, 2))[:, None].expand(8, 25))


def test_training_videos_never_show_held_out_digits():
    held_out = load_digits("test", 16)[0][:, 0].flatten(1)
    assert torch.cdist(draw_scenes(torch.arange(2000), 0).digits.flatten(1), held_out).min() > 0.05


# --- metrics


def test_data_are_perfect_in_every_metric():
    drawn, prompts = scenes()
    video = render(drawn, 25)
    accuracy = run("video_accuracy", video, prompts)
    assert accuracy["video_accuracy"] > 0.99 and accuracy["video_accuracy_lowest"] > 0.98
    motion = run("motion_error", video, prompts)
    assert motion["direction_accuracy"] == 1
    assert motion["speed_error"] < 0.03 and motion["wander"] < 0.02
    drift = run("drift", video, prompts)
    assert drift["drift"] < 0.01 and drift["freeze_share"] == 0 and drift["flicker"] < 0.05


def test_long_videos_are_perfect_too():
    drawn, prompts = scenes(16)
    video = render(drawn, 109)
    assert run("video_accuracy", video, prompts)["video_accuracy_last"] > 0.98
    assert run("motion_error", video, prompts)["speed_error"] < 0.03
    assert run("drift", video, prompts)["drift"] < 0.01


def test_another_digit_is_wrong_in_every_picture():
    drawn, prompts = scenes()
    labels = [told(prompt).digit for prompt in prompts]
    other = [
        prompt.replace(DIGIT_WORDS[label], DIGIT_WORDS[(label + 1) % 10])
        for prompt, label in zip(prompts, labels, strict=True)
    ]
    assert run("video_accuracy", render(drawn, 25), other)["video_accuracy"] < 0.01


def test_accuracy_by_latent_frame_finds_where_the_digit_is_lost():
    drawn, prompts = scenes()
    video = render(drawn, 25).clone()
    video[:, 21:] = 0  # the pictures of the last latent frame
    got = run("video_accuracy", video, prompts)
    assert got["video_accuracy_first"] > 0.98 and got["video_accuracy_last"] == got["video_accuracy_lowest"] == 0
    assert got["video_accuracy"] == pytest.approx(21 / 25, abs=0.01)
    metric = METRICS["video_accuracy"](MetricContext(64, 0))
    metric.update(video, prompts)
    assert (metric.by_latent_frame() > 0.5).tolist() == [True] * 6 + [False]


def test_the_wrong_direction_is_never_right_and_still_videos_have_none():
    drawn, prompts = scenes()
    video = render(drawn, 25)
    turned = [
        prompt_for(DIGIT_WORDS[said.digit], opposite(said.direction), "fast" if said.speed == 1 else "slowly")
        for said in map(told, prompts)
    ]
    assert run("motion_error", video, turned)["direction_accuracy"] == 0
    sideways = [
        prompt_for(None, "up" if said.direction[0] == 0 else "right", "fast" if said.speed == 1 else "slowly")
        for said in map(told, prompts)
    ]
    got = run("motion_error", video, sideways)
    assert got["direction_accuracy"] == 0 and got["wander"] > 1
    still = run("motion_error", video[:, :1].expand(-1, 25, -1, -1, -1), prompts)
    told_speed = drawn.velocity.abs().sum(1).mean().item()
    assert still["direction_accuracy"] == 0 and still["speed_error"] == pytest.approx(told_speed, abs=1e-6)


def opposite(direction: tuple[int, int]) -> str:
    return next(word for word, other in DIRECTIONS.items() if other == (-direction[0], -direction[1]))


def test_the_other_speed_is_off_by_their_difference():
    drawn, prompts = scenes()
    swapped = [p.replace("fast", "x").replace("slowly", "fast").replace("x", "slowly") for p in prompts]
    assert run("motion_error", render(drawn, 25), swapped)["speed_error"] == pytest.approx(0.5, abs=0.03)


def test_frozen_videos_have_freeze_share_one():
    drawn, prompts = scenes()
    video = render(drawn, 25)
    still = video[:, :1].expand(-1, 25, -1, -1, -1)
    got = run("drift", still, prompts)
    assert got == {"drift": 0.0, "mass_ratio": 1.0, "freeze_share": 1.0, "flicker": 0.0}
    assert run("drift", torch.cat([video[:16], still[16:64]]), prompts)["freeze_share"] == 0.75
    assert run("drift", torch.zeros(16, 25, 3, 32, 32), prompts[:16])["freeze_share"] == 1


def test_fading_and_flicker_are_measured():
    blocks = torch.zeros(4, 29, 3, 32, 32)
    blocks[..., 8:16, 8:16] = 0.6  # 0.5 above the background
    of = (torch.arange(29) + 3) // 4
    faded = torch.where(
        of[:, None, None, None] >= 6, blocks * 0.35 / 0.6, blocks
    )  # the last two of eight latent frames
    got = run("drift", faded, [""] * 4)
    assert got["mass_ratio"] == pytest.approx(0.5) and got["drift"] == pytest.approx(0.5)
    assert got["flicker"] == pytest.approx(0.5 / 28)
    blinking = blocks.clone()
    blinking[:, 1::2] = 0.35 * (blocks[:, 1::2] > 0)  # half as bright in every other picture
    assert run("drift", blinking, [""] * 4)["flicker"] == pytest.approx((14 * 0.5 + 14 * 1.0) / 28)


def test_metrics_refuse_what_they_cannot_measure():
    video = torch.zeros(1, 25, 3, 32, 32)
    for name, prompt, missing in (
        ("video_accuracy", "a digit moving up, fast", "digit"),
        ("motion_error", "a two moving, fast", "direction"),
        ("motion_error", "a two moving up", "speed"),
    ):
        with pytest.raises(ValueError, match=f"states no {missing}"):
            METRICS[name](MetricContext(1, 0)).update(video, [prompt])
    for name in ("video_accuracy", "drift"):
        with pytest.raises(ValueError, match="4 k \\+ 1 frames"):
            METRICS[name](MetricContext(1, 0)).update(video[:, :24], ["a two moving up, fast"])
    with pytest.raises(ValueError, match="at least 5 frames"):
        METRICS["motion_error"](MetricContext(1, 0)).update(video[:, :4], ["a two moving up, fast"])
    metric = METRICS["video_accuracy"](MetricContext(2, 0))
    metric.update(video, ["a two"])
    with pytest.raises(ValueError, match="25 and 29"):
        metric.update(torch.zeros(1, 29, 3, 32, 32), ["a two"])
    for name in ("video_accuracy", "motion_error", "drift"):
        with pytest.raises(ValueError, match="at least one sample"):
            METRICS[name](MetricContext(1, 0)).compute()


# --- the data source


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> WanConfig:
    folder = tiny_wan(tmp_path_factory.mktemp("wan") / "tiny")
    return WanConfig(path=str(folder), height=32, width=32, num_frames=5, max_sequence_length=16)


def test_the_data_source_gives_prompts_pixels_and_latents(wan: WanConfig):
    source = MovingDigitsData(videos=6)
    source.check(wan)
    backbone = wan.build(torch.device("cpu"), torch.float32, 0)
    stream = source.open(backbone, 1)
    batch = make_batch(stream, backbone, torch.arange(6), 0, source.provides)
    assert batch.pixels is not None and batch.latents is not None
    assert batch.pixels.shape == (6, 5, 3, 32, 32) and batch.latents.shape == (6, 2, 4, 4, 4)
    torch.testing.assert_close(batch.latents[2:3], backbone.encode(batch.pixels[2:3]))
    run("motion_error", batch.pixels, list(batch.prompts))
    assert len(set(batch.prompts)) > 1  # an epoch is every video once
    key = noise.make_key(0, "moving_digits")
    drawn = draw_scenes(torch.arange(6), key)
    assert sorted(batch.prompts) == sorted(drawn.prompts(torch.ones(6, 3, dtype=torch.bool)))
    order = [int((render(drawn, 5) == video).flatten(1).all(1).nonzero()) for video in batch.pixels]
    assert sorted(order) == list(range(6))


def test_the_data_source_leaves_parts_of_prompts_out(wan: WanConfig):
    backbone = wan.build(torch.device("cpu"), torch.float32, 0)
    samples = MovingDigitsData(videos=3000, unstated=0.1).samples(backbone)
    said = [told(prompt) for prompt in samples.prompts]
    for part in ("digit", "direction", "speed"):
        assert sum(getattr(one, part) is None for one in said) / 3000 == pytest.approx(0.1, abs=0.02)
    assert all(None not in told(p) for p in MovingDigitsData(videos=300).samples(backbone).prompts)


def test_recipes_with_another_output_or_size_are_refused(wan: WanConfig):
    with pytest.raises(ValueError, match="32 x 32 pixels, those of the backbone 32 x 64"):
        MovingDigitsData().check(dataclasses.replace(wan, width=64))
    with pytest.raises(ValueError, match="are videos, but backbone gaussian_mixture gives points"):
        MovingDigitsData().check(GaussianMixtureConfig(means=((0.0, 0.0),), stds=((1.0, 1.0),)))
    recipe = ROOT / "recipes/digits_dmd2_4step.yaml"
    with pytest.raises(ValueError, match="are videos, but backbone sd3 gives pixels"):
        load_recipe(recipe, ["data={name: moving_digits}"])
    for name in ("video_accuracy", "motion_error", "drift"):
        with pytest.raises(ValueError, match=f"{name} measures frames, and backbone sd3 gives pixels"):
            load_recipe(recipe, [f"eval.metrics=[{name}]"])
