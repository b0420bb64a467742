"""MeanFlow's loss in its setting for CIFAR-10, by the authors' code: python tools/golden/py_meanflow.py CHECKOUT

CHECKOUT: Gsunshine/py-meanflow at 1f6d72d94247c8fdeb89489acca1a8007a6baf6c. Their network is replaced by
GoldenNetwork, and what torch draws is given. The settings are those of their script cifar10_v0.sh."""

import sys
from types import SimpleNamespace

import torch
from authors import given_draws, normals
from golden_rows import GoldenNetwork, save_golden
from torch import Tensor, nn

COMMIT = "1f6d72d94247c8fdeb89489acca1a8007a6baf6c"
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
    sys.path.insert(0, f"{sys.argv[1]}/meanflow")
    from models.meanflow import MeanFlow

    normal = normals(6)
    count = 8
    x, noise = normal(count, 4, 3, 3), normal(count, 4, 3, 3)
    t, r, cond = normal(count), normal(count), normal(count, 4)
    chosen = torch.linspace(0, 1, count, dtype=torch.float64)  # two of eight are below 1 - ratio
    args = SimpleNamespace(**LAW, **WEIGHT, ema_decay=0.99, ema_decays=[])
    model = MeanFlow(Unconditional, args, {"cond": cond})
    with given_draws(torch, randn=[t, r], randn_like=[noise], rand=[chosen]):
        loss = model.forward_with_loss(x, None)
    loss.backward()
    tensors = {"x": x, "noise": noise, "t": t, "r": r, "cond": cond, "uncond": cond}
    tensors |= {"loss": loss, "gradient": model.net.network.flat()}
    function = "meanflow/models/meanflow.py, MeanFlow.forward_with_loss"
    save_golden("mean_flow_cifar10", tensors, "Gsunshine/py-meanflow", COMMIT, function)


if __name__ == "__main__":
    main()
