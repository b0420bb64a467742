"""The dispatcher: every backend is the same function, refuses what it cannot do, and is left where dense wins."""

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.ops.block_sparse_attention import backends, break_even
from fastgen.ops.block_sparse_attention.backends import BACKENDS, Call, aligned_bias, flex_block_mask
from fastgen.ops.block_sparse_attention.break_even import crossing, random_call, remembered
from fastgen.ops.block_sparse_attention.dispatch import attention, choose, log_once
from fastgen.ops.block_sparse_attention.launch import INTERPRETED
from fastgen.ops.block_sparse_attention.layout import BlockLayout, dense_layout, static_layout
from fastgen.ops.block_sparse_attention.naive import Cache, naive_attention
from fastgen.ops.block_sparse_attention.selection import TopK
from fastgen.ops.block_sparse_attention.tiles import Tiles, tile_tokens


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CACHED = 32  # rows, on a tile edge of each layout


def layouts() -> dict[str, BlockLayout]:
    """Uniform tiles, which other libraries know; ragged ones; holes; a query tile that sees nothing; a map a head."""
    uniform, ragged = tile_tokens(70, 16), tile_tokens(70, 16, (20, CACHED, 50))
    result = {"dense": dense_layout(uniform, uniform)}
    for name, tiles in (("uniform", uniform), ("ragged", ragged), ("holes", Tiles((3, 40), (16, 9), 16, 70))):
        shape = (1, 2, len(tiles), len(tiles))
        kept = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
        kept[:, 1, 0], kept[:, 0, 0] = False, True
        result[name] = static_layout(kept, tiles, tiles)
    return result


@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("backend", ["triton", "flex_attention", "sdpa"])
def test_backends_compute_the_same_function(backend: Any, name: str) -> None:
    """Against naive in float64: out, lse, and gradients, with a cache that may hold poison in rows of no tile."""
    if backend == "triton" and not INTERPRETED:
        pytest.skip("these tensors are on the CPU; test_block_sparse_attention.py runs the kernels on the GPU")
    layout = layouts()[name]
    lengths = (70, 70 - CACHED, 70 - CACHED, CACHED, CACHED)
    inputs = [draw(index, 1, length, 2, 64) for index, length in enumerate(lengths)]
    if name == "holes":
        inputs[3][:, :3], inputs[4][:, 19:] = torch.nan, torch.nan
    with_gradient = backend != "flex_attention"

    def outcome(chosen: Any, dtype: torch.dtype, gradient: bool = with_gradient) -> list[Tensor | None]:
        leaves = [tensor.to(dtype, copy=True).requires_grad_(gradient) for tensor in inputs]
        cache = Cache(*leaves[3:])
        result = attention(*leaves[:3], layout, cache=cache, backend=chosen, needs_lse=chosen != "sdpa")
        if gradient:
            (result.out * draw(9, *result.out.shape)).sum().backward()
        lse = None if result.lse is None else result.lse.detach()
        return [result.out.detach(), lse, *(leaf.grad for leaf in leaves)]

    expected = outcome("naive", torch.float64)
    actual = outcome(backend, torch.float32)
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        if one is None:
            assert (index == 1 and backend == "sdpa") or (index > 1 and not with_gradient)
            continue
        assert other is not None and torch.equal(one.isinf(), other.isinf())
        finite = ~other.isinf()
        difference = float((one[finite] - other[finite]).norm() / other[finite].norm())
        print(index, f"{difference:.1e}")
        assert difference <= 1e-5


@pytest.mark.parametrize("name", layouts())
def test_the_block_mask_of_flex_attention_is_the_layout(name: str) -> None:
    """Uncompiled, flex_attention reads the mask function alone; compiled it walks these lists."""
    layout = layouts()[name]
    mask = flex_block_mask(layout)
    rows, columns = torch.arange(70)[:, None], torch.arange(70)
    for head in range(layout.block_map.shape[1]):
        zero, one = torch.tensor(0), torch.tensor(head)
        assert torch.equal(mask.mask_mod(zero, one, rows, columns), layout.mask()[0, head])
    if not layout.k_tiles.is_uniform:  # made by torch, token by token, in blocks of its own
        return
    assert torch.equal(mask.to_dense().bool(), layout.block_map)
    lists = layout.key_lists
    assert torch.equal(mask.full_kv_num_blocks, lists.full)
    assert torch.equal(mask.kv_num_blocks + mask.full_kv_num_blocks, lists.counts)
    assert (mask.kv_num_blocks <= 1).all() and (mask.kv_indices[..., 0] == 4).all()  # the last tile has 6 tokens


