"""The kernels against the specification: in Triton's interpreter on a CPU, on the GPU where there is one."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from variants import mostly_slow

from fastgen.ops.block_sparse_attention import launch
from fastgen.ops.block_sparse_attention.coarse import coarse_attention
from fastgen.ops.block_sparse_attention.configs import KernelConfig
from fastgen.ops.block_sparse_attention.function import triton_attention
from fastgen.ops.block_sparse_attention.launch import matrix_view
from fastgen.ops.block_sparse_attention.layout import BlockLayout, dense_layout, static_layout
from fastgen.ops.block_sparse_attention.linear_branch import linear_attention, linear_state
from fastgen.ops.block_sparse_attention.naive import Cache, naive_attention
from fastgen.ops.block_sparse_attention.patterns import Radial, SlidingTile, TileGrid
from fastgen.ops.block_sparse_attention.result import Result, merge
from fastgen.ops.block_sparse_attention.selection import Mass, TopK, scores_without_gradient
from fastgen.ops.block_sparse_attention.static_layouts import (
    VideoMask,
    causal_layout,
    rollout_layout,
    slots_layout,
    teacher_forcing_layout,
)
from fastgen.ops.block_sparse_attention.tiles import Tiles, tile_tokens

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VIDEO = VideoMask(frame_tokens=11, chunk_frames=(3, 2, 2), window=4, sink=1)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tensors(layout: BlockLayout, cached: int = 0, batch: int = 1, heads: int = 2, dim: int = 64) -> list[Tensor]:
    """Query, key, value and, if cached, the cache's key and value, for a layout over [cache | current]."""
    queries, keys = layout.q_tiles.num_tokens, layout.k_tiles.num_tokens
    lengths = [queries, keys - cached, keys - cached, *([cached, cached] if cached else [])]
    return [draw(index, batch, length, heads, dim) for index, length in enumerate(lengths)]


def outcome(
    function: Callable[..., Result], layout: BlockLayout, inputs: list[Tensor], dtype: torch.dtype, **named: Any
) -> dict[str, Tensor]:
    """out, lse and the gradient of every input, of a loss with random weights on out and on lse."""
    leaves = [tensor.detach().clone().to(DEVICE, dtype).requires_grad_() for tensor in inputs]
    cache = Cache(*leaves[3:]) if len(leaves) == 5 else None
    out, lse = function(*leaves[:3], layout.to(DEVICE), cache=cache, **named)
    assert lse is not None
    visible = lse.masked_fill(lse == -torch.inf, 0.0)
    weighted = (out.double() * draw(10, *out.shape).to(out)).sum() + (visible * draw(11, *lse.shape).to(lse)).sum()
    weighted.backward()
    names = ("query", "key", "value", "cache key", "cache value")
    gradients = {f"d {name}": leaf.grad for name, leaf in zip(names, leaves, strict=False) if leaf.grad is not None}
    return {"out": out.detach(), "lse": visible.detach(), **gradients}


def error(actual: Tensor, expected: Tensor) -> float:
    """The relative error in norm; infinite for anything not finite."""
    difference = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    return float(difference) if actual.isfinite().all() else math.inf


def check(layout: BlockLayout, inputs: list[Tensor], bound: float = 1e-5, **named: Any) -> None:
    """Kernels in float32 against naive in float64: everything that comes out, within `bound`."""
    actual = outcome(triton_attention, layout, inputs, torch.float32, **named)
    named.pop("configs", None)
    expected = outcome(naive_attention, layout, inputs, torch.float64, **named)
    errors = {name: error(actual[name], value) for name, value in expected.items()}
    print({name: f"{value:.1e}" for name, value in errors.items()})
    assert actual.keys() == expected.keys() and len(errors) == 2 + len(inputs)
    assert max(errors.values()) <= bound


def ragged_layout(heads: int = 2, capacity: int = 32) -> BlockLayout:
    """Odd lengths, ragged tiles inside, a map of its own for each head, and a query tile that sees nothing."""
    q_tiles, k_tiles = tile_tokens(77, capacity, (40,)), tile_tokens(111, capacity, (20, 50))
    kept = torch.rand(1, heads, len(q_tiles), len(k_tiles), generator=torch.Generator().manual_seed(3)) < 0.6
    kept[:, 0, 1] = False
    return static_layout(kept, q_tiles, k_tiles)


