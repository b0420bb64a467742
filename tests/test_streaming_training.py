"""Self Forcing by each objective on tiny real Wan pipelines: what trains, what is refused, LoRA roles and experts."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_streaming import SHAPE, batch, conditioning, draws, policy, wan
from tiny_wan import tiny_wan
from torch import Tensor

from fastgen.config import build_recipe
from fastgen.denoiser import Inputs
from fastgen.modules.experts import Experts
from fastgen.modules.lora import LoraConfig, SharedBase
from fastgen.objectives import DMD2, ODERegression, TeacherForcing
from fastgen.recipe import Recipe
from fastgen.registry import RecipeError
from fastgen.rollout import backward_simulation, sample, sample_chunks
from fastgen.streaming.context import Context
from fastgen.streaming.schedule import ChunkSchedule
from fastgen.train import train

PROMPTS = ["a cat", "a dog runs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan(tmp_path_factory.mktemp("wan"), layers=2)


def recipe(folder: Path, output: Path, objective: dict[str, Any], **changes: Any) -> Recipe:
    raw: dict[str, Any] = {
        "output_dir": str(output),
        "backbone": {
            "name": "wan",
            "path": str(folder),
            "height": 32,
            "width": 32,
            "num_frames": 9,
            "max_sequence_length": 16,
        },
        "rollout": {"timesteps": [1.0, 0.6], "chunks": {"frames": 1, "window": 2}},
        "data": {"name": "prompts", "prompts": PROMPTS},
        "objective": objective,
        "optimizers": {"student": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}},
        "train": {"steps": 1, "batch_size": 2, "num_samples": 2, "sample_every": 0, "checkpoint_every": 0},
        "health": {"every": 0},
        "eval": {"metrics": ["throughput"], "num_samples": 2, "prompts": PROMPTS},
    }
    return build_recipe(raw | changes)


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "dmd2", "fake_updates": 1},
        {"name": "adm", "fake_updates": 1},
        {"name": "tdm", "distance": "l2"},
        pytest.param({"name": "sid", "fake_updates": 1}, marks=pytest.mark.slow),
        pytest.param({"name": "vdot", "fake_updates": 1, "sinkhorn_steps": 5}, marks=pytest.mark.slow),
        pytest.param({"name": "rtdmd", "fake_updates": 1}, marks=pytest.mark.slow),
        pytest.param({"name": "gndm", "fake_updates": 1, "group_size": 1}, marks=pytest.mark.slow),
        {
            "name": "phased_dmd",
            "fake_updates": 1,
            "experts": False,
            "phases": [{"first": 0, "last": 1, "updates": 1}, {"first": 1, "last": 2, "updates": 1}],
        },
    ],
    ids=lambda objective: objective["name"],
)
def test_objectives_that_train_a_causal_student(objective: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """A whole update and the export of it; the student's weights move."""
    changes: dict[str, Any] = {}
    if objective["name"] == "rtdmd":
        changes["rollout"] = {"timesteps": [1.0, 0.6], "transition": "cps", "eta": 0.9, "chunks": {"frames": 1}}
    if objective["name"] == "adm":
        changes["rollout"] = {"timesteps": [1.0, 0.6], "chunks": {"frames": 1, "order": "step", "replay": True}}
        changes["optimizers"] = {role: {"lr": 1e-3} for role in ("student", "fake_score", "discriminator")}
    if objective["name"] == "tdm":
        changes["rollout"] = {"timesteps": [1.0, 0.6], "transition": "ode", "chunks": {"frames": 1}}
    if objective["name"] == "phased_dmd":
        changes["train"] = {"steps": 2, "batch_size": 2, "num_samples": 2, "sample_every": 0, "checkpoint_every": 0}
    made = recipe(folder, tmp_path / "run", objective, **changes)
    run = train(made)
    assert (run / "export/fastgen.json").is_file()


