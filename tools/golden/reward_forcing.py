"""Numbers of Re-DMD in Reward Forcing's code: the gradient of the student's loss, with its weight exp(beta r).

python tools/golden/reward_forcing.py CHECKOUT

The methods of `ReDMD` are taken from the checkout and called with a self of GoldenNetworks, whose channels are a
video's frames, and with the settings of configs/reward_forcing.yaml. The student is one step from noise; the judge's
motion quality is a function of ours."""

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from checkout import checkout_of
from draws import Float64, GivenDraws, Random
from golden_rows import GoldenNetwork
from torch import Tensor

CHECKOUT = checkout_of("JaydenLyh/Reward-Forcing", "4317f5a0d29d1cee6a0f2e80ed5f5724bee97c66")


def denoiser(seed: int) -> Any:
    """A wrapped network as the code has it: (velocity, x0) at one level for all frames."""
    network = GoldenNetwork(seed)

    def call(noisy_image_or_video: Tensor, conditional_dict: Any, timestep: Tensor) -> tuple[Tensor, Tensor]:
        t = timestep[:, 0].double() / 1000
        velocity = network(noisy_image_or_video, t, conditional_dict["embedding"])
        return velocity, noisy_image_or_video - t.reshape(-1, 1, 1, 1, 1) * velocity

    call.network = network  # type: ignore[attr-defined]
    return call


def main() -> None:
    normal, methods = (
        Random(0).normal,
        ("_compute_kl_grad", "compute_rewarded_distribution_matching_loss", "generator_loss"),
    )
    initial, renoise, cond = normal(1, 4, 4, 2, 2), normal(1, 4, 4, 2, 2), normal(1, 4)
    scheduler = CHECKOUT.module("utils/scheduler.py").FlowMatchScheduler(shift=5.0, sigma_min=0.0, extra_one_step=True)
    scheduler.set_timesteps(1000, training=True)
    scheduler.sigmas, scheduler.timesteps = (v.double() for v in (scheduler.sigmas, scheduler.timesteps))
    student, step = denoiser(0), 400
    self = SimpleNamespace(
        **{"generator": student, "fake_score": denoiser(1), "real_score": denoiser(2), "scheduler": scheduler},
        **{"real_guidance_scale": 3.0, "fake_guidance_scale": 0.0, "timestep_shift": 5.0, "ts_schedule": False},
        **{
            "ts_schedule_max": False,
            "min_score_timestep": 0,
            "num_train_timestep": 1000,
            "min_step": 20,
            "max_step": 980,
        },
        **{"num_frame_per_block": 1, "device": "cpu"},
    )
    CHECKOUT.bind(self, "model/re_dmd.py", "ReDMD", methods, {"torch": torch, "F": F})
    CHECKOUT.bind(self, "model/base.py", "BaseRLModel", ["_get_timestep"], {"torch": torch})
    conditions = {"embedding": cond}, {"embedding": torch.zeros_like(cond)}
    x0 = student(initial, conditions[0], torch.full((1, 4), 1000.0))[1]
    quality = x0.detach().flatten()[0]
    self._run_generator = lambda **_: (x0, None, None, None, x0.detach())
    self.inferencer = SimpleNamespace(reward_from_frames=lambda *_, **__: {"MQ": quality})
    with Float64(), GivenDraws([renoise], integer=[torch.full((1, 1), step)]):
        loss, _ = self.generator_loss(list(initial.shape), *conditions, ["a prompt"], initial, beta=2.0)
    level = torch.tensor([5 * step / 1000 / (1 + 4 * step / 1000)]).double()
    tensors = {"initial": initial, "renoise": renoise, "cond": cond, "level": level}
    function = "model/re_dmd.py, ReDMD.generator_loss"
    CHECKOUT.save("re_dmd_student", {**tensors, "grad": student.network.gradient(loss)}, function)


def judge_sizes() -> None:
    """The size at which VideoAlign's judge, a Qwen2-VL, sees a picture."""
    path, sizes = (
        "videoalign/vision_process.py",
        ((480, 832), (1024, 1024), (333, 77), (30, 41), (28, 2000), (720, 1280)),
    )
    names = ("round_by_factor", "ceil_by_factor", "floor_by_factor")
    known: dict[str, Any] = {"math": math, "IMAGE_FACTOR": 28, "MIN_PIXELS": 0, "MAX_PIXELS": 0, "MAX_RATIO": 200}
    for name in (*names, "smart_resize"):
        CHECKOUT.define(path, name, known)
    found = [known["smart_resize"](h, w, factor=28, min_pixels=16 * 28**2, max_pixels=256 * 28**2) for h, w in sizes]
    tensors = {"sizes": torch.tensor(sizes), "resized": torch.tensor(found)}
    CHECKOUT.save("judge_sizes", tensors, f"{path}, smart_resize")


if __name__ == "__main__":
    main()
    judge_sizes()
