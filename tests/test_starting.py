"""What a first recipe begins with: the schema, and the recipes that ship."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from tiny_flux import tiny_flux
from tiny_z_image import tiny_z_image
from typer.testing import CliRunner

import fastgen
from fastgen.backbones.folder import read_scheduler, recommended_call, shipped_pipelines
from fastgen.backbones.pipeline_config import CONFIGS
from fastgen.cli import app
from fastgen.config import load_recipe
from fastgen.config.schema import recipe_schema, recipe_schema_text
from fastgen.config.text import read_recipe
from fastgen.evaluation.folders import evaluate_path
from fastgen.recipe import EvalConfig
from fastgen.registry import BACKBONES, DATA, OBJECTIVES, REWARDS
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.demo import load_pair
from fastgen.sampling.sampler import recommended_config
from fastgen.starting.facts import Wishes, level_shift, look_at
from fastgen.starting.new import PROMPTED, TEMPLATES, built, first_recipe
from fastgen.starting.shipped import MODELINE, SCHEMA, copy_recipe, is_unverified, recipe_files, summary
from fastgen.starting.values import first_values
from fastgen.train import train

INDEX = "*/*/model_index.json"  # of the pipelines whose configs ship
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def as_an_editor_reads(value: Any) -> Any:
    """1e-4 is a number in YAML 1.2, which editors read, and a text in YAML 1.1."""
    if isinstance(value, dict):
        return {key: as_an_editor_reads(part) for key, part in value.items()}
    if isinstance(value, list):
        return [as_an_editor_reads(part) for part in value]
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


@pytest.fixture(scope="module")
def editor() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(recipe_schema())
    return jsonschema.Draft202012Validator(json.loads(recipe_schema_text()))


def test_the_shipped_schema_is_the_current_one(project: Path) -> None:
    """`fastgen schema --output recipes/recipe.schema.json` writes it again."""
    assert (project / "recipes" / SCHEMA).read_text() == recipe_schema_text()


def test_a_schema_replaces_a_schema_alone(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("output_dir: runs/mine\n")
    done = CliRunner().invoke(app, ["schema", "--output", str(mine)])
    assert done.exit_code == 2 and "exists, and holds no schema" in done.output and "runs/mine" in mine.read_text()
    for _ in range(2):
        assert CliRunner().invoke(app, ["schema", "--output", str(tmp_path / "a.json")]).exit_code == 0


@pytest.mark.slow
def test_every_recipe_names_the_schema_and_fits_it(editor: jsonschema.Draft202012Validator) -> None:
    for file in recipe_files():
        assert f"\n{MODELINE}{SCHEMA}\n" in file.read_text(), file
        errors = [error.message for error in editor.iter_errors(as_an_editor_reads(read_recipe(file, file)))]
        assert not errors, f"{file}: {errors[:3]}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": {"stepz": 3}}, "stepz"),
        ({"objective": {"fake_update": 3}}, "fake_update"),
        ({"backbone": {"means": "near"}}, "near"),
        ({"objective": {"name": "dmd3"}}, "dmd3"),
        ({"seed": -1}, "-1"),
    ],
)
def test_mistakes_are_underlined(
    editor: jsonschema.Draft202012Validator, raw_recipe: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    raw = as_an_editor_reads(copy.deepcopy(raw_recipe))
    assert editor.is_valid(raw)
    for key, value in change.items():
        raw[key] = raw[key] | value if isinstance(value, dict) else value
    assert any(words in error.message for error in editor.iter_errors(raw))


def test_every_name_has_its_keys_and_its_page() -> None:
    found = recipe_schema()["$defs"]
    for section, names in (("backbone", BACKBONES), ("data", DATA), ("objective", OBJECTIVES), ("rewards", REWARDS)):
        for name in names:
            assert found[f"{section}.{name}"]["description"] and not found[f"{section}.{name}"]["additionalProperties"]


def test_recipes_are_listed_and_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in recipe_files():
        assert summary(file.read_text()).endswith("."), file
    listed = CliRunner().invoke(app, ["recipes"], env={"COLUMNS": "200"}).stdout
    assert "mixture_dmd2_4step" in listed
    unverified = next(file for file in recipe_files() if is_unverified(file.read_text()))
    assert "yes" not in next(line for line in listed.splitlines() if unverified.stem in line)
    copied = copy_recipe("mixture_dmd2_4step", None)
    assert copied == Path("mixture_dmd2_4step.yaml") and load_recipe(copied) == load_recipe(
        recipe_files()[0].parent / copied
    )
    assert Path(copied.read_text().partition(MODELINE)[2].splitlines()[0]).is_file()
    with pytest.raises(ValueError, match="exists"):
        copy_recipe("mixture_dmd2_4step", None)
    with pytest.raises(ValueError, match="did you mean 'sdxl_dmd2_4step'"):
        copy_recipe("sdxl_dmd_4step", None)


def test_what_is_asked_for_is_what_is_written_or_refused(tmp_path: Path) -> None:
    command = ["new", "assets/teachers/digits", "--interactive", "--output", str(tmp_path / "r.yaml")]
    done = CliRunner().invoke(app, command, input="2\ndmd3\n\n1\n")
    assert done.exit_code == 2 and "objective dmd3" in done.output and not (tmp_path / "r.yaml").exists()


def test_the_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"fastgen {fastgen.__version__}\n"


@pytest.mark.parametrize("pipeline", ["assets/teachers/digits", "stable-diffusion-v1-5/stable-diffusion-v1-5"])
def test_every_method_has_a_first_recipe_of_small_and_of_large_networks(pipeline: str) -> None:
    """Checked as a recipe, at 4 steps and at 1."""
    facts = look_at(pipeline)
    assert facts.large == (pipeline != "assets/teachers/digits")
    for objective in PROMPTED:
        values = first_values(Wishes(pipeline, objective=objective), facts)
        if facts.large and objective == "rtdmd":  # whose steps no stock scheduler of this family can store
            with pytest.raises(ValueError, match="transition: cps cannot be stored"):
                built(values)
        else:
            built(values)
    for objective in () if facts.large else TEMPLATES:  # pictures need the size of a pipeline whose files are there
        built(first_values(Wishes(pipeline, objective=objective, images="assets/first_frames"), facts))
    for objective in ("dmd2", "phased_dmd"):
        built(first_values(Wishes(pipeline, steps=1, objective=objective), facts))


def write_new(pipeline: str, **wishes: Any) -> dict[str, Any]:
    """What `fastgen new` writes, read again; its text fits the schema."""
    text, _ = first_recipe(Wishes(pipeline, **wishes))
    return yaml.safe_load(text)


def test_a_new_recipe_of_a_small_pipeline(editor: jsonschema.Draft202012Validator, project: Path) -> None:
    """The pipeline's card gives guidance and steps, its folder prompts.txt, and the recipe of the same objective the
    rest."""
    raw = write_new("assets/teachers/digits")
    assert not list(editor.iter_errors(as_an_editor_reads(raw)))
    assert raw["rollout"]["timesteps"] == [1.0, 0.75, 0.5, 0.25] and raw["objective"]["guidance_scale"] == 1.0
    assert raw["data"] == {"name": "prompts", "prompts": "assets/teachers/digits/prompts.txt"}
    assert raw["eval"]["teacher_steps"] == [50, 4] and raw["eval"]["reference"] == "teacher"
    tuned = yaml.safe_load((project / "recipes/digits_dmd2_4step.yaml").read_text())
    assert raw["optimizers"] == tuned["optimizers"] and raw["train"] == tuned["train"]
    phased = write_new("assets/teachers/digits", objective="phased_dmd", steps=2, prompts="neutral", guidance=3.0)
    assert phased["objective"]["guidance_scale"] == phased["eval"]["teacher_guidance_scale"] == 3.0
    assert [p["last"] for p in phased["objective"]["phases"]] == [1, 2]
    assert sum(p["updates"] for p in phased["objective"]["phases"]) == phased["train"]["steps"]


@pytest.mark.slow
def test_a_shipped_teacher_is_found_from_any_folder_and_the_help_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["new", "--help"], env={"COLUMNS": "300"}).stdout
    for name in ("assets/emoji/teacher", "assets/teachers/digits"):
        assert name in shipped_pipelines() and name in shown
    done = CliRunner().invoke(app, ["new", "assets/emoji/teacher"])
    assert done.exit_code == 0 and load_recipe("recipe.yaml").eval.prompts == "assets/emoji/prompts.txt"
    assert "fastgen sample runs/emoji_teacher_dmd2_4step --prompt 'hash key, 3d'" in done.stdout
    scored = CliRunner().invoke(app, ["score", "assets/first_frames", "--metrics", "jpeg_size"])
    assert scored.exit_code == 0 and Path("scores.json").is_file(), scored.output


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ("parameters: {guidance_scale: 2.5, height: 32}", {"guidance_scale": 2.5, "height": 32}),
        ("parameters: {num_inference_steps: 30}", {"num_inference_steps": 30}),
        ("parameters: [guidance_scale]", {}),
        ("parameters: {guidance_scale: high, num_frames: true, height: 0}", {}),
        ("parameters: {guidance_scale: 0, num_inference_steps: 0}", {"guidance_scale": 0}),
        ("true", {}),
    ],
)
def test_a_card_recommends_numbers(metadata: str, found: dict[str, float], tmp_path: Path) -> None:
    inference = metadata if metadata == "true" else f"{{{metadata}}}"
    (tmp_path / "README.md").write_text(f"---\ninference: {inference}\n---\n# Mine\n")
    assert recommended_call(tmp_path) == found


@pytest.mark.parametrize(
    ("make", "number", "guidance", "told"),
    [(tiny_flux, 2.5, 1, 2.5), (tiny_flux, 3.5, 1, None), (tiny_z_image, 4, 5, None), (tiny_z_image, 0, 1, None)],
)
def test_the_guidance_of_a_card_is_what_it_does_in_the_stock_call(
    make: Callable[[Path], Path], number: float, guidance: float, told: float | None, tmp_path: Path
) -> None:
    """FLUX.1 dev is told it and called once a step; Z-Image counts it from 0."""
    folder = make(tmp_path / "mine")
    (folder / "README.md").write_text(f"---\ninference: {{parameters: {{guidance_scale: {number}}}}}\n---\n")
    facts = look_at(str(folder))
    assert facts.guidance == guidance
    values = first_values(Wishes(str(folder)), facts)
    assert values["objective"]["guidance_scale"] == values["eval"]["teacher_guidance_scale"] == guidance
    roles = dict.fromkeys(("student", "teacher", "fake_score"), told)
    assert values["backbone"].get("guidance") == (None if told is None else roles)
    pair = load_pair(folder)
    assert pair.guidance == guidance and pair.student.network_evaluations % (1 if guidance == 1 else 2) == 0
    assert pair.backbone.guidance_told("teacher") == (told or (3.5 if make is tiny_flux else None))


@pytest.mark.parametrize("pipeline", sorted(str(p.parent.relative_to(CONFIGS)) for p in CONFIGS.glob(INDEX)))
def test_a_first_student_has_any_number_of_steps(pipeline: str) -> None:
    """Its levels can be stored, whatever the family's scheduler rounds or cannot shift."""
    config = recommended_config(CONFIGS / pipeline)[0]
    shift = level_shift(read_scheduler(CONFIGS / pipeline))
    for steps in range(1, 9):
        for transition in ("renoise",) if config.name == "sana_sprint" else ("renoise", "ode"):
            levels = config.even_levels(steps, shift, transition)
            config.check_export(RolloutPolicy(levels, transition if steps > 1 else "renoise"))
            near = [shift * u / (1 + (shift - 1) * u) for u in (1 - i / steps for i in range(steps))]
            apart = 1 if config.name == "sana_sprint" else 0.01
            assert levels == pytest.approx(near, abs=apart) and len(set(levels)) == steps


