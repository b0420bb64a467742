"""Measures block-sparse attention beside dense attention on a GPU.

    python benchmarks/block_sparse_attention/speed.py --output benchmarks/block_sparse_attention/h100
    python benchmarks/block_sparse_attention/speed.py --smoke --output runs/smoke   # tries the program on a CPU

The output folder gets results.json, table.md and speedup.png, the picture of speed-up against density. The data are
random. Every query tile sees the same number of random key tiles, by a map of its own for each head. For each shape,
density and backend, the program measures milliseconds and TFLOP/s on the visited pairs (the operations are 4 times the
head dimension for each pair forward, and 2.5 times that backward). Scaled dot-product attention (SDPA) without a mask
is timed with each of its kernels, and the best one is the dense line; SDPA with a mask and xformers are timed where
their mask fits into memory. Selection by pooled top k and the building of lists are timed apart.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib

matplotlib.use("Agg")

import torch
import torch.nn.functional as F
import triton
from matplotlib import pyplot as plt
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgen.ops.block_sparse_attention.backends import BACKENDS, Call
from fastgen.ops.block_sparse_attention.layout import BlockLayout, dense_layout, static_layout
from fastgen.ops.block_sparse_attention.selection import TopK
from fastgen.ops.block_sparse_attention.tiles import tile_tokens

Row = dict[str, Any]
DENSE_KERNELS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
COLUMNS = (
    "forward_ms",
    "forward_tflops",
    "both_ms",
    "backward_tflops",
    "selection_ms",
    "selection_both_ms",
    "selection_graph_ms",
    "selection_both_graph_ms",
    "forward_speedup",
    "both_speedup",
)
FIELDS = {"forward_speedup": "forward", "both_speedup": "forward and backward"}
COLOURS = {"triton": "C0", "flex_attention": "C1", "xformers": "C2", "sdpa": "C3"}
SPEED_UPS = (1 / 16, 1 / 8, 0.25, 0.5, 1, 2, 4, 8, 16)  # the ticks of the picture's axis
MASK_BYTES = 8e9  # backends with a mask are left out above this, as it has an element for each pair and head


def make_call(queries: int, keys: int, heads: int, dim: int, capacity: int, density: float, device: str) -> Call:
    """Random tensors that ask for gradients, in bfloat16 on a GPU and in float32 elsewhere, and a random layout."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    lengths = (queries, keys, keys)
    tensors = [torch.randn(1, length, heads, dim, generator=generator) for length in lengths]
    query, key, value = (tensor.to(device, dtype).requires_grad_() for tensor in tensors)
    q_tiles, k_tiles = tile_tokens(queries, capacity), tile_tokens(keys, capacity)
    layout = dense_layout(q_tiles, k_tiles)
    if density < 1:
        ranks = torch.rand(1, heads, len(q_tiles), len(k_tiles), generator=generator).argsort(-1)
        layout = static_layout(ranks < max(1, round(density * len(k_tiles))), q_tiles, k_tiles)
    return Call(query, key, value, layout.to(device))


def tera_flops(call: Call) -> float:
    """The operations of the forward over the visited pairs of tokens, in units of 10^12."""
    sizes = [torch.tensor(tiles.lengths, dtype=torch.float64) for tiles in (call.layout.q_tiles, call.layout.k_tiles)]
    visited = torch.einsum("bhqk,q,k->bh", call.layout.block_map.cpu().double(), *sizes).mean()
    batch, _, heads, dim = call.query.shape
    return float(visited) * batch * heads * dim * 4 / 1e12


def measure(run: Callable[[], object], device: str, repeats: float) -> float:
    """The median seconds of a call, after warming up. repeats: the milliseconds to spend on a GPU."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(run, warmup=repeats / 4, rep=repeats, return_mode="median")) / 1000
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[1]


def time_backend(call: Call, attend: Callable[[], Tensor], device: str, repeats: float, backward: bool) -> Row:
    """The times of a forward without gradients, and of a forward and backward together."""
    tera = tera_flops(call)
    with torch.no_grad():
        forward = measure(attend, device, repeats)
    row: Row = {"visited_tflop": tera, "forward_ms": forward * 1e3, "forward_tflops": tera / forward}
    if backward:

        def both() -> None:
            out = attend()
            torch.autograd.grad(out, (call.query, call.key, call.value), torch.ones_like(out))

        seconds = measure(both, device, repeats)
        row |= {"both_ms": seconds * 1e3, "backward_tflops": 2.5 * tera / max(seconds - forward, 1e-9)}
    return row


def dense_rows(call: Call, device: str, repeats: float) -> list[Row]:
    """A row for each kernel of SDPA without a mask, over all pairs."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (call.query, call.key, call.value))
    rows = []
    for name in DENSE_KERNELS:
        if name == "MATH" and query.shape[2] * key.shape[2] * query.shape[1] * 4 > MASK_BYTES:
            continue

        def attend(name: str = name) -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, name)):
                return F.scaled_dot_product_attention(query, key, value)

        rows.append({"backend": f"dense {name.split('_')[0].lower()}"} | timed(call, attend, device, repeats))
    return rows


