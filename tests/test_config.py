"""Recipes: what is refused, in which words, and what comes back from a dump."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from fastgen.cli import app
from fastgen.config import build_recipe, load_recipe
from fastgen.config.stored import MUTABLE_KEYS, changed_keys, dump_recipe
from fastgen.objectives import DMD2
from fastgen.registry import RecipeError


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "key", "spelling"),
    [
        ("trian.steps=3", "trian", "train"),
        ("sed=3", "sed", "seed"),
        ("objective.guidance_scal=3", "objective.guidance_scal", "guidance_scale"),
        ("train.stps=3", "train.stps", "steps"),
        ("optimizers.student.lrr=1", "optimizers.student.lrr", "lr"),
        ("optimizers.fake_score.beta=1", "optimizers.fake_score.beta", "betas"),
        ("objective.renoise_time.lo=0.1", "objective.renoise_time.lo", "low"),
        ("rollout.timestep=[1]", "rollout.timestep", "timesteps"),
        ("backbone.mean=[[1]]", "backbone.mean", "means"),
        ("data.nam=mixture", "data.nam", "name"),
        ("eval.metric=[fid]", "eval.metric", "metrics"),
    ],
)
def test_an_unknown_key_is_refused_with_its_path_and_nearest_spelling(
    mixture_recipe: Path, override: str, key: str, spelling: str
) -> None:
    message = refusal(mixture_recipe, override)
    print(message)
    assert f"unknown key {key}" in message and f"'{spelling}'" in message


def test_an_unknown_key_like_nothing_known_lists_what_is(mixture_recipe: Path) -> None:
    message = refusal(mixture_recipe, "train.zzzz=1")
    assert "train.zzzz" in message and "batch_size" in message and "steps" in message


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("train.steps=abc", "train.steps", "'abc'"),
        ("train.steps=1.5", "train.steps", "1.5"),
        ("train.steps=", "train.steps", "None"),
        ("train.steps=0", "train.steps", "greater than or equal to 1"),
        ("train.batch_size=0", "train.batch_size", "greater than or equal to 1"),
        ("train.ema_decay=1", "train.ema_decay", "less than 1"),
        ("train.dtype=float16", "train.dtype", "'float32'"),
        ("train=3", "train", "'3'"),
        ("seed=-1", "seed", "-1"),
        ("objective.guidance_scale=-1", "objective.guidance_scale", "greater than or equal to 0"),
        ("objective.guidance_scale=.nan", "objective.guidance_scale", "finite"),
        ("objective.guidance_scale=.inf", "objective.guidance_scale", "finite"),
        ("objective.guidance_interval=[0.5, 0.2]", "objective.guidance_interval", "low < high"),
        ("objective.renoise_time.low=0.99", "objective.renoise_time", "below high"),
        ("objective.renoise_time.shift=0", "objective.renoise_time.shift", "greater than 0"),
        ("objective.fake_space=eps", "objective.fake_space", "'epsilon'"),
        ("rollout.timesteps=[1.0, 0.5, 0.5]", "rollout.timesteps", "strictly decreasing"),
        ("rollout.timesteps=[1.2, 0.5]", "rollout.timesteps", "(0, 1]"),
        ("rollout.timesteps=[1.0, 0.0]", "rollout.timesteps", "(0, 1]"),
        ("rollout.timesteps=[]", "rollout.timesteps", "at least 1"),
        ("rollout.timesteps=[1.0, x]", "rollout.timesteps.1", "'x'"),
        ("rollout.conditioning_time=0.4", "rollout", "one-step"),
        ("rollout.transition=euler", "rollout.transition", "'renoise'"),
        ("optimizers.student.lr=-1e-5", "optimizers.student.lr", "greater than 0"),
        ("optimizers.student.lr=fast", "optimizers.student.lr", "'fast'"),
        ("optimizers.student.betas=[1.5, 0.9]", "optimizers.student.betas.0", "less than 1"),
        ("optimizers.student.decay=linaer", "optimizers.student.decay", "'linear'"),
        ("backbone.stds=[1, 1, 1, 1, 1, 1, 1, -1]", "backbone", "stds"),
        ("backbone.weights=[1, 2]", "backbone", "weights has 2 entries but means has 8"),
        ("eval.metrics=[energy_distanc]", "eval.metrics", "'energy_distance'"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path_and_what_is_allowed(
    mixture_recipe: Path, override: str, key: str, words: str
) -> None:
    message = refusal(mixture_recipe, override)
    print(message)
    assert any(line.startswith(f"{key}:") for line in message.splitlines()) and words in message


@pytest.mark.parametrize(
    "override", ["train.steps=true", "optimizers.student.lr=yes", "objective.guidance_scale=true"]
)
def test_true_is_no_number(mixture_recipe: Path, override: str) -> None:
    """YAML reads `yes` and `true` as booleans; a learning rate of 1 would be the consequence."""
    assert refusal(mixture_recipe, override).startswith(override.partition("=")[0])


def test_a_key_given_twice_is_refused(mixture_recipe: Path, tmp_path: Path) -> None:
    """YAML itself lets the last one win, without a word."""
    twice = tmp_path / "twice.yaml"
    twice.write_text(mixture_recipe.read_text() + "\nseed: 1\nseed: 2\n")
    with pytest.raises(RecipeError, match="the key 'seed' is given twice"):
        load_recipe(twice)


@pytest.mark.parametrize(
    ("override", "section", "spelling"),
    [
        ("backbone.name=gausian_mixture", "backbone", "gaussian_mixture"),
        ("objective.name=dmd", "objective", "dmd2"),
        ("data.name=mixtur", "data", "mixture"),
        ("data.name=q", "data", "ar1_video, digit_views, digits, hub, images, mixture, moving_digits, prepared"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(
    mixture_recipe: Path, override: str, section: str, spelling: str
) -> None:
    message = refusal(mixture_recipe, override)
    assert message.startswith(f"{section}.name: unknown name") and spelling in message


@pytest.mark.parametrize("section", ["backbone", "objective", "data"])
def test_a_section_without_a_name_is_refused(mixture_recipe: Path, raw_recipe: dict[str, Any], section: str) -> None:
    assert f"{section} must be a section with a name" in refusal(mixture_recipe, f"{section}=null")
    del raw_recipe[section]
    with pytest.raises(RecipeError, match=f"missing key {section}"):
        build_recipe(raw_recipe)


@pytest.mark.parametrize(
    "key", ["output_dir", "rollout", "train", "eval", "optimizers", "train.steps", "rollout.timesteps"]
)
def test_a_missing_key_is_refused_by_path(raw_recipe: dict[str, Any], key: str) -> None:
    *parents, last = key.split(".")
    node = raw_recipe
    for part in parents:
        node = node[part]
    del node[last]
    with pytest.raises(RecipeError, match=rf"^{key}: Field required"):
        build_recipe(raw_recipe)


def test_optimizers_are_those_of_the_trained_roles(mixture_recipe: Path, raw_recipe: dict[str, Any]) -> None:
    """A missing one, one for a role that is not trained, and a misspelt role."""
    del raw_recipe["optimizers"]["fake_score"]
    with pytest.raises(RecipeError, match=r"missing key optimizers\.fake_score"):
        build_recipe(raw_recipe)
    assert "missing key optimizers.discriminator" in refusal(mixture_recipe, "objective.gan_weight=0.1")
    untrained = refusal(mixture_recipe, "optimizers.discriminator={lr: 1e-3}")
    assert untrained.startswith("optimizers.discriminator:") and "student, fake_score" in untrained
    assert "did you mean 'fake_score'" in refusal(mixture_recipe, "optimizers.fake_scor={lr: 1e-3}")


GAN = ("objective.gan_weight=0.1", "optimizers.discriminator={lr: 1e-3}")


def test_a_gan_needs_real_data(mixture_recipe: Path) -> None:
    """Prompts alone do not do; the mixture's exact samples do."""
    message = refusal(mixture_recipe, *GAN, "data={name: prompts, prompts: ['']}")
    assert "objective dmd2 needs latents" in message and "data prompts" in message
    assert load_recipe(mixture_recipe, GAN).objective.needs == {"latents"}


