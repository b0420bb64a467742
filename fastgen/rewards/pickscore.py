"""Which picture would users pick? A CLIP-H fine-tuned on their choices."""

from collections.abc import Sequence
from pathlib import Path

from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.rewards import weights
from fastgen.rewards.base import CONFIG, Reward
from fastgen.rewards.clip import CLIP_FILES, TOKENIZER_FILES, load_clip, text_files, weight_files

EXAMPLE = "yuvalkirstain/PickScore_v1"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@dataclass(frozen=True, config=CONFIG)
class Pickscore(Reward):
    """r(x, prompt) = exp(logit_scale) cos(image, text), 18 to 24; logit_scale is the checkpoint's, near log 100.

    Source: Kirstain et al., arXiv 2305.01569. RL repositories divide by 26, which is `weight: 0.0385`. Input and
    gradient are as in clip_score, with the checkpoint's own size, 224.

    path: a transformers CLIPModel, as a folder or the hub id yuvalkirstain/PickScore_v1. tokenizer: the folder or hub
    id of its processor. By default it is `path` if that folder has a tokenizer, and the hub id that the authors use if
    `path` is a hub id."""

    path: str
    tokenizer: str | None = None

    input = "pixels"
    differentiable = True

    @property
    def tokenizer_path(self) -> str:
        if self.tokenizer is not None:
            return self.tokenizer
        has_tokenizer = any((Path(self.path) / name).is_file() for name in TOKENIZER_FILES)
        return self.path if has_tokenizer else TOKENIZER

    def ready(self) -> None:
        weights.check_files(self.path, "path", EXAMPLE, *CLIP_FILES)
        if Path(self.path).exists() and self.tokenizer is None and self.tokenizer_path != self.path:
            raise ValueError(
                f"tokenizer: {self.path} has no tokenizer; give tokenizer, a local folder or the hub id {TOKENIZER}"
            )
        weights.check_files(self.tokenizer_path, "tokenizer", TOKENIZER, TOKENIZER_FILES)

    def weight_files(self) -> list[Path]:
        return weight_files(self.path)

    def other_files(self) -> list[Path]:
        return text_files(self.path, self.tokenizer_path)

    @property
    def input_size(self) -> str:
        return "shorter side to the network's (224), bicubic, centre crop"

    def score(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
        clip = load_clip(self.path, self.tokenizer_path, x.device)
        return clip.scale * (clip.image(x) * clip.text(prompts)).sum(1)