LAYOUTS: dict[str, Callable[[], BlockLayout]] = {
    "ragged": ragged_layout,
    "dense": lambda: dense_layout(tile_tokens(50, 32), tile_tokens(75, 32)),
    "causal": lambda: causal_layout(VideoMask(11, (3, 2, 2)), 16),
    "window and sink": lambda: causal_layout(VIDEO, 16),
    "teacher forcing": lambda: teacher_forcing_layout(VideoMask(11, (2, 1), window=3, sink=1), 16),
    "sliding tile": lambda: SlidingTile(TileGrid((3, 6, 4), (2, 2, 4)), (1, 3, 1)).layout(),
    "radial": lambda: Radial(frames=3, frame_tokens=24, capacity=16).layout(),
}


@pytest.mark.parametrize("name", mostly_slow(LAYOUTS, ["ragged", "teacher forcing"]))
def test_every_layout_against_the_specification(name: str) -> None:
    layout = LAYOUTS[name]()
    check(layout, tensors(layout, heads=layout.block_map.shape[1]))


SELECTIONS = (
    TopK(tile_tokens(50, 16), tile_tokens(75, 16), 2, forced=((0, 3),)),
    Mass(tile_tokens(50, 16), tile_tokens(75, 16), 0.6),
)


@pytest.mark.parametrize("rule", mostly_slow(SELECTIONS, SELECTIONS[:1]), ids=["top k", "mass"])
def test_selected_layouts_against_the_specification(rule: TopK | Mass) -> None:
    query, key = draw(0, 1, 50, 2, 64), draw(1, 1, 75, 2, 64)
    layout = rule(query, key)
    assert layout.block_map.shape[1] == 2 and not layout.block_map.all()
    check(layout, [query, key, draw(2, 1, 75, 2, 64)])


@pytest.mark.slow
def test_head_dimension_128_and_a_batch_with_maps_of_its_own() -> None:
    tiles = tile_tokens(37, 32)
    kept = torch.tensor([[[[1, 0], [1, 1]]], [[[0, 1], [0, 1]]]], dtype=torch.bool)
    check(static_layout(kept, tiles, tiles), tensors(static_layout(kept, tiles, tiles), batch=2, dim=128))


@pytest.mark.slow
def test_tiles_larger_than_what_a_program_holds() -> None:
    """Tiles of 64 in parts of 32 x 16: whole parts of a ragged tile are empty."""
    tiles = tile_tokens(150, 64, (70,))
    layout = static_layout(torch.eye(len(tiles)).roll(1, 0) == 0, tiles, tiles)
    part = KernelConfig(32, 16, 4, 2)
    check(layout, tensors(layout, heads=1), configs={"forward": part, "dq": part, "dkv": KernelConfig(16, 32, 4, 2)})


def test_a_cache_and_the_current_chunk_are_two_sources() -> None:
    layout = rollout_layout(VIDEO, chunk=2, capacity=16)
    cached = VIDEO.num_tokens - 2 * VIDEO.frame_tokens
    inputs = tensors(layout, cached)
    check(layout, inputs)
    joined = [inputs[0], *(torch.cat(pair, dim=1) for pair in zip(inputs[3:], inputs[1:3], strict=True))]
    two = triton_attention(*on(inputs[:3]), layout.to(DEVICE), cache=Cache(*on(inputs[3:])))
    one = triton_attention(*on(joined), layout.to(DEVICE))
    assert (
        torch.equal(two.out, one.out) and two.lse is not None and one.lse is not None and torch.equal(two.lse, one.lse)
    )


def on(inputs: list[Tensor]) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in inputs]


def test_a_frozen_cache_gets_no_gradient_and_costs_no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgen.ops.block_sparse_attention import function

    launched: list[tuple[int, int]] = []
    real = function.launch_dkv
    monkeypatch.setattr(function, "launch_dkv", lambda *args: launched.append(args[4]) or real(*args))
    layout = slots_layout(20, [(0, 16), (30, 41)], slots=48, capacity=16)
    inputs = tensors(layout, cached=48)
    gradients = []
    for attend, dtype in ((triton_attention, torch.float32), (naive_attention, torch.float64)):
        query, key, value, *cache = (tensor.detach().clone().to(dtype) for tensor in on(inputs))
        leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
        out = attend(query, key, value, layout.to(DEVICE), cache=Cache(*cache)).out
        gradients.append(torch.autograd.grad((out * draw(9, *out.shape).to(out)).sum(), leaves))
    assert launched == [(2, 4)]
    assert max(error(one, other) for one, other in zip(*gradients, strict=True)) < 1e-5


