"""How much do people like to look at a picture? LAION's predictor of ratings, which reads no prompt."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.rewards import weights
from fastgen.rewards.base import CONFIG, Reward
from fastgen.rewards.clip import CLIP_FILES, TOKENIZER_FILES, config_files, load_clip, weight_files

EXAMPLE = "christophschuhmann/improved-aesthetic-predictor"
FILES = ("sac+logos+ava1-l14-linearMSE.safetensors", "sac+logos+ava1-l14-linearMSE.pth")


@dataclass(frozen=True, config=CONFIG)
class Aesthetic(Reward):
    """r(x) = head(e / |e|), with e the CLIP features of the picture: a mean rating, 1 to 10, mostly 4 to 7.

    The head is a stack of linear layers without nonlinearities, width -> 1024 -> 128 -> 64 -> 16 -> 1; its dropout is
    for training only (LAION's predictor v2). Input: as in OpenAI's CLIP; the shorter side is resized to 224, bicubic,
    and the centre is cropped. Gradient: to the pixels of the crop.

    path: the folder with sac+logos+ava1-l14-linearMSE.pth, or a hub id that has this file. The authors publish it in a
    GitHub repository, not on the hub. A .safetensors of the same name works too. clip: ViT-L/14, as a folder or the
    hub id openai/clip-vit-large-patch14."""

    path: str
    clip: str

    input = "pixels"
    differentiable = True
    reads_prompts = False

    def ready(self) -> None:
        weights.check_files(self.path, "path", EXAMPLE, FILES)
        weights.check_files(self.clip, "clip", "openai/clip-vit-large-patch14", *CLIP_FILES, TOKENIZER_FILES)

    def weight_files(self) -> list[Path]:
        return [weights.find(self.path, *FILES), *weight_files(self.clip)]

    def other_files(self) -> list[Path]:
        return config_files(self.clip)

    @property
    def input_size(self) -> str:
        return "shorter side to the network's (224), bicubic, centre crop"

    def score(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
        features = load_clip(self.clip, self.clip, x.device).image(x, round_half=True)
        return load_head(self.path, features.shape[1], x.device)(features).squeeze(1)


def linear_stack(width: int) -> nn.Sequential:
    """The head of aesthetic and image_reward. Its layers have the published indices; dropouts became identities."""
    sizes = {0: (width, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    return nn.Sequential(*(nn.Linear(*sizes[i]) if i in sizes else nn.Identity() for i in range(8)))


@lru_cache(maxsize=4)
def load_head(path: str, width: int, device: torch.device) -> nn.Module:
    file = weights.find(path, *FILES)
    head = nn.ModuleDict({"layers": linear_stack(width)})
    weights.load_strictly(head, weights.read_tensors(file), file)
    return weights.freeze(head, device)["layers"]
