"""ODE initialisation, teacher forcing and the levels of Self-Forcing: python tools/golden/self_forcing_ode.py CHECKOUT

CHECKOUT: guandeh17/Self-Forcing at 33593df3e81fa3ec10239271dd2c100facac6de1. Their scheduler is imported; the losses
are compiled from the checkout's files, because the modules import Wan. Network, data, noise and levels are given.
Teacher forcing is run without its weight of levels (training_weight is 1)."""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from authors import functions, given_draws, normals
from golden_causal import causal
from golden_rows import GoldenNetwork, save_golden
from torch import Tensor

COMMIT = "33593df3e81fa3ec10239271dd2c100facac6de1"
REPOSITORY = "guandeh17/Self-Forcing"
COUNT, FRAMES, CHUNK = 3, 4, 2


def bind(found: SimpleNamespace, methods: SimpleNamespace) -> SimpleNamespace:
    for name, method in vars(methods).items():
        setattr(found, name, partial(method, found))
    return found


def main() -> None:
    checkout, normal = Path(sys.argv[1]), normals(13)
    sys.path.insert(0, str(checkout))
    from utils.scheduler import FlowMatchScheduler

    scheduler = FlowMatchScheduler(shift=5.0, sigma_min=0.0, extra_one_step=True)  # as their Wan wrapper makes it
    scheduler.set_timesteps(1000, training=True)
    timesteps = torch.cat([scheduler.timesteps, torch.zeros(1)])  # their warp_denoising_step
    steps = timesteps[1000 - torch.tensor([1000, 750, 500, 250])]
    save_golden("shifted_levels", {"levels": steps / 1000}, REPOSITORY, COMMIT, "utils/scheduler.py, set_timesteps")

    x, noise = normal(COUNT, FRAMES, 4, 3, 3), normal(COUNT, FRAMES, 4, 3, 3)
    cond, index = normal(COUNT, 4), torch.tensor([[0, 0, 2, 2], [1, 1, 3, 3], [2, 2, 0, 0]])
    network = GoldenNetwork()

    def generator(
        noisy_image_or_video: Tensor, conditional_dict: Tensor, timestep: Tensor, **teacher_forcing: Any
    ) -> tuple[Tensor, Tensor]:
        x_t, t, past = noisy_image_or_video, timestep / 1000, teacher_forcing.get("clean_x")
        flow = causal(network, x_t, t, conditional_dict, x_t if past is None else past, CHUNK)
        return flow, x_t - t.view(COUNT, FRAMES, 1, 1, 1) * flow

    own = SimpleNamespace(
        generator=generator, scheduler=scheduler, device="cpu", dtype=torch.float64, teacher_forcing=True,
        args=SimpleNamespace(i2v=False), num_frame_per_block=CHUNK, noise_augmentation_max_timestep=0,
        _get_timestep=lambda *args, **named: index, denoising_step_list=1000 * levels(),
    )  # fmt: skip
    known = {"torch": torch, "F": F, "Tuple": tuple}
    names = ("_prepare_generator_input", "generator_loss")
    bind(own, functions(checkout / "model/ode_regression.py", names, known, "ODERegression"))
    line = [(1 - t) * x + t * noise for t in levels()]
    loss = own.generator_loss(torch.stack([*line, x], dim=1), cond)[0]
    loss.backward()
    tensors = {"x": x, "noise": noise, "cond": cond, "index": index[:, ::CHUNK]}
    result = {"loss": loss, "gradient": network.flat()}
    function = "model/ode_regression.py, ODERegression.generator_loss"
    save_golden("ode_regression_self_forcing", tensors | result, REPOSITORY, COMMIT, function)

    network.zero_grad()
    own.scheduler = SimpleNamespace(
        num_train_timesteps=1000,
        timesteps=1000 * levels(),
        add_noise=lambda x, noise, t: torch.lerp(x, noise, (t / 1000).view(-1, 1, 1, 1)),
        training_target=scheduler.training_target,
        training_weight=lambda t: torch.ones_like(t.flatten()),
    )
    bind(own, functions(checkout / "model/diffusion.py", ("generator_loss",), known, "CausalDiffusion"))
    with given_draws(torch, randn_like=[noise]):
        loss = own.generator_loss(list(x.shape), cond, None, x)[0]
    loss.backward()
    result = {"loss": loss, "gradient": network.flat()}
    function = "model/diffusion.py, CausalDiffusion.generator_loss"
    save_golden("teacher_forcing", tensors | result, REPOSITORY, COMMIT, function)


def levels() -> Tensor:
    return torch.tensor([1.0, 0.9375, 5 / 6, 0.625], dtype=torch.float64)


if __name__ == "__main__":
    main()
