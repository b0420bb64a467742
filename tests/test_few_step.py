"""fastgen's own diffusers components: plain DiffusionPipeline samples a cps student, and a student of several experts,
as our sampler does, and only where fastgen has been imported."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from diffusers.schedulers import scheduling_flow_match_euler_discrete
from torch import Tensor
from variants import slow

from fastgen import noise
from fastgen.backbones.sd3 import SD3, SD3Config
from fastgen.config import load_recipe
from fastgen.denoiser import Denoiser
from fastgen.modules.experts import Experts
from fastgen.pipelines import few_step
from fastgen.pipelines.few_step import FlowMatchCPSScheduler, SD3Experts
from fastgen.pipelines.schedulers import flow_match_scheduler
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy, transition
from fastgen.run.export import export
from fastgen.sampling.sampler import load_sampler
from fastgen.schedule import FlowSchedule

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "assets/teachers/digits"
PROMPTS, SEEDS = ["a handwritten three", "the digit eight", "a five"], [3, 1, 4]
CPS = "{timesteps: [1.0, 0.8, 0.5, 0.2], transition: cps, eta: 0.9}"  # a list that the stock scheduler cannot hold
ODE = "{timesteps: [1.0, 0.75, 0.5, 0.25], transition: ode}"
RENOISE = "{timesteps: [1.0, 0.75, 0.5, 0.25]}"


@pytest.fixture(scope="module")
def backbone() -> SD3:
    return SD3Config(path=str(TEACHER)).build(torch.device("cpu"), torch.float32, 0)


def altered(denoiser: Denoiser, amount: float = 0.02) -> Denoiser:
    """Weights that are not the teacher's, and differ between experts."""
    with torch.no_grad():
        for i, p in enumerate(denoiser.parameters()):
            p.mul_(1 + amount * ((i % 7) - 3))
    return denoiser


def split(backbone: SD3, boundaries: tuple[float, ...]) -> Experts:
    experts = [altered(backbone.load("student"), 0.01 * (i + 1)) for i in range(len(boundaries) + 1)]
    return Experts(experts, boundaries)


def draws(backbone: SD3, name: str) -> Tensor:
    return noise.normal(torch.tensor(SEEDS), backbone.latent_shape, noise.make_key("sample", name))


def saved(backbone: SD3, student: Denoiser, rollout: str, folder: Path) -> Path:
    recipe = load_recipe(ROOT / "recipes/digits_dmd2_4step.yaml", [f"output_dir={folder}", f"rollout={rollout}"])
    export(student, backbone, recipe, folder / "export", 0)
    return folder / "export"


