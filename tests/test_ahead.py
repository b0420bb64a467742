"""Batches that are made ahead: order, threads and errors, and runs that do not depend on how many are."""

import json
import threading
from pathlib import Path

import pytest
import torch
from oracles import GAUSSIAN
from PIL import Image
from safetensors.torch import load_file

from fastgen.batch import Batch, Conditioning
from fastgen.config import load_recipe
from fastgen.data import DataError
from fastgen.data.ahead import Ahead
from fastgen.data.images import read_image
from fastgen.data.samples import Samples, SampleStream
from fastgen.run.checkpoint import complete
from fastgen.train import train

PLENTY = 60  # seconds until a test gives up


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
