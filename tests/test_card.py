"""What a hub reads of an export, and what `fastgen push` refuses."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from typer.testing import CliRunner

from fastgen.backbones.base import RoleOptions
from fastgen.backbones.sd import SDConfig
from fastgen.cli import app
from fastgen.config import load_recipe
from fastgen.run.card import card_data, copy_pictures, number_table
from fastgen.run.licence import copy_licence_texts, licence_of
from fastgen.train import train

SHORT = ["train.steps=1", "train.batch_size=2", "train.num_samples=2", "health.every=0", "eval.metrics=[throughput]"]
FEW = ["eval.num_samples=2", "eval.quick_num_samples=2", "eval.teacher_steps=[1]", "train.trackers=[]"]


def test_a_card_has_pictures_numbers_and_metadata(project: Path, tmp_path: Path) -> None:
    run = train(
        load_recipe(project / "recipes/digits_dmd2_4step.yaml", [*SHORT, *FEW, f"output_dir={tmp_path / 'run'}"])
    )
    card = ModelCard.load(run / "export/README.md")
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    assert card.data.tags == ["distillation", "few-step", "dmd2"] and card.data.base_model is None
    assert card.data.license == "apache-2.0" and "## Licence" in card.text
    assert "teacher, 1 steps" in card.text and "from_pretrained" in card.text
    for name in ("teacher.png", "student.png"):
        assert f"(samples/{name})" in card.text
        assert (run / "export/samples" / name).is_file()
    assert (run / "export/samples/student.png").read_bytes() == (run / "samples/step_00000001.png").read_bytes()


def test_the_numbers_say_what_they_compare_and_which_way_is_better() -> None:
    recipe = load_recipe("recipes/emoji_dmd2_4step.yaml", ["eval.reference=teacher", "eval.prompts=neutral"])
    said = number_table(recipe, {"student": {"fid": 1.0, "recall": 0.5, "network_evaluations": 4.0}})
    assert "compared with other samples of the teacher, in CLIP's features." in said
    assert "Lower is better for `fid`" in said and "Higher is better for `recall`." in said


def test_a_hub_id_is_the_base_model() -> None:
    recipe = load_recipe("recipes/sdxl_dmd2_4step.yaml")
    backbone = (
        SDConfig(path="stabilityai/stable-diffusion-xl-base-1.0")
        .unloaded()
        .build(torch.device("cpu"), torch.float32, 0, RoleOptions(deferred=True))
    )
    whole, adapter = (card_data(backbone, recipe, lora).to_dict() for lora in (False, True))
    assert whole["base_model"] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert whole["base_model_relation"] == "finetune" and adapter["base_model_relation"] == "adapter"


def test_the_licence_is_what_the_teachers_folder_states(tmp_path: Path) -> None:
    """Its card's metadata, else its licence texts by name, else none."""
    source = str(tmp_path)
    unknown = licence_of(source)
    assert unknown.metadata == {"license": "other", "license_name": "unknown"} and "not known here" in unknown.said
    (tmp_path / "README.md").write_text("# A teacher without metadata\n")
    assert licence_of(source) == unknown
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert licence_of(source) == unknown
    (tmp_path / "NOTICE").write_text("Of several sets of pictures.\n")
    noted = licence_of(source)
    assert noted.metadata == {"license": "other", "license_name": "see-notice", "license_link": "NOTICE"}
    assert "[NOTICE](NOTICE)" in noted.said
    (tmp_path / "README.md").write_text("---\nlicense: openrail++\n---\n# A teacher\n")
    assert licence_of(source).metadata == {"license": "openrail++"} and "`openrail++`" in licence_of(source).said
    named = {"license": "other", "license_name": "a-community-license", "license_link": "LICENSE.md"}
    lines = "".join(f"{key}: {value}\n" for key, value in named.items())
    (tmp_path / "README.md").write_text(f"---\n{lines}---\n# A teacher\n")
    assert licence_of(source).metadata == named and "`a-community-license`" in licence_of(source).said
    assert licence_of("org/name").metadata == {} and "the page of org/name" in licence_of("org/name").said


def test_what_the_shipped_teachers_state(tmp_path: Path) -> None:
    assert licence_of("assets/teachers/digits").metadata == {"license": "apache-2.0"}
    assert licence_of("assets/teachers/moving_digits").metadata == {"license": "apache-2.0"}
    assert licence_of("assets/emoji/teacher").metadata["license_link"] == "NOTICE"
    copy_licence_texts("assets/emoji/teacher", tmp_path)
    assert "Twemoji" in (tmp_path / "NOTICE").read_text() and "CC BY 4.0" in (tmp_path / "NOTICE").read_text()


def test_the_last_picture_is_copied(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    copy_pictures(tmp_path, tmp_path)  # there are none yet
    for name, colour in (("step_00000001", "red"), ("step_00000010", "blue")):
        Image.new("RGB", (2, 2), colour).save(tmp_path / "samples" / f"{name}.png")
    (tmp_path / "export").mkdir()
    copy_pictures(tmp_path, tmp_path / "export")
    assert Image.open(tmp_path / "export/samples/student.png").getpixel((0, 0)) == (0, 0, 255)
    assert not (tmp_path / "export/samples/teacher.png").exists()


@pytest.mark.parametrize(
    ("repository", "words"), [("me/mine", "neither a run with an export"), ("mine", "neither a run with an export")]
)
def test_only_an_export_is_pushed(tmp_path: Path, repository: str, words: str) -> None:
    done = CliRunner().invoke(app, ["push", str(tmp_path), repository])
    assert done.exit_code == 2 and words in done.output


def test_a_push_without_the_hub_is_refused_in_words(tmp_path: Path) -> None:
    """HF_HUB_OFFLINE is set in all tests."""
    (tmp_path / "fastgen.json").write_text("{}")
    done = CliRunner().invoke(app, ["push", str(tmp_path), "me/mine"])
    assert done.exit_code == 2 and "the hub did not let us write me/mine" in done.output
    assert "no repository" in CliRunner().invoke(app, ["push", str(tmp_path), "mine"]).output
