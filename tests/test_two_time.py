"""Students that are told the level their step ends at, or a guidance scale: sampling, export, init_from, adapters."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers.schedulers import scheduling_tcd
from oracles import FOUR_JUMPS, GaussianMap, Recorder, point_batch
from safetensors.torch import load_file
from tiny_pipelines import tiny_sd, tiny_sdxl
from tiny_wan import tiny_wan
from torch import Tensor

from fastgen import noise
from fastgen.backbones.base import Backbone, RoleOptions
from fastgen.backbones.gaussian_mixture import GaussianMixtureConfig
from fastgen.backbones.pipeline_config import PipelineConfig
from fastgen.backbones.sd import SDConfig
from fastgen.backbones.sd3 import SD3Config
from fastgen.backbones.wan import WanConfig
from fastgen.batch import Conditioning
from fastgen.config import build_recipe
from fastgen.denoiser import Denoiser
from fastgen.flow.time_pairs import TimePairs, phase_edges, shrinking
from fastgen.modules.inputs import carried_names
from fastgen.modules.lora import LoraConfig
from fastgen.objectives import DMD2, Objective
from fastgen.pipelines.flow_map import INPUTS, read_inputs
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy, backward_simulation, sample
from fastgen.rollout.steps import jump_law
from fastgen.run.export import export
from fastgen.sampling.sampler import Sampler, load_sampler
from fastgen.schedule import FlowSchedule
from fastgen.train import train

CPU = torch.device("cpu")
DIGITS = str(Path(__file__).parents[1] / "assets/teachers/digits")
MIXTURE = GaussianMixtureConfig(means=((0.7, -0.3),), stds=(0.5,), fit_steps=2, width=16, depth=1)


def ends(student: Recorder) -> list[float]:
    """The levels s that the student was told, call by call."""
    return [float(call.inputs.s[0]) for call in student.calls]  # type: ignore[index]


def fill_inputs(student: Denoiser) -> Denoiser:
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "tables" in name or name.startswith("inputs."):
                p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    return student


# --- the policy and its sampler


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_jumps_of_the_exact_map_land_on_the_exact_samples(steps: int) -> None:
    """However many: x0 = m + s noise."""
    draw = noise.normal(torch.arange(50), (2,), 5, torch.float64)
    student = Recorder(GaussianMap(mean=(0.7, -0.3)))
    found = sample(student, FOUR_JUMPS.with_steps(steps), Conditioning({}), lambda name: draw)
    wanted = torch.tensor([0.7, -0.3], dtype=torch.float64) + 0.5 * draw
    assert torch.allclose(found, wanted, atol=1e-12)
    assert ends(student) == pytest.approx([*(1 - i / steps for i in range(1, steps)), 0.0])


def test_the_sampler_tells_zero_where_each_step_is_renoised() -> None:
    student = Recorder(GaussianMap(mean=(0.7, -0.3)))
    policy = RolloutPolicy((1.0, 0.5), "renoise", two_time=True)
    sample(student, policy, Conditioning({}), lambda name: torch.ones(4, 2, dtype=torch.float64))
    assert ends(student) == [0.0, 0.0]


@pytest.mark.parametrize("eta", [0.3, 0.8])
def test_a_jump_below_and_fresh_noise_keep_the_law(eta: float) -> None:
    """CTM's gamma sampler: the student is told the level r that it jumps to. The fresh noise is gamma sigma_next in
    sigma = t / (1 - t), where sigma_r = sqrt(1 - gamma^2) sigma_next."""
    policy = RolloutPolicy((1.0, 0.75, 0.5, 0.25), "tcd", eta, two_time=True)
    student, count = Recorder(GaussianMap()), 60_000
    draws = iter(torch.randn(4, count, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    found = sample(student, policy, Conditioning({}), lambda name: next(draws)).detach()
    assert ends(student) == pytest.approx([(1 - eta) * t for t in (0.75, 0.5, 0.25)] + [0.0])
    assert float(found.mean()) == pytest.approx(0.7, abs=0.008) and float(found.std()) == pytest.approx(0.5, abs=0.006)

    x, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    _, std = jump_law(FlowSchedule(), x, x, one, 0.5 * one, eta)
    r = (1 - eta) * 0.5
    gamma = (1 - (r / (1 - r)) ** 2) ** 0.5
    assert float(std) / (1 - 0.5) == pytest.approx(gamma)
    assert policy.any_step and policy.with_steps(2).timesteps == pytest.approx((1.0, 0.5))


def test_a_rollout_jumps_and_then_predicts_the_clean_sample() -> None:
    """Backward simulation: exact jumps to the stopping level, then X_{t,0}; with `to`, X_{t,to}."""
    batch = point_batch(6)
    student = Recorder(GaussianMap(mean=(0.7, -0.3)))
    rollout = backward_simulation(student, FOUR_JUMPS, batch, torch.full((6,), 2))
    assert ends(student) == [0.75, 0.5, 0.0]
    wanted = torch.tensor([0.7, -0.3], dtype=torch.float64) + 0.5 * batch.normal("initial")
    assert torch.allclose(rollout.x, wanted, atol=1e-12)
    level = torch.full((6,), 0.25, dtype=torch.float64)
    stopped = backward_simulation(student, FOUR_JUMPS, batch, torch.full((6,), 2), to=level)
    assert ends(student)[-1] == 0.25
    size = math.hypot(0.75 * 0.5, 0.25)
    mean = torch.tensor([0.7, -0.3], dtype=torch.float64)
    assert torch.allclose(stopped.x, 0.75 * mean + size * batch.normal("initial"), atol=1e-12)


def test_grids_of_other_numbers_of_steps() -> None:
    assert FOUR_JUMPS.with_steps(2).timesteps == pytest.approx((1.0, 0.5))
    shifted = RolloutPolicy((1.0, 0.9, 0.75, 0.5), "ode", two_time=True)  # shift 3
    assert shifted.with_steps(8).timesteps[4] == pytest.approx(0.75)
    assert shifted.with_steps(4) is shifted
    with pytest.raises(ValueError, match="distilled to 2 steps"):
        RolloutPolicy((1.0, 0.5)).with_steps(3)
    for options in ({"transition": "cps", "eta": 0.5}, {"conditioning_time": 0.4}):
        with pytest.raises(ValueError, match="two_time"):
            RolloutPolicy((1.0,), two_time=True, **options)


def test_time_pairs_have_their_shares_and_their_order() -> None:
    pairs = TimePairs(diagonal=0.5, to_zero=0.25, max_gap=0.3)
    batch = point_batch(1000)
    t, s = pairs(batch)
    assert (s <= t).all() and (s >= 0).all() and (t <= 1).all() and (t >= 1e-3).all()
    assert int((s == t).sum()) == pytest.approx(500, abs=2) and int((s == 0).sum()) == pytest.approx(250, abs=2)
    free = (s < t) & (s > 0)
    assert float((t - s)[free].max()) <= 0.3 + 1e-12
    wide = TimePairs(diagonal=0.0)(batch)
    assert float((wide[0] - wide[1]).mean()) == pytest.approx(1 / 3, abs=0.03)
    with pytest.raises(ValueError, match="shares"):
        TimePairs(diagonal=0.8, to_zero=0.3)


def test_phase_edges_and_ects_gap() -> None:
    t = torch.tensor([1.0, 0.76, 0.75, 0.5, 0.1])
    assert phase_edges(t, 4)[0].tolist() == [0.75, 0.75, 0.5, 0.25, 0.0]
    one = torch.ones(1)
    raw = [1 - 2 ** -(stage + 1) * (1 + 8 * torch.sigmoid(-one)) for stage in (0, 1, 3, 7)]
    assert [float(r) for r in raw] == pytest.approx([-0.576, 0.212, 0.803, 0.988], abs=1e-3)
    assert [float(shrinking(one, stage)) for stage in (0, 1, 3)] == pytest.approx([0.0, 0.212, 0.803], abs=1e-3)
    assert [float(shrinking(one, stage, q=4)) for stage in (0, 1, 3)] == pytest.approx([0.212, 0.803, 0.988], abs=1e-3)


# --- export


def families(root: Path) -> dict[str, PipelineConfig]:
    return {
        "sd": SDConfig(path=str(tiny_sd(root / "sd"))),
        "sdxl": SDConfig(path=str(tiny_sdxl(root / "sdxl"))),
        "sd3": SD3Config(path=DIGITS),
        "wan": WanConfig(path=str(tiny_wan(root / "wan", layers=2)), height=32, width=32, num_frames=5),
        "wan2": WanConfig(path=str(tiny_wan(root / "wan2", 2, layers=2)), height=32, width=32, num_frames=5),
    }


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PipelineConfig]:
    return families(tmp_path_factory.mktemp("families"))


def call(pipeline: Any, backbone: Any, prompts: list[str], steps: int, **more: Any) -> Tensor:
    """What the exported pipeline gives from our noise: pixels [B, 3, H, W] or frames [B, F, 3, H, W]."""
    start = noise.normal(torch.arange(len(prompts)), backbone.latent_shape, noise.make_key("sample", "initial"))
    options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "np"} | more
    if backbone.output == "frames":
        config = backbone.config
        frames = pipeline(
            prompts,
            height=config.height,
            width=config.width,
            num_frames=config.num_frames,
            latents=start.transpose(1, 2),
            **options,
        ).frames
        return torch.from_numpy(frames).permute(0, 1, 4, 2, 3)
    return torch.from_numpy(pipeline(prompts, latents=start, **options).images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "wan", "wan2"])
def test_an_exported_flow_map_gives_the_same_pixels(
    configs: dict[str, PipelineConfig], family: str, tmp_path: Path
) -> None:
    """Our sampler before the export, our sampler on the export, and the exported pipeline class agree; what it is told
    matters. A flow map of flow matching also samples with another number of steps."""
    from fastgen.pipelines import flow_map

    backbone: Any = configs[family].build(CPU, torch.float32, 0)
    policy = dataclasses.replace(FOUR_JUMPS, embedded_guidance=3.0)
    student = fill_inputs(DMD2().make_student(backbone, policy)).eval()
    prompts = ["a handwritten two", "the digit five"] if family == "sd3" else ["a red cat", "two green dogs"]
    before = Sampler(backbone, student, policy).sample(prompts, range(2))
    backbone.save_pipeline(student, policy, tmp_path)
    unlike = Sampler(backbone, student, dataclasses.replace(policy, embedded_guidance=9.0))
    assert (unlike.sample(prompts, range(2)) - before).abs().max() > 1e-3

    again = Sampler(backbone, backbone.load_exported(tmp_path), policy).sample(prompts, range(2))
    assert (again - before).abs().max() < 1e-5
    index = json.loads((tmp_path / "model_index.json").read_text())
    cls = vars(flow_map)[index["_class_name"]]
    pipeline = cls.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    found = call(pipeline, backbone, prompts, 4)
    print(f"{family}: {(found - before).abs().max():.1e}")
    assert (found - before).abs().max() < 1e-4
    six = Sampler(backbone, student, policy.with_steps(5)).sample(prompts, range(2))
    assert (call(pipeline, backbone, prompts, 5) - six).abs().max() < 1e-4
    assert (six - before).abs().max() > 1e-3
    with pytest.raises(ValueError, match="does not fit"):
        backbone.save_pipeline(student, FOUR_JUMPS, tmp_path / "other")


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_an_exported_flow_map_jumps_below_and_adds_noise(
    configs: dict[str, PipelineConfig], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gamma sampler in fastgen's classes: with our noise in the place of what the scheduler draws, our pixels."""
    from fastgen.pipelines import few_step, flow_map

    backbone: Any = configs[family].build(CPU, torch.float32, 0)
    policy = RolloutPolicy(FOUR_JUMPS.timesteps, "tcd", 0.3, two_time=True)
    student, prompts = (
        fill_inputs(DMD2().make_student(backbone, policy)).eval(),
        ["a handwritten two", "the digit five"],
    )
    ours = Sampler(backbone, student, policy).sample(prompts, range(2))
    backbone.save_pipeline(student, policy, tmp_path)
    cls = vars(flow_map)[json.loads((tmp_path / "model_index.json").read_text())["_class_name"]]
    pipeline = cls.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    keys = [noise.make_key("sample", f"step{i}") for i in range(1, 5)]
    fresh = iter([noise.normal(torch.arange(2), backbone.latent_shape, key) for key in keys])
    for module in (few_step, scheduling_tcd):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(fresh))
    given = {"eta": 0.3} if family == "sd" else {}
    found = call(pipeline, backbone, prompts, 4, **given)
    print(f"{family}: {(found - ours).abs().max():.1e}")
    assert (found - ours).abs().max() < 1e-4
    ode = Sampler(backbone, student, FOUR_JUMPS).sample(prompts, range(2))
    assert (ode - ours).abs().max() > 1e-3


