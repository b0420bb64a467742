"""Pictures of several sizes: an update has one, all are seen equally often, and prepared ones are the same."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from processes import in_processes
from test_tar_shards import archive
from tiny_dit import tiny_dit
from tiny_flux import tiny_flux
from tiny_pipelines import tiny_sdxl

from fastgen.backbones.sd import SDConfig
from fastgen.backbones.sd3 import SD3Config
from fastgen.config import build_recipe
from fastgen.data import make_batch
from fastgen.data.digits import assets_dir
from fastgen.data.images import read_image
from fastgen.data.order import bucketed, place_of
from fastgen.data.pairs import PairSettings
from fastgen.data.sizes import assigned
from fastgen.objectives import GNDM
from fastgen.planning.plan import plan
from fastgen.recipe import Recipe
from fastgen.registry import RecipeError
from fastgen.run import checkpoint
from fastgen.run.prepare import prepare
from fastgen.train import train

BUCKETS = [[32, 32], [32, 64], [64, 32]]
SHAPES = [(40, 40), (80, 48), (64, 32), (50, 100), (33, 36), (100, 40), (70, 36), (40, 90)]  # width, height
UNIT = 4
LATENTS = frozenset({"latents"})


def test_every_sample_is_seen_equally_often_in_updates_of_one_bucket() -> None:
    sizes, unit = [7, 3, 20, 1], 4
    bucket_of = torch.arange(4).repeat_interleave(torch.tensor(sizes))[torch.randperm(31)]
    total = 12 * 31 // unit  # updates: after 12 epochs every bucket has had a whole number of them
    seen = bucketed(torch.arange(total * unit), bucket_of, unit, 3)
    buckets = bucket_of[seen].view(total, unit)
    assert bool((buckets == buckets[:, :1]).all())
    assert set(Counter(seen.tolist()).values()) == {12} and len(set(seen.tolist())) == 31
    places = torch.tensor([200, 7, 91, 0, 203])
    assert torch.equal(bucketed(places, bucket_of, unit, 3), seen[places])  # whatever came before
    assert not torch.equal(bucketed(torch.arange(total * unit), bucket_of, unit, 4), seen)
    assert len({bucket for bucket, _ in (place_of(update, sizes, unit, 3) for update in range(20))}) > 1


def test_pictures_go_to_the_bucket_of_their_shape() -> None:
    buckets = ((32, 32), (32, 64), (64, 32), (16, 32))
    sizes = [(40, 40), (80, 48), (64, 32), (40, 20), (30, 90), (20, 10)]
    assert assigned(sizes, buckets).tolist() == [0, 1, 1, 3, 2, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate(SHAPES):
        Image.effect_noise(size, 60 + i).convert("RGB").save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"a cat {i}")
    return root


def images(pictures: Path, buckets: list[list[int]] = BUCKETS) -> dict[str, Any]:
    return {"name": "images", "folder": str(pictures), "buckets": buckets}


def recipe_of(folder: Path, data: dict[str, Any], **changes: Any) -> Recipe:
    raw: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "backbone": {"name": "flux", "path": str(folder), "resolution": 32, "max_sequence_length": 12},
        "rollout": {"timesteps": [1.0, 0.6]},
        "data": data,
        "objective": {"name": "dmd2", "fake_updates": 1, "gan_weight": 0.01},
        "optimizers": {role: {"lr": 1e-3} for role in ("student", "fake_score", "discriminator")},
        "health": {"every": 0},
        "train": {"steps": 3, "batch_size": 2, "num_samples": 2, "sample_every": 0, "checkpoint_every": 0}
        | {"accumulate": 2, "eval_every": 0},
        "eval": {"metrics": ["throughput"], "num_samples": 2, "prompts": ["a cat"], "teacher_steps": [2]},
    }
    return build_recipe(raw | changes)


def build(recipe: Recipe) -> Any:
    return recipe.backbone.build(torch.device("cpu"), torch.float32, 0)


def test_a_batch_has_the_size_of_its_pictures(folder: Path, pictures: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, images(pictures))
    backbone = build(recipe)
    stream, shapes = recipe.data.open(backbone, 3, UNIT), Counter[tuple[int, ...]]()
    shard = tmp_path / "a.tar"
    shard.write_bytes(archive({file.name: file.read_bytes() for file in sorted(pictures.iterdir())}))
    other = recipe_of(folder, {"name": "webdataset", "shards": str(shard), "buckets": BUCKETS}).data.open(
        backbone, 3, UNIT
    )
    for first in range(0, 6 * UNIT, UNIT):
        positions = torch.arange(first, first + UNIT)
        whole, half = (make_batch(stream, backbone, p, 1, LATENTS) for p in (positions, positions[2:]))
        shapes[whole.latent_shape] += 1
        assert whole.latents is not None and half.latents is not None
        assert whole.latents.shape[1:] == whole.latent_shape == whole.normal("x").shape[1:]
        assert torch.equal(half.latents, whole.latents[2:]) and torch.equal(half.normal("x"), whole.normal("x")[2:])
        assert torch.equal(other.latents(positions), whole.latents) and other.prompts(positions) == [*whole.prompts]
        size = stream.size(positions)
        assert size is not None
        for prompt, latent in zip(whole.prompts, whole.latents, strict=True):
            pixels = read_image(pictures / f"{prompt[-1]}.png", size, "a picture", False)
            assert torch.equal(backbone.encode(pixels[None])[0], latent)
    assert set(shapes) == {backbone.latent_shape_of(tuple(size)) for size in BUCKETS}
    with pytest.raises(ValueError, match="are of several updates, whose pictures differ in size"):
        make_batch(stream, backbone, torch.arange(24), 1, LATENTS)


@pytest.mark.slow
def test_prepared_latents_are_the_same_to_the_bit(folder: Path, pictures: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, images(pictures))
    prepare(recipe, tmp_path / "prepared", shard_size=2)
    stored = recipe_of(folder, {"name": "prepared", "folder": str(tmp_path / "prepared")})
    here, there = build(recipe), build(stored)
    one, two = recipe.data.open(here, 3, UNIT), stored.data.open(there, 3, UNIT)
    for first in range(0, 6 * UNIT, UNIT):
        wanted, got = (
            make_batch(s, b, torch.arange(first, first + UNIT), 1, LATENTS) for s, b in ((one, here), (two, there))
        )
        assert got.latent_shape == wanted.latent_shape and got.prompts == wanted.prompts
        assert torch.equal(got.latents, wanted.latents)
    assert "vae" not in vars(there)
    assert stored.data.sizes == recipe.data.sizes
    with pytest.raises(ValueError, match="ODE pairs have the size of the backbone"):
        prepare(recipe, tmp_path / "pairs", pairs=PairSettings(3, steps=2))


def test_sd3_knows_its_positions_up_to_a_size() -> None:
    backbone = SD3Config(path=str(assets_dir() / "teachers/digits")).build(torch.device("cpu"), torch.float32, 0)
    assert backbone.latent_shape_of((64, 32)) == (2, 16, 8)
    with pytest.raises(ValueError, match="knows positions up to 64 pixels, got 32 x 72"):
        backbone.latent_shape_of((32, 72))


@pytest.mark.slow
def test_sdxl_is_told_the_size_that_the_stock_call_tells(tmp_path: Path) -> None:
    folder, told = tiny_sdxl(tmp_path), []
    backbone = SDConfig(path=str(folder), resolution=32).build(torch.device("cpu"), torch.float32, 0)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.unet.register_forward_pre_hook(
        lambda _, __, given: told.append(given["added_cond_kwargs"]), with_kwargs=True
    )
    pipeline("a cat", height=32, width=64, num_inference_steps=1, guidance_scale=1, output_type="latent")
    cond = backbone.told_size(backbone.encode_prompts(["a cat", "a dog"]), (32, 64))
    assert torch.equal(cond["time_ids"], told[0]["time_ids"].expand(2, 6)) and cond["pooled"].shape[0] == 2


@pytest.mark.slow
def test_the_plan_is_of_the_largest_size(folder: Path, pictures: Path) -> None:
    square, wide = (
        plan(recipe_of(folder, images(pictures, buckets)), gpu=False).peak
        for buckets in ([[32, 32]], [[32, 64], [32, 32]])
    )
    assert square < wide


@pytest.mark.parametrize(
    ("buckets", "words"),
    [
        ([[32, 38]], r"buckets: height and width must be multiples of \d+, got 32 x 38"),
        ([[32, 32], [32, 32]], r"buckets: \[32, 32\] is there twice"),
        ([[64, 64], [64, 32]], r"6 images are smaller than the bucket's 64x64 pixels, the first is "),
    ],
)
def test_buckets_that_do_not_fit_are_refused(
    buckets: list[list[int]], words: str, folder: Path, pictures: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe_of(folder, images(pictures, buckets))


def test_what_takes_one_size_is_refused(folder: Path, pictures: Path, tmp_path: Path) -> None:
    data = images(pictures)
    with pytest.raises(ValueError, match=r"replay_updates: .* other sizes \(data\.buckets\)"):
        GNDM(form="score", replay_updates=2).check_recipe(recipe_of(folder, data))
    section = {"name": "dit", "path": str(tiny_dit(tmp_path)), "resolution": 32}
    with pytest.raises(RecipeError, match="buckets: DiTPipeline makes images of one size"):
        recipe_of(folder, data, backbone=section)


@pytest.mark.slow
def test_a_student_trains_on_them(folder: Path, pictures: Path, tmp_path: Path) -> None:
    """Six updates of both roles, with the GAN, whose heads see tokens of three sizes."""
    train(recipe_of(folder, images(pictures), output_dir=str(tmp_path / "run")))
    assert (tmp_path / "run/export/model_index.json").is_file()


@pytest.fixture(scope="module")
def one_process(folder: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose updates have two micro-batches of two pictures, to be read only."""
    return train(shared_recipe(folder, pictures, tmp_path_factory.mktemp("one") / "run", accumulate=2))


