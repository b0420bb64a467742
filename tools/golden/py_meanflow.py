"""MeanFlow's loss in its setting for CIFAR-10, by the authors' code: python tools/golden/py_meanflow.py CHECKOUT

CHECKOUT: Gsunshine/py-meanflow at 1f6d72d94247c8fdeb89489acca1a8007a6baf6c. Their network is replaced by
GoldenNetwork, and what torch draws is given. The settings are those of their script cifar10_v0.sh."""

from types import SimpleNamespace

import torch
from checkout import checkout_of
from draws import GivenDraws, Random
from golden_rows import GoldenNetwork
from torch import Tensor, nn

CHECKOUT = checkout_of("Gsunshine/py-meanflow", "1f6d72d94247c8fdeb89489acca1a8007a6baf6c")
LAW = {"tr_sampler": "v0", "P_mean_t": -2.0, "P_std_t": 2.0, "P_mean_r": -2.0, "P_std_r": 2.0, "ratio": 0.75}
WEIGHT = {"norm_p": 0.75, "norm_eps": 1e-3}


class Unconditional(nn.Module):
    """GoldenNetwork as their network: its times are t and t - r."""

    def __init__(self, cond: Tensor):
        super().__init__()
        self.network, self.cond = GoldenNetwork(), cond

    def forward(self, x: Tensor, times: tuple[Tensor, Tensor], aug_cond: None) -> Tensor:
        t, h = times
        return self.network(x, t, self.cond, t - h)


def main() -> None:
    CHECKOUT.make_importable("meanflow")
    from models.meanflow import MeanFlow

    normal = Random(6).normal
    count = 8
    x, noise = normal(count, 4, 3, 3), normal(count, 4, 3, 3)
    t, r, cond = normal(count), normal(count), normal(count, 4)
    chosen = torch.linspace(0, 1, count, dtype=torch.float64)  # two of eight are below 1 - ratio
    args = SimpleNamespace(**LAW, **WEIGHT, ema_decay=0.99, ema_decays=[])
    model = MeanFlow(Unconditional, args, {"cond": cond})
    with GivenDraws([noise, t, r], [chosen]):
        loss = model.forward_with_loss(x, None)
    tensors = {"x": x, "noise": noise, "t": t, "r": r, "cond": cond, "uncond": cond}
    tensors |= {"loss": loss, "gradient": model.net.network.gradient(loss)}
    function = "meanflow/models/meanflow.py, MeanFlow.forward_with_loss"
    CHECKOUT.save("mean_flow_cifar10", tensors, function)


if __name__ == "__main__":
    main()
