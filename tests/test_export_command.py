"""`fastgen export --form`: folders, refusals, other numbers of steps, and the table of the documentation."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from comfyui_reader import check_graph, parse_sigmas
from exported_students import ROOT
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastgen.backbones.base import RoleOptions
from fastgen.cli import app
from fastgen.config import load_recipe
from fastgen.exporting.forms import export_form
from fastgen.exporting.names import FAMILIES as FAMILIES_OF_FORMS
from fastgen.exporting.names import OTHERWISE, check_form
from fastgen.exporting.steps import with_steps
from fastgen.registry import PIPELINES
from fastgen.run.export import export
from fastgen.train import train


def exported(folder: Path, *overrides: str) -> Path:
    """An export of the digits teacher, which was not trained."""
    recipe = load_recipe(ROOT / "recipes/digits_dmd2_4step.yaml", [f"output_dir={folder}/mine", *overrides])
    backbone = recipe.backbone.build(torch.device("cpu"), torch.float32, 0, RoleOptions(recipe.lora))
    export(backbone.load("student"), backbone, recipe, folder / "export", 0)
    return folder / "export"


ADAPTER = "lora={student: {rank: 2}}"


def test_an_export_is_written_in_another_form_and_replaced_by_the_next(tmp_path: Path) -> None:
    source = exported(tmp_path, ADAPTER)
    folder = export_form(source, "lora")
    names = {path.name for path in folder.iterdir()}
    assert folder == source / "export_lora"
    assert names == {"mine_lora.safetensors", "scheduler", "workflow.json", "README.md", "form.json"}
    assert export_form(source, "lora") == folder
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="holds no student in another form"):
        export_form(source, "lora", tmp_path / "other")
    with pytest.raises(ValueError, match="give the run folder"):
        export_form(source, "fp8")
    with pytest.raises(ValueError, match="leave out --merge"):
        export_form(source, "lora", merge=True)
    with pytest.raises(ValueError, match="neither a run nor an export"):
        export_form(tmp_path, "lora")
    assert not list(source.glob(".*"))


def test_one_adapter_serves_several_numbers_of_steps_where_all_levels_were_trained(tmp_path: Path) -> None:
    overrides = [f"output_dir={tmp_path}/mine", ADAPTER, "objective.grid.count=16"]
    recipe = load_recipe(ROOT / "recipes/digits_consistency_4step.yaml", overrides)
    backbone = recipe.backbone.build(torch.device("cpu"), torch.float32, 0, RoleOptions(recipe.lora))
    export(backbone.load("student"), backbone, recipe, tmp_path / "export", 0)
    folder = export_form(tmp_path / "export", "lora", steps=[2, 8])
    for count in (2, 8):
        nodes = json.loads((folder / f"{count}_steps/workflow.json").read_text())
        check_graph(nodes)
        sigmas = next(node["inputs"]["sigmas"] for node in nodes.values() if node["class_type"] == "ManualSigmas")
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / f"{count}_steps/scheduler")
        scheduler.set_timesteps(count)
        assert parse_sigmas(sigmas) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)
        page = (folder / f"{count}_steps/README.md").read_text()
        assert 'load_lora_weights("path/to/this/folder/.."' in page and f"num_inference_steps={count}" in page
    few = load_recipe(ROOT / "recipes/digits_consistency_4step.yaml", [])
    assert with_steps(few, 2).timesteps == (1.0, 0.5)
    with pytest.raises(ValueError, match=r"8 steps need the level 0\.875"):
        with_steps(few, 8)
    dmd2 = exported(tmp_path / "dmd2", ADAPTER)
    with pytest.raises(ValueError, match="4 steps and no others: dmd2"):
        export_form(dmd2, "lora", steps=[2])


@pytest.mark.parametrize(
    ("name", "form", "overrides", "words"),
    [
        ("mixture_dmd2_4step", "lora", [], "no diffusers pipeline"),
        ("digits_dmd2_4step", "lora", [], "this student is no adapter"),
        ("digits_dmd2_4step", "checkpoint", [], "--form diffusion_model"),
        ("digits_flow_map_4step", "diffusion_model", [], "takes s besides"),
    ],
)
def test_what_has_no_such_form_is_refused_before_weights_load(
    name: str, form: str, overrides: list[str], words: str
) -> None:
    recipe = load_recipe(ROOT / f"recipes/{name}.yaml", overrides)
    with pytest.raises(ValueError, match=words):
        check_form(form, recipe, "student" in recipe.lora)


def test_every_family_has_a_form_or_a_reason() -> None:
    """Of the documented table, each cell: what is refused says why, in words of its own."""
    table = (ROOT / "docs/exporting.md").read_text()
    for form, families in FAMILIES_OF_FORMS.items():
        for family in PIPELINES:
            row = next(line for line in table.splitlines() if line.startswith(f"| `{family}` "))
            cell = row.split("|")[2 + list(FAMILIES_OF_FORMS).index(form)].strip()
            assert cell.startswith("refused") == (family not in families), (family, form, cell)
            if family not in families:
                keys = ((form, family), ("", family), (form, ""))
                assert any(key in OTHERWISE for key in keys), (family, form)


@pytest.mark.slow
def test_a_run_is_exported_in_another_form_by_the_command(tmp_path: Path) -> None:
    """From the last checkpoint of a LoRA run: the adapter alone, and with it in the weights."""
    small = ["train.steps=1", "train.batch_size=2", "train.checkpoint_every=1", "train.sample_every=0"]
    small += ["train.eval_every=0", "objective.fake_updates=1", "health.num_samples=4", "eval.metrics=[throughput]"]
    small += ["eval.quick_num_samples=20", "eval.teacher_steps=[2]", "train.num_samples=4"]
    adapters = "lora={student: {rank: 2}, fake_score: {rank: 2}}"
    recipe = load_recipe(ROOT / "recipes/digits_dmd2_4step.yaml", [*small, adapters, f"output_dir={tmp_path}/run"])
    run = train(recipe)
    for form, key in (("lora", "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"), ("fp8", "pos_embed")):
        result = CliRunner().invoke(app, ["export", str(run), "--form", form, "--output", str(tmp_path / form)])
        assert result.exit_code == 0, result.stderr
        assert key in load_file(tmp_path / form / f"run_{form}.safetensors")
    result = CliRunner().invoke(app, ["export", str(run), "--form", "checkpoint"])
    assert result.exit_code == 2 and "--form diffusion_model" in result.stderr
    result = CliRunner().invoke(app, ["export", str(run), "--steps", "2"])
    assert result.exit_code == 2 and "give --form" in result.stderr
    assert not list(tmp_path.glob(".*"))
