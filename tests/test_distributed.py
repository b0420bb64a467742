"""Several processes: the same run as one, networks divided for real, and checkpoints that fit any number of them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastgen.config import load_recipe
from fastgen.registry import RecipeError
from fastgen.run import checkpoint
from fastgen.run.launcher import differences
from fastgen.train import main, train

ROOT = Path(__file__).parents[1]
DIGITS = "recipes/digits_dmd2_4step.yaml"
SMALL = [
    "train.dtype=float64",
    "train.accumulate=1",
    "train.sample_every=0",
    "train.eval_every=0",
    "train.num_samples=4",
    "train.checkpoint_every=3",
    "train.steps=3",
    "objective.fake_updates=1",
    "health.num_samples=4",
    "eval.quick_num_samples=20",
    "eval.teacher_steps=[2]",
    "eval.metrics=[throughput]",
    "train.keep_checkpoints=9",
]
LORA = "lora={student: {rank: 4}, fake_score: {rank: 4}}"
GAN = ["objective.gan_weight=0.01", "optimizers.discriminator={lr: 2e-4}"]


def launch(processes: int, *arguments: str, program: str = "fastgen/train.py") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, program, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def run(folder: Path, processes: int, *overrides: str, recipe: str = DIGITS, small: Sequence[str] = SMALL) -> Path:
    """A digits run of `processes` processes and 4 samples an update in all."""
    arguments = [*small, f"train.batch_size={4 // processes}", f"output_dir={folder}", *overrides]
    if processes == 1:
        return train(load_recipe(ROOT / recipe, arguments))
    result = launch(processes, recipe, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def difference(one: Path, other: Path) -> float:
    """The largest difference of any tensor of the two newest checkpoints. one: of a run of one process."""
    first, second = (checkpoint.complete(folder / "checkpoints")[-1] for folder in (one, other))
    assert first.name == second.name
    largest = 0.0
    for file in sorted(first.glob("*.safetensors")):
        a, b = load_file(file), checkpoint.stored(second, file.name.removesuffix(".safetensors"))
        assert a.keys() == b.shapes.keys()
        largest = max([largest, *((a[k].double() - b.whole(k).double()).abs().max().item() for k in a)])
    return largest


def compare(one: Path, folder: Path, *overrides: str) -> float:
    """A run of one process with that of two, whose networks are divided, made in `folder` with these overrides."""
    two = run(folder, 2, "train.strategy=fsdp", *overrides)
    names = {f.name for f in (two / "export").rglob("*") if f.is_file()}
    assert names == {f.name for f in (one / "export").rglob("*") if f.is_file()}
    return difference(one, two)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a discriminator, to be read only."""
    return run(tmp_path_factory.mktemp("one") / "run", 1, *GAN)


@pytest.mark.slow
def test_divided_networks_train_as_one(one_process: Path, tmp_path: Path) -> None:
    error = compare(one_process, tmp_path / "two", *GAN)
    print(f"largest difference {error:.2g}")
    assert error < 1e-9


@pytest.mark.slow
def test_a_sharded_run_without_checkpoints_is_exported(tmp_path: Path) -> None:
    """What two processes export, tensor by tensor, is what one exports."""
    short = ["train.checkpoint_every=0", "train.steps=1"]
    one = run(tmp_path / "one", 1, *short)
    two = run(tmp_path / "two", 2, "train.strategy=fsdp", *short)
    name = "export/transformer/diffusion_pytorch_model.safetensors"
    a, b = load_file(one / name), load_file(two / name)
    teacher = load_file(ROOT / "assets/teachers/digits" / name.removeprefix("export/"))
    assert a.keys() == b.keys() and not (two / "checkpoints").exists()
    error = max((a[k] - b[k]).abs().max().item() for k in a)
    moved = max((a[k] - teacher[k]).abs().max().item() for k in a)
    print(f"largest difference {error:.2g}, largest movement {moved:.2g}")
    assert error < 1e-7 < moved


@pytest.mark.slow
def test_adapters_on_a_divided_base_train_as_on_a_whole_one(tmp_path: Path) -> None:
    one = run(tmp_path / "one", 1, LORA)
    error = compare(one, tmp_path / "two", LORA, "train.gradient_checkpointing=true")
    print(f"largest difference {error:.2g}")
    assert error < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("extra", [[], [LORA]], ids=["full", "lora"])
