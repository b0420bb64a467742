"""Images that samples are made from: in data, in prepared folders, in runs, in samples and in evaluations."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_wan import tiny_wan
from tiny_wan_i2v import tiny_wan_i2v

from fastgen import noise
from fastgen.backbones.given import to_picture
from fastgen.backbones.wan_i2v import WanI2V
from fastgen.config import build_recipe
from fastgen.data import make_batch
from fastgen.data.images import encode_files
from fastgen.data.pairs import PairSettings
from fastgen.data.prepared import PreparedData
from fastgen.evaluation.folders import evaluate_path
from fastgen.planning.plan import plan
from fastgen.recipe import Recipe
from fastgen.registry import RecipeError
from fastgen.run.prepare import prepare
from fastgen.sampling.folder import sample_folder
from fastgen.sampling.sampler import load_sampler
from fastgen.train import train

COUNT = 4
CPU = torch.device("cpu")
SIZE = {"height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan_i2v(tmp_path_factory.mktemp("pipeline"), "clip")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Larger pictures than the videos, of another shape, with captions."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(COUNT):
        to_picture(noise.uniform(torch.arange(1), (3, 40, 48), i, torch.float32)[0]).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(["a cat", "a dog runs", "a red cat", "a blue dog sleeps"][i])
    return root


def recipe_of(folder: Path, pictures: Path, output: Path = Path("unused"), **changes: Any) -> Recipe:
    raw: dict[str, Any] = {
        "output_dir": str(output),
        "backbone": {"name": "wan_i2v", "path": str(folder)} | SIZE,
        "rollout": {"timesteps": [1.0, 0.75], "transition": "ode"},
        "data": {"name": "images", "folder": str(pictures)},
        "objective": {"name": "dmd2", "guidance_scale": 3.0, "fake_updates": 1},
        "optimizers": {"student": {"lr": 1e-4}, "fake_score": {"lr": 1e-4}},
        "train": {"steps": 2, "batch_size": 2, "num_samples": 2, "sample_every": 2, "checkpoint_every": 0},
        "health": {"every": 1, "num_samples": 4},
        "eval": {
            "metrics": ["throughput"],
            "num_samples": 3,
            "quick_num_samples": 2,
            "images": str(pictures),
            "teacher_steps": [2],
            "teacher_guidance_scale": 3.0,
        },
    }
    return build_recipe(raw | changes)


def build(recipe: Recipe) -> WanI2V:
    return recipe.backbone.build(CPU, torch.float32, 0)


def test_a_batch_has_the_image_in_both_halves_of_its_conditioning(folder: Path, pictures: Path) -> None:
    recipe = recipe_of(folder, pictures)
    backbone = build(recipe)
    stream = recipe.data.open(backbone, 0)
    batch = make_batch(stream, backbone, torch.arange(6), 0, frozenset())  # an epoch and a half
    assert batch.cond.keys() == batch.uncond.keys() == {"prompt_embeds", "image_latents", "image_embeds"}
    files = [next(f for f in pictures.glob("*.txt") if f.read_text() == p).with_suffix(".png") for p in batch.prompts]
    wanted = encode_files(backbone, files)
    for key in wanted:
        assert torch.equal(batch.cond[key], wanted[key]) and torch.equal(batch.uncond[key], wanted[key])
    later = make_batch(recipe.data.open(backbone, 0), backbone, torch.arange(4, 6), 0, frozenset())
    assert torch.equal(later.cond["image_latents"], batch.cond["image_latents"][4:])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_gives_its_pictures_as_images(
    folder: Path, pictures: Path, tmp_path: Path, streaming: bool
) -> None:
    files = sorted(pictures.glob("*.png"))
    rows = {"prompt": [f.with_suffix(".txt").read_text() for f in files], "image": [str(f) for f in files]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "set")
    section = {"name": "hub", "path": str(tmp_path / "set"), "image_column": "image", "streaming": streaming}
    recipe = recipe_of(folder, pictures, data=section)
    backbone = build(recipe)
    stream, positions = recipe.data.open(backbone, 0), torch.arange(3)
    images = stream.images(positions)
    chosen = [files[rows["prompt"].index(prompt)] for prompt in stream.prompts(positions)]
    assert images is not None and torch.equal(images["image_latents"], encode_files(backbone, chosen)["image_latents"])


def test_pictures_are_cropped_to_the_shape_of_the_videos(folder: Path, pictures: Path, tmp_path: Path) -> None:
    backbone = build(recipe_of(folder, pictures))
    Image.new("RGB", (64, 128), "red").save(tmp_path / "tall.png")
    whole = Image.open(pictures / "0.png").resize((32, 16))
    whole.save(tmp_path / "exact.png")
    exact = torch.from_numpy(np.array(whole)).permute(2, 0, 1) / 255
    rows = encode_files(backbone, [tmp_path / "tall.png", tmp_path / "exact.png"])
    assert rows["image_latents"].shape == (2, *backbone.image_shapes()["image_latents"])
    assert torch.equal(rows["image_latents"][1:], backbone.encode_image(exact)["image_latents"])


def test_prepared_images_give_the_same_batches_without_any_encoder(
    folder: Path, pictures: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(folder, pictures)
    manifest = prepare(recipe, tmp_path / "prepared", shard_size=3)
    assert (manifest["num_pictures"], manifest["num_images"], manifest["only_images"]) == (COUNT, COUNT, True)
    assert not list((tmp_path / "prepared").glob("latents*"))
    source = PreparedData(folder=str(tmp_path / "prepared"))
    source.check(recipe.backbone)
    assert source.provides == {"images"}
    here, there = build(recipe), build(recipe)
    wanted = make_batch(recipe.data.open(here, 3), here, torch.arange(5), 1, frozenset())
    got = make_batch(source.open(there, 3), there, torch.arange(5), 1, frozenset())
    assert got.prompts == wanted.prompts
    for key in wanted.cond:
        bound = 2e-6 if key == "prompt_embeds" else 0.0  # images are encoded one by one, prompts in batches
        assert float((got.cond[key] - wanted.cond[key]).abs().max()) <= bound
        assert float((got.uncond[key] - wanted.uncond[key]).abs().max()) <= bound
    assert not {"text_pipeline", "vae", "image_encoder"} & vars(there).keys()
    assert prepare(recipe, tmp_path / "prepared", shard_size=3) == manifest
    wider = recipe_of(folder, pictures, backbone={"name": "wan_i2v", "path": str(folder)} | SIZE | {"height": 32})
    with pytest.raises(ValueError, match="picture_size"):
        source.check(wider.backbone)


def test_pairs_are_sampled_from_the_images_of_their_rows(folder: Path, pictures: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, pictures)
    prepare(recipe, tmp_path / "prepared", pairs=PairSettings(3, steps=2))
    source, backbone = PreparedData(folder=str(tmp_path / "prepared")), build(recipe)
    assert source.provides == {"images", "pairs"}
    stream, positions = source.open(backbone, 0), torch.arange(2)
    pairs, images = stream.pairs(positions), stream.images(positions)
    assert pairs is not None and images is not None
    cond, _ = backbone.encode_both(stream.prompts(positions), images)
    teacher, x = backbone.load("teacher"), pairs[0]
    levels = [*backbone.teacher_policy(2).timesteps, 0.0]
    with torch.no_grad():
        for t, s in pairwise(levels):
            x = x + (s - t) * teacher(x, torch.full((2,), t), cond, predict="flow_prediction")
    assert torch.allclose(x, pairs[1], atol=1e-4)


@pytest.mark.slow
def test_videos_give_their_first_pictures_and_their_latents(folder: Path, pictures: Path, tmp_path: Path) -> None:
    backbone_section = {"name": "wan_i2v", "path": str(folder)} | SIZE | {"height": 32}
    recipe = recipe_of(folder, pictures, backbone=backbone_section, data={"name": "moving_digits", "videos": 3})
    backbone = build(recipe)
    stream, positions = recipe.data.open(backbone, 0), torch.arange(2)
    batch = make_batch(stream, backbone, positions, 0, frozenset({"latents", "pixels"}))
    assert batch.pixels is not None and batch.latents is not None
    for i in range(2):
        alone = backbone.encode_image(batch.pixels[i, 0])
        assert torch.equal(batch.cond["image_latents"][i : i + 1], alone["image_latents"])
    manifest = prepare(recipe, tmp_path / "prepared")
    assert (manifest["num_images"], manifest["only_images"]) == (3, False)
    assert PreparedData(folder=str(tmp_path / "prepared")).provides == {"images", "latents"}


def test_what_lacks_an_image_is_refused_before_weights_load(folder: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="makes its samples from images, which data prompts does not provide"):
        recipe_of(folder, pictures, data={"name": "prompts", "prompts": ["a cat"]})
    with pytest.raises(RecipeError, match="needs latents, which data images does not provide but as images"):
        objective = {"name": "dmd2", "fake_updates": 1, "gan_weight": 0.01}
        optimizers = {role: {"lr": 1e-4} for role in ("student", "fake_score", "discriminator")}
        recipe_of(folder, pictures, objective=objective, optimizers=optimizers)
    section = {"metrics": ["throughput"], "num_samples": 2, "quick_num_samples": 2}
    with pytest.raises(RecipeError, match=r"eval\.images: backbone wan_i2v makes its samples from images"):
        recipe_of(folder, pictures, eval=section | {"prompts": ["a cat"]})
    plain = {"name": "wan", "path": str(tiny_wan(tmp_path / "wan"))} | SIZE
    with pytest.raises(RecipeError, match=r"eval\.images: backbone wan makes its samples from prompts alone"):
        recipe_of(folder, pictures, backbone=plain, data={"name": "prompts", "prompts": ["a cat"]})
    with pytest.raises(RecipeError, match=r"images: .* is not a readable image"):
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "a.png").write_bytes(b"no image")
        recipe_of(folder, pictures, eval=section | {"images": str(broken)})
    with pytest.raises(RecipeError, match=r"smaller than the backbone's 64x16 pixels"):
        recipe_of(folder, pictures, backbone={"name": "wan_i2v", "path": str(folder)} | SIZE | {"width": 64})


def test_samples_from_the_command_line_need_an_image_each_or_one_for_all(
    folder: Path, pictures: Path, tmp_path: Path
) -> None:
    prompts, files = ["a cat", "a dog"], [pictures / "0.png", pictures / "1.png"]

    def sample(images: list[Path], where: Path = folder) -> int:
        return sample_folder(where, prompts, None, 1, 0, tmp_path / "out", 1, 1.0, 2, None, images)

    with pytest.raises(ValueError, match="give --image"):
        sample([])
    with pytest.raises(ValueError, match="leave out --image"):
        sample(files, tiny_wan(tmp_path / "wan"))
    with pytest.raises(ValueError, match="3 images for 2 prompts"):
        sample([*files, files[0]])


@pytest.mark.slow
def test_the_plan_counts_the_image_encoder_and_what_networks_are_told(folder: Path, pictures: Path) -> None:
    planned = plan(recipe_of(folder, pictures))
    found = {c.name: c for c in planned.components}
    assert found["image_encoder"].parameters > 0 and "images" in found["image_encoder"].use
    assert planned.peak > 0


@pytest.mark.slow
def test_a_run_its_export_its_samples_and_its_evaluation(folder: Path, pictures: Path, tmp_path: Path) -> None:
    run = train(recipe_of(folder, pictures, tmp_path / "run"))
    card = (run / "export/README.md").read_text()
    assert 'image = load_image("picture.png").resize((32, 16))' in card and 'image, "a prompt", height=16' in card
    index = json.loads((run / "export/model_index.json").read_text())
    assert index["_class_name"] == "WanImageToVideoPipeline"
    prompts, image = ["a cat", "a dog"], pictures / "0.png"
    assert sample_folder(run, prompts, None, 2, 7, tmp_path / "out", None, None, 3, None, [image]) == 4
    sampler = load_sampler(run)
    images = encode_files(sampler.backbone, [image, image])
    assert sampler.sample(prompts, [7, 9], images).shape == (2, 5, 3, 16, 32)
    row = evaluate_path(run, output=tmp_path / "results.json", progress=False)
    assert row["num_samples"] == 3 and len(row["images_sha256"]) == 64
    with pytest.raises(ValueError, match=r"give eval\.images"):
        evaluate_path(folder, metrics="throughput", num_samples=2, prompts=pictures / "0.txt", progress=False)
