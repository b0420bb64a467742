"""Videos of one handwritten digit that moves and bounces as its prompt says: "a seven moving right, fast".

A digit of 16 x 16 pixels moves along one axis of a black canvas and turns round at its borders. Every draw depends
only on a key and the sample's id, so video i is the same alone, in any batch and in a resumed run.

For a backbone with sound, a tone goes with it, whose pitch follows the digit's height (`tones`).
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen import noise
from fastgen.backbones.base import Backbone
from fastgen.data.digits import DIGIT_WORDS, load_digits
from fastgen.data.samples import Samples, SampleSource
from fastgen.registry import MOST_SAMPLES, MOST_SEED

DIRECTIONS = {"right": (0, 1), "left": (0, -1), "up": (-1, 0), "down": (1, 0)}  # rows down, columns right
SPEEDS = {"fast": 1.0, "slowly": 0.5}  # in pixels a picture
DIGIT_SIZE = 16
CANVAS = 32
TONE_WIDTH = 1.5  # of a tone, in bins
RUN = 5  # pixels that every digit can move before its first bounce


class Told(NamedTuple):
    """What a prompt says. A part that it does not state is None. direction: (rows, columns); speed: in pixels a
    picture."""

    digit: int | None
    direction: tuple[int, int] | None
    speed: float | None


def prompt_for(digit: str | None, direction: str | None, speed: str | None) -> str:
    """The prompt of these words; None leaves a part unstated: "a digit moving, slowly"."""
    return f"a {digit or 'digit'} moving" + (f" {direction}" if direction else "") + (f", {speed}" if speed else "")


def told(prompt: str) -> Told:
    """The first digit, direction and speed word of a prompt, in upper or lower case."""
    words = re.findall(r"[a-z]+", prompt.lower())
    first = [next((word for word in words if word in known), None) for known in (DIGIT_WORDS, DIRECTIONS, SPEEDS)]
    digit, direction, speed = first
    return Told(
        None if digit is None else DIGIT_WORDS.index(digit),
        None if direction is None else DIRECTIONS[direction],
        None if speed is None else SPEEDS[speed],
    )


@dataclasses.dataclass(frozen=True)
class Scenes:
    """What happens in B videos. digits: [B, 16, 16] in [0, 1]. labels: [B]. directions, speeds: [B] indices into
    DIRECTIONS and SPEEDS. start: [B, 2] float, the digit's upper left corner in the first picture."""

    digits: Tensor
    labels: Tensor
    directions: Tensor
    speeds: Tensor
    start: Tensor

    @property
    def velocity(self) -> Tensor:
        """[B, 2] in pixels a picture."""
        speed = torch.tensor(list(SPEEDS.values()))[self.speeds]
        return torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32)[self.directions] * speed[:, None]

    def prompts(self, stated: Tensor) -> list[str]:
        """One prompt a video. stated: [B, 3] bool, whether it names the digit, the direction and the speed."""
        words = zip(
            [DIGIT_WORDS[i] for i in self.labels.tolist()],
            [list(DIRECTIONS)[i] for i in self.directions.tolist()],
            [list(SPEEDS)[i] for i in self.speeds.tolist()],
            strict=True,
        )
        return [
            prompt_for(*(word if said else None for word, said in zip(scene, says, strict=True)))
            for scene, says in zip(words, stated.tolist(), strict=True)
        ]


