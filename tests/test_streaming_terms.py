"""Adversarial and reward terms on videos that a tiny real Wan makes chunk by chunk, in float64.

Student, teacher and fake score start as one network, so that the scores agree and the terms act alone."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_streaming import batch, draws, policy
from test_streaming_training import recipe
from tiny_wan import tiny_wan
from torch import Tensor
from variants import mostly_slow

from fastgen.backbones.base import Backbone
from fastgen.backbones.wan import WanConfig
from fastgen.batch import Batch, Draws
from fastgen.networks import Networks
from fastgen.objectives import (
    ADM,
    ASD,
    DMD2,
    GNDM,
    OBJECTIVES,
    RTDMD,
    DisBack,
    FDistill,
    Objective,
    ReDMD,
    SiD,
    StreamR1,
)
from fastgen.objectives.base import Loss, State, Turn
from fastgen.objectives.disback import PathTurn
from fastgen.objectives.embedding import Embedding
from fastgen.registry import RecipeError, import_name
from fastgen.rewards import Composite, Scorer
from fastgen.rewards.function import FunctionReward
from fastgen.rollout import RolloutPolicy
from fastgen.streaming.schedule import ChunkSchedule
from fastgen.train import train

Gradients = tuple[list[Tensor], list[Tensor], list[Tensor]]
FRAMES, CHUNK = 4, 2  # latent frames; 13 pictures
TERMS: dict[str, Objective] = {
    "GAN": DMD2(gan_weight=1.0),
    "GAN, f-distill": FDistill(gan_weight=1.0),
    "GAN, Re-DMD": ReDMD(gan_weight=1.0),
    "GAN, Stream-R1": StreamR1(gan_weight=1.0),
    "GAN, ASD": ASD(lists=((1.0, 0.6), (1.0,)), asd_weight=1.0),
    "GAN, DisBack": DisBack(gan_weight=1.0, path_length=2, path_every=1),
    "GAN, SiD": SiD(gan_weight=1.0),
    "embedding loss": DMD2(embedding=Embedding(networks=2, width=8)),
    "ADM": ADM(guidance_scale=1.0),
    "reward, GNDM": GNDM(reward_weight=1.0, group_size=2),
    "reward, RTDMD": RTDMD(stage=2, selected_steps=0, group_size=1, guidance_scale=1.0, reward_weight=1.0),
}


def change(frames: Tensor, prompts: Sequence[str]) -> Tensor:
    """The reward: how much neighbouring pictures differ. Every frame takes part."""
    return frames.diff(dim=1).square().flatten(1).mean(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan(tmp_path_factory.mktemp("wan"), layers=2, time_scale=1e-3)


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    config = WanConfig(path=str(folder), height=32, width=32, num_frames=13, max_sequence_length=16)
    return config.build(torch.device("cpu"), torch.float64, 0)


def sampler(**changes: Any) -> RolloutPolicy:
    return policy(ChunkSchedule(frames=CHUNK, **changes))


def networks_of(objective: Objective, backbone: Backbone, policy: RolloutPolicy) -> Networks:
    """Student and fake score learn, as in a run; the discriminators start at random."""
    torch.manual_seed(0)
    objective.check(policy)
    assert objective.takes_chunks
    modules = {"student": objective.make_student(backbone, policy), "teacher": backbone.load("teacher")}
    modules |= objective.auxiliary(backbone, policy)  # type: ignore[arg-type]
    reward = FunctionReward(change, input="frames", differentiable=True)
    scorer = Scorer(Composite((reward,)), backbone.decode)
    return Networks({role: module.double() for role, module in modules.items()}, policy, scorer)


def videos() -> Batch:
    ids = torch.arange(2)
    made = {"prompts": ("a cat", "a dog"), "group": torch.zeros_like(ids), "latents": draws(FRAMES, key="data")("x")}
    return dataclasses.replace(batch(FRAMES), **made)  # type: ignore[arg-type]


def losses(objective: Objective, turn: Turn, networks: Networks, state: State) -> Iterator[Loss]:
    if "reward.weight" in state:
        state["reward.weight"].fill_(1.0)  # which GNDM finds in its first update
    loss = objective.loss(turn, networks, videos(), state)
    yield from (loss,) if isinstance(loss, Loss) else loss


def last_turns(objective: Objective) -> tuple[Turn, ...]:
    """The turns of an update, with those of the student."""
    step = objective.degradation if isinstance(objective, DisBack) else 0
    return objective.turns(step, objective.init_state())


def backward(objective: Objective, turn: Turn, networks: Networks) -> None:
    for loss in losses(objective, turn, networks, objective.init_state()):
        loss.total.backward()


def student_gradients(objective: Objective, backbone: Backbone, policy: RolloutPolicy) -> Gradients:
    """Of the student's turn: the predictions that carry gradient, one per chunk, their gradients, and those of the
    weights."""
    networks, made = networks_of(objective, backbone, policy), list[Tensor]()

    def keep(_module: Any, _inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
            made.append(output)

    (turn,) = (turn for turn in last_turns(objective) if turn.name == "student")
    hook = networks.student.register_forward_hook(keep)
    backward(objective, turn, networks)
    hook.remove()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in networks.student.parameters()]
    return [x.detach() for x in made], [x.grad for x in made if x.grad is not None], grads


@pytest.fixture(scope="module")
def unchanged(backbone: Backbone) -> Callable[[str], Gradients]:
    """`student_gradients` of a term with the plain sampler, which several tests compare with."""
    return cache(lambda name: student_gradients(TERMS[name], backbone, sampler()))


@pytest.mark.parametrize("name", mostly_slow(TERMS, [next(iter(TERMS)), "reward, GNDM"]))
def test_each_turn_trains_its_networks_and_no_others(name: str, backbone: Backbone) -> None:
    objective = TERMS[name]
    networks = networks_of(objective, backbone, sampler())
    if "fake_score" in networks:
        with torch.no_grad():  # where the scores agree, ADM's discriminator has nothing to learn
            networks.fake_score.network.proj_out.weight.mul_(1.1)
    for turn in (*last_turns(objective), *objective.turns(0, objective.init_state())):
        for module in networks.values():
            module.zero_grad()
        backward(objective, turn, networks)
        moved = {
            role
            for role, module in networks.items()
            if any(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
        }
        assert moved == set(turn.roles), turn.name
        assert not isinstance(turn, PathTurn) or name == "GAN, DisBack"


@pytest.mark.parametrize("name", TERMS)
def test_the_term_reaches_the_last_step_of_every_chunk(name: str, unchanged: Callable[[str], Gradients]) -> None:
    """The two scores agree, so that all gradient is the term's."""
    made, grads, _ = unchanged(name)
    sizes = [f"{grad.abs().max():.1e}" for grad in grads]
    print(f"{name}: largest gradient by executed step {sizes}")
    assert len(grads) == len(made) >= FRAMES // CHUNK
    assert all(len(x[0]) == CHUNK for x in made)
    with_term = [grad for grad in grads if grad.abs().max() > 0]
    assert len(with_term) >= FRAMES // CHUNK  # RTDMD also executes a drawn step, whose scores agree
    assert all(grad[:, frame].abs().max() > 0 for grad in with_term for frame in range(CHUNK))


