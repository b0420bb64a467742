"""Unconditional UNets: the stock pipeline's own pixels, roles, exports, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline
from diffusers.pipelines.ddpm import pipeline_ddpm
from diffusers.schedulers import scheduling_lcm
from role_turns import check_turns
from tiny_families import draws
from tiny_pipelines import tiny_unet2d
from torch import Tensor
from variants import slow

from fastgen.backbones.base import RoleOptions
from fastgen.backbones.unet2d import UNet2D, UNet2DConfig
from fastgen.batch import Batch
from fastgen.config import load_recipe
from fastgen.denoiser import Inputs
from fastgen.evaluation.folders import with_own_prompts
from fastgen.modules.lora import LoraConfig
from fastgen.networks import Networks
from fastgen.objectives import DMD2
from fastgen.recipe import EvalConfig
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.sampler import Sampler, teacher_sampler

PROMPTS, SEEDS = ["", ""], [3, 1]
STORED = [((1.0, 0.75, 0.5, 0.25), "renoise"), slow(((1.0, 0.5), "ode")), slow(((0.4,), "renoise"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_unet2d(tmp_path_factory.mktemp("unet2d"))


def make(folder: Path, roles: RoleOptions | None = None, **options: Any) -> UNet2D:
    config = UNet2DConfig(path=str(folder), **options)
    config.check()
    return config.build(torch.device("cpu"), torch.float32, 0, roles or RoleOptions())


@pytest.fixture(scope="module")
def backbone(folder: Path) -> UNet2D:
    return make(folder)


def plain_pixels(
    folder: Path, backbone: UNet2D, steps: int, monkeypatch: pytest.MonkeyPatch, scheduler: Any = None
) -> tuple[Tensor, list[float]]:
    """What a user's own call gives for our noise, and the levels at which it called the network."""
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.scheduler = scheduler or pipeline.scheduler
    pipeline.set_progress_bar_config(disable=True)
    fresh = iter([draws(backbone, f"step{i}") for i in range(1, steps + 1)])
    monkeypatch.setattr(pipeline_ddpm, "randn_tensor", lambda *_, **__: draws(backbone, "initial"))
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **__: next(fresh))
    visited: list[float] = []
    pipeline.unet.register_forward_pre_hook(lambda _, given: visited.append((float(given[1]) + 1) / 1000))
    images = pipeline(batch_size=2, num_inference_steps=steps, output_type="np").images
    return torch.from_numpy(images).movedim(-1, -3), visited


