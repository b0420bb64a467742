"""Files with the weights of parts that a stock network lacks: a linear memory, actions, sound. They lie beside the
stock networks of a student."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Add = Callable[[Any, Mapping[str, Tensor], Mapping[str, str]], nn.Module]


def save_part(weights: Mapping[str, Tensor], path: Path, about: Mapping[str, str] | None = None) -> None:
    """weights: "<expert>.<prefix><name>" -> tensor, with the experts from high noise to low. about: what is needed to
    make the part."""
    stored = {name: weight.cpu().contiguous() for name, weight in weights.items()}
    save_file(stored, path, {"format": "pt", **(about or {})})


def load_part(path: Path, key: str, networks: Sequence[Any], add: Add, prefix: str = "") -> None:
    """Gives each of the networks, from high noise to low, the part that this file holds for it. key: of the recipe,
    with which such students are trained. add: adds a new part to a network, and returns it; it gets the weights, by
    their names in the part, and what `save_part` was told.

    Raises ValueError, naming the file, if it is not there, cannot be read, or is that of other networks."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: the student of this folder was trained with {key}")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        for i, network in enumerate(networks):
            own_prefix = f"{i}.{prefix}"
            own = {n.removeprefix(own_prefix): w for n, w in weights.items() if n.startswith(own_prefix)}
            add(network, own, about).load_state_dict(own)
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; export or download it again") from None
