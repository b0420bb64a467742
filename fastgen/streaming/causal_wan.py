"""A causal Wan transformer without a subclass: the weights and the state dict are those of the stock network.

Two things are exchanged, for the time of one call or for good. The network's rotary module hands its result to every
block as a plain argument; a hook replaces it by a `Place`, which says where the tokens stand and what they see. The
attention processors read the `Place`; given stock embeddings, they are the stock processors."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.denoiser import Inputs
from fastgen.ops.block_sparse_attention import (
    BlockLayout,
    Cache,
    LinearBranch,
    LinearState,
    Selection,
    TopK,
    VideoMask,
    attention,
    causal_layout,
    dense_layout,
    teacher_forcing_layout,
    tile_tokens,
)
from fastgen.streaming.context import Context
from fastgen.streaming.schedule import ChunkAttention, ChunkSchedule
from fastgen.streaming.sound import SoundStream

Rotation = tuple[Tensor, Tensor]  # cos and sin, [1, tokens, 1, D / 2]


@dataclass(frozen=True, eq=False)
class Place:
    """What the attention layers are told, where a stock network hands them rotary embeddings.

    frames: the number of frames of a sample, which are folded into the batch axis: the layers get [B x frames, T, D],
    so that each frame may have its own noise level at the cost of one.
    own, past: rotations of the call's own tokens and of the visible past's.
    context: the memory of the past; None without one.
    layout: which tokens see which; a rule chooses by content.
    memory: the list that gets each layer's keys and values.
    branches: of every layer, what reads the sums over the frames that are gone (`add_linear_memory`); None without.
    sound: what the network has for the sound of its videos, with sinks (`streaming.sound`); None without.
    sound_tokens: those of a frame, its last ones."""

    frames: int
    own: Rotation
    past: Rotation | None
    context: Context | None
    layout: BlockLayout | Selection
    attention: ChunkAttention
    memory: list[tuple[Tensor, Tensor]] | None
    branches: Any = None
    sound: SoundStream | None = None
    sound_tokens: int = 0


class CausalAttention:
    """The self-attention processor of layer `layer`, around the stock one."""

    def __init__(self, stock: Any, layer: int):
        self.stock, self.layer = stock, layer

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Place | Rotation | None = None,
    ) -> Tensor:
        if not isinstance(rotary_emb, Place):
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        tokens = hidden_states.unflatten(0, (-1, rotary_emb.frames)).flatten(1, 2)
        if getattr(attn, "fused_projections", False):
            query, key, value = attn.to_qkv(tokens).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
        query, key = attn.norm_q(query).type_as(value), attn.norm_k(key).type_as(value)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        out = self.attend(rotary_emb, query, key, value).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out.type_as(query)))
        return out.unflatten(1, (rotary_emb.frames, -1)).flatten(0, 1)

    def attend(self, place: Place, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, L, H, D]: attention over the visible past and the own tokens, which the memory gets, if there is one.

        All that differs from chunk to chunk is used here, so that what is around it compiles once."""
        if place.memory is not None:
            place.memory.append((key, value))
        gone, plain = self.gone(place, query), query
        query, key = rotated(query, place.own), rotated(key, place.own)
        cache = self.past(place, key)
        layout, rows = place.layout, 0 if cache is None else cache.key.shape[1]
        if not isinstance(layout, BlockLayout):
            layout = layout(query, key if cache is None else torch.cat([cache.key, key], dim=1))
        all_learn = not torch.is_grad_enabled() or (cache is not None and cache.key.requires_grad)
        learns = None if all_learn else (rows, rows + key.shape[1])
        named = {"cache": cache, "grad_keys": learns, "backend": place.attention.backend}
        if place.sound is None:
            out = attention(query, key, value, layout, **named).out  # type: ignore[arg-type]
        else:
            result = attention(query, key, value, layout, **named, needs_lse=True)  # type: ignore[arg-type]
            out = place.sound.with_sinks(self.layer, result, plain, place.frames, place.sound_tokens)
        return out if gone is None else out + gone

    def gone(self, place: Place, query: Tensor) -> Tensor | None:
        """What the query, which is not rotated, reads of the frames that left the window; None if there are none."""
        if place.context is None or place.context.absorbed is None:
            return None
        state = LinearState(*(kept[self.layer] for kept in place.context.absorbed))
        return place.branches[self.layer](query, state).type_as(query)

    def past(self, place: Place, like: Tensor) -> Cache | None:
        """Keys and values of the visible past, with the keys at their positions; None if there are none."""
        context = place.context
        if context is None or place.past is None:
            return None
        memo = None if torch.is_grad_enabled() else context.memo
        if memo is not None and self.layer in memo:
            return memo[self.layer]
        past = context.past(self.layer)
        assert past is not None
        cache = Cache(rotated(past[0].type_as(like), place.past), past[1].type_as(like))
        if memo is not None:
            memo[self.layer] = cache
        return cache