def plain_pixels(folder: Path, backbone: SD3, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What DiffusionPipeline gives for our noise, which replaces what its scheduler would draw."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline) is StableDiffusion3Pipeline
    pipeline.set_progress_bar_config(disable=True)
    fresh = iter([draws(backbone, f"step{i}") for i in range(1, 5)])
    for module in (few_step, scheduling_flow_match_euler_discrete):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(fresh))
    images = pipeline(
        PROMPTS, num_inference_steps=4, guidance_scale=1.0, latents=draws(backbone, "initial"), output_type="np"
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("boundaries", "rollout", "own"),
    [
        slow(((), CPS, ["scheduler"])),
        slow(((0.625,), ODE, ["transformer"])),
        slow(((0.9, 0.3), RENOISE, ["transformer"])),
        ((0.65,), CPS, ["scheduler", "transformer"]),
    ],
    ids=["cps", "two experts", "three experts", "cps, two experts"],
)
def test_an_export_gives_the_same_pixels_in_plain_diffusers(
    backbone: SD3,
    tmp_path: Path,
    boundaries: tuple[float, ...],
    rollout: str,
    own: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if the scheduler leaves out eta, or the transformer its second expert."""
    student = split(backbone, boundaries) if boundaries else altered(backbone.load("student"))
    folder = saved(backbone, student, rollout, tmp_path)
    sampler = load_sampler(folder)
    ours = sampler.sample(PROMPTS, SEEDS)
    error = (ours - plain_pixels(folder, backbone, monkeypatch)).abs().max().item()
    print(f"largest pixel difference {error:.2g}")
    assert error < 1e-4
    assert getattr(sampler.denoiser, "boundaries", ()) == boundaries  # bit for bit
    states = student.state_dict()
    assert all(torch.equal(v, states[k]) for k, v in sampler.denoiser.state_dict().items())
    index = json.loads((folder / "model_index.json").read_text())
    assert sorted(k for k, v in index.items() if isinstance(v, list) and v[0] == few_step.__name__) == own
    card = (folder / "README.md").read_text()
    assert f"import {few_step.__name__}\n" in card and all(part in card for part in own)


def test_an_export_of_stock_parts_says_nothing_of_fastgens(backbone: SD3, tmp_path: Path) -> None:
    card = (saved(backbone, backbone.load("student"), ODE, tmp_path) / "README.md").read_text()
    assert "import fastgen" not in card and "fastgen installed" not in card


@pytest.mark.slow
def test_plain_diffusers_samples_stock_exports_and_says_what_else_to_import(backbone: SD3, tmp_path: Path) -> None:
    """In another process. An export of stock parts samples where fastgen cannot be imported. One of fastgen's own
    parts is refused in words that name the import, and samples after it."""
    stock = saved(backbone, backbone.load("student"), "{timesteps: [1.0, 0.5]}", tmp_path / "stock")
    folder = saved(backbone, split(backbone, (0.625,)), CPS, tmp_path / "own")
    code = f"""
import sys
sys.modules["fastgen"] = None
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained({str(stock)!r})
image = pipeline("a handwritten two", num_inference_steps=2, guidance_scale=1).images[0]
assert image.size == (32, 32), image.size
del sys.modules["fastgen"]
assert not [name for name in sys.modules if name.startswith("fastgen")]
try:
    DiffusionPipeline.from_pretrained({str(folder)!r})
except ValueError as error:
    assert "import fastgen.pipelines.few_step" in str(error), error
else:
    raise AssertionError
import fastgen.pipelines.few_step
pipeline = DiffusionPipeline.from_pretrained({str(folder)!r})
image = pipeline("a handwritten two", num_inference_steps=4, guidance_scale=1).images[0]
assert image.size == (32, 32), image.size
pipeline("a handwritten two", num_inference_steps=3)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "this student has 4 steps" in result.stderr.splitlines()[-1], result.stderr


@pytest.mark.parametrize("t", [1.0, 0.626, 0.625, math.nextafter(0.625, 0) - 1e-6, 0.1])
def test_both_kinds_of_experts_choose_alike(backbone: SD3, t: float) -> None:
    """Also at exactly the boundary, which belongs to the upper expert, and just below, which does not."""
    ours = split(backbone, (0.625,))
    theirs = SD3Experts.of([e.network for e in ours.experts], (0.625,))  # type: ignore[union-attr]
    x, level = draws(backbone, "x"), torch.full((3,), t)
    cond = backbone.encode_prompts(PROMPTS)
    with torch.no_grad():
        found = ours(x, level, cond, predict="flow_prediction")
        stock = theirs(
            hidden_states=x,
            timestep=1000 * level,
            encoder_hidden_states=cond["prompt_embeds"],
            pooled_projections=cond["pooled"],
            joint_attention_kwargs={"context_log_repeats": cond["log_repeats"]},
            return_dict=False,
        )[0]
        one = ours.experts[0 if t >= 0.625 else 1](x, level, cond, predict="flow_prediction")
    assert torch.equal(found, one) and torch.equal(stock, one)


def test_a_call_needs_levels_of_one_expert(backbone: SD3) -> None:
    joined = SD3Experts.of([backbone.load("student").network] * 2, (0.5,))
    with pytest.raises(ValueError, match="levels of one expert"):
        joined(hidden_states=draws(backbone, "x"), timestep=torch.tensor([900.0, 900.0, 100.0]))


@pytest.mark.parametrize("eta", [0.1, 0.5, 0.9])
def test_the_scheduler_steps_as_the_rollout_does(eta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Along a whole list, the last step to the clean prediction; and its config survives its file."""
    policy = RolloutPolicy((1.0, 0.9, 0.35), "cps", eta)
    scheduler = flow_match_scheduler(policy)
    assert isinstance(scheduler, FlowMatchCPSScheduler)
    scheduler.set_timesteps(3)
    assert torch.equal(scheduler.timesteps, 1000 * torch.tensor(policy.timesteps))
    generator = torch.Generator().manual_seed(0)
    x, worst = torch.randn(4, 2, 3, 3, generator=generator), 0.0
    for i, level in enumerate(policy.timesteps):
        v, fresh = (torch.randn(x.shape, generator=generator) for _ in range(2))
        monkeypatch.setattr(few_step, "randn_tensor", lambda *_, fresh=fresh, **__: fresh)
        t, t_next = torch.full((4,), level), torch.full((4,), (*policy.timesteps, 0.0)[i + 1])
        expected = transition(FlowSchedule(), x - level * v, x, t, t_next, fresh, eta)
        x = scheduler.step(v, scheduler.timesteps[i], x, return_dict=False)[0]
        worst = max(worst, (x - expected).abs().max().item())
    print(f"eta {eta}: {worst:.1e}")
    assert worst < 1e-5


def test_a_scheduler_survives_its_file(tmp_path: Path) -> None:
    levels = [1.0, 1 / 3, 0.1234567890123456]
    FlowMatchCPSScheduler(levels, 0.7).save_pretrained(tmp_path)
    again = FlowMatchCPSScheduler.from_pretrained(tmp_path)
    assert again.config.levels == levels and again.config.eta == 0.7


def test_a_student_of_experts_is_no_teacher(backbone: SD3, tmp_path: Path) -> None:
    folder = saved(backbone, split(backbone, (0.5,)), ODE, tmp_path)
    with pytest.raises(RecipeError, match="student of several experts"):
        load_recipe(ROOT / "recipes/digits_dmd2_4step.yaml", [f"backbone.path={folder}"])


def test_a_told_time_does_not_go_with_cps() -> None:
    with pytest.raises(ValueError, match="conditioning_time with transition: cps"):
        flow_match_scheduler(RolloutPolicy((1.0,), "cps", 0.5, conditioning_time=0.6))
