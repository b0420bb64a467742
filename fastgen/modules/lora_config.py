"""One role's adapter as a section of the recipe."""

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from fastgen.registry import MOST_WIDTH


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class LoraConfig:
    """One role's adapter: W + (alpha / rank) B A, with B zero at the start         (LoRA, arXiv 2106.09685 Sec. 4.1)

    Of a convolution with a k x k kernel, A is a k x k convolution to rank channels and B a 1 x 1 one back, as in peft.
    alpha: None means the rank, so that the factor is one. targets: the adapter goes on the linear layers and the
    convolutions whose names end like this; None means the linear attention and feed-forward layers of the family."""

    rank: int = Field(default=16, ge=1, le=MOST_WIDTH)
    alpha: float | None = Field(default=None, gt=0)
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