def draw_scenes(ids: Tensor, key: int, split: str = "train", canvas: int = CANVAS) -> Scenes:
    """Scenes [B] with a random digit of `split`, direction, speed and even starting pixel. ids: [B] int64.

    Along its direction a digit starts so that it has at least RUN pixels to move (if the canvas is wide enough)."""
    digits, labels = load_digits(split, DIGIT_SIZE)
    u = noise.uniform(ids, (5,), noise.make_key(key, "scene"), torch.float64)
    room = canvas - DIGIT_SIZE

    def choice(column: int, count: int) -> Tensor:
        return (u[:, column] * count).long()

    chosen, directions, speeds = choice(0, len(labels)), choice(1, len(DIRECTIONS)), choice(2, len(SPEEDS))
    sign = torch.tensor(list(DIRECTIONS.values()))[directions]  # [B, 2]
    across = torch.stack([choice(column, room // 2 + 1) for column in (3, 4)], 1) * 2
    along = torch.stack([choice(column, max(room - RUN, 0) // 2 + 1) for column in (3, 4)], 1) * 2
    start = torch.where(sign == 0, across, torch.where(sign > 0, along, room - along))
    return Scenes(digits[chosen, 0], labels[chosen], directions, speeds, start.float())


def scenes_as_told(prompts: Sequence[str], key: int, split: str = "test") -> Scenes:
    """For each prompt a scene that is as it says, in every part: for the k-th of equal prompts, the k-th such scene.
    Raises ValueError for a prompt that does not state digit, direction and speed."""
    drawn = draw_scenes(torch.arange(320 * len(prompts)), key, split)
    waiting: dict[str, list[int]] = {}
    for i, prompt in enumerate(drawn.prompts(torch.ones(len(drawn.labels), 3).bool())):
        waiting.setdefault(prompt, []).append(i)
    if odd := next((prompt for prompt in prompts if prompt not in waiting), None):
        raise ValueError(f"{odd!r} does not state a digit, a direction and a speed")
    rows = [waiting[prompt].pop(0) for prompt in prompts]
    return Scenes(*(getattr(drawn, field.name)[rows] for field in dataclasses.fields(drawn)))


def places(scenes: Scenes, frames: int, canvas: int = CANVAS) -> Tensor:
    """The digit's upper left corner in every picture, [B, frames, 2]; it turns round at the borders."""
    room = canvas - DIGIT_SIZE
    moved = scenes.start[:, None] + scenes.velocity[:, None] * torch.arange(frames)[:, None]
    return room - (moved % (2 * room) - room).abs()


def placement(corner: Tensor, canvas: int = CANVAS) -> Tensor:
    """Matrices [..., canvas, 16] that put 16 pixels at `corner` [...]; linear in fractions of a pixel."""
    offset = torch.arange(canvas)[:, None] - torch.arange(DIGIT_SIZE) - corner[..., None, None]
    return (1 - offset.abs()).clamp(min=0)


def render(scenes: Scenes, frames: int, canvas: int = CANVAS) -> Tensor:
    """Videos [B, frames, 3, canvas, canvas] in [0, 1], white on black."""
    rows, columns = placement(places(scenes, frames, canvas), canvas).unbind(2)
    video = rows @ scenes.digits[:, None] @ columns.mT
    return video[:, :, None].expand(-1, -1, 3, -1, -1)


def pitches(scenes: Scenes, frames: int, canvas: int = CANVAS) -> Tensor:
    """The height of the middle of the digit above the lower border in every picture, in pixels, [B, frames]."""
    return canvas - DIGIT_SIZE / 2 - places(scenes, frames, canvas)[..., 0]


def tones(pitch: Tensor, bins: int = CANVAS) -> Tensor:
    """The loudness of `bins` pitches, [..., bins], of tones of these pitches [...]:

    exp(-(b + 1/2 - pitch)^2 / (2 TONE_WIDTH^2))    in bin b, which is as high as the pixels from b to b + 1"""
    distance = torch.arange(bins, device=pitch.device) + 0.5 - pitch[..., None]
    return torch.exp(-distance.square() / (2 * TONE_WIDTH**2))


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class MovingDigitsData(SampleSource):
    """The videos of this module as training data, with as many pictures as the backbone's videos have. The digits are
    those of the training two thirds.

    videos: how many different ones there are. Video i depends on `seed` and i alone. unstated: how often each of
    digit, direction and speed is left out of a prompt."""

    name: Literal["moving_digits"] = "moving_digits"
    videos: int = Field(default=4096, ge=1, le=MOST_SAMPLES)
    unstated: float = Field(default=0.0, ge=0, le=1)
    seed: int = Field(default=0, ge=0, le=MOST_SEED)

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"latents", "pixels", "images", "sound"})

    def check(self, backbone: Any) -> None:
        if backbone.output != "frames":
            raise ValueError(f"moving_digits data are videos, but backbone {backbone.name} gives {backbone.output}")
        if (backbone.height, backbone.width) != (CANVAS, CANVAS):
            raise ValueError(
                f"moving_digits videos have {CANVAS} x {CANVAS} pixels, those of the backbone {backbone.height} x "
                f"{backbone.width}; set backbone.height and backbone.width to {CANVAS}"
            )
        if (sound := getattr(backbone, "sound", None)) is not None and (sound.bins, sound.moments) != (CANVAS, 4):
            raise ValueError(
                f"the tones of moving_digits have {CANVAS} bins, and one moment a picture; set backbone.sound.bins to "
                f"{CANVAS} and backbone.sound.moments to 4"
            )

    def samples(self, backbone: Backbone) -> Samples:
        frames = backbone.config.num_frames
        ids, key = torch.arange(self.videos), noise.make_key(self.seed, self.name)
        stated = noise.uniform(ids, (3,), noise.make_key(key, "stated")) >= self.unstated
        prompts = draw_scenes(ids, key).prompts(stated)

        def read(i: int) -> Tensor:
            return render(draw_scenes(ids[i : i + 1], key), frames)[0]

        def read_sound(i: int) -> Tensor:
            return tones(pitches(draw_scenes(ids[i : i + 1], key), frames))[0]

        sound = getattr(backbone.config, "sound", None)
        heard = {} if sound is None else {"read_sound": read_sound, "sound_given": sound.given}
        return Samples(prompts, ids, read, **heard)
