"""Does a picture look more like one text or another, according to CLIP?"""

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from pydantic import field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.rewards import weights
from fastgen.rewards.base import CONFIG, Reward
from fastgen.rewards.clip import CLIP_FILES, TOKENIZER_FILES, load_clip, text_files, weight_files
from fastgen.rewards.clip_score import EXAMPLE

PLACE = "{prompt}"


@dataclass(frozen=True, config=CONFIG)
class ClipContrast(Reward):
    """r(x, prompt) = log sigmoid(s (cos(CLIP image, CLIP towards) - cos(CLIP image, CLIP away)))

    CLIP's own two-class probability that the picture shows `towards` rather than `away`, in nats, at most 0; s is the
    checkpoint's logit scale. A reward of style, say, that leaves out what both texts share. -log 2 is undecided.
    Derived from CLIP's zero-shot classification, arXiv 2103.00020, section 3.1. Input and gradient: as in clip_score.

    path: a transformers CLIPModel with its tokenizer, as a folder or a hub id. towards, away: the texts, in which
    {prompt} stands for the prompt: "{prompt}, flat" and "{prompt}, 3d"."""

    path: str
    towards: str
    away: str

    input = "pixels"
    differentiable = True

    @field_validator("towards", "away")
    @classmethod
    def _text(cls, value: str) -> str:
        if not value.strip() or value.replace(PLACE, "").count("{"):
            raise ValueError(f"give a text in which {PLACE} stands for the prompt, got {value!r}")
        return value

    @property
    def reads_prompts(self) -> bool:  # type: ignore[override]
        return PLACE in self.towards + self.away

    def ready(self) -> None:
        if self.towards == self.away:
            raise ValueError("away: it is the same text as towards; name what the pictures are to turn away from")
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
        towards, away = (clip.text([text.replace(PLACE, p) for p in prompts]) for text in (self.towards, self.away))
        return F.logsigmoid(clip.scale * (clip.image(x) * (towards - away)).sum(1))
