"""ODE pairs of the teacher: exact where the ODE is known, the same however they are asked for, and stored by `fastgen
prepare` in folders that refuse another teacher."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.utils import save_image
from typer.testing import CliRunner

from fastgen.backbones.gaussian_mixture import GaussianMixture, GaussianMixtureConfig
from fastgen.backbones.sd3 import SD3, SD3Config
from fastgen.batch import Batch
from fastgen.cli import app
from fastgen.config import load_recipe
from fastgen.data import DigitsData, MixtureData, make_batch, shuffled
from fastgen.data.digits import assets_dir, load_digits
from fastgen.data.pairs import PairSettings, pair_noise
from fastgen.data.prepared import PreparedData
from fastgen.noise import make_key
from fastgen.recipe import Recipe
from fastgen.registry import RecipeError
from fastgen.run.prepare import prepare
from fastgen.sampling.sampler import Sampler, teacher_sampler
from fastgen.schedule import FlowSchedule

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes/digits_quickstart.yaml"
TEACHER = assets_dir() / "teachers/digits"
PROMPTS = ["a one", "a two", "a three"]
PAIRS = frozenset({"pairs"})
SETTINGS = PairSettings(count=7, steps=3, guidance_scale=2.0, seed=0)


# --- the mixture's, made as they are needed


def mixture(**config: object) -> GaussianMixture:
    section = GaussianMixtureConfig(**({"means": ((0.7, -1.2),), "stds": ((1.3, 0.4),), "fit_steps": 0} | config))
    return section.build(torch.device("cpu"), torch.float64, 0)


def pairs_of(batch: Batch) -> tuple[Tensor, Tensor]:
    assert batch.pairs is not None
    return batch.pairs


def test_a_pair_is_the_ends_of_the_teachers_ode() -> None:
    """Against Euler steps by hand, and against the exact flow map of a Gaussian, m + S^1/2 noise, from which the error
    halves as the steps double (the largest of 64)."""
    backbone, ids, errors = mixture(), torch.arange(64), []
    for steps in (50, 100):
        batch = make_batch(MixtureData(pair_steps=steps).open(backbone, 3), backbone, ids, 0, PAIRS)
        noise, x0 = pairs_of(batch)
        x, teacher = noise, backbone.load("teacher")
        for i in range(steps):
            t = torch.full((64,), 1 - i / steps, dtype=torch.float64)
            x = x - teacher(x, t, batch.cond, predict="flow_prediction") / steps
        assert torch.allclose(x, x0, atol=1e-12) and x0.dtype == torch.float64
        exact = torch.tensor((0.7, -1.2)) + torch.tensor((1.3, 0.4), dtype=torch.float64) * noise
        errors.append((x0 - exact).abs().max().item())
    print(f"off the flow map by {errors[0]:.3f} at 50 steps, {errors[1]:.3f} at 100")
    assert errors[0] < 0.2 and 1.8 < errors[0] / errors[1] < 2.2


def test_pairs_depend_on_the_position_alone() -> None:
    """In any split, to the rounding of batched kernels, and after a restart; another seed, other noise; and none of an
    evaluation's noise, whose samples the student would know by heart. Fails when the evaluation's key is used."""
    backbone = mixture(means=((1.0, 0.0), (-1.0, 0.5)), stds=(0.2, 0.2), classes=(0, 1))
    whole = make_batch(MixtureData().open(backbone, 3), backbone, torch.arange(10, 30), 1, PAIRS)
    noise, x0 = pairs_of(whole)
    stream = MixtureData().open(backbone, 3)
    parts = [make_batch(stream, backbone, ids, 2, PAIRS) for ids in torch.arange(10, 30).split([3, 12, 5])]
    assert torch.equal(torch.cat([pairs_of(p)[0] for p in parts]), noise)
    assert torch.allclose(torch.cat([pairs_of(p)[1] for p in parts]), x0, atol=1e-12)
    other = make_batch(MixtureData().open(backbone, 4), backbone, torch.arange(10, 30), 1, PAIRS)
    assert not torch.isclose(pairs_of(other)[0], noise).any()
    evaluated = pair_noise(backbone, torch.arange(10, 30), "sample")  # type: ignore[arg-type]
    assert not torch.isclose(evaluated, noise).any()
    labels = torch.tensor([int(p) for p in whole.prompts])
    assert torch.equal((x0[:, 0] < 0).long(), labels) and 0 < labels.sum() < 20  # each of its prompt's component


def test_a_batch_holds_pairs_where_they_are_needed() -> None:
    backbone = mixture()
    stream = MixtureData(pair_steps=2).open(backbone, 0)
    assert "pairs" in MixtureData.provides.fget(MixtureData())  # type: ignore[attr-defined]
    assert make_batch(stream, backbone, torch.arange(4), 0, frozenset()).pairs is None
    grouped = pairs_of(make_batch(stream, backbone, torch.arange(6), 0, PAIRS, group_size=3))
    assert [len(part.unique(dim=0)) for part in grouped] == [2, 2]


def test_guidance_is_that_of_the_pairs_settings() -> None:
    """Between equal covariances the guided ODE is that of N(m_c + (w - 1)(m_c - m_u), S)."""
    config = {"means": ((0.7, -1.2), (-0.1, 0.5)), "stds": ((1.3, 0.4),) * 2, "weights": (1, 0), "classes": (0, 1)}
    backbone, shifted = mixture(**config, uncond_weights=(0, 1)), mixture(means=((1.9, -3.75),))
    data = MixtureData(pair_steps=10, pair_guidance_scale=2.5)
    noise, x0 = pairs_of(make_batch(data.open(backbone, 0), backbone, torch.arange(20), 0, PAIRS))
    other = pairs_of(make_batch(MixtureData(pair_steps=10).open(shifted, 0), shifted, torch.arange(20), 0, PAIRS))
    assert torch.equal(noise, other[0]) and torch.allclose(x0, other[1], atol=1e-10)


# --- stored


def recipe_of(*overrides: str) -> Recipe:
    data = f"data={{name: prompts, prompts: [{', '.join(PROMPTS)}]}}"
    return load_recipe(
        RECIPE, [data, "eval.reference=null", "eval.metrics=[throughput]", "eval.prompts=[a six]", *overrides]
    )


def build() -> SD3:
    return SD3Config(path=str(TEACHER)).build(torch.device("cpu"), torch.float32, 0)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "folder"
    prepare(recipe_of(), folder, shard_size=3, pairs=SETTINGS)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_stored_pairs_are_the_teachers_own_samples(stored: Path) -> None:
    """Each x0 is what the stock sampler makes of that noise and prompt, guided, in other batches than it was stored
    in; an epoch has every pair once, and every prompt equally often, give or take one."""
    manifest = json.loads((stored / "manifest.json").read_text())
    assert manifest["pairs"] == {"count": 7, "steps": 3, "guidance_scale": 2.0, "seed": 0}
    assert [e["rows"] for n, e in manifest["files"].items() if n.startswith("pairs")] == [3, 3, 1]
    source, backbone = PreparedData(folder=str(stored)), build()
    assert source.provides == {"pairs"}
    source.check(SD3Config(path=str(TEACHER)))
    stream = source.open(backbone, 5)
    batch = make_batch(stream, backbone, torch.arange(7), 1, PAIRS)
    noise, x0 = pairs_of(batch)
    ids = shuffled(torch.arange(7), 7, make_key(5, "data"))
    assert sorted(ids.tolist()) == list(range(7)) and ids.tolist() != list(range(7))
    assert sorted(batch.prompts.count(p) for p in PROMPTS) == [2, 2, 3]
    assert torch.equal(noise, pair_noise(backbone, ids, make_key(0, "pairs")))
    x, teacher, cfg = noise, backbone.load("teacher"), 2.0
    policy = backbone.teacher_policy(3)
    for here, after in zip(policy.timesteps, (*policy.timesteps[1:], 0.0), strict=True):
        t = torch.full((7,), here)
        on, off = (teacher(x, t, c, predict="flow_prediction") for c in (batch.cond, batch.uncond))
        x = x + (after - here) * (off + cfg * (on - off))
    error = (x - x0).abs().max().item()
    print(f"{error:.1e}")
    assert error < 1e-4 and isinstance(teacher.schedule, FlowSchedule)
    assert "text_pipeline" not in vars(backbone)
    again = [pairs_of(make_batch(stream, backbone, p, 2, PAIRS)) for p in torch.arange(7).split(3)]
    assert torch.equal(torch.cat([a[1] for a in again]), x0) and torch.equal(torch.cat([a[0] for a in again]), noise)


def test_an_interrupted_folder_is_continued_to_the_same_bytes(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second shard: the first is not sampled again, and without missing pairs no teacher is loaded."""
    own, calls, allowed = Sampler.latents, 0, 1

    def counted(self, *args):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        if calls > allowed:
            raise KeyboardInterrupt
        return own(self, *args)

    monkeypatch.setattr(Sampler, "latents", counted)
    with pytest.raises(KeyboardInterrupt):
        prepare(recipe_of(), tmp_path / "folder", shard_size=3, pairs=SETTINGS)
    assert set(contents(tmp_path / "folder")) < set(contents(stored))
    calls, allowed = 0, 9
    prepare(recipe_of(), tmp_path / "folder", shard_size=3, pairs=SETTINGS)
    assert calls == 2 and contents(tmp_path / "folder") == contents(stored)
    monkeypatch.setattr("fastgen.run.prepared_files.teacher_sampler", lambda *_: pytest.fail("the teacher was loaded"))
    prepare(recipe_of(), tmp_path / "folder", shard_size=3, pairs=SETTINGS)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (PairSettings(8, 3, 2.0), r"pairs.count \(7 in the folder, 8 in the recipe\)"),
        (PairSettings(7, 4, 2.0), r"pairs.steps \(3 in the folder, 4 in the recipe\)"),
        (PairSettings(7, 3, 1.0), r"pairs.guidance_scale \(2.0 in the folder, 1.0 in the recipe\)"),
        (PairSettings(7, 3, 2.0, seed=1), r"pairs.seed \(0 in the folder, 1 in the recipe\)"),
        (None, r"pairs.count \(7 in the folder, none in the recipe\)"),
    ],
)
def test_a_folder_of_other_pairs_is_refused(settings: PairSettings | None, words: str, stored: Path) -> None:
    before = contents(stored)
    with pytest.raises(ValueError, match=f"prepared with other settings: .*{words}.*Choose another --output"):
        prepare(recipe_of(), stored, shard_size=3, pairs=settings)
    assert contents(stored) == before


