"""Numbers of DMD2's code (tianweiy/DMD2), for tests/golden_dmd.py.

python tools/golden/dmd2.py CHECKOUT

SDGuidance and SDUniModel are made without their constructors, which load SDXL. Their networks are GoldenNetworks that
predict the noise, behind the calling convention of diffusers' UNet, and the discriminator's branch is one linear map
of the features. The methods that are called are the authors' own."""

import types
from typing import Any

import torch
from called import called_with, checkout_of, gradients_of, normal, stub
from diffusers import DDIMScheduler
from golden_rows import GoldenNetwork, save_golden
from torch import Tensor, nn

REPOSITORY, COMMIT = "tianweiy/DMD2", "8d8fa55633d47cfb81bbc7a892e7248f9518763f"
BATCH, SHAPE, STEPS = 3, (4, 2, 2), 1000


class Unet(nn.Module):
    """A GoldenNetwork as diffusers calls a UNet. Discrete step i is level (i + 1) / 1000."""

    def __init__(self, network: GoldenNetwork):
        super().__init__()
        self.network = network

    def forward(
        self, x: Tensor, step: Tensor, cond: Tensor, added_cond_kwargs: object = None, classify_mode: bool = False
    ) -> Any:
        t = (step.double() + 1) / STEPS
        if classify_mode:
            return [self.network.hidden(x, t, cond)]
        return types.SimpleNamespace(sample=self.network(x, t, cond))