def test_mixture_data_needs_the_mixture(mixture_recipe: Path, tmp_path: Path) -> None:
    """The backbone here is a folder with an index and no weights: checks read no more than that."""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    message = refusal(mixture_recipe, f"backbone={{name: sd3, path: {tmp_path}}}")
    assert "data: mixture data needs the gaussian_mixture backbone, not sd3" in message.splitlines()


def test_files_that_are_not_there_are_refused(mixture_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for override, start, words in (
        (f"backbone={{name: sd3, path: {tmp_path / 'empty'}}}", "backbone: path", "model_index.json"),
        (f"backbone={{name: sd3, path: {tmp_path / 'none'}}}", "backbone: path", "neither a folder nor a hub id"),
        (f"data={{name: prompts, prompts: {tmp_path / 'none.txt'}}}", "data:", "none.txt"),
        ("data={name: prompts, prompts: []}", "data:", "no prompts"),
        (f"data={{name: images, folder: {tmp_path / 'none'}}}", "data:", "none"),
        (f"data={{name: images, folder: {tmp_path / 'empty'}}}", "data:", "empty"),
    ):
        message = refusal(mixture_recipe, override)
        assert any(line.startswith(start) and words in line for line in message.splitlines()), message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps", "'train.steps' is not an override; write dotted.key=value"),
        ("--steps=3", "unknown key --steps"),
        ("=3", "is not an override"),
        ("train..steps=3", "is not an override"),
        ("train.steps.more=3", "cannot set train.steps.more: train.steps is not a section"),
        ("train.steps=[", "the value of train.steps is not valid YAML"),
    ],
)
def test_a_malformed_override_is_refused(mixture_recipe: Path, override: str, words: str) -> None:
    assert words in refusal(mixture_recipe, override)


