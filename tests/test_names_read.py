"""Pipelines whose files are as old as those on the hub: diffusers reads them, so everything here has to."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_sd, tiny_unet2d
from tiny_wan_i2v import tiny_wan_i2v

from fastgen.backbones.base import RoleOptions
from fastgen.backbones.names_read import OLD, names_read
from fastgen.backbones.pipeline_config import PipelineConfig
from fastgen.backbones.unet2d import UNet2DConfig
from fastgen.backbones.wan_i2v import WanI2VConfig
from fastgen.exporting.files import write_file
from fastgen.exporting.ldm import checkpoint_entries
from fastgen.modules.lora import LoraConfig
from fastgen.modules.sharding import gathered
from fastgen.rollout import RolloutPolicy

CPU = torch.device("cpu")
FILE = "diffusion_pytorch_model.safetensors"


def old_name(name: str) -> str:
    for old, new in OLD.items():
        name = name.replace(f".{new}.", f".{old}.") if "attentions." in name else name
    return name


def make_old(part: Path) -> dict[str, torch.Tensor]:
    """Renames the tensors of a network's file, and returns them by their names of today."""
    tensors = load_file(part / FILE)
    stored = {old_name(name): tensor for name, tensor in tensors.items()}
    assert stored.keys() != tensors.keys()
    save_file(stored, part / FILE, {"format": "pt"})
    return tensors


def test_only_the_attention_of_pictures_is_renamed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    kept = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    old = "encoder.mid_block.attentions.0.proj_attn.bias"
    assert names_read(tmp_path, [kept, old, "query.weight"]) == {
        kept: kept,
        "encoder.mid_block.attentions.0.to_out.0.bias": old,
        "query.weight": "query.weight",
    }


def check_exports(config: PipelineConfig, part: str, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """A student is exported, whole and with an adapter added, and started from, with these tensors."""
    policy = RolloutPolicy((1.0, 0.5))
    backbone: Any = config.build(CPU, torch.float32, 0)
    backbone.save_pipeline(backbone.load("student"), policy, folder / "export")
    exported = load_file(folder / "export" / part / FILE)
    assert exported.keys() == tensors.keys() and all(torch.equal(exported[name], tensors[name]) for name in tensors)
    config.check_start(folder / "export")

    adapted: Any = config.build(CPU, torch.float32, 0, RoleOptions(adapters={"student": LoraConfig(rank=2)}))
    student = adapted.load("student")
    adapted.save_values(student, gathered(student), policy, folder / "merged", whole=True)
    assert load_file(folder / "merged" / part / FILE).keys() == tensors.keys()


def test_a_tensor_that_diffusers_ignores_is_in_no_export_and_no_start(tmp_path: Path) -> None:
    """Wan 2.1's image-to-video networks store a norm that their class does not have."""
    base = tiny_wan_i2v(tmp_path / "base", "clip")
    file = base / "transformer" / FILE
    clean = load_file(file)
    save_file(clean | {"blocks.0.attn2.norm_added_q.weight": torch.ones(24)}, file, {"format": "pt"})
    config = WanI2VConfig(path=str(base), height=16, width=32, num_frames=5, max_sequence_length=16)
    config.check()
    check_exports(config, "transformer", clean, tmp_path)


def test_old_names_of_a_student_become_those_of_today(tmp_path: Path) -> None:
    base = tiny_unet2d(tmp_path / "base")
    tensors = make_old(base / "unet")
    config = UNet2DConfig(path=str(base))
    backbone: Any = config.build(CPU, torch.float32, 0)
    assert {name.removeprefix("network.") for name in backbone.weights()} == tensors.keys()
    check_exports(config, "unet", tensors, tmp_path)


def test_a_checkpoint_is_written_from_an_old_autoencoder(tmp_path: Path) -> None:
    """As Stable Diffusion 1.5's is stored. The stock class reads the same pixels from the checkpoint."""
    folder = tiny_sd(tmp_path / "base")
    vae_with_attention(folder / "vae")
    write_file(tmp_path / "new.safetensors", checkpoint_entries(folder))
    make_old(folder / "vae")
    StableDiffusionPipeline.from_pretrained(folder)
    write_file(tmp_path / "old.safetensors", checkpoint_entries(folder))
    new, old = load_file(tmp_path / "new.safetensors"), load_file(tmp_path / "old.safetensors")
    assert new.keys() == old.keys() and all(torch.equal(new[name], old[name]) for name in new)


def vae_with_attention(part: Path) -> None:
    """In the place of a tiny pipeline's autoencoder, which has none."""
    config = AutoencoderKL.load_config(part)
    AutoencoderKL.from_config(config | {"mid_block_add_attention": True}).save_pretrained(part)
