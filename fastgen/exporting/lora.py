"""An adapter's file with the key names that ComfyUI and other programs look for.

    family               keys                                               who reads them, besides diffusers
    SD 1.5, 2.1, XL      lora_unet_<layer>.lora_down.weight, .alpha         ComfyUI, and by diffusers' word A1111
    SD 3, FLUX.1 and 2   transformer.<layer>.lora_A.weight, as diffusers'   ComfyUI, which knows them as parts of the
                                                                            authors' fused tensors
    Z-Image              diffusion_model.<layer>.lora_A.weight              ComfyUI, likewise
    Wan, Qwen-Image      diffusion_model.<original layer>.lora_A.weight     ComfyUI's general form

B is already multiplied by alpha / rank in an export, so that the kohya form says alpha = rank and the others say
nothing."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastgen.exporting.layouts import original_layout

KOHYA, DIFFUSERS, PREFIXED, GENERAL = "kohya", "diffusers", "prefixed", "general"
KINDS = {  # network class -> how its adapters are named
    "UNet2DConditionModel": KOHYA,
    "SD3Transformer2DModel": DIFFUSERS,
    "FluxTransformer2DModel": DIFFUSERS,
    "Flux2Transformer2DModel": DIFFUSERS,
    "ZImageTransformer2DModel": PREFIXED,
    "WanTransformer3DModel": GENERAL,
    "QwenImageTransformer2DModel": GENERAL,
}


def lora_layers(adapter: Mapping[str, Tensor], network: Mapping[str, Any]) -> dict[str, Tensor]:
    """adapter: as in an export, `<component>.<layer>.lora_A.weight` [rank, in] and `lora_B` [out, rank]. network: the
    config.json of the network that it is for. Raises ValueError if no program but diffusers reads such adapters."""
    kind = KINDS.get(str(network.get("_class_name")))
    if kind is None:
        raise ValueError(f"no other program is known to read adapters of a {network.get('_class_name')}")
    if kind == DIFFUSERS:
        return dict(adapter)
    if kind == PREFIXED:
        return {"diffusion_model." + name.partition(".")[2]: value for name, value in adapter.items()}
    if kind == KOHYA:
        from diffusers.utils import convert_state_dict_to_kohya

        return convert_state_dict_to_kohya(dict(adapter))
    layout, layers = original_layout(network), {}
    for name, value in adapter.items():
        layer, _, side = name.partition(".lora_")
        place = layout.place(layer.partition(".")[2] + ".weight")
        if place.parts > 1 or place.swapped:
            raise ValueError(f"the adapter of {layer} cannot be renamed: it is a part of {place.name}")
        layers[f"diffusion_model.{place.name.removesuffix('.weight')}.lora_{side}"] = value
    return layers
