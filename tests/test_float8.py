"""A teacher in float8: close to the one in bfloat16, smaller, and planned as it is held."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES
from tiny_pipelines import tiny_sd
from torch import nn

from fastgen import noise
from fastgen.backbones.sd import SDConfig
from fastgen.config import load_recipe
from fastgen.modules.float8 import store_float8
from fastgen.planning.plan import plan
from fastgen.planning.report import advise
from fastgen.planning.weightless import size, tensors
from fastgen.registry import RecipeError
from fastgen.run.build import TrainingRun
from fastgen.train import train

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "recipes/digits_dmd2_4step.yaml"
FLOAT8 = ["train.frozen_dtype=float8", "train.mixed_precision=bf16"]


@pytest.mark.parametrize("name", ["sd", "flux-dev"])
def test_a_teacher_in_float8_is_close_and_small(tmp_path: Path, name: str) -> None:
    """The error against bfloat16 is that of four significant bits, and gradient still passes through."""
    config: Any
    if name == "sd":
        config, prompts = SDConfig(str(tiny_sd(tmp_path))), ["a red cat", "b"]
    else:
        config, prompts = FAMILIES[name].make(FAMILIES[name].folder(tmp_path)).config, ["a red cat", "two"]
    backbone = config.build(torch.device("cpu"), torch.bfloat16, 0)
    plain, small = backbone.load("teacher"), backbone.load("teacher")
    store_float8(small)
    matrices = [p for p in small.parameters() if p.dtype == torch.float8_e4m3fn]
    held, before = size(tensors(small)), size(tensors(plain))
    assert before - held == sum(p.numel() for p in matrices) > 0.3 * before / 2
    x_t, t = noise.normal(torch.arange(2), backbone.latent_shape, 1), torch.tensor([0.5, 0.9])
    cond = backbone.encode_prompts(prompts)
    x_t.requires_grad_()
    outputs = [teacher(x_t, t, cond, predict=teacher.prediction_type) for teacher in (plain, small)]
    grads = [torch.autograd.grad(out.square().mean(), x_t)[0] for out in outputs]
    for what, (exact, rounded) in {"output": outputs, "gradient": grads}.items():
        error = float((rounded.detach() - exact.detach()).norm() / exact.detach().norm())
        print(f"{name}: relative error of the {what} {error:.1e}, {held} bytes instead of {before}")
        assert 1e-4 < error < 0.1
    assert all(p.dtype == torch.float8_e4m3fn for p in matrices)


def test_a_plan_counts_the_teacher_as_it_is_held() -> None:
    half = ["train.frozen_dtype=bfloat16", "train.mixed_precision=bf16"]
    roles = [
        next(r for r in plan(load_recipe(DIGITS, lines), activations=False).roles if r.name == "teacher")
        for lines in (half, FLOAT8)
    ]
    teacher = load_recipe(DIGITS).backbone.build(torch.device("cpu"), torch.bfloat16, 0).load("teacher")
    store_float8(teacher)
    assert roles[1].held == size(tensors(teacher)) < roles[0].held
    assert roles[1].dtype == "bfloat16, float8_e4m3fn"


@pytest.mark.slow
@pytest.mark.parametrize("lines", [FLOAT8, ["train.ema_device=cpu"]])
def test_a_plan_advises_no_change_that_would_be_refused(lines: list[str]) -> None:
    """Neither of the two goes with adapters or with sharding, and one GPU of a byte holds nothing."""
    advice = advise(plan(load_recipe(DIGITS, lines), gpus=2, activations=False), memory=1)
    tried = [line for change, _, _ in advice.tried for line in change]
    assert tried and not any("lora" in line or "fsdp" in line for line in tried)
    assert advice.lines is None and advice.gpus is None


@pytest.mark.parametrize(
    ("lines", "strategy", "said"),
    [
        ([], "ddp", {}),
        (FLOAT8, "ddp", {"frozen_dtype": "float8"}),
        ([], "fsdp", {"strategy": "fsdp"}),
    ],
)
def test_the_row_of_a_teacher_that_is_not_as_stored_says_so(
    lines: list[str], strategy: str, said: dict[str, str]
) -> None:
    """Also one of a hub id, which names no files: `fastgen eval` measures the original again."""
    recipe = load_recipe(DIGITS, lines)
    backbone = recipe.backbone.build(torch.device("cpu"), torch.float32, 0)
    run: Any = SimpleNamespace(
        recipe=recipe, strategy=strategy, backbone=backbone, networks=SimpleNamespace(teacher=nn.Identity())
    )
    sampler = TrainingRun.teacher(run, 4)
    assert sampler.facts() == sampler.with_policy(backbone.teacher_policy(2)).facts() == said
    assert bool(sampler.weight_hashes()) is not bool(said)


@pytest.mark.slow
def test_a_run_with_a_teacher_in_float8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [
        "train.steps=1",
        "train.batch_size=2",
        "train.accumulate=1",
        "train.sample_every=0",
        "train.num_samples=2",
    ]
    small += ["eval.quick_num_samples=20", "eval.teacher_steps=[2]", "eval.metrics=[throughput]", "health.every=0"]
    folder = train(
        load_recipe(DIGITS, [*small, *FLOAT8, "objective.fake_updates=1", f"output_dir={tmp_path / 'run'}"])
    )
    assert (folder / "export").is_dir() and "float8_e4m3fn" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.mixed_precision=no"], r"needs? train\.mixed_precision: bf16"),
        (["train.strategy=fsdp"], "fsdp shards the teacher"),
        (["lora={student: {rank: 4}, fake_score: {rank: 4}}"], "bfloat16 copies of the base"),
        (["train.compile=true"], r"train\.compile"),
    ],
)
def test_where_float8_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=rf"train\.frozen_dtype: .*{words}"):
        load_recipe(DIGITS, [*FLOAT8, *overrides])
