"""How much does a video move, and how steadily?"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.modules.recomputation import checkpointed
from fastgen.rewards import images, weights
from fastgen.rewards.base import CONFIG, Reward, Score
from fastgen.rewards.clip import CLIP_FILES, TOKENIZER_FILES, config_files, load_clip, weight_files

EXAMPLE = "openai/clip-vit-large-patch14"
RAFT_FILES = ("raft_small*.safetensors", "raft_small*.pth")
RAFT_SIDE = 128  # the smallest side, in pixels, that RAFT reads


@dataclass(frozen=True, config=CONFIG)
class Motion(Reward):
    """Both methods are ours. Combine them with a reward for quality, because motion alone is easy to produce.

    features, with e_k the CLIP embedding (length 1) of frame k:
        r = 1/2 mean_k |e_{k+1} - e_k|^2 - smoothness 1/2 mean_k |e_{k+2} - 2 e_{k+1} + e_k|^2
      The first term is 1 - cos of neighbouring frames, averaged. A still video scores 0, and steady change scores
      r > 0. Independent frames (noise, flicker, cuts) score s^2 - 3 smoothness s^2 with s^2 their variance, which is
      negative for smoothness above 1/3.
    raft, with F_k the optical flow from frame k to k + 1 as a share of the frame's diagonal, and m_k the mean of the
    largest tenth of |F_k|:
        r = log(1 + mean_k m_k / scale) - smoothness mean_k mean |F_{k+2} - 2 F_{k+1} + F_k| / scale
      F_k is 0 at pixels where it is inconsistent with B_k, the flow back from where F_k leads, that is, where
      |F_k + B_k|^2 > 0.01 (|F_k|^2 + |B_k|^2) + 0.5 pixels^2 (arXiv 1711.07837). mean_k m_k / scale is clamped at
      `cap`, so r is at most log(1 + cap). RAFT (arXiv 2003.12039) sees frames with sides of at least 128 pixels that
      are multiples of 8.

    The parts `change` and `jerk` are the two terms, jerk without the factor smoothness. Input: frames [B, F, 3, H, W]
    with F >= 3, or F >= 4 for raft. Gradient: to all frames; the networks' activations are recomputed in the backward
    pass, one sample at a time.

    path: for features, a transformers CLIPModel as a folder or hub id; for raft, a folder or hub id with torchvision's
    raft_small weights (raft_small_C_T_V2-01064c6d.pth)."""

    path: str
    method: Literal["features", "raft"] = "features"
    smoothness: float = Field(default=0.5, ge=0)
    scale: float = Field(default=0.01, gt=0)  # raft: the unit of m, a hundredth of the diagonal by default
    cap: float = Field(default=10.0, gt=0)  # raft: the largest m / scale that counts

    input = "frames"
    differentiable = True
    reads_prompts = False

    def ready(self) -> None:
        if self.method == "features":
            weights.check_files(self.path, "path", EXAMPLE, *CLIP_FILES, TOKENIZER_FILES)
        else:
            weights.check_files(self.path, "path", "a folder with raft_small_C_T_V2-01064c6d.pth", RAFT_FILES)

    def weight_files(self) -> list[Path]:
        return weight_files(self.path) if self.method == "features" else [weights.find(self.path, *RAFT_FILES)]

    def other_files(self) -> list[Path]:
        return config_files(self.path) if self.method == "features" else []

    @property
    def input_size(self) -> str:
        if self.method == "features":
            return "shorter side to the network's (224), bicubic, centre crop"
        return "multiples of 8 from 128 on, bicubic"

    def score(self, x: Tensor, prompts: Sequence[str]) -> Score:
        least = 3 if self.method == "features" else 4
        if x.shape[1] < least:
            raise ValueError(f"motion needs at least {least} frames, but the video has {x.shape[1]}")
        if self.method == "features":
            clip = load_clip(self.path, self.path, x.device)
            terms = [feature_motion(checkpointed(clip.image, frames)) for frames in x]
        else:
            terms = [self.flow_terms(frames) for frames in x]
        change, jerk = (torch.stack(column) for column in zip(*terms, strict=True))
        if self.method == "raft":
            change = torch.log1p((change / self.scale).clamp_max(self.cap))
            jerk = jerk / self.scale
        value = change - self.smoothness * jerk
        return Score(value, torch.ones_like(value, dtype=torch.bool), {"change": change, "jerk": jerk})

    def flow_terms(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        raft = load_raft(self.path, frames.device)
        height, width = (max(RAFT_SIDE, round(side / 8) * 8) for side in frames.shape[-2:])
        x = 2 * images.resize(frames, height, width) - 1
        return flow_motion(checkpointed(raft, x[:-1], x[1:]), checkpointed(raft, x[1:], x[:-1]))


def feature_motion(e: Tensor) -> tuple[Tensor, Tensor]:
    """Half the mean squared first and second differences of the features [F, D] along F."""
    step = e.diff(dim=0)
    return 0.5 * step.square().sum(1).mean(), 0.5 * step.diff(dim=0).square().sum(1).mean()


def flow_motion(forward: Tensor, backward: Tensor) -> tuple[Tensor, Tensor]:
    """The mean length of the largest tenth of the flow, and the mean length of the flow's second difference, both as
    shares of the diagonal. forward, backward: [F, 2, H, W] in pixels, between neighbouring frames. The flow of an
    inconsistent pixel is set to 0 first."""
    loop = forward + warp(backward, forward)
    size = forward.square().sum(1) + backward.square().sum(1)
    consistent = (loop.square().sum(1) <= 0.01 * size + 0.5).to(forward.dtype)
    height, width = forward.shape[-2:]
    flow = forward * consistent[:, None] / (height**2 + width**2) ** 0.5
    length = norm(flow).flatten(1)
    change = length.topk(max(1, length.shape[1] // 10), dim=1).values.mean()
    return change, norm(flow.diff(dim=0).diff(dim=0)).mean()


def norm(vectors: Tensor) -> Tensor:
    """The lengths [F, H, W] of vectors [F, 2, H, W], with gradient 0 at 0."""
    square = vectors.square().sum(1)
    return torch.where(square > 0, square, 1).sqrt() * (square > 0)


def warp(values: Tensor, flow: Tensor) -> Tensor:
    """values [F, C, H, W] at x + flow(x), bilinear, with borders repeated. flow: [F, 2, H, W] pixels (across,
    down)."""
    height, width = flow.shape[-2:]
    down, across = torch.meshgrid(*(torch.arange(n, device=flow.device) for n in (height, width)), indexing="ij")
    x = (across + flow[:, 0]) * 2 / max(width - 1, 1) - 1
    y = (down + flow[:, 1]) * 2 / max(height - 1, 1) - 1
    return F.grid_sample(values, torch.stack([x, y], -1), padding_mode="border", align_corners=True)


class Raft:
    """torchvision's RAFT-small, frozen: from pairs of frames [N, 3, H, W] in [-1, 1] to flow [N, 2, H, W] in
    pixels."""

    def __init__(self, path: str, device: torch.device):
        from torchvision.models.optical_flow import raft_small

        file = weights.find(path, *RAFT_FILES)
        network = raft_small()
        weights.load_strictly(network, weights.read_tensors(file), file)
        self.network = weights.freeze(network, device)

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        return self.network(first, second)[-1]


@lru_cache(maxsize=1)
def load_raft(path: str, device: torch.device) -> Raft:
    """The network, cached. Raises ValueError unless the checkpoint has exactly its tensors."""
    return Raft(path, device)