def test_backends_refuse_in_words(caplog: pytest.LogCaptureFixture) -> None:
    tiles = tile_tokens(20, 16)
    layout = dense_layout(tiles, tiles)
    narrow = [draw(index, 1, 20, 1, 12) for index in range(3)]
    with pytest.raises(ValueError, match=r"backend triton cannot do this: .*head dimensions \(64, 128\), not 12"):
        attention(*narrow, layout, backend="triton")
    with pytest.raises(ValueError, match=r"backend sdpa cannot do this: .*returns no lse"):
        attention(*narrow, layout, backend="sdpa", needs_lse=True)
    with pytest.raises(ValueError, match="flex_attention has no backward on a CPU"):
        attention(narrow[0].requires_grad_(), *narrow[1:], layout, backend="flex_attention")
    with pytest.raises(ValueError, match="float64"):
        attention(*(tensor.detach().double() for tensor in narrow), layout, backend="flex_attention")
    with pytest.raises(ValueError, match="backend must be auto or one of triton"):
        attention(*narrow, layout, backend="cudnn")  # type: ignore[arg-type]
    missing = importlib.util.find_spec("xformers") is None
    with pytest.raises(ValueError, match="xformers is not installed" if missing else "xformers needs a GPU"):
        attention(*narrow, layout, backend="xformers")


def test_a_mask_that_memory_cannot_hold_is_refused() -> None:
    """At video length an expanded mask is larger than a GPU; over all pairs no mask is needed."""
    tiles = tile_tokens(32_760, 128)
    kept = torch.ones(1, 12, len(tiles), len(tiles), dtype=torch.bool).tril()
    tensors = [torch.zeros(1, 1, 12, 64).expand(1, 32_760, 12, 64) for _ in range(3)]
    for name in ("sdpa", "xformers"):
        if name == "xformers" and BACKENDS[name].refusal(Call(*tensors, dense_layout(tiles, tiles))):
            continue  # not here
        reason = BACKENDS[name].refusal(Call(*tensors, static_layout(kept, tiles, tiles)))
        assert reason == "its mask would have 1.3e+10 elements, more than 2.0e+09"
    assert BACKENDS["sdpa"].refusal(Call(*tensors, dense_layout(tiles, tiles))) is None


def test_auto_on_a_cpu_is_sdpa_and_naive_where_lse_is_needed(caplog: pytest.LogCaptureFixture) -> None:
    """The choice is logged once, with its reason."""
    tiles = tile_tokens(20, 16)
    inputs = [draw(index, 1, 20, 1, 64) for index in range(3)]
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="fastgen"):
        for _ in range(2):
            assert attention(*inputs, dense_layout(tiles, tiles)).lse is None
        assert attention(*inputs, dense_layout(tiles, tiles), needs_lse=True).lse is not None
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "attention by sdpa"),
        ("WARNING", "attention by naive: not sdpa: scaled_dot_product_attention returns no lse"),
    ]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto asks as it does on a GPU; the kernels are interpreted."""
    if not INTERPRETED:
        pytest.skip("needs Triton's interpreter, which conftest.py does not ask for where there is a GPU")
    from fastgen.ops.block_sparse_attention import dispatch

    monkeypatch.setitem(dispatch.AUTO, "cpu", dispatch.AUTO["cuda"])


def half_dense_call(needs_lse: bool = False) -> Call:
    tiles = tile_tokens(64, 16)
    layout = static_layout(torch.eye(4, dtype=torch.bool) | torch.eye(4, dtype=torch.bool).roll(1, 0), tiles, tiles)
    return Call(*(draw(index, 1, 64, 1, 64) for index in range(3)), layout, needs_lse=needs_lse)


def test_sparse_is_left_where_dense_wins(as_on_a_gpu: None, caplog: pytest.LogCaptureFixture) -> None:
    call = half_dense_call()
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="fastgen"):
        assert choose(call, "mask", 0.6) == ("triton", call)
        assert choose(call, "mask", 0.4) == ("sdpa", call)
        assert choose(call, "stay", 0.4) == ("triton", call)
        name, wide = choose(call, "full", 0.4)
        assert choose(half_dense_call(needs_lse=True), "mask", 0.4)[0] == "triton"
    assert name == "sdpa" and wide.layout.sees_all
    messages = [record.message for record in caplog.records]
    assert messages[0] == "attention by triton: density 0.500 is below the break-even density 0.600"
    assert messages[1] == "attention by sdpa (mask): density 0.500 is at least the break-even density 0.400"
    assert messages[-1].endswith("not sdpa, however dense: scaled_dot_product_attention returns no lse")
    named = {"layout": call.layout, "break_even": 0.4}
    tensors = (call.query, call.key, call.value)
    masked = attention(*tensors, **named).out
    assert torch.allclose(masked, naive_attention(*tensors, call.layout).out, atol=1e-5)
    full = attention(*tensors, **named, when_dense_wins="full").out
    assert torch.allclose(full, naive_attention(*tensors, wide.layout).out, atol=1e-5)
    assert not torch.allclose(full, masked, atol=1e-2)


def test_sparse_stays_where_no_mask_fits(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the mask refused, `mask` keeps the kernels; `full` needs none."""
    monkeypatch.setattr(backends, "MAX_MASK", 1)
    assert choose(half_dense_call(), "mask", 0.4)[0] == "triton"
    assert choose(half_dense_call(), "full", 0.4)[0] == "sdpa"


