"""Every code block of README and docs: a recipe loads, Python and commands run, cut short, or the block says why no
test can run it."""

import itertools
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from diffusers import WanPipeline
from doc_blocks import BLOCKS, LANGUAGES, NEEDS, Block, calls_of, of_language
from PIL import Image
from reader import MODULES, make_reader_folder
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastgen.batch import Batch, Conditioning
from fastgen.cli import app
from fastgen.config import build_recipe, load_recipe
from fastgen.networks import Networks
from fastgen.objectives import Loss, Objective
from fastgen.ops.block_sparse_attention import VideoMask, rollout_layout
from fastgen.pipelines.streaming import StreamingWanPipeline
from fastgen.rewards import Composite, Scorer
from fastgen.rewards.linear import Linear
from fastgen.rollout import RolloutPolicy

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def reader_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reader_folder(tmp_path_factory.mktemp("reader"))


@pytest.fixture
def reader(reader_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh folder with what is in the reader's; the test is in it, and imports from it."""
    for path in reader_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    others = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}  # of other tests
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(others)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_names_its_language_and_what_it_needs(block: Block) -> None:
    assert block.language in LANGUAGES
    assert block.needs is None or block.needs in NEEDS


def test_every_fence_is_read() -> None:
    fences = sum((ROOT / page).read_text().count("```") for page in {block.page for block in BLOCKS})
    assert fences == 2 * len(BLOCKS)


# --- recipes


def fragments(text: str) -> Iterator[dict[str, Any]]:
    """The sections of a block. A key that is there several times gives as many fragments, which share the others."""
    found: dict[str, list[Any]] = {}
    for key, value in yaml.compose(text).value:
        found.setdefault(key.value, []).append(yaml.safe_load(yaml.serialize(value)))
    for number in range(max(map(len, found.values()))):
        yield {key: values[min(number, len(values) - 1)] for key, values in found.items()}


@cache
def shipped() -> list[dict[str, Any]]:
    return [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "recipes").glob("*.yaml"))]


def given(backbone: Mapping[str, Any]) -> bool:
    return (backbone.get("sound") or {}).get("given", False)


def base_of(fragment: Mapping[str, Any]) -> dict[str, Any]:
    """The shipped recipe that a fragment is written for: with its backbone (of this path, if there is one) and its
    objective, else dmd2. Chunks and videos are for Wan, sounds and actions for teacher forcing, rewards for rtdmd. A
    whole recipe needs none."""
    if "output_dir" in fragment:
        return {}
    backbone, wanted = fragment.get("backbone", {}), {"backbone": "sd3", "objective": "dmd2"}
    if "chunks" in fragment.get("rollout", {}) or fragment.get("data", {}).get("name") == "videos":
        wanted["backbone"] = "wan"
    if "rewards" in fragment:
        wanted["objective"] = "rtdmd"
    if backbone.keys() & {"sound", "actions"}:
        wanted["objective"] = "teacher_forcing"
    wanted |= {key: fragment[key]["name"] for key in wanted if key in fragment}
    fitting = [raw for raw in shipped() if all(raw[key]["name"] == name for key, name in wanted.items())]
    paths = (backbone.get("path"), "assets/teachers/digits")
    distances = [
        (
            raw["backbone"].get("path") not in paths,
            len(backbone.keys() - raw["backbone"]),
            given(raw["backbone"]) != given(backbone),
            len(fragment.keys() - raw),
        )
        for raw in fitting
    ]
    return {**fitting[distances.index(min(distances))], "init_from": None}


