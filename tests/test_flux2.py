"""FLUX.2: what is told to dev, how klein is guided, and what an exported klein does by default."""

import json
from pathlib import Path

import pytest
from tiny_families import FAMILIES, PROMPTS
from tiny_flux2 import tiny_flux2_klein

from fastgen.backbones import pipeline_config
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.sampler import teacher_sampler

DEV, KLEIN = FAMILIES["flux2-dev"], FAMILIES["flux2-klein"]


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KLEIN.folder(tmp_path_factory.mktemp("klein"))


def test_dev_gives_the_pipelines_own_pixels_at_another_told_scale(tmp_path: Path) -> None:
    backbone = DEV.make(DEV.folder(tmp_path), guidance={"teacher": 2.0})
    ours = teacher_sampler(backbone, 2, 1.0).sample(PROMPTS, [3, 1])
    theirs, _ = DEV.plain_pixels(tmp_path, backbone, 2, guidance_scale=2.0)
    assert float((ours - theirs).abs().max()) < 1e-4
    assert backbone.stock_call == (50, 1.0)
    assert (
        'prompt="a prompt"' in backbone.call and "guidance_scale=4, max_sequence_length=12, height=32" in backbone.call
    )


def test_klein_is_told_nothing_and_its_distilled_model_is_not_guided(klein: Path, tmp_path: Path) -> None:
    base = KLEIN.make(klein)
    assert base.stock_call == (50, 4.0) and base.guidance_told("student") is None and not base.warnings()
    with pytest.raises(ValueError, match="is told no guidance scale"):
        KLEIN.make(klein, guidance={"student": 1.0})
    distilled = KLEIN.make(tiny_flux2_klein(tmp_path, distilled=True))
    assert distilled.stock_call == (50, 1.0) and "looks like a few-step student" in distilled.warnings()[0]


def test_a_default_call_of_an_exported_klein_does_not_guide_it(klein: Path, tmp_path: Path) -> None:
    backbone = KLEIN.make(klein)
    backbone.save_pipeline(backbone.load("student"), RolloutPolicy((1.0, 0.5)), tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["is_distilled"]
    assert "use 50 steps instead of 2.**" in backbone.plain_call(RolloutPolicy((1.0, 0.5)), False)
    _, visited = KLEIN.plain_pixels(tmp_path, backbone, 2)  # with the default scale, 4
    assert visited == pytest.approx([1.0, 0.5], abs=1e-6)


def test_a_diffusers_that_is_too_old_is_refused_with_the_version_that_is_needed(
    klein: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_config, "version", lambda name: "0.37.1")
    with pytest.raises(ValueError, match=r"flux2 needs diffusers 0\.38 or newer, and 0\.37\.1 is installed"):
        KLEIN.make(klein)
