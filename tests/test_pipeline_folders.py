"""A teacher's folder is read whole or refused by name, before anything is trained and by every way of loading it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from mutations import draws, mutated
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_sd

from fastgen.backbones.base import RoleOptions
from fastgen.backbones.sd import SDConfig
from fastgen.backbones.sd3 import SD3, SD3Config
from fastgen.data.digits import assets_dir
from fastgen.modules.sharding import WeightsError

TEACHER = assets_dir() / "teachers/digits"
NETWORK = "transformer/diffusion_pytorch_model.safetensors"
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the digits teacher that a test may damage."""
    return Path(shutil.copytree(TEACHER, tmp_path / "teacher"))


def backbone_of(folder: Path, roles: RoleOptions | None = None) -> SD3:
    config = SD3Config(path=str(folder))
    config.check()
    return config.build(CPU, torch.float32, 0, roles or RoleOptions())


def load_all(folder: Path) -> None:
    """Everything that a run reads of its teacher."""
    backbone = backbone_of(folder)
    backbone.load("teacher")
    backbone.encode_prompts(["a"])
    backbone.decode(torch.zeros(1, *backbone.latent_shape))
    backbone.teacher_policy(4)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(path)), path, {"format": "pt"})


def test_a_folder_with_half_precision_files_only_loads(folder: Path) -> None:
    """As many hub repositories are downloaded: every component has fp16 files and no others."""
    for path in folder.rglob("*.safetensors"):
        edit_tensors(path, lambda t: {k: v.half() if v.is_floating_point() else v for k, v in t.items()})
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    load_all(folder)
    half = load_file(folder / NETWORK.replace(".safetensors", ".fp16.safetensors"))
    loaded = backbone_of(folder).load("teacher").network.state_dict()
    assert all(torch.equal(loaded[name], value.float()) for name, value in half.items())
    deferred = backbone_of(folder, RoleOptions(deferred=True))
    assert {path.name for path, _ in deferred.weights().values()} == {"diffusion_pytorch_model.fp16.safetensors"}


def test_optional_components_may_be_missing(folder: Path) -> None:
    edit_json(
        folder / "model_index.json",
        image_encoder=["transformers", "SiglipVisionModel"],
        feature_extractor=["transformers", "SiglipImageProcessor"],
    )
    load_all(folder)
    edit_json(folder / "model_index.json", image_encoder=[None, None], feature_extractor=[None, None])
    load_all(folder)


