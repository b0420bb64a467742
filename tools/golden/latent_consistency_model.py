"""LCM's numbers: python tools/golden/latent_consistency_model.py CHECKOUT

CHECKOUT: of luosiallen/latent-consistency-model. Its target and loss are statements of a training loop, which are
taken from it at run time (`extract`) and executed with networks of ours that predict noise, on diffusers'
DDPMScheduler. Casts to float32 are read as casts to float64. Levels below 1/10 are left out, where LCM's c_skip is
more than 1e-6."""

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from extract import Given, commit, defined, statements
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from golden_rows import GoldenNetwork, save_golden

CHECKOUT = Path(sys.argv[1])
FILE = "LCM_Training_Script/consistency_distillation/train_lcm_distill_sd_wds.py"
FUNCTIONS = (
    "append_dims",
    "scalings_for_boundary_conditions",
    "extract_into_tensor",
    "predicted_origin",
    "DDIMSolver",
)
INDICES = (5, 17, 30, 49)


class Unet:
    """A GoldenNetwork that predicts noise, called as the training loop calls its UNets; it ignores w's embedding."""

    def __init__(self, seed: int):
        self.network = GoldenNetwork(seed)

    def __call__(self, x: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Any:
        level = (timesteps.double() + 1) / 1000
        return SimpleNamespace(sample=self.network(x, level, encoder_hidden_states))


def main() -> None:
    generator, shape = torch.Generator().manual_seed(0), (len(INDICES), 4, 2, 2)
    given = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name in ("latents", "noise")}
    given |= {name: torch.randn(shape[:2], generator=generator, dtype=torch.float64) for name in ("cond", "uncond")}
    given["guidance"] = torch.rand(len(INDICES), generator=generator, dtype=torch.float64)
    given["index"] = torch.tensor(INDICES)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    draws = {"rand": [given["guidance"]] * 2, "randint": [given["index"]] * 2}
    fake = Given(torch, autocast=lambda *_, **__: contextlib.nullcontext(), **draws)
    shared: dict[str, Any] = {"torch": fake, "np": numpy, "F": F}
    for name in FUNCTIONS:
        defined(CHECKOUT / FILE, name, shared)
    options = {"num_ddim_timesteps": 50, "w_min": 5.0, "w_max": 15.0, "unet_time_cond_proj_dim": 1, "huber_c": 1e-3}
    shared |= {
        "guidance_scale_embedding": lambda w, embedding_dim: w,
        "noise_scheduler": scheduler,
        "solver": shared["DDIMSolver"](scheduler.alphas_cumprod.numpy(), ddim_timesteps=50),
        "alpha_schedule": scheduler.alphas_cumprod.sqrt(),
        "sigma_schedule": (1 - scheduler.alphas_cumprod).sqrt(),
        "latents": given["latents"],
        "noise": given["noise"],
        "bsz": len(INDICES),
        "weight_dtype": torch.float64,
        "uncond_prompt_embeds": given["uncond"],
        "teacher_unet": Unet(3),
        "target_unet": Unet(2),
    }
    results: dict[str, Tensor] = {"alphas_cumprod": scheduler.alphas_cumprod}
    for kind in ("huber", "l2"):
        unet = Unet(1)
        variables = dict(shared, unet=unet, encoded_text={"prompt_embeds": given["cond"]})
        variables["args"] = SimpleNamespace(loss_type=kind, **options)
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            exec(statements(CHECKOUT / FILE, "topk = ", "accelerator.backward"), variables)
        variables["loss"].backward()
        results |= {f"{kind}_gradient": unet.network.flat(), f"{kind}_loss": variables["loss"]}
    save_golden("lcm_loss", given | results, "luosiallen/latent-consistency-model", commit(CHECKOUT), f"{FILE}, main")


if __name__ == "__main__":
    main()