class Branch(nn.Module):
    """Logits [B, 1, 1, 1] of features [B, 16, H, W]."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, features: Tensor) -> Tensor:
        return torch.einsum("bchw,c->b", features, self.weight)[:, None, None, None] / features[0, 0].numel()


def guidance_model(networks: dict[str, GoldenNetwork], head: Tensor, scale: float) -> Any:
    from main.sd_guidance import NoOpContext, SDGuidance

    model = SDGuidance.__new__(SDGuidance)
    nn.Module.__init__(model)
    model.real_unet, model.fake_unet = Unet(networks["teacher"]), Unet(networks["fake_score"])
    model.cls_pred_branch = Branch(head)
    model.scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    model.alphas_cumprod = model.scheduler.alphas_cumprod
    model.num_train_timesteps, model.min_step, model.max_step = STEPS, 20, 980
    model.real_guidance_scale, model.fake_guidance_scale = scale, 1
    model.use_fp16 = model.sdxl = model.gan_alone = model.gradient_checkpointing = False
    model.diffusion_gan, model.diffusion_gan_max_timestep = True, STEPS
    model.network_context_manager = NoOpContext()
    model.cls_on_clean_image = True
    return model


def generator(guidance: Any, student: GoldenNetwork, cond: Tensor) -> Any:
    from main.sd_unified_model import SDUniModel

    model = SDUniModel.__new__(SDUniModel)
    nn.Module.__init__(model)
    model.guidance_model, model.feedforward_model = guidance, Unet(student)
    model.noise_scheduler, model.alphas_cumprod = guidance.scheduler, guidance.alphas_cumprod
    model.network_context_manager = guidance.network_context_manager
    model.sdxl, model.denoising, model.backward_simulation = True, True, True
    model.gradient_checkpointing = model.use_fp16 = False
    model.num_train_timesteps, model.num_denoising_step, model.timestep_interval = STEPS, 4, 250
    model.denoising_step_list = torch.tensor([999, 749, 499, 249])
    model.add_time_ids = torch.zeros(1, 6)
    model.text_encoder = lambda _: (cond, torch.zeros_like(cond))
    model.args = types.SimpleNamespace(gan_alone=False)
    return model


def main() -> None:
    checkout_of(REPOSITORY, COMMIT)
    stub("matplotlib", "matplotlib.pyplot", "matplotlib.backends", "matplotlib.backends.backend_agg", "imageio")
    stub("imageio.v2")
    x, cond, uncond, real = (
        normal(0, BATCH, *SHAPE),
        normal(1, BATCH, 4),
        normal(2, BATCH, 4),
        normal(3, BATCH, *SHAPE),
    )
    networks = {"student": GoldenNetwork(0), "teacher": GoldenNetwork(1), "fake_score": GoldenNetwork(2)}
    head, scale = normal(4, 16), 1.75
    model = guidance_model(networks, head, scale)
    shared = {"cond": cond, "uncond": uncond, "alphas_cumprod": model.alphas_cumprod}

    def save(name: str, tensors: dict[str, Tensor], function: str) -> None:
        save_golden(name, shared | tensors, REPOSITORY, COMMIT, function)

    step, noise = torch.tensor([137, 520, 871]), normal(5, BATCH, *SHAPE)
    leaf = x.clone().requires_grad_()
    with called_with([noise], [step]):
        loss = model.compute_distribution_matching_loss(leaf, cond, uncond, None, None)[0]["loss_dm"]
    loss.backward()
    given = {"x": x, "step": step, "noise": noise}
    save(
        "dmd2_distribution_matching",
        given | {"gradient": leaf.grad},
        "main/sd_guidance.py, SDGuidance.compute_distribution_matching_loss",
    )

    step = torch.tensor([3, 404, 960])
    with called_with([noise], [step]):
        loss = model.compute_loss_fake(x, cond, uncond)[0]["loss_fake_mean"]
    gradient = gradients_of(networks["fake_score"], loss)
    given = {"x": x, "step": step, "noise": noise, "loss": loss}
    save("dmd2_fake_score", given | {"gradient": gradient}, "main/sd_guidance.py, SDGuidance.compute_loss_fake")

    steps, noises = (torch.tensor([41, 333, 702]), torch.tensor([250, 611, 80])), (noise, normal(6, BATCH, *SHAPE))
    with called_with(noises, steps):
        loss = model.compute_guidance_clean_cls_loss(real, x, cond, cond)[0]["guidance_cls_loss"]
    gradient = torch.cat([gradients_of(networks["fake_score"], loss), model.cls_pred_branch.weight.grad])
    given = {"real": real, "x": x, "head": head, "loss": loss, "gradient": gradient}
    given |= {"real_step": steps[0], "fake_step": steps[1], "real_noise": noises[0], "fake_noise": noises[1]}
    save("dmd2_discriminator", given, "main/sd_guidance.py, SDGuidance.compute_guidance_clean_cls_loss")

    for stop in (0, 2):
        normals = [normal(10 + i, BATCH, *SHAPE) for i in range(stop + 1)]
        final, gan_noise, gan_step = normal(20, BATCH, *SHAPE), normal(21, BATCH, *SHAPE), torch.tensor([90, 444, 910])
        step = torch.tensor([137, 520, 871])
        indices = torch.zeros(BATCH, dtype=torch.long)
        whole = generator(model, networks["student"], cond)
        with called_with([*normals, noise, gan_noise], [indices, torch.tensor([stop]), step, gan_step]):
            losses, _ = whole(final, None, None, generator_turn=True, denoising_dict={})
        loss = losses["loss_dm"] + 5e-3 * losses["gen_cls_loss"]
        gradient = gradients_of(networks["student"], loss)
        # their rollout starts from the first normal, and the last step's fresh noise is `final`; step 0 starts from it
        used = [final] if stop == 0 else [*normals[:stop], final]
        given = {
            "stop": torch.tensor(stop),
            "step": step,
            "noise": noise,
            "gan_step": gan_step,
            "gan_noise": gan_noise,
        }
        given |= {"head": head, "rollout": torch.stack(used), "loss": loss, "gradient": gradient}
        save(f"dmd2_generator_stop{stop}", given, "main/sd_unified_model.py, SDUniModel.forward (generator turn)")


if __name__ == "__main__":
    main()
