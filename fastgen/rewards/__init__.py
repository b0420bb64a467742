"""Rewards by name, as `rewards.parts` in a recipe lists them. A class is imported only when it is chosen."""

import importlib
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fastgen.rewards.base import Reward, Score
from fastgen.rewards.composite import Composite, Scorer

REWARDS: dict[str, str] = {
    "linear": "fastgen.rewards.linear:Linear",
    "quadratic": "fastgen.rewards.quadratic:Quadratic",
    "ar1_motion": "fastgen.rewards.ar1_motion:AR1Motion",
    "digit_class": "fastgen.rewards.digit_class:DigitClass",
    "digit_stroke": "fastgen.rewards.digit_stroke:DigitStroke",
    "jpeg_size": "fastgen.rewards.jpeg_size:JpegSize",
    "clip_score": "fastgen.rewards.clip_score:ClipScore",
    "hpsv2": "fastgen.rewards.hpsv2:HPSv2",
    "pickscore": "fastgen.rewards.pickscore:Pickscore",
    "image_reward": "fastgen.rewards.image_reward:ImageReward",
    "aesthetic": "fastgen.rewards.aesthetic:Aesthetic",
    "hpsv3": "fastgen.rewards.hpsv3:HPSv3",
    "video_reward": "fastgen.rewards.video_reward:VideoReward",
    "motion": "fastgen.rewards.motion:Motion",
    "function": "fastgen.rewards.function:FunctionReward",
}

# Rewards with networks of their own. The recipe must give the paths of their files.
SCORERS = ("clip_score", "hpsv2", "pickscore", "image_reward", "aesthetic", "hpsv3", "video_reward", "motion")


def make_reward(name: str, keys: Mapping[str, Any]) -> Reward:
    """The registered reward `name` with these keys. Its files are not checked here, see `Reward.ready`. Raises
    ValueError with one line per error, each of which names the key."""
    module, _, attribute = REWARDS[name].partition(":")
    try:
        return TypeAdapter(vars(importlib.import_module(module))[attribute]).validate_python(dict(keys))
    except ValidationError as error:
        required = "required but not given; docs/rewards.md explains it"
        raise ValueError(
            "\n".join(
                f"{name}.{'.'.join(map(str, e['loc']))}: "
                f"{required if e['type'] == 'missing' else e['msg'].removeprefix('Value error, ')}"
                for e in error.errors()
            )
        ) from None


__all__ = ["REWARDS", "SCORERS", "Composite", "Reward", "Score", "Scorer", "make_reward"]
