"""What ComfyUI makes of our files, from what is publicly known of its key names, sampler names and node inputs.

Which rows of the authors' fused tensors belong to which tensor of diffusers is asked of diffusers' own converters."""

import itertools
import re
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor

# Layers of diffusers whose adapters ComfyUI finds in a fused or renamed network, by the end of their names.
KNOWN = {
    "transformer": (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        *("attn.to_out.0", "attn.to_add_out", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"),
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),  # FLUX.2
        *("attn.to_qkv_mlp_proj", "attn.to_out", "attention.to_q", "attention.to_k", "attention.to_v"),
        *("attention.to_out.0",),  # Z-Image
        *("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear"),
    ),
    "unet": (
        *(f"{attention}.to_{part}" for attention in ("attn1", "attn2") for part in ("q", "k", "v", "out.0")),
        *("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "time_emb_proj", "conv1", "conv2", "conv_shortcut"),
        *("downsamplers.0.conv", "upsamplers.0.conv"),
    ),
}
NODES = {  # class -> the names of its inputs, and how many outputs it has
    "CheckpointLoaderSimple": ({"ckpt_name"}, 3),
    "UNETLoader": ({"unet_name", "weight_dtype"}, 1),
    "UnetLoaderGGUF": ({"unet_name"}, 1),
    "LoraLoaderModelOnly": ({"model", "lora_name", "strength_model"}, 1),
    "ModelSamplingDiscrete": ({"model", "sampling", "zsnr"}, 1),
    "CLIPLoader": ({"clip_name", "type"}, 1),
    "DualCLIPLoader": ({"clip_name1", "clip_name2", "type"}, 1),
    "TripleCLIPLoader": ({"clip_name1", "clip_name2", "clip_name3"}, 1),
    "VAELoader": ({"vae_name"}, 1),
    "CLIPTextEncode": ({"clip", "text"}, 1),
    "FluxGuidance": ({"conditioning", "guidance"}, 1),
    "EmptyLatentImage": ({"width", "height", "batch_size"}, 1),
    "EmptySD3LatentImage": ({"width", "height", "batch_size"}, 1),
    "EmptyFlux2LatentImage": ({"width", "height", "batch_size"}, 1),
    "EmptyHunyuanLatentVideo": ({"width", "height", "length", "batch_size"}, 1),
    "Wan22ImageToVideoLatent": ({"vae", "width", "height", "length", "batch_size"}, 1),
    "RandomNoise": ({"noise_seed"}, 1),
    "DisableNoise": (set(), 1),
    "CFGGuider": ({"model", "positive", "negative", "cfg"}, 1),
    "KSamplerSelect": ({"sampler_name"}, 1),
    "ManualSigmas": ({"sigmas"}, 1),
    "SamplerCustomAdvanced": ({"noise", "guider", "sampler", "sigmas", "latent_image"}, 2),
    "VAEDecode": ({"samples", "vae"}, 1),
    "SaveImage": ({"images", "filename_prefix"}, 0),
    "CreateVideo": ({"images", "fps"}, 1),
    "SaveVideo": ({"video", "filename_prefix", "format", "codec"}, 0),
}


def stock_converter(network: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """From the original layout to diffusers', by diffusers' own function. That of FLUX.1 has the width of the
    published network written into it, 3072; here it has this network's."""
    name, config = type(network).__name__, network.config
    function: Any = SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"]
    if name == "FluxTransformer2DModel":
        code = function.__code__
        constants = tuple(network.inner_dim if value == 3072 else value for value in code.co_consts)
        function = FunctionType(code.replace(co_consts=constants), function.__globals__)
    return lambda checkpoint: function(dict(checkpoint), config=config)


def lora_deltas(
    lora: dict[str, Tensor], original: dict[str, Tensor], network: Any, component: str
) -> tuple[dict[str, Tensor], set[str]]:
    """What the reader adds to the tensors of the original layout, and the keys that it did not use.

    original: the network's tensors in that layout, for a UNet with the prefix model.diffusion_model."""
    rows = traced_rows(original, network)
    found: dict[str, tuple[str, Tensor]] = {}  # key -> tensor and its rows
    for name, where in rows.items():
        layer = name.removesuffix(".weight")
        if not name.endswith(".weight") or not layer.endswith(KNOWN[component]):
            continue
        if component == "unet":
            found["lora_unet_" + layer.replace(".", "_")] = where
        elif any(part in type(network).__name__ for part in ("SD3", "Flux", "QwenImage")):
            found[f"transformer.{layer}"] = where
        elif "ZImage" in type(network).__name__:
            found[f"diffusion_model.{layer}"] = where
    for name in original:
        if name.endswith(".weight"):
            found["diffusion_model." + name.removesuffix(".weight")] = (name, torch.arange(original[name].shape[0]))
    deltas = {name: torch.zeros_like(value) for name, value in original.items()}
    unused = set(lora)
    for key, (name, index) in found.items():
        up, down, alpha = (lora_part(lora, key, unused, *names) for names in LORA_NAMES)
        if up is None or down is None:
            continue
        scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
        deltas[name][index] += scale * (up.flatten(1) @ down.flatten(1)).reshape(deltas[name][index].shape)
    return deltas, unused


LORA_NAMES = ((".lora_up.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_A.weight"), (".alpha",))


def lora_part(lora: dict[str, Tensor], key: str, unused: set[str], *ends: str) -> Tensor | None:
    for end in ends:
        if key + end in lora:
            unused.discard(key + end)
            return lora[key + end]
    return None


def traced_rows(original: dict[str, Tensor], network: Any) -> dict[str, tuple[str, Tensor]]:
    """diffusers' name -> the tensor of the original layout that it comes from, and which rows of it."""
    names, numbered = list(original), {}
    for i, (name, value) in enumerate(original.items()):
        row = torch.arange(value.shape[0], dtype=torch.float64) + i * 1e6
        numbered[name] = row.reshape(-1, *[1] * (value.dim() - 1)).expand(value.shape).clone()
    found = {}
    for name, value in stock_converter(network)(numbered).items():
        first = value.reshape(value.shape[0], -1)[:, 0].long()
        found[name] = (names[int(first[0]) // 1_000_000], first % 1_000_000)
    return found


def read_float8(tensors: dict[str, Tensor], layers: dict[str, Any]) -> dict[str, Tensor]:
    """A quantised checkpoint as ComfyUI's QUANTIZATION.md describes it, with its weights in float32 again."""
    found = {}
    for name, value in tensors.items():
        if name.endswith(".weight_scale"):
            continue
        layer = name.removesuffix(".weight")
        if layer in layers:
            assert layers[layer] == {"format": "float8_e4m3fn"} and value.dtype == torch.float8_e4m3fn
            value = value.float() * tensors[f"{layer}.weight_scale"]
        found[name] = value
    return found


def check_graph(nodes: dict[str, Any]) -> None:
    """Every node is known and has the inputs it needs, and every link leads to an output that is there."""
    for node in nodes.values():
        names, _ = NODES[node["class_type"]]
        assert set(node["inputs"]) == names, node
        for value in node["inputs"].values():
            if isinstance(value, list):
                assert value[1] < NODES[nodes[value[0]]["class_type"]][1], node


def parse_sigmas(text: str) -> list[float]:
    """As the node ManualSigmas does: any run of digits with dots."""
    return [float(found) for found in re.findall(r"[-+]?(?:\d*\.*\d+)", text)]


def sample(
    predict: Callable[[Tensor, float], Tensor],
    sampler: str,
    sigmas: list[float],
    noise: Callable[[int], Tensor],
    flow: bool,
) -> Tensor:
    """Sampling with the named sampler. predict(x, sigma): the clean prediction. noise(i): the fresh noise of step i, 0
    for the initial one. flow: x = (1 - sigma) x0 + sigma noise; else x = x0 + sigma noise."""
    x = noise(0) * (sigmas[0] if flow else (1 + sigmas[0] ** 2) ** 0.5)
    for i, (sigma, after) in enumerate(itertools.pairwise(sigmas), start=1):
        x0 = predict(x, sigma)
        if sampler == "euler":
            x = x + (x - x0) / sigma * (after - sigma)
        else:
            assert sampler == "lcm"
            keep = 1 - after if flow else 1.0
            x = x0 if after == 0 else keep * x0 + after * noise(i)
    return x
