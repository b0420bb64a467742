"""Evaluations: repeatable, independent of the batch size, and written as JSON and one self-contained page."""

import dataclasses
import hashlib
import json
import platform
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor
from torchvision.utils import save_image

from fastgen.backbones.gaussian_mixture import GaussianMixture, GaussianMixtureConfig
from fastgen.backbones.sd3 import SD3Config
from fastgen.backbones.unet2d import UNet2DConfig
from fastgen.config import load_recipe
from fastgen.config.stored import dump_recipe
from fastgen.data.digits import label_of, load_digits, prompt_for
from fastgen.evaluation import evaluate as evaluation
from fastgen.evaluation import folders, results
from fastgen.evaluation.machine import machine, processor
from fastgen.evaluation.report import differences, pictures_in
from fastgen.metrics import Metric, MetricContext
from fastgen.metrics.reference import read_images
from fastgen.recipe import EvalConfig
from fastgen.rollout import RolloutPolicy
from fastgen.run.export import export
from fastgen.sampling.pictures import grid, plot_points, save_grid
from fastgen.sampling.sampler import Sampler, teacher_sampler

torch.set_num_threads(1)

PIXEL_METRICS = ("fid", "accuracy", "diversity", "precision_recall", "throughput")
POINT_METRICS = ("energy_distance", "mean_error", "cov_error", "mode_share_error")


class PixelBackbone:
    output, takes_given = "pixels", False
    device, dtype, law = torch.device("cpu"), torch.float32, None
    config = SD3Config(path="assets/teachers/digits")

    def encode_both(self, prompts: Sequence[str]) -> None:
        """Nothing: its samplers read prompts as they are."""


