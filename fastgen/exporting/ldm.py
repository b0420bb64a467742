"""Stable Diffusion 1.5 and XL in one file, in the layout of CompVis' and Stability's checkpoints.

    model.diffusion_model.*                     the UNet: input_blocks, middle_block, output_blocks
    first_stage_model.*                         the VAE: encoder.down, decoder.up; attention as 1 x 1 convolutions
    cond_stage_model.transformer.text_model.*   the text encoder of 1.5, as transformers names it
    conditioner.embedders.0.transformer.*       the first one of XL, likewise
    conditioner.embedders.1.model.*             the second one of XL, as open_clip names it

The names are those that diffusers' `from_single_file` reads (`loaders/single_file_utils.py`)."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from fastgen.backbones.folder import read_index, read_json
from fastgen.exporting.files import Entry, read_component
from fastgen.exporting.transformers import joined

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {  # of the UNet's blocks
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}  # of the VAE
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OPEN_CLIP_OUTSIDE = {  # of its blocks
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}


def checkpoint_entries(folder: Path) -> Iterator[Entry]:
    """All tensors of the pipeline in this folder. Raises ValueError if it is neither a Stable Diffusion 1.5 nor XL."""
    kind = read_index(folder)["_class_name"]
    unet = read_json(folder / "unet/config.json")
    check_unet(unet, kind)
    for entry in read_component(folder / "unet"):
        yield entry.renamed(f"model.diffusion_model.{unet_name(entry.name, unet)}")
    vae = read_json(folder / "vae/config.json")
    for entry in read_component(folder / "vae"):
        yield vae_entry(entry, len(vae["block_out_channels"]))
    first = "conditioner.embedders.0" if kind == "StableDiffusionXLPipeline" else "cond_stage_model"
    for entry in text_entries(folder / "text_encoder"):
        yield entry.renamed(f"{first}.transformer.{entry.name}")
    if kind == "StableDiffusionXLPipeline":
        yield from open_clip_entries(text_entries(folder / "text_encoder_2"), "conditioner.embedders.1.model")


def check_unet(unet: dict[str, Any], kind: str) -> None:
    if kind not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        raise ValueError(f"a {kind} has no single-file checkpoint in this layout; Stable Diffusion 1.5 and XL have")
    if kind == "StableDiffusionPipeline" and unet.get("use_linear_projection"):
        raise ValueError(
            "a single-file checkpoint of Stable Diffusion 2 needs the last block of its text encoder, which the "
            "diffusers folder does not have"
        )
    if not isinstance(unet.get("layers_per_block", 2), int):
        raise ValueError("a UNet whose blocks differ in their number of layers has no single-file checkpoint")


# --- UNet


def unet_name(name: str, unet: dict[str, Any]) -> str:
    """The LDM name of a UNet2DConditionModel's tensor. unet: its config."""
    for own, theirs in OUTSIDE.items():
        if name.startswith(f"{own}."):
            return theirs + name[len(own) :]
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        place = 2 * int(found[2]) + (found[1] == "attentions")
        return f"middle_block.{place}.{block_part(found[1], found[3])}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    if not found:
        raise ValueError(f"a single-file checkpoint has no place for the UNet's {name}")
    side, block, part, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    layers = unet.get("layers_per_block", 2) + 1  # in the decoder; in the encoder, with the downsampler
    if side == "down":
        if part == "downsamplers":
            return f"input_blocks.{layers * (block + 1)}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{1 + layers * block + layer}.{int(part == 'attentions')}.{block_part(part, rest)}"
    if part == "upsamplers":
        after = 1 + ("Attn" in unet["up_block_types"][block])
        return f"output_blocks.{layers * (block + 1) - 1}.{after}.{rest}"
    return f"output_blocks.{layers * block + layer}.{int(part == 'attentions')}.{block_part(part, rest)}"


def block_part(part: str, rest: str) -> str:
    if part == "attentions":
        return rest
    own, _, end = rest.partition(".")
    return f"{RESNET[own]}.{end}"


# --- VAE


def vae_entry(entry: Entry, blocks: int) -> Entry:
    """blocks: how many the encoder has, and the decoder, which counts them from the other end there."""
    name = entry.name
    if found := re.fullmatch(r"(.+\.mid_block)\.attentions\.0\.(.+)\.(weight|bias)", name):
        name = f"{found[1]}.attn_1.{ATTENTION[found[2]]}.{found[3]}"
        if found[3] == "weight" and found[2] != "group_norm":
            entry = entry.changed(lambda rows: rows[:, :, None, None], (*entry.shape, 1, 1))
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.", "mid.").replace("conv_norm_out", "norm_out").replace("_shortcut", "!")
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)
    return entry.renamed("first_stage_model." + name.replace("conv!", "nin_shortcut"))


# --- text encoders


def text_entries(folder: Path) -> Iterator[Entry]:
    """Named as up to transformers 5.5, where the encoder is the part text_model of a CLIPTextModel."""
    for entry in read_component(folder, "transformers"):
        inside = entry.name.startswith(("text_model.", "text_projection."))
        if not entry.name.endswith("position_ids"):  # a buffer of old versions
            yield entry if inside else entry.renamed(f"text_model.{entry.name}")


def open_clip_entries(entries: Iterable[Entry], prefix: str) -> Iterator[Entry]:
    """A CLIPTextModelWithProjection as open_clip stores it: q, k and v are one tensor, the projection transposed."""
    separate: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        if entry.name in OPEN_CLIP_OUTSIDE:
            yield entry.renamed(f"{prefix}.{OPEN_CLIP_OUTSIDE[entry.name]}")
        elif entry.name == "text_projection.weight":
            shape = (entry.shape[1], entry.shape[0])
            yield entry.changed(transposed, shape, f"{prefix}.text_projection")
        elif found := re.fullmatch(
            r"text_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", entry.name
        ):
            name = f"{prefix}.transformer.resblocks.{found[1]}.attn.in_proj_{found[3]}"
            parts = separate.setdefault(name, {})
            parts[found[2]] = entry
            if len(parts) == 3:
                yield joined(name, [parts[letter] for letter in "qkv"])
        elif found := re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", entry.name):
            yield entry.renamed(f"{prefix}.transformer.resblocks.{found[1]}.{OPEN_CLIP[found[2]]}.{found[3]}")
        else:
            raise ValueError(f"a single-file checkpoint has no place for the text encoder's {entry.name}")


def transposed(matrix: Tensor) -> Tensor:
    return matrix.T.contiguous()
