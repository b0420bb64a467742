"""The digits data set, its prompts, and a classifier for its pictures."""

import re
from functools import lru_cache
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from fastgen.registry import shipped

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

PROMPTS = ("a handwritten {}", "the digit {}", "a {}", "the number {}")

IMAGE_SIZE = 32
HELD_OUT = 599
DATA = shipped("assets/digits/digits.safetensors")


def assets_dir() -> Path:
    """The folder of the weights that ship with fastgen."""
    return shipped("assets")


@lru_cache(maxsize=4)
def load_digits(split: str, size: int = IMAGE_SIZE) -> tuple[Tensor, Tensor]:
    """1,797 handwritten digits (assets/digits), smoothly enlarged from 8x8 to `size` x `size`.

    `split` is "train" (1,198 digits) or "test" (599 digits, stratified by class; nothing is ever trained on these).
    Returns pixels [N, 3, size, size] float32 in [0, 1], white on black, and labels [N] int64. Do not write into them:
    the two tensors are shared between callers.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    data = load_file(DATA)
    small = data[f"{split}.images"].float().unsqueeze(1) / 16
    pixels = F.interpolate(small, size=(size, size), mode="bicubic").clamp(0, 1)
    return pixels.repeat(1, 3, 1, 1), data[f"{split}.labels"].long()


def prompt_for(label: int, wording: int = 0) -> str:
    """The prompt that asks for digit `label` (0..9) in one of the `PROMPTS` wordings."""
    return PROMPTS[wording].format(DIGIT_WORDS[label])


def label_of(prompt: str) -> int:
    """The digit (0..9) a prompt asks for: the first digit word in it, upper or lower case."""
    for word in re.findall(r"[a-z]+", prompt.lower()):
        if word in DIGIT_WORDS:
            return DIGIT_WORDS.index(word)
    raise ValueError(f"no digit word ({', '.join(DIGIT_WORDS)}) in the prompt {prompt!r}")


class DigitsClassifier(nn.Module):
    """A small convolutional network that classifies digits. Its features also serve for the Frechet distance."""

    feature_dim = 48

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.BatchNorm2d(16),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.BatchNorm2d(64),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, self.feature_dim),
            nn.SiLU(),
        )
        self.head = nn.Linear(self.feature_dim, len(DIGIT_WORDS))

    def features(self, pixels: Tensor) -> Tensor:
        """Penultimate features [B, 48] of pixels [B, 3, 32, 32] in [0, 1]; the channels are averaged first."""
        return self.trunk(pixels.mean(1, keepdim=True))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [B, 10] of pixels [B, 3, 32, 32] in [0, 1]."""
        return self.head(self.features(pixels))


def load_classifier() -> DigitsClassifier:
    """The shipped classifier, frozen and in eval mode."""
    classifier = DigitsClassifier()
    classifier.load_state_dict(load_file(assets_dir() / "classifiers" / "digits.safetensors"))
    return classifier.eval().requires_grad_(False)
