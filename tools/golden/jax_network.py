"""GoldenNetwork in JAX, for authors' code that is written in JAX (`pip install jax flax ml_collections`)."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from golden_rows import GoldenNetwork

jax.config.update("jax_enable_x64", True)
NAMES = tuple(name for name, _ in GoldenNetwork().named_parameters())


def parameters(seed: int = 0) -> dict[str, Any]:
    """The parameters of GoldenNetwork(seed)."""
    return {name: jnp.asarray(p.detach().numpy()) for name, p in GoldenNetwork(seed).named_parameters()}


def network(p: dict[str, Any], x: Any, t: Any, cond: Any, s: Any) -> Any:
    """GoldenNetwork.forward. x: [B, 4, ...]; t and s: [B]; cond: [B, 4]."""
    positions = (1,) * (x.ndim - 2)
    shift = p["b1"] + t[:, None] * p["a"] + s[:, None] * p["d"] + cond @ p["c"].T
    h = jnp.tanh(jnp.einsum("hc,bc...->bh...", p["w1"], x) + shift.reshape(*shift.shape, *positions))
    axes = tuple(range(2, x.ndim))
    h = h + h.mean(axes, keepdims=True) if axes else h
    return jnp.einsum("ch,bh...->bc...", p["w2"], h)


def flat(gradient: dict[str, Any]) -> Tensor:
    """As GoldenNetwork.flat."""
    return torch.cat([torch.from_numpy(np.asarray(gradient[name]).copy()).flatten() for name in NAMES])


@contextmanager
def given_draws(**draws: list[Any]) -> Iterator[None]:
    """Within it, jax.random.normal and jax.random.uniform return these arrays in order, whatever their arguments."""
    saved = {name: getattr(jax.random, name) for name in draws}
    for name, values in draws.items():
        left = iter(values)
        setattr(jax.random, name, lambda *args, left=left, **options: jnp.asarray(next(left)))
    try:
        yield
    finally:
        for name, function in saved.items():
            setattr(jax.random, name, function)
