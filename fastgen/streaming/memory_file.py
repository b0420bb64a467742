"""The file with the weights of a student's linear memory, which lies beside its stock networks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastgen.streaming.causal_wan import add_linear_memory
from fastgen.streaming.part_file import load_part, save_part

MEMORY = "linear_memory.safetensors"


def save_memory(weights: Mapping[str, Tensor], folder: Path) -> None:
    """weights: "<expert>.<name in network.memory>" -> tensor, with the experts from high noise to low."""
    save_part(weights, folder / MEMORY)


def load_memory(networks: Sequence[Any], folder: Path) -> None:
    """Gives the networks the memories that this folder holds for them, see `part_file.load_part`."""

    def add(network: Any, *_: Any) -> nn.Module:
        add_linear_memory(network)
        return network.memory

    load_part(folder / MEMORY, "rollout.chunks.linear", networks, add)
