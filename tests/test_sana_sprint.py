"""Sana-Sprint: the samplers its export can store, what its network is told, and the call of its card."""

from pathlib import Path

import pytest
import torch
from tiny_families import FAMILIES, PROMPTS
from tiny_sana import tiny_sana

from fastgen.backbones.flow_image import FlowImage
from fastgen.backbones.sana_sprint import sprint_levels
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.sampler import Sampler, teacher_sampler
from fastgen.schedule import trig_to_flow

FAMILY = FAMILIES["sana-sprint"]


@pytest.fixture(scope="module")
def sprint(tmp_path_factory: pytest.TempPathFactory) -> FlowImage:
    return FAMILY.make(FAMILY.folder(tmp_path_factory.mktemp("sprint")), guidance={"teacher": 2.0})


def test_the_scale_of_the_call_is_what_the_network_is_told(sprint: FlowImage) -> None:
    ours = teacher_sampler(sprint, 1, 1.0).sample(PROMPTS, [3, 1])
    theirs, _ = FAMILY.plain_pixels(Path(sprint.source), sprint, 1, guidance_scale=2.0)
    assert float((ours - theirs).abs().max()) < 1e-4
    as_student = Sampler(sprint, sprint.load("student"), sprint.teacher_policy(1)).sample(PROMPTS, [3, 1])
    assert float((ours - as_student).abs().max()) > 1e-4  # which is told 4.5
    assert sprint.stock_call == (2, 1.0) and "looks like a few-step student" in sprint.warnings()[0]


def test_levels_are_those_of_the_default_angles() -> None:
    angles = torch.tensor([torch.pi / 2, 1.3])
    assert torch.tensor(sprint_levels(2)) == pytest.approx(trig_to_flow(angles, angles)[1], abs=1e-5)
    assert sprint_levels(1) == (1.0,) and sprint_levels(4)[2] == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (RolloutPolicy((1.0, 0.5)), r"not those of SanaSprintPipeline's call with 2 steps.*\[1.0, 0.782708\]"),
        (RolloutPolicy(sprint_levels(2), "ode"), "use transition: renoise, not ode"),
        (RolloutPolicy((1.0,), conditioning_time=0.5), "no conditioning_time"),
    ],
)
def test_a_sampler_that_the_stock_call_does_not_have_is_refused(
    sprint: FlowImage, policy: RolloutPolicy, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sprint.config.check_export(policy)


def test_the_list_of_the_message_can_be_exported_and_the_card_calls_it(sprint: FlowImage) -> None:
    sprint.config.check_export(RolloutPolicy((1.0, 0.782708)))
    sprint.config.check_export(RolloutPolicy((1.0,), "ode"))
    assert "guidance_scale=4.5, height=32, width=32, max_sequence_length=12" in sprint.call
    assert "middle = 1.3 if steps == 2 else None" in sprint.call


def test_a_network_of_sana_is_refused(tmp_path: Path, sprint: FlowImage) -> None:
    with pytest.raises(ValueError, match=r"holds a SanaPipeline.*; backbone sana does"):
        FAMILY.make(tiny_sana(tmp_path))
    with pytest.raises(ValueError, match="no guidance_embeds"):
        sprint.wrap(FAMILIES["sana"].make(tmp_path).load("student").network)
