"""The numbers of FastGen's sCM: python tools/golden/nvidia_fastgen.py CHECKOUT

CHECKOUT: of NVlabs/FastGen. Its package has the name of this one, so that it cannot be imported beside it: the methods
that compute the loss are taken from their class at run time (`extract`) and called on a stand-in for `self`, with
networks and noise schedules (TrigFlow, and EDM for sigma) of ours."""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from extract import Given, commit, defined
from torch import Tensor
from trig_networks import expanded, trig_velocity

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from golden_rows import GoldenNetwork, save_golden

CHECKOUT = Path(sys.argv[1])
FILE = "fastgen/methods/consistency_model/sCM.py"
SIGMA_DATA, GUIDANCE = 0.5, 3.0


class Trig:
    """A network as F(x, a) for data of std 0.5. Its log-variance is 0.3 - 0.8 a."""

    def __init__(self, seed: int):
        self.network = GoldenNetwork(seed)
        self.noise_scheduler = SimpleNamespace(alpha=torch.cos, sigma=torch.sin, forward_process=self.noised)

    @staticmethod
    def noised(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return expanded(torch.cos(t), x) * x + expanded(torch.sin(t), x) * noise

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor, return_logvar: bool = False, **_: Any) -> Any:
        out = trig_velocity(self.network, x / SIGMA_DATA, t, condition)
        return (out, (0.3 - 0.8 * t)[:, None], out) if return_logvar else out


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    given = {name: torch.randn(4, 4, 2, 2, generator=generator, dtype=torch.float64) for name in ("latents", "noise")}
    given |= {name: torch.randn(4, 4, generator=generator, dtype=torch.float64) for name in ("cond", "uncond")}
    given["time"] = torch.rand(4, generator=generator, dtype=torch.float64)
    edm = SimpleNamespace(sigma=lambda t: t, alpha=torch.ones_like)
    settings = SimpleNamespace(
        use_cd=True,
        tangent_warmup_steps=4000,
        tangent_warmup_const=0.1,
        prior_weighting_enabled=True,
        g_norm_spatial_invariance=True,
        divide_x_0_spatial_dim=True,
        use_jvp_finite_diff=False,
    )
    self = SimpleNamespace(
        sigma_data=SIGMA_DATA,
        sample_t_cfg=SimpleNamespace(quantize=False),
        loss_config=settings,
        config=SimpleNamespace(guidance_scale=GUIDANCE, skip_layers=None),
        net=SimpleNamespace(noise_scheduler=edm),
        net_trigflow=Trig(1),
        teacher_trigflow=Trig(2),
        precision_amp_jvp=None,
        device=torch.device("cpu"),
    )
    shared = {"torch": Given(torch, randn_like=[given["noise"].clone()]), "np": numpy, "expand_like": expanded}
    for name in ("_compute_vt", "_jvp", "_scm_pred_to_loss", "_compute_scm_loss"):
        setattr(self, name, partial(defined(CHECKOUT / FILE, f"SCMModel.{name}", dict(shared)), self))
    sigma = torch.exp(torch.special.ndtri(given["time"]) * 1.4 - 1.0)  # sCM's law
    conds = {"condition": given["cond"], "neg_condition": given["uncond"]}
    loss = self._compute_scm_loss(SIGMA_DATA * given["latents"], sigma, **conds, iteration=2000)[0].mean()
    loss.backward()
    results = {"gradient": self.net_trigflow.network.flat(), "loss": loss}
    function = f"{FILE}, SCMModel._compute_scm_loss"
    save_golden("fastgen_scm", given | results, "NVlabs/FastGen", commit(CHECKOUT), function)


if __name__ == "__main__":
    main()
