"""Numbers of the distribution matching methods of FastGen (NVlabs/FastGen), for tests/golden_f_distill.py.

python tools/golden/nvidia_fastgen_dmd.py CHECKOUT

Its package has our name: ours is forgotten before theirs is imported. The models are made without their constructors.
Their networks are GoldenNetworks that predict the flow, behind the calling convention of FastGen's networks. The
teacher returns the features of the fake score, because our discriminator reads these."""

import sys
import types
from typing import Any

import torch
from called import called_with, checkout_of, gradients_of, module_at, normal, package, stub
from golden_rows import GoldenNetwork, save_golden
from torch import Tensor

REPOSITORY, COMMIT = "NVlabs/FastGen", "34f30e8ff1a563555fc0c7d59f1c1409dacd8af2"
BATCH, SHAPE, GUIDANCE, DT = 6, (4, 2, 2), 3.0, 1 / 64
FOLDER = "fastgen/methods/distribution_matching"
DIVERGENCES = ("kl", "js", "sf", "neyman", "sh", "jf")


class Flow:
    """Flow matching, as their noise schedules are called."""

    min_t, max_t, t_precision = 0.0, 1.0, torch.float64

    def forward_process(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        t = t[:, None, None, None]
        return (1 - t) * x + t * noise


class Network:
    """A GoldenNetwork as FastGen calls its networks. features: the network whose features it returns."""

    def __init__(self, network: GoldenNetwork, features: GoldenNetwork):
        self.network, self.features, self.noise_scheduler = network, features, Flow()
        self.bins = torch.ones(10)

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        condition: Tensor,
        fwd_pred_type: str = "flow",
        feature_indices: Any = None,
        return_features_early: bool = False,
    ) -> Any:
        features = self.features.hidden(x, t, condition)
        if return_features_early:
            return features
        x0 = x - t[:, None, None, None] * self.network(x, t, condition)
        return x0 if feature_indices is None else (x0, features)


def settings(divergence: str) -> Any:
    f_distill = {"f_div": divergence, "ratio_lower": 0.1, "ratio_upper": 20.0, "ratio_normalization": True}
    f_distill |= {"bin_num": 10, "ratio_ema_rate": 0.0}
    return types.SimpleNamespace(
        f_distill=types.SimpleNamespace(**f_distill),
        gan_loss_weight_gen=1e-3,
        guidance_scale=GUIDANCE,
        skip_layers=None,
        gan_r1_reg_alpha=0.1,
    )


def model(kind: type, networks: dict[str, GoldenNetwork], head: Tensor, divergence: str) -> Any:
    made: Any = kind.__new__(kind)
    fake = networks["fake_score"]
    made.net, made.teacher, made.fake_score = (Network(network, fake) for network in networks.values())
    made.config, made.bin_num, made.device = settings(divergence), 10, torch.device("cpu")
    made.discriminator = Head(head)
    made._get_outputs = lambda *_, **__: {}
    made.gen_data_from_net = lambda x, t, condition: made.net(x, t, condition=condition, fwd_pred_type="x0")
    return made


class Head:
    """Logits [B, 1] of features [B, 16, H, W]."""

    feature_indices = frozenset({0})

    def __init__(self, weight: Tensor):
        self.weight = weight.clone().requires_grad_()

    def __call__(self, features: Tensor) -> Tensor:
        return torch.einsum("bchw,c->b", features, self.weight)[:, None] / features[0, 0].numel()


def their_classes() -> tuple[type, Any, Any]:
    """FdistillModel, the table of its weights, and DMD2Model."""
    for name in [name for name in sys.modules if name.split(".")[0] == "fastgen"]:
        del sys.modules[name]
    root = checkout_of(REPOSITORY, COMMIT) / "fastgen"
    for name in ("", ".methods", ".methods.distribution_matching", ".utils"):
        package(f"fastgen{name}", root / name.replace(".", "/").strip("/"))
    stub("fastgen.configs", "fastgen.configs.opt", "fastgen.networks", "fastgen.networks.noise_schedule")
    stub("fastgen.utils.logging_utils", "fastgen.utils.distributed", "fastgen.utils.registry", "omegaconf")
    stub("fastgen.utils.global_vars", "fastgen.utils.basic_utils")
    sys.modules["fastgen.utils.distributed"].world_size = lambda: 1  # type: ignore[attr-defined]
    utils: Any = sys.modules["fastgen.utils"]
    utils.expand_like, utils.instantiate = module_at(root / "utils/__init__.py").expand_like, None
    methods: Any = sys.modules["fastgen.methods"]
    methods.FastGenModel = object
    from fastgen.methods.distribution_matching.dmd2 import DMD2Model

    methods.DMD2Model = DMD2Model
    from fastgen.methods.distribution_matching import f_distill

    return f_distill.FdistillModel, f_distill.all_f_div_weighting_function, DMD2Model


def main() -> None:
    f_distill, weights, dmd2 = their_classes()
    networks = {"student": GoldenNetwork(0), "teacher": GoldenNetwork(1), "fake_score": GoldenNetwork(2)}
    cond, uncond, head = normal(1, BATCH, 4), normal(2, BATCH, 4), normal(4, 16)
    t = torch.tensor([0.11, 0.17, 0.42, 0.45, 0.83, 0.88], dtype=torch.float64)
    shared = {"cond": cond, "uncond": uncond, "t": t}

    def save(name: str, tensors: dict[str, Tensor], function: str) -> None:
        save_golden(name, shared | tensors, REPOSITORY, COMMIT, f"{FOLDER}/{function}")

    logits, found = 1.5 * normal(3, BATCH, 2), []
    for divergence in DIVERGENCES:
        made = model(f_distill, networks, head, divergence)
        made.f_div_weighting_function = weights[divergence]
        with called_with():
            found.append(made._get_f_div_weighting_h(logits, t))
    save(
        "f_distill_weights",
        {"logits": logits, "weights": torch.stack(found)},
        "f_distill.py, FdistillModel._get_f_div_weighting_h",
    )

    initial, noise = normal(5, BATCH, *SHAPE), normal(6, BATCH, *SHAPE)
    made = model(f_distill, networks, head, "js")
    made.f_div_weighting_function = weights["js"]
    with called_with():
        one = torch.ones_like(t)
        losses, _ = made._student_update_step(initial, one, t, noise, {"real": initial}, cond, uncond)
    loss = losses["total_loss"]
    given = {"initial": initial, "noise": noise, "head": head, "loss": loss}
    given |= {"gradient": gradients_of(networks["student"], loss)}
    save("f_distill_generator", given, "f_distill.py, FdistillModel._student_update_step")

    x, r1 = normal(7, BATCH, *SHAPE), normal(8, BATCH, *SHAPE)
    x_t = Flow().forward_process(x, noise, t)
    x_real = x_t - DT * networks["teacher"](x_t, t, cond)  # the teacher's step, on which adm puts the penalty
    made = model(dmd2, networks, head, "js")
    made.teacher = Network(networks["teacher"], networks["teacher"])
    with called_with([r1]):
        real_logits = made.discriminator(made.teacher(x_real, t - DT, cond, return_features_early=True))
        penalty = made._compute_r1_regularization(real_logits, x_real, t - DT, cond)
    penalty.backward()
    given = {
        "x": x,
        "noise": noise,
        "r1": r1,
        "head": head,
        "loss": penalty,
        "gradient": made.discriminator.weight.grad,
    }
    save("fastgen_r1", given, "dmd2.py, DMD2Model._compute_r1_regularization")


if __name__ == "__main__":
    main()
