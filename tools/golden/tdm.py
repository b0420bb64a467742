"""Numbers of TDM's training loop (Luo-Yihong/TDM), for tests/golden_tdm.py.

python tools/golden/tdm.py CHECKOUT

The loop is part of `main`. Its class Predictor, the statements of the fake score's update and those of the generator's
are taken from it at run time, and executed with tensors of ours as their variables, in float64. The trajectory is that
of its generate_new. The networks are GoldenNetworks behind PixArt's calling convention, whose second half of channels
is dropped; the noise scheduler is diffusers' with its table in float64."""

import types
from typing import Any

import torch
import torch.nn.functional as F
from checkout import checkout_of
from diffusers import DDPMScheduler
from draws import Float64, GivenDraws, Random
from golden_rows import GoldenNetwork
from torch import Tensor

CHECKOUT = checkout_of("Luo-Yihong/TDM", "81b019f91539948d49da86cef12ccc64030c5022")
FILE = "train_tdm_demo.py"
SEGMENTS = torch.tensor([1, 2, 3, 4])  # the code's, counted from the last
BATCH, SHAPE, TOTAL, GUIDANCE = len(SEGMENTS), (4, 2, 2), 900, 4.5
FAKE_TAU, TAU = [[37, 310, 501, 880], [150, 226, 660, 700]]  # steps within the segments


class Transformer:
    """A GoldenNetwork, whose t is the level of the step, as PixArt's transformer is called."""

    def __init__(self, seed: int):
        self.network = GoldenNetwork(seed)

    def __call__(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        noise = self.network(x, (timestep.double() + 1) / 1000, encoder_hidden_states)
        return (torch.cat([noise, noise], dim=1),)

    def requires_grad_(self, _: bool) -> None:
        pass


def draws(tau: list[int], noise: list[Tensor]) -> GivenDraws:
    """The segments, then each sample's tau; noise in the order in which it is drawn."""
    return GivenDraws(normal=noise, integer=[SEGMENTS, *(torch.tensor([step]) for step in tau)])


def main() -> None:
    student, teacher, fake = (Transformer(seed) for seed in range(3))
    x, cond, uncond = Random(0).normal(BATCH, *SHAPE), Random(1).normal(BATCH, 4), Random(2).normal(BATCH, 4)
    fake_noise, noise, unused = (Random(seed).normal(BATCH, *SHAPE) for seed in (3, 4, 5))
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    args = types.SimpleNamespace(total_steps=TOTAL, cfg=GUIDANCE, use_randmid=False, use_separate=True, use_huber=True)
    known: dict[str, Any] = {"torch": torch, "th": torch, "F": F, "args": args, "noise_scheduler": scheduler}
    for name in ("extract_into_tensor", "predicted_origin", "compute_snr", "generate_new"):
        CHECKOUT.define(FILE, name, known)
    tables = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
    known |= {"alpha_schedule": tables[0], "sigma_schedule": tables[1], "total_steps": TOTAL}
    known |= {"encoder_hidden_states": cond, "prompt_attention_mask": None, "noise": x, "latents": x, "bsz": BATCH}
    known |= {"uncond_prompt_embeds": uncond, "uncond_attention_mask": None}
    known |= {"unet": student, "unet_sd": teacher, "unet_fake": fake}
    given = {"x": x, "cond": cond, "uncond": uncond, "alphas_cumprod": scheduler.alphas_cumprod, "segments": SEGMENTS}
    with Float64():
        CHECKOUT.execute(FILE, "class Predictor", "fixed_noise", known)
        with torch.no_grad(), GivenDraws(integer=[torch.full((BATCH,), TOTAL - 1)]):
            _, states = known["generate_new"](student, scheduler, x, x, cond, None, 4, True, None, TOTAL)
        known["noisy_imgs_list"] = states[::-1]
        with draws(FAKE_TAU, [unused, unused, fake_noise]):
            CHECKOUT.execute(FILE, "unet_fake.requires_grad_", "accelerator.backward(loss_score)", known)
    loss, drawn = known["loss_score"], {"tau": torch.tensor(FAKE_TAU), "noise": fake_noise}
    function = "train_tdm_demo.py, main (the fake score's loss)"
    CHECKOUT.save("tdm_fake_score", given | drawn | {"loss": loss, "gradient": fake.network.gradient(loss)}, function)
    drawn = {"tau": torch.tensor(TAU), "noise": noise}
    for name, args.use_huber in (("tdm_generator", True), ("tdm_generator_l2", False)):
        with Float64(), draws(TAU, [unused, unused, noise]):
            CHECKOUT.execute(FILE, "ind_t =", "avg_loss =", known)
        found = given | drawn | {"gradient": student.network.gradient(known["loss"])}
        CHECKOUT.save(name, found, "train_tdm_demo.py, main (the generator's loss)")


if __name__ == "__main__":
    main()
