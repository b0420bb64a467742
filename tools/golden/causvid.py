"""Numbers of CausVid's code (tianweiy/CausVid), for tests/golden_video_dmd.py.

python tools/golden/causvid.py CHECKOUT

The DMD model is made without its constructor, which loads Wan. Its networks are GoldenNetworks that predict x0, behind
the calling convention of their wrapper. Without its backward simulation, the student's input is noised data. The
student is the bidirectional one, and all frames of a video have one level."""

import types

import torch
from called import called_with, checkout_of, gradients_of, module_at, normal, package, stub
from golden_rows import GoldenNetwork, save_golden
from torch import Tensor, nn

REPOSITORY, COMMIT = "tianweiy/CausVid", "ca2115039172dfa3a02deee1534408a09680f29f"
BATCH, FRAMES, SHAPE, SHIFT = 2, 4, (3, 2, 2), 8.0


class Wrapper(nn.Module):
    """A GoldenNetwork whose channels are the frames, as CausVid calls its networks: returns x0."""

    def __init__(self, network: GoldenNetwork):
        super().__init__()
        self.network = network

    def forward(self, noisy_image_or_video: Tensor, conditional_dict: dict[str, Tensor], timestep: Tensor) -> Tensor:
        return self.network(noisy_image_or_video, timestep[:, 0].double() / 1000, conditional_dict["embedding"])


def main() -> None:
    checkout = checkout_of(REPOSITORY, COMMIT)
    package("causvid", checkout / "causvid")
    stub("causvid.models", "causvid.models.model_interface")
    from causvid.dmd import DMD

    scheduler = module_at(checkout / "causvid/models/wan/flow_match.py").FlowMatchScheduler

    networks = {"student": GoldenNetwork(0), "teacher": GoldenNetwork(1), "fake_score": GoldenNetwork(2)}
    model = DMD.__new__(DMD)
    nn.Module.__init__(model)
    model.generator, model.real_score, model.fake_score = (Wrapper(network) for network in networks.values())
    model.scheduler = scheduler(shift=SHIFT, sigma_min=0.0, extra_one_step=True)
    model.scheduler.set_timesteps(1000, training=True)
    model.generator_task_type = model.real_task_type = model.fake_task_type = "bidirectional_video"
    timesteps = torch.cat([model.scheduler.timesteps, torch.zeros(1)])
    model.denoising_step_list = timesteps[1000 - torch.tensor([1000, 757, 522])]  # as with warp_denoising_step
    model.num_train_timestep, model.min_step, model.max_step = 1000, 20, 980
    model.real_guidance_scale, model.timestep_shift = 3.5, SHIFT
    model.device, model.dtype = torch.device("cpu"), torch.float64
    model.args = types.SimpleNamespace(backward_simulation=False)

    real, cond, uncond = normal(0, BATCH, FRAMES, *SHAPE), normal(1, BATCH, 4), normal(2, BATCH, 4)
    inputs = [normal(10 + i, BATCH, FRAMES, *SHAPE) for i in range(3)]  # of each level; one of them is used
    stop, drawn = torch.tensor([1, 2]), torch.tensor([40, 310])
    noise = normal(20, BATCH, FRAMES, *SHAPE)
    by_frame = [value[:, None].repeat(1, FRAMES) for value in (stop, drawn)]
    with called_with([*inputs, noise], by_frame):
        loss, _ = model.generator_loss([BATCH, FRAMES, *SHAPE], {"embedding": cond}, {"embedding": uncond}, real)
    used = torch.stack([inputs[i][row] for row, i in enumerate(stop)])
    given = {"real": real, "cond": cond, "uncond": uncond, "stop": stop, "initial": used, "drawn": drawn}
    given |= {"noise": noise, "timesteps": model.denoising_step_list, "loss": loss}
    given |= {"gradient": gradients_of(networks["student"], loss)}
    save_golden("causvid_generator_from_data", given, REPOSITORY, COMMIT, "causvid/dmd.py, DMD.generator_loss")


if __name__ == "__main__":
    main()
