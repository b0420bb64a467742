"""The kernels compile for GPUs that are not there: no spills, within shared memory, on tensor cores.

In a process of its own, as Triton is interpreted in this one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgen.ops.block_sparse_attention import configs
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
    """The rows of benchmarks/block_sparse_attention/compile.py."""
    command = [sys.executable, str(project / "benchmarks/block_sparse_attention/compile.py"), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(rows: list[dict[str, Any]], tensor_cores: bool = True) -> None:
    for row in rows:
        print(row)
        assert row["spills"] == 0, row
        assert 0 < row["shared"] <= row["limit"] == SHARED_MEMORY[row["arch"]], row
        assert not tensor_cores or row["products"] == PRODUCTS[row["arch"]], row


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_every_shipped_configuration_compiles(project: Path, arch: str) -> None:
    if arch == "sm_86":  # sm_80's code; its shared memory only matters at the larger head dimension
        rows = compiled(project, "--arch", arch, "--head-dim", "128")
    else:
        rows = compiled(project, "--arch", arch)
        assert len(rows) == len(HEAD_DIMS) * len(CAPACITIES) * len(KERNELS)
    check(rows)


@pytest.mark.slow
def test_a_cache_and_float32_compile(project: Path) -> None:
    for arch in ("sm_90", "sm_100"):
        check(compiled(project, "--arch", arch, "--head-dim", "128", "--kernel", "forward", "dq", "--two-sources"))
    check(compiled(project, "--arch", "sm_86", "--capacity", "64", "--float32"), tensor_cores=False)
    small = ("--kernel", "delta", "pool", "select", "lists", "--head-dim", "128", "--capacity", "128")
    check(compiled(project, "--arch", "sm_80", "sm_90", "sm_100", *small), tensor_cores=False)


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


def test_tuned_configurations_are_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = tmp_path / "configs.json"
    copy.write_text(configs.CONFIG_FILE.read_text())
    monkeypatch.setattr(configs, "CONFIG_FILE", copy)
    tuned = {kernel: KernelConfig(64, 128, 4, 3) for kernel in KERNELS}
    try:
        configs.write_configs("sm_90", 128, 128, tuned, "timed on a test")
        assert kernel_config("sm_90", 128, 128, "dq") == tuned["dq"]
        assert shipped_configs()["sm_90"]["source"] == "timed on a test"
        assert kernel_config("sm_90", 64, 128, "dq") != tuned["dq"]
    finally:
        shipped_configs.cache_clear()


@pytest.mark.slow
def test_the_tuner_takes_the_fastest_that_compiles(project: Path) -> None:
    """The shipped configuration is a candidate, and stays unless another one is faster by a percent."""
    program = """
from tune_block_sparse_attention import KernelConfig, candidates, fastest
shipped, other = KernelConfig(64, 64, 4, 3), KernelConfig(64, 64, 8, 2)
found = candidates("sm_90", 64, 64, "forward")
assert shipped in found and len(found) > 3, found
assert fastest(found, shipped, lambda config: 0.5 if config == other else 1.0) == other
assert fastest(found, shipped, lambda config: 0.995 if config == other else 1.0) == shipped
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=project / "tools", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_benchmark_makes_its_table_and_picture(project: Path, tmp_path: Path) -> None:
    """Tiny, interpreted: it says nothing about speed, and says so."""
    command = [
        sys.executable,
        str(project / "benchmarks/block_sparse_attention/speed.py"),
        "--smoke",
        "--output",
        "out",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/results.json").read_text())
    assert report["device"] == "CPU, interpreted: not a measurement"
    rows = {(row["backend"], row["density"]): row for row in report["rows"]}
    assert {"dense flash", "triton", "flex_attention", "xformers", "sdpa"} <= {name for name, _ in rows}
    half = rows["triton", 0.5]
    assert half["forward_tflops"] == pytest.approx(half["visited_tflop"] / half["forward_ms"] * 1e3)
    fastest = min(row["forward_ms"] for (name, _), row in rows.items() if "dense" in name and "forward_ms" in row)
    assert half["forward_speedup"] == pytest.approx(fastest / (half["forward_ms"] + half["selection_ms"]))
    assert (tmp_path / "out/speedup.png").stat().st_size > 10_000
    assert "| 40 x 72 | 0.5 | triton |" in (tmp_path / "out/table.md").read_text()
