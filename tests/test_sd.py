"""Stable Diffusion 1.5, 2.1 and XL against plain diffusers: same pixels, both ways."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.schedulers import scheduling_lcm, scheduling_tcd
from tiny_pipelines import PROMPTS, TEXT_WIDTH, tiny_sd, tiny_sdxl, with_scheduler
from torch import Tensor, nn
from variants import slow

from fastgen import noise
from fastgen.backbones.sd import SD, SDConfig
from fastgen.batch import Batch
from fastgen.config import load_recipe
from fastgen.denoiser import Inputs
from fastgen.modules.heads import TokenHeads
from fastgen.networks import Networks
from fastgen.objectives import DMD2
from fastgen.pipelines.schedulers import discrete_steps
from fastgen.recipe import Recipe
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy
from fastgen.run.export import export
from fastgen.sampling.sampler import Sampler, load_sampler, teacher_sampler

SEEDS = [3, 1, 4]
SHAPE = (4, 16, 16)
FAMILIES: dict[str, Callable[..., Path]] = {"sd": tiny_sd, "sdxl": tiny_sdxl}
FOUR = "{timesteps: [1.0, 0.75, 0.5, 0.25]}"


def open_backbone(folder: Path, dtype: torch.dtype = torch.float32) -> SD:
    config = SDConfig(path=str(folder))
    config.check()
    return config.build(torch.device("cpu"), dtype, 0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SD 1.5's configuration with a DDIMScheduler, and SDXL's."""
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in FAMILIES.items()}


@pytest.fixture(scope="module")
def backbones(folders: dict[str, Path]) -> dict[str, SD]:
    return {name: open_backbone(folder) for name, folder in folders.items()}


