"""Several students, each for its own prompts (arXiv 2410.23274): router, data, runs, the pipeline of all of them."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tiny_dit import tiny_dit
from typer.testing import CliRunner

import fastgen
from fastgen.backbones.gaussian_mixture import GaussianMixture, GaussianMixtureConfig
from fastgen.cli import app
from fastgen.config import load_recipe
from fastgen.data import DataError, MixtureData
from fastgen.data import part as data_part
from fastgen.data.digits import label_of, load_digits
from fastgen.data.part import PartStream
from fastgen.evaluation import folders
from fastgen.evaluation.evaluate import find_prompts, find_reference, of_part
from fastgen.metrics.reference import Reference, open_reference
from fastgen.pipelines import routed
from fastgen.pipelines.router import Part, Router
from fastgen.recipe import EvalConfig, Recipe
from fastgen.registry import RecipeError
from fastgen.run.combine import combine
from fastgen.run.export import export
from fastgen.sampling.folder import sample_folder
from fastgen.sampling.sampler import Routed, load_sampler, read_metadata, teacher_sampler
from fastgen.sampling.teacher_first import TeacherFirst

LABELLED = GaussianMixtureConfig(
    means=((-3.0,), (0.0,), (3.0,)), stds=((0.3,), (0.3,), (0.3,)), weights=(3, 2, 1), classes=(0, 1, 2)
)
DIGITS = "part.words=[[zero, one, two, three, four], []]"


def test_every_prompt_has_exactly_one_student() -> None:
    labels = Router(of=4, labels=10)
    assert [labels.route(str(k)) for k in range(10)] == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    words = Router(words=(("cat", "Red fox"), ("dog",), ()))
    told = {"a CAT and a dog": 0, "the red fox": 0, "a dog": 1, "a caterpillar": 2, "": 2, "red. fox": 2}
    assert {prompt: words.route(prompt) for prompt in told} == told
    by_hash, prompts = Router(of=3), [f"prompt {i}" for i in range(3000)]
    counts = torch.bincount(torch.tensor([by_hash.route(prompt) for prompt in prompts]))
    assert counts.min() > 900 and [by_hash.route(p) for p in ("a", "b", "a cat")] == [1, 2, 1]
    parts = [Part(of=3, index=k) for k in range(3)]
    assert all(sum(part.has(prompt) for part in parts) == 1 for prompt in prompts)
    assert all(part.router == by_hash for part in parts)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "either words"),
        ({"of": 2, "words": (("a",), ())}, "either words"),
        ({"words": (("a",),)}, "at least two"),
        ({"words": ((), ("a",))}, "only the last"),
        ({"words": (("a", " "), ())}, "an empty word"),
        ({"of": 5, "labels": 4}, "at least as many"),
        ({"of": 2, "index": 2}, "0 to 1"),
    ],
)
def test_what_is_no_partition_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Part(**keys)
    with pytest.raises(ValueError, match="labels 0 to 3"):
        Router(of=2, labels=4).route("a cat")


def test_a_stream_of_a_part_is_the_other_one_without_the_rest() -> None:
    """In the same order, with the same data, and wherever a run begins to read it."""
    backbone = GaussianMixture(LABELLED, torch.device("cpu"), torch.float32, 0)
    stream, part = MixtureData().open(backbone, 5), Part(words=(("0",), ("1", "2")), index=1)
    everything, rows = stream.prompts(torch.arange(1000)), torch.arange(200)
    kept = torch.tensor([i for i, prompt in enumerate(everything) if prompt != "0"])[:200]
    own = PartStream(stream, part)
    assert own.prompts(rows) == [everything[i] for i in kept]
    latents = own.latents(rows)
    assert latents is not None and torch.equal(latents, stream.latents(kept))  # type: ignore[arg-type]
    late = PartStream(stream, part).pairs(rows[150:])
    assert late is not None and torch.equal(late[0], stream.pairs(kept[150:])[0])  # type: ignore[index]


def test_a_part_without_prompts_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_part, "LONGEST_SEARCH", 1024)
    backbone = GaussianMixture(LABELLED, torch.device("cpu"), torch.float32, 0)
    stream = PartStream(MixtureData().open(backbone, 5), Part(words=(("7",), ()), index=0))
    with pytest.raises(DataError, match="none of 1024 prompts belongs to student 0 of 2"):
        stream.prompts(torch.arange(4))
    few = PartStream(MixtureData().open(backbone, 5), Part(of=2, labels=2))
    with pytest.raises(DataError, match="part: the prompts of these students are labels 0 to 1"):
        few.prompts(torch.arange(4))


def test_a_student_is_measured_on_its_own_prompts(project: Path) -> None:
    backbone = GaussianMixture(LABELLED, torch.device("cpu"), torch.float32, 0)
    sampler = teacher_sampler(backbone, 2, 1.0, part=Part(of=3, labels=3, index=2))
    for config in (EvalConfig(("mean_error",), 100), EvalConfig(("mean_error",), 100, prompts=("0", "2", "1"))):
        assert find_prompts(sampler, config, None) == ["2"] * 100
    with pytest.raises(ValueError, match="belongs to student 2"):
        find_prompts(sampler, EvalConfig(("mean_error",), 100, prompts=("0",)), None)
    with pytest.raises(ValueError, match="cannot be divided"):
        find_prompts(sampler, EvalConfig(("mean_error",), 100, images=str(project / "assets/first_frames")), None)


def test_a_student_is_compared_with_pictures_of_its_own_prompts() -> None:
    """All of them, or a choice of as many as there are samples, with their captions."""
    part = Part(words=(("two", "five"), ()), index=0)
    for count in (7, 599):
        reference = find_reference("pixels", EvalConfig(("fid",), count, reference="digits"), part)
        assert reference is not None and {label_of(prompt) for prompt in reference.prompts} == {2, 5}
        assert len(reference) == (7 if count == 7 else sum(map(part.has, open_reference("digits").prompts)))
    pixels, labels = load_digits("test")
    assert torch.equal(reference.read(0, 9), pixels[(labels == 2) | (labels == 5)][:9])
    with pytest.raises(ValueError, match="no image of digits belongs to student 0"):
        find_reference("pixels", EvalConfig(("fid",), 9, reference="digits"), Part(words=(("cat",), ()), index=0))
    uncaptioned = Reference("photos", ("", ""), lambda start, stop: pixels[start:stop])
    assert of_part(uncaptioned, part) is uncaptioned


@pytest.mark.parametrize(
    "change", ["eval.images=assets/first_frames", "data={name: images, folder: assets, buckets: [[32, 32], [32, 48]]}"]
)
def test_what_cannot_be_divided_is_refused(change: str, project: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be divided by prompt"):
        load_recipe(project / "recipes/digits_quickstart.yaml", [change, "part={of: 2}"])


def written(recipe: Recipe, folder: Path, seed: int) -> Path:
    """The export of a student with weights that differ from its teacher's."""
    backbone = recipe.backbone.build(torch.device("cpu"), torch.float32, 0)
    student = backbone.load("student")
    torch.manual_seed(seed)
    with torch.no_grad():
        for value in student.parameters():
            value.add_(0.1 * torch.randn_like(value) * value.std(correction=0))
    export(student, backbone, recipe, folder, 0)
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory, project: Path) -> tuple[list[Path], Path]:
    """The exports of two students of the digits, and both in one folder."""
    folder, parts = tmp_path_factory.mktemp("digits"), []
    for k in (0, 1):
        recipe = load_recipe(project / "recipes/digits_quickstart.yaml", [f"part.index={k}", DIGITS])
        parts.append(written(recipe, folder / str(k), k))
    return parts, combine(parts[::-1], folder / "both")


