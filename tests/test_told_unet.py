"""UNets that are told a guidance scale (time_cond_proj_dim), as latent consistency models are."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_lcm
from role_turns import check_turns
from tiny_families import draws
from tiny_pipelines import tiny_sd, tiny_sdxl
from variants import slow

from fastgen.backbones.base import RoleOptions
from fastgen.backbones.sd import SD, SDConfig, guidance_waves
from fastgen.batch import Batch
from fastgen.denoiser import Inputs
from fastgen.modules.lora import LoraConfig
from fastgen.networks import Networks
from fastgen.objectives import DMD2
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.sampler import Sampler, teacher_sampler

PROMPTS, SEEDS = ["a red cat", "two green dogs"], [3, 1]


@pytest.fixture(scope="module", params=["sd", slow("sdxl")])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline with another UNet."""
    folder = (tiny_sd if request.param == "sd" else tiny_sdxl)(tmp_path_factory.mktemp("told"))
    cls = diffusers.UNet2DConditionModel
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = cls.from_config(cls.load_config(folder / "unet") | {"time_cond_proj_dim": 9})
    with torch.no_grad():
        unet.time_embedding.cond_proj.weight.mul_(20)  # so that the scale matters
    unet.save_pretrained(folder / "unet")
    return folder


def make(folder: Path, roles: RoleOptions | None = None, **options: Any) -> SD:
    config = SDConfig(path=str(folder), **options)
    config.check()
    return config.build(torch.device("cpu"), torch.float32, 0, roles or RoleOptions())


def plain_pixels(folder: Path, backbone: SD, steps: int, **call: Any) -> torch.Tensor:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    sigma = float(pipeline.scheduler.init_noise_sigma)
    latents = draws(backbone, "initial") / (sigma if sigma == 1 else 1)
    out = pipeline(PROMPTS, num_inference_steps=steps, latents=latents, output_type="np", **call)
    return torch.from_numpy(out.images).movedim(-1, -3)


def test_the_waves_are_those_of_the_pipeline() -> None:
    w = torch.tensor([1.0, 7.5, 3.0])
    for width in (8, 9, 256):
        theirs = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding(None, w - 1, width)  # type: ignore[arg-type]
        assert torch.allclose(guidance_waves(w, width), theirs, atol=1e-5)


def test_our_sampler_with_the_teacher_gives_the_pipelines_own_pixels(folder: Path) -> None:
    """With the scale of the stock call, and with another one."""
    found = []
    for guidance in ({}, {"teacher": 2.0}):
        backbone = make(folder, guidance=guidance)
        ours = teacher_sampler(backbone, 4, 1.0).sample(PROMPTS, SEEDS)
        scale = {"guidance_scale": 2.0} if guidance else {}
        assert float((ours - plain_pixels(folder, backbone, 4, **scale)).abs().max()) < 1e-4
        found.append(ours)
    assert float((found[0] - found[1]).abs().max()) > 1e-2
    assert backbone.stock_call[1] == 1.0


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_each_role_is_told_its_scale_and_moves_alone(folder: Path, adapters: bool) -> None:
    roles = RoleOptions({role: LoraConfig(4) for role in ("student", "fake_score")} if adapters else {})
    backbone: Any = make(folder, roles, guidance={"student": 1.0, "teacher": 4.0, "fake_score": 2.0})
    policy, objective = RolloutPolicy((1.0, 0.5)), DMD2(guidance_scale=1.0)
    student, teacher = objective.make_student(backbone, policy), backbone.load("teacher")
    networks = Networks({"student": student, "teacher": teacher, **objective.auxiliary(backbone, policy)}, policy)
    cond, uncond = backbone.encode_both(PROMPTS)
    waves: dict[str, torch.Tensor] = {}
    for role, denoiser in networks.items():
        network = (backbone.shared.denoiser if adapters else denoiser).network
        hook = network.register_forward_pre_hook(
            lambda _, __, given, role=role: waves.update({role: given["timestep_cond"]}), with_kwargs=True
        )
        denoiser(torch.randn(2, *backbone.latent_shape), torch.tensor([0.7, 0.3]), cond)
        hook.remove()
    for role, scale in {"student": 1.0, "teacher": 4.0, "fake_score": 2.0}.items():
        assert torch.equal(waves[role], guidance_waves(torch.full((2,), scale), 9)), role
    batch = Batch(torch.arange(2), 0, cond, uncond, backbone.latent_shape)
    check_turns(objective, networks, batch, backbone)


def test_an_export_reloads_and_the_stock_call_of_its_card_gives_its_pixels(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, policy = make(folder, guidance={"student": 3.0}), RolloutPolicy((1.0, 0.5))
    student = backbone.load("student")
    with torch.no_grad():
        for i, p in enumerate(student.parameters()):
            p.mul_(1 + 0.02 * ((i % 5) - 2))
    backbone.save_pipeline(student, policy, tmp_path)
    ours = Sampler(backbone, student, policy).sample(PROMPTS, SEEDS)
    again = make(tmp_path, guidance={"student": 3.0})
    assert torch.equal(ours, Sampler(again, again.load_exported(tmp_path), policy).sample(PROMPTS, SEEDS))
    fresh = iter([draws(backbone, "step1")])
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **__: next(fresh))
    assert "guidance_scale=3, " in backbone.usage(policy, tmp_path, False)
    assert "instead of 3" in backbone.plain_call(policy, False)
    assert float((ours - plain_pixels(tmp_path, backbone, 2, guidance_scale=3.0)).abs().max()) < 1e-4


def test_added_inputs_reach_it_beside_the_scale_and_cannot_be_exported(folder: Path) -> None:
    backbone = make(folder)
    student, cond = backbone.load("student"), backbone.encode_prompts(PROMPTS)
    x, t = draws(backbone, "x"), torch.tensor([0.7, 0.3])
    with torch.no_grad():
        before = student(x, t, cond)
        student.add_inputs({"stop": 4}, backbone.time_dim)
        assert torch.equal(student(x, t, cond, Inputs(stop=torch.tensor([3, 1]))), before)
        torch.nn.init.normal_(student.time_embedding.tables["stop"].weight)
        assert not torch.equal(student(x, t, cond, Inputs(stop=torch.tensor([3, 1]))), before)
    with pytest.raises(ValueError, match="told a guidance scale"):
        backbone.config.check_export(RolloutPolicy((1.0,), "ode", two_time=True))


def test_a_scale_for_a_unet_that_is_told_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is told no guidance scale"):
        make(tiny_sd(tmp_path), guidance={"teacher": 3.0})