class FoldedCrossAttention:
    """The cross-attention processor: the frames of a sample share the keys and values of its prompt."""

    def __init__(self, stock: Any):
        self.stock = stock

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotation | None = None,
    ) -> Tensor:
        assert encoder_hidden_states is not None
        frames = len(hidden_states) // len(encoder_hidden_states)
        tokens = hidden_states.unflatten(0, (-1, frames)).flatten(1, 2)
        out = self.stock(attn, tokens, encoder_hidden_states, attention_mask, rotary_emb)
        return out.unflatten(1, (frames, -1)).flatten(0, 1)


def check_causal(config: Mapping[str, Any]) -> None:
    """Raises ValueError for the config of a transformer that cannot work by frames or chunks: one with patches of
    several frames, and one that is also given an image."""
    if (patch := config.get("patch_size", (1, 2, 2)))[0] != 1:
        raise ValueError(f"chunks need patches of one latent frame, and this network's are {list(patch)}")
    if config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None:
        raise ValueError("a network that is given an image cannot work chunk by chunk yet")


def make_causal(network: Any) -> None:
    """Gives a WanTransformer3DModel the processors above, once. Without a `Place`, it computes what it did before."""
    check_causal(network.config)
    for i, block in enumerate(network.blocks):
        if not isinstance(block.attn1.processor, CausalAttention):
            block.attn1.set_processor(CausalAttention(block.attn1.processor, i))
            block.attn2.set_processor(FoldedCrossAttention(block.attn2.processor))


def add_linear_memory(network: Any) -> None:
    """Gives a WanTransformer3DModel a branch for each layer, `network.memory`, that reads the sums over the frames
    that are gone. They start at zero, so that the network computes what it did before."""
    head = network.config.attention_head_dim
    like = network.blocks[0].attn1.to_q.weight
    branches = [LinearBranch(head) for _ in network.blocks]
    network.memory = nn.ModuleList(branches).to(dtype=like.dtype, device=None if like.is_meta else like.device)


@contextmanager
def placed(network: Any, place: Place) -> Iterator[None]:
    """Calls of the network inside hand this place to their blocks. What checkpointing recomputes later keeps it."""
    handle = network.rope.register_forward_hook(lambda *_: place)
    try:
        yield
    finally:
        handle.remove()