@pytest.mark.slow
def test_gradient_of_a_part_of_the_keys() -> None:
    """With a cache, too; rows outside get exactly 0."""
    layout = ragged_layout()
    check(layout, tensors(layout), grad_keys=(20, 82))
    partial = outcome(triton_attention, layout, tensors(layout), torch.float32, grad_keys=(20, 82))
    assert (
        not partial["d key"][:, :20].any() and not partial["d key"][:, 82:].any() and partial["d key"][:, 20:82].any()
    )
    check(layout, tensors(layout, cached=50), grad_keys=(20, 82))
    halves = [tensor.bfloat16() for tensor in tensors(layout, cached=50)]
    partial = outcome(triton_attention, layout, halves, torch.bfloat16, grad_keys=(0, 20))
    assert not partial["d key"].any() and partial["d cache key"].any()
    with pytest.raises(ValueError, match="token 21 lies inside tile 1"):
        triton_attention(*on(tensors(layout)), layout.to(DEVICE), grad_keys=(21, 82))


def test_rows_in_no_tile_are_never_read_and_strides_are_free() -> None:
    """Poison between, before and behind the tiles, in queries, keys and values, whose heads lie outside of tokens."""
    q_tiles, k_tiles = Tiles((3, 19), (16, 9), 16, 40), Tiles((5, 40), (11, 16), 16, 60)
    layout = static_layout(torch.tensor([[1, 1], [0, 1]], dtype=torch.bool), q_tiles, k_tiles)
    inputs = tensors(layout)
    for tensor, tiles in zip(inputs, (q_tiles, k_tiles, k_tiles), strict=True):
        held = torch.zeros(tensor.shape[1], dtype=torch.bool)
        for start, length in zip(tiles.starts, tiles.lengths, strict=True):
            held[start : start + length] = True
        tensor[:, ~held] = torch.nan
    check(layout, [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs])
    result = triton_attention(*on(inputs), layout.to(DEVICE))
    assert result.lse is not None
    assert not result.out[:, :3].any() and (result.lse[..., 28:] == -torch.inf).all()


def test_queries_that_see_nothing_give_zero() -> None:
    layout = ragged_layout()
    result = triton_attention(*on(tensors(layout)), layout.to(DEVICE))
    assert result.lse is not None
    empty = slice(layout.q_tiles.starts[1], layout.q_tiles.starts[2])
    assert not result.out[:, empty, 0].any() and (result.lse[:, 0, empty] == -torch.inf).all()
    assert result.lse[:, 1].isfinite().all()


def halves(layout: BlockLayout) -> list[BlockLayout]:
    """Two layouts over disjoint keys, together `layout`; some queries see nothing in one of them, some in both."""
    first = torch.rand(layout.block_map.shape, generator=torch.Generator().manual_seed(5)) < 0.4
    maps = (layout.block_map & first, layout.block_map & ~first)
    return [static_layout(part, layout.q_tiles, layout.k_tiles).to(DEVICE) for part in maps]


@pytest.mark.slow
@pytest.mark.parametrize("function", [naive_attention, triton_attention])
def test_merged_results_equal_the_joint_one(function: Callable[..., Result]) -> None:
    """Forward and every gradient, also through lse."""
    layout = ragged_layout()
    parts = halves(layout)

    def merged(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, **named: Any) -> Result:
        return merge(*(function(query, key, value, part, **named) for part in parts))

    dtype = torch.float64 if function is naive_attention else torch.float32
    actual = outcome(merged, layout, tensors(layout), dtype)
    expected = outcome(naive_attention, layout, tensors(layout), torch.float64)
    errors = {name: error(actual[name], value) for name, value in expected.items()}
    print({name: f"{value:.1e}" for name, value in errors.items()})
    assert max(errors.values()) <= (1e-12 if function is naive_attention else 1e-5)