def test_twenty_updates_of_two_processes_are_those_of_one(tmp_path: Path, strategy: str, extra: list[str]) -> None:
    long = [*extra, "train.steps=20", "train.checkpoint_every=20"]
    error = difference(run(tmp_path / "one", 1, *long), run(tmp_path / "two", 2, f"train.strategy={strategy}", *long))
    print(f"{strategy}: largest difference after 20 updates {error:.2g}")
    assert error < 1e-5


POINTS = [  # as SMALL, on points, with GDPO's advantages
    *("train.dtype=float64", "train.steps=4", "train.sample_every=0", "train.eval_every=0", "health.num_samples=4"),
    *("backbone.fit_steps=20", "train.checkpoint_every=4", "eval.quick_num_samples=20", "eval.teacher_steps=[2]"),
    *("objective.normalise_advantages=true", "objective.log_prob=mean_square", "objective.fake_updates=1"),
    *("objective.group_size=4", "eval.metrics=[throughput]"),
]


@pytest.mark.slow
def test_advantages_are_of_all_processes_and_micro_batches(tmp_path: Path) -> None:
    """16 samples at once, and two micro-batches of 4 on each of two processes. Fails if their rewards are not
    gathered: four samples by themselves have another standard deviation."""
    recipe = "recipes/mixture1d_rtdmd_tilt.yaml"
    one = run(tmp_path / "one", 1, "train.batch_size=16", recipe=recipe, small=POINTS)
    two = run(tmp_path / "two", 2, "train.batch_size=4", "train.accumulate=2", recipe=recipe, small=POINTS)
    error = difference(one, two)
    print(f"largest difference {error:.2g}")
    assert error < 1e-9


@pytest.mark.slow
def test_a_checkpoint_of_four_processes_resumes_on_two_and_on_one(tmp_path: Path) -> None:
    steady = ["optimizers.student.decay=constant", "optimizers.fake_score.decay=constant"]
    whole = run(tmp_path / "whole", 1, "train.steps=6", *steady)
    four = run(tmp_path / "parts", 4, "train.strategy=fsdp", *steady)
    assert json.loads((four / "checkpoints/step_00000003/counters.json").read_text())["samples_per_update"] == 4
    run(four, 2, "train.strategy=fsdp", "train.steps=5", "train.checkpoint_every=1", *steady)
    run(four, 1, "train.steps=6", *steady)
    error = difference(whole, four)
    print(f"4, then 2, then 1 process against one: {error:.2g}")
    assert error < 1e-9


@pytest.mark.slow
def test_every_process_holds_its_part_and_no_more(tmp_path: Path) -> None:
    """Bytes allocated by every process, counted at each operation while the networks are made, and those held after
    an update of every turn."""
    result = launch(
        2,
        DIGITS,
        *SMALL,
        "train.batch_size=2",
        f"output_dir={tmp_path / 'run'}",
        "train.strategy=fsdp",
        program="tests/measure_shards.py",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in range(2):
        seen = json.loads((tmp_path / f"run/shards_{rank}.json").read_text())
        print(rank, seen)
        assert seen["all_divided"]
        assert seen["held"] <= 0.52 * seen["whole"]  # two processes; a few tensors do not divide evenly
        assert seen["peak_while_loading"] <= seen["held"] + 1.1 * seen["largest_block"]


def test_a_run_of_another_size_is_refused(
    mixture_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(mixture_recipe), *SMALL, "backbone.fit_steps=2", f"output_dir={tmp_path / 'run'}"]
    assert main([*arguments, "train.batch_size=4"]) == 0
    arguments.append("train.steps=4")
    assert main([*arguments, "train.batch_size=2"]) == 2
    assert "was started with 4 samples per update" in capsys.readouterr().err
    assert main([*arguments, "train.batch_size=2", "train.accumulate=2"]) == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.strategy=fsdp", "there is only one process"),
        ("train.num_processes=2", "accelerate started 1"),
        pytest.param(
            "train.device=cuda",
            "there is no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU"),
        ),
    ],
)
def test_what_was_asked_for_and_cannot_be_had(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        train(load_recipe(ROOT / DIGITS, [*SMALL, f"output_dir={tmp_path / 'run'}", override]))


@pytest.mark.parametrize(
    ("variable", "value", "override", "words"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "seed=0", "DeepSpeed"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "seed=0", "parallelism"),
        ("FSDP_OFFLOAD_PARAMS", "true", "seed=0", "offloading"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "seed=0", r"set train\.mixed_precision=bf16, or launch with .* no$"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "train.mixed_precision=bf16", "was told fp16; launch with .* bf16$"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "train.accumulate=2", r"set train\.accumulate=4"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "seed=0", r"set train\.compile=true"),
        ("ACCELERATE_DYNAMO_BACKEND", "CUDAGRAPHS", "train.compile=true", "compile with cudagraphs"),
        ("ACCELERATE_DYNAMO_USE_FULLGRAPH", "True", "train.compile=true", "leave it out"),
        ("ACCELERATE_USE_FSDP", "true", "train.strategy=ddp", "configured for FSDP"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "seed=0", r"set train\.gradient_checkpointing=true"),
    ],
)
def test_a_launcher_that_was_told_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, override: str, words: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(RecipeError, match=words):
        train(load_recipe(ROOT / DIGITS, [*SMALL, f"output_dir={tmp_path / 'run'}", override]))