@pytest.mark.parametrize(
    "part", ["transformer/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"]
)
def test_pairs_of_another_teacher_are_refused(part: str, stored: Path, tmp_path: Path) -> None:
    """Other weights, or another scheduler, whose steps the pairs are of. Fails when the teacher is not in the folder's
    identity."""
    teacher = Path(shutil.copytree(TEACHER, tmp_path / "teacher"))
    PreparedData(folder=str(stored)).check(SD3Config(path=str(teacher)))
    if part.endswith("json"):
        settings = json.loads((teacher / part).read_text())
        (teacher / part).write_text(json.dumps(settings | {"shift": 2.5}))
    else:
        tensors = load_file(teacher / part)
        name = next(iter(tensors))
        save_file(tensors | {name: tensors[name] + 1}, teacher / part)
    with pytest.raises(RecipeError, match=f"was prepared with another backbone: .*{part}"):
        load_recipe(RECIPE, [f"data={{name: prepared, folder: {stored}}}", f"backbone.path={teacher}"])


def test_images_and_pairs_go_together(tmp_path: Path) -> None:
    """Latents are those of the pair's prompt; what is stored in bfloat16 comes back in the run's dtype."""
    images, folder = tmp_path / "images", tmp_path / "folder"
    images.mkdir()
    for i, prompt in enumerate(PROMPTS):
        save_image(load_digits("train")[0][i], images / f"{i}.png")
        (images / f"{i}.txt").write_text(prompt)
    recipe = recipe_of(f"data={{name: images, folder: {images}}}")
    prepare(recipe, folder, dtype="bfloat16", pairs=PairSettings(4, 1))
    source, backbone = PreparedData(folder=str(folder)), build()
    assert source.provides == {"latents", "pairs"}
    batch = make_batch(source.open(backbone, 0), backbone, torch.arange(4), 0, PAIRS | {"latents"})
    assert batch.latents is not None and pairs_of(batch)[1].dtype == batch.latents.dtype == torch.float32
    encoded = {p: backbone.encode(recipe.data.samples(backbone).read(i)[None])[0] for i, p in enumerate(PROMPTS)}
    for prompt, latent in zip(batch.prompts, batch.latents, strict=True):
        assert (latent - encoded[prompt]).abs().max() < latent.abs().max() / 100


