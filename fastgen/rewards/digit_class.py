"""Does the picture show the digit that its prompt asks for?"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.data.digits import IMAGE_SIZE, DigitsClassifier, label_of, load_classifier
from fastgen.rewards.base import CONFIG, Reward


@dataclass(frozen=True, config=CONFIG)
class DigitClass(Reward):
    """r(x, prompt) = log p(digit in the prompt | x) under the shipped classifier, in nats. It is at most 0, and log
    1/10 if the classifier cannot tell the digits apart. Pictures of other sizes are resized to 32 x 32.

    Raises ValueError for a prompt without a digit word."""

    input = "pixels"
    differentiable = True

    def score(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
        wanted = torch.tensor([label_of(prompt) for prompt in prompts], device=x.device)
        if x.shape[2:] != (IMAGE_SIZE, IMAGE_SIZE):
            x = F.interpolate(x, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True, align_corners=False)
        return -F.cross_entropy(classifier(x.device)(x), wanted, reduction="none")


@lru_cache(maxsize=1)
def classifier(device: torch.device) -> DigitsClassifier:
    return load_classifier().to(device)