@pytest.mark.slow
def test_the_card_of_a_pipeline_recommends_a_call(tmp_path: Path, project: Path) -> None:
    folder = shutil.copytree(project / "assets/teachers/digits", tmp_path / "mine")
    for metadata, found in (
        ("inference: {parameters: {guidance_scale: 2.5, num_inference_steps: 30}}", (30, 2.5, True)),
        ("inference: true", (28, 7.0, False)),
    ):
        (folder / "README.md").write_text(f"---\n{metadata}\n---\n# Mine\n")
        facts = look_at(str(folder))
        assert (facts.steps, facts.guidance, facts.recommended) == found
    text, _ = first_recipe(Wishes(str(folder)))
    assert "the pipeline's own call; the other" in text
    assert "the pipeline's own card; the other" in first_recipe(Wishes("assets/teachers/moving_digits"))[0]


def test_a_size_of_a_card_that_does_not_fit_is_refused(tmp_path: Path, project: Path) -> None:
    folder = shutil.copytree(project / "assets/teachers/moving_digits", tmp_path / "mine")
    (folder / "README.md").write_text("---\ninference: {parameters: {height: 33}}\n---\n# Mine\n")
    with pytest.raises(ValueError, match=r"README\.md: inference\.parameters: height 33 does not fit: .* of 16"):
        look_at(str(folder))


