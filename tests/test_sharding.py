"""What sharded networks communicate, counted at the collectives, and hybrid sharding against the flat one."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from measure_collectives import measure_all
from processes import in_processes
from tiny_pipelines import tiny_sd
from tiny_wan import tiny_wan

from fastgen.batch import Conditioning
from fastgen.config import build_recipe, load_recipe
from fastgen.networks import frozen
from fastgen.registry import RecipeError
from fastgen.run.build import build
from fastgen.run.distributed import check_shard_group, start

DIGITS = Path(__file__).parents[1] / "recipes/digits_dmd2_4step.yaml"
SD = {"name": "sd", "resolution": 32}
WAN = {"name": "wan", "height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16}


def case(backbone: dict[str, Any], objective: dict[str, Any] | None = None, updates: int = 1, **train: Any) -> Any:
    """One update, or a few, of two-step DMD2 with guidance, sharded."""
    options = {"strategy": "fsdp", "steps": updates, "batch_size": 1, "device": "cpu", "num_samples": 1}
    recipe = {
        "output_dir": "unused",
        "backbone": backbone,
        "rollout": {"timesteps": [1.0, 0.5]},
        "data": {"name": "prompts", "prompts": ["a cat runs", "a red dog sleeps"]},
        "objective": {"name": "dmd2", "guidance_scale": 2.0, "fake_updates": 1, "stops": "shared"} | (objective or {}),
        "optimizers": {"student": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}},
        "train": options | train,
        "eval": {"metrics": ["throughput"], "num_samples": 2, "quick_num_samples": 2, "prompts": ["a cat runs"]},
    }
    return recipe, updates


def measured(folder: Path, processes: int, cases: Sequence[Any]) -> list[Any]:
    """What `measure_all` finds for each of the cases."""
    in_processes(folder, processes, measure_all, folder / "result.json", cases)
    return json.loads((folder / "result.json").read_text())


def check_least(found: dict[str, Any]) -> None:
    """At most 1.1 times the least calls and bytes. Shards of uneven tensors are padded."""
    for turn in ("fake_score", "student"):
        for kind in ("gather", "reduce"):
            calls, size, fewest, least = found[turn][kind]
            print(f"{turn} {kind}: {calls} calls ({fewest}), {size} bytes ({least})")
            assert fewest <= calls <= 1.1 * fewest and least <= size <= 1.1 * least
    assert found["remembered"] == 0


@pytest.mark.slow
def test_two_processes_gather_and_reduce_the_least(tmp_path: Path) -> None:
    """A UNet block by block in bfloat16, with two micro-batches and checkpointing."""
    sd = SD | {"path": str(tiny_sd(tmp_path / "sd"))}
    (found,) = measured(tmp_path, 2, [case(sd, accumulate=2, mixed_precision="bf16", gradient_checkpointing=True)])
    check_least(found)


@pytest.mark.slow
def test_copies_of_sharded_networks_train_as_one_copy(tmp_path: Path) -> None:
    """Four processes: two copies on two processes each, against one copy on all four. What each copy reduces is
    averaged between the copies."""
    wan = WAN | {"path": str(tiny_wan(tmp_path / "wan", layers=1))}
    flat, hybrid = measured(
        tmp_path, 4, [case(wan, accumulate=2, dtype="float64", **more) for more in ({}, {"shard_group": 2})]
    )
    for found in (flat, hybrid):
        check_least(found)
    print(f"largest difference {hybrid['difference']:.2g}")
    assert hybrid["difference"] < 1e-12
    assert hybrid["student"]["all_reduce"] == flat["student"]["all_reduce"] + hybrid["student"]["reduce"][0]


@pytest.mark.slow
def test_one_reduction_an_update_is_that_of_every_micro_batch(tmp_path: Path) -> None:
    """Of adapters on a sharded base: the same weights, with a third of the reductions."""
    wan = WAN | {"path": str(tiny_wan(tmp_path / "wan", layers=1))}
    cases = [case(wan, accumulate=3, dtype="float64", reduce_gradients=when) for when in ("update", "micro_batch")]
    for recipe, _ in cases:
        recipe["lora"] = {"student": {"rank": 2}, "fake_score": {"rank": 2}}
    once, often = measured(tmp_path, 2, cases)
    print(f"largest difference {often['difference']:.2g}")
    assert often["difference"] < 1e-12
    for turn in ("fake_score", "student"):
        assert often[turn]["reduce"][:2] == [3 * n for n in once[turn]["reduce"][:2]]
        assert once[turn]["reduce"][0] == 1  # of the block, which alone has adapters


def test_inputs_of_an_adapter_are_sharded_with_its_base(tmp_path: Path) -> None:
    """Otherwise their gradients would be clipped and stepped together with those of shards, which torch refuses."""
    wan = WAN | {"path": str(tiny_wan(tmp_path / "wan", layers=1))}
    recipe, updates = case(wan, {"condition_on_stop": True})
    recipe["lora"] = {"student": {"rank": 2}, "fake_score": {"rank": 2}}
    (found,) = measured(tmp_path, 2, [(recipe, updates)])
    assert found["fake_score"]["reduce"][0] == 2  # of the block's adapters, and of the table
    assert found["student"]["reduce"][0] == 1


def through_a_frozen_adapter(recipe: dict[str, Any]) -> None:
    built = build_recipe(recipe)
    fake = build(built, start(built)).networks.fake_score
    x = torch.ones(1, 2, 4, 4, 4, requires_grad=True)
    cond = Conditioning(prompt_embeds=torch.ones(1, 16, 16))
    with frozen(fake):
        out = fake(x, torch.full((1,), 0.5), cond)
    out.square().sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    assert all(p.requires_grad and p.grad is None for p in fake.parameters())


def test_a_frozen_adapter_is_frozen_where_it_is_recomputed(tmp_path: Path) -> None:
    """As the generator's side of DMD2's GAN is, in blocks that are whole while the backward pass is in them."""
    wan = WAN | {"path": str(tiny_wan(tmp_path / "wan", layers=1))}
    recipe, _ = case(wan, gradient_checkpointing=True)
    recipe["lora"] = {"student": {"rank": 2}, "fake_score": {"rank": 2}}
    in_processes(tmp_path, 2, through_a_frozen_adapter, recipe)


@pytest.mark.slow
def test_one_expert_an_update_on_all_processes(tmp_path: Path) -> None:
    """As Wan 2.2 A14B: every turn calls one expert of each network, and computes the rows that are wanted: of the
    student's steps, the fake score, and the teacher with and without the prompt."""
    wan = WAN | {"path": str(tiny_wan(tmp_path / "wan", experts=2, layers=1))}
    (found,) = measured(tmp_path, 2, [case(wan, {"stops": "shared"}, updates=2, batch_size=2)])
    check_least(found)
    steps = found["fake_score"]["evaluations"] - 1  # of the student's rollout
    assert steps in (1, 2) and found["student"]["evaluations"] in (1 + 3, 2 + 3)
    blocks = 1 + 1  # and what an expert has outside its blocks
    assert found["student"]["reduce"][0] == blocks  # of one expert


@pytest.mark.parametrize(
    ("count", "strategy", "words"),
    [(6, "fsdp", "no whole groups of 4"), (4, "ddp", "only with train.strategy: fsdp"), (8, "fsdp", None)],
)
def test_groups_are_whole(count: int, strategy: str, words: str | None) -> None:
    recipe = load_recipe(DIGITS, ["train.shard_group=4", f"train.strategy={strategy}"])
    accelerator: Any = SimpleNamespace(num_processes=count)
    with nullcontext() if words is None else pytest.raises(RecipeError, match=words):
        check_shard_group(recipe, accelerator)
