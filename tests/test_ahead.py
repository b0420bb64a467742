"""Batches that are made ahead, and files that are read ahead: order, threads, memory and errors, and runs that do not
depend on them."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from oracles import GAUSSIAN
from PIL import Image
from safetensors.torch import load_file
from torchvision.utils import save_image

from fastgen.batch import Batch, Conditioning
from fastgen.config import load_recipe
from fastgen.data import DataError
from fastgen.data.ahead import Ahead
from fastgen.data.digits import load_digits
from fastgen.data.images import read_image
from fastgen.data.readers import Readers
from fastgen.data.samples import Samples, SampleStream
from fastgen.noise import make_key
from fastgen.recipe import Recipe
from fastgen.run.build import batches
from fastgen.run.checkpoint import complete
from fastgen.train import train

PLENTY = 60  # seconds until a test gives up
DIGITS_RECIPE = Path(__file__).parents[1] / "recipes/digits_dmd2_4step.yaml"


def numbered(first: int) -> Batch:
    return Batch(torch.tensor([first]), 0, Conditioning(), Conditioning(), (1,))


def test_batches_come_by_position_and_each_is_made_once() -> None:
    made = list[int]()

    def make(first: int) -> Batch:
        made.append(first)
        return numbered(first)

    ahead = Ahead(make, stride=10, count=2)
    for update in (0, 20, 20, 40):  # two micro-batches each; one update sees its samples twice
        for first in (update, update + 10):
            assert int(ahead.batch(first, keep=update).ids) == first
    ahead.close()
    assert made == sorted(set(made))
    assert max(made) <= 70


def test_the_next_batch_is_made_while_the_present_one_is_used() -> None:
    made = {first: threading.Event() for first in range(0, 40, 10)}
    threads = set[str]()

    def make(first: int) -> Batch:
        threads.add(threading.current_thread().name)
        made[first].set()
        return numbered(first)

    ahead = Ahead(make, stride=10, count=1)
    ahead.batch(0, keep=0)
    assert made[10].wait(PLENTY)
    assert not made[20].is_set()
    ahead.close()
    assert threads == {"batches_0"}

    alone = Ahead(make, stride=10, count=0)
    alone.batch(20, keep=20)
    alone.close()
    assert made[20].is_set()
    assert not made[30].is_set()
    assert threading.current_thread().name in threads


def test_an_error_is_raised_where_its_batch_is_asked_for() -> None:
    def make(first: int) -> Batch:
        if first == 10:
            raise DataError("sample 10 cannot be read")
        return numbered(first)

    ahead = Ahead(make, stride=10, count=3)
    assert int(ahead.batch(0, keep=0).ids) == 0
    with pytest.raises(DataError, match="sample 10"):
        ahead.batch(10, keep=10)
    assert int(ahead.batch(20, keep=20).ids) == 20
    ahead.close()


def test_pictures_are_read_side_by_side_and_stay_in_order(tmp_path: Path) -> None:
    for i in range(6):
        Image.new("RGB", (8, 8), (i * 40, 0, 0)).save(tmp_path / f"{i}.png")
    together = threading.Barrier(3)  # passes only if three pictures are read at a time

    def read(i: int) -> torch.Tensor:
        together.wait(PLENTY)
        return read_image(tmp_path / f"{i}.png", (8, 8), str(i), False)

    backbone = GAUSSIAN.build(torch.device("cpu"), torch.float32, 0)
    stream = SampleStream(Samples(list("abcdef"), torch.arange(6), read), backbone, key=1)
    positions = torch.arange(6)
    pixels, rows = stream.pixels(positions), stream.rows(positions)
    assert pixels is not None
    assert torch.allclose(pixels[:, 0, 0, 0], rows * 40 / 255)
    assert sorted(rows.tolist()) == list(range(6))


def test_few_of_many_files_are_in_memory_at_a_time() -> None:
    begun, taken, most = 0, 0, 0
    lock = threading.Lock()

    def read(item: int) -> int:
        nonlocal begun, most
        with lock:
            begun += 1
            most = max(most, begun - taken)
        return item * item

    found = list[int]()
    for value in Readers(2).each(read, range(40)):
        taken += 1
        found.append(value)
    assert found == [item * item for item in range(40)]
    assert most <= 4


def test_an_error_in_a_reader_is_raised_in_the_place_of_its_file() -> None:
    begun = list[int]()

    def read(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise DataError("file 3 cannot be read")
        return item

    values = Readers(2).each(read, range(40))
    assert [next(values) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="file 3"):
        next(values)
    assert max(begun) <= 7
    assert list(Readers(1).each(read, [4, 5])) == [4, 5]


CAPTIONS = ("a three", "the digit four", "", "a five, written by hand in a hurry", "a six, number 17", "a seven")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits with captions of several lengths."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, caption in enumerate(CAPTIONS):
        save_image(load_digits("train")[0][i], folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def digits(pictures: Path, folder: Path, **train: object) -> Recipe:
    """DMD2 with a GAN on these pictures."""
    options = {"steps": 4, "batch_size": 2, "log_every": 1, "sample_every": 0, "checkpoint_every": 2} | train
    overrides = {
        "data": f"{{name: images, folder: {pictures}}}",
        "objective": "{name: dmd2, gan_weight: 0.01, fake_updates: 1}",
        "optimizers": "{student: {lr: 1e-4}, fake_score: {lr: 4e-4}, discriminator: {lr: 2e-4}}",
        "rollout": "{timesteps: [1.0, 0.5]}",
        "train": "{" + ", ".join(f"{key}: {value}" for key, value in options.items()) + "}",
        "eval": "{metrics: [accuracy], num_samples: 1, quick_num_samples: 1, reference: digits, teacher_steps: [1]}",
        "health.every": 0,
        "output_dir": folder,
    }
    return load_recipe(DIGITS_RECIPE, [f"{key}={value}" for key, value in overrides.items()])


def opened(recipe: Recipe) -> Ahead:
    """The batches of a run that begins, or continues, with this recipe."""
    backbone = recipe.backbone.build(torch.device("cpu"), torch.float32, 0)
    stream = recipe.data.open(backbone, recipe.seed, readers=recipe.train.readers)
    return batches(recipe, Accelerator(cpu=True), backbone, stream)


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    assert batch.latents is not None
    return {**batch.cond, **{f"uncond.{k}": v for k, v in batch.uncond.items()}, "latents": batch.latents}


@pytest.mark.parametrize(("prefetch", "readers"), [(1, 1), (3, 4)])
def test_batches_have_the_same_bits_however_they_are_made(
    prefetch: int, readers: int, pictures: Path, tmp_path: Path
) -> None:
    """Also after a new start at the third of them."""
    alone = opened(digits(pictures, tmp_path, prefetch=0, readers=1))
    wanted = [tensors(alone.batch(first, first)) for first in range(0, 14, 2)]
    for start in (0, 4):
        ahead = opened(digits(pictures, tmp_path, prefetch=prefetch, readers=readers))
        for first in range(start, 14, 2):
            found = tensors(ahead.batch(first, first))
            assert found.keys() == wanted[first // 2].keys()
            assert all(torch.equal(found[key], value) for key, value in wanted[first // 2].items())
        ahead.close()


def test_real_data_are_encoded_while_prompts_are_once_their_networks_are_loaded(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = list[str]()

    def latents(*_: object) -> torch.Tensor:
        threads.append(threading.current_thread().name)
        return torch.zeros(2, 1)

    monkeypatch.setattr(SampleStream, "latents", latents)
    ahead = opened(digits(pictures, tmp_path, prefetch=0))
    for first in (0, 2):
        ahead.batch(first, first)
    assert threads == [threading.current_thread().name, "real data_0"]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_picture_that_cannot_be_read_is_missed_at_its_batch(prefetch: int, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "copy")
    ahead = opened(digits(tmp_path / "copy", tmp_path, prefetch=prefetch))
    backbone = GAUSSIAN.build(torch.device("cpu"), torch.float32, 0)
    rows = SampleStream(Samples(CAPTIONS), backbone, make_key(0, "data")).rows(torch.arange(6)).tolist()
    (tmp_path / f"copy/{rows[5]}.png").write_bytes(b"\x89PNG")
    for first in (0, 2):
        ahead.batch(first, first)
    with pytest.raises(DataError, match=rf"{rows[5]}\.png"):
        ahead.batch(4, 4)
    ahead.close()


@pytest.mark.slow
def test_a_run_with_pictures_ends_with_the_same_bits_however_it_is_continued(pictures: Path, tmp_path: Path) -> None:
    """Whole with every batch made when it is asked for; and stopped, with others ahead and other readers."""
    whole = train(digits(pictures, tmp_path / "whole", prefetch=0, readers=1))
    train(digits(pictures, tmp_path / "parts", steps=2, prefetch=3, readers=2))
    parts = train(digits(pictures, tmp_path / "parts", prefetch=1))
    one, other = (load_file(complete(run / "checkpoints")[-1] / "ema.safetensors") for run in (whole, parts))
    assert all(torch.equal(other[name], value) for name, value in one.items())


@pytest.mark.slow
def test_a_run_does_not_depend_on_how_many_batches_are_made_ahead(mixture_recipe: Path, tmp_path: Path) -> None:
    """With real data, micro-batches and one rollout for several updates: its weights and its log are the same."""
    ended = []
    for prefetch in (0, 1, 3):
        overrides = {
            "train": "{steps: 3, batch_size: 8, accumulate: 2, log_every: 1, sample_every: 0, eval_every: 0}",
            "train.prefetch": prefetch,
            "objective": "{name: dmd2, gan_weight: 0.01, fake_updates: 2, share_rollout: true}",
            "optimizers.discriminator": "{lr: 2e-4}",
            "eval.num_samples": 20,
            "eval.quick_num_samples": 20,
            "health.every": 0,
            "backbone.fit_steps": 2,
            "output_dir": tmp_path / str(prefetch),
        }
        run = train(load_recipe(mixture_recipe, [f"{key}={value}" for key, value in overrides.items()]))
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        weights = load_file(complete(run / "checkpoints")[-1] / "ema.safetensors")
        ended.append(
            (weights, [{k: v for k, v in row.items() if k not in ("seconds_per_step", "memory_mb")} for row in rows])
        )
    for weights, rows in ended[1:]:
        assert all(torch.equal(weights[name], value) for name, value in ended[0][0].items())
        assert rows == ended[0][1]
