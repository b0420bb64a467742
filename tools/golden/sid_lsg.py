"""Numbers of SiD-LSG's losses (mingyuanzhou/SiD-LSG), for tests/golden_sid.py.

python tools/golden/sid_lsg.py CHECKOUT

Denoisers are GoldenNetworks that predict the noise, behind diffusers' DDPMScheduler. A prompt is the number of a row
of embeddings; the empty prompt is one row. The losses are statements of their training loop."""

import types
from typing import Any

import torch
from checkout import checkout_of
from diffusers import DDPMScheduler
from draws import Float64, Random
from golden_rows import GoldenNetwork
from torch import Tensor

CHECKOUT = checkout_of("mingyuanzhou/SiD-LSG", "709fc22e7c27c7715c111315992f747077ea84aa")
BATCH, SHAPE = 4, (4, 2, 3)
PATH, LOOP = "training/sid_sd_util.py", "training/sid_training_loop.py"


class Unet:
    """A GoldenNetwork as diffusers' UNet is called. Step i is the level (i + 1) / 1000."""

    def __init__(self, network: GoldenNetwork):
        self.network = network

    def __call__(self, x: Tensor, step: Tensor, encoder_hidden_states: Tensor) -> Any:
        return types.SimpleNamespace(sample=self.network(x, (step.double() + 1) / 1000, encoder_hidden_states))


def main() -> None:
    cond, uncond = Random(0).normal(BATCH, 4), Random(1).normal(1, 4)
    x, noise = Random(2).normal(BATCH, *SHAPE), Random(3).normal(BATCH, *SHAPE)
    step = torch.tensor([30, 310, 620, 950])
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()

    class Tokenizer:
        model_max_length = 1

        def __call__(self, prompts: list[str], **_: Any) -> Any:
            rows = torch.stack([cond[int(p)] if p else uncond[0] for p in prompts])
            return types.SimpleNamespace(input_ids=rows)

    denoise = CHECKOUT.define(PATH, "sid_sd_denoise", {"torch": torch})

    def predict(network: GoldenNetwork, images: Tensor, scale: float, predict_x0: bool = True) -> Tensor:
        prompts = [str(i) for i in range(BATCH)]
        with Float64():
            return denoise(
                Unet(network),
                images,
                noise,
                prompts,
                step,
                scheduler,
                lambda ids: (ids,),
                Tokenizer(),
                0,
                dtype=torch.float64,
                predict_x0=predict_x0,
                guidance_scale=scale,
            )

    _, teacher, fake = (GoldenNetwork(seed) for seed in range(3))
    given = {"x": x, "noise": noise, "step": step, "cond": cond, "uncond": uncond.expand(BATCH, 4)}
    given["alphas_cumprod"] = scheduler.alphas_cumprod

    images = x.clone().requires_grad_()
    known = {"images": images, "y_fake": predict(fake, images, 3.0), "y_real": predict(teacher, images, 2.0)}
    known |= {"torch": torch, "alpha": 1, "abs": abs}
    with Float64():
        CHECKOUT.execute(LOOP, "with torch.no_grad():\n    weight_factor", "loss = loss.sum()", known)
    loss = known["loss"].sum()
    (grad,) = torch.autograd.grad(loss, images)
    source = f"{PATH}, sid_sd_denoise; {LOOP}, training_loop (the generator's loss)"
    CHECKOUT.save("sid_lsg_generator", given | {"loss": loss, "gradient": grad}, source)

    known = {"noise_fake": predict(fake, x, 2.5, predict_x0=False), "noise": noise}
    CHECKOUT.execute(LOOP, "loss = (noise_fake - noise) ** 2", None, known)
    loss = known["loss"].sum()
    source = f"{PATH}, sid_sd_denoise; {LOOP}, training_loop (the fake score's loss)"
    CHECKOUT.save("sid_lsg_fake", given | {"loss": loss, "gradient": fake.gradient(loss)}, source)


if __name__ == "__main__":
    main()
