"""What Wan pipelines that are given the first picture of a video have in common."""

from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from fastgen.backbones.base import BackboneConfig
from fastgen.backbones.wan import Wan, WanConfig
from fastgen.policy import InnerFlow
from fastgen.rollout import RolloutPolicy


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class GivenFrameConfig(WanConfig):
    """The keys are those of `wan`."""

    takes_image: ClassVar[bool] = True

    def check_chunks(self, policy: RolloutPolicy) -> None:
        raise ValueError(f"backbone {self.name} has no causal student; leave out rollout.chunks")

    def check_inner(self, flow: InnerFlow) -> None:
        BackboneConfig.check_inner(self, flow)


class GivenFrame(Wan):
    """A Wan pipeline that is given the first picture, in the size of its videos."""

    @property
    def picture_size(self) -> tuple[int, int]:
        return self.config.height, self.config.width