@pytest.mark.parametrize("told", [True, False])
def test_an_exported_student_of_several_numbers_of_steps_gives_the_same_pixels(
    configs: dict[str, PipelineConfig], told: bool, tmp_path: Path
) -> None:
    """With four steps and with two, which the network is told or not; it takes no other number."""
    from diffusers import DiffusionPipeline

    from fastgen.pipelines.flow_map import FlowMapStableDiffusion3Pipeline

    backbone: Any = configs["sd3"].build(CPU, torch.float32, 0)
    policy = RolloutPolicy(FOUR_JUMPS.timesteps, "ode", step_counts=(2, 4), embedded_steps=told)
    student = fill_inputs(DMD2().make_student(backbone, policy)).eval()
    prompts = ["a handwritten two", "the digit five"]
    backbone.save_pipeline(student, policy, tmp_path)
    cls: Any = FlowMapStableDiffusion3Pipeline if told else DiffusionPipeline
    pipeline = cls.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    again, samples = backbone.load_exported(tmp_path), []
    for count in (4, 2):
        expected = Sampler(backbone, student, policy.with_steps(count)).sample(prompts, range(2))
        found = Sampler(backbone, again, policy.with_steps(count)).sample(prompts, range(2))
        assert (found - expected).abs().max() < 1e-5
        assert (call(pipeline, backbone, prompts, count) - expected).abs().max() < 1e-4
        samples.append(expected)
    unlike = dataclasses.replace(policy, timesteps=policy.with_steps(2).timesteps, embedded_steps=False)
    if told:  # the number matters
        untold = Sampler(backbone, DMD2().make_student(backbone, unlike).eval(), unlike).sample(prompts, range(2))
        assert (untold - samples[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="2 or 4 steps"):
        call(pipeline, backbone, prompts, 3)
    assert "`num_inference_steps` may be 2, 4" in backbone.usage(policy, tmp_path, False)


def test_plain_diffusers_refuses_the_folder(configs: dict[str, PipelineConfig], tmp_path: Path) -> None:
    import diffusers

    backbone = configs["sd3"].build(CPU, torch.float32, 0)
    backbone.save_pipeline(DMD2().make_student(backbone, FOUR_JUMPS), FOUR_JUMPS, tmp_path)
    with pytest.raises(AttributeError, match="FlowMapStableDiffusion3Pipeline"):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path)