def test_files_that_are_no_recipes_are_refused(tmp_path: Path) -> None:
    for name, content, words in (
        ("list.yaml", "[1, 2]", "mapping of sections, got list"),
        ("empty.yaml", "", "mapping of sections, got NoneType"),
        ("broken.yaml", "a: [", "not valid YAML"),
    ):
        (tmp_path / name).write_text(content)
        assert words in refusal(tmp_path / name)
    assert "no recipe at" in refusal(tmp_path / "none.yaml")
    assert str(tmp_path) in refusal(tmp_path)


def test_numbers_that_yaml_reads_as_strings_work(mixture_recipe: Path) -> None:
    """YAML 1.1 reads 1e-5 as a string; it is a learning rate all the same."""
    assert yaml.safe_load("1e-5") == "1e-5"
    recipe = load_recipe(mixture_recipe, ["optimizers.student.lr=1e-5", "objective.normaliser_floor=1e-4"])
    assert recipe.optimizers["student"].lr == 1e-5 and recipe.objective.normaliser_floor == 1e-4


def test_overrides_are_yaml_values(mixture_recipe: Path) -> None:
    """Numbers, lists of lists, sections, null, and a section's key that the file does not have."""
    recipe = load_recipe(
        mixture_recipe,
        [
            "backbone.means=[[0,0],[3,1]]",
            "backbone.stds=[[0.5,1],[1,0.2]]",
            "backbone.weights=null",
            "train.steps=7",
            "objective.renoise_time.law=logit_normal",
            "optimizers.fake_score={lr: 0.5}",
            "rollout={timesteps: [1, 0.5], transition: ode}",
        ],
    )
    assert recipe.backbone.means == ((0, 0), (3, 1)) and recipe.backbone.stds == ((0.5, 1), (1, 0.2))
    assert recipe.backbone.weights is None and recipe.train.steps == 7
    assert recipe.objective.renoise_time.law == "logit_normal" and recipe.objective.renoise_time.low == 0.02
    assert recipe.optimizers["fake_score"].lr == 0.5 and recipe.optimizers["fake_score"].betas == (0.9, 0.999)
    assert recipe.rollout.timesteps == (1.0, 0.5) and recipe.rollout.transition == "ode"


def test_later_overrides_win_and_the_file_is_not_written(mixture_recipe: Path) -> None:
    before = mixture_recipe.read_bytes()
    assert load_recipe(mixture_recipe, ["seed=1", "seed=2"]).seed == 2
    assert mixture_recipe.read_bytes() == before


