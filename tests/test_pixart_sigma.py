"""PixArt-Sigma: negative prompts and masks, what its network is not told, and the call of its card."""

import json
from pathlib import Path

import pytest
from tiny_families import FAMILIES, PROMPTS

from fastgen.sampling.sampler import teacher_sampler

FAMILY = FAMILIES["pixart-sigma"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILY.folder(tmp_path_factory.mktemp("pixart"))


def test_a_negative_prompt_gives_the_pipelines_own_pixels(folder: Path) -> None:
    backbone = FAMILY.make(folder, negative_prompt="blurred")
    ours = teacher_sampler(backbone, 2, 3.0).sample(PROMPTS, [3, 1])
    theirs, _ = FAMILY.plain_pixels(folder, backbone, 2, guidance_scale=3.0, negative_prompt="blurred")
    plain, _ = FAMILY.plain_pixels(folder, backbone, 2, guidance_scale=3.0)
    assert float((ours - theirs).abs().max()) < 1e-4 < float((ours - plain).abs().max())
    assert backbone.stock_call == (20, 4.5)


def test_a_network_that_is_told_sizes_is_refused(folder: Path, tmp_path: Path) -> None:
    path = FAMILY.folder(tmp_path) / "transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_additional_conditions": True}))
    with pytest.raises(ValueError, match="told sizes"):
        FAMILY.make(tmp_path)


def test_the_card_of_an_export_calls_it_as_it_was_trained(folder: Path) -> None:
    assert "width=32, max_sequence_length=12, generator" in FAMILY.make(folder).call
    assert "width=48, use_resolution_binning=False" in FAMILY.make(folder, resolution=48).call
