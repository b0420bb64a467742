"""Compiled blocks: the numbers of the eager ones, hooks and adapters that stay alive, the same files.

The backends here trace as torch.compile's own does, and run torch's own kernels: generating others takes minutes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_lora import trained_adapter
from tiny_families import FAMILIES
from torch import Tensor

from fastgen import noise
from fastgen.backbones.base import RoleOptions
from fastgen.config import build_recipe, load_recipe
from fastgen.modules import compilation
from fastgen.modules.compilation import compile_blocks
from fastgen.modules.lora import LoraConfig, LoraDenoiser
from fastgen.registry import RecipeError
from fastgen.run import checkpoint
from fastgen.train import train

ROOT = Path(__file__).parents[1]
FAMILY = FAMILIES["pixart-sigma"]  # one kind of block
PROMPTS = ["a red cat", "two green dogs"]


@pytest.mark.slow
def test_hooks_and_adapters_of_compiled_blocks_stay_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features are captured by hooks that are registered after the blocks ran, gradients survive a switch of
    adapters and recomputation, and a merged copy calls its own weights."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    config = FAMILY.make(FAMILY.folder(tmp_path)).config
    adapters = {"student": LoraConfig(rank=2, targets=("to_q", "to_v"))}
    backbone = config.build(torch.device("cpu"), torch.float32, 0, RoleOptions(adapters))
    student, teacher = trained_adapter(backbone, "student"), backbone.load("teacher")
    x_t, t = noise.normal(torch.arange(2), backbone.latent_shape, 1), torch.tensor([0.5, 0.9])
    cond, names = backbone.encode_prompts(PROMPTS), list(student.root.state_dict())

    def results(denoiser: LoraDenoiser) -> list[Tensor]:
        plain = denoiser(x_t, t, cond)
        with denoiser.capture() as features:
            loss = denoiser(x_t, t, cond).square().mean() + sum(f.square().mean() for f in features)
        assert len(features) == len(denoiser.feature_modules)
        with torch.no_grad():
            taught = teacher(x_t, t, cond)  # switches the adapter off before the backward pass
        loss.backward()
        grads = [p.grad.clone() for p in denoiser.parameters() if p.grad is not None]
        for p in denoiser.parameters():
            p.grad = None
        return [plain.detach(), loss.detach(), taught, *grads]

    eager = results(student)
    student.enable_checkpointing()
    compile_blocks(student.root.shard_modules)
    compiled = results(student)
    assert len(compiled) == len(eager) == 3 + len(list(student.parameters()))
    error = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(eager, compiled, strict=True))
    print(f"largest relative difference {error:.1e}")
    assert error < 1e-4
    assert list(student.root.state_dict()) == names
    merged = student.merged()
    with torch.no_grad():
        assert torch.allclose(merged(x_t, t, cond), eager[0], atol=1e-4)
        merged.network.transformer_blocks[0].attn1.to_q.weight.zero_()
        assert torch.allclose(student(x_t, t, cond), eager[0], atol=1e-4)


def recipe(folder: Path, teacher: Path, **train_section: Any) -> Any:
    training = {"batch_size": 2, "device": "cpu", "num_samples": 2, "sample_every": 0, "checkpoint_every": 1}
    return build_recipe(
        {
            "output_dir": str(folder),
            "backbone": {"name": "pixart_sigma", "path": str(teacher), **FAMILY.lengths},
            "rollout": {"timesteps": [1.0]},
            "data": {"name": "prompts", "prompts": PROMPTS},
            "objective": {"name": "dmd2", "guidance_scale": 1.0, "fake_updates": 1},
            "optimizers": {"student": {"lr": 1e-3, "eps": 1e-3}, "fake_score": {"lr": 1e-3, "eps": 1e-3}},
            "train": training | train_section,
            "health": {"every": 0},
            "eval": {"metrics": ["throughput"], "num_samples": 2, "quick_num_samples": 2, "prompts": PROMPTS},
        }
    )


@pytest.mark.slow
def test_a_compiled_run_trains_continues_and_exports_as_an_eager_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    teacher = FAMILY.folder(tmp_path / "teacher")
    eager = train(recipe(tmp_path / "eager", teacher, steps=2))
    before = dict(torch._dynamo.utils.counters["stats"])
    train(recipe(tmp_path / "compiled", teacher, steps=1, compile=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before.get("unique_graphs", 0)
    compiled = train(recipe(tmp_path / "compiled", teacher, steps=2, compile=True))
    last = [checkpoint.complete(folder / "checkpoints")[-1] for folder in (eager, compiled)]
    for file in ("student", "fake_score", "ema"):
        a, b = (load_file(path / f"{file}.safetensors") for path in last)
        assert a.keys() == b.keys()
        error = max(float((a[name] - b[name]).abs().max()) for name in a)
        print(f"{file}: largest difference {error:.1e}")
        assert error < 1e-5
    files = [
        {str(f.relative_to(folder / "export")) for f in folder.rglob("export/**/*")} for folder in (eager, compiled)
    ]
    assert files[0] == files[1] and files[0]


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("mixture_dmd2_4step", [], "mixture have no repeated blocks"),
        ("digits_mean_flow_4step", [], "mean_flow differentiates networks along directions"),
        ("moving_digits_self_forcing_4step", [], "see a past of changing length"),
    ],
)
def test_what_cannot_be_compiled_is_refused(name: str, overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=rf"train\.compile: .*{words}"):
        load_recipe(ROOT / f"recipes/{name}.yaml", ["train.compile=true", *overrides])
