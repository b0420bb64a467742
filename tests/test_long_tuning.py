"""Streaming long tuning: videos that go on from update to update, on tiny real Wan networks and on AR(1) videos."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ar1_streaming import RECIPES, backbone, sampled
from test_streaming import SHAPE, batch, wan
from test_streaming_training import PROMPTS, recipe
from tiny_wan import tiny_wan
from torch import Tensor, nn

from fastgen.backbones import ar1_formulas as f
from fastgen.backbones.wan import WanConfig
from fastgen.batch import Batch, Draws
from fastgen.config import load_recipe
from fastgen.networks import Networks
from fastgen.objectives import LongTuning, State, Turn
from fastgen.objectives.long_tuning import past_of
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy, sample
from fastgen.sampling.sampler import load_sampler
from fastgen.streaming.schedule import ChunkSchedule
from fastgen.train import train

STUDENT = Turn("student", ("student",))


def networks(chunks: ChunkSchedule, *timesteps: float) -> Networks:
    student, teacher = wan(), wan(seed=1).requires_grad_(False)
    modules: dict[str, nn.Module] = {"student": student, "teacher": teacher, "fake_score": wan(seed=2)}
    policy = RolloutPolicy(timesteps or (1.0,), chunks=chunks)
    return Networks(modules, policy, restart=lambda past: past[:, -1:])


def update(objective: LongTuning, made: Networks, state: State, videos: Batch, parts: int = 1) -> Tensor:
    """A student update in so many micro-batches, without an optimizer step. Returns the video that was judged."""
    seen, critic = list[Tensor](), objective.matching_loss

    def matching(networks: Networks, batch: Batch, rollout: Any, weight: Any = None) -> Any:
        seen.append(rollout.x.detach())
        return critic(networks, batch, rollout, weight)

    object.__setattr__(objective, "matching_loss", matching)
    try:
        for rows in torch.arange(len(videos.ids)).chunk(parts):
            cond, uncond = videos.cond.select(rows), videos.uncond.select(rows)
            objective.loss(STUDENT, made, replace(videos, ids=videos.ids[rows], cond=cond, uncond=uncond), state)
    finally:
        object.__delattr__(objective, "matching_loss")
    objective.finish(STUDENT, made, state)
    return torch.cat(seen)


@pytest.mark.parametrize(
    "chunks",
    [
        ChunkSchedule(frames=1),
        ChunkSchedule(frames=2, first=1),
        ChunkSchedule(frames=2, first=1, window=5, sink=1),
        ChunkSchedule(frames=2, first=1, window=4, context_noise=0.1),
    ],
    ids=["all", "chunks of two", "sink", "context noise"],
)
def test_updates_go_on_where_the_last_one_ended(chunks: ChunkSchedule) -> None:
    """With one key for all updates, and weights that do not move, three updates of a one-step student make the video
    that its sampler makes whole: exactly while nothing has left the window, and nearly after that, where the frames in
    it are seen again without those that are gone. The judged part begins with the frame before it."""
    objective, made = LongTuning(longest=100), networks(chunks)
    state, videos = objective.init_state(), batch(5)
    parts = [update(objective, made, state, videos) for _ in range(3)]
    assert state["frames"] == 13
    draws = Draws(videos.ids, (13, *SHAPE), videos.key, torch.float64)
    whole = sample(made.student, made.policy, videos.cond, draws)
    video = torch.cat([parts[0], parts[1][:, 1:], parts[2][:, 1:]], dim=1)
    known = 5 if chunks.window else 13
    assert (video[:, :known] - whole[:, :known]).abs().max() < 1e-9
    assert (video - whole).abs().max() < 0.1 * whole.abs().max()
    for before, after in itertools.pairwise(parts):
        assert torch.equal(after[:, 0], before[:, -1])


@pytest.mark.parametrize(
    "chunks",
    [
        ChunkSchedule(frames=1, window=2, sink=1),
        ChunkSchedule(frames=1, window=1),
        ChunkSchedule(frames=2, first=1, window=3, sink=1),
        ChunkSchedule(frames=2, first=1, window=6, sink=1),
    ],
    ids=["sink alone", "nothing", "chunks of two", "more"],
)
def test_a_video_goes_on_from_its_last_two_frames(chunks: ChunkSchedule) -> None:
    """Whatever the next chunk sees: a picture cannot be decoded from the sink, or from one latent frame."""
    objective, made, restarts = LongTuning(longest=100), networks(chunks), list[Tensor]()
    made.restart = lambda past: (restarts.append(past), past[:, -1:])[1]
    state, videos = objective.init_state(), batch(5)
    parts = [update(objective, made, state, videos) for _ in range(3)]
    assert len(restarts) == 2
    for before, past in zip(parts[:-1], restarts, strict=True):
        assert torch.equal(past[:, -2:], before[:, -2:])


def test_videos_begin_anew_when_they_are_long_enough() -> None:
    objective, made = LongTuning(longest=8), networks(ChunkSchedule(frames=1))
    state, videos, ages = objective.init_state(), batch(4), []
    for _ in range(5):
        ages.append(int(state["frames"]))
        update(objective, made, state, videos)
    assert ages == [0, 4, 7, 0, 4]
    assert not [name for name in state if name.startswith("next.")]


@pytest.mark.parametrize("switch", [0.0, 1.0])
def test_a_switch_goes_on_with_the_next_video_s_prompt(switch: float) -> None:
    """What the context remembers is computed again with it."""
    objective, made = LongTuning(longest=100, switch=switch), networks(ChunkSchedule(frames=1))
    state, videos = objective.init_state(), batch(3)
    update(objective, made, state, videos)
    own = videos.cond["prompt_embeds"]
    assert torch.equal(state["past.cond.prompt_embeds"], own.roll(1, 0) if switch else own)
    switched = {name: value.clone() for name, value in state.items()}
    state["past.cond.prompt_embeds"] = own
    # what comes later does not matter while the videos go on
    other = replace(videos, cond=videos.uncond, uncond=videos.cond)
    for key in ("cond", "uncond"):
        kept = getattr(past_of(other, switched)[1], key)
        assert torch.equal(kept["prompt_embeds"], switched[f"past.{key}.prompt_embeds"])
    went_on, same = update(objective, made, switched, other), update(objective, made, state, other)
    assert torch.equal(went_on, same) != bool(switch)


def test_what_was_before_carries_no_gradient() -> None:
    """Neither what is kept for the next update, nor the frame that the judged part begins with."""
    objective, made, videos = LongTuning(longest=100), networks(ChunkSchedule(frames=1)), batch(3)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    made.restart = lambda past: scale * past[:, -1:]
    state = objective.init_state()
    for _ in range(2):
        objective.loss(STUDENT, made, videos, state).total.backward()
        objective.finish(STUDENT, made, state)
        assert not state["past.latents"].requires_grad
    assert scale.grad is None and any(p.grad is not None for p in made.student.parameters())


def test_an_update_does_not_depend_on_its_micro_batches() -> None:
    objective, made = LongTuning(longest=100), networks(ChunkSchedule(frames=1, window=3), 1.0, 0.6)
    states = [objective.init_state(), objective.init_state()]
    for _ in range(3):
        whole, parted = (update(objective, made, state, batch(3), n) for state, n in zip(states, (1, 2), strict=True))
        assert (whole - parted).abs().max() < 1e-9
    assert states[0].keys() == states[1].keys()
    assert states[0]["past.latents"].shape == (2, 2, *SHAPE)


def test_a_video_that_is_not_finite_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """One NaN in the second update: the videos begin anew, and go on from there."""
    objective, made, part, ages = LongTuning(longest=100), networks(ChunkSchedule(frames=1)), LongTuning.part, []
    state, videos, factor = objective.init_state(), batch(3), torch.ones(2, 1, 1, 1, 1, dtype=torch.float64)
    monkeypatch.setattr(LongTuning, "part", lambda *a: (lambda r: replace(r, x=r.x * factor))(part(*a)))
    for k in range(4):
        factor[0] = float("nan") if k == 1 else 1.0
        seen = update(objective, made, state, videos)
        assert seen.isfinite().all() == (k != 1)
        ages.append(int(state["frames"]))
    assert ages == [3, 0, 3, 5] and state["past.latents"].isfinite().all()


def test_the_fake_score_sees_the_same_videos_and_moves_nothing_on() -> None:
    objective, made = LongTuning(longest=100), networks(ChunkSchedule(frames=1))
    state = objective.init_state()
    update(objective, made, state, batch(3))
    before = {name: value.clone() for name, value in state.items()}
    turn = Turn("fake_score", ("fake_score",))
    loss = objective.loss(turn, made, batch(3), state)
    objective.finish(turn, made, state)
    assert all(torch.equal(state[name], value) for name, value in before.items()) and state.keys() == before.keys()
    loss.total.backward()
    assert all(p.grad is None for p in made.student.parameters())
    assert any(p.grad is not None for p in made.fake_score.parameters())


def test_replay_gives_the_same_gradient_in_the_middle_of_a_video() -> None:
    grads = []
    for replay in (False, True):
        objective, made = LongTuning(longest=100), networks(ChunkSchedule(frames=1, window=3, replay=replay), 1.0, 0.6)
        state = objective.init_state()
        update(objective, made, state, batch(4))
        objective.loss(STUDENT, made, batch(4), state).total.backward()
        grads.append([p.grad for p in made.student.parameters()])
    errors = [(a - b).abs().max() for a, b in zip(*grads, strict=True) if a is not None and b is not None]
    assert max(errors) < 1e-10 < max(g.abs().max() for g in grads[0] if g is not None)


def test_a_video_goes_on_from_its_last_picture(tmp_path: Path) -> None:
    """The first latent frame of a video VAE is one picture. `restart` encodes the last picture of what came before."""
    config = WanConfig(path=str(tiny_wan(tmp_path / "wan")), height=32, width=32, num_frames=9, max_sequence_length=16)
    made = config.build(torch.device("cpu"), torch.float32, 0)
    latents = torch.randn(2, *made.latent_shape)
    first = made.restart(latents)
    assert torch.equal(first, made.encode(made.decode(latents)[:, -1:])) and first.shape == latents[:, :1].shape
    assert (first - latents[:, -1:]).abs().max() > 0.01, "a later latent frame is not a first one"


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        ({"timesteps": [1.0]}, "works? in chunks.*use dmd2"),
        ({"timesteps": [1.0], "chunks": {"frames": 3}}, "first: 1"),
        ({"timesteps": [1.0, 0.6], "chunks": {"frames": 1, "order": "step"}}, "leave order out"),
        ({"timesteps": [1.0], "chunks": {"frames": 1, "window": 4, "slow": 2}}, "slow memory"),
    ],
)
def test_what_cannot_go_on_is_refused(rollout: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = tiny_wan(tmp_path / "wan")
    with pytest.raises(RecipeError, match=words):
        recipe(folder, tmp_path / "run", {"name": "long_tuning"}, rollout=rollout)


@pytest.mark.parametrize("term", [{"gan_weight": 0.1}, {"embedding": {"features": "teacher", "time": {}}}])
def test_real_videos_under_the_prompts_of_others_are_refused(term: dict[str, Any]) -> None:
    policy = RolloutPolicy((1.0,), chunks=ChunkSchedule(frames=1))
    with pytest.raises(ValueError, match="real videos of other prompts: leave out gan_weight"):
        LongTuning(**term).check(policy)
    LongTuning(embedding={"features": "random"}).check(policy)  # type: ignore[arg-type]


@pytest.mark.parametrize("longest", [2, 3])
def test_a_length_that_no_video_exceeds_is_refused_before_weights_load(longest: int, tmp_path: Path) -> None:
    """The tiny Wan makes three latent frames."""
    folder = tiny_wan(tmp_path / "wan")
    with pytest.raises(RecipeError, match=f"objective.longest: {longest} .*teacher's 3.*use dmd2"):
        recipe(folder, tmp_path / "run", {"name": "long_tuning", "longest": longest})
    assert recipe(folder, tmp_path / "run", {"name": "long_tuning", "longest": 4}).objective.longest == 4
    with pytest.raises(ValueError, match=r"longest: 2 .*use dmd2"):  # where the sizes of a hub id were not known
        LongTuning(longest=2).loss(STUDENT, networks(ChunkSchedule(frames=1)), batch(2), LongTuning().init_state())


@pytest.mark.slow
def test_a_run_that_stops_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Three updates at once, and with a stop in the middle of a video."""
    folder, objective = tiny_wan(tmp_path / "wan", layers=2), {"name": "long_tuning", "fake_updates": 1, "switch": 0.5}
    rows = []
    for name, stops in (("whole", [3]), ("parted", [2, 3])):
        for steps in stops:
            settings = {"batch_size": 2, "num_samples": 2, "sample_every": 0, "checkpoint_every": 1, "log_every": 1}
            run = train(recipe(folder, tmp_path / name, objective, train=settings | {"steps": steps}))
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        rows.append([row["student/loss"] for row in log if "student/loss" in row])
    assert rows[0] == rows[1] and len(rows[0]) == 3
    assert len(PROMPTS) == 2


