"""How many bytes does a picture take as a JPEG file?"""

import io
from collections.abc import Sequence

import torch
from PIL import Image
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen.rewards.base import CONFIG, Reward


@dataclass(frozen=True, config=CONFIG)
class JpegSize(Reward):
    """r(x) = -kB / 500 with `compress`, otherwise kB / 500. kB is the size of the JPEG file at this `quality`, in
    units of 1,000 bytes (DDPO's compressibility, arXiv 2305.13301, in flow_grpo's scale). No gradient."""

    quality: int = Field(default=95, ge=1, le=95)
    compress: bool = True

    input = "pixels"
    differentiable = False
    reads_prompts = False

    def score(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
        images = (x.detach() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        kilobytes = torch.tensor([self.size(Image.fromarray(image)) / 1000 for image in images])
        return kilobytes / (-500 if self.compress else 500)

    def size(self, image: Image.Image) -> int:
        """The size of the JPEG file in bytes."""
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=self.quality)
        return file.tell()
