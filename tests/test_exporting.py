"""Students in the files of other programs: read back by diffusers' loaders, and by what is known of ComfyUI's."""

import json
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from comfyui_reader import lora_deltas, read_float8, stock_converter
from diffusers.loaders import single_file_model
from exported_students import CASES, TRANSFORMERS, Written
from safetensors import safe_open
from safetensors.torch import load_file
from variants import mostly_slow

from fastgen.backbones.pipeline_config import CONFIGS
from fastgen.exporting.files import of_tensors
from fastgen.exporting.ldm import unet_name
from fastgen.exporting.transformers import in_original_layout

# --- LoRA


@pytest.mark.parametrize("name", mostly_slow(CASES, ["sd", "flux-dev", "wan-experts"]))
def test_comfyui_reads_an_adapter_whole(name: str, written: Callable[[str], Written]) -> None:
    """What it adds to the authors' tensors, converted by diffusers, is what the adapter adds; no key is left over."""
    case = written(name)
    component = case.backbone.subfolder
    merged, base = (case.pipeline(folder).components for folder in (case.folder / "merged", case.base))
    whole = case.files("checkpoint" if component == "unet" else "diffusion_model")
    for part, lora_file, file in zip(case.backbone.subfolders, case.files("lora"), whole, strict=True):
        lora, network = load_file(lora_file), base[part]
        original = {k: v for k, v in load_file(file).items() if not k.startswith(("first", "cond"))}
        deltas, unused = lora_deltas(lora, original, network, component)
        assert not unused, sorted(unused)[:3]
        read = stock_converter(network)(deltas)
        ours = merged[part].state_dict()
        changed = 0
        for key, before in network.state_dict().items():
            difference = ours[key] - before
            assert torch.allclose(read[key].reshape(before.shape), difference, atol=1e-5), key
            changed += bool(difference.abs().max() > 1e-3)
        print(f"{part}: {changed} layers, {len(lora)} keys")
        assert changed == sum(key.endswith(("lora_A.weight", "lora_down.weight")) for key in lora) > 0


@pytest.mark.parametrize("name", CASES)
def test_diffusers_reads_the_same_adapter_to_the_same_pixels(name: str, written: Callable[[str], Written]) -> None:
    case = written(name)
    pipeline = case.pipeline(case.base)
    plain = case.stock_pixels(pipeline)
    for i, file in enumerate(case.files("lora")):
        more = {"load_into_transformer_2": True, "adapter_name": "second"} if i else {}
        pipeline.load_lora_weights(file.parent, weight_name=file.name, **more)
    error = float((case.stock_pixels(pipeline) - case.pixels).abs().max())
    print(f"largest difference: {error:.2g}; without the adapter {float((plain - case.pixels).abs().max()):.2g}")
    assert error < 1e-4 < 1e-3 < float((plain - case.pixels).abs().max())


