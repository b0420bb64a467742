"""Times tile configurations of the block-sparse attention kernels on the GPU at hand, and records the fastest.

    python tools/tune_block_sparse_attention.py                        # everything
    python tools/tune_block_sparse_attention.py --list --arch sm_90    # what would be timed; needs no GPU

Each candidate is compiled first. One that spills registers, or needs more shared memory than there is, is not timed.
The fastest are written to fastgen/ops/block_sparse_attention/configs.json for this GPU's architecture. Run the compile
tests afterwards.
"""

import argparse
import concurrent.futures
import functools
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton

from benchmarks.block_sparse_attention.compile import compile_kernel
from fastgen.ops.block_sparse_attention.backends import Call
from fastgen.ops.block_sparse_attention.break_even import random_call
from fastgen.ops.block_sparse_attention.configs import (
    CAPACITIES,
    HEAD_DIMS,
    KERNELS,
    SHARED_MEMORY,
    KernelConfig,
    arch_of,
    kernel_config,
    write_configs,
)
from fastgen.ops.block_sparse_attention.launch import Sources, launch_delta, launch_dkv, launch_dq, launch_forward

Timer = Callable[[KernelConfig], float]
Map = Callable[..., Iterable[bool]]


def candidates(arch: str, head_dim: int, capacity: int, kernel: str, run: Map = map) -> list[KernelConfig]:
    """Every configuration that spills nothing and fits into shared memory, among the tiles that divide the layout's,
    with 4 or 8 warps, 2 to 4 stages and, from sm_90 on, with and without tensor descriptors.

    run: `map`, or the `map` of a pool of processes."""
    sides = [side for side in (64, 128) if side <= capacity]
    loads = (False, True) if int(arch.removeprefix("sm_")) >= 90 else (False,)
    configs = [KernelConfig(*values) for values in itertools.product(sides, sides, (4, 8), (2, 3, 4), loads)]
    return [
        config
        for config, kept in zip(
            configs, run(functools.partial(fits, arch, head_dim, capacity, kernel), configs), strict=True
        )
        if kept
    ]


def fits(arch: str, head_dim: int, capacity: int, kernel: str, config: KernelConfig) -> bool:
    """Whether a configuration spills nothing and fits. If this machine has such a GPU, the kernel is also launched, so
    that the timing finds it compiled."""
    compiled = compile_kernel(kernel, arch, head_dim, capacity, config, two_sources=False, float32=False)
    if compiled.spills > 0 or compiled.shared > SHARED_MEMORY[arch]:
        return False
    if torch.cuda.is_available() and arch_of(torch.cuda.get_device_capability()) == arch:
        launcher(small_call(head_dim, capacity), arch, kernel)(config)
    return True


@functools.cache
def small_call(head_dim: int, capacity: int) -> Call:
    return random_call(torch.device("cuda"), torch.bfloat16, head_dim, capacity, False, 0.25, 2048, 12)


def fastest(configs: list[KernelConfig], shipped: KernelConfig, seconds: Timer) -> KernelConfig:
    """The fastest configuration if it is at least 1 % faster than the shipped one, and otherwise the shipped one."""
    times = {config: seconds(config) for config in dict.fromkeys([shipped, *configs])}
    best = min(times, key=lambda config: times[config])
    for config, time in sorted(times.items(), key=lambda item: item[1]):
        print(f"  {time * 1000:8.3f} ms  {config}{'  (shipped)' if config == shipped else ''}", flush=True)
    return best if times[best] < 0.99 * times[shipped] else shipped


def launcher(call: Call, arch: str, kernel: str) -> Callable[[KernelConfig], object]:
    """A function that launches the kernel alone with a given configuration."""
    query, key, value, layout = call.query, call.key, call.value, call.layout
    scale, sources, tiles = query.shape[-1] ** -0.5, Sources(key, value, None, None), (0, len(layout.k_tiles))
    shipped = {name: kernel_config(arch, query.shape[-1], layout.k_tiles.capacity, name) for name in KERNELS}
    out, lse = launch_forward(query, sources, layout, scale, shipped)
    dout = torch.randn_like(out)
    delta = launch_delta(out, dout, None)

    def launch(config: KernelConfig) -> object:
        configs = {**shipped, kernel: config}
        if kernel == "forward":
            return launch_forward(query, sources, layout, scale, configs)
        if kernel == "dq":
            return launch_dq(query, sources, dout, lse, delta, layout, scale, configs)
        return launch_dkv(query, key, value, 0, tiles, dout, lse, delta, layout, scale, configs)

    return launch


def timer(call: Call, arch: str, kernel: str) -> Timer:
    """A function that returns the median seconds of a launch."""
    launch = launcher(call, arch, kernel)
    bench = functools.partial(triton.testing.do_bench, warmup=10, rep=50, return_mode="median")
    return lambda config: float(bench(lambda: launch(config))) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", nargs="+", type=int, choices=HEAD_DIMS, default=HEAD_DIMS)
    parser.add_argument("--capacity", nargs="+", type=int, choices=CAPACITIES, default=CAPACITIES)
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--list", action="store_true", help="only list what would be timed")
    parser.add_argument("--arch", choices=SHARED_MEMORY, help="with --list: another architecture than this GPU's")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--dry-run", action="store_true", help="time, and record nothing")
    args = parser.parse_args()
    if not (args.list or torch.cuda.is_available()):
        sys.exit("timing needs a GPU; --list needs none")
    arch = args.arch if args.list and args.arch else arch_of(torch.cuda.get_device_capability())
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, context) as pool:
        for head_dim, capacity in itertools.product(args.head_dim, args.capacity):
            tune(arch, head_dim, capacity, args, pool.map)


def tune(arch: str, head_dim: int, capacity: int, args: argparse.Namespace, run: Map) -> None:
    """Lists, or times and records, the configurations of one head dimension and tile size."""
    found = {kernel: candidates(arch, head_dim, capacity, kernel, run) for kernel in args.kernel}
    if args.list:
        for kernel, configs in found.items():
            print(*(f"{arch} {head_dim} {capacity} {kernel} {config}" for config in configs), sep="\n", flush=True)
        return
    device = torch.device("cuda")
    call = random_call(device, torch.bfloat16, head_dim, capacity, False, args.density, args.tokens, args.heads)
    best = {kernel: kernel_config(arch, head_dim, capacity, kernel) for kernel in KERNELS}
    for kernel, configs in found.items():
        print(f"{arch}, head dimension {head_dim}, tiles of {capacity}, {kernel}:")
        best[kernel] = fastest(configs, best[kernel], timer(call, arch, kernel))
    if not args.dry_run:
        source = f"timed on {torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
        write_configs(arch, head_dim, capacity, best, source)


if __name__ == "__main__":
    main()
