"""Compiles the block-sparse attention kernels for GPUs that are not there, and prints what they need.

    python benchmarks/block_sparse_attention/compile.py --arch sm_90 --head-dim 128 --capacity 128
    python benchmarks/block_sparse_attention/compile.py --json        # everything, one JSON object on each line

For each shipped configuration it prints the registers and spilled bytes of a thread (from ptxas), the shared memory
beside the architecture's limit, and the instruction of the matrix products (WGMMA on sm_90). It needs no GPU. Each
configuration takes two to five seconds.
"""

import argparse
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgen.ops.block_sparse_attention.configs import (
    CAPACITIES,
    HEAD_DIMS,
    KERNELS,
    SHARED_MEMORY,
    KernelConfig,
    kernel_config,
)
from fastgen.ops.block_sparse_attention.kernel import forward_kernel
from fastgen.ops.block_sparse_attention.kernel_backward import delta_kernel, dkv_kernel, dq_kernel
from fastgen.ops.block_sparse_attention.kernel_selection import lists_kernel, pool_kernel, select_kernel

FUNCTIONS = {
    "forward": forward_kernel,
    "dq": dq_kernel,
    "dkv": dkv_kernel,
    "delta": delta_kernel,
    "pool": pool_kernel,
    "select": select_kernel,
    "lists": lists_kernel,
}
TYPES = {
    "*fp32": ("p_lse", "p_dlse", "p_delta", "p_means", "p_scores"),
    "*i32": ("p_tiles", "p_lists", "p_counts", "p_count", "p_full"),
    "*u8": ("p_map", "p_forced"),
    "fp32": ("scale", "scale_log2", "amount"),
}


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel needs.

    registers, spills: of a thread; spills are in bytes.
    shared: the bytes of shared memory of a program.
    products: the PTX instruction of the matrix products."""

    registers: int
    spills: int
    shared: int
    products: str


def compile_kernel(
    kernel: str, arch: str, head_dim: int, capacity: int, config: KernelConfig, two_sources: bool, float32: bool
) -> Compiled:
    """Compiles one kernel in bfloat16 or float32, as a launch on contiguous tensors does. Triton's errors are
    raised."""
    function = FUNCTIONS[kernel]
    every = {
        "HEAD_DIM": head_dim,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "QUERY_TILE": capacity,
        "KEY_TILE": capacity,
        "CAPACITY": capacity,
        "COLUMNS": 512,
        "UPCAST": False,
        "TWO_SOURCES": two_sources,
        "TMA": config.tma and not (two_sources and kernel != "dkv"),
        "BY_MASS": True,
        "HAS_DLSE": True,
    }
    constants = {name: every[name] for name in inspect.signature(function.fn).parameters if name.isupper()}
    names = list(inspect.signature(function.fn).parameters)
    signature = {name: "constexpr" if name in constants else argument_type(name, float32) for name in names}
    if constants.get("TMA"):
        rows = {"d_k": config.block_n, "d_v": config.block_n, "d_q": config.block_m, "d_dout": config.block_m}
        signature |= {name: f"tensordesc<bf16[{rows[name]}, {head_dim}]>" for name in names if name in rows}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*")
        or (name.startswith("stride_") and not name.startswith(("stride_list", "stride_count")))
    }
    source = ASTSource(function, signature, constants, aligned)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    compiled = triton.compile(
        source, target=target, options={"num_warps": config.num_warps, "num_stages": config.num_stages}
    )
    ptx = compiled.asm["ptx"]
    registers, spills = assemble(ptx)
    products = next((name for name in ("wgmma", "tcgen05.mma", "mma.sync") if name in ptx), "none")
    return Compiled(registers, spills, compiled.metadata.shared, products)


def argument_type(name: str, float32: bool) -> str:
    """Triton's type of an argument, from its name."""
    known = next((kind for kind, names in TYPES.items() if name in names), None)
    return known or (("*fp32" if float32 else "*bf16") if name.startswith(("p_", "d_")) else "i32")


def assemble(ptx: str) -> tuple[int, int]:
    """The registers and spilled bytes (of stores and loads) that ptxas reports."""
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        for ptxas in assemblers():
            command = [ptxas, "-v", f"-arch={target[1]}", str(source), "-o", str(source.with_suffix(".cubin"))]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                break
        else:
            raise RuntimeError(done.stderr)
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    assert registers is not None and spills, done.stderr
    return int(registers[1]), sum(map(int, spills))


def assemblers() -> list[str]:
    """The paths of the assemblers in the Triton wheel. Newer wheels have two, of which ptxas-blackwell is for newer
    GPUs."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return [str(folder / name) for name in ("ptxas", "ptxas-blackwell") if (folder / name).exists()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=SHARED_MEMORY, default=list(SHARED_MEMORY))
    parser.add_argument("--head-dim", nargs="+", type=int, choices=HEAD_DIMS, default=HEAD_DIMS)
    parser.add_argument("--capacity", nargs="+", type=int, choices=CAPACITIES, default=CAPACITIES)
    parser.add_argument("--kernel", nargs="+", choices=FUNCTIONS, default=KERNELS)
    parser.add_argument("--two-sources", action="store_true", help="as they are with a cache as a second source")
    parser.add_argument("--float32", action="store_true", help="instead of bfloat16")
    parser.add_argument(
        "--config",
        type=int,
        nargs=5,
        help="block_m block_n num_warps num_stages tma (0 or 1), instead of the shipped configuration",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    for arch, head_dim, capacity, kernel in itertools.product(args.arch, args.head_dim, args.capacity, args.kernel):
        if args.config:
            config = KernelConfig(*args.config[:4], bool(args.config[4]))
        elif kernel in KERNELS:
            config = kernel_config(arch, head_dim, capacity, kernel, args.float32)
        else:
            config = KernelConfig(32, 32, 4, 3)  # these are launched with Triton's default warps and stages
        result = compile_kernel(kernel, arch, head_dim, capacity, config, args.two_sources, args.float32)
        names = {"arch": arch, "head_dim": head_dim, "capacity": capacity, "kernel": kernel}
        row = {**names, **asdict(config), **asdict(result), "limit": SHARED_MEMORY[arch]}
        print(json.dumps(row) if args.json else " ".join(f"{k}={v}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
