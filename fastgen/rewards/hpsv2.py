"""Human Preference Score v2 and v2.1: CLIP-H fine-tuned on rankings of generated pictures."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.registry import here_or_shipped
from fastgen.rewards import images, weights
from fastgen.rewards.base import CONFIG, Reward
from fastgen.rewards.clip import Texts

EXAMPLE = "xswu/HPSv2"
FILES = {
    "v2": ("HPS_v2_compressed.safetensors", "HPS_v2_compressed.pt"),
    "v2.1": ("HPS_v2.1_compressed.safetensors", "HPS_v2.1_compressed.pt"),
}


@dataclass(frozen=True, config=CONFIG)
class HPSv2(Reward):
    """r(x, prompt) = cos(image, text) without logit scale, .20 to .37; published tables show 100 r. The scales of v2
    and v2.1 differ: compare scores only within one version, and preferably within one prompt (Wu et al.,
    arXiv 2306.09341).

    Input: the longer side is resized to 224, bicubic with antialiasing; the other side is padded with zeros; then the
    picture is normalised. What the filter gives outside [0, 1] stays, as in the authors' code. The official numbers
    depend on the version of torchvision, whose tensor resize antialiases by default since 0.17. Here the resize always
    antialiases. A picture whose longer side is already 224 is padded too, which the official code omits. Gradient: to
    all pixels.

    path: the folder with HPS_v2_compressed.pt or HPS_v2.1_compressed.pt, or the hub id xswu/HPSv2. The architecture is
    open_clip's ViT-H-14, or the one that an open_clip_config.json in a local folder describes."""

    path: str
    version: Literal["v2", "v2.1"] = "v2.1"

    input = "pixels"
    differentiable = True

    def ready(self) -> None:
        weights.check_package("open_clip", self.label, "scores")
        weights.check_files(self.path, "path", EXAMPLE, FILES[self.version])

    def weight_files(self) -> list[Path]:
        return [weights.find(self.path, *FILES[self.version])]

    def other_files(self) -> list[Path]:
        return own_config(self.path)

    @property
    def input_size(self) -> str:
        return "longer side to the network's (224), bicubic, padded with black"

    def score(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
        network = load(self.path, self.version, x.device)
        return (network.image(x) * network.text(prompts)).sum(1)


def own_config(path: str) -> list[Path]:
    """The file of an architecture other than ViT-H-14, if a local folder has one."""
    return weights.present(here_or_shipped(path), "open_clip_config.json")


class Network:
    """open_clip's CLIP, frozen. Features have length 1."""

    def __init__(self, path: str, version: str, device: torch.device):
        import open_clip

        file, own = weights.find(path, *FILES[version]), own_config(path)
        config: dict[str, Any] = (
            weights.read_json(own[0])["model_cfg"] if own else open_clip.get_model_config("ViT-H-14")
        )
        model = open_clip.CLIP(**config)
        tensors = weights.read_tensors(file)
        weights.load_strictly(model, tensors.get("state_dict", tensors), file)
        self.model, self.device = weights.freeze(model, device), device
        self.tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
        self.size: int = config["vision_cfg"]["image_size"]
        self.texts = Texts()

    def image(self, pixels: Tensor) -> Tensor:
        padded = images.longest_side_padded(pixels, self.size)
        return F.normalize(self.model.encode_image(images.normalise(padded)), dim=-1)

    def text(self, prompts: Sequence[str]) -> Tensor:
        return self.texts(prompts, self._encode, self.device)

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        return F.normalize(self.model.encode_text(self.tokenizer(list(prompts)).to(self.device)), dim=-1)


@lru_cache(maxsize=2)
def load(path: str, version: str, device: torch.device) -> Network:
    """The network, cached. Raises ValueError unless the checkpoint has exactly its tensors."""
    return Network(path, version, device)