@pytest.mark.parametrize("name", TERMS)
def test_replay_gives_the_gradient_of_the_whole_graph(
    name: str, backbone: Backbone, unchanged: Callable[[str], Gradients]
) -> None:
    _, _, whole = unchanged(name)
    _, _, replayed = student_gradients(TERMS[name], backbone, sampler(replay=True))
    scale = max(grad.abs().max().item() for grad in whole)
    error = max((a - b).abs().max().item() for a, b in zip(whole, replayed, strict=True)) / scale
    print(f"{name}: {error:.1e} of a gradient of {scale:.1e}")
    assert scale > 0 and error <= 1e-10


@pytest.mark.parametrize("name", TERMS)
def test_a_later_chunk_moves_no_earlier_output(
    name: str, backbone: Backbone, unchanged: Callable[[str], Gradients], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the training entry point: other noise in the second chunk leaves the first one as it is, to the bit."""
    before, _, _ = unchanged(name)
    plain = Draws.__call__

    def noisy(self: Draws, key: str) -> Tensor:
        return plain(self, key) + (1.0 if self.frames is not None and self.frames.start >= CHUNK else 0.0)

    monkeypatch.setattr(Draws, "__call__", noisy)
    after, _, _ = student_gradients(TERMS[name], backbone, sampler())
    assert len(before) == len(after)
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(a, b) == (i % 2 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("term", ["GAN", "reward"])
def test_a_run_with_the_term(term: str, folder: Path, tmp_path: Path) -> None:
    """Against real videos, or with a reward of pictures: a whole update, its log and the export."""
    changes: dict[str, Any]
    if term == "GAN":
        changes = {"data": {"name": "moving_digits", "videos": 4}}
        objective = {"name": "dmd2", "gan_weight": 0.1, "fake_updates": 1}
        changes["optimizers"] = {role: {"lr": 1e-3} for role in ("student", "fake_score", "discriminator")}
    else:
        objective = {"name": "rtdmd", "stage": 2, "selected_steps": 0, "group_size": 1, "fake_updates": 1}
        changes = {"rewards": {"parts": [{"name": f"{__name__}:change", "input": "frames", "differentiable": True}]}}
        rollout = {"timesteps": [1.0, 0.6], "transition": "cps", "eta": 0.9, "chunks": {"frames": 1, "window": 2}}
        changes["rollout"] = rollout
    made = recipe(folder, tmp_path / "run", objective, **changes)
    run = train(made)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    logged = {name for row in rows for name in row}
    assert {"student/gan", "fake_score/logit_gap"} <= logged if term == "GAN" else "student/reward" in logged, logged
    assert (run / "export/fastgen.json").is_file()


# --- refusals


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_without_chunks_says_why(name: str) -> None:
    cls = import_name("objective", OBJECTIVES[name])
    if cls.takes_chunks is True:
        return
    assert isinstance(cls.needs_whole_videos, property) or len(cls.needs_whole_videos) > 40


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"name": "adp", "pixel_weight": 0}, "chunks that do not continue each other.*use adm"),
        ({"name": "crd"}, "predicts a chunk from noise and clean earlier frames"),
        ({"name": "rtdmd", "stage": 2}, "also acts on the chunks after it.*set selected_steps: 0"),
        ({"name": "gndm", "form": "score"}, "without the frames that a chunk was given"),
        ({"name": "cdm"}, "without the frames that a chunk was given"),
        ({"name": "scm"}, "frames would see those after them"),
        (
            {"name": "consistency", "teach": "data", "grid": {"count": 4}, "gan": {"weight": 0.1}},
            "do not continue each other",
        ),
        (
            {"name": "phased_dmd", "random_exit": False, "phases": [{"first": 0, "last": 3, "updates": 1}]},
            "random_exit",
        ),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_what_cannot_be_trained_is_refused_with_its_reason(
    objective: dict[str, Any], words: str, folder: Path, tmp_path: Path
) -> None:
    rollout = {"timesteps": [1.0, 0.6, 0.3], "chunks": {"frames": 1}}
    with pytest.raises(RecipeError, match=words):
        recipe(folder, tmp_path / "run", objective, rollout=rollout)
