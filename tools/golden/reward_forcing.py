"""Numbers of Re-DMD in Reward Forcing's code: the gradient of the student's loss, with its weight exp(beta r).

python tools/golden/reward_forcing.py CHECKOUT

The methods of `ReDMD` are taken from the checkout and called with a self of GoldenNetworks, whose channels are a
video's frames, and with the settings of configs/reward_forcing.yaml. The student is one step from noise; the judge's
motion quality is a function of ours."""

import math
from types import MethodType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from pieces import Torch, checkout_of, in_float64, method, module_at, normals
from torch import Tensor

REPOSITORY, COMMIT = "JaydenLyh/Reward-Forcing", "4317f5a0d29d1cee6a0f2e80ed5f5724bee97c66"
CHECKOUT = checkout_of(REPOSITORY, COMMIT)

from golden_rows import GoldenNetwork, save_golden  # noqa: E402


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
    normal, methods = normals(0), ("_compute_kl_grad", "compute_rewarded_distribution_matching_loss", "generator_loss")
    initial, renoise, cond = normal(1, 4, 4, 2, 2), normal(1, 4, 4, 2, 2), normal(1, 4)
    scheduler = module_at(CHECKOUT / "utils/scheduler.py").FlowMatchScheduler(
        shift=5.0, sigma_min=0.0, extra_one_step=True
    )
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
    given = Torch([renoise], randint=[torch.full((1, 1), step)])
    for name in methods:
        function = method(CHECKOUT / "model/re_dmd.py", f"ReDMD.{name}", {"torch": given, "F": F})
        setattr(self, name, MethodType(function, self))
    sampling = method(CHECKOUT / "model/base.py", "BaseRLModel._get_timestep", {"torch": given})
    self._get_timestep = MethodType(sampling, self)
    conditions = {"embedding": cond}, {"embedding": torch.zeros_like(cond)}
    x0 = student(initial, conditions[0], torch.full((1, 4), 1000.0))[1]
    quality = x0.detach().flatten()[0]
    self._run_generator = lambda **_: (x0, None, None, None, x0.detach())
    self.inferencer = SimpleNamespace(reward_from_frames=lambda *_, **__: {"MQ": quality})
    with in_float64():
        loss, _ = self.generator_loss(list(initial.shape), *conditions, ["a prompt"], initial, beta=2.0)
    loss.backward()
    level = torch.tensor([5 * step / 1000 / (1 + 4 * step / 1000)]).double()
    tensors = {"initial": initial, "renoise": renoise, "cond": cond, "level": level}
    function = "model/re_dmd.py, ReDMD.generator_loss"
    save_golden("re_dmd_student", {**tensors, "grad": student.network.flat()}, REPOSITORY, COMMIT, function)


def judge_sizes() -> None:
    """The size at which VideoAlign's judge, a Qwen2-VL, sees a picture."""
    path, sizes = (
        "videoalign/vision_process.py",
        ((480, 832), (1024, 1024), (333, 77), (30, 41), (28, 2000), (720, 1280)),
    )
    names = ("round_by_factor", "ceil_by_factor", "floor_by_factor")
    known: dict[str, Any] = {"math": math, "IMAGE_FACTOR": 28, "MIN_PIXELS": 0, "MAX_PIXELS": 0, "MAX_RATIO": 200}
    known |= {name: method(CHECKOUT / path, name, known) for name in names}
    smart_resize = method(CHECKOUT / path, "smart_resize", known)
    found = [smart_resize(h, w, factor=28, min_pixels=16 * 28**2, max_pixels=256 * 28**2) for h, w in sizes]
    tensors = {"sizes": torch.tensor(sizes), "resized": torch.tensor(found)}
    save_golden("judge_sizes", tensors, REPOSITORY, COMMIT, f"{path}, smart_resize")


if __name__ == "__main__":
    main()
    judge_sizes()
