"""The file with the weights of a student's linear memory, which lies beside its stock networks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgen.streaming.causal_wan import add_linear_memory

MEMORY = "linear_memory.safetensors"


def save_memory(weights: Mapping[str, Tensor], folder: Path) -> None:
    """weights: "<expert>.<name in network.memory>" -> tensor, with the experts from high noise to low."""
    save_file({name: weight.cpu().contiguous() for name, weight in weights.items()}, folder / MEMORY)


def load_memory(networks: Sequence[Any], folder: Path) -> None:
    """Gives the networks, from high noise to low, the memories that this folder holds for them. Raises ValueError,
    naming the file, if it is not there, cannot be read, or is that of other networks."""
    path = folder / MEMORY
    if not path.is_file():
        raise ValueError(f"{path} is missing: the student of this folder was trained with rollout.chunks.linear")
    try:
        weights = load_file(path)
        for i, network in enumerate(networks):
            add_linear_memory(network)
            own = {name.removeprefix(f"{i}."): w for name, w in weights.items() if name.startswith(f"{i}.")}
            network.memory.load_state_dict(own)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read: {error}; export or download it again") from None
