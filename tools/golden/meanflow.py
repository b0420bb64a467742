"""MeanFlow's loss with guidance, by the authors' code: python tools/golden/meanflow.py CHECKOUT

CHECKOUT: Gsunshine/meanflow at d70cb55d298ee03c53bf6da67bec281082e4e2d9. Their networks are replaced by GoldenNetwork,
and what jax.random draws is given. Images have their channels last there."""

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

COMMIT = "d70cb55d298ee03c53bf6da67bec281082e4e2d9"
SETTINGS = {  # run_xl of the paper, with an interval that some of the levels are outside of
    "xl": {"omega": 0.2, "kappa": 0.92, "t_start": 0.0, "t_end": 0.75},
    "plain": {"omega": 3.0, "kappa": 0.0, "t_start": 0.0, "t_end": 1.0},
}


def stub_models(embeddings: Any) -> ModuleType:
    """Their module of networks, with GoldenNetwork in it. embeddings: [labels + 1, 4]; the last: no prompt."""

    class Golden(nn.Module):
        class_dropout_prob: float = 0.0

        @nn.compact
        def __call__(self, x: Any, t: Any, h: Any, y: Any, train: bool = True, key: Any = None) -> Any:
            given = parameters()
            p = {name: self.param(name, lambda _, name=name: given[name]) for name in NAMES}
            return jnp.moveaxis(network(p, jnp.moveaxis(x, -1, 1), t, embeddings[y], t - h), 1, -1)

    module = ModuleType("models.models_dit")
    module.Golden = Golden
    return module


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    normal, count, labels = normals(5), 8, 3
    x, noise = normal(count, 4, 3, 3), normal(count, 4, 3, 3)
    t, r = normal(count), normal(count)
    embeddings, label = normal(labels + 1, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    drop = torch.linspace(0, 1, count, dtype=torch.float64)  # below 0.3: two samples

    models = ModuleType("models")
    models.models_dit = stub_models(jnp.asarray(embeddings.numpy()))
    sys.modules |= {"models": models, "models.models_dit": models.models_dit}
    from meanflow import MeanFlow

    class Float64(MeanFlow):
        dtype = jnp.float64

    def last(images: torch.Tensor) -> Any:
        return jnp.asarray(images.movedim(1, -1).numpy())

    for name, settings in SETTINGS.items():
        model = Float64("Golden", {}, num_classes=labels, class_dropout_prob=0.3, **settings)

        def loss(p: Any, model: MeanFlow = model) -> Any:
            levels = [jnp.asarray(v.numpy()).reshape(count, 1, 1, 1) for v in (t, r)]
            with given_draws(normal=[*levels, last(noise)], uniform=[jnp.asarray(drop.numpy())]):
                variables, key = {"params": {"net": p}}, {"gen": jax.random.key(0)}
                return model.apply(variables, last(x), jnp.asarray(label.numpy()), rngs=key, method=model.forward)[0]

        value, gradient = jax.value_and_grad(loss)(parameters())
        tensors = {"x": x, "noise": noise, "t": t, "r": r, "cond": embeddings[label], "uncond": embeddings[-1:]}
        tensors |= {"loss": torch.tensor(float(value), dtype=torch.float64), "gradient": flat(gradient)}
        save_golden(f"mean_flow_{name}", tensors, "Gsunshine/meanflow", COMMIT, "meanflow.py, MeanFlow.forward")


if __name__ == "__main__":
    main()