def test_a_mixtures_flow_map_comes_back_from_its_folder(tmp_path: Path) -> None:
    backbone = MIXTURE.build(CPU, torch.float32, 0)
    student = fill_inputs(DMD2().make_student(backbone, FOUR_JUMPS))
    backbone.save_pipeline(student, FOUR_JUMPS, tmp_path)
    again = backbone.load_exported(tmp_path)
    samples = [Sampler(backbone, d, FOUR_JUMPS).sample([""] * 8, range(8)) for d in (student, again)]
    assert torch.equal(*samples) and not again.training


# --- a run: training, checkpoint, export, continuing from it


def short_run(raw: dict[str, Any], folder: Path, **sections: Any) -> Path:
    raw = raw | {"output_dir": str(folder)} | sections
    raw["backbone"] = raw["backbone"] | {"fit_steps": 20, "width": 16, "depth": 1}
    raw["train"] = raw["train"] | {"steps": 2, "batch_size": 16, "sample_every": 0, "eval_every": 0}
    raw["eval"] = raw["eval"] | {"quick_num_samples": 50, "num_samples": 50, "teacher_steps": []}
    return train(build_recipe(raw))


@pytest.mark.slow
def test_runs_start_from_each_other(raw_recipe: dict[str, Any], tmp_path: Path) -> None:
    """A plain student becomes a two-time one with its new branch at zero, from its run or from its export alone; a
    two-time one starts another; the way back is refused before anything loads."""
    told = {"timesteps": list(FOUR_JUMPS.timesteps), "transition": "ode", "two_time": True}
    plain = short_run(raw_recipe, tmp_path / "plain")
    first = short_run(raw_recipe, tmp_path / "first", rollout=told, init_from=str(plain))
    sampler = load_sampler(first, num_steps=3)
    assert sampler.policy.num_steps == 3 and sampler.sample([""] * 4, range(4)).isfinite().all()
    weights = load_file(first / "export/model.safetensors")
    assert any("tables.s" in name for name in weights)
    short_run(raw_recipe, tmp_path / "second", rollout=told, init_from=str(first))
    with pytest.raises(RecipeError, match=r"init_from: the student of .* has the inputs s, and"):
        short_run(raw_recipe, tmp_path / "fourth", init_from=str(first))
    for checkpoint in (plain / "checkpoints").iterdir():
        checkpoint.rename(tmp_path / checkpoint.name)
    short_run(raw_recipe, tmp_path / "third", rollout=told, init_from=str(plain / "export"))


