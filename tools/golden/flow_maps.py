"""The losses of flow map self-distillation (LSD, ESD, PSD), by the authors' code:
python tools/golden/flow_maps.py CHECKOUT

CHECKOUT: roni-dot/regularized-loss-flow-maps at afdaefa0835b5d3b6482724d58911c1320e9712d, the first commit of a fork
of nmboffi/flow-maps, before the fork changes it. Their network is replaced by GoldenNetwork, and its learned
log-weight by 0, where the loss is the plain square. Time runs from noise to data there: s and t are 1 - t and 1 - s
here, and their average velocity is -u."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import torch
from authors import normals
from golden_rows import save_golden
from jax_network import NAMES, flat, network, parameters
from ml_collections import ConfigDict

COMMIT = "afdaefa0835b5d3b6482724d58911c1320e9712d"
ROWS = {  # name: their loss_type, psd_type, stopgrad_type
    "lsd": ("lsd", None, "convex"),
    "esd": ("esd", None, "convex"),
    "psd": ("psd", "uniform", "convex"),
    "psd_half": ("psd", "midpoint", "convex"),
}


def main() -> None:
    sys.path.insert(0, f"{sys.argv[1]}/py")
    sys.modules["tensorflow"] = tensorflow = ModuleType("tensorflow")
    tensorflow.data = SimpleNamespace(Dataset=object)  # type: ignore[attr-defined]
    from common import flow_map, interpolant, losses, network_utils

    class Golden(network_utils.FlowMapMLP):
        def setup(self) -> None:
            given = parameters()
            self.golden = {name: self.param(name, lambda _, name=name: given[name]) for name in NAMES}

        def calc_weight(self, s: Any, t: Any) -> float:
            return 0.0

        def calc_phi(self, s: Any, t: Any, x: Any, *args: Any, **options: Any) -> Any:
            levels = (jnp.atleast_1d(1 - s), jnp.atleast_1d(1 - t))
            return -network(self.golden, x[None], levels[0], jnp.zeros((1, 4)), levels[1])[0]

    network_utils.setup_network = lambda config: Golden(config)
    normal, count = normals(11), 8
    data, noise = normal(count, 4, 3, 3), normal(count, 4, 3, 3)
    first, second, middle = torch.rand(3, count, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    on_diagonal = torch.arange(count) < 6
    t = torch.where(on_diagonal, first, torch.maximum(first, second))  # ours: the level of the point
    s = torch.where(on_diagonal, first, torch.minimum(first, second))
    tensors = {"x": data, "noise": noise, "first": first, "second": second, "middle": middle}

    for name, (loss_type, psd_type, stopgrad_type) in ROWS.items():
        training = {"loss_type": loss_type, "psd_type": psd_type, "stopgrad_type": stopgrad_type}
        cfg = ConfigDict({"training": training, "optimization": {"diag_fraction": 0.75, "bs": count}})
        interp = interpolant.setup_interpolant(ConfigDict({"problem": {"interp_type": "linear"}}))
        loss = losses.setup_loss(cfg, flow_map.FlowMap(ConfigDict()), interp)
        low, high = (jnp.asarray(1 - level.numpy()) for level in (t, s))
        h = jnp.full(count, 0.5) if psd_type == "midpoint" else jnp.asarray(middle.numpy())
        points = (jnp.asarray(noise.numpy()), jnp.asarray(data.numpy()))
        keys = jax.random.split(jax.random.key(0), count)

        def total(p: Any, loss: Any = loss, h: Any = h, points: Any = points, keys: Any = keys) -> Any:
            params = {"params": {"flow_map": p}}
            teacher = {"params": {"flow_map": parameters()}}
            return loss(params, teacher, *points, None, low, high, h * low + (1 - h) * high, h, keys)  # noqa: B023

        value, gradient = jax.value_and_grad(total)(parameters())
        result = {"loss": torch.tensor(float(value), dtype=torch.float64), "gradient": flat(gradient)}
        source = ("roni-dot/regularized-loss-flow-maps", COMMIT, f"py/common/losses.py, setup_loss ({loss_type}_term)")
        save_golden(f"flow_map_{name}", tensors | result, *source)


if __name__ == "__main__":
    main()