@pytest.fixture
def variant(folders: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A function: a family and options of its scheduler to a folder."""

    def make(family: str, options: dict[str, Any]) -> Path:
        name = {"sd": "DDIMScheduler", "sdxl": "EulerDiscreteScheduler"}[family]
        return with_scheduler(folders[family], tmp_path / "variant", **{"name": name, **options})

    return make


def draws(name: str) -> Tensor:
    return noise.normal(torch.tensor(SEEDS), SHAPE, noise.make_key("sample", name))


def open_pipeline(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_pixels(pipeline: Any, steps: int, scale: float) -> Tensor:
    """What a user's own call gives, for our initial noise."""
    images = pipeline(
        list(PROMPTS), num_inference_steps=steps, guidance_scale=scale, latents=draws("initial"), output_type="np"
    )
    return torch.from_numpy(images.images).permute(0, 3, 1, 2)


def difference(ours: Tensor, theirs: Tensor) -> float:
    error = (ours - theirs).abs().max().item()
    print(f"largest pixel difference {error:.2g}")
    return error


# --- the teacher


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize(("steps", "scale"), [slow((1, 1.0)), (4, 7.5), slow((13, 1.0))])
def test_our_sampler_with_the_teacher_gives_the_pipelines_own_pixels(
    folders: dict[str, Path], backbones: dict[str, SD], family: str, steps: int, scale: float
) -> None:
    ours = teacher_sampler(backbones[family], steps, scale).sample(PROMPTS, SEEDS)
    assert difference(ours, plain_pixels(open_pipeline(folders[family]), steps, scale)) < 1e-4


TRAILING = {"timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    ("family", "steps", "options"),
    [
        ("sd", 4, {"prediction_type": "v_prediction"}),
        ("sd", 4, {"prediction_type": "sample"}),
        ("sd", 4, {"set_alpha_to_one": True}),
        ("sd", 4, {"steps_offset": 0, "clip_sample": True}),  # StableDiffusionPipeline changes both
        ("sd", 4, TRAILING),
        ("sd", 4, TRAILING | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
        ("sd", 4, {"name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}),
        ("sdxl", 4, {"prediction_type": "v_prediction"}),
        ("sdxl", 4, {"name": "DDIMScheduler", "steps_offset": 0}),
        ("sdxl", 7, TRAILING),
        ("sdxl", 4, {"timestep_spacing": "linspace"}),
    ],
    ids=lambda v: "-".join(str(x) for x in v.values()) if isinstance(v, dict) else None,
)
def test_so_it_does_for_every_scheduler_that_takes_ddims_steps(
    variant: Callable[..., Path], family: str, steps: int, options: dict[str, Any]
) -> None:
    folder = variant(family, options)
    ours = teacher_sampler(open_backbone(folder), steps, 3.0).sample(PROMPTS, SEEDS)
    assert difference(ours, plain_pixels(open_pipeline(folder), steps, 3.0)) < 1e-4


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("PNDMScheduler", {"skip_prk_steps": True}),
        ("DPMSolverMultistepScheduler", {}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
    ],
)
def test_under_any_other_scheduler_the_teacher_is_sampled_by_ddim(
    variant: Callable[..., Path], name: str, options: dict[str, Any]
) -> None:
    folder = variant("sd", {"name": name, **options})
    backbone, pipeline = open_backbone(folder), open_pipeline(folder)
    assert type(pipeline.scheduler).__name__ == name
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    ours = teacher_sampler(backbone, 4, 3.0).sample(PROMPTS, SEEDS)
    assert difference(ours, plain_pixels(pipeline, 4, 3.0)) < 1e-4


@pytest.mark.parametrize(
    ("family", "steps", "options", "words"),
    [
        ("sd", 7, TRAILING, "steps to 857 and then calls the network at 856"),
        ("sd", 4, {"timestep_spacing": "linspace"}, "steps to 749 and then calls the network at 666"),
        ("sd", 1000, {}, "not whole steps below 1000"),
        ("sdxl", 5, {"timestep_spacing": "linspace"}, "not whole steps below 1000"),
        ("sdxl", 4, {"name": "DDIMScheduler", "clip_sample": True}, "clips its clean predictions"),
    ],
)
def test_steps_no_list_of_levels_describes_are_refused(
    variant: Callable[..., Path], family: str, steps: int, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        open_backbone(variant(family, options)).teacher_policy(steps)


@pytest.mark.parametrize(("family", "scale"), [("sd", 7.5), ("sdxl", 5.0)])
def test_a_plain_folder_is_sampled_as_its_pipelines_call_does(
    folders: dict[str, Path], family: str, scale: float
) -> None:
    sampler = load_sampler(folders[family])
    assert sampler.policy.num_steps == 50 and sampler.guidance_scale == scale
    ours = load_sampler(folders[family], num_steps=2).sample(PROMPTS, SEEDS)
    assert difference(ours, plain_pixels(open_pipeline(folders[family]), 2, scale)) < 1e-4


# --- the student


def student_recipe(folder: Path, output: Path, rollout: str) -> Recipe:
    overrides = [f"output_dir={output}", f"rollout={rollout}", f"backbone.path={folder}"]
    return load_recipe("recipes/sdxl_dmd2_4step.yaml", overrides)


def another(backbone: SD) -> Any:
    """A student whose weights are not the teacher's."""
    student = backbone.load("student")
    with torch.no_grad():
        for i, p in enumerate(student.parameters()):
            p.mul_(1 + 0.02 * ((i % 5) - 2))
    return student


@pytest.mark.parametrize(
    ("family", "options", "rollout"),
    [
        ("sd", {}, FOUR),
        slow(("sd", {}, "{timesteps: [1.0, 0.75, 0.5, 0.25], transition: ode}")),
        slow(("sd", {}, "{timesteps: [0.4]}")),
        slow(("sd", {}, "{timesteps: [0.9, 0.6, 0.3]}")),
        ("sd", {}, "{timesteps: [0.9, 0.6, 0.3], transition: ode}"),
        slow(("sd", {}, "{timesteps: [1.0, 0.667, 0.334]}")),
        slow(("sd", {"prediction_type": "v_prediction"}, FOUR)),
        ("sd", TRAILING | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, FOUR),
        ("sdxl", {}, FOUR),
        slow(("sdxl", {}, "{timesteps: [1.0]}")),
    ],
)
def test_an_export_gives_the_same_pixels_in_plain_diffusers(
    variant: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    options: dict[str, Any],
    rollout: str,
) -> None:
    """With the same noise injected into the stock scheduler, which draws its own."""
    folder = variant(family, options)
    backbone = open_backbone(folder)
    recipe, student = student_recipe(folder, tmp_path, rollout), another(backbone)
    export(student, backbone, recipe, tmp_path / "export", 0)
    ours = load_sampler(tmp_path / "export").sample(PROMPTS, SEEDS)
    assert torch.equal(ours, Sampler(backbone, student, recipe.rollout).sample(PROMPTS, SEEDS))

    fresh = iter([draws(f"step{i}") for i in range(1, recipe.rollout.num_steps)])
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **__: next(fresh))
    pipeline = open_pipeline(tmp_path / "export")
    assert difference(ours, plain_pixels(pipeline, recipe.rollout.num_steps, 1.0)) < 1e-4
    assert recipe.rollout.transition == "ode" or not list(fresh)


@pytest.mark.parametrize(
    ("family", "options", "timesteps"),
    [
        ("sd", {}, (1.0, 0.75, 0.5, 0.25)),
        slow(("sdxl", {}, (1.0, 0.75, 0.5, 0.25))),
        slow(("sd", {}, (0.9, 0.6, 0.3))),
        slow(("sd", {}, (1.0, 0.667, 0.334))),
        ("sd", TRAILING | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, (1.0, 0.5)),
    ],
)
def test_a_tcd_export_gives_the_same_pixels_in_plain_diffusers(
    variant: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    options: dict[str, Any],
    timesteps: tuple[float, ...],
) -> None:
    """Given its eta, which pipelines hand to TCDScheduler; that ends at step 0, clean in its betas."""
    backbone = open_backbone(variant(family, options))
    rollout = f"{{timesteps: {list(timesteps)}, transition: tcd, eta: 0.3}}"
    recipe = student_recipe(tmp_path / "variant", tmp_path, rollout)
    student = another(backbone)
    export(student, backbone, recipe, tmp_path / "export", 0)
    assert "eta=0.3" in (tmp_path / "export/README.md").read_text()
    ours = load_sampler(tmp_path / "export").sample(PROMPTS, SEEDS)
    assert difference(ours, Sampler(backbone, student, recipe.rollout).sample(PROMPTS, SEEDS)) < 1e-5

    fresh = iter([draws(f"step{i}") for i in range(1, len(timesteps))])
    monkeypatch.setattr(scheduling_tcd, "randn_tensor", lambda *_, **__: next(fresh))
    pipeline = open_pipeline(tmp_path / "export")
    images = pipeline(
        list(PROMPTS),
        num_inference_steps=len(timesteps),
        guidance_scale=1.0,
        eta=0.3,
        latents=draws("initial"),
        output_type="np",
    ).images
    assert difference(ours, torch.from_numpy(images).permute(0, 3, 1, 2)) < 1e-4
    assert not list(fresh)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_cards_call_runs_and_its_seed_decides(
    folders: dict[str, Path], backbones: dict[str, SD], tmp_path: Path, family: str
) -> None:
    backbone = backbones[family]
    export(backbone.load("student"), backbone, student_recipe(folders[family], tmp_path, FOUR), tmp_path / "e", 0)
    found = re.search(r"```python\n(.*?)```", (tmp_path / "e/README.md").read_text(), re.S)
    assert found
    code = found[1].replace("path/to/this/folder", str(tmp_path / "e"))
    images = []
    for _ in range(2):
        scope: dict[str, Any] = {}
        exec(code, scope)
        images.append(scope["image"].tobytes())
        torch.randn(5)
    assert images[0] == images[1] and scope["image"].size == (32, 32)


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        ("{timesteps: [1.0, 0.9, 0.5, 0.25]}", r"nearest list is \[1.0, 0.8, 0.5, 0.3\]"),
        ("{timesteps: [1.0, 0.9, 0.5, 0.25], transition: ode}", "cannot be stored in DDIMScheduler"),
        ("{timesteps: [1.0, 0.667, 0.334], transition: ode}", r"nearest list is \[0.999, 0.666, 0.333\]"),
        ("{timesteps: [1.0, 0.66667, 0.33333]}", "multiples of 1/1000"),
        ("{timesteps: [1.0], conditioning_time: 0.4}", r"give timesteps: \[0.4\]"),
        ("{timesteps: [0.001]}", r"nearest list is \[0.002\]"),
        ("{timesteps: [1.0, 0.9, 0.5, 0.25], transition: tcd, eta: 0.3}", "cannot be stored in TCDScheduler"),
        ("{timesteps: [0.01, 0.005], transition: tcd, eta: 0.8}", "would go through step 0"),
    ],
)
@pytest.mark.parametrize("path", ["stabilityai/stable-diffusion-xl-base-1.0", None])
def test_lists_no_stock_scheduler_holds_are_refused_when_the_recipe_loads(
    folders: dict[str, Path], tmp_path: Path, path: str | None, rollout: str, words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        student_recipe(Path(path or folders["sd"]), tmp_path, rollout)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 10])