def test_an_objective_that_cannot_is_refused(raw_recipe: dict[str, Any]) -> None:
    raw_recipe["objective"] = {"name": "adp", "pixel_weight": 0}
    raw_recipe["rollout"] = {"timesteps": [1.0], "transition": "ode", "two_time": True}
    raw_recipe["optimizers"] = {role: {"lr": 1e-4} for role in ("student", "latent_discriminator")}
    with pytest.raises(RecipeError, match="two_time"):
        build_recipe(raw_recipe)


def test_names_of_carried_weights() -> None:
    own = ["a.time.embedding.w", "a.time.tables.s.weight", "b.w"]
    assert carried_names(own, ["a.time.w", "b.w"]) == {"a.time.embedding.w": "a.time.w", "b.w": "b.w"}
    assert carried_names(["inputs.s.weight", "b.w"], ["b.w"]) == {"b.w": "b.w"}
    for given in (["a.time.w"], ["a.time.w", "b.w", "c.w"]):
        with pytest.raises(ValueError, match="another network"):
            carried_names(own, given)


# --- adapters


ADAPTED = RoleOptions(adapters={"student": LoraConfig(rank=2)})


def lora_student(backbone: Backbone) -> Any:
    student: Any = Objective().make_student(backbone, FOUR_JUMPS)
    student.reset(0)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if ".lora_B." in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return student


