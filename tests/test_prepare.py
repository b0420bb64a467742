"""`fastgen prepare`: the same batches without text encoders, interruptions without a trace, and what is refused."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from mutations import draws, mutated
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from torchvision.utils import save_image
from typer.testing import CliRunner

from fastgen.backbones.sd3 import SD3, SD3Config
from fastgen.cli import app
from fastgen.config import load_recipe
from fastgen.data import DataError, make_batch
from fastgen.data.digits import load_digits, prompt_for
from fastgen.data.prepared import PreparedData, identity
from fastgen.data.shard_rows import fold, unfold
from fastgen.recipe import Recipe
from fastgen.run.lock import LOCK, lock
from fastgen.run.prepare import prepare
from fastgen.train import main

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "assets/teachers/digits"
RECIPE = ROOT / "recipes/digits_quickstart.yaml"
COUNT = 10
LATENTS = frozenset({"latents"})
CONFIG = SD3Config(path=str(TEACHER))
NO_EVAL = ["eval.reference=null", "eval.metrics=[throughput]", "eval.prompts=[a six]"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten digits with captions, all different."""
    folder = tmp_path_factory.mktemp("images")
    pixels, labels = load_digits("train")
    for i in range(COUNT):
        save_image(pixels[i], folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{prompt_for(int(labels[i]), i % 4)} {i}")
    return folder


def recipe_of(images: Path, *overrides: str) -> Recipe:
    return load_recipe(RECIPE, [f"data={{name: images, folder: {images}}}", *NO_EVAL, *overrides])


@pytest.fixture(scope="module")
def prepared(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of three rows, made without interruption."""
    folder = tmp_path_factory.mktemp("prepared") / "folder"
    prepare(recipe_of(images), folder, shard_size=3)
    return folder


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def build() -> SD3:
    return CONFIG.build(torch.device("cpu"), torch.float32, 0)


def no_encoders(_: SD3) -> None:
    raise AssertionError("the text encoders were loaded")


def test_what_is_written(prepared: Path, images: Path) -> None:
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["complete"] and "buckets" not in manifest["data"]  # as in folders of before it was a key
    assert (manifest["num_samples"], manifest["num_prompts"], manifest["num_pictures"]) == (COUNT, COUNT + 2, COUNT)
    assert manifest["identity"]["resolution"] == 32 and manifest["identity"]["latent_shape"] == [2, 8, 8]
    assert manifest["identity"]["vae_config"]["scaling_factor"] == build().vae.config.scaling_factor
    assert set(manifest["files"]) == {f.name for f in prepared.iterdir()} - {"manifest.json"}
    assert [e["rows"] for n, e in manifest["files"].items() if n.startswith("latents")] == [3, 3, 3, 1]
    prompts = [json.loads(line) for line in (prepared / "prompts.jsonl").read_text().splitlines()]
    assert prompts == ["", *[(images / f"{i}.txt").read_text() for i in range(COUNT)], "a six"]


def test_the_same_batches_without_the_text_encoders(prepared: Path, images: Path) -> None:
    """Over two epochs. Latents to the bit, as each picture is encoded alone; conditioning to the rounding of the
    batches in which the encoders ran."""
    recipe, here, there = recipe_of(images), build(), build()
    source = PreparedData(folder=str(prepared))
    assert source.provides == {"latents"}
    source.check(recipe.backbone)
    stream, stored = recipe.data.open(here, 3), source.open(there, 3)
    for first in range(0, 2 * COUNT, 5):
        wanted = make_batch(stream, here, torch.arange(first, first + 5), 1, LATENTS)
        got = make_batch(stored, there, torch.arange(first, first + 5), 1, LATENTS)
        assert got.prompts == wanted.prompts and wanted.latents is not None and got.latents is not None
        assert torch.equal(got.latents, wanted.latents)
        for part, other in ((got.cond, wanted.cond), (got.uncond, wanted.uncond)):
            error = max(float((part[key] - other[key]).abs().max()) for key in other)
            print(f"{error:.1e}")
            assert part.keys() == other.keys() and error < 2e-6
    assert "text_pipeline" not in vars(there) and "vae" not in vars(there)
    assert there.encode_prompts(["a prompt that is not in the folder"])["pooled"].shape == (1, 64)
    assert "text_pipeline" in vars(there)


@pytest.mark.slow
def test_a_run_on_it_never_loads_the_text_encoders(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SD3, "text_pipeline", property(no_encoders))
    status = main(
        [
            str(RECIPE),
            *NO_EVAL,
            f"data={{name: prepared, folder: {prepared}}}",
            f"output_dir={tmp_path / 'run'}",
            "train.steps=1",
            "train.batch_size=4",
            "train.eval_every=0",
            "train.num_samples=2",
            "eval.teacher_steps=[2]",
            "objective.gan_weight=0.01",
            "objective.fake_updates=1",
            "optimizers.discriminator={lr: 2e-4}",
            "eval.num_samples=2",
            "eval.quick_num_samples=2",
        ]
    )
    assert status == 0 and (tmp_path / "run/export/model_index.json").is_file()


@pytest.mark.parametrize(("part", "calls", "left"), [("encode_chunk", 2, 2), ("encode", 1, 10), ("encode", 5, 7)])
def test_an_interrupted_folder_is_continued_to_the_same_bytes(
    part: str, calls: int, left: int, prepared: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the text encoders, which run once a shard, or in the VAE, which runs once an image. What was in
    complete shards is not encoded again: `left` calls remain."""
    stock, done, allowed = getattr(SD3, part), 0, calls

    def counted(self: SD3, rows: Tensor) -> Tensor:
        nonlocal done
        done += 1
        if done > allowed:
            raise KeyboardInterrupt
        return stock(self, rows)

    monkeypatch.setattr(SD3, part, counted)
    with pytest.raises(KeyboardInterrupt):
        prepare(recipe_of(images), tmp_path / "folder", shard_size=3)
    assert set(contents(tmp_path / "folder")) < set(contents(prepared))
    with pytest.raises(ValueError, match="is incomplete; run the same fastgen prepare command again"):
        PreparedData(folder=str(tmp_path / "folder")).check(SD3Config(path=str(TEACHER)))
    done, allowed = 0, 100
    prepare(recipe_of(images), tmp_path / "folder", shard_size=3)
    assert done == left
    assert contents(tmp_path / "folder") == contents(prepared)


SLOW = """
import sys, time
from fastgen.backbones.sd3 import SD3
from fastgen.cli import app
encode = SD3.encode
SD3.encode = lambda self, pixels: (time.sleep(0.3), encode(self, pixels))[1]
app(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_process_is_continued_to_the_same_bytes(prepared: Path, images: Path, tmp_path: Path) -> None:
    """SIGKILL while the last latents are made, which take 0.3 s each."""
    folder = tmp_path / "folder"
    arguments = [
        "prepare",
        str(RECIPE),
        f"data={{name: images, folder: {images}}}",
        *NO_EVAL,
        "--output",
        str(folder),
        "--shard-size",
        "3",
    ]
    process = subprocess.Popen([sys.executable, "-c", SLOW, *arguments], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (folder / "latents-00001.safetensors").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(list(folder.glob("latents-*.safetensors"))) in (2, 3)
    prepare(recipe_of(images), folder, shard_size=3)
    assert contents(folder) == contents(prepared)


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(prepared: Path, images: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "fastgen"]
    options = [f"data={{name: images, folder: {images}}}", *NO_EVAL, "--shard-size", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, "prepare", str(RECIPE), *options, "--output", str(tmp_path / "folder")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("train on them with") == 1
    assert contents(tmp_path / "folder") == contents(prepared)


def test_a_folder_that_is_being_prepared_is_refused(copy: Path, images: Path) -> None:
    before = contents(copy)
    handle, _ = lock(copy / LOCK)
    with pytest.raises(ValueError, match=r"--output: process \d+ on .* is preparing .*; wait for it"):
        prepare(recipe_of(images), copy, shard_size=3)
    os.close(handle)
    (copy / LOCK).unlink()
    assert contents(copy) == before


def test_a_finished_folder_is_recognised_and_a_damaged_one_repaired(
    copy: Path, prepared: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(SD3, "text_pipeline", property(no_encoders))
        patch.setattr(SD3, "vae", property(no_encoders))
        prepare(recipe_of(images), copy, shard_size=3)
    data = bytearray((copy / "latents-00001.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "latents-00001.safetensors").write_bytes(data)
    (copy / "prompts-00000.safetensors").unlink()
    prepare(recipe_of(images), copy, shard_size=3)
    assert contents(copy) == contents(prepared)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["backbone.max_sequence_length=128"], r"identity.backbone.max_sequence_length \(256 in the folder, 128 in"),
        (["data.allow_upscaling=true"], r"data.allow_upscaling \(False in the folder, True in the recipe\)"),
        (["eval.prompts=[a seven]"], "samples_sha256"),
    ],
)
def test_a_folder_of_other_settings_is_refused(copy: Path, images: Path, overrides: list[str], words: str) -> None:
    before = contents(copy)
    with pytest.raises(ValueError, match=f"prepared with other settings: .*{words}.*Choose another --output"):
        prepare(recipe_of(images, *overrides), copy, shard_size=3)
    assert contents(copy) == before


def refusal(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The message with which training refuses a prepared folder."""
    arguments = [f"data={{name: prepared, folder: {folder}}}", f"output_dir={tmp_path / 'run'}", "train.steps=1"]
    assert main([str(RECIPE), *arguments, *overrides]) == 2
    error = capsys.readouterr().err
    print(error)
    assert error.startswith("refused: data: ") and not (tmp_path / "run").exists()
    return error


def test_a_shard_cut_short_is_refused(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = copy / "latents-00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-10])
    error = refusal(copy, tmp_path, capsys)
    assert f"latents-00002.safetensors has {len(data) - 10} bytes instead of {len(data)}" in error
    shard.write_bytes(b"\xff" * len(data))
    assert "latents-00002.safetensors is damaged" in refusal(copy, tmp_path, capsys)
    shard.unlink()
    assert "latents-00002.safetensors is missing; run the same fastgen prepare" in refusal(copy, tmp_path, capsys)


def test_a_changed_prompt_or_manifest_is_refused(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, old, new in (("prompts.jsonl", b"a six", b"a two"), ("manifest.json", b'_size": 3', b'_size": 4')):
        before = (copy / name).read_bytes()
        assert before.count(old) == 1
        (copy / name).write_bytes(before.replace(old, new))
        error = refusal(copy, tmp_path, capsys)
        assert name in error and "are not those that were written" in error
        (copy / name).write_bytes(before)


def everything(folder: Path) -> dict[str, Tensor]:
    """All that training reads of a prepared folder."""
    source, backbone = PreparedData(folder=str(folder)), build()
    source.check(CONFIG)
    batch = make_batch(source.open(backbone, 0), backbone, torch.arange(COUNT), 1, LATENTS)
    assert batch.latents is not None
    text = torch.tensor(list("\n".join(batch.prompts).encode()))
    uncond = {f"uncond.{key}": value for key, value in batch.uncond.items()}
    return {"text": text, "latents": batch.latents, **batch.cond, **uncond}


@pytest.mark.parametrize("kind", ["latents", "prompts"])
def test_a_flipped_bit_in_a_row_is_found_when_it_is_read(copy: Path, kind: str) -> None:
    path = copy / f"{kind}-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{kind}-00001\.safetensors is damaged: row 2 is not what was written"):
        everything(copy)


def test_a_folder_of_the_first_version_has_no_checksums(copy: Path, images: Path, prepared: Path) -> None:
    """It is read as it is, and continued without making its shards again."""
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["fastgen"] = "0.1.0"
    for path in copy.glob("*-*.safetensors"):
        tensors = {key: value for key, value in load_file(path).items() if key != "crc32"}
        data = save(tensors)
        path.write_bytes(data)
        manifest["files"][path.name] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    wanted = everything(prepared)
    assert all(torch.equal(value, wanted[key]) for key, value in everything(copy).items())
    before = contents(copy)
    (copy / "latents-00001.safetensors").unlink()
    prepare(recipe_of(images), copy, shard_size=3)
    after = contents(copy)
    assert sorted(name for name in before if before[name] != after[name]) == [
        "latents-00001.safetensors",
        "manifest.json",
    ]
    assert all(torch.equal(value, wanted[key]) for key, value in everything(copy).items())


@pytest.mark.slow
def test_fuzzed_folders_give_the_same_batches_or_are_refused_by_name(prepared: Path, copy: Path) -> None:
    whole, counts = contents(prepared), Counter[str]()
    wanted = everything(copy)  # which also imports what is imported only once
    for draw in draws(30):
        name = draw.choice(sorted(whole))
        (copy / name).write_bytes(mutated(draw, whole[name]))
        try:
            found = everything(copy)
        except (ValueError, DataError) as error:
            assert name in str(error), error
            counts["refused"] += 1
        else:
            assert found.keys() == wanted.keys()
            assert all(torch.equal(value, wanted[key]) for key, value in found.items()), name
            counts["the same"] += 1
        (copy / name).write_bytes(whole[name])
    print(f"{counts['the same']} read the same, {counts['refused']} refused")
    assert counts["refused"] > 10  # nearly all, since every byte of the folder is under a checksum


def change(path: Path) -> None:
    """Other weights in a file of the same size and time stamp to the second."""
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1
    save_file(tensors, path)


@pytest.mark.parametrize("part", ["vae/diffusion_pytorch_model", "text_encoder_2/model"])
def test_another_vae_or_encoder_is_refused(
    part: str, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = Path(shutil.copytree(TEACHER, tmp_path / "teacher"))
    PreparedData(folder=str(prepared)).check(SD3Config(path=str(teacher)))  # a copy of the same weights elsewhere
    change(teacher / f"{part}.safetensors")
    error = refusal(prepared, tmp_path, capsys, f"backbone.path={teacher}")
    assert "was prepared with another backbone" in error and f"{part}.safetensors (" in error


def test_another_scaling_or_resolution_is_refused(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = Path(shutil.copytree(TEACHER, tmp_path / "teacher"))
    config = json.loads((teacher / "vae/config.json").read_text())
    (teacher / "vae/config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    assert "0.5 in the recipe" in refusal(prepared, tmp_path, capsys, f"backbone.path={teacher}")
    error = refusal(prepared, tmp_path, capsys, "backbone.resolution=64")
    assert "resolution (32 in the folder, 64 in the recipe)" in error and "latent_shape" in error


def test_a_folder_of_prompts_alone_does_not_ask_for_a_vae(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, ["data={name: prompts, prompts: [a one, a two, a one]}", *NO_EVAL])
    prepare(recipe, tmp_path / "folder")
    source = PreparedData(folder=str(tmp_path / "folder"))
    assert source.provides == frozenset()
    source.check(SD3Config(path=str(TEACHER), resolution=64))
    backbone = build()
    stream = source.open(backbone, 0)
    assert sorted(stream.prompts(torch.arange(3))) == ["a one", "a one", "a two"]
    assert stream.latents(torch.arange(3)) is None and stream.pixels(torch.arange(3)) is None


def test_stored_in_half_the_size(images: Path, tmp_path: Path) -> None:
    prepare(recipe_of(images), tmp_path / "folder", dtype="bfloat16")
    backbone = build()
    stream = PreparedData(folder=str(tmp_path / "folder")).open(backbone, 0)
    batch = make_batch(stream, backbone, torch.arange(4), 1, LATENTS)
    assert load_file(tmp_path / "folder/prompts-00000.safetensors")["prompt_embeds"].dtype == torch.bfloat16
    assert batch.latents is not None and batch.latents.dtype == torch.float32
    exact = make_batch(recipe_of(images).data.open(backbone, 0), backbone, torch.arange(4), 1, LATENTS).latents
    assert exact is not None and (batch.latents - exact).abs().max() < exact.abs().max() / 128


def test_padding_is_stored_once_and_comes_back_to_the_bit() -> None:
    rows = torch.randn(3, 9, 4)
    rows[:, 5:] = rows[:, 5:6]
    rows[0, 3:] = rows[0, 3:4]
    assert fold(rows).shape == (3, 6, 4)
    assert torch.equal(unfold(fold(rows), 9), rows)
    assert fold(rows[:, 0]).shape == (3, 4) and fold(torch.randn(2, 5, 3)).shape == (2, 5, 3)


def test_of_a_hub_id_the_commit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache as huggingface_hub lays it out, without a network."""
    repository = tmp_path / "models--org--digits"
    shutil.copytree(TEACHER, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    found = identity(SD3Config(path="org/digits"), images=True)
    assert found["encoders"] == found["vae"] == {"commit": "a" * 40} and found["resolution"] == 32


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_line(images: Path, prepared: Path, tmp_path: Path) -> None:
    data = f"data={{name: images, folder: {images}}}"
    status, out, _ = run("prepare", RECIPE, data, *NO_EVAL, "--output", tmp_path / "new", "--shard-size", 3)
    assert status == 0 and f"{COUNT} samples, {COUNT + 2} prompts and {COUNT} latents" in out
    assert contents(tmp_path / "new") == contents(prepared)
    status, _, error = run("prepare", RECIPE, data, "--output", images)
    assert status == 2 and "is not empty and was not written by fastgen prepare" in error
    status, _, error = run("prepare", RECIPE, data, "--output", tmp_path / "other", "--pair-steps", 7)
    assert status == 2 and "--pair-steps and --guidance-scale are of ODE pairs; give --pairs" in error
    mixture = ROOT / "recipes/mixture_dmd2_4step.yaml"
    status, _, error = run("prepare", mixture, "--output", tmp_path / "other")
    assert status == 2 and "gaussian_mixture has nothing to encode" in error
    status, _, error = run(
        "prepare", RECIPE, f"data={{name: prepared, folder: {prepared}}}", "--output", tmp_path / "o"
    )
    assert status == 2 and "random access" in error
    assert not (tmp_path / "other").exists() and not (tmp_path / "o").exists()


def test_an_unreadable_image_stops_with_its_name(images: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    (folder / "4.png").write_bytes((folder / "4.png").read_bytes()[:200])
    status, _, error = run(
        "prepare", RECIPE, f"data={{name: images, folder: {folder}}}", *NO_EVAL, "--output", tmp_path / "new"
    )
    assert status == 1 and error.splitlines()[-1].startswith("stopped: cannot read the image") and "4.png" in error


@pytest.mark.parametrize(
    ("manifest", "words"),
    [(None, "is not a prepared folder"), ("{", "is not readable"), ('{"format": 99}', "has format 99")],
)
def test_a_folder_without_a_manifest_of_ours_is_refused(
    manifest: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    if manifest is not None:
        (tmp_path / "folder/manifest.json").write_text(manifest)
    assert words in refusal(tmp_path / "folder", tmp_path, capsys)


def test_points_have_nothing_prepared(prepared: Path) -> None:
    with pytest.raises(ValueError, match="prepared data needs a diffusers pipeline as its backbone"):
        load_recipe(ROOT / "recipes/mixture_dmd2_4step.yaml", [f"data={{name: prepared, folder: {prepared}}}"])