@pytest.mark.slow
def test_it_ends_where_self_forcing_ends(tmp_path: Path) -> None:
    """On AR(1) videos, trained on parts of 7 frames of videos of 50: what a frame adds to the one before it is as
    after Self Forcing (test_ar1_streaming), because each part is a video of the law, whatever came before it. The
    first frame of all is trained in one of eight updates here, and gets less far: this stage is for a student that
    comes from Self Forcing."""
    changes = ["backbone.angles=[0.5]", "backbone.means=[1.0]", "train.steps=128", "train.batch_size=48"]
    changes += [f"optimizers.{role}.decay_fraction=0.5" for role in ("student", "fake_score")]
    changes += ["train.eval_every=0", "eval.teacher_steps=[]", "health.every=0", f"output_dir={tmp_path}/run"]
    objective = "{name: long_tuning, longest: 50, fake_updates: 3, stops: per_sample, condition_on_stop: true}"
    recipe = load_recipe(RECIPES / "ar1_self_forcing_4step.yaml", [*changes, f"objective={objective}"])
    got = sampled(load_sampler(train(recipe) / "export").denoiser.network, recipe.rollout.timesteps)
    kappa = f.flow_map_gain(torch.tensor(recipe.rollout.timesteps), f.innovation(backbone().law.rhos[0]))
    print(f"frame 1 {got.variance[0]:.4f}, frame 50 {got.variance[-1]:.4f}, gains {(got.gains / kappa).tolist()}")
    assert abs(got.variance[-1] - 1) < 0.05 and (got.gains / kappa - 1).abs().max() < 0.05