def timed(call: Call, attend: Callable[[], Tensor], device: str, repeats: float, backward: bool = True) -> Row:
    """The times, or the reason why there are none."""
    try:
        return time_backend(call, attend, device, repeats, backward)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return {"refused": str(error).splitlines()[0][:200]}


def sparse_rows(call: Call, device: str, repeats: float) -> list[Row]:
    """A row for every backend, on the same layout."""
    pairs = call.query.shape[1] * call.key.shape[1] * call.query.shape[2]
    rows = []
    for name in ("triton", "flex_attention", "xformers", "sdpa"):
        backward = device == "cuda" or name == "sdpa"
        asked = call if backward else Call(*(t.detach() for t in (call.query, call.key, call.value)), call.layout)
        reason = BACKENDS[name].refusal(asked)
        if reason is None and name in ("xformers", "sdpa") and pairs * 3 > MASK_BYTES:
            reason = f"its mask of {pairs:.2g} elements is too large"
        if reason is not None:
            rows.append({"backend": name, "refused": reason})
            continue

        def attend(name: str = name, asked: Call = asked) -> Tensor:
            return BACKENDS[name].run(asked).out

        rows.append({"backend": name} | timed(asked, attend, device, repeats, backward))
    return rows


def selection_ms(call: Call, density: float, device: str, repeats: float) -> Row:
    """The milliseconds of selecting by pooled top k and building the lists of a forward, and those of a backward, too.
    They are measured as six launches and more from Python, and as one graph, which is what the GPU itself takes."""
    tiles = call.layout.q_tiles, call.layout.k_tiles
    rule = TopK(*tiles, max(1, round(density * len(tiles[1]))))
    query, key = call.query.detach(), call.key.detach()

    def forward() -> object:
        return rule(query, key).key_lists

    def both() -> object:
        layout: BlockLayout = rule(query, key)
        return layout.key_lists, layout.query_lists

    first, second = (measure(run, device, repeats) * 1e3 for run in (forward, both))
    row = {"selection_ms": first, "selection_both_ms": second}
    if device == "cuda":
        from triton.testing import do_bench_cudagraph

        for name, run in (("selection_graph_ms", forward), ("selection_both_graph_ms", both)):
            row[name] = float(do_bench_cudagraph(run, rep=20, return_mode="median"))
    return row


def best_dense(rows: list[Row], column: str) -> Row | None:
    """The fastest dense row of one shape."""
    dense = [row for row in rows if row["backend"].startswith("dense") and column in row]
    return min(dense, key=lambda row: row[column], default=None)


def with_speedups(rows: list[Row]) -> list[Row]:
    """Adds to each row of one shape its speed-up over the best dense kernel. The kernels' own includes the time of the
    selection on the GPU alone, because launches from Python run ahead of the GPU unless the host is the bottleneck."""
    for column, name in (("forward", "selection"), ("both", "selection_both")):
        dense = best_dense(rows, f"{column}_ms")
        for row in rows:
            if dense is not None and f"{column}_ms" in row:
                overhead = row.get(f"{name}_graph_ms", row.get(f"{name}_ms", 0.0))
                row[f"{column}_speedup"] = dense[f"{column}_ms"] / (row[f"{column}_ms"] + overhead)
    return rows


def break_even(rows: list[Row], column: str) -> float | None:
    """The density at which the kernels' speed-up is 1, interpolated between measured densities. None if there is no
    such density between them."""
    points = sorted((row["density"], row[column]) for row in rows if row["backend"] == "triton" and column in row)
    for (low, fast), (high, slow) in itertools.pairwise(points):
        if fast >= 1 > slow:
            return low + (high - low) * (1 / fast - 1) / (1 / fast - 1 / slow)
    return None


