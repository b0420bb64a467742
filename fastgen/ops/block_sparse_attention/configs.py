"""Which hardware tile each kernel uses, by architecture, head dimension and capacity of the layout's tiles.

configs.json holds them, so that tools/tune_block_sparse_attention.py can write it and the compile tests can read it.
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
MAX_COLUMNS = 4096  # tiles that a program of the selection kernels holds: 524,288 tokens in tiles of 128

# bytes of shared memory that one program may have (CUDA programming guide, compute capabilities)
SHARED_MEMORY = {"sm_80": 166_912, "sm_86": 101_376, "sm_90": 232_448, "sm_100": 232_448}


@dataclass(frozen=True)
class KernelConfig:
    """block_m: query rows, block_n: key rows of one step.  num_warps, num_stages: as Triton's.
    tma: full tiles come through tensor descriptors, by the copy engine of sm_90 and later, where tensors allow it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False


def kernels_run_on(device: torch.device) -> bool:
    """Whether Triton and an NVIDIA GPU are there; without them, torch does what the small kernels do."""
    return device.type == "cuda" and torch.version.cuda is not None and importlib.util.find_spec("triton") is not None


def arch_of(capability: tuple[int, int]) -> str:
    """The configuration's architecture for a CUDA compute capability; sm_86 stands for every GPU with 99 KB.

    Raises ValueError for a device that nothing here was compiled for."""
    major, minor = capability
    known = {8: "sm_80" if minor == 0 else "sm_86", 9: "sm_90", 10: "sm_100", 12: "sm_86"}
    if major not in known:
        raise ValueError(
            f"no tile configurations for compute capability {major}.{minor}; there are {', '.join(SHARED_MEMORY)}"
        )
    return known[major]


@functools.cache
def shipped_configs() -> dict[str, Any]:
    """architecture -> head dimension -> capacity -> kernel -> KernelConfig's fields; and "source", how found."""
    return json.loads(CONFIG_FILE.read_text())


def kernel_config(arch: str, head_dim: int, capacity: int, kernel: str, float32: bool = False) -> KernelConfig:
    """The configuration for layouts of tiles of `capacity`: of 128 and more, of 64, or that of 64 cut down.

    float32 runs without tensor cores: the largest tile that spills nothing, the same everywhere (ours, not tuned)."""
    table = shipped_configs()[arch][str(head_dim)]["128" if capacity >= 128 else "64"]
    config = KernelConfig(16, 16, 4, 1) if float32 else KernelConfig(**table[kernel])
    parts = min(config.block_m, capacity), min(config.block_n, capacity)
    return KernelConfig(*parts, config.num_warps, config.num_stages, config.tma)


def write_configs(arch: str, head_dim: int, capacity: int, configs: dict[str, KernelConfig], source: str) -> None:
    """Records the configuration of each kernel in configs.json, and in words how the architecture's were found."""
    table = json.loads(CONFIG_FILE.read_text())
    table[arch]["source"] = source
    table[arch][str(head_dim)][str(capacity)] = {kernel: asdict(config) for kernel, config in configs.items()}
    CONFIG_FILE.write_text(json.dumps(table, indent=2) + "\n")
    shipped_configs.cache_clear()