class CopyingSampler:
    """Answers a prompt with a training digit of its class, chosen by the seed."""

    backbone = PixelBackbone()
    policy = RolloutPolicy(timesteps=(1.0, 0.5))
    guidance_scale, network_evaluations, part = 1.0, 2, None

    def sample(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        pixels, labels = load_digits("train")
        rows = [(labels == label_of(prompt)).nonzero().squeeze(1) for prompt in prompts]
        return torch.stack([pixels[row[seed % len(row)]] for row, seed in zip(rows, seeds, strict=True)])

    def facts(self) -> dict[str, object]:
        return {}

    def weight_hashes(self) -> dict[str, str]:
        return {"transformer/<script>.safetensors": "0" * 64}


def mixture_teacher(steps: int = 20, classes: tuple[int, ...] | None = None) -> Sampler:
    config = GaussianMixtureConfig(
        means=((-1.5, 0.0), (1.5, 0.5)), stds=(0.3, 0.4), weights=(1.0, 3.0), classes=classes
    )
    return teacher_sampler(GaussianMixture(config, torch.device("cpu"), torch.float32, 0), steps, 1.0)


def pixel_config(**changes: object) -> EvalConfig:
    values: dict[str, object] = {"metrics": PIXEL_METRICS, "num_samples": 100, "reference": "digits"}
    return EvalConfig(**(values | changes))  # type: ignore[arg-type]


def assert_self_contained(page: str) -> None:
    assert not re.search(r"https?://|<script|<link|url\(", page)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', page))


def test_config_refuses_what_cannot_be() -> None:
    for values, words in (
        ({"metrics": ("fidd",)}, "did you mean 'fid'"),
        ({"metrics": ()}, "at least 1"),
        ({"metrics": ("fid", "fid")}, "each metric once"),
        ({"metrics": ("fid",), "num_sample": 3}, "num_sample"),
        ({"metrics": ("fid",), "features": "inception"}, "inception_weights"),
    ):
        with pytest.raises(ValidationError, match=words):
            EvalConfig(**values)  # type: ignore[arg-type]
    config = EvalConfig(metrics=("fid",), quick_num_samples=7)
    assert config.quick().num_samples == 7 and config.num_samples == 599


def test_results_repeat_and_do_not_depend_on_the_batch_size() -> None:
    sampler = CopyingSampler()
    first = evaluation.evaluate(sampler, pixel_config(), progress=False)  # type: ignore[arg-type]
    again = evaluation.evaluate(sampler, pixel_config(), progress=False)  # type: ignore[arg-type]
    other = evaluation.evaluate(sampler, pixel_config(batch_size=7), progress=False)  # type: ignore[arg-type]
    for result in (first, again, other):
        result["metrics"].pop("images_per_second")
    assert first["metrics"] == again["metrics"]
    assert first["metrics"] == pytest.approx(other["metrics"], rel=1e-4)
    print(first["metrics"])
    assert first["metrics"]["accuracy"] > 0.95 and first["metrics"]["network_evaluations"] == 2
    _, labels = load_digits("test")
    prompts = "\n".join(prompt_for(int(label)) for label in labels[pixel_config().rows(599)])
    assert first["prompts_sha256"] == hashlib.sha256(prompts.encode()).hexdigest()
    json.dumps(first, allow_nan=False)


def test_prompts_and_seeds_of_the_samples(tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []

    class Recording(CopyingSampler):
        def sample(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            seen.extend(zip(prompts, seeds, strict=True))
            return super().sample(prompts, seeds)

    (tmp_path / "prompts.txt").write_text("a two\n\na seven\n")
    config = pixel_config(prompts=str(tmp_path / "prompts.txt"), num_samples=5, seed=10, batch_size=2)
    evaluation.evaluate(Recording(), config, progress=False)  # type: ignore[arg-type]
    assert seen == [("a two", 10), ("a seven", 11), ("a two", 12), ("a seven", 13), ("a two", 14)]


def test_of_a_longer_list_prompts_are_spread_over_it_and_stay_paired(tmp_path: Path) -> None:
    """A file that is sorted by class has all classes among few samples; pictures and given captions go together."""
    seen = list[tuple[str, int]]()

    class Recording(CopyingSampler):
        def sample(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            seen.extend(zip(prompts, seeds, strict=True))
            return super().sample(prompts, seeds)

    lines = sorted(prompt_for(label) for label in range(10) for _ in range(60))
    (tmp_path / "prompts.txt").write_text("".join(f"{line}\n" for line in lines))
    options = {"prompts": str(tmp_path / "prompts.txt"), "num_samples": 100, "metrics": ("accuracy",)}
    config = pixel_config(**options)
    evaluation.evaluate(Recording(), config, progress=False)  # type: ignore[arg-type]
    prompts = [prompt for prompt, _ in seen]
    assert len(set(prompts)) == 10 and max(map(prompts.count, set(prompts))) < 20
    assert [seed for _, seed in seen] == list(range(100)) and prompts == [lines[i] for i in config.rows(600)]
    assert len(set(config.rows(600))) == 100 and config.rows(600) == pixel_config(**options).rows(600)
    assert pixel_config(**options, seed=1).rows(600) != config.rows(600)
    assert pixel_config(**options, choice="first").rows(600) == config.rows(100) == list(range(100))
    assert config.rows(60) == [*range(60), *range(40)]

    reference = evaluation.find_reference("pixels", pixel_config(num_samples=7))
    pixels, labels = load_digits("test")
    rows = pixel_config(num_samples=7).rows(599)
    assert reference is not None and reference.prompts == tuple(prompt_for(int(label)) for label in labels[rows])
    assert torch.equal(reference.read(2, 7), pixels[rows[2:7]])
    assert evaluation.find_prompts(Recording(), pixel_config(num_samples=7), reference) == list(reference.prompts)  # type: ignore[arg-type]


def test_facts_name_the_pictures_and_captions_of_the_reference(tmp_path: Path) -> None:
    """Those of its folder, so that stored numbers are not taken for those of other pictures; or the teacher that made
    them."""
    pixels, labels = load_digits("test")
    for i in range(4):
        save_image(pixels[i], tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(prompt_for(int(labels[i])))
    config, sampler = pixel_config(reference=str(tmp_path), num_samples=2), CopyingSampler()

    def facts() -> dict[str, object]:
        reference = evaluation.find_reference("pixels", config)
        return evaluation.facts_of(sampler, config, reference)  # type: ignore[arg-type]

    first = facts()
    assert facts() == first and len(str(first["reference_sha256"])) == 64
    save_image(1 - pixels[3], tmp_path / "3.png")
    turned = facts()
    (tmp_path / "3.txt").write_text("a handwritten three, turned white")
    assert len({str(f["reference_sha256"]) for f in (first, turned, facts())}) == 3
    teacher = evaluation.teacher_reference(sampler, pixel_config(prompts=("a two",)))  # type: ignore[arg-type]
    assert teacher.facts()["reference_teacher"] == {"weights": sampler.weight_hashes()}
    assert teacher.selected([0]).facts() == teacher.facts()


def test_a_reference_without_captions_gives_no_prompts(tmp_path: Path) -> None:
    """Samples of the empty prompt would be measured as if they were asked for. A UNet without prompts has no other."""

    class Unconditional(PixelBackbone):
        config = UNet2DConfig(path="google/ddpm-cifar10-32")  # type: ignore[assignment]

    for i in range(4):
        save_image(load_digits("test")[0][i], tmp_path / f"{i}.png")
    config, sampler = pixel_config(metrics=("fid",), num_samples=4, reference=str(tmp_path)), CopyingSampler()
    reference = evaluation.find_reference("pixels", config)
    with pytest.raises(ValueError, match="have no texts next to them; add them, or give"):
        evaluation.evaluate(sampler, config, progress=False)  # type: ignore[arg-type]
    own = dataclasses.replace(config, prompts=("a two",))
    assert evaluation.find_prompts(sampler, own, reference) == ["a two"] * 4  # type: ignore[arg-type]
    sampler.backbone = Unconditional()
    assert evaluation.find_prompts(sampler, config, reference) == [""] * 4  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="accuracy reads prompts, but the samples have the empty prompt alone"):
        reading = dataclasses.replace(config, metrics=("diversity", "accuracy"))
        evaluation.evaluate(sampler, reading, progress=False)  # type: ignore[arg-type]


def test_a_plain_pipeline_is_measured_on_the_prompts_that_it_knows(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not on digits, unless these are its prompts; one that knows none is refused before its weights load."""
    config, root = EvalConfig(metrics=("throughput",)), project / "assets"
    assert folders.with_own_prompts(root / "teachers/digits", config).reference == "digits"
    emoji = folders.with_own_prompts(root / "emoji/teacher", config)
    assert emoji.reference is None and emoji.prompts == str(root / "emoji/prompts.txt")
    assert "the prompts are those of" in capsys.readouterr().out
    given = dataclasses.replace(config, prompts=("a cat",))
    assert folders.with_own_prompts(root / "emoji/teacher", given) is given
    copy = tmp_path / "pipelines/unknown"
    shutil.copytree(root / "emoji/teacher", copy, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ValueError, match=r"has no prompts\.txt, in it or beside it; give --prompts"):
        folders.evaluate_path(copy, metrics="throughput")


def test_pictures_are_compared_with_digits_only_in_the_features_of_digits(tmp_path: Path) -> None:
    save_image(torch.rand(3, 4, 4), tmp_path / "0.png")
    for features, reference in ((None, "digits"), ("clip", None)):
        given = {"metrics": "fid"} | ({} if features is None else {"features": features, "clip": "a/b"})
        assert folders.path_config(tmp_path, given)[0].reference == reference


def test_prompts_of_ones_own_are_spread_where_the_reference_is_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if there are as many as samples; the reference's own prompts and `choice: first` keep their order."""
    spread = list[bool]()

    def seen(config: EvalConfig, context: MetricContext, output: str) -> list[Metric]:
        spread.append(context.spread)
        return make_metrics(config, context, output)  # type: ignore[arg-type]

    make_metrics = evaluation.make_metrics
    monkeypatch.setattr(evaluation, "make_metrics", seen)
    own = tuple(prompt_for(label) for label in range(10) for _ in range(2))
    for changes in ({"prompts": own}, {"prompts": own, "choice": "first"}, {}):
        config = pixel_config(metrics=("accuracy",), num_samples=20, **changes)
        evaluation.evaluate(CopyingSampler(), config, progress=False)  # type: ignore[arg-type]
    assert spread == [True, False, False]


def test_mixture_teacher_reaches_the_floor() -> None:
    config = EvalConfig(metrics=POINT_METRICS, num_samples=1500, batch_size=500)
    result, kept = evaluation.evaluate_with_samples(mixture_teacher(60), config, progress=False)
    values = result["metrics"]
    print(values)
    assert kept.shape == (1500, 2) and result["features"] is None and result["policy"]["transition"] == "ode"
    assert values["energy_distance"] < values["energy_distance_floor"] + 0.01 and values["mode_share_error"] < 0.05
    few = evaluation.evaluate(mixture_teacher(2), config, progress=False)["metrics"]
    assert few["energy_distance"] > 10 * values["energy_distance_floor"]


def test_mixture_labels_are_drawn_by_weight() -> None:
    sampler = mixture_teacher(2, classes=(0, 1))
    config = EvalConfig(metrics=("mean_error",), num_samples=2000)
    prompts = evaluation.find_prompts(sampler, config, None)
    assert prompts == evaluation.find_prompts(sampler, config, None) and set(prompts) == {"0", "1"}
    assert prompts.count("1") / 2000 == pytest.approx(0.75, abs=0.03)


def test_metrics_must_fit_and_samples_be_finite() -> None:
    with pytest.raises(ValueError, match="measures pixels, but the samples here are points"):
        evaluation.evaluate(mixture_teacher(), EvalConfig(metrics=("fid",)), progress=False)
    with pytest.raises(ValueError, match="leave it out"):
        evaluation.evaluate(mixture_teacher(), EvalConfig(metrics=("mean_error",), reference="digits"), progress=False)
    with pytest.raises(ValueError, match=r"eval\.prompts"):
        evaluation.evaluate(CopyingSampler(), pixel_config(reference=None), progress=False)  # type: ignore[arg-type]

    class Diverged(CopyingSampler):
        def sample(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            return torch.full((len(prompts), 3, 32, 32), torch.nan)

    with pytest.raises(ValueError, match="not all finite"):
        evaluation.evaluate(Diverged(), pixel_config(), progress=False)  # type: ignore[arg-type]


def test_folder_of_images(tmp_path: Path) -> None:
    """The held-out digits themselves: fid 0 (up to 8-bit rounding), accuracy of the classifier."""
    pixels, labels = load_digits("test")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(60):
        save_image(pixels[i], folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(prompt_for(int(labels[i])) + "\n")
    save_grid(pixels[:60], folder / "grid.png")  # as `fastgen sample` does; no sample
    output = tmp_path / "out" / "results.json"
    metrics = ("fid", "accuracy", "precision_recall")
    result = folders.evaluate_path(folder, metrics=",".join(metrics), choice="first", output=output, progress=False)
    print(result["metrics"])
    assert result["num_samples"] == 60 and result["metrics"]["fid"] < 0.01 and result["metrics"]["accuracy"] > 0.9
    assert json.loads(output.read_text()) == result and sorted(f.name for f in output.parent.iterdir()) == [
        "results.html",
        "results.json",
    ]
    assert_self_contained(output.with_suffix(".html").read_text())
    few = folders.evaluate_path(folder, metrics="accuracy", num_samples=30, progress=False)
    rows = torch.tensor(EvalConfig(metrics=("accuracy",), num_samples=30).rows(60))
    own = "\n".join(prompt_for(int(label)) for label in labels[:60][rows])
    assert few["prompts_sha256"] == hashlib.sha256(own.encode()).hexdigest() and rows.max() > 30
    with pytest.raises(ValueError, match="fewer than num_samples"):
        folders.evaluate_path(folder, metrics=metrics, num_samples=61, progress=False)
    (folder / "007.txt").unlink()
    with pytest.raises(ValueError, match="have no caption"):
        folders.evaluate_path(folder, metrics=metrics, progress=False)
    with pytest.raises(ValueError, match="--metrics"):
        folders.evaluate_path(folder, progress=False)
    with pytest.raises(ValueError, match="there is no folder"):
        folders.evaluate_path(tmp_path / "nowhere", progress=False)


@pytest.mark.slow
def test_samples_are_compared_with_the_teachers_own(project: Path) -> None:
    """In the latents of the pipeline's own VAE, without a download: more steps are nearer to the teacher at 6."""
    options = {
        "metrics": "fid",
        "features": "latents",
        "reference": "teacher",
        "teacher_steps": (6,),
        "prompts": ("a handwritten three", "a handwritten seven"),
        "num_samples": 32,
        "progress": False,
    }
    teacher = project / "assets/teachers/digits"
    found = [folders.evaluate_path(teacher, num_steps=steps, **options) for steps in (1, 6)]
    assert found[0]["metrics"]["fid"] > 1.5 * found[1]["metrics"]["fid"] > 0
    assert found[0]["reference_sampler"].startswith("6 steps, guidance scale 7")
    assert found[0]["reference"] == "teacher" and found[0]["features"] == "latents"
    assert found[0]["reference_teacher"] == {"weights": found[0]["weights"]} and found[0]["weights"]
    with pytest.raises(ValueError, match="has none of its own"):
        folders.evaluate_path(teacher, **{**options, "prompts": None})
    one = options | {"prompts": ("a handwritten three",), "num_samples": 1}
    with pytest.raises(ValueError, match="for runs, exports and pipelines"):
        folders.evaluate_path(project / "assets/first_frames", **one)
    with pytest.raises(ValueError, match="here is no pipeline"):
        folders.evaluate_path(project / "assets/first_frames", **one | {"reference": "digits"})


def test_run_folder_brings_its_own_evaluation(tmp_path: Path) -> None:
    ring = Path(__file__).parent.parent / "recipes" / "mixture_dmd2_4step.yaml"
    recipe = load_recipe(ring, ["backbone.fit_steps=5", "eval.num_samples=300", "eval.metrics=[energy_distance]"])
    backbone = recipe.backbone.build(torch.device("cpu"), torch.float32, 0)
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    export(backbone.load("student"), backbone, recipe, run / "export", 0)
    result = folders.evaluate_path(run, output=tmp_path / "results.json", device="cpu", progress=False)
    assert set(result["metrics"]) == {"energy_distance", "energy_distance_floor"} and result["num_samples"] == 300
    assert result["policy"]["timesteps"] == list(recipe.rollout.timesteps) and len(result["weights"]) == 1
    assert_self_contained((tmp_path / "results.html").read_text())
    other = folders.evaluate_path(run, num_samples=100, metrics="mean_error", seed=3, device="cpu", progress=False)
    assert other["num_samples"] == 100 and other["seed"] == 3 and set(other["metrics"]) == {"mean_error"}


@pytest.mark.slow
def test_page_with_points_is_self_contained_and_repeatable(tmp_path: Path) -> None:
    sampler = mixture_teacher(4)
    config = EvalConfig(metrics=POINT_METRICS, num_samples=300)
    rows, samples = [], {}
    for name in ("teacher, 4 steps", "same <b>again</b> & $x^2$"):
        result, samples[name] = evaluation.evaluate_with_samples(sampler, config, progress=False)
        rows.append({"name": name, **result, "seconds": 1.0})
    assert isinstance(sampler.backbone, GaussianMixture)
    samples["exact"] = folders.exact_points(sampler.backbone, config, sampler)
    results.write_results(tmp_path / "a.json", rows, samples)
    results.write_results(tmp_path / "b.json", rows, samples)
    page = (tmp_path / "a.html").read_text()
    assert page == (tmp_path / "b.html").read_text()
    assert_self_contained(page)
    assert "&lt;b&gt;again&lt;/b&gt; &amp; $x^2$" in page and "<b>" not in page and rows[0]["prompts_sha256"] in page
    assert json.loads((tmp_path / "a.json").read_text())["rows"] == rows


def test_compare_warns_of_unequal_measurements(tmp_path: Path) -> None:
    sampler = CopyingSampler()
    for name, count in (("a", 50), ("b", 40)):
        result = evaluation.evaluate(sampler, pixel_config(num_samples=count), progress=False)  # type: ignore[arg-type]
        folders.write_json(tmp_path / f"{name}.json", {"name": "student", **result})
    results.compare([tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "differ in num_samples, prompts_sha256" in page and "a.json)" in page and "b.json)" in page
    assert "transformer/&lt;script&gt;.safetensors" in page
    assert_self_contained(page)
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(ValueError, match="no metrics"):
        results.compare([tmp_path / "c.json"], tmp_path / "page.html")


def test_results_of_other_scorers_references_and_machines_differ() -> None:
    """By what their files hold, not where they lie; a scorer that only one result has is no difference."""
    scorer = {"path": "a", "weights": {"model.safetensors": "0"}, "files": ["1  config.json"], "version": "v2"}
    row = {"name": "a", "metrics": {}, "reference": "photos", "reference_sha256": "2", "scorers": {"hpsv2": scorer}}
    for change in ({"path": "b"}, {}):
        assert differences([row, row | {"scorers": {"hpsv2": scorer | change, "clip_score": {"files": []}}}]) == ""
    for change, words in (
        ({"scorers": {"hpsv2": scorer | {"weights": {"model.safetensors": "3"}}}}, "in scorers.hpsv2.weights:"),
        ({"scorers": {"hpsv2": scorer | {"version": "v1"}}}, "in scorers.hpsv2.version:"),
        ({"reference_sha256": "4"}, "in reference_sha256:"),
    ):
        assert words in differences([row, row | change])
    teachers = {"reference_sampler": "50 steps", "reference_teacher": {"weights": {}}, "machine": "a GPU"}
    changed = {"reference_sampler": "4 steps", "reference_teacher": {"weights": {"a": "0"}}, "machine": "another"}
    for key, value in changed.items():
        assert f"in {key}:" in differences([row | teachers, row | teachers | {key: value}])


@pytest.mark.slow
def test_a_comparison_shows_the_samples_of_every_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the pages beside the result files, and of no other result that such a page may show."""
    sampler, pages = CopyingSampler(), []
    for name in ("first", "<second>"):
        row, kept = evaluation.evaluate_with_samples(sampler, pixel_config(num_samples=20, seed=len(name)), False)  # type: ignore[arg-type]
        path = tmp_path / f"{len(name)}.json"
        folders.write_json(path, {"name": name, **row})
        results.write_page(path.with_suffix(".html"), [row | {"name": name}], {name: kept}, {name: ["a two"] * 20})
        pages += pictures_in(path.with_suffix(".html"), [name])
    assert len(pages) == 40 and pages[0].data != pages[20].data
    files = [tmp_path / "5.json", tmp_path / "8.json"]
    results.compare(files, tmp_path / "both.html")
    both = pictures_in(tmp_path / "both.html", ["first", "<second>"])  # those of one prompt side by side
    assert [p.result for p in both[:4]] == ["first", "<second>", "first", "<second>"]
    assert sorted(both, key=lambda p: (p.result != "first", p.index)) == pages
    assert_self_contained((tmp_path / "both.html").read_text())
    results.compare(files, tmp_path / "5.html")  # in place of the first one's own page
    results.compare(files[:1], tmp_path / "again.html")
    assert pictures_in(tmp_path / "again.html", ["first", "<second>"]) == pages[:20]
    (tmp_path / "8.html").unlink()
    capsys.readouterr()
    results.compare(files, tmp_path / "one.html")
    assert "8.html, which should show samples of" in capsys.readouterr().out


def test_a_comparison_of_points_shows_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        row, kept = evaluation.evaluate_with_samples(mixture_teacher(2), EvalConfig(("mean_error",), 50), False)
        folders.write_json(tmp_path / f"{name}.json", {"name": "run", **row})
        results.write_page(tmp_path / f"{name}.html", [row | {"name": "run"}], {"run": kept, "exact": kept}, {})
    results.compare([tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count('<img class="plot"') == 2  # the points of each


def test_results_table_shows_the_asked_columns() -> None:
    rows = [
        {"name": "[teacher]", "metrics": {"fid": 1.23456, "accuracy": 0.5}},
        {"name": "b", "metrics": {"fid": 1200.0}},
    ]
    console = Console(width=80, record=True, quiet=False)
    console.print(results.results_table(rows, ["fid", "accuracy"]))
    text = console.export_text()
    assert "[teacher]" in text and "1.235" in text and "1200" in text and "–" in text
    console.print(results.results_table(rows[:1]))
    assert "accuracy │       0.5" in console.export_text()


def test_a_single_picture_is_saved_as_it_is(tmp_path: Path) -> None:
    pixels = load_digits("test")[0][:1]
    save_grid(pixels, tmp_path / "one.png", columns=1)
    assert torch.equal(read_images([tmp_path / "one.png"]), (pixels * 255).round() / 255)


def test_pictures(tmp_path: Path) -> None:
    save_grid(torch.rand(6, 3, 8, 8), tmp_path / "grid.png", columns=3)
    plot_points({"one axis": torch.randn(50, 1), "exact": torch.randn(50, 1)}, tmp_path / "line.png")
    plot_points({"three": torch.randn(50, 3)}, tmp_path / "points.png")
    assert all((tmp_path / f"{n}.png").read_bytes()[:4] == b"\x89PNG" for n in ("grid", "line", "points"))


def test_captions_stand_below_their_pictures(tmp_path: Path) -> None:
    """Small pictures are enlarged without blurring. What is below one depends on its own caption only."""
    pixels = torch.rand(3, 3, 32, 32).mul(255).round() / 255
    texts = ["a handwritten six", "a very long prompt " * 20, "x" * 300]
    save_grid(pixels, tmp_path / "a.png", columns=2, captions=texts)
    save_grid(pixels, tmp_path / "b.png", columns=2, captions=[texts[0], "another", texts[2]])
    a, b = (read_images([tmp_path / f"{name}.png"])[0] for name in "ab")
    height = (a.shape[1] - 2) // 2
    assert a.shape[2] == 2 * (128 + 2) + 2 and height > 128 + 2 + 3 * 10  # a caption has three lines
    large = pixels.repeat_interleave(4, 2).repeat_interleave(4, 3)
    for i, (top, left) in enumerate(((2, 2), (2, 132), (2 + height, 2))):
        assert torch.equal(a[:, top : top + 128, left : left + 128], large[i])
        below = a[:, top + 128 : top + height - 2, left : left + 128]
        assert 0.01 < (below < 0.5).float().mean() < 0.4  # black letters on white
        assert torch.equal(below, b[:, top + 128 : top + height - 2, left : left + 128]) == (i != 1)
    assert bool((a[:, 2 + height :, 132:] == 1).all())  # an empty place


def test_videos_have_one_caption_each() -> None:
    frames = torch.zeros(2, 5, 3, 64, 64)
    plain, below = grid(frames), grid(frames, captions=["a cat", "a dog"])
    assert plain.size == (4 * 66 + 2, 2 * 66 + 2)
    assert below.width == plain.width + 4 and below.height > plain.height
    assert grid(frames, captions=["", ""]).size == plain.size


def test_throughput_leaves_out_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch, in which networks load; a single batch is drawn twice, and the second time counts. So does
    what prompts cost: they are encoded before the clock starts."""
    clock = [0.0]

    class Slow(PixelBackbone):
        def encode_both(self, prompts: Sequence[str]) -> None:
            clock[0] += 50

    class Loading(CopyingSampler):
        calls, backbone = 0, Slow()

        def sample(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            clock[0] += 100 if self.calls == 0 else 2
            self.calls += 1
            return super().sample(prompts, seeds)

    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: clock[0])
    for count, calls in ((8, 2), (32, 4)):
        sampler = Loading()
        config = pixel_config(metrics=("throughput",), num_samples=count, batch_size=8)
        row = evaluation.evaluate(sampler, config, progress=False)  # type: ignore[arg-type]
        assert row["metrics"]["images_per_second"] == 8 / 2 and sampler.calls == calls
        assert row["machine"] == machine("cpu") and "cores" in row["machine"]
    sampler = Loading()
    evaluation.evaluate(sampler, pixel_config(metrics=("accuracy",), num_samples=8, batch_size=8), progress=False)  # type: ignore[arg-type]
    assert sampler.calls == 1


def test_a_processor_has_a_name(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nmodel name\t: Another\n")
    assert processor(tmp_path / "cpuinfo") == "Some CPU @ 3 GHz"
    assert processor(tmp_path / "none") in (platform.processor(), platform.machine())
