"""LCM's numbers: python tools/golden/latent_consistency_model.py CHECKOUT

CHECKOUT: of luosiallen/latent-consistency-model. Its target and loss are statements of a training loop, which are
taken from it at run time and executed with networks of ours that predict noise, on diffusers'
DDPMScheduler. Casts to float32 are read as casts to float64. Levels below 1/10 are left out, where LCM's c_skip is
more than 1e-6."""

from types import SimpleNamespace
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from checkout import checkout_of
from diffusers import DDPMScheduler
from draws import Float64, GivenDraws, Random
from golden_rows import GoldenNetwork
from torch import Tensor

CHECKOUT = checkout_of("luosiallen/latent-consistency-model", "a9ad79587cc8bd1e404ccd1a3056a3da969b2f62")
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
    random, shape = Random(0), (len(INDICES), 4, 2, 2)
    given = {name: random.normal(*shape) for name in ("latents", "noise")}
    given |= {name: random.normal(*shape[:2]) for name in ("cond", "uncond")}
    given["guidance"] = random.uniform(len(INDICES))
    given["index"] = torch.tensor(INDICES)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    shared: dict[str, Any] = {"torch": torch, "np": numpy, "F": F}
    for name in FUNCTIONS:
        CHECKOUT.define(FILE, name, shared)
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
        with Float64(), GivenDraws(uniform=[given["guidance"]], integer=[given["index"]]):
            CHECKOUT.execute(FILE, "topk = ", "accelerator.backward", variables)
        loss = variables["loss"]
        results |= {f"{kind}_gradient": unet.network.gradient(loss), f"{kind}_loss": loss}
    CHECKOUT.save("lcm_loss", given | results, f"{FILE}, main")


if __name__ == "__main__":
    main()