def test_the_nearest_list_is_held(count: int) -> None:
    """Following the advice of the refusal once is enough."""
    generator = torch.Generator().manual_seed(count)
    for transition in ("renoise", "ode"):
        times = sorted(torch.rand(count, generator=generator, dtype=torch.float64).tolist(), reverse=True)
        with pytest.raises(ValueError, match="nearest list is") as refusal:
            discrete_steps(RolloutPolicy(tuple(times), transition), 1000)  # type: ignore[arg-type]
        near = json.loads(str(refusal.value).split("nearest list is ")[1])
        discrete_steps(RolloutPolicy(tuple(near), transition), 1000)  # type: ignore[arg-type]


def test_a_student_with_extra_inputs_is_not_exported(backbones: dict[str, SD], tmp_path: Path) -> None:
    student = backbones["sd"].load("student")
    student.add_inputs({"stop": 4}, backbones["sd"].time_dim)
    with pytest.raises(ValueError, match="does not fit StableDiffusionPipeline"):
        backbones["sd"].save_pipeline(student, RolloutPolicy((1.0,)), tmp_path / "export")


# --- conditioning and images


def test_prompts_are_encoded_as_the_stock_pipeline_does(folders: dict[str, Path], backbones: dict[str, SD]) -> None:
    """SDXL's empty prompt is the stock unconditional, all zeros; time_ids are those of an uncropped image."""
    prompts = [*PROMPTS, ""]
    ours = backbones["sd"].encode_prompts(prompts)
    with torch.no_grad():
        embeds, no_embeds = open_pipeline(folders["sd"]).encode_prompt(list(PROMPTS), "cpu", 1, True)
    torch.testing.assert_close(ours["prompt_embeds"], torch.cat([embeds, no_embeds[:1]]))

    ours, pipeline = backbones["sdxl"].encode_prompts(prompts), open_pipeline(folders["sdxl"])
    with torch.no_grad():
        embeds, no_embeds, pooled, no_pooled = pipeline.encode_prompt(list(PROMPTS))
    torch.testing.assert_close(ours["prompt_embeds"], torch.cat([embeds, no_embeds[:1]]))
    torch.testing.assert_close(ours["pooled"], torch.cat([pooled, no_pooled[:1]]))
    assert not ours["prompt_embeds"][3].any() and not ours["pooled"][3].any()
    sizes = pipeline._get_add_time_ids((32, 32), (0, 0), (32, 32), torch.float32, TEXT_WIDTH)
    assert torch.equal(ours["time_ids"], sizes.expand(4, 6))


