"""The contract with plain diffusers: same pixels, both ways."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.schedulers import scheduling_flow_match_euler_discrete
from variants import slow

from fastgen import noise
from fastgen.backbones.sd3 import SD3, SD3Config
from fastgen.config import load_recipe
from fastgen.data.digits import load_digits
from fastgen.pipelines.schedulers import flow_match_config, flow_match_sigmas
from fastgen.recipe import Recipe
from fastgen.rollout import RolloutPolicy
from fastgen.run.export import export
from fastgen.sampling.sampler import Sampler, load_sampler, teacher_sampler

TEACHER = Path(__file__).parents[1] / "assets/teachers/digits"
PROMPTS = ["a handwritten three", "the digit eight", "a five"]
SEEDS = [3, 1, 4]
SHAPE = SD3Config(path=str(TEACHER)).build(torch.device("cpu"), torch.float32, 0).latent_shape


def draws(name: str) -> torch.Tensor:
    return noise.normal(torch.tensor(SEEDS), SHAPE, noise.make_key("sample", name))


@pytest.fixture(scope="module")
def backbone() -> SD3:
    return SD3Config(path=str(TEACHER)).build(torch.device("cpu"), torch.float32, 0)


def plain_pixels(pipeline: StableDiffusion3Pipeline, steps: int, scale: float) -> torch.Tensor:
    """What a user's own call gives, for our initial noise."""
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        PROMPTS, num_inference_steps=steps, guidance_scale=scale, latents=draws("initial"), output_type="np"
    )
    return torch.from_numpy(images.images).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("steps", "scale"), [slow((1, 1.0)), slow((4, 1.0)), (4, 3.0), slow((12, 1.5))])
def test_our_sampler_with_the_teacher_gives_the_pipelines_own_pixels(backbone: SD3, steps: int, scale: float) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(TEACHER)
    ours = teacher_sampler(backbone, steps, scale).sample(PROMPTS, SEEDS)
    error = (ours - plain_pixels(pipeline, steps, scale)).abs().max().item()
    print(f"largest pixel difference {error:.2g}")
    assert error < 1e-4


