"""The metrics of AR(1) videos on videos whose errors are known, and their refusals."""

import dataclasses
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from fastgen.backbones.ar1_law import AR1Law, to_complex, to_latents
from fastgen.backbones.ar1_video import AR1VideoConfig
from fastgen.backbones.gaussian_mixture import GaussianMixtureConfig, build_mixture
from fastgen.config import build_recipe
from fastgen.metrics import METRICS, MetricContext
from fastgen.metrics.frames import FrameMetric
from fastgen.registry import RecipeError

CONFIG = AR1VideoConfig(damping=0.9, angles=(0.5, -0.3), means=(1.0, (-0.5, 2.0)), num_frames=7, copies=4)
LAW: AR1Law = CONFIG.law
COUNT = 3000
PROMPTS = [("0", "1", "")[i % 3] for i in range(COUNT)]


def videos(num_frames: int = 7) -> Tensor:
    return LAW.sample(torch.arange(COUNT), LAW.labels_of(PROMPTS), 99, num_frames)


def measured(name: str, latents: Tensor, prompts: list[str] = PROMPTS, seed: int = 0) -> FrameMetric:
    metric = METRICS[name](MetricContext(len(prompts), seed, law=LAW))
    for rows in range(0, len(prompts), 1000):
        metric.update(latents[rows : rows + 1000].flatten(1).float(), prompts[rows : rows + 1000])
    assert isinstance(metric, FrameMetric)
    return metric


def changed(latents: Tensor, change: Any) -> Tensor:
    """The latents after a change of the centred frames, [B, F, copies] complex."""
    means = torch.tensor([LAW.second_order(k, 1)[0] for k in range(3)])[LAW.labels_of(PROMPTS)][:, None, None]
    return to_latents(change(to_complex(latents) - means) + means, latents)


@pytest.mark.parametrize("name", ["variance_error", "lag_error"])
@pytest.mark.parametrize("num_frames", [7, 30])
def test_exact_videos_score_like_the_floor(name: str, num_frames: int) -> None:
    """Of the length of the backbone and of a longer one, for both labels and the empty prompt together."""
    got = measured(name, videos(num_frames)).compute()
    print(got)
    assert got[name] < 1.6 * got[f"{name}_floor"] < 0.2 and got[f"{name}_last"] <= got[name]
    assert got == measured(name, videos(num_frames)).compute()
    other = measured(name, videos(num_frames), seed=1).compute()
    assert other[name] == got[name] and other[f"{name}_floor"] != got[f"{name}_floor"]


def test_a_fading_video_has_the_right_motion() -> None:
    """Frame k times 0.95^k: the variance errs by 1 - 0.95^{2k}, most at the end; the lag is 0.95 of what it was."""
    fade = 0.95 ** torch.arange(7, dtype=torch.float64)
    faded = changed(videos(), lambda u: u * fade[:, None])
    by_frame = measured("variance_error", faded).by_frame()
    # the empty prompt, a third of the samples, has a larger variance: 1 + |m_0 - m_1|^2 / 8
    share = torch.tensor([LAW.second_order(k, 1)[1][0, 0].real for k in range(3)]).mean()
    assert (by_frame - share * (1 - fade**2)).abs().max() < 0.06
    assert measured("variance_error", faded).compute()["variance_error_last"] == pytest.approx(by_frame[-1].item())
    lags = measured("lag_error", changed(videos(), lambda u: u * 0.5)).compute()
    assert lags["lag_error"] == pytest.approx(measured("lag_error", videos()).compute()["lag_error"], abs=1e-5)


def test_wrong_motion_keeps_the_variance() -> None:
    """Frame k turned by 0.2 k: every lag is off by |rho| |e^{0.2 i} - 1|, and no variance is."""
    turned = changed(videos(), lambda u: u * torch.polar(torch.ones(7), 0.2 * torch.arange(7))[:, None].to(u))
    expected = abs(complex(torch.polar(torch.ones(()), torch.tensor(0.2))) - 1)
    lags = [abs(c[1, 0] / c[0, 0]) * expected for c in (LAW.second_order(k, 2)[1] for k in range(3))]
    got = measured("lag_error", turned).by_frame()
    print(got.tolist(), float(sum(lags) / 3))
    assert (got - sum(lags) / 3).abs().max() < 0.02
    before = measured("variance_error", videos()).by_frame()
    assert (measured("variance_error", turned).by_frame() - before).abs().max() < 1e-5