@pytest.mark.parametrize("overrides", [(), GAN, ("objective.fake_space=null", "eval.teacher_steps=[4, 2]", "seed=3")])
def test_a_dumped_recipe_loads_equal(mixture_recipe: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """With every default filled in; dumping again gives the same text."""
    recipe = load_recipe(mixture_recipe, overrides)
    text = dump_recipe(recipe)
    (tmp_path / "recipe.yaml").write_text(text)
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == recipe and dump_recipe(again) == text
    assert "normaliser_floor: 1.0e-06" in text
    assert changed_keys(recipe, again) == []


def test_changed_keys_are_named(mixture_recipe: Path) -> None:
    """Dotted, in order; keys that a continued run may change are not among them."""
    before = load_recipe(mixture_recipe)

    def changed(*overrides: str) -> list[str]:
        return changed_keys(before, load_recipe(mixture_recipe, overrides))

    assert changed("train.steps=9", "train.log_every=3", "output_dir=elsewhere", "eval.num_samples=5") == []
    assert changed("seed=1") == ["seed"]
    assert changed("optimizers.student.lr=1", "train.steps=9", "train.ema_decay=0.5") == [
        "optimizers.student.lr",
        "train.ema_decay",
    ]
    assert changed("objective.renoise_time.low=0.1") == ["objective.renoise_time.low"]
    assert changed("rollout.timesteps=[1.0, 0.5]") == ["rollout.timesteps"]
    added = changed(*GAN)
    assert "objective.gan_weight" in added and "optimizers.discriminator.lr" in added
    assert "train.steps" in MUTABLE_KEYS and "train.ema_decay" not in MUTABLE_KEYS


@pytest.mark.parametrize(
    "name", ["no_such_module:X", "fastgen.objectives.dmd2:NoSuch", ":X", "..relative:X", "os:path"]
)
def test_an_out_of_tree_name_that_cannot_be_used_is_refused(mixture_recipe: Path, name: str) -> None:
    message = refusal(mixture_recipe, f"objective.name={name}")
    assert message.startswith("objective.name:") and name in message


MODULE = """
from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from fastgen.data import MixtureData
from fastgen.objectives import DMD2


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Mine(DMD2):
    name: Literal["mine"] = "mine"
    extra: float = 2.0


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class MyData(MixtureData):
    name: Literal["my_data"] = "my_data"
"""


def test_out_of_tree_classes_are_configured_like_ours(
    mixture_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """my_module:MyObjective from the import path: its fields are its keys, its errors read the same, and the dumped
    recipe finds it again; a data source likewise."""
    (tmp_path / "out_of_tree_example.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    mine = "objective.name=out_of_tree_example:Mine"
    recipe = load_recipe(mixture_recipe, [mine, "objective.extra=3", "data.name=out_of_tree_example:MyData"])
    assert isinstance(recipe.objective, DMD2) and vars(recipe.objective)["extra"] == 3
    assert recipe.objective.fake_updates == 4
    assert "unknown key objective.extr; did you mean 'extra'?" in refusal(mixture_recipe, mine, "objective.extr=3")
    assert refusal(mixture_recipe, mine, "objective.extra=x").startswith("objective.extra:")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    again = load_recipe(tmp_path / "recipe.yaml")
    assert (
        again == recipe and type(again.objective) is type(recipe.objective) and type(again.data) is type(recipe.data)
    )


def test_every_error_of_a_section_is_reported_at_once(mixture_recipe: Path) -> None:
    lines = refusal(mixture_recipe, "train.steps=abc", "train.batch_size=0", "seed=x").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["train.steps", "train.batch_size", "seed"]


def weightless(folder: Path) -> Path:
    """A recipe that passes every check, whose backbone is on the hub, which tests do not reach: had a program gone on
    to load it, its error would be another than a refused key."""
    (folder / "recipe.yaml").write_text(
        textwrap.dedent(f"""
        output_dir: {folder / "run"}
        backbone: {{name: sd3, path: nobody/nothing}}
        rollout: {{timesteps: [1.0]}}
        data: {{name: prompts, prompts: [a]}}
        objective: {{name: dmd2}}
        optimizers: {{student: {{lr: 1e-5}}, fake_score: {{lr: 1e-5}}}}
        train: {{steps: 1, batch_size: 1}}
        eval: {{metrics: [throughput], prompts: [a]}}
        """)
    )
    load_recipe(folder / "recipe.yaml")
    return folder / "recipe.yaml"


REFUSED = "refused: unknown key train.stps; did you mean 'steps'?"


def test_the_program_refuses_before_any_weight_loads(project: Path, tmp_path: Path) -> None:
    """`python fastgen/train.py` exits with code 2 and the message on stderr, without a traceback, and writes nothing.

    It is run by its path, from another folder and isolated from PYTHONPATH: with -E the package is found by the
    program's own path alone, or as it is installed."""
    command = [sys.executable, "-E", str(project / "fastgen/train.py"), str(weightless(tmp_path)), "train.stps=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    print(done.stderr)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip().splitlines()[-1] == REFUSED
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_command_line_refuses_alike(tmp_path: Path) -> None:
    """`fastgen train`, in this process."""
    result = CliRunner().invoke(app, ["train", str(weightless(tmp_path)), "train.stps=3"])
    assert result.exit_code == 2 and result.stderr.strip() == REFUSED
    assert not (tmp_path / "run").exists()
