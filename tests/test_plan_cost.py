"""What a plan says of time: operations as torch counts them, and what follows from a stated speed."""

import dataclasses
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastgen.config import load_recipe
from fastgen.planning.cost import Speed, cost_lines, operations
from fastgen.planning.plan import CONTEXT, Plan, plan
from fastgen.planning.report import Change, changes, report_advice
from fastgen.planning.weightless import LiveBytes, empty, weightless

MIXTURE = Path(__file__).parents[1] / "recipes/mixture_dmd2_4step.yaml"


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).flatten(2).mT)


def test_operations_are_those_that_torch_counts() -> None:
    """On tensors with values and without. Forward and backward; attention by its closed form, 4 B H N^2 D forward and
    10 B H N^2 D backward (two products again, and five more of which each is half as large as a forward)."""
    network, x = Small(), torch.randn(2, 3, 6, 6, requires_grad=True)
    with FlopCounterMode(display=False) as theirs:
        network(x).square().sum().backward()
    with LiveBytes() as ours:
        network(x).square().sum().backward()
    with LiveBytes() as empty_ones:
        weightless(network)(empty(2, 3, 6, 6).requires_grad_()).square().sum().backward()
    assert ours.flops == empty_ones.flops == theirs.get_total_flops() > 0
    q, k, v = (torch.randn(2, 4, 16, 8, requires_grad=True) for _ in range(3))
    with LiveBytes() as forward:
        out = F.scaled_dot_product_attention(q, k, v)
    with LiveBytes() as backward:
        out.sum().backward()
    assert forward.flops == 4 * 2 * 4 * 16**2 * 8
    assert backward.flops == 10 * 2 * 4 * 16**2 * 8


@pytest.fixture(scope="module")
def found() -> Plan:
    return plan(load_recipe(MIXTURE, ["train.steps=100"]), gpus=4)


def test_a_stated_speed_gives_time_and_price(found: Plan) -> None:
    """Operations grow with the batch and the micro-batches; 200 TFLOP at half of 100 TFLOP/s take 4 s."""
    total = operations(found)
    twice = dataclasses.replace(found.recipe.train, accumulate=2 * found.recipe.train.accumulate)
    more = dataclasses.replace(found, recipe=dataclasses.replace(found.recipe, train=twice))
    assert operations(more) == 2 * total > 0
    parameters = next(r.parameters for r in found.roles if r.name == "student")
    fewest = 2 * parameters * found.recipe.train.batch_size * found.recipe.train.accumulate
    print(f"{total / fewest:.0f} forward passes")
    assert 10 * fewest < total < 100 * fewest  # four turns, with backward passes and two networks besides the student
    part = dataclasses.replace(found.turns[0], operations=200e12 / found.turns[0].turn.updates)
    simple = dataclasses.replace(found, turns=(part,))
    simple = dataclasses.replace(
        simple,
        recipe=dataclasses.replace(found.recipe, train=dataclasses.replace(found.recipe.train, accumulate=1)),
    )
    text = "\n".join(cost_lines(simple, Speed(100, 0.5, price=9.0)))
    assert (
        "200 TFLOP" in text and "At 50% of 100 TFLOP/s: 4 seconds an update, 0.111 hours and 0.444 GPU hours" in text
    )
    assert "the run costs 4." in text
    assert "--tflops" in cost_lines(simple, None)[-1]


def test_a_recipe_fits_with_headroom_and_a_context_or_not_at_all(found: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peak as large as the memory does not fit."""
    asked: list[float] = []

    def no_advice(_: Plan, memory: float) -> None:
        asked.append(memory)
        raise LookupError

    monkeypatch.setattr("fastgen.planning.report.advise", no_advice)
    console = Console(record=True, file=io.StringIO(), width=200)
    enough = (found.peak + CONTEXT) / 0.95 + 1
    report_advice(found, enough, console)
    assert "It fits" in console.export_text() and not asked
    for memory in (enough - 10, float(found.peak)):
        with pytest.raises(LookupError):
            report_advice(found, memory, console)
        assert "It does not fit" in console.export_text()
    assert asked[0] < found.peak
    report_advice(found, found.peak + CONTEXT + 1, console, headroom=0.0)
    assert "It fits" in console.export_text()


def test_networks_are_divided_before_something_else_is_trained(project: Path) -> None:
    """Of changes with as many lines, the first that fits is advised."""
    lines = [change.lines for change in changes(load_recipe(project / "recipes/sdxl_dmd2_4step.yaml"), 8, 1)]
    assert lines.index(("train.strategy=fsdp",)) < len(lines) - 1 and lines[-1][0].startswith("lora.student=")
    assert not Change(lines[-2]).goes_with(Change(lines[-3])) and Change(lines[-1]).goes_with(Change(lines[-2]))
