"""Context Forcing: a causal teacher and fake score, given the student's own frames."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ar1_streaming import RECIPES, backbone, sampled
from test_streaming import SHAPE, batch, wan
from test_streaming_training import recipe
from tiny_wan import tiny_wan
from torch import Tensor, nn

from fastgen.backbones import ar1_formulas as f
from fastgen.config import load_recipe
from fastgen.networks import Networks
from fastgen.objectives import ContextForcing
from fastgen.objectives.context_forcing import export_of
from fastgen.registry import RecipeError
from fastgen.rollout import Rollout, RolloutPolicy, backward_simulation
from fastgen.sampling.sampler import load_sampler
from fastgen.schedule import TimeSampler
from fastgen.streaming.schedule import ChunkSchedule
from fastgen.train import train

POLICY = RolloutPolicy((1.0, 0.6), chunks=ChunkSchedule(frames=2, window=4))
LOW = TimeSampler(low=0.3, high=0.7)


def networks() -> Networks:
    modules: dict[str, nn.Module] = {
        "student": wan(layers=1),
        "teacher": wan(layers=1, seed=1).requires_grad_(False),
        "fake_score": wan(layers=1, seed=2),
        "context_teacher": wan(layers=1, seed=3).requires_grad_(False),
    }
    return Networks(modules, POLICY)


def gradient(objective: ContextForcing, made: Networks, x: Tensor) -> Tensor:
    """g for a rollout that ended with x."""
    stop = torch.zeros(2, dtype=torch.int64)
    rollout = backward_simulation(made.student, POLICY, batch(8), stop, grad=False)
    return objective.score_gradient(made, batch(8), replace(rollout, x=x))[0]


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("window", [None, 4])
def test_each_chunk_is_judged_by_what_came_before_it(window: int | None, guidance: float) -> None:
    """One layer. A change in a chunk moves the two scores of this chunk and of those that see it: all later ones, or
    with a window of two chunks the next. It moves none before it. (The floor leaves out the normaliser of a sample,
    which its chunks share.)"""
    objective = ContextForcing(teacher_window=window, guidance_scale=guidance, renoise_time=LOW, normaliser_floor=1e9)
    made, x = networks(), torch.randn(2, 8, *SHAPE, dtype=torch.float64)
    before = gradient(objective, made, x)
    for j in range(4):
        changed = x.clone()
        changed[:, 2 * j : 2 * j + 2] += 0.5
        moved = (gradient(objective, made, changed) - before).unflatten(1, (4, 2)).abs().amax((0, 2, 3, 4, 5))
        last = 4 if window is None else j + 2
        assert [bool(m > 0) for m in moved] == [j <= i < last for i in range(4)]


def test_the_causal_teacher_is_the_one_that_is_compared() -> None:
    objective, made = ContextForcing(renoise_time=LOW), networks()
    x = torch.randn(2, 8, *SHAPE, dtype=torch.float64)
    before = gradient(objective, made, x)
    made.modules["teacher"] = wan(layers=1, seed=7)
    assert torch.equal(gradient(objective, made, x), before)
    made.modules["fake_score"] = made.modules["context_teacher"]
    assert gradient(objective, made, x).abs().max() == 0
    del made.modules["context_teacher"]
    assert gradient(objective, made, x).abs().max() > 0


def test_the_fake_score_learns_chunks_given_the_student_s_past() -> None:
    objective, made = ContextForcing(fake_time=LOW), networks()
    stop = torch.zeros(2, dtype=torch.int64)
    rollout: Rollout = backward_simulation(made.student, POLICY, batch(8), stop)
    objective.critic_loss(made, batch(8), replace(rollout, x=rollout.x.detach())).total.backward()
    assert all(p.grad is None for p in made.student.parameters())
    assert all(p.grad is not None for p in made.fake_score.parameters())


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({}, "give a run of teacher_forcing"),
        ({"teacher_from": "nowhere"}, "neither a finished run nor an export"),
        ({"teacher_from": "nowhere", "condition_on_stop": True}, "no input besides the level"),
        ({"gan_weight": 0.1}, "compares chunks"),
        ({"teacher_window": 1}, "set window to at least"),
    ],
)
def test_what_cannot_be_is_refused(objective: dict[str, Any], words: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"rollout": {"timesteps": [1.0, 0.6], "chunks": {"frames": 3}}}
    if "gan_weight" in objective:
        changes["optimizers"] = {role: {"lr": 1e-3} for role in ("student", "fake_score", "discriminator")}
    with pytest.raises(RecipeError, match=words):
        recipe(tiny_wan(tmp_path / "wan"), tmp_path / "run", {"name": "context_forcing"} | objective, **changes)


def test_a_whole_update_after_teacher_forcing(tmp_path: Path) -> None:
    folder = tiny_wan(tmp_path / "wan", layers=2)
    data = {"data": {"name": "moving_digits", "videos": 4}, "optimizers": {"student": {"lr": 1e-3}}}
    start = train(recipe(folder, tmp_path / "forced", {"name": "teacher_forcing"}, **data)) / "export"
    objective = {"name": "context_forcing", "fake_updates": 1, "teacher_from": str(start.parent)}
    assert export_of(str(start)) == export_of(str(start.parent)) == start
    made = recipe(folder, tmp_path / "run", objective, init_from=str(start))
    roles = made.objective.auxiliary(made.backbone.build(torch.device("cpu"), torch.float32, 0), made.rollout)
    assert {role: network.training for role, network in roles.items()} == {
        "fake_score": True,
        "context_teacher": False,
    }
    assert (train(made) / "export/fastgen.json").is_file()


@pytest.mark.slow
def test_it_ends_where_self_forcing_ends(tmp_path: Path) -> None:
    """On AR(1) videos the law is a causal teacher, too: every gain becomes that of the flow map, and frames far beyond
    those of training have variance 1."""
    changes = ["backbone.angles=[0.5]", "backbone.means=[1.0]", "train.steps=128", "train.batch_size=48"]
    changes += [f"optimizers.{role}.decay_fraction=0.5" for role in ("student", "fake_score")]
    changes += ["train.eval_every=0", "eval.teacher_steps=[]", "health.every=0", f"output_dir={tmp_path}/run"]
    objective = (
        "{name: context_forcing, teacher_window: 2, fake_updates: 3, stops: per_sample, condition_on_stop: true}"
    )
    made = load_recipe(RECIPES / "ar1_self_forcing_4step.yaml", [*changes, f"objective={objective}"])
    got = sampled(load_sampler(train(made) / "export").denoiser.network, made.rollout.timesteps)
    kappa = f.flow_map_gain(torch.tensor(made.rollout.timesteps), f.innovation(backbone().law.rhos[0]))
    print(
        f"variance {got.variance[:7].tolist()}, frame 50 {got.variance[-1]:.4f}, gains {(got.gains / kappa).tolist()}"
    )
    assert (got.variance[:7] - 1).abs().max() < 0.03 and abs(got.variance[-1] - 1) < 0.05
    assert (got.gains / kappa - 1).abs().max() < 0.05
