"""The machine that a time was measured on."""

import os
import platform
from pathlib import Path

import torch


def machine(device: torch.device | str) -> str:
    """The name of the GPU; or that of the processor, with the number of its cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor(Path('/proc/cpuinfo'))}, {os.cpu_count()} cores"


def processor(info: Path) -> str:
    """Its name, from what Linux says of it, or else its kind, such as arm64."""
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
