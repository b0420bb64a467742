"""Sound: a second stream of latents, which a network makes together with a video, or by which a video is driven.

A video of F latent frames has 1 + m (F - 1) moments of sound: one of the first picture, and m of each latent frame
after it. A moment is a vector, such as the loudness at several pitches. The state stays one tensor,
[B, F, C, H + p, W]: under the latents of a frame's picture lies a row of patches with its sound, one patch for each
moment. What treats a video frame by frame (rollouts, windows, sinks, draws, attention by chunks) treats both streams
alike, so that pictures and sounds of a chunk see each other, those of the chunks before, and none of those after.

    here                            OmniForcing (LTX-2), of which we know the abstract and summaries
    patches of both streams in one  block-causal attention of two streams at different rates, aligned in time
      frame's block
    the first frame, with the one   the global prefix that both streams begin with; `chunks: {sink: 1}` keeps it
      moment of its one picture     in sight
    `sinks`, keys that are not      audio sink tokens with identity RoPE
      rotated

The stock network gets a linear embedding and a linear head for these patches, which lie beside it, and shares
everything else. In OmniForcing each stream has a tower of its own; one network for both is our choice.

With `given`, the sound is no part of the state: it is a condition of every frame, cond["sound"] [B, F, m, bins], whose
patches the network sees in the same place, clean, and does not predict (LiveTalk, of which we know summaries, drives a
video so)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.ops.block_sparse_attention import Result, merge
from fastgen.registry import MOST_WIDTH
from fastgen.streaming.part_file import load_part, save_part

FILE = "sound.safetensors"  # of the weights, beside the stock networks


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Sound:
    """The sound of a video.

    bins: numbers of a moment.  moments: of a latent frame.
    mean, std: of the numbers in the data; the latents are (number - mean) / std.
    sinks: learned keys and values of every layer that the sound's queries see besides the tokens, at no position.
    given: whether the sound is given, and drives the video, which else is made together with it."""

    bins: int = Field(ge=1, le=MOST_WIDTH)
    moments: int = Field(default=4, ge=1, le=MOST_WIDTH)
    mean: float = 0.0
    std: float = Field(default=1.0, gt=0)
    sinks: int = Field(default=0, ge=0, le=64)
    given: bool = False

    def length(self, frames: int) -> int:
        """Moments of a video of this many latent frames."""
        return 1 + self.moments * (frames - 1)

    def rate(self, fps: float, pictures: int, frames: int) -> Fraction:
        """Moments per second, where `frames` latent frames are `pictures` pictures, of which there are `fps` a
        second. They are as long as the moments of `length`, but for the first one of both, which has no length."""
        return Fraction(fps) * Fraction(self.length(frames) - 1 or 1, pictures - 1 or 1)


class Strip(NamedTuple):
    """The place of the sound in the latents of a frame. channels: C. high, wide: the rows and columns of a patch.
    width: of the latents."""

    channels: int
    high: int
    wide: int
    width: int

    @property
    def tokens(self) -> int:
        """Patches in the row."""
        return self.width // self.wide

    @property
    def size(self) -> int:
        """Numbers of a patch."""
        return self.channels * self.high * self.wide

    def check(self, sound: Sound) -> None:
        """Raises ValueError if the moments of a frame do not fit into the row."""
        if sound.moments > self.tokens:
            raise ValueError(
                f"sound.moments: a latent frame is {self.tokens} patches wide, which is the most moments it can have, "
                f"and {sound.moments} are asked for; use a wider video, or fewer moments"
            )
        if sound.bins > self.size and not sound.given:
            raise ValueError(f"sound.bins: a patch has {self.size} numbers, and {sound.bins} are asked for")

    def patches(self, rows: Tensor) -> Tensor:
        """[..., tokens, C p p] of rows [..., C, p, W]."""
        cut = rows.unflatten(-1, (self.tokens, self.wide))  # [..., C, p, tokens, p]
        return cut.movedim(-2, -4).flatten(-3)

    def rows(self, patches: Tensor) -> Tensor:
        """The inverse of `patches`."""
        cut = patches.unflatten(-1, (self.channels, self.high, self.wide))
        return cut.movedim(-4, -2).flatten(-2)


def by_frame(sound: Sound, values: Tensor) -> Tensor:
    """The normalised moments of each frame, [B, F, m, bins], of the sound's moments [B, 1 + m (F - 1), bins]. The
    first frame has the one moment of its picture m times."""
    first = values[:, :1].expand(-1, sound.moments, -1)
    frames = torch.cat([first, values[:, 1:]], dim=1).unflatten(1, (-1, sound.moments))
    return (frames - sound.mean) / sound.std


def laid(sound: Sound, strip: Strip, values: Tensor) -> Tensor:
    """The rows [B, F, C, p, W] of the sound's moments [B, 1 + m (F - 1), bins], see `by_frame`; what is left of patch
    and row is 0."""
    patches = by_frame(sound, values)
    room = (0, strip.size - sound.bins, 0, strip.tokens - sound.moments)
    return strip.rows(nn.functional.pad(patches, room))


def heard(sound: Sound, strip: Strip, latents: Tensor, first: bool = True) -> Tensor:
    """The inverse of `laid`, from latents [B, F, C, H + p, W]. first: whether they begin with the first frame, whose
    one moment is the mean of its copies."""
    patches = strip.patches(latents[..., -strip.high :, :])[..., : sound.moments, : sound.bins]
    moments = patches * sound.std + sound.mean
    if not first:
        return moments.flatten(1, 2)
    return torch.cat([moments[:, :1].mean(2), moments[:, 1:].flatten(1, 2)], dim=1)


class SoundStream(nn.Module):
    """What a network has for its sound. Its first prediction is 0.

    size: numbers of a patch, or of a moment of given sound.  dim: width of the network.
    sinks: [layers, sinks, heads, head size]; None for none.  given: whether there is nothing to predict."""

    sink_keys: Tensor | None

    def __init__(self, size: int, dim: int, sinks: Sequence[int] | None, given: bool = False):
        super().__init__()
        self.embedding, self.head = nn.Linear(size, dim), None if given else nn.Linear(dim, size)
        if self.head is not None:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        self.sink_keys = None if sinks is None else nn.Parameter(0.02 * torch.randn(*sinks))
        self.sink_values = None if sinks is None else nn.Parameter(torch.zeros(*sinks))

    def with_sinks(self, layer: int, result: Result, query: Tensor, frames: int, tokens: int) -> Tensor:
        """Attention of a layer, [B, L, H, D], in which the queries of the sound also see the sinks:

            softmax([q' k, q k_sink] / sqrt(D)) [v, v_sink]         q' and k rotated, q and k_sink not

        As the sinks have no position, what a query gets of them is the same at every frame of an endless video.

        result: of attention without the sinks.  query: before its rotation.  frames, tokens: how many frames there
        are, and how many patches the sound of each has, its last ones."""
        assert self.sink_keys is not None and self.sink_values is not None and result.lse is not None
        key, value = self.sink_keys[layer].type_as(query), self.sink_values[layer].type_as(query)

        def own(x: Tensor) -> Tensor:  # [B, L, ...] of the sound alone
            return x.unflatten(1, (frames, -1))[:, :, -tokens:].flatten(1, 2)

        logits = torch.einsum("blhd,nhd->bhln", own(query), key).to(result.lse) * query.shape[-1] ** -0.5
        read = torch.einsum("bhln,nhd->blhd", logits.softmax(-1).type_as(value), value)
        seen = Result(own(result.out), own(result.lse.mT).mT)
        both = merge(seen, Result(read, logits.logsumexp(-1))).out
        split = result.out.unflatten(1, (frames, -1))
        return torch.cat([split[:, :, :-tokens], both.unflatten(1, (frames, -1))], dim=2).flatten(1, 2)


def add_sound(network: Any, sinks: int = 0, given: int | None = None) -> None:
    """Gives a WanTransformer3DModel a `SoundStream`, `network.sound`, where it has its first weights. given: the bins
    of a sound that is given; None for one that is made."""
    config, like = network.config, next(network.parameters())
    heads, head = config.num_attention_heads, config.attention_head_dim
    shape = (config.num_layers, sinks, heads, head) if sinks else None
    size = strip_of(config, 0).size if given is None else given
    made = SoundStream(size, heads * head, shape, given is not None)
    network.sound = made.to(dtype=like.dtype, device=None if like.is_meta else like.device)


def strip_of(config: Mapping[str, Any], width: int) -> Strip:
    """The place of the sound under latents of this width. config: of the network; values that are defaults may be
    missing."""
    _, high, wide = config.get("patch_size", (1, 2, 2))
    return Strip(config.get("in_channels", 16), high, wide, width)


@contextmanager
def hearing(network: Any, width: int, moments: Tensor | None = None) -> Iterator[None]:
    """Calls of the network inside, on latents of this width, embed and predict their last row of patches as sound, if
    the network has a `SoundStream`. moments: [B, F, m, bins], of a sound that is given, and is in the place of that
    row; it is not predicted."""
    sound, strip = getattr(network, "sound", None), strip_of(network.config, width)
    if sound is None:
        yield
        return

    def embed(_: nn.Module, given: tuple[Tensor], out: Tensor) -> Tensor:
        if moments is None:
            patches = strip.patches(given[0][..., -strip.high :, :].movedim(2, 1))  # [B, F, tokens, C p p]
        else:
            patches = nn.functional.pad(moments, (0, 0, 0, strip.tokens - moments.shape[-2]))
            patches = patches.flatten(0, 1)[:, None]  # each frame is a row of the batch
        embedded = sound.embedding(patches.to(sound.embedding.weight.dtype))  # [B, F, tokens, D]
        return torch.cat([out[..., :-1, :], embedded.movedim(-1, 1)[..., None, :].to(out.dtype)], dim=-2)

    def predict(_: nn.Module, given: tuple[Tensor], out: Tensor) -> Tensor:
        tokens = strip.tokens  # of a frame, as each is a row of the batch
        return torch.cat([out[:, :-tokens], sound.head(given[0][:, -tokens:]).to(out.dtype)], dim=1)

    handles = [network.patch_embedding.register_forward_hook(embed)]
    if sound.head is not None:
        handles.append(network.proj_out.register_forward_hook(predict))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def save_sound(weights: Mapping[str, Tensor], folder: Path) -> None:
    """weights: "<expert>.sound.<name>" -> tensor."""
    save_part(weights, folder / FILE)


def load_sound(networks: Sequence[Any], folder: Path) -> None:
    """Gives the networks the sound streams that this folder holds for them, see `part_file.load_part`."""

    def add(network: Any, own: Mapping[str, Tensor], _: Mapping[str, str]) -> nn.Module:
        given = None if "head.weight" in own else own["embedding.weight"].shape[1]
        add_sound(network, own["sink_keys"].shape[1] if "sink_keys" in own else 0, given)
        return network.sound

    load_part(folder / FILE, "backbone.sound", networks, add, "sound.")
