"""The loss of improved MeanFlow, and its law of guidance scales, by the authors' code:
python tools/golden/imeanflow.py CHECKOUT

CHECKOUT: Lyy-iiis/imeanflow at bf60cd7cb653f6628e59d48034b333c5eba445e2. Their network is replaced by GoldenNetwork,
and what jax.random draws is given. Their network has an auxiliary head for the velocity; here this output is
u(x, t, t) without gradient, so that the loss of that head has none. The guidance interval is the whole of [0, 1]."""

import sys
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import torch
from authors import normals
from golden_rows import save_golden
from jax_network import NAMES, flat, given_draws, network, parameters

COMMIT = "bf60cd7cb653f6628e59d48034b333c5eba445e2"
SCALE = 4.0


def stub_models(embeddings: Any) -> ModuleType:
    """Their module of networks, with GoldenNetwork in it. embeddings: [labels + 1, 4]; the last: no prompt."""

    class Golden(nn.Module):
        num_classes: int
        eval: bool = False

        @nn.compact
        def __call__(self, x: Any, t: Any, h: Any, omega: Any, t_min: Any, t_max: Any, y: Any) -> tuple[Any, Any]:
            given = parameters()
            p = {name: self.param(name, lambda _, name=name: given[name]) for name in NAMES}
            u, v = (jnp.moveaxis(network(p, jnp.moveaxis(x, -1, 1), t, embeddings[y], s), 1, -1) for s in (t - h, t))
            return u, jax.lax.stop_gradient(v)

    module = ModuleType("models.imfDiT")
    module.Golden = module.imfDiT = Golden
    return module


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    normal, count, labels = normals(7), 8, 3
    x, noise, t, r = normal(count, 4, 3, 3), normal(count, 4, 3, 3), normal(count), normal(count)
    embeddings = normal(labels + 1, 4)
    label = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    drop = torch.linspace(0, 1, count, dtype=torch.float64)  # below 0.3: three samples

    models = ModuleType("models")
    models.imfDiT = stub_models(jnp.asarray(embeddings.numpy()))
    sys.modules |= {"models": models, "models.imfDiT": models.imfDiT}
    import imf

    class Float64(imf.iMeanFlow):
        dtype = jnp.float64

        def sample_cfg_interval(self, bz: int, fm_mask: Any = None) -> tuple[Any, Any]:
            return jnp.zeros((bz, 1, 1, 1)), jnp.ones((bz, 1, 1, 1))

        def sample_cfg_scale(self, bz: int, s_max: float = 7.0) -> Any:
            return jnp.full((bz, 1, 1, 1), SCALE)

    def last(images: torch.Tensor) -> Any:
        return jnp.asarray(images.movedim(1, -1).numpy())

    model = Float64("Golden", num_classes=labels, class_dropout_prob=0.3)

    def loss(p: Any) -> Any:
        levels = [jnp.asarray(v.numpy()).reshape(count, 1, 1, 1) for v in (t, r)]
        with given_draws(normal=[*levels, last(noise)], uniform=[jnp.asarray(drop.numpy())]):
            variables, key = {"params": {"net": p}}, {"gen": jax.random.key(0)}
            return model.apply(variables, last(x), jnp.asarray(label.numpy()), rngs=key, method=model.forward)[0]

    tensors = {"x": x, "noise": noise, "t": t, "r": r, "cond": embeddings[label], "uncond": embeddings[-1:]}
    tensors["gradient"] = flat(jax.grad(loss)(parameters()))
    save_golden("mean_flow_improved", tensors, "Lyy-iiis/imeanflow", COMMIT, "imf.py, iMeanFlow.forward")

    u = torch.linspace(0.01, 0.99, 9, dtype=torch.float32)
    scales = {"u": u}
    for beta in (1.0, 2.0):
        model = imf.iMeanFlow("Golden", num_classes=labels, cfg_beta=beta)
        with given_draws(uniform=[jnp.asarray(u.numpy()).reshape(-1, 1, 1, 1)]):
            found = model.apply({}, len(u), rngs={"gen": jax.random.key(0)}, method=model.sample_cfg_scale)
        scales[f"beta{beta:g}"] = torch.tensor(found.reshape(-1).tolist())
    save_golden("mean_flow_scales", scales, "Lyy-iiis/imeanflow", COMMIT, "imf.py, iMeanFlow.sample_cfg_scale")


if __name__ == "__main__":
    main()
