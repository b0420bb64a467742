"""Numbers of iCT: python tools/golden/kinyugo.py CHECKOUT

CHECKOUT: of Kinyugo/consistency_models, as iCT's authors have published no code. Its module is imported, and the
random draws in it are ours. The network is of ours, behind its scalings, which are inverted. The outer intervals are
left out, as in consistency_models.py."""

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from extract import Given, commit
from sigma_networks import SIGMA_DATA, denoised
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from golden_rows import GoldenNetwork, save_golden

CHECKOUT = Path(sys.argv[1])
FILE, UPDATE, TOTAL = "consistency_models/consistency_models.py", 2500, 8000
UPDATES = (0, 999, 1000, 2500, 4000, 7999)
INDICES = (3, 10, 20, 30, 35)  # of 40 intervals, from clean to noise


def main() -> None:
    sys.path.insert(0, str(CHECKOUT))
    module: Any = importlib.import_module("consistency_models.consistency_models")
    generator, shape = torch.Generator().manual_seed(0), (len(INDICES), 4, 2, 2)
    given = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name in ("latents", "noise")}
    given["cond"] = torch.randn(shape[:2], generator=generator, dtype=torch.float64)
    given["index"] = torch.tensor(INDICES)
    network = GoldenNetwork(1)

    def scaled(x: Tensor, sigma: Tensor) -> Tensor:
        skip, out = (f(sigma).view(-1, 1, 1, 1) for f in (module.skip_scaling, module.output_scaling))
        return (denoised(network, x, sigma, given["cond"]) - skip * x) / out

    steps = lambda n, device=None: torch.arange(n, dtype=torch.float64)  # noqa: E731
    module.torch = Given(torch, arange=steps, multinomial=[given["index"]], randn_like=[given["noise"].clone()])
    found = module.ImprovedConsistencyTraining()(scaled, SIGMA_DATA * given["latents"], UPDATE, TOTAL)
    distance = module.pseudo_huber_loss(found.predicted, found.target)
    loss = (distance * found.loss_weights).mean()  # as its README says
    loss.backward()

    def save(name: str, tensors: dict[str, Tensor], function: str) -> None:
        save_golden(name, tensors, "Kinyugo/consistency_models", commit(CHECKOUT), f"{FILE}, {function}")

    results = {"gradient": network.flat(), "loss": loss}
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
