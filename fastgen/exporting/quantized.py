"""Networks whose matrices take a byte a number: float8 with a scale per tensor, as ComfyUI reads it, and GGUF."""

import importlib.util
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgen.data.files import unused_sibling
from fastgen.exporting.files import Entry

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
BLOCKS = re.compile(
    r"(.*blocks|layers|noise_refiner|context_refiner)\.\d+\..+\.weight"
)  # ends of the network stay as they are
GGUF_NAMES = {  # network -> what readers of GGUF files call it
    "FluxTransformer2DModel": "flux",
    "SD3Transformer2DModel": "sd3",
    "QwenImageTransformer2DModel": "qwen_image",
}
GGUF_BLOCK = 32  # numbers that share a scale in GGUF's Q8_0


def is_matrix(entry: Entry) -> bool:
    """Whether this is the weight of a linear layer inside a block of the network, where almost all numbers are."""
    return len(entry.shape) == 2 and min(entry.shape) > 1 and BLOCKS.fullmatch(entry.name) is not None


def float8_entries(entries: Iterable[Entry]) -> tuple[list[Entry], dict[str, str]]:
    """The entries with their matrices in float8, and the metadata of the file, as in ComfyUI's QUANTIZATION.md:

        scale = max |W| / 448,   W8 = float8_e4m3fn(W / scale),   the reader computes with W8 scale

    The scale is a float32 scalar LAYER.weight_scale. `_quantization_metadata` lists the layers."""
    quantized, layers = list[Entry](), dict[str, dict[str, str]]()
    for entry in entries:
        if not is_matrix(entry):
            quantized.append(entry)
            continue
        layer = entry.name.removesuffix(".weight")
        layers[layer] = {"format": "float8_e4m3fn"}
        read = entry.read
        quantized.append(Entry(entry.name, entry.shape, torch.float8_e4m3fn, lambda read=read: to_float8(read())))  # type: ignore[misc]
        quantized.append(Entry(f"{layer}.weight_scale", (), torch.float32, lambda read=read: float8_scale(read())))  # type: ignore[misc]
    return quantized, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def float8_scale(weight: Tensor) -> Tensor:
    """A scalar, float32; 1 for a weight that is all zero. Raises ValueError if it is not finite."""
    largest = weight.detach().abs().max().float()
    if not bool(largest.isfinite()):
        raise ValueError("a weight is not finite; export an earlier checkpoint")
    return largest / LARGEST if bool(largest > 0) else torch.ones(())


def to_float8(weight: Tensor) -> Tensor:
    return (weight.float() / float8_scale(weight)).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def check_gguf() -> None:
    """Raises ValueError if the library that writes GGUF files is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("GGUF files are written by the package gguf; pip install 'fastgen-distill[gguf]'")


def write_gguf(path: Path, entries: Sequence[Entry], architecture: str) -> None:
    """Writes a GGUF file, by the library of that name: matrices as Q8_0 (8 bits, a scale for 32 numbers), the rest as
    float32. architecture: what readers call the network.

    Raises ValueError if the library is not installed, or for tensors of more than four dimensions."""
    check_gguf()
    import gguf

    if deep := next((entry for entry in entries if len(entry.shape) > 4), None):
        raise ValueError(f"GGUF tensors have at most 4 dimensions, and {deep.name} has {len(deep.shape)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = unused_sibling(path, "partial")
    quantized, plain = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32
    writer = gguf.GGUFWriter(str(partial), architecture)
    try:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
        kinds = [quantized if is_matrix(e) and e.shape[-1] % GGUF_BLOCK == 0 else plain for e in entries]
        for entry, kind in zip(entries, kinds, strict=True):
            rows, width = math.prod(entry.shape[:-1]), math.prod(entry.shape[-1:])
            size = rows * width // GGUF_BLOCK * (GGUF_BLOCK + 2) if kind == quantized else 4 * rows * width
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry, kind in zip(entries, kinds, strict=True):
            writer.write_tensor_data(gguf.quants.quantize(entry.read().float().numpy(), kind))
        writer.close()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