@pytest.mark.parametrize("steps", [slow(1), 5])
def test_our_sampler_with_the_teacher_gives_the_pipelines_own_pixels(
    folder: Path, backbone: UNet2D, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With DDIM's steps and without clipping, which the scheduler is asked for."""
    ours = teacher_sampler(backbone, steps, 1.0).sample(PROMPTS, SEEDS)
    scheduler = DDIMScheduler(clip_sample=False)
    theirs, visited = plain_pixels(folder, backbone, steps, monkeypatch, scheduler)
    assert visited == pytest.approx(list(backbone.teacher_policy(steps).timesteps))
    assert ours.std() > 0.02 and float((ours - theirs).abs().max()) < 1e-4


@pytest.mark.parametrize(("timesteps", "transition"), STORED)
def test_an_export_reloads_and_its_plain_call_visits_the_stored_levels(
    backbone: UNet2D, tmp_path: Path, timesteps: tuple[float, ...], transition: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = RolloutPolicy(timesteps, transition)
    backbone.config.check_export(policy)
    student = backbone.load("student")
    with torch.no_grad():
        for i, p in enumerate(student.parameters()):
            p.mul_(1 + 0.02 * ((i % 5) - 2))
    backbone.save_pipeline(student, policy, tmp_path)
    ours = Sampler(backbone, student, policy).sample(PROMPTS, SEEDS)
    again = make(tmp_path)
    assert torch.equal(ours, Sampler(again, again.load_exported(tmp_path), policy).sample(PROMPTS, SEEDS))
    theirs, visited = plain_pixels(tmp_path, backbone, len(timesteps), monkeypatch)
    assert visited == pytest.approx(list(timesteps))
    assert float((ours - theirs).abs().max()) < 1e-4
    assert "`pipeline()` alone would use 1000 steps" in backbone.plain_call(policy, False)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_a_turn_of_each_role_moves_its_weights_and_no_others(folder: Path, adapters: bool) -> None:
    roles = RoleOptions({role: LoraConfig(4) for role in ("student", "fake_score")} if adapters else {})
    backbone: Any = make(folder, roles)
    policy, objective = RolloutPolicy((1.0, 0.5)), DMD2(guidance_scale=1.0)
    student, teacher = objective.make_student(backbone, policy), backbone.load("teacher")
    networks = Networks({"student": student, "teacher": teacher, **objective.auxiliary(backbone, policy)}, policy)
    cond, uncond = backbone.encode_both(PROMPTS)
    batch = Batch(torch.arange(2), 0, cond, uncond, backbone.latent_shape)
    check_turns(objective, networks, batch, backbone)


def test_pictures_go_to_latents_and_back_and_features_have_their_width(backbone: UNet2D) -> None:
    pixels, student = torch.rand(2, 3, 16, 16), backbone.load("student")
    assert torch.allclose(backbone.decode(backbone.encode(pixels)), pixels, atol=1e-6)
    cond, t = backbone.encode_prompts(PROMPTS), torch.tensor([0.7, 0.3])
    assert cond["nothing"].shape == (2, *backbone.prompt_shapes()["nothing"])
    with student.capture() as features:
        student(torch.randn(2, *backbone.latent_shape), t, cond)
    assert [value.shape[-1] for value in features] == [student.feature_dim]
    with pytest.raises(ValueError, match="no added inputs"):
        student.add_inputs({"stop": 4}, backbone.time_dim)
    with pytest.raises(ValueError, match="takes no extra inputs"):
        student(torch.randn(2, *backbone.latent_shape), t, cond, Inputs(s=torch.zeros(2)))


def test_a_ddim_pipeline_is_read_and_exported_as_one_that_keeps_its_scheduler(folder: Path, tmp_path: Path) -> None:
    pipeline = DDPMPipeline.from_pretrained(folder)
    DDIMPipeline(pipeline.unet, pipeline.scheduler).save_pretrained(tmp_path / "ddim")
    backbone = make(tmp_path / "ddim")
    backbone.save_pipeline(backbone.load("student"), RolloutPolicy((1.0, 0.5)), tmp_path / "student")
    index = json.loads((tmp_path / "student/model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline" and index["scheduler"] == ["diffusers", "LCMScheduler"]


def test_what_its_call_has_not_is_refused(folder: Path, project: Path) -> None:
    path = folder / "unet/config.json"
    text = path.read_text()
    for key, value, words in (
        ("num_class_embeds", 10, "is told a class"),
        ("in_channels", 1, "pictures need 3 and 3"),
        ("sample_size", [16, 8], "makes square pictures"),
    ):
        path.write_text(json.dumps(json.loads(text) | {key: value}))
        with pytest.raises(ValueError, match=words):
            make(folder)
    path.write_text(text)
    with pytest.raises(ValueError, match="unconditional"):
        make(folder, negative_prompt="a cat")
    with pytest.raises(ValueError, match="no eta"):
        make(folder).config.check_export(RolloutPolicy((1.0, 0.5), "tcd", eta=0.3))
    with pytest.raises(RecipeError, match="data: prompt 'a cat': backbone unet2d is unconditional"):
        load_recipe(
            project / "recipes/ddpm_cifar10_dmd2_1step.yaml", [f"backbone.path={folder}", "data.prompts=[a cat]"]
        )


def test_an_evaluation_has_its_only_prompt(folder: Path) -> None:
    assert with_own_prompts(folder, EvalConfig(metrics=("throughput",))).prompts == ("",)
