"""Numbers of iCT: python tools/golden/kinyugo.py CHECKOUT

CHECKOUT: of Kinyugo/consistency_models, as iCT's authors have published no code. Its module is imported, and the
random draws in it are ours. The network is of ours, behind its scalings, which are inverted. The outer intervals are
left out, as in consistency_models.py."""

import importlib
from functools import partial
from typing import Any
from unittest import mock

import torch
from checkout import checkout_of
from draws import GivenDraws, Random
from golden_rows import GoldenNetwork
from sigma_networks import SIGMA_DATA, denoised
from torch import Tensor

CHECKOUT = checkout_of("Kinyugo/consistency_models", "2e6618d4b908f7ef7f5424d83afe0eb5c6c85957")
FILE, UPDATE, TOTAL = "consistency_models/consistency_models.py", 2500, 8000
UPDATES = (0, 999, 1000, 2500, 4000, 7999)
INDICES = (3, 10, 20, 30, 35)  # of 40 intervals, from clean to noise


def main() -> None:
    CHECKOUT.make_importable()
    module: Any = importlib.import_module("consistency_models.consistency_models")
    normal, shape = Random(0).normal, (len(INDICES), 4, 2, 2)
    given = {"latents": normal(*shape), "noise": normal(*shape), "cond": normal(*shape[:2])}
    given["index"] = torch.tensor(INDICES)
    network = GoldenNetwork(1)

    def scaled(x: Tensor, sigma: Tensor) -> Tensor:
        skip, out = (f(sigma).view(-1, 1, 1, 1) for f in (module.skip_scaling, module.output_scaling))
        return (denoised(network, x, sigma, given["cond"]) - skip * x) / out

    steps = partial(torch.arange, dtype=torch.float64)  # so that their levels are float64
    with mock.patch.object(torch, "arange", steps), GivenDraws([given["noise"]], integer=[given["index"]]):
        found = module.ImprovedConsistencyTraining()(scaled, SIGMA_DATA * given["latents"], UPDATE, TOTAL)
    distance = module.pseudo_huber_loss(found.predicted, found.target)
    loss = (distance * found.loss_weights).mean()  # as its README says

    def save(name: str, tensors: dict[str, Tensor], function: str) -> None:
        CHECKOUT.save(name, tensors, f"{FILE}, {function}")

    results = {"gradient": network.gradient(loss), "loss": loss}
    save("ict_loss", given | results, "ImprovedConsistencyTraining, pseudo_huber_loss")
    improved = [module.improved_timesteps_schedule(k, TOTAL) for k in UPDATES]
    first = [module.timesteps_schedule(k, TOTAL) for k in UPDATES]
    decay = [module.ema_decay_rate_schedule(n, 0.9) for n in first]
    lists = {"update": UPDATES, "improved": improved, "first": first, "decay": decay}
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in lists.items()}
    function = "improved_timesteps_schedule, timesteps_schedule, ema_decay_rate_schedule"
    save("ict_schedule", tensors, function)


if __name__ == "__main__":
    main()
