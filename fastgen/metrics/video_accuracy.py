"""Does every picture of the video show the digit that the prompt asks for?"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.data.digits import IMAGE_SIZE, DigitsClassifier, load_classifier
from fastgen.data.moving_digits import DIGIT_SIZE
from fastgen.metrics.base import Directions, Metric
from fastgen.metrics.tracks import early_and_late, latent_frames, stated

INK = 0.3  # the brightness from which on a pixel belongs to the digit


class VideoAccuracy(Metric):
    """The share of pictures in which the shipped digits classifier sees the digit of the prompt.

    The classifier sees the 16 pixels around the middle of the digit's bounding box (brightness above 0.3), enlarged to
    32. A picture without a pixel that bright is wrong. video_accuracy is the mean over pictures and videos;
    video_accuracy_first and _last are those of the first and last quarter of the latent frames (at least one latent
    frame: one picture at the beginning, four at the end); video_accuracy_lowest is that of the worst latent frame.

    update raises ValueError for a prompt without a digit word, videos of another length than the first, and a length
    other than 4 k + 1."""

    name = "video_accuracy"
    output = "frames"
    reads_prompts = True
    directions: ClassVar[Directions] = {
        "video_accuracy": "higher",
        "video_accuracy_first": "higher",
        "video_accuracy_last": "higher",
        "video_accuracy_lowest": "higher",
    }
    right: Tensor | None = None  # [F], how many videos are right in every picture
    count = 0

    @classmethod
    def check_prompts(cls, prompts: Sequence[str]) -> None:
        stated(list(prompts), "digit")

    @cached_property
    def classifier(self) -> DigitsClassifier:
        return load_classifier()

    @torch.no_grad()
    def update(self, samples: Tensor, prompts: Sequence[str]) -> None:
        said = stated(list(prompts), "digit")
        latent_frames(samples.shape[1])
        wanted = torch.tensor([part.digit for part in said])
        crops, empty = digit_crops(samples.float().mean(2).flatten(0, 1))
        guesses = torch.cat([self.classifier(part).argmax(1) for part in crops.split(1024)])
        right = (guesses.view(samples.shape[:2]) == wanted[:, None]) & ~empty.view(samples.shape[:2])
        if self.right is not None and len(self.right) != samples.shape[1]:
            raise ValueError(f"videos of {len(self.right)} and {samples.shape[1]} frames cannot be measured together")
        self.right = right.sum(0) + (0 if self.right is None else self.right)
        self.count += len(samples)

    def by_latent_frame(self) -> Tensor:
        """The accuracy in every latent frame, [F']."""
        share = self.by_picture()
        of = latent_frames(len(share))
        total = torch.zeros(int(of[-1]) + 1, dtype=share.dtype).index_add_(0, of, share)
        return total / of.bincount()

    def by_picture(self) -> Tensor:
        """The accuracy in every picture, [F]."""
        if self.right is None:
            raise ValueError("video_accuracy needs at least one sample")
        return self.right.double() / self.count

    def compute(self) -> dict[str, float]:
        share = self.by_picture()
        early, late = early_and_late(len(share))
        return {
            "video_accuracy": share.mean().item(),
            "video_accuracy_first": share[early].mean().item(),
            "video_accuracy_last": share[late].mean().item(),
            "video_accuracy_lowest": self.by_latent_frame().min().item(),
        }

    def state(self) -> dict[str, Tensor]:
        right = torch.zeros(0, dtype=torch.int64) if self.right is None else self.right
        return {"right": right, "count": torch.tensor(self.count)}

    def restore(self, state: Mapping[str, Tensor], prompts: Sequence[str]) -> None:
        self.right = state["right"] if len(state["right"]) else None
        self.count = int(state["count"])


def digit_crops(grey: Tensor) -> tuple[Tensor, Tensor]:
    """The digits of grey pictures [N, H, W] as the classifier sees them, [N, 1, 32, 32], and which pictures are empty.

    The 16 pixels around the middle of the bounding box stay inside the picture."""
    ink = grey > INK
    corners = []
    for axis in (2, 1):
        line = ink.any(axis)
        first = line.int().argmax(1)
        last = line.shape[1] - 1 - line.flip(1).int().argmax(1)
        corners.append(((first + last + 1) // 2 - DIGIT_SIZE // 2).clamp(0, line.shape[1] - DIGIT_SIZE))
    side = torch.arange(DIGIT_SIZE)
    rows, columns = (corner[:, None] + side for corner in corners)
    cut = grey[torch.arange(len(grey))[:, None, None], rows[:, :, None], columns[:, None, :]]
    enlarged = F.interpolate(cut[:, None], size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic").clamp(0, 1)
    return enlarged, ~ink.flatten(1).any(1)
