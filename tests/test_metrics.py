"""Metrics against answers known in closed form."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_scorers import tiny_clip_score
from torch import Tensor, nn
from transformers import CLIPModel

from fastgen.backbones.gaussian_mixture import GaussianMixtureConfig, Mixture, build_mixture
from fastgen.data.digits import load_digits, prompt_for
from fastgen.metrics import DIRECTIONS, METRICS, Metric, MetricContext, Timing
from fastgen.metrics.energy_distance import mean_distance
from fastgen.metrics.features import FeatureNetwork
from fastgen.metrics.fid import Precomputed
from fastgen.metrics.mmd import discrepancy
from fastgen.metrics.mode_share import nearest_component
from fastgen.metrics.moments import exact_moments
from fastgen.metrics.reference import Reference, open_reference
from fastgen.recipe import EvalConfig
from fastgen.rewards.clip import load_clip
from fastgen.rewards.images import normalise
from fastgen.sampling.pictures import save_grid

torch.set_num_threads(1)


class ChannelMeans(FeatureNetwork):
    """Features that a test can choose: the first pixel of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    @property
    def network(self) -> nn.Module:
        self.calls += 1
        return FirstPixel()


class FirstPixel(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return pixels[:, :, 0, 0]


def images(points: Tensor) -> Tensor:
    """points [B, 3] as pixels [B, 3, 2, 2]."""
    return points.float()[:, :, None, None].expand(-1, -1, 2, 2).clone()


def reference(points: Tensor) -> Reference:
    pixels = images(points)
    return Reference("chosen", ("",) * len(points), lambda start, stop: pixels[start:stop])


def run(
    name: str, context: MetricContext, samples: Tensor, prompts: list[str], batch_size: int = 64
) -> dict[str, float]:
    metric: Metric = METRICS[name](context)
    for part, start in zip(samples.split(batch_size), range(0, len(samples), batch_size), strict=True):
        metric.update(part, prompts[start : start + batch_size])
    result = metric.compute()
    assert set(result) == set(metric.directions) and all(type(v) is float for v in result.values())
    return result


def ring() -> Mixture:
    angles = [2 * math.pi * k / 8 for k in range(8)]
    means = tuple((2 * math.cos(a), 2 * math.sin(a)) for a in angles)
    return build_mixture(GaussianMixtureConfig(means=means, stds=(0.15,) * 8, weights=tuple(range(1, 9))))


def two_classes() -> Mixture:
    return build_mixture(GaussianMixtureConfig(means=((-2.0,), (2.0,)), stds=(0.5, 0.5), classes=(0, 1)))


def exact(mixture: Mixture, count: int, key: int, label: int = 0) -> Tensor:
    return mixture.sample(torch.arange(count), torch.full((count,), label), key)


def test_names_and_directions_agree() -> None:
    assert all(metric.name == name for name, metric in METRICS.items())
    assert DIRECTIONS["fid"] == "lower" and DIRECTIONS["recall"] == "higher"


def test_fid_of_gaussians_is_the_closed_form() -> None:
    """Sets with exactly known moments: |m - m'|^2 + sum (s - s')^2 for diagonal covariances."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    z = torch.linalg.qr(z - z.mean(0))[0] * math.sqrt(399)  # mean 0, unbiased covariance 1
    z -= z.mean(0)
    std, std2 = torch.tensor([0.01, 0.02, 0.03]), torch.tensor([0.02, 0.02, 0.01])
    shift = torch.tensor([0.1, 0.0, -0.05])
    expected = float(shift.square().sum() + (std - std2).square().sum())
    context = MetricContext(400, 0, reference(0.5 + z * std), ChannelMeans())
    got = run("fid", context, images(0.5 + shift + z * std2), [""] * 400)
    print(f"fid {got['fid']:.8f}, closed form {expected:.8f}")
    assert got["fid"] == pytest.approx(expected, rel=1e-4) and got["fid_num_samples"] == 400


def test_fid_agrees_with_torchmetrics_on_raw_images() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    real = open_reference("digits")
    fake = real.read(0, 200).flip(3)
    context = MetricContext(200, 0, real, FeatureNetwork("digits"))
    ours = run("fid", context, fake, list(real.prompts[:200]))["fid"]
    network = FeatureNetwork("digits").network
    network.num_features = 48  # type: ignore[assignment]  # otherwise torchmetrics tries a 299 x 299 image
    theirs = FrechetInceptionDistance(feature=network, normalize=True)
    theirs.update(real.read(0, 200), real=True)
    theirs.update(fake, real=False)
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-5) and ours > 1


def test_fid_uses_equal_counts() -> None:
    points = torch.rand(50, 3)
    context = MetricContext(80, 0, reference(points), ChannelMeans())
    got = run("fid", context, images(torch.cat([points, torch.ones(30, 3)])), [""] * 80, batch_size=16)
    assert got["fid_num_samples"] == 50 and got["fid"] == pytest.approx(0, abs=1e-6)
    assert Precomputed(7).num_features == 7


def test_of_sorted_samples_those_of_all_classes_are_compared_with_a_smaller_reference() -> None:
    """The first 60 of 120 are one class of two; the choice has both, in any batches and after an interruption."""
    drawn = torch.rand(120, 3, generator=torch.Generator().manual_seed(0))
    points = torch.cat([drawn[:60], 5 + drawn[60:]])
    names, numbers = ("fid", "mmd", "precision_recall"), list[dict[str, float]]()
    for spread in (False, True):
        context = MetricContext(120, 0, reference(points[::2]), ChannelMeans(), spread=spread)
        chosen = context.compared
        assert len(chosen) == 60 and (max(chosen) > 100) is spread
        few = MetricContext(60, 0, context.reference, ChannelMeans())
        values = [run(name, context, images(points), ["a"] * 120, batch_size=7) for name in names]
        assert values == [run(name, few, images(points[chosen]), ["a"] * 60) for name in names]
        numbers.append({key: number for value in values for key, number in value.items()})
    first, all_classes = numbers
    assert first["fid"] > 10 > 1 > all_classes["fid"] and first["mmd"] > 1.5 * all_classes["mmd"]
    assert first["recall"] < 0.6 < all_classes["recall"]
    metric, later = (METRICS["fid"](context) for _ in range(2))
    metric.update(images(points[:50]), ["a"] * 50)
    later.restore(metric.state(), ["a"] * 50)
    later.update(images(points[50:]), ["a"] * 70)
    assert later.compute()["fid"] == pytest.approx(all_classes["fid"], rel=1e-9)


def test_precision_and_recall_of_identical_and_far_sets() -> None:
    points = torch.rand(40, 3)
    context = MetricContext(40, 0, reference(points), ChannelMeans())
    assert run("precision_recall", context, images(points), [""] * 40) == {"precision": 1.0, "recall": 1.0}
    assert run("precision_recall", context, images(points + 9), [""] * 40) == {"precision": 0.0, "recall": 0.0}


def test_recall_falls_when_a_mode_is_dropped_and_precision_does_not() -> None:
    points = torch.cat([torch.rand(30, 3), 5 + torch.rand(30, 3)])
    context = MetricContext(60, 0, reference(points), ChannelMeans())
    got = run("precision_recall", context, images(points[:30].repeat_interleave(2, dim=0) + 1e-3), [""] * 60)
    assert got["precision"] == 1.0 and got["recall"] <= 0.5


def test_diversity_of_known_points() -> None:
    points = torch.tensor([[0.0, 0, 0], [3, 4, 0], [1, 1, 1], [1, 1, 1], [7, 7, 7]])
    context = MetricContext(5, 0, features=ChannelMeans())
    got = run("diversity", context, images(points), ["a", "a", "b", "b", "c"], batch_size=2)
    assert got == {"diversity": pytest.approx((5 + 0) / 2)}
    with pytest.raises(ValueError, match="two samples"):
        run("diversity", context, images(points[:1]), ["a"])


def test_metrics_share_one_pass_of_the_feature_network() -> None:
    features = ChannelMeans()
    context = MetricContext(8, 0, reference(torch.rand(8, 3)), features)
    metrics = [METRICS[name](context) for name in ("fid", "diversity", "precision_recall")]
    before, batch = features.calls, images(torch.rand(8, 3))
    for metric in metrics:
        metric.update(batch, ["a"] * 8)
    assert features.calls == before + 1


def test_accuracy_of_the_shipped_classifier_on_held_out_digits() -> None:
    pixels, labels = load_digits("test")
    context = MetricContext(599, 0, features=FeatureNetwork("digits"))
    right = run("accuracy", context, pixels, [prompt_for(int(label), i % 4) for i, label in enumerate(labels)])
    wrong = run("accuracy", context, pixels, [prompt_for((int(label) + 1) % 10) for label in labels])
    print(f"accuracy on real digits {right['accuracy']:.4f}, with shifted prompts {wrong['accuracy']:.4f}")
    assert right["accuracy"] > 0.97 and wrong["accuracy"] < 0.02
    with pytest.raises(ValueError, match="no digit word"):
        run("accuracy", context, pixels[:1], ["a cat"])


def test_throughput_leaves_out_the_first_batch() -> None:
    context = MetricContext(30, 0, timing=Timing(8, [(10, 5.0), (10, 1.0), (10, 1.0)]))
    assert METRICS["throughput"](context).compute() == {"images_per_second": 10.0, "network_evaluations": 8.0}


def test_energy_distance_of_two_gaussians_in_one_dimension() -> None:
    """N(0, 1) against N(m, 1): E|x - y| = 2 sqrt 2 phi(m / sqrt 2) + m erf(m / 2), and E|x - x'| = 2 / sqrt pi."""
    shift = 1.0
    phi = math.exp(-(shift**2) / 4) / math.sqrt(2 * math.pi)
    cross = 2 * math.sqrt(2) * phi + shift * math.erf(shift / 2)
    expected = 2 * cross - 4 / math.sqrt(math.pi)
    mixture = build_mixture(GaussianMixtureConfig(means=((0.0,),), stds=(1.0,)))
    got = run("energy_distance", MetricContext(3000, 0, law=mixture), exact(mixture, 3000, 99) + shift, [""] * 3000)
    print(f"energy distance {got['energy_distance']:.4f}, closed form {expected:.4f}")
    assert got["energy_distance"] == pytest.approx(expected, abs=0.03)


def test_energy_distance_floor_of_the_ring() -> None:
    mixture = ring()
    got = run("energy_distance", MetricContext(4000, 0, law=mixture), exact(mixture, 4000, 99), [""] * 4000)
    print(f"exact samples score {got['energy_distance']:.6f}, floor {got['energy_distance_floor']:.6f}")
    # The law of the estimator has a long tail: 95 of 100 pairs of exact sets score below 0.0012, 99 below 0.003.
    assert 0.0003 < got["energy_distance_floor"] < 0.0012 and abs(got["energy_distance"]) < 0.003


def test_energy_distance_is_unbiased() -> None:
    """Many small pairs of one law: the mean is 0 within its own error; the V-statistic's would be 2 E|x - x'| / n."""
    mixture, values = ring(), []
    for i in range(200):
        x, y = exact(mixture, 50, 2 * i), exact(mixture, 50, 2 * i + 1)
        values.append(2 * mean_distance(x, y) - mean_distance(x) - mean_distance(y))
    mean, error = torch.tensor(values).mean(), torch.tensor(values).std() / math.sqrt(200)
    print(f"mean {mean:.5f} +- {error:.5f}")
    assert abs(mean) < 3 * error and error < 0.02


def test_swapped_classes_are_seen() -> None:
    mixture = two_classes()
    labels = torch.arange(600) % 2
    prompts = [str(label) for label in labels.tolist()]
    context = MetricContext(600, 0, law=mixture)
    right = mixture.sample(torch.arange(600), labels, 1)
    swapped = mixture.sample(torch.arange(600), 1 - labels, 1)
    for name, far in (("energy_distance", 4.0), ("mean_error", 3.5), ("mode_share_error", 0.45)):
        assert abs(run(name, context, right, prompts)[name]) < 0.1 and run(name, context, swapped, prompts)[name] > far
    with pytest.raises(ValueError, match="class labels"):
        run("mean_error", context, right[:1], ["7"])


def test_moments_of_a_mixture() -> None:
    mixture = two_classes()
    mean, cov = exact_moments(mixture, 2)
    assert mean.item() == pytest.approx(0, abs=1e-12) and cov.item() == pytest.approx(4 + 0.25)
    sample = exact(ring(), 4000, 5)
    context = MetricContext(4000, 0, law=ring())
    assert run("mean_error", context, sample, [""] * 4000)["mean_error"] < 0.1
    assert run("cov_error", context, sample, [""] * 4000)["cov_error"] < 0.2
    mean, cov = exact_moments(ring(), 0)
    centred = (sample - sample.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(sample.T.cov())).T
    matched = mean + centred @ torch.linalg.cholesky(cov).T  # exactly the exact moments
    assert run("mean_error", context, matched, [""] * 4000)["mean_error"] < 1e-12
    assert run("cov_error", context, matched, [""] * 4000)["cov_error"] < 1e-10
    assert run("mean_error", context, matched + torch.tensor([3.0, 4.0]), [""] * 4000)["mean_error"] == pytest.approx(
        5
    )


def test_mode_shares() -> None:
    mixture = ring()
    counts = [10 * k for k in range(1, 9)]
    right = mixture.means.repeat_interleave(torch.tensor(counts), dim=0)
    context = MetricContext(360, 0, law=mixture)
    got = run("mode_share_error", context, right, [""] * 360)
    assert got == {"mode_share_error": pytest.approx(0, abs=1e-9), "mode_share_min_ratio": pytest.approx(1)}
    dropped = torch.where(nearest_component(mixture, right)[:, None] == 7, mixture.means[0], right)
    got = run("mode_share_error", context, dropped, [""] * 360)
    assert got == {"mode_share_error": pytest.approx(8 / 36), "mode_share_min_ratio": 0.0}


def test_what_is_missing_is_said() -> None:
    bare = MetricContext(10, 0)
    for name, words in (("fid", "eval.features"), ("energy_distance", "exact distr"), ("throughput", "sampler")):
        with pytest.raises(ValueError, match=words):
            METRICS[name](bare)
    with pytest.raises(ValueError, match=r"eval\.reference"):
        METRICS["precision_recall"](MetricContext(10, 0, features=FeatureNetwork("digits")))
    with pytest.raises(ValueError, match="inception_weights"):
        FeatureNetwork("inception")
    with pytest.raises(ValueError, match="needs pictures of shape"):
        FeatureNetwork("digits")(torch.zeros(1, 3, 64, 64))


def test_mmd_is_its_formula() -> None:
    """With two points a side the sums are written out; equal sets give 0; and the scale of a feature is no matter."""
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    k = [math.exp(-d / 200) for d in (0.0, 2.0, 4.0)]  # of squared distances
    expected = 1000 * ((k[0] + k[1]) / 2 + (k[0] + k[2]) / 2 - 2 * (k[0] + k[2] + 2 * k[1]) / 4)
    assert discrepancy(x.double(), y.double()) == pytest.approx(expected, rel=1e-9)
    assert discrepancy(x.double(), x.double()) == 0


def test_features_of_a_clip(tmp_path: Path) -> None:
    """Those of the model's own image embedding; what is missing is said before weights load."""
    folder = tiny_clip_score(tmp_path / "clip")
    model = CLIPModel.from_pretrained(folder).eval()
    size = model.config.vision_config.image_size
    pixels = torch.rand(8, 3, size, size)
    features = FeatureNetwork("clip", str(folder))
    with torch.no_grad():
        own = model.visual_projection(model.vision_model(normalise(pixels)).pooler_output)
    assert torch.allclose(features(pixels), own, atol=1e-5)
    for i, image in enumerate(pixels):
        save_grid(image[None], tmp_path / "pictures" / f"{i}.png")
    real = open_reference(str(tmp_path / "pictures"))
    context = MetricContext(8, 0, real, FeatureNetwork("clip", str(folder)))
    again = torch.stack([real.read(i, i + 1)[0] for i in range(8)])
    assert run("mmd", context, again, [""] * 8, 3)["mmd"] == pytest.approx(0, abs=1e-6)
    assert run("mmd", context, 1 - again, [""] * 8)["mmd"] > 1e-3
    for keys, words in (({"features": "clip"}, "needs clip"), ({"clip": "a/b"}, "other features take none")):
        with pytest.raises(ValueError, match=words):
            EvalConfig(metrics=("mmd",), **keys)
    with pytest.raises(ValueError, match="clip: "):
        EvalConfig(metrics=("mmd",), features="clip", clip=str(tmp_path / "pictures")).check()
    with pytest.raises(ValueError, match="needs clip"):
        FeatureNetwork("clip")


def test_clip_retrieval_counts_the_pictures_whose_own_prompt_is_nearest(tmp_path: Path) -> None:
    """Every picture's prompt is the one nearest to it, until two of them exchange theirs."""
    folder = tiny_clip_score(tmp_path / "clip")
    clip = load_clip(str(folder), str(folder), torch.device("cpu"))
    words = [f"a picture of {word}" for word in ("one", "two", "three", "four", "five", "six")]
    torch.manual_seed(0)
    drawn = torch.rand(300, 3, clip.size, clip.size) * torch.rand(300, 3, 1, 1)
    with torch.no_grad():
        nearest = (clip.image(drawn) @ clip.text(words).T).argmax(1)
    known = nearest.unique().tolist()
    assert len(known) > 1
    own, pixels = [words[i] for i in known], torch.stack([drawn[nearest == i][0] for i in known])
    context = MetricContext(len(own), 0, features=FeatureNetwork("clip", str(folder)))
    assert run("clip_retrieval", context, pixels, own, 2) == {"clip_retrieval": 1.0, "clip_retrieval_5": 1.0}
    wrong = run("clip_retrieval", context, pixels, [own[1], own[0], *own[2:]])
    assert wrong["clip_retrieval"] == pytest.approx(1 - 2 / len(own)) and wrong["clip_retrieval_5"] == 1.0
    assert (
        run("clip_retrieval", context, pixels, [own[0]] * len(own))["clip_retrieval"] == 1.0
    )  # equal prompts are one
    both, capitals = torch.cat([pixels, pixels]), [text.upper() for text in own]  # which this CLIP reads alike
    context = MetricContext(len(both), 0, features=FeatureNetwork("clip", str(folder)))
    assert torch.equal(clip.text(own), clip.text(capitals))
    assert run("clip_retrieval", context, both, [*own, *capitals])["clip_retrieval"] == 1.0
    with pytest.raises(ValueError, match="needs a CLIP"):
        METRICS["clip_retrieval"](MetricContext(2, 0, features=FeatureNetwork("digits")))


def test_a_reference_takes_its_prompts_from_a_table(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_grid(torch.rand(1, 3, 8, 8), tmp_path / f"{name}.png")
    (tmp_path / "metadata.csv").write_text("file_name,caption\nb.png,second\na.png,first\n")
    assert open_reference(str(tmp_path)).prompts == ("first", "second")
    (tmp_path / "metadata.csv").write_text("file_name,caption\nb.png,second\n")
    with pytest.raises(ValueError, match="does not list 1 image"):
        open_reference(str(tmp_path))


class Attack:
    """What a pickle can do when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.slow
def test_inception_from_a_file_in_the_published_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real network at random weights: features are its own, of 8-bit pictures of any size. A file that holds more
    than tensors is refused before torch-fidelity unpickles it."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchmetrics.image.fid import NoTrainInceptionV3

    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], "none")
    weights = tmp_path / "weights.pth"
    torch.save(network.state_dict(), weights)
    features = FeatureNetwork("inception", str(weights))
    pixels = torch.rand(6, 3, 40, 24)
    own = network((pixels * 255).round().to(torch.uint8))
    got = features(pixels)
    assert got.shape == (6, 2048) and got.std() > 0 and (got - own).abs().max() < 1e-6
    torch.save({"fc.weight": Attack(tmp_path / "attacked")}, weights)
    with pytest.raises(ValueError, match="not a file of tensors only"):
        FeatureNetwork("inception", str(weights))(pixels)
    assert not (tmp_path / "attacked").exists()