def shared_recipe(folder: Path, pictures: Path, run: Path, **options: Any) -> Recipe:
    sizes = {"steps": 3, "batch_size": 2, "num_samples": 2, "checkpoint_every": 3, "sample_every": 0, "eval_every": 0}
    return recipe_of(
        folder, images(pictures), output_dir=str(run), train=sizes | {"dtype": "float64", "device": "cpu"} | options
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_processes_have_pictures_of_one_size_in_every_update(
    strategy: str, one_process: Path, folder: Path, pictures: Path, tmp_path: Path
) -> None:
    """Two processes end with the weights of one: though the sizes change between updates, and the discriminator's
    tokens with them, both processes have the same size at once."""
    recipe = shared_recipe(folder, pictures, tmp_path / "two", strategy=strategy)
    stream = recipe.data.open(build(recipe), recipe.seed, UNIT)
    seen = {stream.size(torch.arange(first, first + UNIT)) for first in range(0, 6 * UNIT, UNIT)}
    assert len(seen) > 1, seen
    in_processes(tmp_path, 2, train, recipe)
    one, two = (checkpoint.complete(f / "checkpoints")[-1] for f in (one_process, tmp_path / "two"))
    error = 0.0
    for role in ("student", "fake_score", "discriminator", "ema", "student.optimizer"):
        a, b = checkpoint.stored(one, role), checkpoint.stored(two, role)
        assert a.shapes == b.shapes
        error = max(error, *(float((a.whole(k).double() - b.whole(k).double()).abs().max()) for k in a.shapes))
    print(f"{strategy}: largest difference {error:.2g} with sizes {seen}")
    assert error < 1e-9