def test_a_layout_of_unknown_density_stays_sparse(as_on_a_gpu: None) -> None:
    call = half_dense_call()
    unknown = Call(call.query, call.key, call.value, BlockLayout(call.layout.block_map, *[call.layout.q_tiles] * 2))
    assert choose(unknown, "mask", 0.0) == ("triton", unknown)
    rule = TopK(call.layout.q_tiles, call.layout.k_tiles, 2)
    known = Call(call.query, call.key, call.value, rule(call.query, call.key))
    assert choose(known, "mask", 0.5)[0] == "sdpa"


def test_the_break_even_density_is_measured_once(
    as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Sparse costs 1 + 8 d, dense 5: they cross at 0.5. A second process reads the file."""
    timed: list[tuple[float, str]] = []

    def seconds(
        device: Any, dtype: Any, dim: int, capacity: int, backward: bool, density: float, backend: str
    ) -> float:
        assert (dim, capacity, backward) == (64, 16, False)
        timed.append((density, backend))
        return 5.0 if backend == "sdpa" else 1 + 8 * density

    monkeypatch.setattr(break_even, "time_call", seconds)
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path))
    call = half_dense_call()
    for _ in range(2):
        break_even._kept.cache_clear()
        assert choose(call, "mask", None)[0] == "sdpa"
        assert choose(call, "mask", None)[0] == "sdpa"
    assert timed == [(0.25, "triton"), (0.75, "triton"), (0.5, "sdpa")]
    stored = json.loads((tmp_path / "attention_break_even.json").read_text())
    assert list(stored.values()) == [0.5] and "tiles of 16, forward, triton, mask" in next(iter(stored))
    tiles = call.layout.q_tiles
    dense = Call(call.query, call.key, call.value, dense_layout(tiles, tiles))
    assert choose(dense, "mask", None)[0] == "sdpa" and timed[-1] == (1.0, "sdpa")  # it needs no mask
    break_even._kept.cache_clear()


def test_where_lines_cross() -> None:
    def sparse(base: float, slope: float, dense: float) -> float:
        return crossing(lambda d, name: dense if name == "sdpa" else base + slope * d, "triton", "full")

    assert sparse(1, 4, 3) == pytest.approx(0.5)
    assert sparse(1, 1, 3) == 1 and sparse(4, 1, 3) == 0
    assert sparse(1, 0, 3) == 1 and sparse(4, 0, 3) == 0


def test_a_damaged_cache_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.json"
    assert remembered(path, "a", lambda: 0.25) == 0.25
    path.write_text("{")
    assert remembered(path, "a", lambda: 0.5) == 0.5 and remembered(path, "b", lambda: 0.75) == 0.75
    assert json.loads(path.read_text()) == {"a": 0.5, "b": 0.75}


def test_the_measured_call_has_its_density() -> None:
    call = random_call(torch.device("cpu"), torch.bfloat16, 64, 16, True, 0.25, tokens=256, heads=2)
    assert call.layout.density == 0.25 and call.needs_grad and call.query.dtype == torch.bfloat16
    assert (call.layout.block_map.sum(-1) == 4).all()
    assert all(not BACKENDS[name].refusal(call) for name in ("sdpa", "naive"))
    assert bool(BACKENDS["triton"].refusal(call)) != INTERPRETED


def test_the_bias_of_xformers_is_aligned() -> None:
    mask = torch.rand(1, 1, 3, 13, generator=torch.Generator().manual_seed(0)) < 0.5
    bias = aligned_bias(mask, draw(0, 2, 3, 4, 8))
    assert bias.shape == (2, 4, 3, 13) and bias.stride(2) == 16
    assert torch.equal(bias == 0, mask.expand(bias.shape)) and torch.equal(bias.isinf(), ~mask.expand(bias.shape))
