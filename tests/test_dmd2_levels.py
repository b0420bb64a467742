"""Options of the DMD2 family that say where its samples are renoised, and what the student is given: `renoise_range`,
the ends of a law of levels, and `student_input`."""

from dataclasses import replace

import pytest
import torch
from oracles import Recorder, tiny_batch, tiny_networks
from torch import Tensor

from fastgen.networks import Networks
from fastgen.objectives import DMD2, FDistill
from fastgen.rollout import Rollout, RolloutPolicy, predict_x0
from fastgen.schedule import TimeSampler
from fastgen.streaming.schedule import ChunkSchedule

POLICY = RolloutPolicy(timesteps=(1.0, 0.75, 0.5, 0.25))
CHUNKS = RolloutPolicy(timesteps=(1.0, 0.5), chunks=ChunkSchedule(frames=1))
LAWS = (
    TimeSampler(),
    TimeSampler(shift=5.0),
    TimeSampler("logit_normal", 0.001, 0.999, mean=-0.5, std=1.3, sigma_data=0.5),
    TimeSampler(shift=5.0, ends="clamp"),
)


# --- laws of levels


@pytest.mark.parametrize("law", LAWS)
def test_the_rank_is_the_inverse_of_the_law(law: TimeSampler) -> None:
    u = torch.linspace(0.05, 0.9, 50, dtype=torch.float64)  # inside the ends, where a clamped law has an inverse
    assert torch.allclose(law.rank(law(u)), u, atol=1e-12)


@pytest.mark.parametrize("law", LAWS)
def test_levels_between_two_levels_follow_the_law_given_that(law: TimeSampler) -> None:
    """Quantile by quantile, against the part of the whole law that lies between."""
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    whole = law(u)
    part = whole[(whole > 0.4) & (whole < 0.8)]
    u = (torch.arange(len(part), dtype=torch.float64) + 0.5) / len(part)
    low, high = torch.full_like(u, 0.4), torch.full_like(u, 0.8)
    found = law(u, (low, high))
    print(f"{(found - part).abs().max():.1e}")
    assert (found - part).abs().max() < 1e-5


def test_clamped_ends_leave_the_levels_between_them_alone() -> None:
    """As in Self-Forcing's code; stretched ends move every level."""
    u = torch.tensor([0.001, 0.3, 0.999], dtype=torch.float64)
    shifted = 5 * u / (1 + 4 * u)
    clamped = TimeSampler(shift=5.0, ends="clamp")(u)
    assert torch.allclose(clamped, torch.tensor([0.02, shifted[1], 0.98], dtype=torch.float64))
    assert torch.allclose(TimeSampler(shift=5.0)(u), 0.02 + 0.96 * shifted)


def test_a_clamped_guidance_term_stays_below_its_step() -> None:
    """CDM's law: uniform up to the step's level, then clamped; the stretched one begins at low."""
    top = torch.tensor([0.25, 1.0], dtype=torch.float64)
    u = torch.full_like(top, 0.5)
    assert torch.allclose(TimeSampler(ends="clamp").ended(u, top), 0.5 * top)
    assert torch.allclose(TimeSampler().ended(u, top), 0.02 + 0.5 * (0.98 * top - 0.02))


# --- the renoising range tied to the exit step


def levels_used(objective: DMD2) -> tuple[Rollout, Tensor, Tensor]:
    """A rollout with mixed stops, and the levels at which the scores and the fake score's loss are evaluated."""
    networks, batch = tiny_networks(objective, POLICY), tiny_batch(256)
    networks.modules["teacher"], networks.modules["fake_score"] = (
        Recorder(networks[role]) for role in ("teacher", "fake_score")
    )
    objective.student_loss(networks, batch)
    objective.fake_loss(networks, batch)
    (score,) = networks.teacher.calls
    fake = networks.fake_score.calls[-1]
    return objective.rollout(networks, batch, grad=False), score.t, fake.t


