"""Numbers of the student's three losses in CDM's training loop (byliutao/cdm), for tests/golden_cdm.py.

python tools/golden/cdm_student.py CHECKOUT

The loop is part of `main`: the statements of the student's update are taken from scripts/train.py at run time, and
executed with tensors of ours as their variables, in float64. The settings are those of the released SD3 config. The
trajectory is an Euler rollout of the student at levels of ours. The networks are GoldenNetworks that predict the
velocity."""

import contextlib
import types
from typing import Any

import torch
from checkout import checkout_of
from draws import Float64, GivenDraws, Random
from golden_rows import GoldenNetwork
from torch import Tensor

CHECKOUT = checkout_of("byliutao/cdm", "bacc57f60c4366cb9374b59860fb094e4edb419f")
TRAIN, COMMON, LOSSES = "scripts/train.py", "cdm/utils/common.py", "cdm/training/losses.py"
SHAPE, LEVELS, POINTS, GUIDANCE = (4, 2, 2), [1.0, 0.875, 0.5, 0.25], [0, 1, 2, 3], 7.0
BATCH = len(POINTS)


def settings(**values: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(enabled=True, weight=1.0, norm_clip_min=0.1, **values)


def main() -> None:
    student, teacher, fake = (GoldenNetwork(seed) for seed in range(3))
    x, cond, uncond = Random(0).normal(BATCH, *SHAPE), Random(1).normal(BATCH, 4), Random(2).normal(BATCH, 4)
    states, velocities = [x], list[Tensor]()
    with torch.no_grad():
        for t, s in zip(LEVELS, [*LEVELS[1:], 0.0], strict=True):
            velocities.append(student(states[-1], torch.full((BATCH,), t, dtype=torch.float64), cond))
            states.append(states[-1] + (s - t) * velocities[-1])

    def call(network: GoldenNetwork) -> Any:
        return lambda x, timestep, cond, **_: network(x, timestep.double() / 1000, cond)

    def both(x: Tensor, timestep: Tensor, on: dict[str, Tensor], off: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(teacher(x, timestep.double() / 1000, c["cond"]) for c in (off, on))

    manager = types.SimpleNamespace(student_forward=call(student), teacher_forward=call(teacher))
    manager.fake_teacher_forward, manager.teacher_forward_cfg_batched = call(fake), both
    losses = CHECKOUT.module(LOSSES)
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    known: dict[str, Any] = {"torch": torch, "model_manager": manager, "accelerator": None, "device": "cpu"}
    known |= {"compute_cfg_loss": losses.compute_cfg_loss, "compute_dm_loss": losses.compute_dm_loss}
    known |= {"create_autocast_context": lambda _: contextlib.nullcontext()}
    for path, name in ((TRAIN, "extract_traj"), (TRAIN, "make_indices"), (COMMON, "sample_sigmas")):
        CHECKOUT.define(path, name, known)
    known |= {
        "pipeline": types.SimpleNamespace(scheduler=types.SimpleNamespace(timesteps=1000 * levels, sigmas=levels))
    }
    known |= {"all_xt": states, "all_v": velocities, "num_steps": len(LEVELS), "current_batch_size": BATCH}
    known |= {"shared_latent_indices_cpu": POINTS, "model_dtype": torch.float64, "batch_x0_final": states[-1]}
    known |= {"batch_model_kwargs": {"cond": cond}, "batch_neg_model_kwargs": {"cond": uncond}}
    known |= {"sigma_min": 0.02, "sigma_max": 0.98}
    laws = {"teacher_sigma_logit_mean": 0.0, "teacher_sigma_logit_std": 1.0}
    known["cfg_loss"] = settings(teacher_sigma_method="uniform_capped", guidance_scale=GUIDANCE, **laws)
    known["ddm_loss"] = settings(teacher_sigma_method="uniform", **laws)
    known["cdm_loss"] = settings(
        student_xt_mode="trajectory_eps",
        student_x0_base="x0_final",
        student_sigma_method="uniform",
        student_sigma_logit_mean=0.0,
        student_sigma_logit_std=1.0,
        teacher_x0_base="student_pred",
        teacher_xt_mode="fresh_independent",
        teacher_sigma_method="uniform",
        **laws,
    )
    uniform = {name: Random(seed).uniform(BATCH) for seed, name in enumerate(("ca", "dm", "off", "off_dm"), 10)}
    normal = {name: Random(seed).normal(BATCH, *SHAPE) for seed, name in enumerate(("ca", "dm", "off_dm"), 20)}
    with Float64(), GivenDraws(normal=list(normal.values()), uniform=list(uniform.values())):
        CHECKOUT.execute(TRAIN, "loss_terms = {}", "accelerator.backward(total_loss)", known)
    given = {"x": x, "cond": cond, "uncond": uncond, "levels": levels}
    given |= {f"{name}_u": value for name, value in uniform.items()}
    given |= {f"{name}_noise": value for name, value in normal.items()}
    given["gradient"] = student.gradient(known["total_loss"])
    CHECKOUT.save("cdm_student", given, "scripts/train.py, main (the student's losses of the SD3 config)")


if __name__ == "__main__":
    main()