def test_the_pipeline_of_all_students_gives_each_its_prompts(digits: tuple[list[Path], Path]) -> None:
    parts, both = digits
    pipeline = fastgen.load(both)
    steps = read_metadata(both, several=True)["policy"]["timesteps"]
    call = {"num_inference_steps": len(steps), "guidance_scale": 1.0, "output_type": "pt"}
    prompts = ("a handwritten three", "a handwritten seven")
    for prompt, part in zip(prompts, parts, strict=True):
        images = []
        for each in (fastgen.load(part), pipeline):
            torch.manual_seed(3)  # the stock pipeline gives its scheduler no generator
            images.append(each(prompt, **call).images)
        assert torch.equal(*images)
    with pytest.raises(ValueError, match=r"students \[0, 1\]"):
        pipeline(list(prompts), **call)
    with pytest.raises(ValueError, match="not only their embeddings"):
        pipeline(prompt_embeds=torch.zeros(1), **call)


def test_a_pipeline_of_labels_routes_by_label(tmp_path: Path) -> None:
    """DiT's call takes class_labels, which are numbers."""
    folder, other = tiny_dit(tmp_path / "dit"), tiny_dit(tmp_path / "other", seed=1)
    shutil.copytree(other / "transformer", folder / "student_1/transformer")
    (folder / "fastgen.json").write_text(json.dumps({"router": {"of": 2, "labels": 1000}}))
    kind: Any = routed.RoutedDiTPipeline
    pipeline = kind.from_pretrained(folder)
    for label, source in ((499, folder), (500, other), (0, folder)):
        pictures, network = [], diffusers.DiTTransformer2DModel.from_pretrained(source, subfolder="transformer")
        for each in (diffusers.DiTPipeline.from_pretrained(folder, transformer=network), pipeline):
            torch.manual_seed(3)
            pictures.append(each([label], num_inference_steps=2, guidance_scale=1, output_type="np").images)
        assert np.array_equal(*pictures)
    with pytest.raises(ValueError, match=r"students \[0, 1\]"):
        pipeline(class_labels=[0, 999])


