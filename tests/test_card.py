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
from fastgen.evaluation.numbers import STORED, known_numbers, numbers_section, store_numbers, stored_numbers
from fastgen.run.card import card_data, copy_pictures
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
    assert "| teacher, 1 step |" in card.text and "from_pretrained" in card.text
    for name in ("teacher.png", "student.png"):
        assert f"(samples/{name})" in card.text
        assert (run / "export/samples" / name).is_file()
    assert (run / "export/samples/student.png").read_bytes() == (run / "samples/step_00000001.png").read_bytes()


ROW = {
    "name": "student, 4 steps",
    "num_samples": 8,
    "reference": "teacher",
    "features": "clip",
    "guidance_scale": 1.0,
    "metrics": {"fid": 1.0, "recall": 0.5, "network_evaluations": 4.0},
}


def test_the_numbers_say_what_they_compare_and_which_way_is_better() -> None:
    said = numbers_section([ROW, ROW | {"name": "teacher, 8 steps", "guidance_scale": 2.5}])
    assert "Measured on 8 samples of each, with the same prompts and seeds" in said
    assert (
        "the teacher is at guidance scale 2.5. They are compared with other samples of the teacher, in CLIP's" in said
    )
    assert "Lower is better for `fid`" in said and "Higher is better for `recall`." in said
    assert "| student, 4 steps | 1 | 0.5 | 4 |\n| teacher, 8 steps | 1 | 0.5 | 4 |" in said
    assert "teacher" not in numbers_section([ROW | {"reference": None}])
    assert "other samples" not in numbers_section([ROW | {"metrics": {"network_evaluations": 4.0}}])


def test_newer_numbers_take_the_place_of_the_older_ones_and_of_nothing_else(tmp_path: Path) -> None:
    assert store_numbers(tmp_path, [ROW]) is False  # there is no card
    card = tmp_path / "README.md"
    card.write_text(f"# Mine\n\n{numbers_section([])}## Licence\n\nAsk \\1 me.\n")
    assert store_numbers(tmp_path, [ROW | {"metrics": {"fid": 2.5}}])
    assert (
        store_numbers(tmp_path, [ROW | {"metrics": {"fid": 7.5}}])
        and stored_numbers(tmp_path)[0]["metrics"]["fid"] == 7.5
    )
    text = card.read_text()
    assert "7.5" in text and "2.5" not in text and "Not measured" not in text
    assert text.startswith("# Mine\n\n## Numbers\n") and text.endswith("\n\n## Licence\n\nAsk \\1 me.\n")
    card.write_text("# A card that somebody has written\n")
    assert store_numbers(tmp_path, [ROW]) is False and card.read_text() == "# A card that somebody has written\n"
    (tmp_path / STORED).write_text("[1]")
    assert stored_numbers(tmp_path) == []


def test_numbers_are_known_only_where_all_settings_are_the_same() -> None:
    rows = [ROW | {"policy": {"timesteps": [1.0, 0.5]}, "metrics": {"fid": 1.0, "fid_num_samples": 8.0, "mmd": 3.0}}]
    rows[0] |= {"machine": "a GPU", "scorers": {"clip_score": {"path": "clip"}}}  # of metrics that are not asked for
    same = {key: ROW[key] for key in ("num_samples", "reference", "features", "guidance_scale")}
    facts = same | {"policy": {"timesteps": (1.0, 0.5)}}
    assert known_numbers(rows, facts, ("fid",)) == {"fid": 1.0, "fid_num_samples": 8.0}
    assert known_numbers(rows, facts, ("fid", "throughput")) is None
    for change in (
        {"num_samples": 9},
        {"policy": {"timesteps": (1.0,)}},
        {"negative_prompt": "blurred"},
        {"machine": "other"},
    ):
        assert known_numbers(rows, facts | change, ("fid",)) is None, change
    assert known_numbers(rows, facts | {"machine": "a GPU"}, ("fid",)) is not None
    assert known_numbers([rows[0] | {"negative_prompt": "blurred"}], facts, ("fid",)) is None


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
    copy_pictures(tmp_path, tmp_path, 10)  # there are none yet
    for name, colour in (("step_00000001", "red"), ("step_00000010", "blue")):
        Image.new("RGB", (2, 2), colour).save(tmp_path / "samples" / f"{name}.png")
    (tmp_path / "samples/step_00000001_mine.png").write_bytes(b"a user's own")
    (tmp_path / "export").mkdir()
    copy_pictures(tmp_path, tmp_path / "export", 9)
    assert Image.open(tmp_path / "export/samples/student.png").getpixel((0, 0)) == (255, 0, 0), "not a later one"
    copy_pictures(tmp_path, tmp_path / "export", 10)
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