# --- whole networks


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_checkpoint_is_read_by_from_single_file(name: str, written: Callable[[str], Written]) -> None:
    case = written(name)
    cls = getattr(diffusers, case.backbone.components["_class_name"])
    pipeline = cls.from_single_file(str(case.files("checkpoint")[0]), config=str(case.base), local_files_only=True)
    assert float((case.stock_pixels(case.with_euler(pipeline)) - case.pixels).abs().max()) < 1e-5


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_network_in_its_authors_layout_is_read_by_from_single_file(
    name: str, written: Callable[[str], Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = written(name)
    cls = getattr(diffusers, case.backbone.network_class)
    base = case.pipeline(case.base)
    given = {}
    for part, file in zip(case.backbone.subfolders, case.files("diffusion_model"), strict=True):
        entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[cls.__name__]
        convert = stock_converter(getattr(base, part))  # which knows FLUX.1 at other widths, too
        monkeypatch.setitem(entry, "checkpoint_mapping_fn", lambda checkpoint, f=convert, **_: f(checkpoint))
        given[part] = cls.from_single_file(str(file), **case.network_config(part))
    pixels = case.stock_pixels(case.pipeline(case.base, **given))
    assert float((pixels - case.pixels).abs().max()) < 1e-5


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_float8_is_the_network_up_to_its_rounding(name: str, written: Callable[[str], Written]) -> None:
    """Four significant bits: a sixteenth of each number at most, or half of the smallest step near zero."""
    case = written(name)
    for file, exact in zip(case.files("fp8"), case.files("diffusion_model"), strict=True):
        with safe_open(file, framework="pt") as opened:
            stored = json.loads(opened.metadata()["_quantization_metadata"])
        assert stored["format_version"] == "1.0" and stored["layers"]
        read, wanted = read_float8(load_file(file), stored["layers"]), load_file(exact)
        assert read.keys() == wanted.keys()
        for key, value in wanted.items():
            if key.removesuffix(".weight") in stored["layers"]:
                bound = value.abs() / 16 + value.abs().max() / 448 * 2.0**-10
                assert bool(((read[key] - value).abs() <= bound).all()), key
            else:
                assert torch.equal(read[key], value), key
        inside = ("blocks.", "layers.", "refiner.")
        matrices = [k for k, value in wanted.items() if value.dim() == 2 and any(part in k for part in inside)]
        assert {key.removesuffix(".weight") for key in matrices} == stored["layers"].keys()


@pytest.mark.parametrize("name", ["sd3", "flux-dev", "qwen-image"])
def test_gguf_is_read_by_diffusers(
    name: str, written: Callable[[str], Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("gguf")
    case = written(name)
    file, exact = case.files("gguf")[0], load_file(case.files("diffusion_model")[0])
    reader = gguf.GGUFReader(file)
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        wanted = exact[tensor.name]
        # half a step of 1/127 of the largest number, and the rounding of that step, which is a float16
        bound = wanted.abs().max() * (0.5 / 127 + 2.0**-11) if tensor.tensor_type.name == "Q8_0" else 0.0
        assert float((values.reshape(wanted.shape) - wanted).abs().max()) <= bound, tensor.name
    assert {tensor.name for tensor in reader.tensors} == exact.keys()
    cls = getattr(diffusers, case.backbone.network_class)
    convert = stock_converter(case.pipeline(case.base).transformer)
    entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[cls.__name__]
    monkeypatch.setitem(entry, "checkpoint_mapping_fn", lambda checkpoint, **_: convert(checkpoint))
    config = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
    network = cls.from_single_file(str(file), quantization_config=config, **case.network_config("transformer"))
    pixels = case.stock_pixels(case.pipeline(case.base, transformer=network))
    error = float((pixels - case.pixels).abs().max())
    print(f"largest difference of pixels: {error:.2g}")
    assert error < 0.05


PUBLISHED = {  # whose configs ship with fastgen -> their networks
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "unet",
    "stabilityai/stable-diffusion-xl-base-1.0": "unet",
    "stabilityai/stable-diffusion-3-medium-diffusers": "transformer",
    "black-forest-labs/FLUX.1-dev": "transformer",
    "black-forest-labs/FLUX.2-dev": "transformer",
    "black-forest-labs/FLUX.2-klein-base-4B": "transformer",
    "Tongyi-MAI/Z-Image": "transformer",
    "Qwen/Qwen-Image": "transformer",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "transformer",
}


@pytest.mark.parametrize(("name", "part"), PUBLISHED.items())
def test_each_tensor_of_a_published_network_has_its_place(name: str, part: str) -> None:
    """At their real sizes, without memory: diffusers' own converter makes of our layout what it was made from."""
    config = json.loads((CONFIGS / name / part / "config.json").read_text())
    cls = getattr(diffusers, config["_class_name"])
    with torch.device("meta"):
        network = cls.from_config(config)
    tensors = network.state_dict()
    if part == "unet":
        original = {f"model.diffusion_model.{unet_name(key, config)}": value for key, value in tensors.items()}
    else:
        original = {entry.name: entry.read() for entry in in_original_layout(of_tensors(tensors), config)}
    function: Any = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[cls.__name__]["checkpoint_mapping_fn"]
    read = function(dict(original), config=network.config)
    assert {key: value.shape for key, value in read.items()} == {key: value.shape for key, value in tensors.items()}
    print(f"{len(tensors)} tensors, {len(original)} in the original layout")
