"""The kernels compile for GPUs that are not there: no spills, within shared memory, on tensor cores.

In a process of its own, as Triton is interpreted in this one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgen.ops.block_sparse_attention.configs import (
    CAPACITIES,
    HEAD_DIMS,
    KERNELS,
    SHARED_MEMORY,
    KernelConfig,
    arch_of,
    kernel_config,
    shipped_configs,
)
from fastgen.ops.block_sparse_attention.launch import INTERPRETED

PRODUCTS = {"sm_80": "mma.sync", "sm_86": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma"}


def compiled(project: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows of tools/compile_block_sparse_attention.py."""
    command = [sys.executable, str(project / "tools/compile_block_sparse_attention.py"), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(rows: list[dict[str, Any]], tensor_cores: bool = True) -> None:
    for row in rows:
        print(row)
        assert row["spills"] == 0, row
        assert 0 < row["shared"] <= row["limit"] == SHARED_MEMORY[row["arch"]], row
        assert not tensor_cores or row["products"] == PRODUCTS[row["arch"]], row


def test_the_kernels_of_streaming_video_compile_for_hopper(project: Path) -> None:
    rows = compiled(project, "--arch", "sm_90", "--head-dim", "128", "--capacity", "128")
    assert [row["kernel"] for row in rows] == list(KERNELS)
    check(rows)


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_every_shipped_configuration_compiles(project: Path, arch: str) -> None:
    rows = compiled(project, "--arch", arch)
    assert len(rows) == len(HEAD_DIMS) * len(CAPACITIES) * len(KERNELS)
    check(rows)


@pytest.mark.slow
def test_a_cache_and_float32_compile(project: Path) -> None:
    for arch in ("sm_90", "sm_100"):
        check(compiled(project, "--arch", arch, "--head-dim", "128", "--kernel", "forward", "dq", "--two-sources"))
    check(compiled(project, "--arch", "sm_86", "--capacity", "64", "--float32"), tensor_cores=False)


def test_every_device_has_configurations() -> None:
    table = shipped_configs()
    assert list(table) == list(SHARED_MEMORY)
    for arch in table:
        for head_dim in HEAD_DIMS:
            for capacity in (16, 32, 64, 128, 256):
                for kernel in KERNELS:
                    config = kernel_config(arch, head_dim, capacity, kernel)
                    assert capacity % config.block_m == capacity % config.block_n == 0
    assert kernel_config("sm_90", 128, 32, "forward").block_m == 32
    assert kernel_config("sm_90", 128, 128, "forward", float32=True) == KernelConfig(16, 16, 4, 1)


def test_devices_are_known_by_their_capability() -> None:
    known = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 9): "sm_86", (9, 0): "sm_90", (10, 0): "sm_100", (12, 0): "sm_86"}
    assert {capability: arch_of(capability) for capability in known} == known
    with pytest.raises(ValueError, match=r"no tile configurations for compute capability 7\.5"):
        arch_of((7, 5))


def test_these_tests_interpret_the_kernels() -> None:
    """conftest.py asks for it before anything imports triton; on a GPU they run as they are."""
    assert torch.cuda.is_available() != INTERPRETED
