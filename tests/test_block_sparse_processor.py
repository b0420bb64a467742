"""Sparse attention inside real diffusers transformers of tiny size, and the branches beside it."""

from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from tiny_wan import CHANNELS, TEXT_WIDTH, transformer
from torch import Tensor

from fastgen.ops.block_sparse_attention.coarse import coarse_attention
from fastgen.ops.block_sparse_attention.launch import INTERPRETED
from fastgen.ops.block_sparse_attention.layout import dense_layout, static_layout
from fastgen.ops.block_sparse_attention.linear_branch import linear_attention, linear_state
from fastgen.ops.block_sparse_attention.naive import naive_attention
from fastgen.ops.block_sparse_attention.patterns import TileGrid
from fastgen.ops.block_sparse_attention.processor import (
    BlockSparseAttnProcessor,
    reorder_tokens,
    set_sparse_attention,
)
from fastgen.ops.block_sparse_attention.selection import TopK
from fastgen.ops.block_sparse_attention.static_layouts import VideoMask, causal_layout
from fastgen.ops.block_sparse_attention.tiles import tile_tokens

TILES = tile_tokens(64, 16)  # a video of 4 frames of 4 x 4 tokens
TOKENS = 64


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def wan() -> WanTransformer3DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformer(layers=2, time_scale=1.0)


def run(wan: WanTransformer3DModel, video: Tensor | None = None, timestep: Tensor | None = None) -> Tensor:
    video = draw(0, 1, CHANNELS, 4, 8, 8) if video is None else video
    timestep = torch.tensor([500.0]) if timestep is None else timestep
    return wan(video, timestep, draw(1, 1, 5, TEXT_WIDTH), return_dict=False)[0]


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().norm() / other.detach().norm())


def test_a_wan_transformer_over_all_tiles_is_the_stock_one(wan: WanTransformer3DModel) -> None:
    """Output and gradients; the layers found; what `set_attn_processor` takes back."""
    stock = run(wan)
    stock.square().mean().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in wan.named_parameters()}
    names = set_sparse_attention(wan, dense_layout(TILES, TILES), backend="naive")
    assert names == ["blocks.0.attn1.processor", "blocks.1.attn1.processor"]
    wan.zero_grad()
    ours = run(wan)
    ours.square().mean().backward()
    assert apart(ours, stock) < 1e-5
    assert (
        max(apart(p.grad, gradients[name]) for name, p in wan.named_parameters() if gradients[name].norm() > 1e-6)
        < 1e-4
    )
    wan.set_attn_processor(WanAttnProcessor())
    assert torch.equal(run(wan), stock)


@pytest.mark.skipif(not INTERPRETED, reason="the tensors are on the CPU")
def test_wan_by_the_kernels() -> None:
    """Two heads of 64, output and gradients, against the naive backend."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wan = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=64,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=TEXT_WIDTH,
            freq_dim=16,
            ffn_dim=32,
            num_layers=1,
        ).eval()
    backend: Any
    results = []
    for backend in ("triton", "naive"):
        set_sparse_attention(wan, TopK(TILES, TILES, 1, forced=((0, 16),)), backend=backend)
        wan.zero_grad()
        out = run(wan)
        out.square().mean().backward()
        gradients = [p.grad for n, p in wan.named_parameters() if "attn1.to_" in n and "weight" in n]
        results.append([out, *gradients])
    assert len(results[0]) == 5 and all(apart(one, other) < 1e-5 for one, other in zip(*results, strict=True))


def test_autocast_reaches_the_attention(wan: WanTransformer3DModel) -> None:
    """Queries stay float32 under autocast, values do not; torch's own call casts both, and so does ours."""
    seen = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = run(wan)
        set_sparse_attention(wan, dense_layout(TILES, TILES))
        processor: Any = wan.blocks[0].attn1.processor
        attend = processor.attend
        processor.attend = lambda *args: seen.append([t.dtype for t in args[1:4]]) or attend(*args)
        assert apart(run(wan), stock) < 1e-2
    assert seen == [[torch.bfloat16] * 3]


