"""Actions: what moves in a video as it is made, said in words after a prompt.

    a street | right*4 stay left*2

Every word moves the view during one latent frame. The first latent frame shows where the view begins; the words are
for those after it, and the last one goes on. The network is told, for each latent frame, how the view moves and from
where to where, through its time embedding. Later chunks can fetch the earlier frames that were seen from nearest to
where they are seen from (`ChunkSchedule.recall`)."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.streaming.part_file import load_part, save_part

FILE = "actions.safetensors"  # of the weights, beside the stock networks
BAR = "|"  # between a prompt and its actions
MOST_REPEATS = 1 << 16
WORD = re.compile(r"([A-Za-z_]\w*)(?:\*(\d+))?")


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Actions:
    """The actions of a world.

    words: what a word moves the view by in one latent frame, one number for each axis of the world, in any unit.
    period: for each axis, the distance after which the world repeats; of a world that does not, its extent.

    An example of a view that moves sideways over a ring of 64 pixels:
    {words: {left: [-8], right: [8], stay: [0]}, period: [64]}"""

    words: dict[str, tuple[float, ...]] = Field(min_length=1)
    period: tuple[float, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _axes(self) -> "Actions":
        if any(length <= 0 for length in self.period):
            raise ValueError(f"period: distances are positive, got {list(self.period)}")
        for word, move in self.words.items():
            if WORD.fullmatch(word) is None:
                raise ValueError(f"words: {word!r} is no word; use letters, digits and _, and begin with a letter")
            if len(move) != len(self.period):
                raise ValueError(f"words: {word} has {len(move)} numbers, and period has {len(self.period)} axes")
        return self

    @property
    def axes(self) -> int:
        return len(self.period)

    def moves(self, prompt: str, frames: int | None = None) -> Tensor:
        """The moves of a prompt's actions, [frames, axes], of which the first is 0, as the first latent frame has
        none. frames: None gives one for each word, and one for the first frame. Raises ValueError for a word that is
        no action."""
        words = self.listed(prompt)
        found = torch.tensor([[0.0] * self.axes, *(self.words[word] for word in words)])
        return found if frames is None else lasting(found, frames)

    def listed(self, prompt: str) -> list[str]:
        """The actions of a prompt, one for each latent frame. Raises ValueError for a word that is none."""
        found = list[str]()
        for part in split_prompt(prompt)[1].split():
            match = WORD.fullmatch(part)
            if match is None or match[1] not in self.words or int(match[2] or 1) > MOST_REPEATS:
                known = ", ".join(self.words)
                raise ValueError(f"{part!r} in {prompt!r} is no action; they are {known}, or with a count: right*4")
            found += [match[1]] * int(match[2] or 1)
        return found


def split_prompt(prompt: str) -> tuple[str, str]:
    """The prompt without its actions, and its actions."""
    text, _, actions = prompt.partition(BAR)
    return text.strip(), actions.strip()


def lasting(moves: Tensor, frames: int) -> Tensor:
    """The moves of the first frames, [..., frames, axes], of [..., n, axes]: the last one goes on. A list of the first
    frame alone has no move, and stays."""
    more = moves[..., -1:, :].expand(*moves.shape[:-2], max(0, frames - moves.shape[-2]), -1)
    return torch.cat([moves, more], dim=-2)[..., :frames, :]


class ActionEmbedding(nn.Module):
    """What a network is told of actions, added to the time embedding of each latent frame. It starts at zero, so that
    the network computes what it did before.

    period: of the world, see `Actions`.  dim: the width of the time embedding."""

    def __init__(self, period: Sequence[float], dim: int):
        super().__init__()
        self.period = tuple(period)
        self.inner = nn.Linear(5 * len(self.period), dim)
        self.outer = nn.Linear(dim, dim)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, moves: Tensor, frames: range) -> Tensor:
        """[B, frames, dim] of these frames, of moves [B, F, axes], which begin with the first frame of the video."""
        own = slice(frames.start, frames.stop)
        features = torch.cat([self.views(moves)[:, own], self.angles(moves[:, own])], dim=-1)
        return self.outer(nn.functional.silu(self.inner(features.to(self.inner.weight.dtype))))

    def views(self, moves: Tensor) -> Tensor:
        """Where each frame is seen from, [B, F, 4 axes] float32: with p the sum of all moves up to a frame's own, and
        q the sum before it, cos and sin of 2 pi p / period and of 2 pi q / period for each axis."""
        after = moves.double().cumsum(dim=1)
        angles = torch.cat([self.angles(after), self.angles(after - moves)], dim=-1)
        return torch.cat([angles.cos(), angles.sin()], dim=-1).float()

    def angles(self, way: Tensor) -> Tensor:
        """2 pi way / period, [..., axes]."""
        return torch.stack([way[..., i] * (2 * math.pi / length) for i, length in enumerate(self.period)], dim=-1)


def add_actions(network: Any, period: Sequence[float], dim: int) -> None:
    """Gives a network an `ActionEmbedding`, `network.actions`, where it has its first weights."""
    like = next(network.parameters())
    made = ActionEmbedding(period, dim)
    network.actions = made.to(dtype=like.dtype, device=None if like.is_meta else like.device)


def save_actions(weights: Mapping[str, Tensor], period: Sequence[float], folder: Path) -> None:
    """weights: "<expert>.actions.<name>" -> tensor."""
    save_part(weights, folder / FILE, {"period": json.dumps(list(period))})


def load_actions(networks: Sequence[Any], folder: Path) -> None:
    """Gives the networks the embeddings that this folder holds for them, see `part_file.load_part`."""

    def add(network: Any, own: Mapping[str, Tensor], about: Mapping[str, str]) -> nn.Module:
        add_actions(network, json.loads(about["period"]), len(own["outer.bias"]))
        return network.actions

    load_part(folder / FILE, "backbone.actions", networks, add, "actions.")