def merged(base: Mapping[str, Any], fragment: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with the sections of a fragment. Its keys come over those of a section that has the same name, or none;
    rewards and adapters, and what has another name, are taken as they are."""
    made = dict(base)
    for section, value in fragment.items():
        old = made.get(section)
        joined = section not in ("rewards", "lora") and isinstance(value, Mapping) and isinstance(old, Mapping)
        made[section] = {**old, **value} if joined and value.get("name") in (None, old.get("name")) else value
    return made


def recipes() -> Iterator[Any]:
    for block in of_language("yaml"):
        for number, fragment in enumerate(fragments(block.code)):
            made_by_a_command = fragment.get("data", {}).get("name") == "prepared"
            marks = [pytest.mark.slow] if made_by_a_command else []
            if block.needs is None:
                yield pytest.param(fragment, marks=marks, id=f"{block}.{number}")


@pytest.mark.parametrize("fragment", recipes())
def test_a_recipe_loads(fragment: dict[str, Any], reader: Path) -> None:
    if (data := fragment.get("data", {})).get("name") == "prepared":
        run("prepare", "recipes/digits_dmd2_4step.yaml", "--output", data["folder"], "data={name: digits}")
    build_recipe(merged(base_of(fragment), fragment))


# --- commands

CUT = [  # added to every training
    "train.steps=1",
    "train.batch_size=4",
    "train.accumulate=1",
    "train.sample_every=0",
    "train.eval_every=0",
    "train.checkpoint_every=1",
    "train.num_samples=1",
    "eval.metrics=[throughput]",
    "eval.num_samples=2",
    "eval.quick_num_samples=2",
    "eval.teacher_steps=[1]",
]
PHASES = ["train.steps=2", "objective.phases=[{first: 0, last: 2, updates: 1}, {first: 2, last: 4, updates: 1}]"]
SHORTER = {"--pairs": "4", "--pair-steps": "2", "--num-images": "1"}  # values of options that would take long
PARSED_ONLY = {"demo", "push"}  # they serve a browser, or write to the hub
NOT_OF_THIS_RUN = {  # options that need another run than the page's test has, and what is said of this one
    "checkpoint": "backbone sd3 has no form checkpoint",
    "--steps": "this student can make 4 steps",
}
RUNS = {  # the runs that a page takes for granted, by the recipes that make them
    "README.md": {"mine": "digits_quickstart"},
    "docs/exporting.md": {"mine": "digits_quickstart"},
    "docs/flow_maps.md": {"digits_flow_map_4step": "digits_flow_map_4step"},
    "docs/streaming.md": {
        "moving_digits_teacher_forcing": "moving_digits_teacher_forcing",
        "mine": "moving_digits_self_forcing_4step",
        "sounding": "tone_digits_teacher_forcing",
        "driven": "driven_digits_teacher_forcing",
    },
    "docs/streaming_methods.md": {"moving_digits_teacher_forcing": "moving_digits_teacher_forcing"},
}


def run(command: str, *arguments: str) -> str:
    """Runs a command of fastgen, cut short, and returns what it printed. Fails if it fails."""
    given = list(arguments)
    for number, argument in enumerate(given[1:], 1):
        given[number] = SHORTER.get(given[number - 1], argument)
    if command == "train":
        fitted = yaml.safe_load(Path(given[0]).read_text())["backbone"]["name"] == "gaussian_mixture"
        given += [*CUT, *["backbone.fit_steps=20"] * fitted, *PHASES * ("phases:" in " ".join(given))]
    result = CliRunner().invoke(app, [command, *given])
    assert result.exit_code == 0, (command, given, result.output, result.exception)
    return result.output


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where finished runs lie, a folder for each recipe."""
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def with_runs(reader: Path, finished: Path) -> Callable[[str], Path]:
    """page -> the reader's folder, with the runs that this page takes for granted."""

    def make(page: str) -> Path:
        for name, recipe in RUNS.get(page, {}).items():
            if not (finished / recipe).is_dir():
                adapter = ["lora={student: {rank: 4}}"] * (recipe == "digits_quickstart")
                run("train", f"recipes/{recipe}.yaml", f"output_dir={finished / recipe}", "init_from=null", *adapter)
            shutil.copytree(finished / recipe, reader / "runs" / name)
        return reader

    return make


def check_options(command: str, *arguments: str) -> None:
    """Reads the arguments as the command would, and does not run it."""
    group: Any = typer.main.get_command(app)
    group.commands[command].make_context(command, list(arguments))


def check_elsewhere(program: str, *arguments: str) -> None:
    """Whether a call of another program names what is there: targets of make, extras of pip, overrides of a recipe."""
    if program == "make":
        assert all(re.search(rf"(?m)^{target}:", (ROOT / "Makefile").read_text()) for target in arguments)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert {name for text in arguments for name in re.findall(r"\[(\w+)\]", text)} <= extras.keys()
    elif "fastgen/train.py" in arguments:
        recipe, *overrides = arguments[arguments.index("fastgen/train.py") + 1 :]
        load_recipe(recipe, overrides)


@pytest.mark.parametrize("block", of_language("bash"), ids=str)
def test_commands_have_these_options(block: Block, reader: Path) -> None:
    for program, *arguments in calls_of(block, reader / "called"):
        if program == "fastgen":
            check_options(*arguments)
        else:
            check_elsewhere(program, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in of_language("bash") if b.needs is None], ids=str)
