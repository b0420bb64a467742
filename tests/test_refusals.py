"""What a recipe can get wrong is refused before weights load: exit code 2, the key's path, and the way out."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastgen.backbones.pipeline import PipelineBackbone
from fastgen.train import main

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "assets/teachers/digits"
RECIPE = str(ROOT / "recipes/digits_dmd2_4step.yaml")


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(PipelineBackbone, "make", loaded)


def refusal(capsys: pytest.CaptureFixture[str], tmp_path: Path, *overrides: str) -> str:
    assert main([RECIPE, f"output_dir={tmp_path / 'run'}", *overrides]) == 2
    error = capsys.readouterr().err
    print(error)
    assert error.startswith("refused: ") and "Traceback" not in error
    return error


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TEACHER, tmp_path / "teacher"))


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("", "neither a folder nor a hub id"),
        ("model_index.json", "no model_index.json"),
        ("vae", "no folder vae; download it again"),
        ("transformer/config.json", "no config.json; download it again"),
        ("transformer/diffusion_pytorch_model.safetensors", "download the safetensors weights"),
        ("text_encoder_3/model.safetensors", "download the safetensors weights"),
    ],
)
def test_a_pipeline_folder_that_is_not_all_there(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str, words: str
) -> None:
    part = copy / missing
    shutil.rmtree(part) if part.is_dir() else part.unlink()
    error = refusal(capsys, tmp_path, f"backbone.path={copy}")
    assert "backbone: path: " in error and words in error


def test_a_missing_shard_is_named(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    (copy / "transformer/diffusion_pytorch_model.safetensors").rename(copy / "transformer/part-1.safetensors")
    (copy / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "part-2.safetensors" in refusal(capsys, tmp_path, f"backbone.path={copy}")


def test_a_pipeline_of_another_family(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The family that does load it is named."""
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionXLPipeline"}))
    error = refusal(capsys, tmp_path, f"backbone.path={copy}")
    assert "holds a StableDiffusionXLPipeline" in error and "backbone sd does" in error
    (copy / "model_index.json").write_text("{")
    assert f"cannot read {copy}/model_index.json" in refusal(capsys, tmp_path, f"backbone.path={copy}")


def test_the_run_folder_of_another_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fastgen.config import load_recipe
    from fastgen.config.stored import dump_recipe

    (tmp_path / "run").mkdir()
    other = load_recipe(RECIPE, [f"output_dir={tmp_path / 'run'}", "objective.fake_updates=7"])
    (tmp_path / "run/recipe.yaml").write_text(dump_recipe(other))
    error = refusal(capsys, tmp_path)
    assert "objective.fake_updates" in error and "choose another output_dir" in error


def test_a_discriminator_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(
        capsys,
        tmp_path,
        "objective.gan_weight=0.1",
        "optimizers.discriminator={lr: 1e-4}",
        "data={name: prompts, prompts: [a three]}",
    )
    assert "data.name" in error and "needs latents" in error


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.frozen_dtype=bfloat16"], "train.mixed_precision: bf16"),
        (["train.resume_from=step_00000100"], "there is no complete one"),
        (["health.std_ratio=[0.5]"], "health.std_ratio"),
        (["init_from=no/such/run"], "is neither a run with a complete checkpoint, nor an export"),
        (["train.strategy=zero"], "train.strategy"),
    ],
)
def test_options_of_the_loop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], words: str
) -> None:
    assert words in refusal(capsys, tmp_path, *overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["eval.metrics=[accuracy]", "eval.prompts=[a cat]"], "no digit word"),
        (["part={words: [[nine], []], index: 0}", "eval.prompts=[one, two]"], "none of the 2 is for student 0 (part)"),
        (
            ["part={words: [[nine], []], index: 0}", "data={name: prompts, prompts: [one]}", "eval.prompts=[nine]"],
            "data: prompts: none of the 1 is for student 0 (part)",
        ),
    ],
)
def test_prompts_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], words: str
) -> None:
    """Those of an evaluation would be found after the last update."""
    assert words in refusal(capsys, tmp_path, *overrides)


def test_a_reference_without_captions_gives_no_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    for name in "ab":
        Image.new("RGB", (32, 32)).save(tmp_path / f"photos/{name}.png")
    reference = f"eval.reference={tmp_path / 'photos'}"
    assert "have no texts next to them; add them" in refusal(capsys, tmp_path, reference, "eval.metrics=[fid]")


def test_points_have_no_activations_to_spare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ring = str(ROOT / "recipes/mixture_dmd2_4step.yaml")
    assert main([ring, f"output_dir={tmp_path}", "train.gradient_checkpointing=true"]) == 2
    assert "train.gradient_checkpointing" in capsys.readouterr().err
