"""Qwen-Image: prompts of different lengths, guidance that keeps norms, and its scheduler's last level."""

from functools import partial
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, PROMPTS

from fastgen import signals
from fastgen.backbones.base import RoleOptions
from fastgen.backbones.flow_image import FlowImage, to_tokens
from fastgen.batch import Conditioning
from fastgen.flow.flow_maps import guided_velocity
from fastgen.modules.experts import Experts
from fastgen.modules.lora import LoraConfig
from fastgen.schedule import expand


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> FlowImage:
    family = FAMILIES["qwen-image"]
    return family.make(family.folder(tmp_path_factory.mktemp("qwen")), max_sequence_length=40)


def test_prompts_of_different_lengths_give_what_each_gives_alone(qwen: FlowImage) -> None:
    prompts = ["a red cat", "", "two green dogs and a red cat of green texture"]
    teacher, cond = qwen.load("teacher"), qwen.encode_prompts(prompts)
    x, t = torch.randn(3, *qwen.latent_shape), torch.tensor([0.9, 0.5, 0.2])
    lengths = cond["prompt_mask"].sum(1).tolist()
    assert len(set(lengths)) == 3
    with torch.no_grad():
        together = teacher(x, t, cond)
        for i, length in enumerate(lengths):
            row = cond.select(slice(i, i + 1))
            alone = Conditioning({key: value[:, :length] for key, value in row.items()})
            assert torch.allclose(teacher(x[i : i + 1], t[i : i + 1], alone), together[i : i + 1], atol=1e-5)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_guidance_of_qwen_image_keeps_the_norm_of_each_token(qwen: FlowImage, adapters: bool) -> None:
    roles = RoleOptions({"student": LoraConfig(4)} if adapters else {})
    backbone: Any = qwen.config.build(torch.device("cpu"), torch.float32, 0, roles)
    teacher = backbone.load("teacher")
    cond, uncond = backbone.encode_prompts(PROMPTS), backbone.encode_prompts(["", ""])
    x, t = torch.randn(2, *backbone.latent_shape), torch.tensor([0.9, 0.3])
    velocity = partial(teacher, predict="flow_prediction")
    with torch.no_grad():
        on, off = velocity(x, t, cond), velocity(x, t, uncond)
        given = signals.guided(velocity, x, t, cond, uncond, 3.0)
        x0 = signals.guided(teacher, x, t, cond, uncond, 3.0)
        also = guided_velocity(teacher, cond, uncond, 3.0)(x, t)
        plain = signals.guided(teacher, x, t, cond, uncond, 3.0, interval=(0.5, 1.0))
    mixed = to_tokens(off + 3 * (on - off))
    wanted = mixed * to_tokens(on).norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True)
    assert float((mixed - wanted).abs().max()) > 0.01
    assert torch.allclose(to_tokens(given), wanted, atol=1e-5)
    assert torch.allclose(x0, x - expand(t, x) * given, atol=1e-5)
    assert torch.allclose(also, given, atol=1e-5)
    assert torch.allclose(plain[1], x[1] - 0.3 * on[1], atol=1e-5)


def test_guidance_of_qwen_image_is_finite_without_noise(qwen: FlowImage) -> None:
    x, t = torch.randn(1, *qwen.latent_shape), torch.zeros(1)
    assert torch.equal(qwen.load("teacher").guide(x, x, torch.tensor(3.0), x, t), x)


def test_experts_are_guided_by_the_rule_of_their_family(qwen: FlowImage) -> None:
    experts = Experts([qwen.load("teacher"), qwen.load("teacher")], [0.5])
    cond, uncond = qwen.encode_prompts(PROMPTS), qwen.encode_prompts(["", ""])
    x, t = torch.randn(2, *qwen.latent_shape), torch.tensor([0.9, 0.3])
    with torch.no_grad():
        one, several = (signals.guided(f, x, t, cond, uncond, 3.0) for f in (experts.members[0], experts))
    assert torch.allclose(one, several, atol=1e-5)


def test_one_step_of_a_scheduler_with_a_last_level_is_refused(qwen: FlowImage) -> None:
    with pytest.raises(ValueError, match=r"cannot make one step: its last level is 0.02 \(shift_terminal\)"):
        qwen.teacher_policy(1)
