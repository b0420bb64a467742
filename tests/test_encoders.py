"""The memory of text encoders: their precision, their time on the device, and what a plan says of both."""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import tiny_sdxl
from torch import nn

from fastgen.backbones import pipeline as pipeline_module
from fastgen.backbones import prompt_table
from fastgen.backbones.encoders import Once, on_device
from fastgen.backbones.prompt_table import PromptTable
from fastgen.backbones.sd import SD, SDConfig
from fastgen.batch import Conditioning
from fastgen.config import load_recipe
from fastgen.data.prepared import identity
from fastgen.planning.plan import plan
from fastgen.planning.report import Variants, changes
from fastgen.run.prepared_files import encode_prompts

CPU = torch.device("cpu")
PROMPTS = ["a red cat", "", "two green dogs"]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


def build(folder: Path, **options: Any) -> SD:
    return SDConfig(path=str(folder), resolution=1032, **options).build(CPU, torch.float32, 0)


def encoders(backbone: SD) -> list[nn.Module]:
    return [backbone.text_pipeline.text_encoder, backbone.text_pipeline.text_encoder_2]


def test_prompts_are_encoded_once_while_the_table_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a table that is full, those that were asked for last stay; the rows of one batch may be more than fit."""
    asked = list[str]()

    def encode(prompts: list[str]) -> Conditioning:
        asked.extend(prompts)
        return Conditioning({"length": torch.tensor([[float(len(p))] for p in prompts])})

    monkeypatch.setattr(prompt_table, "TABLE_BYTES", 3 * 4)  # three rows
    table = PromptTable(encode, lambda rows: rows, CPU, torch.float32)
    assert table.rows(["", "a", "", "bb"])["length"].flatten().tolist() == [0, 1, 0, 2]
    table.rows(["", "ccc"])
    assert asked == ["", "a", "bb", "ccc"]
    table.rows(["", "bb", "a"])
    assert asked == ["", "a", "bb", "ccc", "a"]
    words = ["d", "ee", "fff", "gggg", "d"]
    assert table.rows(words)["length"].flatten().tolist() == [len(word) for word in words]
    table.rows(["fff", "gggg"])
    assert asked[5:] == ["d", "ee", "fff", "gggg"]


def test_a_warning_of_every_prompt_is_said_once() -> None:
    once = Once("truncated")
    records = [logging.makeLogRecord({"msg": text}) for text in ("was truncated: a", "other", "was truncated: b")]
    assert [once.filter(record) for record in records] == [True, True, False]


def test_encoders_have_a_precision_of_their_own(folder: Path) -> None:
    """What they encode has the run's; sizes, which bfloat16 would round, are exact."""
    whole, half = build(folder), build(folder, encoder_dtype="bfloat16")
    assert {p.dtype for e in encoders(half) for p in e.parameters()} == {torch.bfloat16}
    assert {p.dtype for e in encoders(whole) for p in e.parameters()} == {torch.float32}
    wanted, got = whole.encode_prompts(PROMPTS), half.encode_prompts(PROMPTS)
    errors = {key: float((got[key] - wanted[key]).abs().max()) for key in wanted}
    print(errors)
    assert all(value.dtype == torch.float32 for value in got.values())
    assert 0 < errors["prompt_embeds"] < 0.1 and torch.equal(got["time_ids"], wanted["time_ids"])
    assert got["time_ids"][0, 0] == 1032


def test_prepared_embeddings_belong_to_the_precision_of_their_encoders(folder: Path) -> None:
    config = SDConfig(path=str(folder))
    assert "encoder_dtype" not in identity(config, images=False)["backbone"]
    half = identity(SDConfig(path=str(folder), encoder_dtype="bfloat16"), images=False)
    assert half["backbone"]["encoder_dtype"] == "bfloat16"


def test_offloaded_encoders_are_on_the_device_only_while_they_encode(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New prompts of a batch need one turn; prompts that are known need none."""
    backbone, inside, turns = build(folder, encoders="offload"), False, 0
    wanted = build(folder).encode_prompts(PROMPTS)
    networks = encoders(backbone)

    @contextmanager
    def watched(pipeline: Any, device: torch.device) -> Iterator[None]:
        nonlocal inside, turns
        with on_device(pipeline, device):
            inside, turns = True, turns + 1
            yield
        inside = False

    def seen(*_: object) -> None:
        assert inside

    for network in networks:
        network.register_forward_pre_hook(seen)
    monkeypatch.setattr(pipeline_module, "on_device", watched)
    found = backbone.encode_prompts(PROMPTS)
    backbone.encode_prompts(PROMPTS[:2])
    assert turns == 1
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)

    class Bar:
        def update(self, count: int) -> None:
            pass

    encode_prompts(backbone, PROMPTS, torch.float32, {}, Bar())
    assert turns == 2


@pytest.mark.slow
def test_a_plan_counts_encoders_when_they_are_there(folder: Path) -> None:
    """Held, halved, or beside the gradients while prompts are encoded; and the changes that it advises are these."""
    base = [f"backbone.path={folder}", "train.accumulate=2"]
    half, turn = ["backbone.encoder_dtype=bfloat16"], ["backbone.encoders=offload", "train.prefetch=0"]
    plans = [
        plan(load_recipe(ROOT / "recipes/sdxl_dmd2_4step.yaml", [*base, *more]), activations=False)
        for more in ([], half, [*half, *turn])
    ]
    held, halved, offloaded = plans
    encoders = sum(c.held for c in held.components if c.is_encoder)
    near = partial(pytest.approx, rel=0.01)  # a few integers are not halved
    assert held.held - halved.held == near(encoders / 2) == halved.held - offloaded.held
    gradients = max(sum(r.gradients for r in held.roles if r.name in p.turn.roles) for p in held.turns)
    assert offloaded.moments["encoding prompts"] == near(offloaded.held + encoders / 2 + gradients)
    assert "encoding prompts" not in held.moments
    train = dataclasses.replace(offloaded.recipe.train, prefetch=1)
    ahead = dataclasses.replace(offloaded, recipe=dataclasses.replace(offloaded.recipe, train=train))
    assert ahead.moments["turn student"] - offloaded.moments["turn student"] == near(encoders / 2)
    options = changes(held.recipe, 1, encoders)
    known = {option.lines: option for option in options}
    variant = Variants(held).plan([known[tuple(half)], known[tuple(turn)]], whole=False)
    assert variant.moments == near(offloaded.moments)
    assert not [option for option in changes(offloaded.recipe, 1, 0) if option.encoders]
