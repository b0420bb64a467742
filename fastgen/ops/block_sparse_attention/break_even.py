"""The density from which dense attention is faster than a sparse backend, measured once on each device and stored.

A sparse call costs a + b * density. Two timings give a and b, and a third gives the dense time. The two cross at
density (dense - a) / b.
"""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from fastgen.ops.block_sparse_attention.backends import BACKENDS, Call
from fastgen.ops.block_sparse_attention.layout import BlockLayout, dense_layout, static_layout
from fastgen.ops.block_sparse_attention.tiles import tile_tokens

TOKENS, HEADS = 8192, 8  # ours: long enough for launches not to matter, a tenth of a second on a large GPU
DENSITIES = (0.25, 0.75)


def break_even_density(call: Call, sparse: str, dense: str) -> float:
    """The density at which SDPA overtakes the backend `sparse` for calls like this one: the same device, dtype, head
    dimension and tile size, with or without a backward. dense: `mask` is SDPA with the layout's mask, `full` without.
    """
    device = call.query.device
    capacity = max(call.layout.q_tiles.capacity, call.layout.k_tiles.capacity)
    return _kept(device, call.query.dtype, call.query.shape[-1], capacity, call.needs_grad, sparse, dense)


@functools.cache
def _kept(
    device: torch.device, dtype: torch.dtype, head_dim: int, capacity: int, backward: bool, sparse: str, dense: str
) -> float:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    direction = "forward and backward" if backward else "forward"
    key = (
        f"{name}, torch {torch.__version__}, {dtype}, {head_dim}, tiles of {capacity}, {direction}, {sparse}, {dense}"
    )

    def seconds(density: float, backend: str) -> float:
        return time_call(device, dtype, head_dim, capacity, backward, density, backend)

    return remembered(cache_file(), key, lambda: crossing(seconds, sparse, dense))


def crossing(seconds: Callable[[float, str], float], sparse: str, dense: str) -> float:
    """seconds(density, backend) -> the density in [0, 1] from which SDPA wins; 1 where it never does.

    `mask` is timed at half density, `full` at 1, where SDPA needs no mask."""
    low, high = (seconds(density, sparse) for density in DENSITIES)
    slope = (high - low) / (DENSITIES[1] - DENSITIES[0])
    base = low - slope * DENSITIES[0]
    dense_seconds = seconds(1.0 if dense == "full" else 0.5, "sdpa")
    if slope <= 0:  # the time does not grow with density, so one of the two always wins
        return 1.0 if low < dense_seconds else 0.0
    return min(1.0, max(0.0, (dense_seconds - base) / slope))


def cache_file() -> Path:
    """The file with the measured densities, in FASTGEN_CACHE or in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastgen"
    return Path(os.environ.get("FASTGEN_CACHE", default)) / "attention_break_even.json"


def remembered(path: Path, key: str, measure: Callable[[], float]) -> float:
    """The number that the file has under this key. If it has none, it is measured and added to the file."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    if key not in known:
        known[key] = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(known, indent=2) + "\n")
        partial.replace(path)
    return float(known[key])


def time_call(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    capacity: int,
    backward: bool,
    density: float,
    backend: str,
) -> float:
    """Seconds of one call of a backend on random data and a random layout of this density, on a GPU."""
    from triton.testing import do_bench

    call = random_call(device, dtype, head_dim, capacity, backward, density)

    def once() -> None:
        out = BACKENDS[backend].run(call).out
        if backward:
            torch.autograd.grad(out, (call.query, call.key, call.value), torch.ones_like(out))

    return float(do_bench(once, warmup=10, rep=50, return_mode="median")) / 1000


def random_call(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    capacity: int,
    backward: bool,
    density: float,
    tokens: int = TOKENS,
    heads: int = HEADS,
) -> Call:
    """Standard normal tensors [1, tokens, heads, head_dim]; each query tile sees equally many random key tiles."""
    generator = torch.Generator().manual_seed(0)
    tensors = (torch.randn(1, tokens, heads, head_dim, generator=generator) for _ in range(3))
    query, key, value = (tensor.to(device, dtype).requires_grad_(backward) for tensor in tensors)
    tiles = tile_tokens(tokens, capacity)
    layout: BlockLayout = dense_layout(tiles, tiles)
    if density < 1:
        kept = torch.rand(1, heads, len(tiles), len(tiles), generator=generator).argsort(-1) < density * len(tiles)
        layout = static_layout(kept, tiles, tiles)
    return Call(query, key, value, layout.to(device))