@pytest.mark.parametrize(
    ("objective", "changes", "words"),
    [
        ({"name": "crd"}, {}, "cannot train a student that works chunk by chunk: its implicit reward.*dmd2"),
        (
            {"name": "dmd2", "condition_on_stop": True},
            {"rollout": {"timesteps": [1.0], "chunks": {"frames": 1, "first_timesteps": [1.0, 0.5]}}},
            "needs one list of levels",
        ),
        (
            {"name": "dmd2"},
            {"rollout": {"timesteps": [1.0], "chunks": {"frames": 2}}},
            r"3 latent frames .* 2 or 4; n latent frames are backbone.num_frames: 4 \(n - 1\) \+ 1",
        ),
        (
            {"name": "dmd2"},
            {"rollout": {"timesteps": [1.0], "chunks": {"frames": 1, "first_timesteps": [0.5, 1.0]}}},
            "first_timesteps: .*strictly decreasing",
        ),
        (
            {"name": "dmd2"},
            {"rollout": {"timesteps": [1.0], "conditioning_time": 0.5, "chunks": {"frames": 1}}},
            "conditioning_time",
        ),
        ({"name": "dmd2"}, {"rollout": {"timesteps": [1.0], "chunks": {"frames": 2, "window": 1}}}, "at least 2"),
        ({"name": "dmd2"}, {"rollout": {"timesteps": [1.0], "chunks": {"frame": 2}}}, "frame"),
    ],
)
def test_refusals(
    objective: dict[str, Any], changes: dict[str, Any], words: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe(folder, tmp_path / "run", objective, **changes)


@pytest.mark.parametrize(
    ("objective", "chunks", "reason"),
    [
        ({"name": "teacher_forcing"}, {"window": 2, "sink": 1}, "more than the window of 2"),
        ({"name": "teacher_forcing"}, {"cache_dtype": "int8"}, "nothing in 8 bits"),
        ({"name": "teacher_forcing"}, {"window": 2, "linear": True}, "no linear memory"),
        ({"name": "teacher_forcing"}, {"attention": {"layout": "top_k", "density": 0.5}}, "is dense"),
        ({"name": "consistency", "teach": "data", "grid": {"count": 8}}, {"cache_dtype": "int8"}, "nothing in 8 bits"),
        ({"name": "any_flow"}, {"window": 2, "sink": 1}, "more than the window of 2"),
        ({"name": "hiar", "target": "path", "attention": "causal"}, {"cache_dtype": "int8"}, "nothing in 8 bits"),
    ],
)
def test_a_schedule_without_a_mask_is_refused_before_weights_load(
    objective: dict[str, Any], chunks: dict[str, Any], reason: str, folder: Path, tmp_path: Path
) -> None:
    """In the first update, it would end a run whose pictures and weights were loaded."""
    changes: dict[str, Any] = {
        "rollout": {"timesteps": [1.0, 0.6], "chunks": {"frames": 1, **chunks}},
        "data": {"name": "moving_digits", "videos": 2},
        "optimizers": {"student": {"lr": 1e-3}},
    }
    if objective["name"] == "any_flow":
        changes["rollout"] |= {"transition": "ode", "two_time": True}
    if objective["name"] == "hiar":
        changes["optimizers"] = {role: {"lr": 1e-3} for role in ("student", "fake_score")}
    with pytest.raises(RecipeError, match=rf"rollout\.chunks: .*{reason}.*; set objective\.") as refusal:
        recipe(folder, tmp_path / "run", objective, **changes)
    key, _, value = str(refusal.value).partition("set objective.")[2].partition(": ")
    recipe(folder, tmp_path / "run", objective | {key: value}, **changes)  # what the message says helps


def test_what_masks_the_chunks_of_a_video() -> None:
    for masking in (TeacherForcing(), TeacherForcing(past="noisy"), ODERegression()):
        assert masking.unmasked == "form: chunks"
    assert not any(o.unmasked for o in (TeacherForcing(form="chunks"), ODERegression(form="chunks"), DMD2()))


def test_a_mixture_has_no_chunks(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="backbone gaussian_mixture has no causal student"):
        build_recipe(
            {
                "output_dir": str(tmp_path / "run"),
                "backbone": {"name": "gaussian_mixture", "means": [[0.0, 1.0], [1.0, 0.0]], "stds": [0.1, 0.1]},
                "rollout": {"timesteps": [1.0], "chunks": {"frames": 1}},
                "data": {"name": "mixture"},
                "objective": {"name": "dmd2"},
                "optimizers": {"student": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}},
                "train": {"steps": 1, "batch_size": 2},
                "eval": {"metrics": ["energy_distance"]},
            }
        )


def test_adapters_share_a_base_with_a_bidirectional_teacher() -> None:
    """The teacher's output is the same, to the bit, before and after the student has committed chunks on its base."""
    shared = SharedBase(wan(), ("to_q", "to_k", "to_v"), torch.float64)
    student = shared.add("student", LoraConfig(rank=2))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.05)
    teacher = type(student)(shared, None)
    x, t = draws(8)("x"), torch.tensor([0.9, 0.3], dtype=torch.float64)
    before = teacher(x, t, conditioning())
    part = batch(8)
    chunks = ChunkSchedule(frames=2, window=6, sink=2)
    rollout = backward_simulation(student, policy(chunks), part, torch.ones_like(part.ids))
    rollout.x.square().sum().backward()
    assert torch.equal(teacher(x, t, conditioning()), before)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in student.named_parameters() if ".lora_A." in n)
    alone = student.merged()
    merged = backward_simulation(alone, policy(chunks), part, torch.ones_like(part.ids), grad=False)
    assert torch.allclose(merged.x, rollout.x, atol=1e-5)


def test_experts_remember_each_for_itself() -> None:
    """Each expert reads the keys that its own weights made: the rollout is that of a network that switches weights."""
    high, low = wan(seed=1), wan(seed=2)
    both = Experts([high, low], (0.8,)).requires_grad_(False)
    chunks = ChunkSchedule(frames=2, window=4)
    noise = draws(8)
    x = sample(both, policy(chunks), conditioning(), noise)
    parts, contexts = list[Tensor](), [Context(chunks), Context(chunks)]
    zero, level = torch.zeros(2, dtype=torch.float64), torch.full((2,), 0.6, dtype=torch.float64)
    for frames in chunks.split(8):
        own = noise.chunk(frames)
        x0 = high(own("initial"), torch.ones_like(zero), conditioning(), Inputs(context=contexts[0]))
        x_t = high.schedule.add_noise(x0, own("step1"), level)
        parts.append(low(x_t, level, conditioning(), Inputs(context=contexts[1])))
        contexts = [e.commit(parts[-1], zero, conditioning(), c) for e, c in zip((high, low), contexts, strict=True)]
    assert torch.allclose(x, torch.cat(parts, dim=1), atol=1e-10)