def cut(folder: Path) -> None:
    data = (folder / NETWORK).read_bytes()
    (folder / NETWORK).write_bytes(data[: len(data) // 2])


def pointer(folder: Path) -> None:
    (folder / NETWORK).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")


def text(folder: Path) -> None:
    (folder / NETWORK).write_text("<html>404</html>" * 20)


def pickled(folder: Path) -> None:
    (folder / NETWORK).rename(folder / "transformer/diffusion_pytorch_model.bin")


def integers(folder: Path) -> None:
    edit_tensors(
        folder / NETWORK, lambda t: {k: v.to(torch.int8) if k.endswith(".weight") else v for k, v in t.items()}
    )


def index_without_shards(folder: Path) -> None:
    (folder / NETWORK).unlink()
    (folder / f"{NETWORK}.index.json").write_text(json.dumps({"weight_map": {"a": "one-of-two.safetensors"}}))


def other_vae(folder: Path) -> None:
    edit_json(folder / "model_index.json", vae=["diffusers", "AutoencoderTiny"])


def endless_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer/tokenizer_config.json"
    values = json.loads(path.read_text())
    values.pop("model_max_length", None)
    path.write_text(json.dumps(values))


def no_config(folder: Path) -> None:
    (folder / "vae/config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "vae/config.json").write_text("{")


def no_component(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "diffusion_pytorch_model.safetensors has .* bytes instead of"),
        (pointer, "is a Git LFS pointer"),
        (text, "is not a safetensors file, or is cut short"),
        (pickled, r"no safetensors weights.*diffusion_pytorch_model\.bin is not read"),
        (integers, "as I8; quantised weights are not supported"),
        (index_without_shards, "one-of-two.safetensors, which .* lists"),
        (other_vae, "is a AutoencoderTiny, and this pipeline needs a AutoencoderKL"),
        (endless_tokenizer, "gives no model_max_length"),
        (no_config, r"vae has no config\.json"),
        (broken_config, r"cannot read .*vae/config\.json"),
        (no_component, "has no folder text_encoder"),
    ],
)
def test_a_damaged_folder_is_refused_with_the_recipe(damage: Callable[[Path], None], words: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=words):
        SD3Config(path=str(folder)).check()


def lora_layers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As `save_pretrained` of a network with adapters writes them."""
    return {k.replace(".to_q.", ".to_q.base_layer."): v for k, v in tensors.items()}


def one_less(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(sorted(tensors.items())[1:])


def one_more(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"another.weight": torch.zeros(2)}


def narrower(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = "proj_out.bias"
    return tensors | {name: tensors[name][:-1].clone()}


@pytest.mark.parametrize("change", [lora_layers, one_less, one_more, narrower])
def test_nothing_is_filled_at_random(change: Callable, folder: Path) -> None:  # type: ignore[type-arg]
    """Whole files whose tensors are not those of the config's network."""
    edit_tensors(folder / NETWORK, change)
    with pytest.raises(WeightsError, match=r"transformer|proj_out"):
        backbone_of(folder).load("teacher")


@pytest.mark.parametrize("component", ["vae/diffusion_pytorch_model", "text_encoder/model", "text_encoder_3/model"])
def test_every_component_is_compared(component: str, folder: Path) -> None:
    edit_tensors(folder / f"{component}.safetensors", one_less)
    with pytest.raises(WeightsError, match=component.partition("/")[0]):
        load_all(folder)


def test_a_scheduler_that_diffusers_does_not_have(folder: Path, tmp_path: Path) -> None:
    edit_json(folder / "model_index.json", scheduler=["diffusers", "TomorrowScheduler"])
    with pytest.raises(ValueError, match="its scheduler, TomorrowScheduler, does not give"):
        SD3Config(path=str(folder)).check()
    edit_json(tiny_sd(tmp_path / "sd") / "model_index.json", scheduler=["diffusers", "TomorrowScheduler"])
    with pytest.raises(WeightsError, match=r"has no class .?TomorrowScheduler"):
        SDConfig(path=str(tmp_path / "sd")).check()


SCHEDULERS = [name for name in dir(diffusers) if name.endswith("Scheduler")]
SOME = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "HeunDiscreteScheduler", "IPNDMScheduler"]


def give_scheduler(folder: Path, name: str) -> bool:
    """Gives a pipeline the scheduler of this class with its defaults. False if it has none or lacks a package."""
    try:
        scheduler = getattr(diffusers, name)()
    except (ImportError, TypeError):
        return False
    if not hasattr(scheduler, "save_pretrained"):
        return False
    shutil.rmtree(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    edit_json(folder / "model_index.json", scheduler=["diffusers", name])
    return True


@pytest.mark.parametrize("names", [SOME, pytest.param(SCHEDULERS, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_scheduler_of_diffusers_samples_the_teacher_or_is_refused_with_the_recipe(
    tmp_path: Path, names: list[str]
) -> None:
    folders = {SD3Config: Path(shutil.copytree(TEACHER, tmp_path / "sd3")), SDConfig: tiny_sd(tmp_path / "sd")}
    taken: dict[str, list[str]] = {}
    for config, path in folders.items():
        for name in names:
            if give_scheduler(path, name):
                try:
                    config(path=str(path)).check()
                except ValueError as error:
                    assert name in str(error)
                    continue
                policy = config(path=str(path)).build(CPU, torch.float32, 0).teacher_policy(4)
                assert policy.num_steps == 4
                taken.setdefault(config.name, []).append(name)
    print(taken)
    assert taken["sd3"] == ["FlowMatchEulerDiscreteScheduler"] and "HeunDiscreteScheduler" in taken["sd"]


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_3", "tokenizer_2", "vae", "scheduler", "transformer"])
@pytest.mark.parametrize("left_out", [False, True])
def test_a_component_without_which_no_prompt_can_be_given_is_named(folder: Path, name: str, left_out: bool) -> None:
    path = folder / "model_index.json"
    index = json.loads(path.read_text()) | {name: [None, None]}
    if left_out and not name.startswith(("text_encoder", "tokenizer")):
        index.pop(name)
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"has no {name}, and without it"):
        SD3Config(path=str(folder)).check()


def test_paths_that_are_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.safetensors").write_bytes(b"")
    Path("models/digits").mkdir(parents=True)
    for path, words in (
        ("model.safetensors", "is a single file"),
        ("models/digit", "the folder models has no digit; did you mean 'digits'"),
        ("a/b/c", "neither a folder nor a hub id"),
    ):
        with pytest.raises(ValueError, match=words):
            SD3Config(path=path).check()
    SD3Config(path="org/name").check()


@pytest.mark.slow
def test_fuzzed_folders_load_alike_or_are_refused_by_name(folder: Path) -> None:
    """Damage to every file: the teacher has its own weights, or a file is named."""
    whole = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    wanted = load_file(folder / NETWORK)
    load_all(folder)  # imports, which are not counted
    alike, refused = 0, 0
    for draw in draws():
        path = draw.choice(list(whole))
        path.write_bytes(mutated(draw, whole[path], within=4096))
        try:
            network = backbone_of(folder).load("teacher").network.state_dict()
        except ValueError as error:
            refused += 1
            assert path.name in str(error) or path.parent.name in str(error) or str(folder) in str(error), error
        else:
            alike += 1
            changed = path == folder / NETWORK  # its values, which no format protects
            assert changed or all(torch.equal(network[name], value) for name, value in wanted.items())
        path.write_bytes(whole[path])
    print(f"{alike} read the same, {refused} refused")
    assert alike > 10 and refused > 10
