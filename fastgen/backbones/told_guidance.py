"""What families have in common whose networks were distilled from guidance, and are told a scale."""

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from fastgen.backbones.pipeline import PipelineBackbone
from fastgen.backbones.pipeline_config import PipelineConfig

Role = Literal["student", "teacher", "fake_score"]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ToldGuidanceConfig(PipelineConfig):
    """guidance: role -> the guidance scale that its network is told, by default the one of the stock pipeline's call.
    Copies of the student are told what it is told, the network of features what the teacher is told, and the recorded
    path of disback what the fake score is told."""

    guidance: dict[Role, Annotated[float, Field(ge=0)]] = field(default_factory=dict)

    def check(self) -> None:
        """Also raises ValueError for guidance of a network that is told none."""
        super().check()
        if self.guidance and self.local_folder() is not None:
            self.build(torch.device("cpu"), torch.float32, 0).guidance_told("student")


def is_told(network: Mapping[str, Any]) -> bool:
    """Whether a network with this config is told a guidance scale: a transformer with guidance_embeds, or a UNet with
    time_cond_proj_dim."""
    return bool(network.get("guidance_embeds", False)) or network.get("time_cond_proj_dim") is not None


class ToldGuidance(PipelineBackbone):
    """The part of a backbone that follows from it. stock_guidance: the guidance_scale of the stock call."""

    config: Any
    stock_guidance: float

    @property
    def is_told(self) -> bool:
        return is_told(self.network_config)

    def guidance_told(self, role: str) -> float | None:
        """The guidance scale for a role; None for a network that is told none. Raises ValueError if the recipe gives
        one for such a network."""
        if not self.is_told:
            if self.config.guidance:
                raise ValueError(
                    f"guidance: the network of {self.source} is told no guidance scale; leave this key out"
                )
            return None
        like = "teacher" if role == "features" else "fake_score" if role.startswith("path") else role
        told: Role = like if like in ("teacher", "fake_score") else "student"  # type: ignore[assignment]
        return self.config.guidance.get(told, self.stock_guidance)

    def scale_with(self, said: Mapping[str, float]) -> float:
        """The guidance_scale of the stock call is what the network is told; it is called once a step."""
        return 1.0
