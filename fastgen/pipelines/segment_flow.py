"""Stock transformers that predict the flow of a whole segment in one call (`fastgen.modules.segment_flow`).

An export that contains one names this module in its model_index.json. diffusers does not import the module itself,
and loads the component only if it has been imported before:

    import fastgen.pipelines.segment_flow
    pipeline = DiffusionPipeline.from_pretrained(folder)

The network returns the average velocity of the flow, so that one step of the stock scheduler lands where it ends."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - diffusers looks here for how to load the classes
from torch import Tensor

from fastgen.modules.segment_flow import Line, Mixture, Segment, SegmentHead, ends, result
from fastgen.pipelines.derived import extending, taken_over
from fastgen.policy import SegmentFlow
from fastgen.schedule import expand


class SegmentFlowTransformer:
    """What the class below adds to the stock one. Its weights have the stock names, and `segment_head` beside them.

    Levels are the sampler's: the segment that begins at one of them ends at the next, or at 0."""

    outlet: ClassVar[str]  # the stock network's last layer
    config: Any
    segment_head: SegmentHead

    @classmethod
    def of(cls, network: Any, flow: SegmentFlow, levels: Sequence[float]) -> Any:
        """The network with a segment flow. It shares all weights."""
        settings = {f"segment_{k}": v for k, v in vars(flow).items() if not k.startswith("_")}
        made = taken_over(cls, network, **settings, segment_levels=list(levels))
        made.segment_head = head_of(made).begin(getattr(network, cls.outlet))
        return made

    def forward(
        self,
        hidden_states: Tensor,
        *,
        timestep: Tensor,
        handed: list[Segment] | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """hidden_states: x_t at a level of the sampler, and `kwargs` the other stock arguments. timestep: [B], a
        thousand times that level. handed: a list to which the segment is appended; the network then returns the
        velocity at x_t itself."""
        given: list[Tensor] = []
        hook = getattr(self, self.outlet).register_forward_pre_hook(lambda _m, args: given.append(args[0]))
        try:
            stock = super().forward(  # type: ignore[misc]
                hidden_states=hidden_states, timestep=timestep, return_dict=False, **kwargs
            )[0]
        finally:
            hook.remove()
        x = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        top = (timestep / 1000).to(x.dtype).expand(len(x))
        segment = self.segment(stock, given[0], x, top)
        x0 = result(segment, x, self.config.segment_substeps, handed)
        velocity = ((x - x0) / expand(top, x)).to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def segment(self, first: Tensor, tokens: Tensor, x: Tensor, top: Tensor) -> Segment:
        """What the network predicts, from its usual output and what its last layer was given, [B, N, width]."""
        size, head = self.config.segment_size, self.segment_head
        more = [self.image(part, x) for part in head.more(tokens).chunk(size - 1, dim=-1)]
        velocities = torch.stack([first, *more], dim=1).to(x.dtype)
        points = x[:, None] - top.reshape(-1, *[1] * x.dim()) * velocities
        bottom = ends(top, self.config.segment_levels)
        if self.config.segment_kind == "line":
            return Line(top, bottom, points)
        weights = torch.stack([self.image(part, x) for part in head.weights(tokens).chunk(size, dim=-1)], dim=1)
        log_std = self.image(head.log_std(tokens), x)[:, None].to(x.dtype) + top.log().reshape(-1, 1, 1, 1, 1)
        return Mixture(top, bottom, x, points, weights.to(x.dtype).log_softmax(1), log_std)

    def image(self, tokens: Tensor, x: Tensor) -> Tensor:
        """[B, C, H, W] of the numbers of its tokens, [B, N, p p C]. x: gives H and W."""
        p, (height, width) = self.config.patch_size, x.shape[2:]
        cells = tokens.reshape(len(x), height // p, width // p, p, p, -1)
        return cells.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, height, width)


def head_of(network: Any) -> SegmentHead:
    """A head for this network, whose settings say which."""
    config, outlet = network.config, getattr(network, network.outlet)
    flow = SegmentFlow(config.segment_kind, config.segment_size, config.segment_substeps)
    return SegmentHead(outlet.in_features, outlet.out_features, flow, config.patch_size**2)


def add_head(network: Any) -> None:
    network.segment_head = head_of(network)


class SegmentFlowSD3Transformer2DModel(SegmentFlowTransformer, SD3Transformer2DModel):
    outlet = "proj_out"
    __init__ = extending(
        SD3Transformer2DModel,
        add_head,
        segment_kind="mixture",
        segment_size=8,
        segment_substeps=32,
        segment_levels=(1.0,),
    )


CLASSES = {"SD3Transformer2DModel": SegmentFlowSD3Transformer2DModel}
