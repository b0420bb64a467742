"""What an export writes: files like the teacher's, unchanged ones copied, from tensors that come one at a time."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_sdxl

from fastgen.backbones.base import RoleOptions
from fastgen.backbones.sd import SD, SDConfig
from fastgen.modules.lora import LoraConfig
from fastgen.modules.sharding import gathered
from fastgen.modules.tensor_file import Spec, TensorFile, TensorWriter
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.sampler import load_sampler, usual_dtype

CPU = torch.device("cpu")
POLICY = RolloutPolicy((1.0, 0.5))
VAE, TEXT = "vae/diffusion_pytorch_model.safetensors", "text_encoder_2/model"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As large repositories are: the UNet in float16 and in shards, a text encoder only as a variant, and weights of
    other libraries beside them."""
    folder = tiny_sdxl(tmp_path_factory.mktemp("teacher"))
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    shutil.rmtree(folder / "unet")
    pipeline.unet.half().save_pretrained(folder / "unet", max_shard_size="60KB")
    save_file(
        {k: v.half() for k, v in load_file(folder / f"{TEXT}.safetensors").items()},
        folder / f"{TEXT}.fp16.safetensors",
        {"format": "pt"},
    )
    (folder / f"{TEXT}.safetensors").unlink()
    (folder / "vae/flax_model.msgpack").write_text("not for us")
    return folder


def backbone_of(folder: Path, roles: RoleOptions | None = None) -> SD:
    return SDConfig(path=str(folder)).build(CPU, torch.float32, 0, roles or RoleOptions())


def moved_student(folder: Path, roles: RoleOptions | None = None) -> tuple[SD, torch.nn.Module]:
    """A student that is no longer its teacher."""
    backbone = backbone_of(folder, roles)
    student = backbone.load("student")
    with torch.no_grad():
        for i, p in enumerate(student.parameters()):
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return backbone, student


def files_of(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


def test_an_export_is_stored_like_its_teacher(teacher: Path, tmp_path: Path) -> None:
    """Shards, names and dtypes of the UNet are the teacher's, and the values the student's; other components are the
    teacher's files, which need no variant to be asked for. Plain diffusers loads it."""
    backbone, student = moved_student(teacher)
    backbone.save_pipeline(student, POLICY, tmp_path)
    expected = {name.replace(".fp16", "") for name in files_of(teacher)} - {"vae/flax_model.msgpack"}
    assert files_of(tmp_path) == expected and len(list(tmp_path.glob("unet/*.safetensors"))) > 2
    assert (tmp_path / VAE).read_bytes() == (teacher / VAE).read_bytes()
    assert (tmp_path / f"{TEXT}.safetensors").read_bytes() == (teacher / f"{TEXT}.fp16.safetensors").read_bytes()
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    assert json.loads((tmp_path / index).read_text()) == json.loads((teacher / index).read_text())
    values = {k.removeprefix("network."): v for k, v in student.state_dict().items()}
    for file in tmp_path.glob("unet/*.safetensors"):
        stored, original = load_file(file), load_file(teacher / "unet" / file.name)
        assert stored.keys() == original.keys()
        assert all(torch.equal(v, values[k].half()) and v.dtype == torch.float16 for k, v in stored.items())
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    assert all(torch.equal(v.float(), values[k].half().float()) for k, v in pipeline.unet.state_dict().items())


def test_the_dtype_is_that_of_the_students_network_alone(teacher: Path, tmp_path: Path) -> None:
    backbone, student = moved_student(teacher)
    backbone.save_values(student, gathered(student), POLICY, tmp_path, dtype=torch.bfloat16)  # type: ignore[arg-type]
    for file in tmp_path.glob("unet/*.safetensors"):
        assert {spec.dtype for spec in TensorFile(file).specs.values()} == {torch.bfloat16}
    assert (tmp_path / VAE).read_bytes() == (teacher / VAE).read_bytes()
    assert backbone_of(tmp_path).stored_dtype == torch.bfloat16 and backbone.stored_dtype == torch.float16
    assert load_sampler(tmp_path).backbone.dtype == torch.bfloat16
    assert load_sampler(tmp_path, dtype=torch.float32).denoiser.weight_dtype == torch.float32


def test_what_is_stored_in_float16_is_computed_in_float32_on_a_cpu(teacher: Path) -> None:
    """Its convolutions in float16 are tens of times slower. On a GPU, the stored dtype stays."""
    config = SDConfig(path=str(teacher))
    assert backbone_of(teacher).stored_dtype == torch.float16
    assert usual_dtype(config, torch.device("cpu")) == torch.float32
    assert usual_dtype(config, torch.device("cuda")) == torch.float16


def test_an_adapter_is_merged_without_loading_its_base(teacher: Path, tmp_path: Path) -> None:
    """The networks of the student that is exported have no memory; the result is peft's own merge, rounded once."""
    roles = RoleOptions({"student": LoraConfig(rank=2, alpha=6)})
    _, student = moved_student(teacher, roles)
    empty = backbone_of(teacher, RoleOptions(roles.adapters, deferred=True))
    structure = empty.load("student")
    assert empty.shared is not None and all(p.is_meta for p in empty.shared.base_parameters())
    empty.save_values(structure, gathered(student), POLICY, tmp_path, whole=True)
    expected = {k.removeprefix("network."): v.half() for k, v in student.merged().state_dict().items()}  # type: ignore[operator]
    stored = {k: v for file in tmp_path.glob("unet/*.safetensors") for k, v in load_file(file).items()}
    assert stored.keys() == expected.keys()
    worst = max((stored[k].float() - expected[k].float()).abs().max().item() for k in stored)
    base = load_file(next(teacher.glob("unet/*00001*.safetensors")))
    moved = max((stored[k].float() - v.float()).abs().max().item() for k, v in base.items())
    print(f"largest difference from the merge of peft {worst:.2g}, from the base {moved:.2g}")
    assert worst < 1e-3 < 1e-2 < moved


def test_a_file_of_tensors_comes_back_in_any_order(tmp_path: Path) -> None:
    values = {
        "a": torch.randn(3, 5),
        "half": torch.randn(7).half(),
        "brain": torch.randn(2, 2).bfloat16(),
        "one": torch.tensor(4),
        "none": torch.empty(0, 3),
        "turned": torch.randn(4, 6).mT,
    }
    specs = {name: Spec(v.dtype, tuple(v.shape)) for name, v in values.items()}
    with TensorWriter(tmp_path / "x.safetensors", specs) as writer:
        for name in reversed(values):
            writer.put(name, values[name])
    file, read = TensorFile(tmp_path / "x.safetensors"), load_file(tmp_path / "x.safetensors")
    assert file.specs == specs and read.keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(file.read(name), value) and torch.equal(read[name], value)
    with pytest.raises(ValueError, match="lacks the tensors half, none"), TensorWriter(tmp_path / "y", specs) as short:
        for name in ("a", "brain", "one", "turned"):
            short.put(name, values[name])
    with pytest.raises(ValueError, match="has shape"), TensorWriter(tmp_path / "z", specs) as wrong:
        wrong.put("a", torch.zeros(2))
