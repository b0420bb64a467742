"""Stock transformers whose last blocks are the head of an inner flow (`fastgen.modules.inner_flow`).

An export that contains one names this module in its model_index.json. diffusers does not import the module itself,
and loads the component only if it has been imported before:

    import fastgen.pipelines.inner_flow
    pipeline = DiffusionPipeline.from_pretrained(folder)

The network draws the noise of its inner flow from the global generator, as the scheduler does with its own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import SD3Transformer2DModel, WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - diffusers looks here for how to load the classes
from torch import Tensor, nn

from fastgen.modules.inner_flow import Fusion, integrate
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
        with torch.device("meta"):
            made = cls.from_config({**network.config, "inner_blocks": flow.blocks, "inner_levels": list(flow.levels)})  # type: ignore[attr-defined]
        for name, module in network.named_children():
            setattr(made, name, module)
        for name, parameter in network.named_parameters(recurse=False):
            setattr(made, name, parameter)
        for name, buffer in network.named_buffers(recurse=False):
            setattr(made, name, buffer)
        made.fusion = Fusion(made.inner_width).beside(next(network.parameters()))
        return made.train(network.training)

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


class InnerFlowSD3Transformer2DModel(InnerFlowTransformer, SD3Transformer2DModel):
    chain, inlet, text = "transformer_blocks", "pos_embed", "context_embedder"

    @register_to_config
    def __init__(
        self,
        inner_blocks: int = 5,
        inner_levels: Sequence[float] = (1.0, 0.5),
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: Sequence[int] = (),
        qk_norm: str | None = None,
    ):
        SD3Transformer2DModel.__init__(self, **stock_arguments(self.config))
        self.fusion = Fusion(self.inner_width)


class InnerFlowWanTransformer3DModel(InnerFlowTransformer, WanTransformer3DModel):
    chain, inlet = "blocks", "patch_embedding"

    @register_to_config
    def __init__(
        self,
        inner_blocks: int = 5,
        inner_levels: Sequence[float] = (1.0, 0.5),
        patch_size: Sequence[int] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
    ):
        WanTransformer3DModel.__init__(self, **stock_arguments(self.config))
        self.fusion = Fusion(self.inner_width)


def stock_arguments(config: Any) -> dict[str, Any]:
    return {k: v for k, v in config.items() if not k.startswith(("_", "inner_"))}


CLASSES = {
    "SD3Transformer2DModel": InnerFlowSD3Transformer2DModel,
    "WanTransformer3DModel": InnerFlowWanTransformer3DModel,
}
