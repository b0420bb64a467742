"""Stock transformers whose last blocks are the head of an inner flow (`fastgen.modules.inner_flow`).

An export that contains one names this module in its model_index.json. diffusers does not import the module itself,
and loads the component only if it has been imported before:

    import fastgen.pipelines.inner_flow
    pipeline = DiffusionPipeline.from_pretrained(folder)

The network draws the noise of its inner flow from the global generator, as the scheduler does with its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import SD3Transformer2DModel, WanTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - diffusers looks here for how to load the classes
from torch import Tensor, nn

from fastgen.modules.inner_flow import Fusion, integrate
from fastgen.pipelines.derived import extending, taken_over
from fastgen.policy import InnerFlow


class InnerFlowTransformer:
    """What the classes below add to the stock ones. Their weights have the stock names, and `fusion` beside them.

    A call makes two kinds of passes through the stock forward: the trunk's, whose output layer is computed in vain,
    with the first blocks in the place of all, and the head's, with the last ones. Both are told the level t."""

    chain: ClassVar[str]  # the stock network's list of blocks
    inlet: ClassVar[str]  # its embedder of latents
    text: ClassVar[str | None] = None  # its embedder of the prompt, if the blocks change the prompt's tokens
    config: Any
    fusion: Fusion

    @classmethod
    def of(cls, network: Any, flow: InnerFlow) -> Any:
        """The network with an inner flow. It shares all weights, and a head that has not learned anything yet returns
        what the network predicts."""
        made = taken_over(cls, network, inner_blocks=flow.blocks, inner_levels=list(flow.levels))
        made.fusion = Fusion(made.inner_width).beside(next(network.parameters()))
        return made

    @property
    def inner_width(self) -> int:
        return self.config.num_attention_heads * self.config.attention_head_dim

    def forward(
        self,
        hidden_states: Tensor,
        *,
        noise: Tensor | None = None,
        place: Tensor | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """hidden_states: x_t, and `kwargs` the other stock arguments. noise: where the inner flow begins, like x_t.
        place: s and r, [B, 2]; noise is then y_s, and the head is called once."""
        stock = partial(super().forward, return_dict=False, **kwargs)  # type: ignore[misc]
        features = self.trunk(stock, hidden_states)

        def head(y: Tensor, s: Tensor, r: Tensor) -> Tensor:
            return self.head(stock, y.to(hidden_states.dtype), features, s, r)

        if noise is None:
            noise = torch.randn(hidden_states.shape, device=hidden_states.device, dtype=hidden_states.dtype)
        if place is None:
            out = integrate(head, noise, self.config.inner_levels).to(hidden_states.dtype)
        else:
            out = head(noise, *place.unbind(-1))
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)

    @contextmanager
    def running(self, part: slice) -> Iterator[nn.ModuleList]:
        """Stock forwards inside call some of the blocks only."""
        blocks = getattr(self, self.chain)
        setattr(self, self.chain, blocks[part])
        try:
            yield getattr(self, self.chain)
        finally:
            setattr(self, self.chain, blocks)

    def trunk(self, stock: Any, x_t: Tensor) -> tuple[Tensor | None, Tensor]:
        """The prompt's tokens, if they change, and those of x_t, after the first blocks."""
        found: list[Any] = []
        with self.running(slice(None, -self.config.inner_blocks)) as blocks:
            hook = blocks[-1].register_forward_hook(lambda _module, _given, out: found.append(out))
            try:
                stock(hidden_states=x_t)
            finally:
                hook.remove()
        return found[-1] if isinstance(found[-1], tuple) else (None, found[-1])

    def head(self, stock: Any, y: Tensor, features: tuple[Tensor | None, Tensor], s: Tensor, r: Tensor) -> Tensor:
        """h(y, s, r) [B, ...], by the last blocks."""
        prompt, tokens = features
        hooks = [getattr(self, self.inlet).register_forward_hook(lambda _m, _i, out: self.fused(tokens, out, s, r))]
        if self.text is not None:
            hooks.append(getattr(self, self.text).register_forward_hook(lambda *_: prompt))
        try:
            with self.running(slice(-self.config.inner_blocks, None)):
                return stock(hidden_states=y)[0]
        finally:
            for hook in hooks:
                hook.remove()

    def fused(self, features: Tensor, embedded: Tensor, s: Tensor, r: Tensor) -> Tensor:
        """The features [B, N, D] with the embedded y, which the stock embedder gives as tokens or as a map
        [B, D, F, H, W]."""
        if embedded.dim() == 3:
            return self.fusion(features, embedded, s, r)
        grid = embedded.shape[2:]
        return self.fusion(features, embedded.flatten(2).mT, s, r).mT.unflatten(2, grid)


def add_fusion(network: Any) -> None:
    network.fusion = Fusion(network.inner_width)


SETTINGS = {"inner_blocks": 5, "inner_levels": (1.0, 0.5)}


class InnerFlowSD3Transformer2DModel(InnerFlowTransformer, SD3Transformer2DModel):
    chain, inlet, text = "transformer_blocks", "pos_embed", "context_embedder"
    __init__ = extending(SD3Transformer2DModel, add_fusion, **SETTINGS)


class InnerFlowWanTransformer3DModel(InnerFlowTransformer, WanTransformer3DModel):
    chain, inlet = "blocks", "patch_embedding"
    __init__ = extending(WanTransformer3DModel, add_fusion, **SETTINGS)


CLASSES = {
    "SD3Transformer2DModel": InnerFlowSD3Transformer2DModel,
    "WanTransformer3DModel": InnerFlowWanTransformer3DModel,
}
