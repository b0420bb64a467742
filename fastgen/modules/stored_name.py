"""How a tensor of a network is named in the pretrained weights."""

from torch import nn

from fastgen.modules.inputs import ExtraInputs
from fastgen.modules.kept_blocks import KeptBlocks
from fastgen.modules.lora import is_adapter_layer


def stored_name(module: nn.Module, name: str) -> str:
    """The name of a tensor in the pretrained weights: without the wrappers around its layer (added inputs, LoRA), and
    with the place that its block had there."""
    *path, last = name.split(".")
    kept = []
    for part in path:
        wrapped = (isinstance(module, ExtraInputs) and part == "embedding") or (
            is_adapter_layer(module) and part == "base_layer"
        )
        if not wrapped:
            kept.append(str(module.places[int(part)]) if isinstance(module, KeptBlocks) else part)
        module = module.get_submodule(part)
    return ".".join([*kept, last])