@pytest.mark.parametrize("kind", [DMD2, FDistill])
@pytest.mark.parametrize(("within", "top"), [("above", 1.0), ("step", None)])
def test_levels_lie_above_the_level_that_the_exit_step_goes_to(
    kind: type[DMD2], within: str, top: float | None
) -> None:
    objective = (
        DMD2(stops="per_sample", renoise_range=within)
        if kind is DMD2
        else FDistill(stops="per_sample", renoise_range=within, guidance_scale=1.0)
    )
    if kind is FDistill:
        networks, batch = tiny_networks(objective, POLICY), tiny_batch(256)
        rollout = objective.rollout(networks, batch, grad=False)
        used = [objective.renoised(networks, batch, rollout)[1]]
    else:
        rollout, *used = levels_used(objective)
    levels = torch.tensor([*POLICY.timesteps, 0.0], dtype=torch.float64)
    low = levels[rollout.stop + 1]
    high = levels[rollout.stop] if top is None else torch.full_like(low, top)
    for t in used:
        assert bool(((t >= low) & (t <= high)).all())
        for k in range(4):  # and the whole interval is used, as far as the law goes
            mine = t[rollout.stop == k]
            span = min(high[rollout.stop == k].max().item(), 0.98) - max(low[rollout.stop == k].min().item(), 0.02)
            assert mine.max() - mine.min() > 0.8 * span


def test_the_whole_law_is_the_default() -> None:
    rollout, t, fake_t = levels_used(DMD2(stops="per_sample"))
    early = rollout.stop == 0
    assert t[early].min() < 0.3 and fake_t[early].min() < 0.3


@pytest.mark.parametrize(
    ("objective", "policy", "words"),
    [
        (DMD2(renoise_range="above"), RolloutPolicy((1.0,)), "one step"),
        (DMD2(renoise_range="above"), RolloutPolicy((1.0, 0.99)), "from 1 to 0.99"),
        (DMD2(renoise_range="step", renoise_time=TimeSampler(low=0.3)), POLICY, "from 0.25 to 0"),
        (DMD2(student_input="data"), RolloutPolicy((1.0,)), "noise"),
        (DMD2(student_input="data"), CHUNKS, "student_input: simulated"),
    ],
)
def test_what_leaves_nothing_is_refused(objective: DMD2, policy: RolloutPolicy, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        objective.check(policy)


def test_levels_of_one_step_speak_of_one_list_for_all_chunks() -> None:
    assert DMD2().takes_first_timesteps and not DMD2(renoise_range="above").takes_first_timesteps


# --- noised data as the student's input


def test_the_student_starts_from_noised_data() -> None:
    """One step from alpha x + sigma noise at the level of the stop, with the student's gradient; no simulation."""
    objective = DMD2(stops="per_sample", student_input="data")
    networks, batch = tiny_networks(objective, POLICY), tiny_batch(24)
    assert objective.needs == {"latents"} and not DMD2().needs and batch.latents is not None
    rollout = objective.rollout(networks, batch, grad=True)
    t = torch.tensor(POLICY.timesteps, dtype=torch.float64)[rollout.stop]
    x_t = (1 - t)[:, None] * batch.latents + t[:, None] * batch.normal("initial")
    assert torch.allclose(rollout.steps[-1].x_t, x_t) and torch.equal(rollout.steps[-1].t, t)
    assert torch.allclose(rollout.x, predict_x0(networks.student, x_t, t, batch.cond, POLICY))
    assert rollout.x.requires_grad and not rollout.s.any()
    assert not objective.rollout(networks, batch, grad=False).x.requires_grad
    for loss in (objective.student_loss(networks, batch), objective.fake_loss(networks, batch)):
        loss.total.backward()
    moved = {role for role, module in networks.items() if any(p.grad is not None for p in module.parameters())}
    assert moved == {"student", "fake_score"}


def test_inner_updates_may_share_the_step_from_data() -> None:
    objective = DMD2(student_input="data")
    networks: Networks = tiny_networks(objective, POLICY)
    batch = replace(tiny_batch(8), shared={})
    first = objective.rollout(networks, batch, grad=False)
    again = objective.rollout(networks, replace(batch, key=5), grad=False)
    assert again is first and objective.rollout(networks, batch, grad=True) is not first