def test_causal_wan_frames_do_not_see_later_chunks(wan: WanTransformer3DModel) -> None:
    """Frames of the first chunk keep their output whatever the second one holds; without the layout they do not."""
    video, other = draw(0, 1, CHANNELS, 4, 8, 8), draw(0, 1, CHANNELS, 4, 8, 8)
    other[:, :, 2:] = draw(5, 1, CHANNELS, 2, 8, 8)
    assert apart(run(wan, other)[:, :, :2], run(wan, video)[:, :, :2]) > 1e-2
    set_sparse_attention(wan, causal_layout(VideoMask(16, (2, 2)), 16))
    assert apart(run(wan, other)[:, :, :2], run(wan, video)[:, :, :2]) < 1e-6
    assert apart(run(wan, other)[:, :, 2:], run(wan, video)[:, :, 2:]) > 1e-2


def test_branches_start_at_nothing_and_learn(wan: WanTransformer3DModel) -> None:
    rule = TopK(TILES, TILES, 2)
    set_sparse_attention(wan, rule)
    plain = run(wan)
    set_sparse_attention(wan, rule, coarse=True, linear=True)
    assert torch.equal(run(wan), plain)
    run(wan).square().mean().backward()
    new = {name: parameter for name, parameter in wan.named_parameters() if ".processor." in name}
    assert len(new) == 2 * 3 and all(p.grad is not None and p.grad.any() for p in new.values())
    with torch.no_grad():
        for parameter in new.values():
            parameter.add_(0.1)
    assert apart(run(wan), plain) > 1e-3


def test_the_processor_adds_both_branches(wan: WanTransformer3DModel) -> None:
    """One call against the formulas: sparse over the top k of the coarse scores, gate * coarse, projected linear."""
    rule = TopK(TILES, TILES, 1)
    set_sparse_attention(wan, rule, coarse=True, linear=True, backend="naive")
    processor: Any = wan.blocks[0].attn1.processor
    torch.nn.init.normal_(processor.gate.project.weight)
    torch.nn.init.normal_(processor.linear.project.weight)
    hidden = draw(0, 1, TOKENS, 24)
    query, key, value = (draw(index, 1, TOKENS, 2, 12) for index in range(1, 4))
    out = processor.attend(hidden, query, key, value, None)
    coarse, scores = coarse_attention(query, key, value, TILES, TILES)
    sparse = naive_attention(query, key, value, rule.from_scores(scores)).out
    gated = processor.gate.project(hidden).unflatten(-1, (2, 12)) * coarse
    linear = processor.linear.project(linear_attention(query, linear_state(key, value)))
    assert torch.allclose(out, sparse + gated + linear, atol=1e-5)


def test_coarse_attention_is_attention_between_means() -> None:
    """Ragged tiles weigh by their mean, not by their length; queries and keys get gradient through it."""
    tiles = tile_tokens(40, 16, (20,))
    query, key, value = (draw(index, 1, 40, 1, 8).double().requires_grad_() for index in range(3))
    means = [
        torch.stack([t[0, s : s + n, 0].mean(0) for s, n in zip(tiles.starts, tiles.lengths, strict=True)])
        for t in (query, key, value)
    ]
    expected = (means[0] @ means[1].T / 8**0.5).softmax(-1) @ means[2]
    out, scores = coarse_attention(query, key, value, tiles, tiles)
    for index, (start, length) in enumerate(zip(tiles.starts, tiles.lengths, strict=True)):
        assert torch.allclose(out[0, start : start + length, 0], expected[index].expand(length, 8), atol=1e-13)
    assert scores.shape == (1, 1, len(tiles), len(tiles))
    gradients = torch.autograd.grad(out.square().sum(), (query, key, value))
    assert all(gradient.any() for gradient in gradients)


