"""Wan against plain diffusers: same frames, both ways, for one network and for two experts; and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import imageio.v3
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanVideoToVideoPipeline
from diffusers.schedulers import scheduling_flow_match_euler_discrete
from PIL import Image
from tiny_wan import tiny_wan
from torch import Tensor
from variants import slow

from fastgen import noise, signals
from fastgen.backbones.wan import Wan, WanConfig, WanDenoiser, latent_size
from fastgen.batch import Batch, Conditioning
from fastgen.config import build_recipe
from fastgen.denoiser import Inputs
from fastgen.evaluation.evaluate import evaluate_with_samples
from fastgen.evaluation.folders import evaluate_path
from fastgen.evaluation.report import draw_pictures, samples
from fastgen.modules.experts import Experts
from fastgen.modules.heads import TokenHeads
from fastgen.networks import Networks
from fastgen.objectives import DMD2
from fastgen.pipelines.schedulers import flow_match_config
from fastgen.recipe import EvalConfig, Recipe
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy, draw_stops
from fastgen.sampling import video
from fastgen.sampling.folder import sample_folder
from fastgen.sampling.pictures import grid
from fastgen.sampling.sampler import Sampler, load_sampler, teacher_sampler
from fastgen.schedule import TimeSampler
from fastgen.train import train

PROMPTS = ["a cat runs", "a blue dog"]
SEEDS = [3, 1]
SIZE = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16}
SHIFTED = (1.0, 0.9375, 5 / 6, 0.625)  # shift 5, four steps; two on each side of the boundary 0.875
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Pipelines of one network and of two experts."""
    root = tmp_path_factory.mktemp("wan")
    return {n: tiny_wan(root / str(n), experts=n) for n in (1, 2)}


def open_wan(folder: Path, **changes: Any) -> Wan:
    config = WanConfig(path=str(folder), **(SIZE | changes))
    config.check()
    return config.build(CPU, torch.float32, 0)


def draws(backbone: Wan, name: str) -> Tensor:
    """Our noise for the seeds, in diffusers' layout."""
    return noise.normal(torch.tensor(SEEDS), backbone.latent_shape, noise.make_key("sample", name)).transpose(1, 2)


def plain_frames(folder: Path, backbone: Wan, steps: int, **call: Any) -> Tensor:
    """What a user's own call gives, for our initial noise: [B, F, 3, H, W]."""
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline(PROMPTS, num_inference_steps=steps, latents=draws(backbone, "initial"), **(SIZE | call))
    return torch.from_numpy(out.frames).permute(0, 1, 4, 2, 3)