def test_plain_diffusers_refuses_it(digits: tuple[list[Path], Path]) -> None:
    with pytest.raises((AttributeError, ValueError)):
        diffusers.DiffusionPipeline.from_pretrained(digits[1])
    with pytest.raises(AttributeError):
        _ = routed.RoutedNothing


def test_our_sampler_mixes_the_students_in_one_batch(digits: tuple[list[Path], Path]) -> None:
    parts, both = digits
    sampler, alone = load_sampler(both), [load_sampler(part) for part in parts]
    prompts = ["a handwritten seven", "a handwritten three", "a handwritten nine"]
    found = sampler.latents(prompts, range(3))
    expected = [alone[k].latents([p], [i])[0] for i, (p, k) in enumerate(zip(prompts, (1, 0, 1), strict=True))]
    assert isinstance(sampler, Routed) and torch.allclose(found, torch.stack(expected), atol=1e-5)
    assert len(sampler.weight_hashes()) > len(alone[0].weight_hashes())
    with pytest.raises(ValueError, match="several students"):
        TeacherFirst(sampler, sampler, 1)


def test_what_needs_one_student_refuses_several(
    digits: tuple[list[Path], Path], project: Path, tmp_path: Path
) -> None:
    from fastgen.sampling.demo import load_pair

    with pytest.raises(ValueError, match="holds several students"):
        load_pair(digits[1])
    with pytest.raises(ValueError, match="of one student"):
        sample_folder(digits[1], ["a three"], None, 1, 0, tmp_path / "no", None, None, 1, with_views=True)
    with pytest.raises(RecipeError, match="holds several students"):
        load_recipe(project / "recipes/digits_quickstart.yaml", [f"init_from={digits[1]}"])


def test_what_makes_no_whole_is_not_combined(digits: tuple[list[Path], Path], tmp_path: Path) -> None:
    first, second = digits[0]

    def changed(**changes: Any) -> Path:
        """A folder with the metadata of the second student, and changes."""
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        about = json.loads((second / "fastgen.json").read_text())
        (folder / "fastgen.json").write_text(json.dumps(about | changes))
        return folder

    part = json.loads((second / "fastgen.json").read_text())["part"]
    for given, message in (
        ([first], r"students \[1\] of 2 are missing"),
        ([first, first], "both student 0"),
        ([first, changed(part=None)], "no part"),
        ([first, changed(lora=True)], "--merge"),
        ([first, changed(policy={"timesteps": [1.0]})], "differ in policy"),
        ([first, changed(part=part | {"words": [["zero"], []]})], "different ways"),
        ([first, tmp_path / "nothing"], "neither a run"),
        ([first, digits[1]], "several students"),
    ):
        with pytest.raises(ValueError, match=message):
            combine(given, tmp_path / "out")
    with pytest.raises(ValueError, match="exists"):
        combine(digits[0], second)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_runs_of_parts_from_training_to_evaluation(tmp_path: Path, project: Path) -> None:
    """Each run trains on its labels and is measured on them; the command makes one folder, measured on all."""
    means = "backbone.means=[[-3,0],[0,0],[3,0]]"
    tiny = ["backbone.stds=[0.3,0.3,0.3]", "backbone.weights=null", "backbone.classes=[0,1,2]", "backbone.width=16"]
    tiny += ["backbone.fit_steps=300", "train.steps=2", "train.batch_size=8", "train.eval_every=0", "health.every=0"]
    tiny += ["train.sample_every=0", "eval.num_samples=200", "eval.quick_num_samples=64", means]
    runs = []
    for k in (0, 1):
        part = [f"part={{index: {k}, of: 2, labels: 3}}", f"output_dir={tmp_path / str(k)}"]
        runs.append(fastgen.distill(load_recipe(project / "recipes/mixture_dmd2_4step.yaml", [*tiny, *part])))
    options: dict[str, Any] = {"metrics": "mean_error", "device": "cpu", "progress": False}
    row = folders.evaluate_path(runs[1], **options)
    assert row["part"]["index"] == 1 and row["num_samples"] == 200
    done = CliRunner().invoke(app, ["combine", *map(str, runs), "--output", str(tmp_path / "both")])
    assert done.exit_code == 0, done.output
    sampler = fastgen.load(tmp_path / "both")
    points = sampler.sample([str(i % 3) for i in range(300)], range(300))[:, 0]
    assert torch.tensor([float(points[k::3].mean()) for k in range(3)]).sub(torch.tensor([-3, 0, 3])).abs().max() < 0.6
    assert (
        dataclasses.asdict(sampler.router)
        == folders.evaluate_path(tmp_path / "both", num_samples=60, **options)["router"]
    )
    page = (tmp_path / "both/README.md").read_text()
    assert "student 0: labels 0 to 1" in page and "student 1: labels 2 to 2" in page