def test_pairs_made_by_a_run_are_those_that_would_be_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data `digits` with `pairs`: sampled at the first batch that needs them, the same that `fastgen prepare` stores
    for this recipe."""
    few = tuple(part[:2] for part in load_digits("train"))
    monkeypatch.setattr("fastgen.data.digits.load_digits", lambda _: few)
    recipe = recipe_of("data={name: digits, pairs: {count: 5, steps: 2}}")
    assert recipe.data.provides == {"latents", "pixels", "pairs"} and "pairs" not in DigitsData().provides
    manifest = prepare(recipe, tmp_path / "folder")
    assert manifest["pairs"] == {"count": 5, "steps": 2, "guidance_scale": 1.0, "seed": 0}
    here, there = build(), build()
    stream, stored = recipe.data.open(here, 3), PreparedData(folder=str(tmp_path / "folder")).open(there, 3)
    for ids in torch.arange(10).split(5):
        batch, other = make_batch(stream, here, ids, 0, PAIRS), make_batch(stored, there, ids, 0, PAIRS)
        assert batch.prompts == other.prompts and torch.equal(pairs_of(batch)[0], pairs_of(other)[0])
        error = (pairs_of(batch)[1] - pairs_of(other)[1]).abs().max().item()
        print(f"{error:.1e}")
        assert error < 1e-4  # prompts were encoded in other batches
        monkeypatch.setattr(Sampler, "latents", lambda *_: pytest.fail("pairs were sampled twice"))


def test_a_stochastic_scheduler_has_no_ode(tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(TEACHER, tmp_path / "teacher"))
    path = teacher / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stochastic_sampling": True}))
    with pytest.raises(ValueError, match="its own scheduler is stochastic"):
        prepare(recipe_of(f"backbone.path={teacher}"), tmp_path / "folder", pairs=SETTINGS)


def test_the_command_line(stored: Path, tmp_path: Path) -> None:
    arguments = [
        "prepare",
        str(RECIPE),
        f"data={{name: prompts, prompts: [{', '.join(PROMPTS)}]}}",
        "eval.reference=null",
        "eval.metrics=[throughput]",
        "eval.prompts=[a six]",
        "--shard-size",
        "3",
        "--pairs",
        "7",
        "--pair-steps",
        "3",
        "--guidance-scale",
        "2",
        "--output",
        str(tmp_path / "f"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "and 0 latents and 7 pairs in" in result.stdout.replace("\n", " ")
    assert contents(tmp_path / "f") == contents(stored)


def test_the_samplers_key_names_its_noise() -> None:
    """The default is that of evaluations, which every published number depends on."""
    backbone = mixture()
    sampler = teacher_sampler(backbone, 2, 1.0)
    assert torch.equal(sampler.latents(["", ""], [3, 4]), sampler.latents(["", ""], [3, 4], "sample"))
    assert not torch.isclose(sampler.latents([""], [3]), sampler.latents([""], [3], 7)).any()
