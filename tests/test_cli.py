"""The command line as scripts use it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import RunFresh
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastgen.cli import app
from fastgen.evaluation.folders import evaluate_path
from fastgen.registry import shipped
from fastgen.sampling.sampler import source_of

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "assets/teachers/digits"
TINY = [
    "backbone.means=[[0,0],[3,1]]",
    "backbone.stds=[0.3,0.2]",
    "backbone.weights=[1,2]",
    "backbone.width=16",
    "backbone.fit_steps=20",
    "train.steps=2",
    "train.batch_size=8",
    "train.sample_every=0",
    "train.eval_every=0",
    "eval.num_samples=64",
    "eval.quick_num_samples=64",
]


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


HELP = """
import sys
from fastgen.cli import app
for command in ([], *([c.name or c.callback.__name__] for c in app.registered_commands)):
    try:
        app([*command, "--help"])
    except SystemExit as end:
        assert end.code == 0
print(*sys.modules, file=sys.stderr)
"""
HEAVY = {"accelerate", "diffusers", "numpy", "peft", "pydantic", "scipy", "torch", "transformers"}


def test_help_imports_nothing_heavy() -> None:
    """That of fastgen and of each of its commands, in a process of its own: why it answers at once."""
    done = subprocess.run([sys.executable, "-c", HELP], check=True, capture_output=True, text=True, cwd=ROOT)
    print(done.stdout)
    assert done.stdout.count("Usage:") == 1 + len(app.registered_commands)
    assert not HEAVY & set(done.stderr.split())


def test_train_eval_sample_export_of_a_mixture(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run("train", ROOT / "recipes/mixture_dmd2_4step.yaml", f"output_dir={folder}", *TINY)[0] == 0
    assert run("eval", folder, "--output", tmp_path / "results.json")[0] == 0
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert metrics["energy_distance"] > metrics["energy_distance_floor"]
    assert run("sample", folder, "--num-images", 50, "--seed", 7, "--output", tmp_path / "points")[0] == 0
    assert load_file(tmp_path / "points/points.safetensors")["points"].shape == (50, 2)
    assert run("export", folder, "--output", tmp_path / "student")[0] == 0
    assert (tmp_path / "student/README.md").is_file()


def test_samples_of_a_pipeline_depend_on_their_seed_alone(tmp_path: Path) -> None:
    common = [
        "sample",
        TEACHER,
        "--prompt",
        "a handwritten six",
        "--num-images",
        3,
        "--num-steps",
        3,
        "--guidance-scale",
        1.5,
    ]
    assert run(*common, "--seed", 4, "--output", tmp_path / "a")[0] == 0
    assert run(*common, "--seed", 5, "--batch-size", 1, "--output", tmp_path / "b")[0] == 0
    first, second = (Image.open(tmp_path / "a/00001.png"), Image.open(tmp_path / "b/00000.png"))
    assert first.size == (32, 32)
    difference = torch.tensor(list(first.tobytes())).sub(torch.tensor(list(second.tobytes()))).abs().max().item()
    assert difference <= 1  # of 255: rounding of batched kernels
    assert (tmp_path / "a/00002.txt").read_text() == "a handwritten six\n"
    assert (tmp_path / "a/grid.png").is_file()
    status, _, error = run(*common, "--output", tmp_path / "a")
    assert status == 2 and "is not an empty folder" in error


def test_a_run_without_an_export_is_told_how_to_get_one(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/recipe.yaml").write_text("eval: {metrics: [throughput], prompts: [a], num_samples: 2}\n")
    for command in (["sample", str(tmp_path / "run"), "--prompt", "a"], ["eval", str(tmp_path / "run")]):
        done = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "out.json")])
        assert done.exit_code == 2 and "is a run without an export" in done.output, done.output
    with pytest.raises(ValueError, match=f"fastgen export {tmp_path / 'run'}"):
        source_of(tmp_path / "run")
    with pytest.raises(ValueError, match="neither a run, an export nor"):
        source_of(tmp_path)
    with pytest.raises(ValueError, match=r"^there is no folder nowhere$"):  # as it was given
        evaluate_path("nowhere")


def test_pipelines_that_ship_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert source_of(Path("assets/emoji/teacher")) == shipped("assets/emoji/teacher")
    options: dict[str, Any] = {"metrics": ("throughput",), "num_samples": 2, "num_steps": 1, "progress": False}
    assert evaluate_path("assets/teachers/digits", **options)["metrics"]["network_evaluations"] == 2  # it is guided


def test_a_folder_of_images_is_evaluated(tmp_path: Path) -> None:
    sample = ["sample", TEACHER, "--prompt", "a five", "--prompt", "the digit two", "--num-images", 4]
    assert run(*sample, "--num-steps", 4, "--guidance-scale", 1.5, "--output", tmp_path / "images")[0] == 0
    output = tmp_path / "results.json"
    assert run("eval", tmp_path / "images", "--metrics", "accuracy,diversity", "--output", output)[0] == 0
    assert json.loads(output.read_text())["metrics"]["accuracy"] >= 0.5
    assert output.with_suffix(".html").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", TEACHER, "--metrics", "fidd"], "fid"),
        (["eval", TEACHER], "--metrics"),
        (["sample", TEACHER, "--output", "nowhere"], "--prompt"),
        (["export", "no/such/run"], "not a run folder"),
        (["train", "no_such_recipe.yaml"], "no recipe at"),
    ],
)
def test_refusals_are_exit_code_2_with_the_message_on_standard_error(arguments: list[object], words: str) -> None:
    status, _, error = run(*arguments)
    assert status == 2
    assert words in error
    assert "Traceback" not in error


SLOW_TO_IMPORT = (
    *("peft", "diffusers", "transformers", "accelerate", "torchvision", "scipy", "sklearn", "pandas", "matplotlib"),
    *("tensorboard", "torchmetrics", "torch.distributed.fsdp", "fastgen.objectives.rtdmd", "fastgen.rewards.clip"),
)
COMMANDS = {  # what answers: the arguments before the recipe, and the program that Python runs
    "fastgen train": (["train"], "from fastgen.cli import main; main()"),
    "fastgen plan": (["plan"], "from fastgen.cli import main; main()"),
    "fastgen prepare": (["prepare", "--output", "nowhere"], "from fastgen.cli import main; main()"),
    "python -m fastgen.train": ([], "import runpy; runpy.run_module('fastgen.train', run_name='__main__')"),
    "fastgen/train.py": ([], f"import runpy; runpy.run_path({str(ROOT / 'fastgen/train.py')!r}, run_name='__main__')"),
}


@pytest.mark.parametrize(
    ("command", "recipe"),
    [("fastgen train", "mixture_dmd2_4step"), *((command, "sdxl_dmd2_4step") for command in COMMANDS)],
)
def test_a_refusal_imports_nothing_heavy(command: str, recipe: str, tmp_path: Path) -> None:
    """A mistake in a recipe is answered before the libraries that take seconds to import, by every command. These
    mistakes need no torch either."""
    before, program = COMMANDS[command]
    arguments = [*before, str(ROOT / "recipes" / f"{recipe}.yaml"), "train.steps=-1", "foo=1"]
    program = (
        f"import sys\nsys.argv = ['command', *{arguments}]\n"
        f"try:\n    {program}\nexcept SystemExit as error:\n    assert error.code == 2, error.code\n"
        f"print(sorted({{'torch', *{SLOW_TO_IMPORT}}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    assert "unknown key foo" in done.stderr and "train.steps" in done.stderr and "Traceback" not in done.stderr


WITHOUT_TORCH = {  # the arguments of fastgen train, and what the refusal says
    "no such file": (["nowhere.yaml"], "no recipe at nowhere.yaml"),
    "no valid YAML": (["torn.yaml"], "torn.yaml is not valid YAML"),
    "no override": (["mixture_dmd2_4step", "steps"], "'steps' is not an override"),
    "unknown section": (["mixture_dmd2_4step", "trian.steps=3"], "unknown key trian; did you mean 'train'?"),
    "unknown key": (["mixture_dmd2_4step", "train.stps=3"], "unknown key train.stps; did you mean 'steps'?"),
    "value out of range": (["sdxl_dmd2_4step", "train.steps=-1"], "train.steps: Input should be greater than"),
    "optimizer": (["sdxl_dmd2_4step", "optimizers.student.lr=0"], "optimizers.student.lr: Input should be greater"),
    "rollout": (["sdxl_dmd2_4step", "rollout.timesteps=[0.5,1]"], "rollout.timesteps: timesteps must be strictly"),
    "adapter": (["sdxl_dmd2_4step", "lora.student.rank=0"], "lora.student.rank: Input should be greater"),
    "metric": (["digits_dmd2_4step", "eval.metrics=[fd]"], "eval.metrics: unknown metric 'fd'; did you mean 'fid'?"),
    "watch": (["mixture_dmd2_4step", "health.every=-1"], "health.every: Input should be greater"),
    "name": (
        ["mixture_dmd2_4step", "objective.name=dmd3"],
        "objective.name: unknown name 'dmd3'; did you mean",
    ),
    "no pipeline": (["digits_dmd2_4step", "backbone.path=/no/where"], "backbone: path: '/no/where' is neither a fol"),
    "no index": (["digits_dmd2_4step", "backbone.path=."], "backbone: path: . is not a diffusers pipeline"),
}


def test_most_mistakes_are_refused_without_torch(tmp_path: Path) -> None:
    """In one process, because none of them imports torch, which takes more seconds than all of them together."""
    (tmp_path / "torn.yaml").write_text("backbone: {name: [")
    commands = [
        ["fastgen", "train", recipe if ".yaml" in recipe else str(ROOT / f"recipes/{recipe}.yaml"), *overrides]
        for (recipe, *overrides), _ in WITHOUT_TORCH.values()
    ]
    program = (
        f"import sys\nfrom fastgen.cli import main\nfor sys.argv in {commands}:\n"
        "    try:\n        main()\n    except SystemExit as error:\n        assert error.code == 2, sys.argv\n"
        "print(sorted({'torch', 'numpy', 'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    refused = [line.removeprefix("refused: ") for line in done.stderr.splitlines() if line.startswith("refused: ")]
    for line, (_, words) in zip(refused, WITHOUT_TORCH.values(), strict=True):
        assert line.startswith(words), (line, words)


def test_a_wrong_argument_is_refused_before_anything_heavy_is_imported(tmp_path: Path, run_fresh: RunFresh) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("the only copy")
    teacher = str(ROOT / "assets/teachers/digits")
    wrong = [
        ["eval", "nowhere"],
        ["eval", teacher, "--metrics", "foo"],
        ["eval", teacher, "--output", "notes.html"],
        ["eval", teacher, "--output", "full/thesis.txt/results.json"],
        ["sample", "nowhere", "--prompt", "a"],
        ["sample", teacher, "--prompt", "a", "--output", "full"],
        ["sample", teacher, "--prompt", "a", "--output", "full/thesis.txt/samples"],
        ["export", "nowhere"],
        ["score", "nowhere", "--metrics", "clip_score"],
        ["score", "full", "--metrics", "clip_score", "--output", "full/thesis.txt"],
    ]
    program = (
        f"import sys\nfrom fastgen.cli import main\nfor arguments in {wrong}:\n"
        "    sys.argv = ['fastgen', *arguments]\n"
        "    try:\n        main()\n    except SystemExit as error:\n        assert error.code == 2, arguments\n"
        f"print(sorted(set({SLOW_TO_IMPORT}) & set(sys.modules)))"
    )
    done = run_fresh(program, tmp_path)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    assert done.stderr.count("refused: ") == len(wrong) and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full/thesis.txt").read_text() == "the only copy"


def test_the_training_programs_help_goes_to_standard_output(tmp_path: Path, run_fresh: RunFresh) -> None:
    path = str(ROOT / "fastgen/train.py")

    def program(*arguments: str) -> str:
        return f"import runpy, sys\nsys.argv = {[path, *arguments]}\nrunpy.run_path({path!r}, run_name='__main__')"

    asked = run_fresh(program("--help"), tmp_path)
    assert (asked.returncode, asked.stderr) == (0, "") and asked.stdout.startswith("usage: train.py RECIPE.yaml")
    missing = run_fresh(program(), tmp_path)
    assert (missing.returncode, missing.stdout) == (2, "") and missing.stderr == asked.stdout
