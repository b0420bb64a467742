"""Videos of a ring of handwritten digits, seen by a camera that pans as the actions of the prompt say:
"a row of digits | right*4 left*4".

The world is a ring of columns, with one digit in the middle of each slot of 32. The camera sees one slot's width and
begins at slot 0. It moves sideways by a fixed number of pixels in each latent frame, which has four pictures, so that
it comes back to what it has seen. What the digits are is said nowhere: a model that shows the same ones again has
remembered them (`agreement` in benchmarks/streaming/views.py).
"""

from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen import noise
from fastgen.backbones.base import Backbone
from fastgen.data.digits import load_digits
from fastgen.data.moving_digits import CANVAS, DIGIT_SIZE, placement
from fastgen.data.samples import Samples, SampleSource
from fastgen.registry import MOST_SAMPLES, MOST_SEED

TEXT = "a row of digits"
STEP = 8  # pixels that the camera moves in a latent frame
PICTURES = 4  # of a latent frame
SLOTS = 2  # of the ring
SEGMENT = CANVAS // STEP  # latent frames from one slot to the next
TURNS = ("left", "right")


def prompt_for(turns: Tensor) -> str:
    """The prompt of a path. turns: [n] of 0 and 1, one for each move from a slot to the next, left or right."""
    return f"{TEXT} | " + " ".join(f"{TURNS[turn]}*{SEGMENT}" for turn in turns.tolist())


def camera(turns: Tensor, frames: int) -> Tensor:
    """The camera's column in every picture, [B, frames], of paths [B, n]; it stays where its last move ends."""
    moves = (2.0 * turns - 1).repeat_interleave(SEGMENT * PICTURES, dim=1) * (STEP / PICTURES)
    way = torch.cat([torch.zeros(len(turns), 1), moves.cumsum(dim=1)], dim=1)
    last = way[:, -1:].expand(-1, max(0, frames - way.shape[1]))
    return torch.cat([way, last], dim=1)[:, :frames]


def render(digits: Tensor, columns: Tensor) -> Tensor:
    """Videos [B, frames, 3, 32, 32] in [0, 1], white on black. digits: [B, SLOTS, 16, 16]. columns: the camera's,
    [B, frames]."""
    middle = (CANVAS - DIGIT_SIZE) // 2
    ring = SLOTS * CANVAS
    corner = torch.arange(SLOTS) * CANVAS + middle - columns[..., None]  # [B, frames, SLOTS]
    corner = (corner + ring / 2) % ring - ring / 2  # a digit that leaves on one side comes back on the other
    rows = placement(torch.tensor(float(middle)))
    across = placement(corner)
    video = torch.einsum("hr,bsrc,bfswc->bfhw", rows, digits, across)
    return video[:, :, None].expand(-1, -1, 3, -1, -1).clamp(0, 1)


def draw(ids: Tensor, key: int, moves: int, split: str = "train") -> tuple[Tensor, Tensor, Tensor]:
    """Digits [B, SLOTS, 16, 16], their labels [B, SLOTS] and paths [B, moves], which depend on key and id alone."""
    digits, labels = load_digits(split, DIGIT_SIZE)
    u = noise.uniform(ids, (SLOTS + moves,), noise.make_key(key, "view"), torch.float64)
    chosen = (u[:, :SLOTS] * len(labels)).long()
    return digits[chosen, 0], labels[chosen], (u[:, SLOTS:] * 2).long()


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class DigitViewsData(SampleSource):
    """The videos of this module as training data, with as many pictures as the backbone's videos have. The digits are
    those of the training two thirds.

    videos: how many different ones there are. Video i depends on `seed` and i alone."""

    name: Literal["digit_views"] = "digit_views"
    videos: int = Field(default=2048, ge=1, le=MOST_SAMPLES)
    seed: int = Field(default=0, ge=0, le=MOST_SEED)

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"latents", "pixels"})

    def check(self, backbone: Any) -> None:
        if backbone.output != "frames":
            raise ValueError(f"digit_views data are videos, but backbone {backbone.name} gives {backbone.output}")
        if (backbone.height, backbone.width) != (CANVAS, CANVAS):
            raise ValueError(
                f"digit_views videos have {CANVAS} x {CANVAS} pixels, those of the backbone {backbone.height} x "
                f"{backbone.width}; set backbone.height and backbone.width to {CANVAS}"
            )
        actions = getattr(backbone, "actions", None)
        if actions is None or not {*TURNS} <= {*actions.words}:
            raise ValueError(
                "digit_views prompts have the actions left and right: give backbone.actions: {words: "
                f"{{left: [-{STEP}], right: [{STEP}]}}, period: [{SLOTS * CANVAS}]}}"
            )

    def samples(self, backbone: Backbone) -> Samples:
        frames = backbone.config.num_frames
        ids, key = torch.arange(self.videos), noise.make_key(self.seed, self.name)
        moves = -(-(frames - 1) // (SEGMENT * PICTURES))

        def read(i: int) -> Tensor:
            digits, _, turns = draw(ids[i : i + 1], key, moves)
            return render(digits, camera(turns, frames))[0]

        return Samples([prompt_for(turns) for turns in draw(ids, key, moves)[2]], ids, read)