def draw(report: Row, path: Path) -> None:
    """Draws the speed-up over the best dense kernel against density: a column for each shape, the forward above, and
    forward and backward together below."""
    shapes = list(dict.fromkeys((row["queries"], row["keys"]) for row in report["rows"]))
    densities = sorted({row["density"] for row in report["rows"]})
    limits = []
    for field in FIELDS:
        found = [row[field] for row in report["rows"] if row["backend"] in COLOURS and field in row]
        limits.append((min([0.5, *found]) / 1.2, max([2.0, *found]) * 1.2))
    figure, axes = plt.subplots(2, len(shapes), figsize=(5 * len(shapes), 7), squeeze=False, layout="constrained")
    for column, shape in enumerate(shapes):
        for line, (field, title) in enumerate(FIELDS.items()):
            axis = axes[line][column]
            for name in COLOURS:
                points = sorted(
                    (row["density"], row[field])
                    for row in report["rows"]
                    if (row["queries"], row["keys"]) == shape and row["backend"] == name and field in row
                )
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", label=name, color=COLOURS[name])
            axis.set(xscale="log", yscale="log", xlabel="density", title=f"{shape[0]} x {shape[1]}, {title}")
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set_xticks(densities, [f"{density:g}" for density in densities], minor=False)
            axis.set_yticks(SPEED_UPS, [f"{ratio:g}" for ratio in SPEED_UPS])
            axis.set_ylim(*limits[line])
            axis.minorticks_off()
    axes[0][0].legend()
    axes[0][0].set_ylabel("speed-up over the best dense kernel")
    figure.suptitle(f"{report['device']}\ntorch {report['torch']}, triton {report['triton']}", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def table(report: Row) -> str:
    """Markdown with a line for each measurement, and the densities at which the kernels and dense attention are
    even."""
    lines = [
        "| shape | density | backend | " + " | ".join(column.replace("_", " ") for column in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 3) + "|",
    ]
    for row in report["rows"]:
        cells = [f"{row[column]:.3g}" if column in row else "" for column in COLUMNS]
        name = row["backend"] + (f": {row['refused']}" if "refused" in row else "")
        lines.append(f"| {row['queries']} x {row['keys']} | {row['density']} | {name} | {' | '.join(cells)} |")
    lines += ["", *(f"Even with dense at {shape}: {even}" for shape, even in report["break_even"].items())]
    return "\n".join(lines)


def reports(args: argparse.Namespace, device: str) -> Iterator[Row]:
    """Everything measured so far, with what it was measured on, once after each density."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    about = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU, interpreted: not a measurement",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "commit": commit.stdout.strip(),
        "heads": args.heads,
        "head_dim": args.head_dim,
        "capacity": args.capacity,
    }
    rows: list[Row] = []
    even: Row = {}
    for shape in args.shapes:
        queries, keys = map(int, shape.split("x"))
        sizes = (queries, keys, args.heads, args.head_dim, args.capacity)
        found = [row | {"density": 1.0} for row in dense_rows(make_call(*sizes, 1.0, device), device, args.repeats)]
        for density in args.densities:
            call = make_call(*sizes, density, device)
            overhead = selection_ms(call, density, device, args.repeats)
            for row in sparse_rows(call, device, args.repeats):
                found.append(row | {"density": density} | (overhead if row["backend"] == "triton" else {}))
            measured = with_speedups([dict(row) for row in found])
            even[shape] = {field: break_even(measured, field) for field in FIELDS}
            done = rows + [{"queries": queries, "keys": keys} | row for row in measured]
            yield about | {"break_even": even, "rows": done}
        rows = done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the folder that gets the three files")
    parser.add_argument("--shapes", nargs="+", default=["4680x14040", "32760x32760"])
    parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 0.5, 0.25, 0.125])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--capacity", type=int, default=128)
    parser.add_argument("--repeats", type=float, default=200, help="milliseconds for each measurement")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to try the program anywhere")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not args.smoke else "cpu"
    if args.smoke:
        args.shapes, args.densities, args.heads, args.head_dim, args.capacity = ["40x72"], [1.0, 0.5], 1, 64, 16
    elif device == "cpu":
        sys.exit("this needs a GPU; --smoke tries the program without one")
    args.output.mkdir(parents=True, exist_ok=True)
    for report in reports(args, device):
        (args.output / "results.json").write_text(json.dumps(report, indent=2) + "\n")
        (args.output / "table.md").write_text(table(report) + "\n")
        print(f"{len(report['rows'])} measurements are kept", flush=True)
    draw(report, args.output / "speedup.png")
    print(table(report))


if __name__ == "__main__":
    main()