def test_commands_run(block: Block, with_runs: Callable[[str], Path]) -> None:
    folder = with_runs(block.page)
    calls = [arguments for program, *arguments in calls_of(block, folder / "called") if program == "fastgen"]
    if any(command == "new" for command, *_ in calls):
        (folder / "recipe.yaml").unlink()  # which this command writes
    for command, *arguments in calls:
        refused = next((text for option, text in NOT_OF_THIS_RUN.items() if option in arguments), None)
        if refused is not None:
            with pytest.raises(AssertionError, match=refused):
                run(command, *arguments)
        elif command not in PARSED_ONLY:
            run(command, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("block", of_language("console"), ids=str)
def test_a_command_prints_what_the_page_says(block: Block, reader: Path) -> None:
    """Each line of it but those of dots."""
    called, *lines = block.code.splitlines()
    printed = run(*shlex.split(called.removeprefix("$ fastgen ")))
    assert all(line == "..." or line in printed for line in lines), printed


# --- Python

SHORTENED = {  # in the code of the pages: what takes long, has no end, or is on the hub
    '{"train.steps": 1000}': repr(dict(text.split("=") for text in CUT)),
    '"openai/clip-vit-large-patch14"': '"assets/emoji/clip"',
    "for pictures in stream:": "for _, pictures in zip(range(3), stream):",
    'in (stream := pipeline.stream("a seven moving up, fast")):': "in itertools.islice(stream, 3):",
}


def names_of(block: Block) -> dict[str, Any]:
    """What the code of a page takes for granted, by the names that the page gives it."""
    if block.page == "README.md":
        pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
        return {"images": pictures, "prompts": ["a red square", "a blue square"]}
    if block.page == "docs/streaming.md":
        return streaming_names(block)
    if "waveform" in block.code:
        return {"waveform": np.sin(np.arange(32000) / 8)}
    if "(pipe.transformer" in block.code:
        return {"pipe": WanPipeline.from_pretrained("assets/teachers/moving_digits")}
    if "past_key" in block.code:
        layout = rollout_layout(VideoMask(frame_tokens=16, chunk_frames=(1, 1)), chunk=1, capacity=16)
        names = ("query", "key", "value", "past_key", "past_value")
        return {"layout": layout} | {name: torch.randn(1, 16, 2, 32) for name in names}
    if "networks.rewards" in block.code:
        networks = Networks(
            {}, RolloutPolicy((1.0,)), Scorer(Composite((Linear((1.0, 0.0)),)), lambda x, clamp=True: x)
        )
        return {"Objective": Objective, "Loss": Loss, "networks": networks} | {"x0": torch.randn(2, 2), "batch": two()}
    return {}


def two() -> Batch:
    none = Conditioning()
    return Batch(ids=torch.arange(2), key=0, cond=none, uncond=none, latent_shape=(2,), prompts=("a", "b"))


def streaming_names(block: Block) -> dict[str, Any]:
    """A pipeline that the page has made before, a stream of it, and 25 moments of sound."""
    name = "driven" if "listen" in block.code else "sounding" if ".sound" in block.code else "mine"
    pipeline = StreamingWanPipeline.from_pretrained(f"runs/{name}/export")
    sound = load_file("tones/a.sound.safetensors")["sound"][:25]
    stream = pipeline.stream("a seven moving up, fast", sound=sound if name == "driven" else None)
    next(iter(stream))
    return {"pipeline": pipeline, "stream": stream, "sound": sound, "more": sound, "itertools": itertools}


@pytest.mark.parametrize(
    "block",
    [pytest.param(b, marks=[pytest.mark.slow] * (b.page in RUNS), id=str(b)) for b in of_language("python")],
)
def test_python_runs(block: Block, with_runs: Callable[[str], Path]) -> None:
    assert block.needs is None
    with_runs(block.page)
    code = block.code
    for long, short in SHORTENED.items():
        code = code.replace(long, short)
    exec(compile(code, str(block), "exec"), names_of(block))
