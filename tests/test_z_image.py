"""Z-Image: prompts with their own numbers of tokens, guidance with a longest norm and a last level, and its scale."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, PROMPTS

from fastgen import signals
from fastgen.backbones.flow_image import FlowImage
from fastgen.batch import ragged
from fastgen.planning.weightless import empty
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.sampler import teacher_sampler

FAMILY = FAMILIES["z-image"]
LONG = ["a red cat", "two " + "green texture of objects by the background and " * 4]  # 32 and 64 tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILY.folder(tmp_path_factory.mktemp("z_image"))


@pytest.fixture(scope="module")
def z_image(folder: Path) -> FlowImage:
    return FAMILY.make(folder, max_sequence_length=60)


def test_prompts_of_different_lengths_and_a_negative_prompt_give_the_pipelines_own_pixels(folder: Path) -> None:
    backbone = FAMILY.make(folder, max_sequence_length=60, negative_prompt="two texture")
    lengths = backbone.encode_prompts(LONG)["prompt_mask"].sum(1).tolist()
    assert lengths[0] <= 32 < lengths[1] < 60
    ours = teacher_sampler(backbone, 2, 3.0).sample(LONG, [3, 1])
    given = {"guidance_scale": 2.0, "negative_prompt": ["two texture"] * 2, "max_sequence_length": 60}
    theirs, _ = FAMILY.plain_pixels(folder, backbone, 2, LONG, **given)
    assert float((ours - theirs).abs().max()) < 1e-4


def test_features_are_tokens_of_the_image_and_do_not_depend_on_other_prompts(z_image: FlowImage) -> None:
    teacher, x, t = z_image.load("teacher"), torch.randn(2, *z_image.latent_shape), torch.tensor([0.9, 0.3])
    with teacher.capture() as together:
        teacher(x, t, z_image.encode_prompts(LONG))
    with teacher.capture() as alone:
        teacher(x[:1], t[:1], z_image.encode_prompts(LONG[:1]))
    assert {value.shape for value in together} == {(2, 64, 48)}
    assert all(torch.allclose(a[:1], b, atol=1e-4) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("options", [{"cfg_normalization": True}, {"cfg_truncation": 0.1}])
def test_guidance_is_limited_as_in_the_pipelines_call(
    folder: Path, z_image: FlowImage, options: dict[str, Any]
) -> None:
    backbone, given = FAMILY.make(folder, max_sequence_length=60, **options), {"max_sequence_length": 60, **options}
    ours, free = (teacher_sampler(b, 2, 4.0).sample(PROMPTS, [3, 1]) for b in (backbone, z_image))
    theirs, visited = FAMILY.plain_pixels(folder, backbone, 2, guidance_scale=3.0, **given)
    assert float((ours - theirs).abs().max()) < 1e-4
    assert float((ours - free).abs().max()) > 1e-3
    assert visited[-1] < 0.9  # so that the last step is not guided


def test_limited_guidance_is_the_same_for_velocities_and_samples_and_finite_without_noise(folder: Path) -> None:
    backbone = FAMILY.make(folder, cfg_normalization=True)
    teacher, x, t = backbone.load("teacher"), torch.randn(2, *backbone.latent_shape), torch.tensor([0.9, 0.3])
    cond, uncond = backbone.encode_both(PROMPTS)
    velocity = partial(teacher, predict="flow_prediction")
    with torch.no_grad():
        v, x0 = (signals.guided(f, x, t, cond, uncond, 4.0) for f in (velocity, teacher))
        on = velocity(x, t, cond)
    assert torch.allclose(x0, x - t.view(-1, 1, 1, 1) * v, atol=1e-5)
    assert bool((v.flatten(1).norm(dim=1) <= on.flatten(1).norm(dim=1) * (1 + 1e-5)).all())
    assert torch.equal(teacher.guide(x, x, torch.tensor(4.0), x, torch.zeros(2)), x)
    with pytest.raises(ValueError, match="not as epsilon"):
        teacher.guide(x, x, torch.tensor(4.0), x, t, "epsilon")


def test_the_scale_of_the_stock_call_is_one_less_than_ours(z_image: FlowImage) -> None:
    assert z_image.stock_call == (50, 6.0)
    assert "guidance scale 5 instead of 0" in z_image.plain_call(RolloutPolicy((1.0, 0.5)), False)
    assert "guidance_scale=0, height=32, width=32, max_sequence_length=60)" in z_image.call


def test_padding_is_taken_off_unless_it_has_no_values() -> None:
    rows, mask = torch.arange(6.0).view(2, 3, 1), torch.tensor([[1, 0, 0], [1, 1, 1]])
    assert [row.flatten().tolist() for row in ragged(rows, mask)] == [[0.0], [3.0, 4.0, 5.0]]
    assert [len(row) for row in ragged(empty(2, 3, 1), empty(2, 3))] == [3, 3]
