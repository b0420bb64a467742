"""The wheel carries what the installed program needs: it trains the digits recipe where there is no checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fastgen.config import load_recipe
from fastgen.registry import RecipeError, shipped

SHIPPED = "recipes/digits_dmd2_4step.yaml"
COMMANDS = ("train", "plan", "prepare", "sample", "eval", "score", "export")
HEAVY = ("torch", "pydantic", "transformers", "diffusers", "accelerate", "peft", "numpy")


def call(*arguments: object, cwd: Path, **environment: str) -> str:
    """What a command prints on standard output; fails with all that it printed unless its exit code is 0."""
    done = subprocess.run(
        [str(a) for a in arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=project)
    (built,) = folder.glob("*.whl")
    return built


def files_under(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_wheel_holds_the_package_and_what_ships_with_it_and_nothing_else(wheel: Path, project: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        described = {name.partition(".dist-info/")[2] for name in archive.namelist()} - {""}
    package = {f"fastgen/{name}" for name in files_under(project / "fastgen") if "__pycache__" not in name}
    weights = {
        f"fastgen/assets/{kind}/{name}"
        for kind in ("teachers", "classifiers", "digits", "emoji", "first_frames", "tones")
        for name in files_under(project / "assets" / kind)
    }
    recipes = {
        f"fastgen/recipes/{path.name}" for path in (project / "recipes").iterdir() if path.suffix in (".yaml", ".json")
    }
    assert held == package | weights | recipes | {
        f"fastgen/assets/{world}_prompts.txt" for world in ("moving_digits", "digit_views")
    }
    assert {
        "fastgen/backbones/configs/stabilityai/stable-diffusion-xl-base-1.0/unet/config.json",
        "fastgen/data/neutral.txt",
        "fastgen/ops/block_sparse_attention/configs.json",
        "fastgen/assets/classifiers/digits.safetensors",
        "fastgen/assets/teachers/digits/transformer/diffusion_pytorch_model.safetensors",
        f"fastgen/{SHIPPED}",
    } <= held
    assert "licenses/LICENSE" in described


def test_a_recipe_that_ships_is_found_from_any_folder_unless_the_user_has_one_there(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped(SHIPPED) == project / SHIPPED
    assert load_recipe(SHIPPED).train.steps == 200
    load_recipe("recipes/moving_digits_teacher_forcing.yaml")  # whose teacher and file of prompts ship with it
    with pytest.raises(RecipeError, match=r"^no recipe at recipes/nowhere\.yaml$"):
        load_recipe("recipes/nowhere.yaml")

    own = tmp_path / SHIPPED
    own.parent.mkdir()
    own.write_text((project / SHIPPED).read_text().replace("steps: 200", "steps: 7"))
    assert load_recipe(SHIPPED).train.steps == 7


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_heavy(command: str, tmp_path: Path) -> None:
    code = f"""
import sys
from fastgen.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code
print("loaded:", *sorted({set(HEAVY)!r} & set(sys.modules)))
"""
    printed = call(sys.executable, "-c", code, *command.split(), "--help", cwd=tmp_path)
    assert "Usage:" in printed
    assert printed.splitlines()[-1] == "loaded:"


@pytest.mark.slow
def test_the_installed_wheel_trains_the_digits_recipe_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", installed]
    call(*pip, wheel, cwd=tmp_path)
    python = {"PYTHONPATH": str(installed)}  # before the checkout, which the development install adds
    where = call(sys.executable, "-c", "import fastgen; print(fastgen.__file__)", cwd=empty, **python)
    assert Path(where.strip()).is_relative_to(installed)

    overrides = [
        "train.steps=2",
        "train.batch_size=8",
        "train.eval_every=0",
        "train.sample_every=0",
        "health.every=0",
        "eval.num_samples=32",
        "eval.quick_num_samples=32",
        "eval.teacher_steps=[4]",
        "output_dir=run",
    ]
    call(sys.executable, "-m", "fastgen", "train", SHIPPED, *overrides, cwd=empty, **python)
    assert (empty / "run/export/model_index.json").is_file()
    assert sorted(path.name for path in empty.iterdir()) == ["run"]