def test_a_scheduler_whose_shift_depends_on_the_size_gives_the_pipelines_own_pixels(tmp_path: Path) -> None:
    shutil.copytree(TEACHER, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "scheduler/scheduler_config.json"
    dynamic = {"use_dynamic_shifting": True, "base_shift": 0.9, "max_shift": 2.0}
    path.write_text(json.dumps(json.loads(path.read_text()) | dynamic))
    config = SD3Config(path=str(tmp_path))
    config.check()
    ours = teacher_sampler(config.build(torch.device("cpu"), torch.float32, 0), 4, 1.0).sample(PROMPTS, SEEDS)
    error = (ours - plain_pixels(StableDiffusion3Pipeline.from_pretrained(tmp_path), 4, 1.0)).abs().max().item()
    print(f"largest pixel difference {error:.2g}")
    assert error < 1e-4
    path.write_text(json.dumps(json.loads(path.read_text()) | {"invert_sigmas": True}))
    with pytest.raises(ValueError, match="invert_sigmas"):
        config.check()


def student_recipe(tmp_path: Path, rollout: str) -> Recipe:
    return load_recipe("recipes/digits_dmd2_4step.yaml", [f"output_dir={tmp_path}", f"rollout={rollout}"])


@pytest.mark.parametrize(
    "rollout",
    [
        "{timesteps: [1.0, 0.75, 0.5, 0.25]}",
        "{timesteps: [1.0, 0.9, 0.75, 0.5], transition: ode}",
        slow("{timesteps: [1.0, 0.4]}"),
        slow("{timesteps: [1.0]}"),
        "{timesteps: [1.0], conditioning_time: 0.6}",
    ],
)
def test_an_export_gives_the_same_pixels_in_plain_diffusers(
    backbone: SD3, tmp_path: Path, rollout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same noise injected into the stock scheduler, which draws its own."""
    recipe = student_recipe(tmp_path, rollout)
    student = backbone.load("student")
    with torch.no_grad():
        for i, p in enumerate(student.parameters()):  # weights that are not the teacher's
            p.mul_(1 + 0.02 * ((i % 5) - 2))
    export(student, backbone, recipe, tmp_path / "export", 0)
    ours = load_sampler(tmp_path / "export").sample(PROMPTS, SEEDS)
    same = Sampler(backbone, student, recipe.rollout).sample(PROMPTS, SEEDS)
    assert torch.equal(ours, same)

    fresh = iter([draws(f"step{i}") for i in range(1, recipe.rollout.num_steps + 1)])
    monkeypatch.setattr(torch, "randn_like", lambda *_, **__: next(fresh))  # as older schedulers draw it
    monkeypatch.setattr(
        scheduling_flow_match_euler_discrete, "randn_tensor", lambda *_, **__: next(fresh), raising=False
    )
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "export")
    error = (ours - plain_pixels(pipeline, recipe.rollout.num_steps, 1.0)).abs().max().item()
    print(f"largest pixel difference {error:.2g}")
    assert error < 1e-4


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_every_shifted_uniform_list_is_held_exactly(shift: float, count: int) -> None:
    uniform = [1 - i / count for i in range(count)]
    times = tuple(shift * u / (1 + (shift - 1) * u) for u in uniform)
    held = flow_match_sigmas(count, flow_match_config(RolloutPolicy(times)))
    assert max(abs(a - b) for a, b in zip(held, times, strict=True)) < 1e-6


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (RolloutPolicy((1.0, 0.9, 0.3)), None),
        (RolloutPolicy((1.0, 0.9, 0.3, 0.1)), "cannot be stored"),
        (RolloutPolicy((0.9, 0.5)), "start at 1.0"),
        (RolloutPolicy((1.0,), conditioning_time=0.39999), "multiple of 0.001"),
    ],
)
def test_lists_the_stock_scheduler_cannot_hold_are_refused(policy: RolloutPolicy, words: str | None) -> None:
    if words is None:  # three values: two ends and one shift, always held
        held = flow_match_sigmas(3, flow_match_config(policy))
        assert max(abs(a - b) for a, b in zip(held, policy.timesteps, strict=True)) < 1e-6
    else:
        with pytest.raises(ValueError, match=words):
            flow_match_config(policy)


def test_samples_depend_on_their_seed_not_on_the_batch(backbone: SD3) -> None:
    sampler = teacher_sampler(backbone, 4, 1.5)
    together = sampler.sample(PROMPTS, SEEDS)
    alone = torch.cat([sampler.sample([p], [s]) for p, s in zip(PROMPTS, SEEDS, strict=True)])
    error = (together - alone).abs().max().item()
    print(f"largest pixel difference {error:.2g}")
    assert error < 1e-5


def test_images_survive_the_vae(backbone: SD3) -> None:
    pixels, _ = load_digits("test")
    latents = backbone.encode(pixels[:100])
    error = (backbone.decode(latents) - pixels[:100]).abs().mean().item()
    print(f"mean reconstruction error {error:.3g}, latent std {latents.std():.3g}")
    assert error < 0.03
    assert 0.8 < latents.std() < 1.2


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_only_the_teacher_is_frozen(backbone: SD3, role: str) -> None:
    denoiser = backbone.load(role)
    assert all(p.requires_grad == (role != "teacher") for p in denoiser.parameters())


def test_a_path_that_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        SD3Config(path=str(tmp_path)).check()
    with pytest.raises(ValueError, match="neither a folder nor a hub id"):
        SD3Config(path="no/such/folder").check()


def test_a_prompt_has_the_same_bits_in_any_company() -> None:
    """A run that continues encodes prompts as it meets them: with others than the uninterrupted run did, and after
    others. A longer prompt of an earlier batch adds no tokens to the later ones."""
    alone, together = (SD3Config(path=str(TEACHER)).build(torch.device("cpu"), torch.float32, 0) for _ in range(2))
    first = alone.encode_prompts(PROMPTS[:1])
    longer = together.encode_prompts(["a three, which is written by hand in a hurry"])
    assert longer["prompt_embeds"].shape[1] > first["prompt_embeds"].shape[1]
    among = together.encode_prompts([*PROMPTS[1:], PROMPTS[0]]).select(torch.tensor([2]))
    assert all(first[name].equal(among[name]) for name in first)


def test_the_card_calls_a_student_at_its_own_size_and_length(tmp_path: Path) -> None:
    """And names neither where they are those of the stock call."""
    policy, backbones = (
        RolloutPolicy((1.0, 0.5)),
        [
            SD3Config(path=str(TEACHER), resolution=resolution, max_sequence_length=length).build(
                torch.device("cpu"), torch.float32, 0
            )
            for resolution, length in ((None, 256), (16, 77))
        ],
    )
    plain, own = (backbone.usage(policy, tmp_path, False) for backbone in backbones)
    assert "guidance_scale=1)" in plain
    assert "guidance_scale=1, height=16, width=16, max_sequence_length=77)" in own