def test_an_sdxl_that_does_not_force_zeros_encodes_the_empty_prompt(folders: dict[str, Path], tmp_path: Path) -> None:
    pipeline = open_pipeline(folders["sdxl"])
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    pipeline.save_pretrained(tmp_path)
    ours = teacher_sampler(open_backbone(tmp_path), 2, 4.0).sample(PROMPTS, SEEDS)
    assert difference(ours, plain_pixels(open_pipeline(tmp_path), 2, 4.0)) < 1e-4


MOMENTS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.7, 1.0, 2.0]}


def with_moments(folder: Path) -> Path:
    """Writes latent moments into the VAE's config."""
    path = folder / "vae/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | MOMENTS))
    return folder


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_latent_moments_count_where_the_stock_pipeline_reads_them(variant: Callable[..., Path], family: str) -> None:
    folder = with_moments(variant(family, {}))
    ours = teacher_sampler(open_backbone(folder), 2, 1.0).sample(PROMPTS, SEEDS)
    assert difference(ours, plain_pixels(open_pipeline(folder), 2, 1.0)) < 1e-4


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_encoding_undoes_the_scaling_of_decoding(variant: Callable[..., Path], family: str, scaled: bool) -> None:
    """decode is the pipeline's (above), and with encode it is the VAE's own round trip."""
    folder = variant(family, {})
    backbone = open_backbone(with_moments(folder) if scaled else folder)
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mode = backbone.vae.encode(pixels * 2 - 1).latent_dist.mode()
        again = (backbone.vae.decode(mode).sample / 2 + 0.5).clamp(0, 1)
    latents = backbone.encode(pixels)
    assert latents.shape == (3, *SHAPE) and (latents - mode).abs().max() > 0.1
    assert difference(backbone.decode(latents), again) < 1e-5


def test_sdxls_vae_runs_in_float32_where_float16_overflows(folders: dict[str, Path]) -> None:
    for family, dtype in (("sd", torch.float16), ("sdxl", torch.float32)):
        backbone = open_backbone(folders[family], torch.float16)
        assert backbone.vae.dtype == dtype
        latents = backbone.encode(torch.rand(1, 3, 32, 32))
        assert latents.dtype == torch.float16 and backbone.decode(latents).isfinite().all()