def test_what_inference_mode_leaves_behind_serves_training() -> None:
    """Tables of tiles are kept between calls."""
    tiles = tile_tokens(40, 16, (24,))  # used nowhere else
    query = draw(0, 1, 40, 1, 8)
    with torch.inference_mode():
        coarse_attention(query, query, query, tiles, tiles)
    query.requires_grad_()
    coarse_attention(query, query, query, tiles, tiles)[0].sum().backward()
    assert query.grad is not None and query.grad.any()


def test_tokens_in_cuboid_order_give_the_stock_output(wan: WanTransformer3DModel) -> None:
    """Also with a time of its own for each token; removed hooks leave nothing behind."""
    grid = TileGrid((4, 4, 4), (2, 2, 2))
    each = torch.linspace(100, 900, TOKENS)[None]
    stock, stock_each = run(wan), run(wan, timestep=each)
    hooks = reorder_tokens(wan, grid.order())
    assert apart(run(wan), stock) < 1e-5 and apart(run(wan, timestep=each), stock_each) < 1e-5
    for hook in hooks:
        hook.remove()
    assert torch.equal(run(wan), stock)


def test_cuboid_order_reaches_the_attention(wan: WanTransformer3DModel) -> None:
    """With each cuboid alone, a cuboid's output does not depend on the others; its position does not matter."""
    grid = TileGrid((4, 4, 4), (2, 2, 2))
    tiles = grid.tiles()
    set_sparse_attention(wan, static_layout(torch.eye(len(tiles), dtype=torch.bool), tiles, tiles))
    hooks = reorder_tokens(wan, grid.order())
    video, other = draw(0, 1, CHANNELS, 4, 8, 8), draw(0, 1, CHANNELS, 4, 8, 8)
    other[:, :, 2:], other[:, :, :, 4:], other[:, :, :, :, 4:] = 1.0, 2.0, 3.0
    corner = (slice(None), slice(None), slice(0, 2), slice(0, 4), slice(0, 4))
    assert apart(run(wan, other)[corner], run(wan, video)[corner]) < 1e-6
    for hook in hooks:
        hook.remove()
    assert apart(run(wan, other)[corner], run(wan, video)[corner]) > 1e-2


def test_another_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """PixArt: diffusers' plain Attention, another stock processor, the same class around it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pixart = PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            cross_attention_dim=16,
            sample_size=16,
            patch_size=2,
            caption_channels=16,
            use_additional_conditions=False,
        ).eval()

    def call() -> Tensor:
        named = {"timestep": torch.tensor([5]), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        return pixart(draw(0, 1, 4, 16, 16), encoder_hidden_states=draw(1, 1, 5, 16), return_dict=False, **named)[0]

    stock = call()
    assert len(set_sparse_attention(pixart, dense_layout(TILES, TILES), backend="naive")) == 2
    assert apart(call(), stock) < 1e-5
    set_sparse_attention(pixart, TopK(TILES, TILES, 1))
    assert apart(call(), stock) > 1e-3


def test_what_the_processor_refuses(wan: WanTransformer3DModel) -> None:
    with pytest.raises(ValueError, match=r"no attention layer is called self_attn; there are blocks\.0\.attn1"):
        set_sparse_attention(wan, dense_layout(TILES, TILES), names=("self_attn",))
    small = tile_tokens(32, 16)
    set_sparse_attention(wan, dense_layout(small, small))
    with pytest.raises(ValueError, match="there are 64 queries and 64 keys, but the layout is for 32"):
        run(wan)
    query = draw(0, 1, 64, 48)

    def masked(attn: Any, hidden_states: Tensor) -> Tensor:
        heads = hidden_states.unflatten(-1, (2, -1)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True, dropout_p=0.1)

    with pytest.raises(ValueError, match="the layer asks for dropout_p, is_causal"):
        BlockSparseAttnProcessor(masked, dense_layout(TILES, TILES))(wan, query)
    with pytest.raises(RuntimeError, match="called scaled_dot_product_attention 0 times, not once"):
        BlockSparseAttnProcessor(lambda attn, hidden_states: hidden_states, dense_layout(TILES, TILES))(wan, query)