def test_an_adapter_has_its_own_inputs_and_so_has_its_average(tmp_path: Path) -> None:
    """The base and the teacher do not; the average follows; the export is the whole network, with them."""
    backbone = SD3Config(path=DIGITS).build(CPU, torch.float32, 0, ADAPTED)
    student = lora_student(backbone)
    teacher = backbone.load("teacher")
    average = student.average()
    fill_inputs(student)
    average.load_state_dict(student.state_dict())
    sampler = Sampler(backbone, average, FOUR_JUMPS)
    before = sampler.sample(["a two"], [0])
    assert torch.equal(Sampler(backbone, student, FOUR_JUMPS).sample(["a two"], [0]), before)
    cond, x = backbone.encode_prompts(["a two"]), torch.randn(1, *backbone.latent_shape)
    teacher(x, torch.full((1,), 0.5), cond)
    backbone.save_pipeline(student, FOUR_JUMPS, tmp_path)
    found = Sampler(backbone, backbone.load_exported(tmp_path), FOUR_JUMPS).sample(["a two"], [0])
    assert (found - before).abs().max() < 1e-4


def test_an_adapter_on_experts_has_inputs_for_each(tmp_path: Path) -> None:
    """Their tables are of the adapter's dtype, each expert is told by its own, and all are exported."""
    wan = WanConfig(path=str(tiny_wan(tmp_path / "wan", experts=2, layers=1)), height=32, width=32, num_frames=5)
    backbone = wan.build(CPU, torch.float64, 0, ADAPTED)
    student = fill_inputs(lora_student(backbone))
    tables = {name: p for name, p in student.named_parameters() if name.startswith("inputs.")}
    assert list(tables) == ["inputs.0.s.weight", "inputs.1.s.weight"]
    assert {p.dtype for p in student.parameters()} == {torch.float64}
    before = Sampler(backbone, student, FOUR_JUMPS).sample(["a cat"], [0])
    with torch.no_grad():
        tables["inputs.1.s.weight"].neg_()
    after = Sampler(backbone, student, FOUR_JUMPS).sample(["a cat"], [0])
    assert (after - before).abs().max() > 1e-3
    backbone.save_pipeline(student, FOUR_JUMPS, tmp_path / "export")
    found = Sampler(backbone, backbone.load_exported(tmp_path / "export"), FOUR_JUMPS).sample(["a cat"], [0])
    assert (found - after).abs().max() < 1e-4


def test_an_exported_adapter_with_inputs_is_a_whole_pipeline(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    raw = yaml.safe_load((root / "recipes/digits_dmd2_4step.yaml").read_text())
    raw["rollout"] = {"timesteps": list(FOUR_JUMPS.timesteps), "transition": "ode", "two_time": True}
    raw["backbone"]["path"] = DIGITS
    recipe = build_recipe(raw | {"lora": {"student": {"rank": 2}}})
    backbone = recipe.backbone.build(CPU, torch.float32, 0, ADAPTED)
    student = fill_inputs(lora_student(backbone))
    before = Sampler(backbone, student, FOUR_JUMPS).sample(["a two"], [0])
    export(student, backbone, recipe, tmp_path / "export", 0)
    found = load_sampler(tmp_path / "export").sample(["a two"], [0])
    assert (found - before).abs().max() < 1e-4
    card = (tmp_path / "export/README.md").read_text()
    assert "from fastgen.pipelines.flow_map import FlowMapStableDiffusion3Pipeline" in card and "load_lora" not in card


@pytest.mark.parametrize("data", [b"", b"garbage that is no safetensors file", None], ids=["empty", "garbage", "gone"])
def test_a_damaged_file_of_added_inputs_is_named(data: bytes | None, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / INPUTS).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{INPUTS} cannot be read"):
        read_inputs(tmp_path)