def test_another_resolution(folders: dict[str, Path]) -> None:
    """Latents and SDXL's sizes follow it; the pipeline is called with the same height and width."""
    backbone = SDConfig(path=str(folders["sdxl"]), resolution=24).build(torch.device("cpu"), torch.float32, 0)
    assert backbone.latent_shape == (4, 12, 12) and backbone.image_size == 24
    ours = teacher_sampler(backbone, 2, 3.0).sample(PROMPTS, SEEDS)
    start = noise.normal(torch.tensor(SEEDS), (4, 12, 12), noise.make_key("sample", "initial"))
    images = open_pipeline(folders["sdxl"])(
        list(PROMPTS), height=24, width=24, num_inference_steps=2, guidance_scale=3.0, latents=start, output_type="np"
    )
    assert difference(ours, torch.from_numpy(images.images).permute(0, 3, 1, 2)) < 1e-4


# --- training


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_an_extended_unet_starts_as_the_unextended_one(backbones: dict[str, SD], family: str) -> None:
    backbone = backbones[family]
    plain, extended = backbone.load("fake_score"), backbone.load("fake_score")
    extended.add_inputs({"stop": 3}, backbone.time_dim)
    x, t, cond = draws("x"), torch.tensor([0.1, 0.5, 1.0]), backbone.encode_prompts(PROMPTS)
    with torch.no_grad():
        expected = plain(x, t, cond)
        for k in range(3):
            assert torch.equal(extended(x, t, cond, Inputs(stop=torch.full((3,), k))), expected)
        extended.time_embedding.tables["stop"].weight[1] += 0.5
        told = extended(x, t, cond, Inputs(stop=torch.tensor([0, 1, 2])))
    change = (told - expected).abs().amax((1, 2, 3))
    assert change[1] > 1e-3 and change[0] < 1e-5 and change[2] < 1e-5
    with pytest.raises(ValueError, match="stop"):
        extended(x, t, cond)


def test_features_are_the_middle_blocks_tokens(backbones: dict[str, SD]) -> None:
    denoiser = backbones["sd"].load("teacher")
    with denoiser.capture() as features, torch.no_grad():
        denoiser(draws("x"), torch.full((3,), 0.5), backbones["sd"].encode_prompts(PROMPTS))
    assert [f.shape for f in features] == [(3, 8 * 8, denoiser.feature_dim)]
    assert TokenHeads(denoiser.feature_dim, 1)(features).shape == (3, 1)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_each_turn_of_dmd2_moves_its_own_networks(backbones: dict[str, SD], family: str) -> None:
    """With guidance, a GAN and a stop input: every tensor of the turn's networks moves, none of the others'."""
    backbone, policy = backbones[family], RolloutPolicy((1.0, 0.75, 0.5, 0.25))
    torch.manual_seed(0)
    objective = DMD2(guidance_scale=3.0, gan_weight=0.1, stops="per_sample", condition_on_stop=True)
    modules: dict[str, nn.Module] = {role: backbone.load(role) for role in ("student", "teacher")}
    networks = Networks(modules | objective.auxiliary(backbone, policy), policy)
    prompts = list(PROMPTS) * 2
    batch = Batch(
        ids=torch.arange(6),
        key=1,
        cond=backbone.encode_prompts(prompts),
        uncond=backbone.encode_prompts([""] * 6),
        latent_shape=backbone.latent_shape,
        latents=backbone.encode(torch.rand(6, 3, 32, 32)),
    )
    for turn in objective.turns(0, {}):
        before = {role: [p.clone() for p in module.parameters()] for role, module in networks.items()}
        optimizer = torch.optim.SGD([p for role in turn.roles for p in networks[role].parameters()], lr=1.0)
        loss: Any = objective.loss(turn, networks, batch, {})
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        for role, module in networks.items():
            moved = [not torch.equal(a, b) for a, b in zip(before[role], module.parameters(), strict=True)]
            assert moved == [role in turn.roles] * len(moved), (turn.name, role)
            assert all(p.grad is None for p in module.parameters())


# --- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rescale_betas_zero_snr": True}, "leaves no signal at t = 1"),
        ({"name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}, "scheduler says flow_prediction"),
        ({"name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "not a discrete"),
        ({"name": "EDMEulerScheduler"}, "EDMEulerScheduler is not a discrete"),
    ],
)
def test_noise_that_is_not_this_familys_is_refused(
    variant: Callable[..., Path], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        SDConfig(path=str(variant("sd", options))).check()


def test_what_is_no_plain_unet_pipeline_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="backbone sd loads a StableDiffusionPipeline or StableDiffusionXLPipeline"):
        SDConfig(path="assets/teachers/digits").check()
    with pytest.raises(ValueError, match="resolution must be a multiple of 2, got 25"):
        SDConfig(path=str(folders["sd"]), resolution=25).check()