def place_of(network: Any, x: Tensor, inputs: Inputs) -> Place:
    """The place of x [B, frames, C, H, W]: a chunk with a context, a whole video with causal chunks, [clean | noisy]
    frames, or a plain video."""
    _, high, wide = network.config.patch_size
    grid = (x.shape[-2] // high, x.shape[-1] // wide)
    rope, frames, tokens = network.rope, x.shape[1], grid[0] * grid[1]
    dims = (rope.t_dim, rope.h_dim, rope.w_dim)
    sound = getattr(network, "sound", None)
    heard = (sound, grid[1]) if sound is not None and sound.sink_keys is not None else (None, 0)
    turn: Callable[[Sequence[range]], Rotation] = lambda ranges: rotation(tuple(ranges), grid, dims, x.device)  # noqa: E731
    if inputs.context is not None:
        chunks, chunk = inputs.context.chunks, inputs.context.called(frames)
        past, own = chunks.positions_of(chunk, tuple(block.frames for block in inputs.context.blocks))
        seen = sum(len(part) for part in past)
        layout = chunk_layout(chunks.attention, tokens, seen, min(chunks.sink, seen), frames, x.device)
        branches = getattr(network, "memory", None)
        if chunks.linear and branches is None:
            raise ValueError("chunks.linear: this network has no linear memory; it is that of another student")
        turned = turn(past) if past else None
        kept = (inputs.context, layout, chunks.attention, inputs.memory, branches)
        return Place(frames, turn([own]), turned, *kept, *heard)
    if inputs.causal is not None:
        chunks = inputs.causal
        video = frames if inputs.clean is None else frames // 2
        layout = video_layout(chunks, tokens, video, inputs.clean is not None, x.device)
        ranges = [range(video)] * (frames // video)
        return Place(frames, turn(ranges), None, None, layout, chunks.attention, None, None, *heard)
    plain = ChunkAttention()
    layout = chunk_layout(plain, tokens, 0, 0, frames, x.device)
    return Place(frames, turn([range(frames)]), None, None, layout, plain, None, None, *heard)


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """x [B, L, H, D] with each pair of channels turned by its angle, as in diffusers' WanAttnProcessor."""
    cos, sin = rotation
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


@functools.lru_cache(maxsize=8)  # the steps of a chunk share them; with absolute positions the next chunk has others
@torch.inference_mode(False)
def rotation(
    positions: tuple[range, ...],
    grid: tuple[int, int],
    dims: tuple[int, int, int],
    device: torch.device,
    theta: float = 10000.0,
) -> Rotation:
    """The rotations of all tokens of frames at these positions, [1, tokens, 1, D / 2] float32.

    dims: channels for time, height and width. Angles are computed in float64, like the stock table's, which they equal
    where it has an entry; there is no largest position."""
    frames = torch.cat([torch.arange(r.start, r.stop, device=device) for r in positions])
    axes = (frames, *(torch.arange(side, device=device) for side in grid))
    parts = []
    for axis, (positions_of_axis, dim) in enumerate(zip(axes, dims, strict=True)):
        frequency = 1 / theta ** (torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
        angle = torch.outer(positions_of_axis.double(), frequency)
        shape = [1, 1, 1, -1]
        shape[axis] = len(positions_of_axis)
        parts.append(angle.view(shape).expand(len(frames), *grid, -1))
    angles = torch.cat(parts, dim=-1).reshape(1, len(frames) * grid[0] * grid[1], 1, -1)
    return angles.cos().float(), angles.sin().float()


@functools.lru_cache(maxsize=64)
def chunk_layout(
    rule: ChunkAttention, tokens: int, seen: int, sink: int, frames: int, device: torch.device
) -> BlockLayout | Selection:
    """A chunk of `frames` frames over the rows of the `seen` frames before it, of which the first `sink` are the sink,
    and over its own. top_k always keeps the sink, the frames right before the chunk and the chunk itself, and fills up
    to the density. A first chunk sees itself whole."""
    own = tile_tokens(frames * tokens, rule.tile)
    if not seen:
        return dense_layout(own, own).to(device)
    recent = (seen - min(frames, seen)) * tokens
    keys = tile_tokens(seen * tokens, rule.tile, sorted({sink * tokens, recent})).followed_by(own)
    if rule.density is None:
        return dense_layout(own, keys).to(device)
    forced = ((0, sink * tokens),) * (sink > 0) + ((recent, (seen + frames) * tokens),)
    always = TopK(own, keys, 0, forced=forced)
    return dataclasses.replace(always, k=max(0, round((rule.density - always.density) * len(keys))))


@functools.lru_cache(maxsize=64)
def video_layout(chunks: ChunkSchedule, tokens: int, frames: int, clean: bool, device: torch.device) -> BlockLayout:
    """A whole video at once, or its clean and noisy frames. Raises ValueError as `ChunkSchedule.check_mask` does."""
    chunks.check_mask(frames)
    mask = VideoMask(tokens, tuple(len(c) for c in chunks.split(frames)), chunks.window, chunks.sink)
    return (teacher_forcing_layout if clean else causal_layout)(mask, chunks.attention.tile).to(device)
