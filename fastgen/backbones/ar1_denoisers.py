"""The networks of AR(1) videos behind the contract: the trained one, and the law itself as a teacher."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastgen.backbones.ar1_law import AR1Law
from fastgen.backbones.ar1_network import FrameMap, KnotInputs
from fastgen.batch import Conditioning
from fastgen.denoiser import Denoiser, Inputs
from fastgen.schedule import Schedule
from fastgen.streaming.context import Context


class FrameDenoiser(Denoiser):
    """A FrameMap behind the contract. All frames of a call have one level, except that the chunks of `inputs.causal`
    may differ. Raises ValueError for other levels, and for `inputs.causal` without `inputs.clean` (diffusion forcing),
    as the network is not told the levels of the frames that it sees."""

    takes_chunks = True
    feature_dim = 0  # it has none, see feature_modules
    network: FrameMap

    def __init__(self, network: FrameMap, schedule: Schedule):
        super().__init__(network, schedule, "sample")

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        timestep, label = self.timestep(t, inputs), cond["label"]
        if inputs.causal is None:
            if t.dim() == 2:
                raise ValueError(
                    "the networks of ar1_video take one level for all frames; only its teacher takes several"
                )
            remember(inputs, x_t)
            return self.network(x_t, t, timestep, label, past_frames(inputs.context, x_t))
        if inputs.clean is None:
            raise ValueError(
                "the networks of ar1_video cannot see noisy frames as past (diffusion forcing); give clean ones, or "
                "choose another backbone"
            )
        parts = []
        for chunk in inputs.causal.split(x_t.shape[1]):
            level, step = (v[:, chunk.start] if t.dim() == 2 else v for v in (t, timestep))
            past = inputs.clean[:, frames_of(inputs.causal.past(chunk))]
            parts.append(self.network(x_t[:, chunk.start : chunk.stop], level, step, label, past))
        return torch.cat(parts, dim=1)

    @property
    def time_embedding(self) -> nn.Module:
        return self.network.time

    def set_time_embedding(self, module: nn.Module) -> None:
        self.network.time = module

    def add_inputs(self, counts: Mapping[str, int], dim: int, levels: Sequence[str] = ()) -> None:
        """Raises ValueError if both kinds of input are asked for: no role has both."""
        if not counts:
            return super().add_inputs({}, dim, levels)
        if levels:
            raise ValueError(f"a network of ar1_video takes {sorted(counts)} or {list(levels)}, not both")
        outputs = {name: table.out_features for name, table in self.network.tables.items()}
        self.set_time_embedding(KnotInputs(self.network.time, outputs, counts))  # type: ignore[arg-type]

    @property
    def feature_modules(self) -> Sequence[nn.Module]:
        raise ValueError(
            "the networks of ar1_video are linear and have no features for a discriminator: set objective.gan_weight "
            "to 0, or choose another objective"
        )

    @property
    def shard_modules(self) -> Sequence[nn.Module]:
        return []


class AR1Denoiser(Denoiser):
    """The law as a network without parameters: the exact E[x0 | what is seen], at any level per frame. It is
    bidirectional unless the inputs ask for chunks; then each chunk sees itself and the past that its schedule shows,
    at the positions that the schedule gives."""

    takes_chunks = True

    def __init__(self, law: AR1Law, schedule: Schedule):
        super().__init__(nn.Identity(), schedule, "sample")
        self.law = law

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        if other := set(inputs.given) - {"context", "causal", "clean", "memory"}:
            raise ValueError(f"the analytic teacher takes only x_t, t, the label and a past, got also {sorted(other)}")
        levels = t if t.dim() == 2 else t[:, None].expand(-1, x_t.shape[1])
        label, context, causal = cond["label"], inputs.context, inputs.causal
        if context is not None:
            remember(inputs, x_t)
            past = past_frames(context, x_t)
            known = levels.new_full((len(t), past.shape[1]), context.chunks.context_noise)
            held = tuple(block.frames for block in context.blocks)
            positions = context.chunks.positions_of(context.called(x_t.shape[1]), held)
            return self.conditional(x_t, levels, label, past, known, positions)
        if causal is None:
            return self.law.posterior_mean(x_t, levels, label)
        parts = []
        for chunk in causal.split(x_t.shape[1]):
            own, rows = slice(chunk.start, chunk.stop), frames_of(causal.past(chunk))
            past, known = x_t[:, rows], levels[:, rows]
            if inputs.clean is not None:
                past, known = inputs.clean[:, rows], torch.full_like(known, causal.context_noise)
            positions = causal.positions_of(chunk)
            parts.append(self.conditional(x_t[:, own], levels[:, own], label, past, known, positions))
        return torch.cat(parts, dim=1)

    def conditional(
        self,
        x_t: Tensor,
        levels: Tensor,
        label: Tensor,
        past: Tensor,
        known: Tensor,
        positions: tuple[tuple[range, ...], range],
    ) -> Tensor:
        """E[chunk | chunk at `levels`, past at levels `known`], each [B, frames]. positions: of the past and the chunk
        (`ChunkSchedule.positions_of`)."""
        earlier, own = positions
        whole = torch.cat([past.to(x_t.dtype), x_t], dim=1)
        mean = self.law.posterior_mean(whole, torch.cat([known, levels], dim=1), label, [*frames_of(earlier), *own])
        return mean[:, past.shape[1] :]

    @property
    def time_embedding(self) -> nn.Module:
        return self.network

    @property
    def shard_modules(self) -> Sequence[nn.Module]:
        return []


def frames_of(ranges: Sequence[range]) -> list[int]:
    return [frame for frames in ranges for frame in frames]


def remember(inputs: Inputs, x_t: Tensor) -> None:
    """What later chunks see of a chunk [B, C, 2, H, W] is the chunk: one layer, one token per frame."""
    if inputs.memory is not None:
        tokens = x_t.flatten(2)[:, :, None]
        inputs.memory.append((tokens, tokens))


def past_frames(context: Context | None, like: Tensor) -> Tensor:
    """The frames that a context holds, [B, P, 2, H, W], in order."""
    held = None if context is None else context.past(0)
    return like[:, :0] if held is None else held[0][:, :, 0].unflatten(2, like.shape[2:])
