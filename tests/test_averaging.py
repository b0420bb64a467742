"""Gradients averaged while the backward pass runs: the means of all processes, whatever each of them reaches."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from processes import in_processes
from safetensors.torch import load_file
from torch import nn

from fastgen.config import load_recipe
from fastgen.run import checkpoint
from fastgen.run.averaging import Overlap, average_gradients, buckets_of
from fastgen.train import train


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 2))


def gradients(folder: Path) -> None:
    """In each process: rank 1 does not reach layer 1, and no process reaches layer 3. What was sent before the end of
    the backward pass, and the largest difference from averaging after it."""
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(rank))
    found = []
    for overlapped in (False, True):
        layers = network()
        overlap = Overlap(layers.parameters(), most=40)
        for part in x.split(3):
            hidden = layers[0](part)
            out = layers[2](hidden if rank == 1 else layers[1](hidden)).square().sum()
            if overlapped and len(part) == 2:  # the last micro-batch
                with overlap:
                    out.backward()
            else:
                out.backward()
        early = len(overlap.started)
        if overlapped:
            overlap.finish(accelerator)
        else:
            average_gradients(layers.parameters(), accelerator)
        found.append([p.grad for p in layers.parameters()])
    reached = [g is not None for g in found[1]]
    error = max(float((a - b).abs().max()) for a, b in zip(*found, strict=True) if a is not None)
    (folder / f"{rank}.json").write_text(json.dumps([early, reached, error]))


def test_processes_that_reach_different_layers_average_the_same(tmp_path: Path) -> None:
    in_processes(tmp_path, 2, gradients, tmp_path)
    for rank in range(2):
        early, reached, error = json.loads((tmp_path / f"{rank}.json").read_text())
        assert reached == [True] * 6 + [False] * 2 and error < 1e-7
        assert early == 0  # the last layer, which nobody reaches, comes first


def sent_early(folder: Path) -> None:
    Accelerator(cpu=True)
    layers = network()
    with (overlap := Overlap(layers.parameters(), most=40)):
        loss = layers(torch.ones(2, 3)).sum()
        loss.backward(retain_graph=True)
        early = len(overlap.started)
        try:
            loss.backward()
            twice = "nothing"
        except RuntimeError as error:
            twice = str(error)
    if torch.distributed.get_rank() == 0:
        (folder / "early.json").write_text(json.dumps([early, len(overlap.buckets), twice]))


def test_buckets_are_sent_in_the_backward_pass_and_once(tmp_path: Path) -> None:
    in_processes(tmp_path, 2, sent_early, tmp_path)
    early, buckets, twice = json.loads((tmp_path / "early.json").read_text())
    assert early == buckets > 2 and "accumulated twice" in twice


def run(recipe: Path, folder: Path, batch_size: int) -> None:
    """A short run in double precision, two micro-batches an update."""
    small = ("train.dtype=float64", "train.sample_every=0", "train.eval_every=0", "train.checkpoint_every=3")
    sizes = ("health.num_samples=4", "eval.quick_num_samples=20", "eval.metrics=[throughput]", "train.steps=3")
    fit = ("backbone.fit_steps=2", "train.accumulate=2", "train.device=cpu", "eval.teacher_steps=[2]")
    train(load_recipe(recipe, [*small, *sizes, *fit, f"train.batch_size={batch_size}", f"output_dir={folder}"]))


@pytest.mark.slow
def test_two_processes_train_as_one(mixture_recipe: Path, tmp_path: Path) -> None:
    run(mixture_recipe, tmp_path / "one", 4)
    in_processes(tmp_path, 2, run, mixture_recipe, tmp_path / "two", 2)
    one, two = (checkpoint.complete(tmp_path / name / "checkpoints")[-1] for name in ("one", "two"))
    error = 0.0
    for file in one.glob("*.safetensors"):
        a, b = load_file(file), load_file(two / file.name)
        error = max([error, *(float((a[k].double() - b[k].double()).abs().max()) for k in a)])
    print(f"largest difference {error:.2g}")
    assert error < 1e-12


@pytest.mark.parametrize("most", [1, 40, 1 << 20])
def test_buckets_hold_every_parameter_once_from_last_to_first(most: int) -> None:
    parameters = [*network().parameters(), nn.Parameter(torch.zeros(3, dtype=torch.float64))]
    found = buckets_of(parameters, most)
    assert [p for bucket in found for p in bucket] == parameters[::-1]
    assert all(len({p.dtype for p in bucket}) == 1 for bucket in found)
