"""The block sizes that each kernel uses, by architecture, head dimension and capacity of the layout's tiles.

They are in configs.json, which tools/tune_block_sparse_attention.py writes and the compile tests read.
A layout's tile is processed in parts of block_m x block_n, both at most its capacity.
"""

import functools
import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

CONFIG_FILE = Path(__file__).with_name("configs.json")
KERNELS = ("forward", "dq", "dkv")
HEAD_DIMS = (64, 128)
CAPACITIES = (64, 128)
MAX_COLUMNS = 4096  # the most tiles that a program of the selection kernels can hold: 524,288 tokens in tiles of 128

# bytes of shared memory that one program may have (CUDA programming guide, compute capabilities)
SHARED_MEMORY = {"sm_80": 166_912, "sm_86": 101_376, "sm_90": 232_448, "sm_100": 232_448}


@dataclass(frozen=True)
class KernelConfig:
    """block_m, block_n: query rows and key rows of one step.  num_warps, num_stages: Triton's launch options.
    tma: full tiles are loaded through tensor descriptors, by the copy engine of sm_90 and later, if the tensors allow
    it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False


def kernels_run_on(device: torch.device) -> bool:
    """Whether Triton and an NVIDIA GPU are available. Without them, torch does the work of the small kernels."""
    return device.type == "cuda" and torch.version.cuda is not None and importlib.util.find_spec("triton") is not None


def arch_of(capability: tuple[int, int]) -> str:
    """The architecture whose configurations serve a CUDA compute capability. sm_86 stands for every GPU with 99 KB of
    shared memory.

    Raises ValueError for a device for which nothing here was compiled."""
    major, minor = capability
    known = {8: "sm_80" if minor == 0 else "sm_86", 9: "sm_90", 10: "sm_100", 12: "sm_86"}
    if major not in known:
        raise ValueError(
            f"no tile configurations for compute capability {major}.{minor}; there are some for "
            f"{', '.join(SHARED_MEMORY)}"
        )
    return known[major]


@functools.cache
def shipped_configs() -> dict[str, Any]:
    """architecture -> head dimension -> capacity -> kernel -> the fields of KernelConfig. Each architecture also has
    "source", which says how its configurations were found."""
    return json.loads(CONFIG_FILE.read_text())


def kernel_config(arch: str, head_dim: int, capacity: int, kernel: str, float32: bool = False) -> KernelConfig:
    """The configuration for layouts whose tiles have this capacity. There is one for 128 and more, and one for 64,
    whose blocks are cut down for smaller tiles.

    float32 runs without tensor cores. It uses the largest blocks that spill nothing, the same on all architectures
    (ours, not tuned)."""
    table = shipped_configs()[arch][str(head_dim)]["128" if capacity >= 128 else "64"]
    config = KernelConfig(16, 16, 4, 1) if float32 else KernelConfig(**table[kernel])
    parts = min(config.block_m, capacity), min(config.block_n, capacity)
    return KernelConfig(*parts, config.num_warps, config.num_stages, config.tma)


def write_configs(arch: str, head_dim: int, capacity: int, configs: dict[str, KernelConfig], source: str) -> None:
    """Records the configuration of each kernel in configs.json. source: how the architecture's were found."""
    table = json.loads(CONFIG_FILE.read_text())
    table[arch]["source"] = source
    table[arch][str(head_dim)][str(capacity)] = {kernel: asdict(config) for kernel, config in configs.items()}
    CONFIG_FILE.write_text(json.dumps(table, indent=2) + "\n")
    shipped_configs.cache_clear()
