"""A student may start from a pipeline folder that others have made, if its networks are those of the teacher."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_distributed import launch
from tiny_pipelines import tiny_sd, tiny_sdxl

from fastgen.backbones.sd import SDConfig
from fastgen.config import load_recipe
from fastgen.data.digits import assets_dir
from fastgen.registry import RecipeError
from fastgen.run import checkpoint
from fastgen.train import train

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "recipes/digits_dmd2_4step.yaml"
NETWORK = "transformer/diffusion_pytorch_model.safetensors"
SHORT = [
    "train.steps=1",
    "train.batch_size=2",
    "train.sample_every=0",
    "train.num_samples=4",
    "train.device=cpu",
    "objective.fake_updates=1",
    "health.every=0",
    "optimizers.student.lr=1e-9",
    "eval.quick_num_samples=8",
    "eval.teacher_steps=[2]",
    "eval.metrics=[throughput]",
]


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def turbo(tmp_path: Path) -> Path:
    """The digits teacher with other weights, as a folder whose name says few steps."""
    folder = Path(shutil.copytree(assets_dir() / "teachers/digits", tmp_path / "digits-turbo"))
    generator = torch.Generator().manual_seed(0)
    weights = {k: v + 0.01 * torch.randn(v.shape, generator=generator) for k, v in load_file(folder / NETWORK).items()}
    save_file(weights, folder / NETWORK, {"format": "pt"})
    return folder


def largest_difference(run: Path, folder: Path) -> float:
    """Between the student of a run's last checkpoint and the network of a pipeline folder."""
    found = checkpoint.stored(checkpoint.complete(run / "checkpoints")[-1], "student")
    expected = {f"network.{name}": value for name, value in load_file(folder / NETWORK).items()}
    return max((found.whole(name) - value).abs().max().item() for name, value in expected.items())


@pytest.mark.slow
def test_the_advice_for_a_few_step_teacher_can_be_followed(turbo: Path, tmp_path: Path) -> None:
    edit_json(turbo / "transformer/config.json", sample_size=64, _name_or_path="elsewhere")  # nothing that counts
    warned = load_recipe(DIGITS, [f"backbone.path={turbo}"]).backbone.build(torch.device("cpu"), torch.float32, 0)
    assert "the folder of this one as init_from" in warned.warnings()[0]
    run = train(load_recipe(DIGITS, [*SHORT, f"init_from={turbo}", f"output_dir={tmp_path / 'run'}"]))
    near, far = largest_difference(run, turbo), largest_difference(run, assets_dir() / "teachers/digits")
    print(f"largest difference from the folder {near:.2g}, from the teacher {far:.2g}")
    assert near < 1e-6 < far


@pytest.mark.slow
def test_divided_networks_start_from_a_folder_too(turbo: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = launch(2, str(DIGITS), *SHORT, "train.strategy=fsdp", f"init_from={turbo}", f"output_dir={run}")
    assert result.returncode == 0, result.stderr[-3000:]
    assert largest_difference(run, turbo) < 1e-6


def heads(folder: Path) -> None:
    config = json.loads((folder / "transformer/config.json").read_text())
    count, size = config["num_attention_heads"], config["attention_head_dim"]
    edit_json(folder / "transformer/config.json", num_attention_heads=count // 2, attention_head_dim=size * 2)


def one_tensor_less(folder: Path) -> None:
    save_file(dict(sorted(load_file(folder / NETWORK).items())[1:]), folder / NETWORK)


def cut(folder: Path) -> None:
    (folder / NETWORK).write_bytes((folder / NETWORK).read_bytes()[:-10])


def no_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (heads, r"digits-turbo/transformer has attention_head_dim \d+, and the network of this recipe has \d+"),
        (one_tensor_less, "are different networks; they differ in context_embedder.bias"),
        (cut, r"diffusion_pytorch_model\.safetensors has .* bytes instead of"),
        (no_index, "neither a run with a complete checkpoint, nor an export, nor the folder of a diffusers pipeline"),
    ],
)
def test_another_network_is_refused_before_weights_load(
    change: Callable[[Path], None], words: str, turbo: Path
) -> None:
    change(turbo)
    with pytest.raises(RecipeError, match=f"^init_from: .*{words}"):
        load_recipe(DIGITS, [f"init_from={turbo}"])


def test_an_adapter_cannot_start_from_a_whole_network(turbo: Path) -> None:
    with pytest.raises(RecipeError, match=r"init_from: .* leave out lora\.student"):
        load_recipe(DIGITS, [f"init_from={turbo}", "lora={student: {rank: 4}}"])


def test_points_start_from_no_pipeline(turbo: Path) -> None:
    with pytest.raises(RecipeError, match=r"init_from: .* backbone gaussian_mixture loads none"):
        load_recipe(ROOT / "recipes/mixture_dmd2_4step.yaml", [f"init_from={turbo}"])


def test_unets(tmp_path: Path) -> None:
    """The same network passes; another family, another pipeline and another prediction type do not."""
    sd, sdxl, other = tiny_sd(tmp_path / "sd"), tiny_sdxl(tmp_path / "sdxl"), tiny_sd(tmp_path / "other")
    config = SDConfig(path=str(sd))
    config.check_start(other)
    with pytest.raises(ValueError, match="holds a StableDiffusion3Pipeline"):
        config.check_start(assets_dir() / "teachers/digits")
    with pytest.raises(ValueError, match=re.escape(str(sdxl))):
        config.check_start(sdxl)
    edit_json(other / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    with pytest.raises(ValueError, match=r"predicts v_prediction, and that of .* predicts epsilon"):
        config.check_start(other)
