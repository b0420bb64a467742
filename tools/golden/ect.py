"""ECT's numbers: python tools/golden/ect.py CHECKOUT

CHECKOUT: of locuslab/ect. Its training/loss.py is imported, with stand-ins for two modules of its training framework,
for the random states of a GPU, and for the random draws."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from extract import Given, commit
from sigma_networks import SIGMA_DATA, denoised
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from golden_rows import GoldenNetwork, save_golden

CHECKOUT = Path(sys.argv[1])
STAGES, STAGE = (0, 1, 3, 7), 3


def authors() -> Any:
    stand_in: Any = SimpleNamespace(
        persistence=SimpleNamespace(persistent_class=lambda cls: cls),
        distributed=SimpleNamespace(print0=lambda _: None),
    )
    sys.modules["torch_utils"] = stand_in
    sys.path.insert(0, str(CHECKOUT / "training"))
    return importlib.import_module("loss")


def main() -> None:
    module, generator = authors(), torch.Generator().manual_seed(0)
    given = {name: torch.randn(4, 4, 2, 2, generator=generator, dtype=torch.float64) for name in ("latents", "noise")}
    given["cond"] = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    given["pair"] = torch.rand(4, generator=generator, dtype=torch.float64)
    network, loss = GoldenNetwork(1), module.ECMLoss()  # CIFAR-10's settings are the defaults

    def net(x: Tensor, sigma: Tensor, labels: Any, augment_labels: Any) -> Tensor:
        return denoised(network, x, sigma.flatten(), given["cond"])

    cuda = SimpleNamespace(get_rng_state=lambda: None, set_rng_state=lambda _: None)
    draws = {"randn": [torch.special.ndtri(given["pair"]).view(-1, 1, 1, 1)], "randn_like": [given["noise"]]}
    module.torch = Given(torch, cuda=cuda, **draws)
    loss.update_schedule(STAGE)
    found = loss(net, SIGMA_DATA * given["latents"]).mean()
    found.backward()

    def save(name: str, tensors: dict[str, Tensor], function: str) -> None:
        save_golden(name, tensors, "locuslab/ect", commit(CHECKOUT), f"training/loss.py, {function}")

    save("ect_loss", given | {"gradient": network.flat(), "loss": found}, "ECMLoss.__call__")
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
