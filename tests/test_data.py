"""Data sources: random access, every epoch its own order, and folders checked before weights load."""

from pathlib import Path

import pytest
import torch
from torchvision.utils import save_image

from fastgen.backbones.sd3 import SD3, SD3Config
from fastgen.config import RecipeError, load_recipe
from fastgen.data import ImageData, PromptData, make_batch, shuffled
from fastgen.digits import assets_dir, label_of, load_digits, prompt_for
from fastgen.train import train

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def backbone() -> SD3:
    return SD3Config(path=str(assets_dir() / "teachers/digits")).build(torch.device("cpu"), torch.float32, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training digits as a user would bring them: pictures with captions."""
    path = tmp_path_factory.mktemp("images")
    pixels, labels = load_digits("train")
    for i in range(8):
        save_image(pixels[i], path / f"{i}.png")
        (path / f"{i}.txt").write_text(prompt_for(int(labels[i])) + "\n")
    return path


def test_every_epoch_visits_every_row_once_in_its_own_order() -> None:
    order = shuffled(torch.arange(30), 10, key=3)
    epochs = order.reshape(3, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(shuffled(torch.tensor([17, 4]), 10, key=3), order[[17, 4]])


def test_a_folder_gives_its_pictures_with_their_own_captions(backbone: SD3, folder: Path) -> None:
    stream = ImageData(folder=str(folder)).open(backbone, seed=0)
    batch = make_batch(stream, backbone, torch.arange(8), 1, frozenset({"latents"}))
    assert batch.latents is not None and batch.latents.shape == (8, *backbone.latent_shape)
    pixels, labels = load_digits("train")
    shown = backbone.decode(batch.latents)
    for image, prompt in zip(shown, batch.prompts, strict=True):
        nearest = int((pixels[:8] - image).square().flatten(1).mean(1).argmin())
        assert int(labels[nearest]) == label_of(prompt)


def test_pictures_of_another_size_are_brought_to_the_resolution(backbone: SD3, tmp_path: Path) -> None:
    save_image(torch.rand(3, 50, 70), tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a seven")
    batch = make_batch(
        ImageData(folder=str(tmp_path)).open(backbone, 0), backbone, torch.arange(2), 1, frozenset({"latents"})
    )
    assert batch.latents is not None and batch.latents.shape == (2, *backbone.latent_shape)


def test_the_gan_trains_on_a_folder_of_images(folder: Path, tmp_path: Path) -> None:
    overrides = ["train.steps=1", "train.batch_size=4", "train.eval_every=0", "train.sample_every=0",
                 f"data={{name: images, folder: {folder}}}", "objective.gan_weight=0.01", "objective.fake_updates=1",
                 "optimizers.discriminator={lr: 2e-4}", "eval.quick_num_samples=4", "eval.metrics=[accuracy]",
                 "eval.teacher_steps=[2]", f"output_dir={tmp_path / 'run'}"]  # fmt: skip
    assert (
        train(load_recipe(ROOT / "recipes/digits_quickstart.yaml", overrides)) / "export/model_index.json"
    ).is_file()


def test_prompts_come_from_a_file_or_a_list(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a one\n\n a two \n")
    stream = PromptData(prompts=str(tmp_path / "prompts.txt")).open(None, 0)  # type: ignore[arg-type]
    assert sorted(stream.prompts(torch.arange(2))) == ["a one", "a two"]
    assert stream.latents(torch.arange(2)) is None
    assert PromptData(prompts=("a three",)).open(None, 0).prompts(torch.arange(2)) == ["a three"] * 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("{name: images, folder: nowhere}", "no image folder"),
        ("{name: images, folder: docs}", "holds no png"),
        ("{name: images, folder: assets}", "have no caption"),
        ("{name: prompts, prompts: nowhere.txt}", "no prompt file"),
        ("{name: prompts, prompts: []}", "no prompts"),
    ],
)
def test_missing_data_is_refused_before_weights_load(data: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(RecipeError, match=words):
        load_recipe("recipes/digits_dmd2_4step.yaml", [f"data={data}"])