def test_a_card_says_the_size_of_its_videos() -> None:
    """Without it, the recipe of a tiny Wan would have Wan's 480 x 832 pixels."""
    values = first_values(Wishes("assets/teachers/moving_digits"), look_at("assets/teachers/moving_digits"))
    sizes = {"height": 32, "width": 32, "num_frames": 25, "max_sequence_length": 16}
    assert values["backbone"] == {"name": "wan", "path": "assets/teachers/moving_digits", **sizes}
    assert values["data"]["prompts"] == values["eval"]["prompts"] == "assets/moving_digits_prompts.txt"
    assert values["objective"]["guidance_scale"] == 4 and values["eval"]["teacher_steps"] == [25, 4]
    assert not look_at("assets/teachers/digits").settings, "a pipeline without such a key has none"


@pytest.mark.slow
def test_what_is_measured_fits_the_prompts() -> None:
    """Those of the emoji are all different, so that no two samples have the same."""
    raw = write_new("assets/emoji/teacher")
    assert raw["objective"]["guidance_scale"] == raw["eval"]["teacher_guidance_scale"] == 2.0
    assert raw["eval"]["metrics"] == ["fid", "precision_recall", "throughput"]
    assert raw["output_dir"] == "runs/emoji_teacher_dmd2_4step"
    assert write_new("assets/teachers/digits")["eval"]["metrics"] == ["fid", "diversity", "throughput"]
    with pytest.raises(
        ValueError, match="diversity compares samples of one prompt, and the prompts of 1024 samples are"
    ):
        built(raw | {"eval": raw["eval"] | {"metrics": ["fid", "diversity"], "quick_num_samples": 1024}})
    config = EvalConfig(metrics=("diversity",), num_samples=3, reference="teacher")
    config.check_repeats(["a", "b", "a"])
    config.check_repeats(["a", "b"])  # the third sample has the first prompt again
    with pytest.raises(ValueError, match="the prompts of 3 samples are all different"):
        config.check_repeats(["a", "b", "c", "d"])


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"objective": "dmd3"}, "writes recipes for dmd2"),
        ({"objective": "consistency"}, "give --images FOLDER"),
        ({"prompts": "nowhere.txt"}, "no prompt file at nowhere.txt"),
        ({"pipeline": "org/unknown"}, "do not ship with fastgen"),
        ({"pipeline": "assets/teachers/emoji"}, "with fastgen ship assets/emoji/teacher, assets/teachers/digits, "),
        ({"pipeline": "assets"}, "not a diffusers pipeline"),
        ({"scorers": {"clip_score": {"path": "nowhere"}}}, "clip"),
    ],
)
def test_a_new_recipe_is_refused_in_words(wishes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        first_recipe(Wishes(**{"pipeline": "assets/teachers/digits"} | wishes))


@pytest.mark.slow
def test_a_new_recipe_trains_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From an empty folder: new, train, eval, with nothing edited but the number of updates and samples."""
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["new", "assets/teachers/digits", "--steps", "2"])
    assert done.exit_code == 0, done.output
    refused = CliRunner().invoke(app, ["new", "assets/teachers/digits"])
    assert refused.exit_code == 2  # recipe.yaml is there
    few = ["train.steps=2", "train.batch_size=4", "eval.num_samples=16", "eval.quick_num_samples=16"]
    run = train(load_recipe("recipe.yaml", [*few, "eval.teacher_steps=[2]", "train.num_samples=4"]))
    metrics = evaluate_path(run, progress=False)["metrics"]
    assert {"fid", "diversity", "images_per_second"} <= metrics.keys()
    card = (run / "export/README.md").read_text()
    assert "teacher, 2 steps" in card


@pytest.mark.slow
def test_a_new_recipe_of_a_large_pipeline_fits() -> None:
    """Adapters in bfloat16, in the largest batch that fits by the plan; configs of the hub id ship with fastgen."""
    source = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    text, found = first_recipe(Wishes(source, memory=24, gpus=8, objective="phased_dmd"))
    raw = yaml.safe_load(text)
    train = raw["train"]
    assert raw["lora"].keys() == {"student", "fake_score"} and train["mixed_precision"] == "bf16"
    assert train["batch_size"] * train["accumulate"] == 8 and found.peak <= 0.95 * 24e9
    assert found.recipe.train.batch_size == train["batch_size"]
    assert f"{8 * train['batch_size'] * train['accumulate']} samples an update, on 8 GPUs" in text
    assert sum(phase["updates"] for phase in raw["objective"]["phases"]) == train["steps"] == 5000


@pytest.mark.slow
def test_a_new_recipe_says_when_nothing_makes_it_fit() -> None:
    """Of a small pipeline, too: the memory that is given is never ignored."""
    with pytest.raises(ValueError, match="with every change that saves memory it takes"):
        first_recipe(Wishes("assets/teachers/digits", memory=1.06))
