"""Wan's transformer behind the contract of a network: whole videos, chunk by chunk as a causal network, or videos
whose first picture is given."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.batch import Conditioning
from fastgen.denoiser import Denoiser, Inputs
from fastgen.modules.inner_flow import told
from fastgen.modules.inputs import WanExtraInputs
from fastgen.policy import InnerFlow
from fastgen.schedule import FlowSchedule, expand
from fastgen.streaming.actions import ActionEmbedding, lasting
from fastgen.streaming.causal_wan import add_linear_memory, make_causal, place_of, placed
from fastgen.streaming.sound import hearing

LOWEST = 1e-4  # the level below which no prediction is divided by it


def by_frame(value: Tensor, frames: int) -> Tensor:
    """[B, F]: a value [B] for each frame; values that are by frame stay as they are."""
    return value if value.dim() == 2 else value[:, None].expand(-1, frames)


class WanDenoiser(Denoiser):
    """An unmodified WanTransformer3DModel behind the contract, x_t [B, F, C, H, W].

    t may be [B, F], one level per latent frame. The network can work chunk by chunk, as a causal one.

    silent_rows: latent rows of a frame that hold sound, of which a stock network knows nothing: it makes the picture
    above them, and the sound that it predicts is 0, the mean.

    Features are the video tokens after the block at half depth, the one
    at three quarters, and the last (FastGen's choice: 15, 22 and 29 of Wan 2.1 1.3B's 30)."""

    network: Any  # a WanTransformer3DModel
    extra_inputs = WanExtraInputs
    takes_chunks = True
    silent_rows = 0

    def __init__(self, network: Any):
        super().__init__(network, FlowSchedule(), "flow_prediction")
        self.feature_dim = network.config.num_attention_heads * network.config.attention_head_dim

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        if self.silent_rows:
            return self.call_silently(x_t, t, cond, inputs)
        if inputs.streams or t.dim() == 2 or self.is_taught:
            return self.call_by_frame(x_t, t, cond, inputs)
        noise = None if inputs.inner is None else inputs.inner.transpose(1, 2)
        more = told(noise, inputs.inner_levels)
        return self.call_stock(x_t.transpose(1, 2), self.timestep(t, inputs), cond, **more).transpose(1, 2)

    def call_silently(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        """With the velocity of the sound that leads to 0: v = x_t / t, so that x0 = x_t - t v = 0."""
        picture, sound = x_t[..., : -self.silent_rows, :], x_t[..., -self.silent_rows :, :]
        made = self.call_stock(picture.transpose(1, 2), self.timestep(t, inputs), cond).transpose(1, 2)
        return torch.cat([made, sound.to(made.dtype) / expand(t.clamp_min(LOWEST), x_t).to(made.dtype)], dim=-2)

    def call_stock(self, x: Tensor, timestep: Tensor, cond: Conditioning, **more: Any) -> Tensor:
        """The stock network's own call, x [B, C, F, H, W]. more: what an inner flow is told."""
        dtype = self.network.dtype  # not that of its first weights, which stay float32
        image = cond.get("image_embeds")
        return self.network(
            hidden_states=x.to(dtype),
            timestep=timestep,
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            encoder_hidden_states_image=None if image is None else image.to(dtype),
            return_dict=False,
            **more,
        )[0]

    def add_inner_flow(self, flow: InnerFlow) -> None:
        from fastgen.pipelines.inner_flow import InnerFlowWanTransformer3DModel  # with diffusers

        self.network = InnerFlowWanTransformer3DModel.of(self.network, flow)

    def call_by_frame(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        """The network with its frames folded into the batch axis, so that each has a level of its own, and with
        attention over what `streaming.causal_wan.place_of` says. t: [B], or [B, F] for each frame."""
        if inputs.inner is not None:
            raise ValueError("an inner flow takes whole videos with one level for all frames")
        make_causal(self.network)
        frames, high, given = x_t.shape[1], x_t.shape[-2], None
        called = range(frames) if inputs.context is None else inputs.context.called(frames)
        inputs, told = self.acted(cond, inputs, called)
        if self.is_driven:
            given, x_t = cond["sound"][:, called.start : called.stop], self.with_room(x_t)
            inputs = replace(inputs, clean=None if inputs.clean is None else self.with_room(inputs.clean))
        t = by_frame(t, frames)
        scalars = {name: inputs.given[name] for name in ("time", *inputs.embedded) if name in inputs.given}
        values: dict[str, Any] = {name: by_frame(value, frames) for name, value in scalars.items()}
        if inputs.clean is not None and inputs.causal is not None:
            x_t = torch.cat([inputs.clean.to(x_t.dtype), x_t], dim=1)
            # the clean frames are told what they are told when they are committed: a jump that ends at 0
            clean = values | {"s": torch.zeros_like(t)}
            values = {name: torch.cat([clean[name], value], dim=1) for name, value in values.items()}
            t = torch.cat([torch.full_like(t, inputs.causal.context_noise), t], dim=1)
            told = None if told is None else torch.cat([told, told], dim=1)
            given = None if given is None else torch.cat([given, given], dim=1)
        flat = Inputs(**{name: value.flatten() for name, value in values.items()})
        with (
            placed(self.network, place_of(self.network, x_t, inputs)),
            self.telling(told),
            hearing(self.network, x_t.shape[-1], given),
        ):
            out = self.call_stock(x_t.flatten(0, 1)[:, :, None], self.timestep(t.flatten(), flat), cond)
        return out.squeeze(2).unflatten(0, (len(x_t), -1))[:, -frames:, :, :high]

    def with_room(self, x: Tensor) -> Tensor:
        """Latents with a row of patches more, in whose place the network sees the sound that it is given."""
        return nn.functional.pad(x, (0, 0, 0, self.network.config.patch_size[1]))

    @property
    def is_taught(self) -> bool:
        """Whether it has parts that a stock network lacks, for actions or sound."""
        return self.actions is not None or hasattr(self.network, "sound")

    @property
    def is_driven(self) -> bool:
        """Whether it has to be given a sound, cond["sound"] [B, F, m, bins] of the video's frames from its beginning
        on."""
        sound = getattr(self.network, "sound", None)
        return sound is not None and sound.head is None

    @property
    def actions(self) -> ActionEmbedding | None:
        """What tells the network of actions; None if it knows none."""
        return getattr(self.network, "actions", None)

    def acted(self, cond: Conditioning, inputs: Inputs, called: range) -> tuple[Inputs, Tensor | None]:
        """What a call on these frames recalls, in its context, and what it is told of their actions, [B, frames, dim];
        None for a network that knows none. cond["actions"]: the moves of the video's frames from its beginning on,
        [B, F, axes], of which the last one goes on."""
        if self.actions is None:
            return inputs, None
        moves = lasting(cond["actions"], called.stop)
        if inputs.context is not None:
            recalled = inputs.context.recalled(self.actions.views(moves), len(called))
            inputs = replace(inputs, context=recalled)
        return inputs, self.actions(moves, called)

    @contextmanager
    def telling(self, told: Tensor | None) -> Iterator[None]:
        """Calls of the network inside add this to the embeddings of their frames' times, [B, frames, dim]."""
        if told is None:
            yield
            return
        added = told.flatten(0, 1)
        embedder: Any = self.network.condition_embedder
        inner: Any = embedder.embedding if isinstance(embedder, WanExtraInputs) else embedder
        handle = inner.time_embedder.register_forward_hook(lambda _m, _i, out: out + added.to(out.dtype))
        try:
            yield
        finally:
            handle.remove()

    @property
    def time_embedding(self) -> nn.Module:
        return self.network.condition_embedder

    def set_time_embedding(self, module: nn.Module) -> None:
        self.network.condition_embedder = module

    def add_linear_memory(self) -> None:
        add_linear_memory(self.network)

    @property
    def feature_modules(self) -> Sequence[nn.Module]:
        blocks = self.network.blocks
        depths = {len(blocks) // 2, 3 * len(blocks) // 4, len(blocks) - 1}
        return [blocks[i] for i in sorted(depths)]

    @property
    def shard_modules(self) -> Sequence[nn.Module]:
        return list(self.network.blocks)

    def smallest(self, x_t: Tensor, t: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Inputs]:
        """One token; all of it for a causal network, whose chunks are counted in frames, and for one with sound."""
        if inputs.streams or self.silent_rows or hasattr(self.network, "sound"):
            return x_t, t, inputs
        frames, height, width = self.network.config.patch_size
        t = t if t.dim() == 1 else t[:, :frames]
        s = inputs.s if inputs.s is None or inputs.s.dim() == 1 else inputs.s[:, :frames]
        return x_t[:, :frames, :, :height, :width], t, replace(inputs, s=s)


class GivenFrameDenoiser(WanDenoiser):
    """A network that is given the first picture. It takes whole videos, of the size that the given latents have."""

    takes_chunks = False

    def add_inner_flow(self, flow: InnerFlow) -> None:
        raise ValueError("inner: a network that is given a picture has no inner flow; leave it out")

    def smallest(self, x_t: Tensor, t: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Inputs]:
        return x_t, t, inputs


class WanI2VDenoiser(GivenFrameDenoiser):
    """A WanTransformer3DModel that is given a second video along the channels: cond["image_latents"] is
    [B, F, 4 + C, H, W], a mask and the latents."""

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        x = torch.cat([x_t, cond["image_latents"].to(x_t.dtype)], dim=2)
        return self.call_stock(x.transpose(1, 2), self.timestep(t, inputs), cond).transpose(1, 2)


class WanTI2VDenoiser(GivenFrameDenoiser):
    """A WanTransformer3DModel that is given the first latent frame: cond["image_latents"] is [B, 1, C, H, W].

    The network sees it clean, at level 0, whatever x_t holds there. What it says of this frame is not used: the
    prediction there is the velocity that leads to the given latents z,

        v = (x_t - z) / t,   so that x0 = x_t - t v = z                                             (derived)

    The stock pipeline instead puts z there before every call and at the end, which gives the same videos. All roles
    agree in this frame, so it has no part in differences of scores, and no gradient."""

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        given = cond["image_latents"].to(x_t.dtype)
        x = torch.cat([given, x_t[:, 1:]], dim=1).transpose(1, 2)
        out = self.call_stock(x, self.token_times(x, self.timestep(t, inputs)), cond).transpose(1, 2)
        first = (x_t[:, :1] - given) / expand(t.clamp_min(LOWEST), x_t)
        return torch.cat([first, out[:, 1:].to(first.dtype)], dim=1)

    def token_times(self, x: Tensor, timestep: Tensor) -> Tensor:
        """[B, L], or [B, L (1 + n)] with n packed inputs: the timestep [B] or [B, 1 + n] of all tokens, 0 in the
        first frame."""
        _, high, wide = self.network.config.patch_size
        frame = x.shape[-2] // high * (x.shape[-1] // wide)
        tokens = timestep.unflatten(0, (-1, 1)).repeat_interleave(x.shape[2] * frame, dim=1)
        mask = torch.ones_like(tokens)
        (mask if mask.dim() == 2 else mask[..., 0])[:, :frame] = 0
        return (tokens * mask).flatten(1)