@pytest.mark.parametrize(
    ("variable", "value", "override", "words"),
    [
        ("FSDP_SHARDING_STRATEGY", "FULL_SHARD", "seed=0", None),
        ("FSDP_SHARDING_STRATEGY", "SHARD_GRAD_OP", "seed=0", "choose FULL_SHARD"),
        ("FSDP_SHARDING_STRATEGY", "HYBRID_SHARD", "seed=0", r"train\.shard_group is not given"),
        ("FSDP_SHARDING_STRATEGY", "HYBRID_SHARD", "train.shard_group=2", None),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "seed=0", "freed after each block"),
        ("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP", "seed=0", None),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "seed=0", "block by block"),
        ("FSDP_TRANSFORMER_CLS_TO_WRAP", "WanTransformerBlock", "seed=0", "leave that setting out"),
        ("FSDP_IGNORED_MODULES", "proj_out", "seed=0", "every network is sharded"),
        ("FSDP_BACKWARD_PREFETCH", "NO_PREFETCH", "seed=0", "before a backward pass"),
        ("FSDP_FORWARD_PREFETCH", "true", "seed=0", "forward prefetching"),
        ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "true", "seed=0", "checkpointed activations"),
    ],
)
def test_what_accelerate_was_told_of_fsdp(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, override: str, words: str | None
) -> None:
    """Besides accelerate's defaults, which ask for nothing."""
    defaults = {"RESHARD_AFTER_FORWARD": "true", "MIN_NUM_PARAMS": "100000000", "USE_ORIG_PARAMS": "true"}
    for name, told in {"ACCELERATE_USE_FSDP": "true", **{f"FSDP_{k}": v for k, v in defaults.items()}}.items():
        monkeypatch.setenv(name, told)
    monkeypatch.setenv(variable, value)
    found = list(differences(load_recipe(ROOT / DIGITS, [override]).train))
    assert len(found) == (words is not None) and all(re.search(words or "", line) for line in found)


def test_a_launcher_that_was_told_the_same_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_recipe(ROOT / DIGITS, ["train.mixed_precision=bf16", "train.accumulate=2"]).train
    for precision, accumulate in (("bf16", "2"), ("no", "1"), ("no", "auto")):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", accumulate)
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
        assert not list(differences(config))


@pytest.mark.slow
def test_accelerates_own_flags_arrive(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--mixed_precision", "bf16"]
    arguments = ["fastgen/train.py", DIGITS, *SMALL, f"output_dir={tmp_path / 'run'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([*program, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "refused: train.mixed_precision is no, but the launcher was told bf16" in result.stderr


def test_tf32_is_refused_without_a_gpu(tmp_path: Path) -> None:
    arguments = [*SMALL, "train.device=cpu", "train.tf32=true", f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(RecipeError, match=r"train\.tf32 is a mode of GPUs"):
        train(load_recipe(ROOT / DIGITS, arguments))
