"""Under which names diffusers reads the tensors of a network's files.

Files on the hub are as old as their networks. diffusers renames or leaves out some of their tensors as it reads them
(`ModelMixin.from_pretrained`); what reads the same files one tensor at a time has to do the same."""

import re
from collections.abc import Iterable
from pathlib import Path

from fastgen.backbones.folder import read_json

# of an attention over the places of a picture, as diffusers stored it before its version 0.17 (VAEs, UNet2DModel)
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_NAME = re.compile(rf"(.*\battentions\.\d+\.)({'|'.join(OLD)})(\.(?:weight|bias))")


def names_read(part: Path, stored: Iterable[str]) -> dict[str, str]:
    """name of a tensor in the network -> its name in a file, of those that diffusers reads. part: the folder of the
    component, whose config.json names the class. Wan's image-to-video networks on the hub, for example, hold a norm
    that their class does not have."""
    import diffusers  # a command that only checks its arguments does not load it

    cls = getattr(diffusers, str(read_json(part / "config.json").get("_class_name")), None)
    left_out = getattr(cls, "_keys_to_ignore_on_load_unexpected", None) or ()
    return {name_read(key): key for key in stored if not any(re.search(pattern, key) for pattern in left_out)}


def name_read(stored: str) -> str:
    old = OLD_NAME.fullmatch(stored)
    return stored if old is None else old[1] + OLD[old[2]] + old[3]
