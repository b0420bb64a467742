"""ODE initialisation by CausVid: python tools/golden/causvid_ode.py CHECKOUT

CHECKOUT: tianweiy/CausVid at ca2115039172dfa3a02deee1534408a09680f29f. The loss is compiled from the checkout's file,
because the module imports Wan. Network, states and levels are given."""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from authors import functions, given_draws, normals
from golden_causal import causal
from golden_rows import GoldenNetwork, save_golden
from torch import Tensor

COMMIT = "ca2115039172dfa3a02deee1534408a09680f29f"
COUNT, FRAMES, CHUNK = 3, 6, 3


def main() -> None:
    normal, levels = normals(14), torch.tensor([1.0, 0.757, 0.522], dtype=torch.float64)
    x, noise, cond = normal(COUNT, FRAMES, 4, 3, 2), normal(COUNT, FRAMES, 4, 3, 2), normal(COUNT, 4)
    index = torch.tensor([[0, 1, 2, 2, 1, 0], [1, 1, 0, 1, 2, 2], [2, 0, 0, 0, 1, 2]])  # the first of a chunk counts
    network = GoldenNetwork()

    def generator(noisy_image_or_video: Tensor, conditional_dict: Tensor, timestep: Tensor) -> Tensor:
        t = (timestep / 1000).view(COUNT, FRAMES, 1, 1, 1)
        video = noisy_image_or_video
        return video - t * causal(network, video, timestep / 1000, conditional_dict, video, CHUNK)

    own = SimpleNamespace(
        generator=generator, denoising_step_list=1000 * levels, num_frame_per_block=CHUNK, device="cpu",
        args=SimpleNamespace(generator_task="causal_video"),
    )  # fmt: skip
    names = ("_process_timestep", "_prepare_generator_input", "generator_loss")
    known = {"torch": torch, "F": F, "Tuple": tuple}
    methods = functions(Path(sys.argv[1]) / "causvid/ode_regression.py", names, known, "ODERegression")
    for name in names:
        setattr(own, name, partial(getattr(methods, name), own))
    line = [(1 - t) * x + t * noise for t in levels]
    with given_draws(torch, randint=[index.clone()]):
        loss = own.generator_loss(torch.stack([*line, x], dim=1), cond)[0]
    loss.backward()
    tensors = {"x": x, "noise": noise, "cond": cond, "index": index[:, ::CHUNK], "levels": levels}
    tensors |= {"loss": loss, "gradient": network.flat()}
    function = "causvid/ode_regression.py, ODERegression.generator_loss"
    save_golden("ode_regression_causvid", tensors, "tianweiy/CausVid", COMMIT, function)


if __name__ == "__main__":
    main()
