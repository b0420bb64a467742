"""Other people's adapters on a student: what they change, by how much, and which files are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors.torch import save_file
from tiny_families import FAMILIES
from torch import Tensor
from typer.testing import CliRunner

from fastgen.backbones.base import RoleOptions
from fastgen.backbones.gaussian_mixture import GaussianMixture, GaussianMixtureConfig
from fastgen.cli import app
from fastgen.modules.lora import LoraConfig
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.adapters import Adapter, with_adapters
from fastgen.sampling.sampler import Sampler, load_sampler

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "assets/teachers/digits"
LAYER = "transformer_blocks.0.attn.to_q"
PROMPTS, SEEDS = ["a seven", "a two"], [0, 1]


def adapter(folder: Path, scale: float = 0.3) -> Path:
    """One for the digits pipeline, as its users would save it."""
    folder.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = {f"{LAYER}.lora_A.weight": torch.randn(4, 128), f"{LAYER}.lora_B.weight": scale * torch.randn(128, 4)}
    StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=layers)
    return folder


def weight(sampler: Sampler) -> Tensor:
    return sampler.denoiser.members[0].network.transformer_blocks[0].attn.to_q.weight


def samples(*adapters: Adapter) -> Tensor:
    return with_adapters(load_sampler(DIGITS, num_steps=2), adapters).sample(PROMPTS, SEEDS)


def test_it_is_the_product_of_its_matrices_times_the_scale(tmp_path: Path) -> None:
    path = adapter(tmp_path / "style")
    plain = load_sampler(DIGITS, num_steps=2)
    before = plain.sample(PROMPTS, SEEDS)
    by_hand = load_sampler(DIGITS, num_steps=2)
    layers = StableDiffusion3Pipeline.lora_state_dict(str(path))
    down, up = (layers[f"transformer.{LAYER}.lora_{x}.weight"] for x in "AB")
    with torch.no_grad():
        weight(by_hand).add_(-0.7 * up @ down)
    adapted = with_adapters(plain, [Adapter.parse(f"{path}=-0.7")])
    assert float((adapted.sample(PROMPTS, SEEDS) - by_hand.sample(PROMPTS, SEEDS)).abs().max()) < 1e-4
    assert float((adapted.sample(PROMPTS, SEEDS) - before).abs().max()) > 1e-2
    (said,) = adapted.facts()["adapters"]
    assert said["scale"] == -0.7 and len(said["sha256"]) == 64


def test_several_add_up_and_a_scale_of_nothing_changes_nothing(tmp_path: Path) -> None:
    one, other = adapter(tmp_path / "one"), adapter(tmp_path / "other")
    both = samples(Adapter(one, 0.25), Adapter(other, 0.5))
    assert float((both - samples(Adapter(one, 0.75))).abs().max()) < 1e-4
    assert float((samples(Adapter(one, 0.0)) - samples()).abs().max()) < 1e-6


def test_layers_of_a_text_encoder_change_what_prompts_mean(tmp_path: Path) -> None:
    """Also where a student has an adapter of its own, which the text encoders do not have."""
    name = "text_model.encoder.layers.0.self_attn.q_proj"
    plain = load_sampler(DIGITS, num_steps=2)
    encoder: Any = plain.backbone.text_pipeline.text_encoder  # type: ignore[attr-defined]
    width = encoder.get_submodule(name).weight.shape[0]
    layers = {f"{name}.lora_A.weight": torch.randn(4, width), f"{name}.lora_B.weight": torch.randn(width, 4)}
    path = adapter(tmp_path / "style")
    network = StableDiffusion3Pipeline.lora_state_dict(str(path))
    StableDiffusion3Pipeline.save_lora_weights(
        path,
        transformer_lora_layers={key.removeprefix("transformer."): value for key, value in network.items()},
        text_encoder_lora_layers=layers,
    )
    means = [
        with_adapters(load_sampler(DIGITS, num_steps=2), [Adapter(path, scale)]).backbone.encode_prompts(PROMPTS)[
            "pooled"
        ]
        for scale in (0.0, 1.0)
    ]
    assert torch.allclose(means[0], plain.backbone.encode_prompts(PROMPTS)["pooled"], atol=1e-5)
    assert float((means[0] - means[1]).abs().max()) > 1e-3


def test_a_student_that_is_an_adapter_keeps_its_own(tmp_path: Path) -> None:
    family = FAMILIES["sana"]
    folder = family.folder(tmp_path / "sana")
    backbone: Any = family.make(folder).config.build(
        torch.device("cpu"), torch.float32, 0, RoleOptions({"student": LoraConfig(4)})
    )
    student = backbone.load("student")
    for p in student.parameters():
        torch.nn.init.normal_(p, std=0.1)
    (timesteps, options), name = family.lists[0], "transformer_blocks.0.attn1.to_q"
    policy = RolloutPolicy(timesteps, **options)
    backbone.save_pipeline(student, policy, tmp_path / "export")
    width = family.make(folder).load("teacher").network.get_submodule(name).weight.shape[0]
    layers = {f"{name}.lora_A.weight": torch.randn(2, width), f"{name}.lora_B.weight": torch.randn(width, 2)}
    SanaPipeline.save_lora_weights(tmp_path / "style", transformer_lora_layers=layers)

    sampler = Sampler(backbone, backbone.load_exported(tmp_path / "export"), policy)
    alone = sampler.sample(["a"], [0])
    nothing = with_adapters(sampler, [Adapter(tmp_path / "style", 0.0)]).sample(["a"], [0])
    assert float((alone - nothing).abs().max()) < 1e-5


def test_the_commands_take_them_and_say_so(tmp_path: Path) -> None:
    path, style = tmp_path / "out", adapter(tmp_path / "style")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    same = ["--prompts", str(prompts), "--num-steps", "2"]
    result = CliRunner().invoke(app, ["sample", str(DIGITS), *same, "--adapter", f"{style}=2", "--output", str(path)])
    assert result.exit_code == 0, result.output
    both = CliRunner().invoke(
        app,
        ["sample", str(DIGITS), *same, "--adapter", str(tmp_path / "none"), "--output", str(tmp_path / "other")],
    )
    assert both.exit_code == 2 and "name that of the adapter" in " ".join(both.output.split())


def test_what_is_refused(tmp_path: Path) -> None:
    save_file({"lora": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"cannot be added|no layer of"):
        with_adapters(load_sampler(DIGITS), [Adapter(tmp_path / "other.safetensors")])
    layers = {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 8)}
    layers |= {name.replace("lora_A", "lora_B"): value.mT.contiguous() for name, value in layers.items()}
    StableDiffusionPipeline.save_lora_weights(tmp_path / "unet", unet_lora_layers=layers)
    with pytest.raises(ValueError, match="no layer of SD3Transformer2DModel"):
        with_adapters(load_sampler(DIGITS), [Adapter(tmp_path / "unet")])
    points = GaussianMixture(
        GaussianMixtureConfig(means=((0.0,),), stds=(1.0,)), torch.device("cpu"), torch.float32, 0
    )
    with pytest.raises(ValueError, match="pipelines of one network"):
        with_adapters(Sampler(points, points.load("teacher"), RolloutPolicy((1.0,))), [Adapter(tmp_path / "unet")])
    (tmp_path / "unet/second.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="one such file"):
        Adapter(tmp_path / "unet").file  # noqa: B018
    for text, words in (
        (f"{tmp_path}/none", "name that of the adapter"),
        (f"{tmp_path}/x=nan", "finite"),
        ("x=y", "number"),
    ):
        with pytest.raises(ValueError, match=words):
            Adapter.parse(text)
    signed = adapter(tmp_path / "a=b") / "pytorch_lora_weights.safetensors"
    assert Adapter.parse(str(tmp_path / "a=b")) == Adapter(signed)
    assert Adapter.parse(f"{tmp_path / 'a=b'}=-2") == Adapter(signed, -2.0)
