"""ECT's numbers: python tools/golden/ect.py CHECKOUT

CHECKOUT: of locuslab/ect. Its training/loss.py is imported, with stand-ins for two modules of its training framework,
for the random states of a GPU, and for the random draws."""

import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from checkout import checkout_of
from draws import GivenDraws, Random
from golden_rows import GoldenNetwork
from sigma_networks import SIGMA_DATA, denoised
from torch import Tensor

CHECKOUT = checkout_of("locuslab/ect", "4311059770f54821d151a9b0e1f76770a5f3930e")
STAGES, STAGE = (0, 1, 3, 7), 3


def authors() -> Any:
    stand_in: Any = SimpleNamespace(
        persistence=SimpleNamespace(persistent_class=lambda cls: cls),
        distributed=SimpleNamespace(print0=lambda _: None),
    )
    sys.modules["torch_utils"] = stand_in
    return CHECKOUT.module("training/loss.py")


def main() -> None:
    random = Random(0)
    given = {"latents": random.normal(4, 4, 2, 2), "noise": random.normal(4, 4, 2, 2)}
    given |= {"cond": random.normal(4, 4), "pair": random.uniform(4)}
    network, loss = GoldenNetwork(1), authors().ECMLoss()  # CIFAR-10's settings are the defaults

    def net(x: Tensor, sigma: Tensor, labels: Any, augment_labels: Any) -> Tensor:
        return denoised(network, x, sigma.flatten(), given["cond"])

    no_state = mock.patch.multiple(torch.cuda, get_rng_state=mock.DEFAULT, set_rng_state=mock.DEFAULT)
    loss.update_schedule(STAGE)
    with no_state, GivenDraws([torch.special.ndtri(given["pair"]), given["noise"]]):
        found = loss(net, SIGMA_DATA * given["latents"]).mean()

    def save(name: str, tensors: dict[str, Tensor], function: str) -> None:
        CHECKOUT.save(name, tensors, f"training/loss.py, {function}")

    save("ect_loss", given | {"gradient": network.gradient(found), "loss": found}, "ECMLoss.__call__")
    u = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    t = torch.exp(torch.special.ndtri(u) * loss.P_std + loss.P_mean)
    r = []
    for stage in STAGES:
        loss.update_schedule(stage)
        r.append(loss.t_to_r(t))
    stages = torch.tensor(STAGES, dtype=torch.float64)
    save("ect_levels", {"u": u, "t": t, "r": torch.stack(r), "stages": stages}, "ECMLoss.t_to_r")


if __name__ == "__main__":
    main()
