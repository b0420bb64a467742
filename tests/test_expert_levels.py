"""Levels that need one expert an update: their law, and what is counted where a process has no rows for an expert."""

import dataclasses
from pathlib import Path

import pytest
import torch
from oracles import tiny_backbone, tiny_batch, tiny_networks
from tiny_wan import tiny_wan, transformer

from fastgen.backbones.wan import WanConfig, WanDenoiser
from fastgen.batch import Batch, Conditioning
from fastgen.config import load_recipe
from fastgen.denoiser import NO_INPUTS, Denoiser
from fastgen.flow.time_pairs import GridPairs
from fastgen.modules.expert_levels import draw_levels
from fastgen.modules.experts import Experts
from fastgen.networks import counted
from fastgen.objectives import ADM, ADP, GDD, Consistency, FDistill, FlashDMD, Loss, Objective
from fastgen.objectives.embedding import Embedding
from fastgen.objectives.ladd import Ladd
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import TimeSampler

LAWS = {
    "uniform, shifted": TimeSampler(shift=5.0),
    "clamped": TimeSampler(low=0.02, high=0.98, shift=5.0, ends="clamp"),
    "logit-normal": TimeSampler("logit_normal", 0.0, 1.0, mean=-0.4),
}
UPDATES, SAMPLES = 150, 64


def points(key: int, count: int = SAMPLES) -> Batch:
    none = Conditioning({})
    return Batch(torch.arange(count), key, none, none, (2,))


@pytest.fixture(scope="module")
def experts() -> Experts:
    backbone = tiny_backbone()
    return Experts([backbone.load("student") for _ in range(3)], (0.875, 0.4))


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_levels_have_their_law_and_one_expert(experts: Experts, law: TimeSampler) -> None:
    """Every update needs one expert, each as often as the law says (four standard deviations), and inside its range
    the levels have the law. Fails if every sample draws for itself, or if the strata are not those of the boundaries.
    """
    drawn = torch.stack([draw_levels(points(key), "time", law, experts) for key in range(UPDATES)])
    called = torch.stack([experts.expert_of(t) for t in drawn])
    assert (called == called[:, :1]).all()
    alone = law((torch.arange(100_000) + 0.5) / 100_000)
    owner = experts.expert_of(alone)
    for i in range(3):
        share, wanted = (called[:, 0] == i).double().mean(), (owner == i).double().mean()
        assert abs(share - wanted) < 4 * (wanted * (1 - wanted) / UPDATES) ** 0.5
        here, exact = drawn[called == i].sort().values, alone[owner == i].sort().values
        ranks = torch.searchsorted(exact, here, right=True).double() / len(exact)
        distance = (ranks - (torch.arange(len(here)) + 1) / len(here)).abs().max()
        print(f"expert {i}: share {share:.3f} ({wanted:.3f}), distance of the laws {distance:.3f}")
        assert distance < 2.0 / len(here) ** 0.5 or law.ends == "clamp"


def test_one_network_has_the_draws_it_had(experts: Experts) -> None:
    law, batch = LAWS["uniform, shifted"], points(3)
    assert torch.equal(draw_levels(batch, "time", law, experts.members[0]), law(batch.uniform("time")))


def test_a_law_on_one_side_of_all_boundaries_stays_there(experts: Experts) -> None:
    for low, high, expert in ((0.9, 0.95, 0), (0.5, 0.6, 1), (0.1, 0.2, 2)):
        law = TimeSampler(low=low, high=high)
        t = torch.stack([draw_levels(points(key, 4), "time", law, experts) for key in range(40)])
        assert (experts.expert_of(t.flatten()) == expert).all() and t.std() > 0.2 * (high - low)


def test_a_network_that_is_called_below_the_level_has_one_expert_there(experts: Experts) -> None:
    law, offset = TimeSampler(low=0.3), 1 / 64
    for key in range(UPDATES):
        t = draw_levels(points(key), "time", law, experts, offset=offset)
        assert len(experts.expert_of(t - offset).unique()) == 1 and t.min() >= law.low


