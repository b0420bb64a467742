"""Numbers of the two terms of Decoupled DMD, as CDM's code has them (byliutao/cdm), for tests/golden_dmd.py.

python tools/golden/cdm.py CHECKOUT

Their loss functions take predictions. Here GoldenNetworks make these: the student's at a given input, the teacher's
and the fake score's at its clean prediction, renoised to a level of each term."""

import torch
from called import called_with, checkout_of, gradients_of, module_at, normal
from golden_rows import GoldenNetwork, save_golden
from torch import Tensor

REPOSITORY, COMMIT = "byliutao/cdm", "bacc57f60c4366cb9374b59860fb094e4edb419f"
BATCH, SHAPE, T, GUIDANCE = 3, (4, 2, 2), 0.75, 4.5


def main() -> None:
    losses = module_at(checkout_of(REPOSITORY, COMMIT) / "cdm/training/losses.py")
    student, teacher, fake = (GoldenNetwork(seed) for seed in range(3))
    x_in, cond, uncond = normal(0, BATCH, *SHAPE), normal(1, BATCH, 4), normal(2, BATCH, 4)
    level = torch.full((BATCH,), T, dtype=torch.float64)
    velocity = student(x_in, level, cond)
    x = (x_in - T * velocity).detach()
    given = {"x_t": x_in, "cond": cond, "uncond": uncond}

    def renoised(name: str, t: list[float], seed: int) -> tuple[Tensor, Tensor]:
        given[f"{name}_time"] = torch.tensor(t, dtype=torch.float64)
        given[f"{name}_noise"] = normal(seed, BATCH, *SHAPE)
        wide = given[f"{name}_time"][:, None, None, None]
        return (1 - wide) * x + wide * given[f"{name}_noise"], wide

    levels = {"student_sigma_expanded": level[:, None, None, None], "norm_clip_min": 1e-6}
    x_t, t = renoised("dm", [0.3, 0.6, 0.95], 3)
    scores = [network(x_t, t.flatten(), cond) for network in (teacher, fake)]
    with called_with():
        matching, _ = losses.compute_dm_loss(velocity, *scores, x_in, x_t, teacher_sigma_expanded=t, **levels)
    x_t, t = renoised("ca", [0.1, 0.45, 0.7], 4)
    scores = [teacher(x_t, t.flatten(), prompt) for prompt in (cond, uncond)]
    with called_with():
        guidance, _ = losses.compute_cfg_loss(
            velocity, *scores, x_in, x_t, teacher_sigma_expanded=t, guidance_scale=GUIDANCE - 1, **levels
        )
    given["gradient"] = gradients_of(student, matching + guidance)
    function = "cdm/training/losses.py, compute_dm_loss and compute_cfg_loss (their sum, of the same sample)"
    save_golden("decoupled_dmd_generator", given, REPOSITORY, COMMIT, function)


if __name__ == "__main__":
    main()
