"""Qwen-Image-Edit against plain diffusers: the same pixels from the same image and prompts, both ways; roles."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as stock_module
from diffusers.schedulers import scheduling_flow_match_euler_discrete
from role_turns import check_turns
from tiny_qwen import tiny_qwen_edit
from torch import Tensor

from fastgen import noise
from fastgen.backbones import qwen_image_edit
from fastgen.backbones.base import RoleOptions
from fastgen.backbones.flow_image import to_tokens
from fastgen.backbones.given import to_picture
from fastgen.backbones.qwen_image_edit import QwenImageEdit, QwenImageEditConfig
from fastgen.batch import Batch, Conditioning
from fastgen.config import build_recipe
from fastgen.data import make_batch
from fastgen.modules.lora import LoraConfig
from fastgen.networks import Networks
from fastgen.objectives import DMD2
from fastgen.rollout import RolloutPolicy
from fastgen.run.prepare import prepare
from fastgen.sampling.sampler import Sampler, teacher_sampler

PROMPTS = ["a red cat", "the green texture of two cats and a background"]
NEGATIVE = "text"
SEEDS = [3, 1]
SMALL = 24  # side of the given images here; that of the results is 32


@pytest.fixture(scope="module", autouse=True)
def small_images() -> Any:
    """The stock pipeline resizes images to an area of 1024 x 1024, here to one of 24 x 24."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwen_image_edit, "SIDE", SMALL)
        patch.setattr(stock_module, "calculate_dimensions", lambda area, ratio: (SMALL, SMALL, None))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen_edit(tmp_path_factory.mktemp("edit"))


@pytest.fixture(scope="module")
def backbone(folder: Path) -> QwenImageEdit:
    return open_edit(folder)


def open_edit(folder: Path, roles: RoleOptions | None = None) -> QwenImageEdit:
    config = QwenImageEditConfig(path=str(folder), resolution=32, max_sequence_length=60, negative_prompt=NEGATIVE)
    config.check()
    return config.build(torch.device("cpu"), torch.float32, 0, *([roles] if roles else []))


def pictures() -> list[Tensor]:
    draw = noise.uniform(torch.arange(2), (3, SMALL, SMALL), 7, torch.float32)
    return list((draw * 255).round() / 255)


def draws(backbone: QwenImageEdit, name: str) -> Tensor:
    return noise.normal(torch.tensor(SEEDS), backbone.latent_shape, noise.make_key("sample", name))


@cache
def stock(folder: Path) -> QwenImageEditPipeline:
    return QwenImageEditPipeline.from_pretrained(folder)