@pytest.mark.parametrize(
    "objective", [ADM(), GDD(), ADP(pixel_weight=0.0), FlashDMD()], ids=lambda objective: objective.name
)
def test_discriminators_read_the_features_of_one_expert(objective: Objective) -> None:
    """On a teacher of two experts, in the turns of the discriminator and of the student. Fails if each sample draws
    its level for itself: features of several experts are refused."""
    policy = RolloutPolicy((1.0,)) if objective.name == "gdd" else RolloutPolicy((1.0, 0.75, 0.5, 0.25))
    networks, backbone, state = tiny_networks(objective, policy), tiny_backbone(), objective.init_state()
    critic = Experts([backbone.load("features").double() for _ in range(2)], (0.5,))
    networks.modules["features"] = critic.requires_grad_(False)
    turns = [turn for turn in objective.turns(5, state) if turn.name in ("discriminator", "student")]
    for key in range(12):
        for turn in turns:
            loss = objective.loss(turn, networks, tiny_batch(8, key), state)
            assert isinstance(loss, Loss) and loss.total.isfinite()


@pytest.mark.parametrize("experts", [1, 2])
def test_features_at_levels_of_each_sample_need_one_network(experts: int, tmp_path: Path) -> None:
    """Where the law of levels differs from sample to sample, no draw puts them all within one expert."""
    wan = WanConfig(path=str(tiny_wan(tmp_path / "wan", experts=experts)))
    mixture = Path(__file__).parents[1] / "recipes/mixture_dmd2_4step.yaml"
    recipe = dataclasses.replace(load_recipe(mixture), backbone=wan)
    grid, gan = GridPairs(count=8), Ladd(weight=0.1)
    embedding = Embedding(features="teacher", time=TimeSampler())
    for objective in (
        FDistill(stops="per_sample", renoise_range="step"),
        Consistency(grid=grid, gan=gan, phases=(4,)),
        Consistency(grid=grid, embedding=embedding, end="uniform"),
    ):
        if experts == 1:
            objective.check_recipe(recipe)
            continue
        with pytest.raises(ValueError, match="features of one expert of the pipeline"):
            objective.check_recipe(recipe)
    for objective in (FDistill(renoise_range="step"), Consistency(grid=grid, gan=gan)):
        objective.check_recipe(recipe)


def test_what_runs_is_counted() -> None:
    """Rows go to their experts and are counted once. An expert that only other processes need, as `called_experts`
    says, runs one token of eight, and changes neither the prediction nor any gradient."""
    torch.manual_seed(0)
    both = Experts([WanDenoiser(transformer(1, 1.0)) for _ in range(2)], (0.5,))
    x, t = torch.randn(3, 2, 4, 4, 4), torch.tensor([0.9, 0.1, 0.2])
    cond = Conditioning({"prompt_embeds": torch.randn(3, 5, 16)})
    with counted({"student": both}) as rows:
        both(x, t, cond)
    assert sorted(rows) == [1, 2]
    low = slice(1, 3)
    alone = both(x[low], t[low], cond.select(low))
    both.called_experts = lambda index: [0, 1]  # type: ignore[method-assign]
    with counted({"student": both}) as rows:
        out = both(x[low], t[low], cond.select(low))
    assert sorted(rows) == [1 / 8, 2] and torch.equal(out, alone)
    out.square().mean().backward()
    assert all(p.grad is not None and not p.grad.any() for p in both.experts[0].parameters())
    assert any(p.grad.any() for p in both.experts[1].parameters() if p.grad is not None)


def test_the_smallest_part_is_whole_where_a_family_names_none(experts: Experts) -> None:
    member: Denoiser = experts.members[0]
    x, t = torch.zeros(1, 2), torch.zeros(1)
    assert member.smallest(x, t, NO_INPUTS) == (x, t, NO_INPUTS)