def test_sparse_attention_of_all_tiles_is_dense_attention() -> None:
    """top_k at density 1 keeps every tile; at a lower one it keeps less, and the first chunk stays dense."""
    network = wan().requires_grad_(False)

    def chunks_of(**attention: Any) -> list[Tensor]:
        chunks = ChunkSchedule(frames=1, window=6, sink=1, attention={"tile": 16, **attention})  # type: ignore[arg-type]
        clips = sample_chunks(network, policy(chunks), conditioning(), draws(1))
        return [next(clips).x0 for _ in range(7)]

    dense = chunks_of()
    full = chunks_of(layout="top_k", density=1.0)
    sparse = chunks_of(layout="top_k", density=0.5)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(dense, full, strict=True))
    assert torch.allclose(dense[0], sparse[0], atol=1e-9)
    assert not torch.allclose(dense[-1], sparse[-1], atol=1e-6)
    assert dense[0].shape[1:] == (1, *SHAPE)


def test_attention_backends_agree() -> None:
    network = wan().requires_grad_(False)
    outputs = []
    for backend in ("auto", "sdpa", "naive"):
        chunks = ChunkSchedule(frames=2, window=4, attention={"backend": backend})  # type: ignore[arg-type]
        outputs.append(sample(network, policy(chunks), conditioning(), draws(8)))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-9) and torch.allclose(outputs[0], outputs[2], atol=1e-9)


def test_first_chunk_with_more_steps() -> None:
    """The first chunk has its own levels, in sampling and in training; later ones have the policy's."""
    network = wan().requires_grad_(False)
    chunks = ChunkSchedule(frames=2, first_timesteps=(1.0, 0.8, 0.6, 0.3))
    plain, enhanced = policy(ChunkSchedule(frames=2)), policy(chunks)
    first = sample(network, enhanced, conditioning(), draws(2))
    longer = dataclasses.replace(plain, timesteps=(1.0, 0.8, 0.6, 0.3))
    assert torch.equal(first, sample(network, longer, conditioning(), draws(2)))
    assert not torch.equal(first, sample(network, plain, conditioning(), draws(2)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["averaged sink", "actions", "sound", "given sound"])
def test_divided_networks_roll_out_and_commit_as_one(kind: str, tmp_path: Path) -> None:
    """FSDP2 on two processes: a rollout with commits between its forwards, and the gradient of it; also of a network
    that is told actions and recalls frames, of one with sound and its sinks, and of one that is given its sound."""
    script = f"""
import sys, dataclasses, datetime
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_streaming import POLICIES, batch, policy, wan
from test_streaming_actions import RECALL, acting, told
from test_streaming_driven import BINS, driven
from test_streaming_sound import sounding
from fastgen.batch import Conditioning
from fastgen.rollout import backward_simulation

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
rank = dist.get_rank()
plain, divided = wan(), wan()
chunks, part = POLICIES["EMA sink"], batch(8, rows=4)
if {kind!r} == "actions":
    chunks, part = RECALL, dataclasses.replace(batch(10, rows=4), cond=acting(10, rows=4))
    plain, divided = (told(network).requires_grad_(True) for network in (plain, divided))
if {kind!r} == "sound":
    plain, divided = (sounding(network, 3).requires_grad_(True) for network in (plain, divided))
if {kind!r} == "given sound":
    plain, divided = (driven(network, 3).requires_grad_(True) for network in (plain, divided))
    sound = torch.randn(4, 8, 2, BINS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    part = dataclasses.replace(part, cond=Conditioning({{**part.cond, "sound": sound}}))
for module in (*divided.shard_modules, divided):
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
rows = slice(2 * rank, 2 * rank + 2)
own = dataclasses.replace(part, ids=part.ids[rows], cond=part.cond.select(rows), uncond=part.uncond.select(rows))
expected = backward_simulation(plain, policy(chunks), part, torch.ones_like(part.ids)).x
expected.square().mean().backward()
x = backward_simulation(divided, policy(chunks), own, torch.ones_like(own.ids)).x
x.square().mean().backward()
assert torch.allclose(x, expected[rows], atol=1e-6)
for (name, p), q in zip(plain.named_parameters(), divided.parameters(), strict=True):
    assert torch.allclose(q.grad.full_tensor(), p.grad, atol=1e-6), name
assert max(p.grad.abs().max().item() for p in plain.parameters()) > 0.01
try:
    replay = policy(dataclasses.replace(chunks, replay=True))
    backward_simulation(divided, replay, own, torch.ones_like(own.ids))
    raise AssertionError("replay was not refused")
except ValueError as error:
    assert "cannot replay" in str(error)
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