def test_one_bad_frame_and_a_drifting_mean_are_seen() -> None:
    bad = changed(videos(), lambda u: torch.where(torch.arange(7)[:, None] == 3, 1.5 * u, u))
    by_frame = measured("variance_error", bad).by_frame()
    assert by_frame.argmax() == 3 and measured("variance_error", bad).compute()["variance_error"] > 1
    drifted = changed(videos(), lambda u: u + 0.2 * torch.arange(7)[:, None])
    assert measured("variance_error", drifted).by_frame()[-1] == pytest.approx(1.2**2 / 2, abs=0.06)


def test_swapped_labels_are_seen() -> None:
    swapped = [{"0": "1", "1": "0", "": ""}[p] for p in PROMPTS]
    assert measured("variance_error", videos(), swapped).compute()["variance_error"] > 1
    assert measured("lag_error", videos(), swapped).compute()["lag_error"] > 0.2


def test_a_metric_can_stop_and_continue() -> None:
    whole, first = measured("lag_error", videos()), measured("lag_error", videos()[:1000], PROMPTS[:1000])
    again = METRICS["lag_error"](first.context)
    again.restore(first.state(), PROMPTS[:1000])
    again.update(videos()[1000:].flatten(1).float(), PROMPTS[1000:])
    assert again.compute() == whole.compute()


def test_the_energy_distance_takes_videos_too() -> None:
    context = MetricContext(600, 0, law=LAW)
    for factor in (1.0, 0.7):
        metric = METRICS["energy_distance"](context)
        metric.update(changed(videos(), lambda u, a=factor: a * u)[:600].flatten(1), PROMPTS[:600])
        got = metric.compute()
        print(got)
        assert (got["energy_distance"] < 5 * got["energy_distance_floor"]) == (factor == 1)


def test_what_does_not_fit_is_said() -> None:
    mixture = build_mixture(GaussianMixtureConfig(means=((0.0,),), stds=(1.0,)))
    with pytest.raises(ValueError, match=r"variance_error compares with an exact distribution.*ar1_video"):
        METRICS["variance_error"](MetricContext(10, 0, law=mixture))
    with pytest.raises(ValueError, match=r"mean_error compares with an exact distribution.*gaussian_mixture"):
        METRICS["mean_error"](MetricContext(10, 0, law=LAW))
    still = dataclasses.replace(CONFIG, num_frames=1).law
    metric = METRICS["lag_error"](MetricContext(9, 0, law=still))
    metric.update(still.sample(torch.arange(9), torch.zeros(9, dtype=torch.int64), 0).flatten(1), ["0"] * 9)
    with pytest.raises(ValueError, match="num_frames to at least 2"):
        metric.compute()
    one = measured("lag_error", videos()[:1], ["0"])
    with pytest.raises(ValueError, match="at least 2 samples of every label"):
        one.compute()


def test_metrics_of_another_law_are_refused_before_training(raw_recipe: dict[str, Any]) -> None:
    raw_recipe["eval"]["metrics"] = ["energy_distance", "lag_error"]
    with pytest.raises(RecipeError, match=r"eval\.metrics: lag_error measures the law of ar1_video.*mean_error"):
        build_recipe(raw_recipe)
    raw_recipe["backbone"] = yaml.safe_load("{name: ar1_video, damping: 0.9, angles: [0.5], means: [0]}")
    raw_recipe["data"], raw_recipe["eval"]["metrics"] = {"name": "ar1_video"}, ["mean_error"]
    with pytest.raises(RecipeError, match=r"mean_error measures the law of gaussian_mixture.*lag_error"):
        build_recipe(raw_recipe)
    raw_recipe["data"] = {"name": "mixture"}
    with pytest.raises(RecipeError, match="mixture data needs the gaussian_mixture backbone, not ar1_video"):
        build_recipe(raw_recipe)
