"""How well does a picture match its prompt, according to CLIP?"""

from collections.abc import Sequence
from pathlib import Path

from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.rewards import weights
from fastgen.rewards.base import CONFIG, Reward
from fastgen.rewards.clip import CLIP_FILES, TOKENIZER_FILES, load_clip, text_files, weight_files

EXAMPLE = "openai/clip-vit-large-patch14"


@dataclass(frozen=True, config=CONFIG)
class ClipScore(Reward):
    """r(x, prompt) = cos(CLIP image, CLIP text), in [-1, 1]; photographs score .2 to .35 with ViT-L/14.

    Hessel et al. (arXiv 2104.08718) report 2.5 max(r, 0), and torchmetrics reports 100 max(r, 0). The RL repositories
    use r itself, as we do here. Input: the shorter side is resized to 224 (the checkpoint's own size), bicubic, and
    the centre is cropped. Prompts are cut at 77 tokens. Gradient: to the pixels of the crop.

    path: a transformers CLIPModel with its tokenizer, as a folder or a hub id such as
    openai/clip-vit-large-patch14."""

    path: str

    input = "pixels"
    differentiable = True

    def ready(self) -> None:
        weights.check_files(self.path, "path", EXAMPLE, *CLIP_FILES, TOKENIZER_FILES)

    def weight_files(self) -> list[Path]:
        return weight_files(self.path)

    def other_files(self) -> list[Path]:
        return text_files(self.path, self.path)

    @property
    def input_size(self) -> str:
        return "shorter side to the network's (224), bicubic, centre crop"

    def score(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
        clip = load_clip(self.path, self.path, x.device)
        return (clip.image(x) * clip.text(prompts)).sum(1)