def test_naive_is_softmax_attention() -> None:
    """The specification itself, against torch with the mask, where every query sees something."""
    layout = LAYOUTS["window and sink"]()
    query, key, value = (tensor.double().transpose(1, 2) for tensor in tensors(layout))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, layout.mask())
    actual = naive_attention(*(tensor.transpose(1, 2) for tensor in (query, key, value)), layout)
    assert torch.allclose(actual.out, expected.transpose(1, 2), atol=1e-13)
    logits = (query @ key.transpose(-1, -2) / 8).masked_fill(~layout.mask(), -torch.inf)
    assert actual.lse is not None and torch.allclose(actual.lse, logits.logsumexp(-1), atol=1e-13)


def test_naive_gradients_by_finite_differences() -> None:
    tiles = tile_tokens(20, 16)
    layout = static_layout(torch.tensor([[1, 0], [0, 0]], dtype=torch.bool), tiles, tiles)
    inputs = [draw(index, 1, 20, 1, 3).double().requires_grad_() for index in range(3)]

    def finite(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = naive_attention(*inputs, layout)
        assert lse is not None
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(finite, inputs)


def test_what_the_kernels_refuse() -> None:
    layout = dense_layout(tile_tokens(20, 16), tile_tokens(20, 16))
    good = [draw(index, 1, 20, 1, 64) for index in range(3)]
    for change, words in (
        (lambda q, k, v: (q[..., :32], k[..., :32], v[..., :32]), "head dimensions"),
        (lambda q, k, v: (q.double(), k.double(), v.double()), "float64"),
        (lambda q, k, v: (q, k.half(), v), "key is torch.float16"),
        (lambda q, k, v: (q, k[:, :19], v[:, :19]), "20 queries and 19 keys"),
        (lambda q, k, v: (q, k, v[:, :19]), "as long as its value"),
        (lambda q, k, v: (q, k.expand(2, -1, -1, -1), v), r"key must be \[1, L, 1, 64\]"),
    ):
        with pytest.raises(ValueError, match=words):
            triton_attention(*change(*on(good)), layout.to(DEVICE))
    with pytest.raises(ValueError, match=r"scale must be positive, got -0\.5"):
        triton_attention(*on(good), layout.to(DEVICE), scale=-0.5)
    columns = torch.zeros(1, 20, 64, 2, device=DEVICE).transpose(2, 3)
    with pytest.raises(ValueError, match="last dimension must be contiguous"):
        triton_attention(columns, columns, columns, layout.to(DEVICE))


def test_second_derivatives_are_refused() -> None:
    layout = dense_layout(tile_tokens(16, 16), tile_tokens(16, 16)).to(DEVICE)
    query = draw(0, 1, 16, 1, 64).to(DEVICE).requires_grad_()
    out = triton_attention(query, query.detach(), query.detach(), layout).out
    (first,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_at_large_inputs(dtype: torch.dtype, scale: float) -> None:
    """On a CPU the arithmetic is float32 and the storage half: the rounding of inputs and outputs alone."""
    layout = ragged_layout()
    inputs = [(tensor * scale).to(dtype) for tensor in tensors(layout)]
    compare_half(layout, inputs, dtype)


def compare_half(layout: BlockLayout, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """2e-2 forward, 5e-2 for gradients, and gradient norms within 2 %."""
    actual = outcome(triton_attention, layout, inputs, dtype)
    expected = outcome(naive_attention, layout, inputs, torch.float64)
    errors = {name: error(actual[name], value) for name, value in expected.items()}
    norms = {name: float(actual[name].double().norm() / value.norm()) for name, value in expected.items()}
    print({name: f"{errors[name]:.1e} {norms[name]:.4f}" for name in errors})
    assert max(errors["out"], errors["lse"]) <= 2e-2
    assert max(value for name, value in errors.items() if name.startswith("d ")) <= 5e-2
    assert all(0.98 <= value <= 1.02 for value in norms.values())


@pytest.mark.slow
@pytest.mark.parametrize("head_major", [False, True], ids=["heads in a row", "heads apart"])
def test_tensor_descriptors_load_what_pointers_do(head_major: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full tiles by descriptors, ragged ones by pointers, tiles that start anywhere; a batch, bfloat16."""
    q_tiles, k_tiles = tile_tokens(27, 16), tile_tokens(44, 16, (21,))
    layout = static_layout(torch.ones(1, 1, len(q_tiles), len(k_tiles)).triu(-1) > 0, q_tiles, k_tiles)
    inputs = [tensor.bfloat16() for tensor in tensors(layout, batch=2)]
    seen: list[Tensor] = []
    monkeypatch.setattr(launch, "matrix_view", lambda tensor: seen.append(tensor) or matrix_view(tensor))

    def attend(tma: bool) -> dict[str, Tensor]:
        def run(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Result:
            if head_major:
                query, key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value))
            configs = {name: KernelConfig(16, 16, 4, 2, tma) for name in ("forward", "dq", "dkv")}
            return triton_attention(query, key, value, *rest, configs=configs, **named)

        return outcome(run, layout, inputs, torch.bfloat16)

    expected, actual = attend(False), attend(True)
    assert len(seen) == 6  # keys and values of the forward and of dq, queries and dout of dkv
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_what_a_descriptor_can_show() -> None:
    """Rows and columns of the matrix, and the steps to a batch and a head; None where memory does not lie so."""
    tokens = torch.zeros(2, 10, 3, 64, dtype=torch.bfloat16)
    assert matrix_view(tokens) == ((20, 192), (10, 0, 64))
    assert matrix_view(tokens.reshape(2, 3, 10, 64).transpose(1, 2)) == ((60, 64), (30, 10, 0))
    assert matrix_view(torch.zeros(2, 10, 3, 3, 64)[:, :, 1]) == (
        (20, 192),
        (10, 0, 64),
    )  # one of q, k, v in one tensor
    assert matrix_view(tokens[:, 1:, 1:]) == ((19, 128), (10, 0, 64))
    assert matrix_view(torch.zeros(2, 10, 3, 66, dtype=torch.bfloat16)[..., :64]) is None  # a head of 132 bytes
    assert matrix_view(torch.zeros(10 * 192 + 1, dtype=torch.bfloat16)[1:].view(1, 10, 3, 64)) is None


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("capacity", [64, 128])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
def test_half_precision_on_a_gpu(scale: float, dim: int, capacity: int) -> None:
    """Tensor cores, at a length with ragged tiles, three quarters of the map empty, in bfloat16."""
    q_tiles, k_tiles = tile_tokens(1000, capacity), tile_tokens(3001, capacity, (1560,))
    kept = torch.rand(1, 4, len(q_tiles), len(k_tiles), generator=torch.Generator().manual_seed(0)) < 0.25
    layout = static_layout(kept, q_tiles, k_tiles)
    inputs = [(tensor * scale).bfloat16() for tensor in tensors(layout, heads=4, dim=dim)]
    compare_half(layout, inputs, torch.bfloat16)


def test_linear_attention_is_a_sum_over_keys() -> None:
    """Against the explicit double sum; states of parts add, in any order."""
    query, key, value = (draw(index, 1, 9, 2, 8).double() for index in range(3))
    weights = torch.einsum("bqhd,bkhd->bhqk", query.softmax(-1), key.softmax(-1))
    expected = torch.einsum("bhqk,bkhd->bqhd", weights / (weights.sum(-1, keepdim=True) + 1e-6), value)
    state = linear_state(key[:, 4:], value[:, 4:]) + linear_state(key[:, :4], value[:, :4])
    assert torch.allclose(linear_attention(query, state), expected, atol=1e-13)


def test_autocast_changes_neither_sums_nor_selections() -> None:
    """Training under autocast reads, and keeps, what sampling with half-precision weights does, to the bit."""
    query, key, value = (draw(index, 1, 96, 2, 8).bfloat16() for index in range(3))
    tiles = tile_tokens(96, 16)

    def computed() -> list[Tensor]:
        state = linear_state(key, value)
        coarse = coarse_attention(query, key, value, tiles, tiles)
        return [*state, linear_attention(query, state), scores_without_gradient(query, key, tiles, tiles), *coarse]

    plain = computed()
    with torch.autocast("cpu", torch.bfloat16):
        cast = computed()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(plain, cast, strict=True))
