"""Kinds of AdamW: the same weights, the same bits after a restart, and what a plan says of their memory."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastgen.config import load_recipe
from fastgen.planning.plan import plan
from fastgen.planning.roles import moment_bytes, step_bytes
from fastgen.recipe import OptimizerConfig
from fastgen.registry import RecipeError
from fastgen.run import checkpoint
from fastgen.run.optimizers import adamw
from fastgen.train import train

SMALL = [
    *("train.batch_size=8", "train.sample_every=0", "train.eval_every=0", "train.checkpoint_every=2"),
    *("backbone.fit_steps=2", "health.num_samples=4", "eval.quick_num_samples=20", "eval.metrics=[throughput]"),
    *("optimizers.student.decay=constant", "optimizers.fake_score.decay=constant", "train.keep_checkpoints=9"),
]
DIGITS = Path(__file__).parents[1] / "recipes/digits_dmd2_4step.yaml"
FUSED = ("optimizers.student.kind=adamw_fused", "optimizers.fake_score.kind=adamw_fused")


def weights(recipe: Path, folder: Path, *overrides: str) -> dict[str, torch.Tensor]:
    """Those of all roles in the last checkpoint of a run in this folder."""
    train(load_recipe(recipe, [*SMALL, f"output_dir={folder}", *overrides]))
    files = sorted(checkpoint.complete(folder / "checkpoints")[-1].glob("*.safetensors"))
    return {f"{file.stem}.{name}": tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.slow
def test_fused_steps_are_the_same_and_continue_to_the_same_bits(mixture_recipe: Path, tmp_path: Path) -> None:
    plain = weights(mixture_recipe, tmp_path / "plain", "train.steps=4")
    whole = weights(mixture_recipe, tmp_path / "whole", "train.steps=4", *FUSED)
    weights(mixture_recipe, tmp_path / "parts", "train.steps=2", *FUSED)
    parts = weights(mixture_recipe, tmp_path / "parts", "train.steps=4", *FUSED)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    error = max((whole[name].double() - plain[name].double()).abs().max().item() for name in plain)
    print(f"largest difference of fused steps {error:.1e}")
    assert error < 1e-5


@pytest.mark.parametrize(("kind", "fused"), [("adamw", None), ("adamw_fused", True)])
def test_what_was_asked_for_is_what_steps(kind: str, fused: bool | None) -> None:
    optimizer = adamw(OptimizerConfig(lr=1e-3, kind=kind), [torch.nn.Parameter(torch.zeros(3))])  # type: ignore[arg-type]
    assert optimizer.defaults["fused"] is fused


EIGHT = ("optimizers.student.kind=adamw_8bit", "optimizers.fake_score.kind=adamw_8bit")


@pytest.mark.slow
def test_8bit_steps_are_nearly_the_same_and_continue_to_the_same_bits(mixture_recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    wide = ("backbone.width=64",)  # tensors of 4096 numbers
    plain = weights(mixture_recipe, tmp_path / "plain", "train.steps=4", *wide)
    whole = weights(mixture_recipe, tmp_path / "whole", "train.steps=4", *wide, *EIGHT)
    weights(mixture_recipe, tmp_path / "parts", "train.steps=2", *wide, *EIGHT)
    parts = weights(mixture_recipe, tmp_path / "parts", "train.steps=4", *wide, *EIGHT)
    assert any(tensor.dtype == torch.uint8 for tensor in whole.values())
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    shared = [name for name in plain if name in whole and "optimizer" not in name]
    differences = torch.cat([(whole[name] - plain[name]).abs().flatten() for name in shared if "fake_score" in name])
    print(f"mean difference of the fake score's weights {differences.mean():.1e}, largest {differences.max():.1e}")
    assert 0 < differences.mean() < 0.1 * 4 * 1e-3  # a tenth of four steps of AdamW, each of about the learning rate


def test_8bit_optimizers_are_refused_where_they_cannot_step(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"optimizers\.student\.kind: .* sharded|pip install"):
        load_recipe(DIGITS, ["optimizers.student.kind=adamw_8bit", "train.strategy=fsdp"])
    monkeypatch.setattr("fastgen.config.checks.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'fastgen-distill\[bitsandbytes\]'"):
        load_recipe(DIGITS, ["optimizers.student.kind=paged_adamw_8bit"])


def test_the_memory_of_8bit_moments() -> None:
    """A byte a number and four a block of 256; small tensors in float32; large paged ones are elsewhere on a GPU."""
    parameters = [torch.zeros(100_000), torch.zeros(4096), torch.zeros(10)]
    small, large = 2 * (4096 + 4 * 16 + 40), 2 * (100_000 + 4 * 391)
    assert moment_bytes("adamw", parameters, True) == 2 * 4 * (100_000 + 4096 + 10)
    assert [moment_bytes("adamw_8bit", parameters, gpu) for gpu in (True, False)] == [small + large] * 2
    assert moment_bytes("paged_adamw_8bit", parameters, True) == small + 2 * 4 * 391
    assert (
        step_bytes("adamw_8bit", parameters, True) == 0 and step_bytes("paged_adamw_8bit", parameters, True) == 200_000
    )


def test_the_memory_of_a_step() -> None:
    """On a GPU a step makes as much as the second moments, unless it is fused."""
    parameters = [torch.zeros(10), torch.zeros(6)]
    assert [step_bytes("adamw", parameters, gpu) for gpu in (True, False)] == [64, 40]
    assert [step_bytes("adamw_fused", parameters, gpu) for gpu in (True, False)] == [0, 0]


@pytest.mark.slow
def test_an_average_on_the_host_is_sampled_and_moved_as_any(mixture_recipe: Path, tmp_path: Path) -> None:
    """Here both devices are the CPU: the same weights."""
    plain = weights(mixture_recipe, tmp_path / "plain", "train.steps=2", "train.sample_every=1")
    host = weights(mixture_recipe, tmp_path / "host", "train.steps=2", "train.sample_every=1", "train.ema_device=cpu")
    assert all(torch.equal(plain[name], host[name]) for name in plain)


def test_a_plan_counts_an_average_on_the_host_where_it_is_sampled() -> None:
    plans = [plan(load_recipe(DIGITS, [key]), activations=False) for key in ("seed=0", "train.ema_device=cpu")]
    average = next(r for r in plans[0].roles if r.name == "average").held
    assert plans[0].held - plans[1].held == average > 0
    assert plans[1].moments["samples, student"] == plans[0].held + plans[1].student_bytes


@pytest.mark.parametrize("override", ["train.strategy=fsdp", "lora={student: {rank: 4}, fake_score: {rank: 4}}"])
def test_an_average_that_is_small_stays_on_the_device(override: str) -> None:
    with pytest.raises(RecipeError, match=r"train\.ema_device: the moving average of this run is"):
        load_recipe(DIGITS, ["train.ema_device=cpu", override])