def plain_pixels(folder: Path, backbone: QwenImageEdit, steps: int, **call: Any) -> tuple[Tensor, list[float]]:
    """What a user's own calls give for our initial noise, one for each image, and the levels that the first visits."""
    pipeline = stock(folder)
    pipeline.set_progress_bar_config(disable=True)
    visited: list[float] = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _m, _a, given: visited.append(float(given["timestep"][0])), with_kwargs=True
    )
    made = [
        pipeline(
            to_picture(pixels),
            PROMPTS[i],
            num_inference_steps=steps,
            height=32,
            width=32,
            latents=to_tokens(draws(backbone, "initial")[i : i + 1]),
            output_type="np",
            **call,
        ).images
        for i, pixels in enumerate(pictures())
    ]
    hook.remove()
    return torch.from_numpy(np.concatenate(made)).permute(0, 3, 1, 2), visited[: len(visited) // 2]


@pytest.mark.parametrize(("steps", "scale"), [(2, 1.0), (3, 4.0)])
def test_our_sampler_with_the_teacher_gives_the_pipelines_own_pixels(
    folder: Path, backbone: QwenImageEdit, steps: int, scale: float
) -> None:
    images = backbone.encode_images(pictures())
    ours = teacher_sampler(backbone, steps, scale).sample(PROMPTS, SEEDS, images)
    call = {"true_cfg_scale": scale} | ({"negative_prompt": NEGATIVE} if scale > 1 else {})
    theirs, visited = plain_pixels(folder, backbone, steps, **call)
    error = float((ours - theirs).abs().max())
    print(f"{steps} steps, scale {scale}: largest pixel difference {error:.2g}")
    assert ours.std() > 0.02 and error < 1e-4
    levels = backbone.teacher_policy(steps).timesteps
    assert visited == pytest.approx([level for level in levels for _ in range(len(visited) // steps)], abs=1e-6)


@pytest.mark.parametrize("policy", [RolloutPolicy((1.0, 0.9, 0.75, 0.5)), RolloutPolicy((1.0, 0.7, 0.3), "ode")])
def test_an_export_gives_the_same_pixels_in_plain_diffusers(
    backbone: QwenImageEdit, tmp_path: Path, policy: RolloutPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone.config.check_export(policy)
    student = backbone.load("student")
    with torch.no_grad():
        for i, p in enumerate(student.parameters()):  # weights that are not the teacher's
            p.mul_(1 + 0.02 * ((i % 5) - 2))
    backbone.save_pipeline(student, policy, tmp_path)
    images = backbone.encode_images(pictures())
    ours = Sampler(backbone, student, policy).sample(PROMPTS, SEEDS, images)
    again = open_edit(tmp_path)
    exported = Sampler(again, again.load_exported(tmp_path), policy)
    assert torch.equal(ours, exported.sample(PROMPTS, SEEDS, images))
    fresh = [to_tokens(draws(backbone, f"step{i}")) for i in range(1, policy.num_steps + 1)]
    order = iter([noise[i : i + 1] for i in range(2) for noise in fresh])
    monkeypatch.setattr(
        scheduling_flow_match_euler_discrete, "randn_tensor", lambda *_, **__: next(order), raising=False
    )
    monkeypatch.setattr(torch, "randn_like", lambda *_, **__: next(order))
    theirs, visited = plain_pixels(tmp_path, backbone, policy.num_steps, true_cfg_scale=1.0)
    assert visited == pytest.approx(list(policy.timesteps), abs=1e-6)
    assert float((ours - theirs).abs().max()) < 1e-4


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_a_turn_of_each_role_moves_its_weights_and_no_others(folder: Path, adapters: bool) -> None:
    roles = RoleOptions({role: LoraConfig(4) for role in ("student", "fake_score")} if adapters else {})
    backbone = open_edit(folder, roles)
    policy, objective = RolloutPolicy((1.0, 0.5)), DMD2(guidance_scale=2.0)
    student, teacher = objective.make_student(backbone, policy), backbone.load("teacher")
    networks = Networks({"student": student, "teacher": teacher, **objective.auxiliary(backbone, policy)}, policy)
    cond, uncond = backbone.encode_both(PROMPTS, backbone.encode_images(pictures()))
    batch = Batch(torch.arange(2), 0, cond, uncond, backbone.latent_shape)
    check_turns(objective, networks, batch, backbone)


def test_the_image_matters_by_its_latents_and_by_its_prompt(backbone: QwenImageEdit) -> None:
    images, t = backbone.encode_images(pictures()), torch.tensor([0.8])
    first = images.select(slice(0, 1))
    cond, uncond = backbone.encode_both(PROMPTS[:1], first)
    other, _ = backbone.encode_both(PROMPTS[:1], images.select(slice(1, 2)))
    assert "image_pixels" not in cond
    assert not torch.equal(cond["prompt_embeds"], other["prompt_embeds"])
    assert not torch.equal(cond["prompt_embeds"], uncond["prompt_embeds"])
    assert {key: tuple(value.shape[1:]) for key, value in cond.items()} == (
        backbone.prompt_shapes() | backbone.image_shapes()
    )
    teacher, x = backbone.load("teacher"), draws(backbone, "x")[:1]
    with torch.no_grad():
        v = teacher(x, t, cond)
        for key in ("prompt_embeds", "image_latents"):
            assert float((teacher(x, t, Conditioning(cond | {key: other[key]})) - v).abs().max()) > 1e-4


def test_a_prompt_in_a_batch_gives_what_it_gives_alone(backbone: QwenImageEdit) -> None:
    images, teacher, x = backbone.encode_images(pictures()), backbone.load("teacher"), draws(backbone, "x")
    cond, _ = backbone.encode_both(PROMPTS, images)
    lengths, t = cond["prompt_mask"].sum(1).tolist(), torch.tensor([0.9, 0.2])
    assert len(set(lengths)) == 2
    with torch.no_grad():
        together = teacher(x, t, cond)
        for i, length in enumerate(lengths):
            row = cond.select(slice(i, i + 1))
            cut = {key: value[:, :length] if key.startswith("prompt") else value for key, value in row.items()}
            alone = teacher(x[i : i + 1], t[i : i + 1], Conditioning(cut))
            assert torch.allclose(alone, together[i : i + 1], atol=1e-5)


def test_prompts_without_an_image_and_other_pipelines_are_refused(backbone: QwenImageEdit, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="makes every sample from given images"):
        backbone.encode_both(PROMPTS)
    with pytest.raises(ValueError, match="encodes a prompt together with its image"):
        backbone.encode_prompts(PROMPTS)
    (tmp_path / "model_index.json").write_text('{"_class_name": "QwenImageEditPlusPipeline"}')
    with pytest.raises(ValueError, match="holds a QwenImageEditPlusPipeline"):
        open_edit(tmp_path)


def test_a_recipe_gets_its_pictures_and_is_not_prepared(folder: Path, tmp_path: Path) -> None:
    for i, pixels in enumerate(pictures()):
        to_picture(pixels).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(PROMPTS[i])
    section = {"metrics": ["throughput"], "num_samples": 2, "quick_num_samples": 2, "images": str(tmp_path)}
    recipe = build_recipe(
        {
            "output_dir": "unused",
            "backbone": {"name": "qwen_image_edit", "path": str(folder), "resolution": 32, "max_sequence_length": 60},
            "rollout": {"timesteps": [1.0, 0.5]},
            "data": {"name": "images", "folder": str(tmp_path)},
            "objective": {"name": "dmd2", "fake_updates": 1},
            "optimizers": {"student": {"lr": 1e-5}, "fake_score": {"lr": 1e-5}},
            "train": {"steps": 1, "batch_size": 2},
            "eval": section,
        }
    )
    backbone: Any = recipe.backbone.build(torch.device("cpu"), torch.float32, 0)
    batch = make_batch(recipe.data.open(backbone, 0), backbone, torch.arange(2), 0, frozenset())
    for i, prompt in enumerate(batch.prompts):
        alone, _ = backbone.encode_both([prompt], backbone.encode_images([pictures()[PROMPTS.index(prompt)]]))
        for key in alone:
            assert torch.equal(batch.cond[key][i : i + 1], alone[key])
    with pytest.raises(ValueError, match="encodes every prompt together with its image"):
        prepare(recipe, tmp_path / "prepared")
