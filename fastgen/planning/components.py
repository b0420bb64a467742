"""The text encoders and the VAE of a pipeline, as a plan counts them."""

import dataclasses

import torch
from torch import nn

from fastgen.backbones.base import Backbone
from fastgen.backbones.loading import component_class
from fastgen.backbones.pipeline import PipelineBackbone
from fastgen.planning.weightless import size, tensors, weightless
from fastgen.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Component:
    """A text encoder or the VAE. held: bytes that are on the GPU all the time. turn: bytes of an encoder that is there
    only while prompts are encoded (`backbone.encoders: offload`)."""

    name: str
    is_encoder: bool
    parameters: int
    held: int
    use: str
    turn: int = 0

    def prepared(self) -> "Component":
        """The same where prompts are prepared: text encoders are not loaded."""
        return dataclasses.replace(self, held=0, turn=0) if self.is_encoder else self

    def offloaded(self) -> "Component":
        """The same with text encoders that are on the GPU in turn."""
        return dataclasses.replace(self, held=0, turn=self.held + self.turn) if self.is_encoder else self

    def halved(self) -> "Component":
        """The same with text encoders of half the bytes."""
        return dataclasses.replace(self, held=self.held // 2, turn=self.turn // 2) if self.is_encoder else self


def components_of(recipe: Recipe, backbone: Backbone) -> tuple[Component, ...]:
    """The pipeline's text and image encoders and VAE. Also gives the backbone its VAE, without weights."""
    if not isinstance(backbone, PipelineBackbone):
        return ()
    found = []
    kinds = ("text_encoder", "connectors", "vae", *(("image_encoder",) if backbone.takes_image else ()))
    for name, entry in backbone.components.items():
        if not isinstance(entry, list) or entry[0] is None or not name.startswith(kinds):
            continue
        dtype = dtype_of(name, entry[1], backbone)
        with torch.device("meta"):
            cls = component_class(*entry)
            if entry[0] != "transformers":
                module = cls.from_config(cls.load_config(backbone.source, subfolder=name, local_files_only=True))
            else:
                module = cls(cls.config_class.from_pretrained(f"{backbone.source}/{name}"))
        module = nn.Module.to(module, dtype)  # diffusers' own warns against casting weights, and there are none
        what = "images" if name == "image_encoder" else "prompts"
        use = f"encoding {what}" if name != "vae" else "pictures" + (", data" if recipe.objective.needs else "")
        held, turn = size(tensors(module)), 0
        if name == "vae":
            vars(backbone)["vae"] = weightless(module).requires_grad_(False).eval()
            backbone.set_up_vae(module)
        elif not recipe.data.encodes_prompts:
            use, held = f"not loaded: prepared {what}", 0
        elif backbone.config.encoders == "offload" and name != "image_encoder":
            use, held, turn = "encoding prompts, in turn", 0, held
        found.append(Component(name, name != "vae", sum(p.numel() for p in module.parameters()), held, use, turn))
    return tuple(found)


def dtype_of(name: str, class_name: str, backbone: PipelineBackbone) -> torch.dtype:
    """The dtype in which a run loads a component."""
    chosen = backbone.config.encoder_dtype if name.startswith(("text_encoder", "connectors")) else None
    if chosen is not None:
        return getattr(torch, chosen)
    return torch.float32 if class_name == "AutoencoderKLWan" else backbone.dtype