def error_between(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max().item()
    print(f"largest pixel difference {error:.2g}")
    return error


# --- the stock pipeline's frames


@pytest.mark.parametrize(
    ("experts", "steps", "scale"),
    [(1, 1, 1.0), (1, 4, 1.0), (1, 6, 5.0), (2, 4, 1.0), (2, 6, 4.0), (2, 6, (6.0, 2.0)), (2, 1, 3.0)],
)
def test_our_sampler_with_the_teacher_gives_the_pipelines_own_frames(
    folders: dict[int, Path], experts: int, steps: int, scale: float | tuple[float, float]
) -> None:
    backbone = open_wan(folders[experts])
    ours = teacher_sampler(backbone, steps, scale).sample(PROMPTS, SEEDS)
    assert ours.shape == (2, 5, 3, 32, 32)
    both = (
        {"guidance_scale": scale}
        if isinstance(scale, float)
        else dict(zip(("guidance_scale", "guidance_scale_2"), scale, strict=True))
    )
    assert error_between(ours, plain_frames(folders[experts], backbone, steps, **both)) < 1e-4


def test_the_frames_depend_on_what_the_equality_is_about(folders: dict[int, Path]) -> None:
    """So that 1e-4 says something: prompts, guidance, each expert and its scale all matter by far more."""
    backbone = open_wan(folders[2])
    frames = {s: teacher_sampler(backbone, 6, s).sample(PROMPTS, SEEDS) for s in (1.0, (6.0, 2.0), (2.0, 6.0))}
    only_high = Sampler(backbone, backbone.load("teacher").experts[0], backbone.teacher_policy(6))
    frames[0.0] = only_high.sample(PROMPTS, SEEDS)
    reference = frames.pop(1.0)
    for scale, other in frames.items():
        change = (other - reference).abs().max().item()
        print(f"{scale}: {change:.2g}")
        assert change > 3e-3
    assert (frames[6.0, 2.0] - frames[2.0, 6.0]).abs().max() > 3e-3


def test_per_token_timesteps_of_the_stock_pipeline_change_nothing(tmp_path: Path) -> None:
    """Wan 2.2 TI2V-5B gives every token its timestep; from text alone they are all the same."""
    folder = tiny_wan(tmp_path / "wan", expand_timesteps=True)
    backbone = open_wan(folder)
    ours = teacher_sampler(backbone, 4, 3.0).sample(PROMPTS, SEEDS)
    assert error_between(ours, plain_frames(folder, backbone, 4, guidance_scale=3.0)) < 1e-4


@pytest.mark.slow
def test_a_unipc_folder_is_sampled_with_euler_at_its_levels(tmp_path: Path) -> None:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    backbone = open_wan(tiny_wan(tmp_path / "wan", scheduler=scheduler, time_scale=0.0))
    policy = backbone.teacher_policy(8)
    scheduler.set_timesteps(8)
    assert policy == RolloutPolicy(tuple(scheduler.sigmas[:-1].tolist()), "ode")
    u = torch.linspace(1, 1e-3, 9, dtype=torch.float64)[:-1]
    assert torch.allclose(torch.tensor(policy.timesteps).double(), 3 * u / (1 + 2 * u), atol=2e-6)
    error = {}
    for steps in (8, 32):
        ours = teacher_sampler(backbone, steps, 1.0).sample(PROMPTS, SEEDS)
        plain = plain_frames(tmp_path / "wan", backbone, steps, guidance_scale=1.0)
        error[steps] = (ours - plain).abs().mean().item()
    print(f"mean difference to UniPC by number of steps: {error}")
    assert error[32] < error[8] / 2  # another solver of the same equation


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize(
    "policy",
    [
        RolloutPolicy(SHIFTED),
        slow(RolloutPolicy((1.0, 0.9, 0.75, 0.5), "ode")),
        slow(RolloutPolicy((1.0,))),
        RolloutPolicy((1.0,), conditioning_time=0.6),
    ],
    ids=["renoise", "ode", "one step", "told time"],
)
def test_an_export_gives_the_same_frames_in_plain_diffusers(
    folders: dict[int, Path], tmp_path: Path, experts: int, policy: RolloutPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same noise injected into the stock scheduler, which draws its own."""
    backbone = open_wan(folders[experts])
    student = backbone.load("student")
    with torch.no_grad():
        for i, p in enumerate(student.parameters()):  # weights that are not the teacher's
            p.mul_(1 + 0.02 * ((i % 5) - 2))
    backbone.config.check_export(policy)
    backbone.save_pipeline(student, policy, tmp_path / "export")
    index = json.loads((tmp_path / "export/model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert index["boundary_ratio"] == (0.875 if experts == 2 else None)

    exported = open_wan(tmp_path / "export")
    ours = Sampler(exported, exported.load_exported(tmp_path / "export"), policy).sample(PROMPTS, SEEDS)
    assert torch.equal(ours, Sampler(backbone, student, policy).sample(PROMPTS, SEEDS))
    fresh = iter([draws(backbone, f"step{i}") for i in range(1, policy.num_steps + 1)])
    monkeypatch.setattr(
        scheduling_flow_match_euler_discrete, "randn_tensor", lambda *_, **__: next(fresh), raising=False
    )
    plain = plain_frames(tmp_path / "export", backbone, policy.num_steps, guidance_scale=1.0)
    assert error_between(ours, plain) < 1e-4


def test_a_level_on_the_boundary_is_exported_to_the_same_expert() -> None:
    """Shift 7 in four steps meets Wan 2.2's boundary exactly: 0.875."""
    policy = RolloutPolicy(tuple(7 * u / (1 + 6 * u) for u in (1.0, 0.75, 0.5, 0.25)))
    assert policy.timesteps[2] == 0.875
    scheduler = scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteScheduler(**flow_match_config(policy))
    scheduler.set_timesteps(4)
    assert (scheduler.timesteps >= 875.0).tolist() == [True, True, True, False]


# --- latents


def test_latents_are_normalised_as_the_pipelines_are(folders: dict[int, Path]) -> None:
    backbone = open_wan(folders[1])
    plain = WanPipeline.from_pretrained(folders[1])
    parts = {name: part for name, part in plain.components.items() if name != "transformer_2"}
    other = WanVideoToVideoPipeline(**parts)
    other.scheduler.scale_noise = lambda latents, *_: latents
    frames = noise.uniform(torch.arange(2), (9, 3, 32, 32), 0, torch.float32)
    theirs = other.prepare_latents(
        frames.transpose(1, 2) * 2 - 1,
        batch_size=2,
        generator=torch.Generator(),
        device=CPU,
        dtype=torch.float32,
        timestep=torch.zeros(1),
    )
    ours = backbone.encode(frames)
    assert ours.shape == (2, 3, 4, 4, 4)
    error = (ours.transpose(1, 2) - theirs).abs().max().item()

    latents = noise.normal(torch.arange(2), backbone.latent_shape, 0)
    plain.set_progress_bar_config(disable=True)
    plain.scheduler.step = lambda _v, _t, x, **_: (x,)
    decoded = plain(PROMPTS, latents=latents.transpose(1, 2), num_inference_steps=1, guidance_scale=1.0, **SIZE).frames
    decode_error = (backbone.decode(latents).permute(0, 1, 3, 4, 2) - torch.from_numpy(decoded)).abs().max().item()
    print(f"encode {error:.2g}, decode {decode_error:.2g}")
    assert error < 1e-5 and decode_error < 1e-5


def test_the_vae_stays_in_float32(folders: dict[int, Path]) -> None:
    backbone = WanConfig(path=str(folders[1]), **SIZE).build(CPU, torch.bfloat16, 0)
    assert backbone.load("student").network.dtype == torch.bfloat16
    latents = noise.normal(torch.arange(1), backbone.latent_shape, 0, torch.float32)
    exact = open_wan(folders[1]).decode(latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(backbone.decode(latents), exact)


@pytest.mark.parametrize(
    ("size", "vae", "patch", "expected"),
    [
        ({}, {}, (1, 2, 2), (21, 60, 104)),  # Wan 2.1 and A14B: 480 x 832 x 81, 1560 tokens a frame
        ({"height": 704, "width": 1280, "num_frames": 121}, {"scale_factor_spatial": 16}, (1, 2, 2), (31, 44, 80)),
    ],
)
def test_latent_sizes_of_the_released_models(size: Any, vae: Any, patch: Any, expected: tuple[int, ...]) -> None:
    assert latent_size(WanConfig(path="a/b", **size), vae, {"patch_size": patch}) == expected


# --- the network behind the contract


def inputs(backbone: Wan, levels: list[float]) -> tuple[Tensor, Tensor, Conditioning]:
    rows = torch.arange(len(levels))
    cond = backbone.encode_prompts([PROMPTS[i % 2] for i in rows])
    return noise.normal(rows, backbone.latent_shape, 5), torch.tensor(levels), cond


@pytest.mark.parametrize("experts", [1, 2])
def test_an_extended_network_starts_as_the_unextended_one(folders: dict[int, Path], experts: int) -> None:
    backbone = open_wan(folders[experts])
    x, t, cond = inputs(backbone, [0.95, 0.9, 0.4, 0.1])
    stop = torch.tensor([0, 1, 2, 3])
    plain = backbone.load("fake_score")(x, t, cond)
    extended = backbone.load("fake_score")
    extended.add_inputs({"stop": 4}, backbone.time_dim)
    assert torch.equal(extended(x, t, cond, Inputs(stop=stop)), plain)

    with torch.no_grad():
        for name, p in extended.named_parameters():
            if "tables" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    told = extended(x, t, cond, Inputs(stop=stop))
    alone = extended(x[2:3], t[2:3], cond.select(slice(2, 3)), Inputs(stop=stop[2:3]))
    assert torch.allclose(told[2:3], alone, atol=1e-5)
    assert ((told - plain).flatten(1).abs().amax(1) > 1e-3).all()
    other = extended(x, t, cond, Inputs(stop=torch.tensor([0, 1, 2, 0])))
    assert torch.equal(told[:3], other[:3]) or torch.allclose(told[:3], other[:3], atol=1e-6)
    assert not torch.allclose(told[3], other[3], atol=1e-3)
    with pytest.raises(ValueError, match="extra inputs"):
        extended(x, t, cond)
    with pytest.raises(ValueError, match="does not fit WanPipeline"):
        backbone.save_pipeline(extended, RolloutPolicy(SHIFTED), Path("nowhere"))


@pytest.mark.parametrize("experts", [1, 2])
def test_recomputed_activations_give_the_same_gradients(folders: dict[int, Path], experts: int) -> None:
    backbone = open_wan(folders[experts])
    x, t, cond = inputs(backbone, [0.9, 0.4])
    gradients = []
    for recompute in (False, True):
        fake = backbone.load("fake_score")
        fake.add_inputs({"stop": 4}, backbone.time_dim)
        if recompute:
            fake.enable_checkpointing()
        fake(x, t, cond, Inputs(stop=torch.tensor([1, 2]))).square().mean().backward()
        gradients.append({n: p.grad for n, p in fake.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(g, gradients[1][n], atol=1e-7) for n, g in gradients[0].items())


def test_a_bfloat16_network_takes_float32_inputs(folders: dict[int, Path]) -> None:
    backbone = open_wan(folders[1])
    x, t, cond = inputs(backbone, [0.9, 0.4])
    exact, teacher = backbone.load("teacher")(x, t, cond), backbone.load("teacher").to(torch.bfloat16)
    rounded = teacher(x, t, cond)
    assert rounded.dtype == torch.float32 and (rounded - exact).abs().mean() < 0.05 * exact.std()


def test_one_level_a_frame(folders: dict[int, Path]) -> None:
    backbone = open_wan(folders[1])
    denoiser = backbone.load("teacher")
    x, t, cond = inputs(backbone, [0.9, 0.4])
    together = denoiser(x, t, cond)
    by_frame = denoiser(x, t[:, None].expand(-1, 2), cond)
    error = (together - by_frame).abs().max().item()
    print(f"largest difference {error:.2g}")
    assert error < 1e-5
    mixed = denoiser(x, torch.tensor([[0.9, 0.2], [0.4, 0.4]]), cond)
    assert (mixed[0] - together[0]).abs().max() > 1e-3 and torch.allclose(mixed[1], together[1], atol=1e-5)


def test_features_are_the_tokens_at_three_depths(folders: dict[int, Path]) -> None:
    backbone = open_wan(folders[1])
    fake = backbone.load("fake_score")
    x, t, cond = inputs(backbone, [0.9, 0.4])
    with fake.capture() as features:
        fake(x, t, cond)
    blocks = list(fake.network.blocks)
    assert [blocks.index(m) for m in fake.feature_modules] == [2, 3]  # half of 4; three quarters is the last
    assert [f.shape for f in features] == [(2, 2 * 2 * 2, 24)] * 2 and fake.feature_dim == 24
    assert TokenHeads(24, 2)(features).shape == (2, 2)


def test_depths_in_a_network_as_deep_as_wans(tmp_path: Path) -> None:
    backbone = open_wan(tiny_wan(tmp_path / "wan", layers=30))
    fake = backbone.load("fake_score")
    assert [list(fake.network.blocks).index(m) for m in fake.feature_modules] == [15, 22, 29]  # as FastGen


# --- experts


def test_every_row_goes_to_the_expert_of_its_level(folders: dict[int, Path]) -> None:
    backbone = open_wan(folders[2])
    experts = backbone.load("teacher")
    assert isinstance(experts, Experts) and experts.boundaries == (0.875,)
    x, t, cond = inputs(backbone, [0.2, 0.875, 0.8749, 1.0, 0.5])
    assert experts.expert_of(t).tolist() == [1, 0, 1, 0, 1]
    out = experts(x, t, cond, predict="flow_prediction")
    for i, chosen in enumerate([1, 0, 1, 0, 1]):
        row = slice(i, i + 1)
        alone = experts.experts[chosen](x[row], t[row], cond.select(row), predict="flow_prediction")
        assert torch.allclose(out[row], alone, atol=1e-5)
    frames = t[:, None].expand(-1, 2)
    assert torch.allclose(experts(x, frames, cond, predict="flow_prediction"), out, atol=1e-5)
    with pytest.raises(ValueError, match="frames of a sample"):
        experts(x, torch.tensor([[0.9, 0.8]]).expand(5, -1), cond)


def test_features_of_two_experts_are_refused_and_of_one_are_not(folders: dict[int, Path]) -> None:
    backbone = open_wan(folders[2])
    experts = backbone.load("fake_score")
    x, t, cond = inputs(backbone, [0.2, 0.5, 0.9])
    with experts.capture() as features:
        experts(x[:2], t[:2], cond.select(slice(0, 2)))
        experts(x[2:], t[2:], cond.select(slice(2, 3)))
        assert [len(f) for f in features] == [2, 2, 1, 1] and len(experts.feature_modules) == 2
        with pytest.raises(ValueError, match="features come from a single expert"):
            experts(x, t, cond)
    experts(x, t, cond)


def test_a_value_for_each_expert(folders: dict[int, Path]) -> None:
    two, one = (open_wan(folders[n]).load("teacher") for n in (2, 1))
    t = torch.tensor([0.9, 0.1, 0.875])
    scale = two.per_expert((4.0, 3.0), t)
    assert isinstance(scale, Tensor) and scale.tolist() == [4.0, 3.0, 4.0]
    assert two.per_expert(2.0, t) == one.per_expert(2.0, t) == 2.0
    with pytest.raises(ValueError, match="as many values"):
        two.per_expert((1.0, 2.0, 3.0), t)
    with pytest.raises(ValueError, match="single network"):
        one.per_expert((1.0, 2.0), t)


def test_guidance_with_a_scale_a_sample(folders: dict[int, Path]) -> None:
    backbone = open_wan(folders[2])
    experts = backbone.load("teacher")
    x, t, cond = inputs(backbone, [0.9, 0.2])
    uncond = backbone.encode_prompts(["", ""])
    mixed = signals.guided(experts, x, t, cond, uncond, torch.tensor([4.0, 1.0]))
    assert torch.allclose(mixed[0], signals.guided(experts, x, t, cond, uncond, 4.0)[0], atol=1e-6)
    assert torch.allclose(mixed[1], experts(x, t, cond)[1], atol=1e-5)
    off = signals.guided(experts, x, t, cond, uncond, torch.tensor([4.0, 4.0]), interval=(0.0, 0.1))
    assert torch.allclose(off, experts(x, t, cond), atol=1e-5)


@pytest.mark.parametrize("boundaries", [(), (0.5, 0.4), (1.0,), (0.0,)])
def test_boundaries_that_do_not_divide_the_levels_are_refused(
    folders: dict[int, Path], boundaries: tuple[float, ...]
) -> None:
    denoiser = open_wan(folders[1]).load("teacher")
    with pytest.raises(ValueError, match="2 experts need 1 boundaries"):
        Experts([denoiser, denoiser], boundaries)


@pytest.mark.slow
def test_divided_experts_that_other_processes_call_are_called_here_too(
    folders: dict[int, Path], tmp_path: Path
) -> None:
    """Two processes whose rows go to different experts: no deadlock, and the gradient of the whole batch."""
    script = f"""
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_wan import inputs, open_wan

dist.init_process_group("gloo")
rank = dist.get_rank()
backbone = open_wan({str(folders[2])!r})
plain, divided = backbone.load("student"), backbone.load("student")
for module in (*divided.shard_modules, divided):
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
for levels in ([0.9, 0.95, 0.1, 0.2], [0.9, 0.1, 0.2, 0.3], [0.9, 0.1, 0.95, 0.2]):
    x, t, cond = inputs(backbone, levels)
    plain.zero_grad()
    expected = plain(x, t, cond)
    expected.square().mean().backward()
    own = slice(2 * rank, 2 * rank + 2)
    divided.zero_grad()
    out = divided(x[own], t[own], cond.select(own))
    out.square().mean().backward()
    assert torch.allclose(out, expected[own], atol=1e-5)
    for (name, p), q in zip(plain.named_parameters(), divided.parameters(), strict=True):
        whole = q.grad.full_tensor()
        assert torch.allclose(whole, torch.zeros_like(whole) if p.grad is None else p.grad, atol=1e-5), name
dist.destroy_process_group()
"""
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py")],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]


# --- a turn of training


def make_batch(backbone: Wan, key: int) -> Batch:
    rows = torch.arange(4)
    both = backbone.encode_prompts([PROMPTS[i % 2] for i in rows] + [""] * 4)
    return Batch(
        ids=rows,
        key=key,
        cond=both.select(slice(0, 4)),
        uncond=both.select(slice(4, None)),
        latent_shape=backbone.latent_shape,
        latents=noise.normal(rows, backbone.latent_shape, 9),
    )


def moved(networks: Networks, objective: DMD2, turn_name: str, batch: Batch) -> set[str]:
    """Plays one turn with plain gradient descent; returns the modules that moved, experts by their number."""
    turn = next(t for t in objective.turns(0, {}) if t.name == turn_name)
    before = {role: {n: p.clone() for n, p in networks[role].named_parameters()} for role in networks}
    optimizer = torch.optim.SGD([p for role in turn.roles for p in networks[role].parameters()], lr=0.1)
    objective.loss(turn, networks, batch, {}).total.backward()
    optimizer.step()
    changed = set()
    for role in networks:
        for name, p in networks[role].named_parameters():
            if not torch.equal(p, before[role][name]):
                changed.add(role + (f".{name.split('.')[1]}" if name.startswith("experts") else ""))
    left = {r for r in networks if r not in turn.roles and any(p.grad is not None for p in networks[r].parameters())}
    assert left == set()
    return changed


def make_networks(backbone: Wan, objective: DMD2) -> Networks:
    policy = RolloutPolicy(SHIFTED)
    torch.manual_seed(0)
    modules = {"student": backbone.load("student"), "teacher": backbone.load("teacher")}
    return Networks(modules | objective.auxiliary(backbone, policy), policy)


def test_a_turn_of_each_role_moves_exactly_its_weights(folders: dict[int, Path]) -> None:
    backbone = open_wan(folders[1])
    objective = DMD2(guidance_scale=3.0, condition_on_stop=True, gan_weight=0.03)
    networks = make_networks(backbone, objective)
    assert moved(networks, objective, "fake_score", make_batch(backbone, 0)) == {"fake_score", "discriminator"}
    networks = make_networks(backbone, objective)
    assert moved(networks, objective, "student", make_batch(backbone, 0)) == {"student"}


@pytest.mark.slow
def test_a_turn_of_two_experts_moves_the_one_that_was_called(folders: dict[int, Path]) -> None:
    backbone = open_wan(folders[2])
    low = {"low": 0.02, "high": 0.85}
    objective = DMD2(guidance_scale=3.0, condition_on_stop=True)
    seen = set()
    for key in range(8):
        batch = make_batch(backbone, key)
        high = SHIFTED[int(draw_stops(batch, 4, shared=True)[0])] >= 0.875
        networks = make_networks(backbone, objective)
        assert moved(networks, objective, "student", batch) == {"student.0" if high else "student.1"}
        seen.add(high)
        if len(seen) == 2:
            break
    assert seen == {True, False}
    per_sample = DMD2(guidance_scale=3.0, stops="per_sample", fake_time=TimeSampler(low=0.5, high=0.99))
    networks = make_networks(backbone, per_sample)
    batch = make_batch(backbone, 0)
    assert moved(networks, per_sample, "student", batch) == {"student.0", "student.1"}
    experts = set[str]()
    for key in range(8):  # all levels of an update need one expert, which the update draws
        found = moved(make_networks(backbone, per_sample), per_sample, "fake_score", make_batch(backbone, key))
        assert len(found) == 1
        experts |= found
    assert experts == {"fake_score.0", "fake_score.1"}
    wide = DMD2(gan_weight=0.03, gan_time=TimeSampler(low=0.5, high=0.999))  # its levels alone need one expert, too
    assert "discriminator" in moved(make_networks(backbone, wide), wide, "fake_score", batch)
    one = DMD2(gan_weight=0.03, fake_time=TimeSampler(**low), gan_time=TimeSampler(**low))
    networks = make_networks(backbone, one)
    assert moved(networks, one, "fake_score", batch) == {"fake_score.1", "discriminator"}


# --- refusals


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ({"num_frames": 80}, r"4 k \+ 1, got 80; the nearest are 77 and 81"),
        ({"height": 48, "width": 72}, "multiple of 16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(folders: dict[int, Path], size: dict[str, int], words: str) -> None:
    for path in (str(folders[1]), "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"):
        with pytest.raises(ValueError, match=words):
            WanConfig(path=path, **size).check()


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = tiny_wan(tmp_path / "wan", experts=2)
    config = WanConfig(path=str(folder), **SIZE)
    config.check()
    with pytest.raises(ValueError, match=r"too close to the boundary of the experts, 0\.875"):
        config.check_export(RolloutPolicy((1.0, 0.875 - 1e-8)))
    for values, words in (
        ({"boundary_ratio": None}, "transformer_2 and boundary_ratio None"),
        ({"transformer": [None, None]}, "has transformer_2 and"),
        ({"_class_name": "WanImageToVideoPipeline"}, "backbone wan loads a WanPipeline"),
    ):
        original = (folder / "model_index.json").read_text()
        change_json(folder / "model_index.json", **values)
        with pytest.raises(ValueError, match=words):
            config.check()
        (folder / "model_index.json").write_text(original)
    change_json(folder / "vae/config.json", scale_factor_spatial=32)
    with pytest.raises(ValueError, match="height must be a multiple of 64"):
        config.check()
    change_json(folder / "vae/config.json", scale_factor_spatial=8)
    change_json(folder / "scheduler/scheduler_config.json", use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="does not give noise levels of flow matching"):
        config.check()
    with pytest.raises(ValueError, match="does not give noise levels of flow matching"):
        config.build(CPU, torch.float32, 0).teacher_policy(4)


def test_images_are_refused(folders: dict[int, Path], tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "one.png")
    (tmp_path / "one.txt").write_text("a cat")
    with pytest.raises(RecipeError, match="image data needs a backbone that makes images, and wan does not"):
        make_recipe(folders[1], tmp_path / "run", data={"name": "images", "folder": str(tmp_path)})
    with pytest.raises(ValueError, match="images do not fit"):
        open_wan(folders[1]).encode(torch.zeros(1, 3, 32, 32))


def test_only_the_teacher_is_frozen(folders: dict[int, Path]) -> None:
    backbone = open_wan(folders[2])
    for role in ("student", "teacher"):
        assert all(p.requires_grad == (role != "teacher") for p in backbone.load(role).parameters())
    assert isinstance(backbone.make_empty(), Experts)
    assert all(isinstance(d, WanDenoiser) for d in backbone.load("student").experts)


def test_samples_depend_on_their_seed_not_on_the_batch(folders: dict[int, Path]) -> None:
    sampler = teacher_sampler(open_wan(folders[2]), 4, (3.0, 2.0))
    together = sampler.sample(PROMPTS, SEEDS)
    alone = torch.cat([sampler.sample([p], [s]) for p, s in zip(PROMPTS, SEEDS, strict=True)])
    assert error_between(together, alone) < 1e-5


# --- videos as files


def make_recipe(folder: Path, output_dir: Path, **changes: Any) -> Recipe:
    """Two updates of DMD2 in the sizes of this file."""
    raw: dict[str, Any] = {
        "output_dir": str(output_dir),
        "backbone": {"name": "wan", "path": str(folder)} | SIZE,
        "rollout": {"timesteps": list(SHIFTED)},
        "data": {"name": "prompts", "prompts": PROMPTS},
        "objective": {"name": "dmd2", "guidance_scale": 3.0, "fake_updates": 1},
        "optimizers": {"student": {"lr": 1e-4}, "fake_score": {"lr": 1e-4}},
        "train": {"steps": 2, "batch_size": 2, "num_samples": 2, "sample_every": 2, "checkpoint_every": 0},
        "health": {"every": 0},
        "eval": {
            "metrics": ["throughput"],
            "num_samples": 3,
            "quick_num_samples": 2,
            "prompts": PROMPTS,
            "teacher_steps": [2],
            "teacher_guidance_scale": 3.0,
        },
    }
    return build_recipe(raw | changes)


def read_video(path: Path) -> Tensor:
    """[F, H, W, 3] in [0, 1]."""
    return torch.from_numpy(imageio.v3.imread(path)).float() / 255


@pytest.mark.slow
@pytest.mark.parametrize("experts", [1, 2])
def test_a_run_its_export_its_samples_and_its_evaluation(
    folders: dict[int, Path], tmp_path: Path, experts: int
) -> None:
    run = train(make_recipe(folders[experts], tmp_path / "run"))
    for name in ("teacher", "step_00000002"):
        width, height = Image.open(run / f"samples/{name}.png").size
        assert width == (4 * 34 + 2) + 4 and height > 2 * (34 + 2)  # a row of 4 stills a video, and its prompt
        assert read_video(run / f"samples/{name}.mp4").shape == (5, 2 * 34 + 2, 36, 3)  # one below the other
    card = (run / "export/README.md").read_text()
    for line in (
        "library_name: diffusers",
        "height=32, width=32, num_frames=5, max_sequence_length=16,",
        "num_inference_steps=4, guidance_scale=1,",
        'export_to_video(video, "video.mp4", fps=16)',
    ):
        assert line in card
    index = json.loads((run / "export/model_index.json").read_text())
    assert index["boundary_ratio"] == (0.875 if experts == 2 else None)

    count = sample_folder(run, PROMPTS, None, 1, 7, tmp_path / "out", None, None, 1)
    assert count == 2
    files = {f.name for f in (tmp_path / "out").iterdir()}
    assert files == {"00000.mp4", "00000.txt", "00001.mp4", "00001.txt", "grid.png"}
    frames = load_sampler(run).sample(PROMPTS, [7, 8])
    for i in range(2):
        written = read_video(tmp_path / f"out/0000{i}.mp4")
        assert written.shape == (5, 32, 32, 3)
        error = (written - frames[i].permute(0, 2, 3, 1)).abs().mean().item()
        print(f"mean error of the mp4 {error:.2g}")
        assert error < 0.05  # H.264 halves the resolution of colour
    fps = imageio.v3.immeta(tmp_path / "out/00000.mp4")["fps"]
    assert fps == 16

    row = evaluate_path(run, output=tmp_path / "results.json", progress=False)
    assert row["metrics"].keys() == {"images_per_second", "network_evaluations"} and row["num_samples"] == 3
    page = (tmp_path / "results.html").read_text()
    # the student's and the teacher's beside each other
    assert page.count('<img class="frames"') == 6 and page.count('<div class="sample">') == 3
    with pytest.raises(ValueError, match="but the samples here are frames; choose from video_accuracy, "):
        evaluate_path(run, metrics="fid", progress=False)
    with pytest.raises(ValueError, match="reference is for images, but the samples here are frames"):
        evaluate_path(run, reference="digits", progress=False)


def test_a_teacher_is_measured_with_a_scale_an_expert(folders: dict[int, Path]) -> None:
    sampler = teacher_sampler(open_wan(folders[2]), 2, (4.0, 3.0))
    row, kept = evaluate_with_samples(
        sampler, EvalConfig(("throughput",), num_samples=10, batch_size=4, prompts=tuple(PROMPTS)), progress=False
    )
    assert row["guidance_scale"] == [4.0, 3.0] and row["metrics"]["network_evaluations"] == 4
    assert kept.shape == (8, 4, 3, 32, 32)  # stills of the first videos
    assert samples([], draw_pictures({"teacher": kept}, {})).count('<img class="frames"') == 8
    assert grid(torch.zeros(2, 9, 3, 480, 832)).size == (4 * 258 + 2, 2 * (147 + 2) + 2)  # made smaller


def test_without_a_writer_videos_are_refused(folders: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "find_spec", lambda name: None if name == "imageio_ffmpeg" else name)
    with pytest.raises(ValueError, match=r"pip install 'fastgen-distill\[video\]'"):
        WanConfig(path=str(folders[1]), **SIZE).check()
    with pytest.raises(ValueError, match=r"pip install"):
        video.save_video(torch.zeros(2, 3, 4, 4), Path("nowhere.mp4"), 16)
