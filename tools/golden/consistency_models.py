"""The numbers of consistency models: python tools/golden/consistency_models.py CHECKOUT

CHECKOUT: of openai/consistency_models. cm/karras_diffusion.py is imported, with stand-ins for the modules of LPIPS,
MPI and cloud storage that it imports. The function of the schedules is taken from its file (`extract`). The networks
are of ours, behind the authors' scalings, which are inverted. The first and the last interval are left out: there the
authors' path ends at 0.002 and 80, and ours at 0 and infinity."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy
import torch
from extract import Given, commit, defined
from sigma_networks import SIGMA_DATA, denoised
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from golden_rows import GoldenNetwork, save_golden

CHECKOUT = Path(sys.argv[1])
FILE, LEVELS = "cm/karras_diffusion.py", 40
INDICES = (1, 12, 23, 30, 37)


def authors() -> ModuleType:
    for name in ("piq", "mpi4py", "blobfile", "torchvision", "torchvision.transforms"):
        sys.modules[name] = mock.MagicMock()
    sys.path.insert(0, str(CHECKOUT))
    return importlib.import_module("cm.karras_diffusion")


class Scaled:
    """A network as the authors call it: the output that, after their scalings, is the denoiser of ours."""

    def __init__(self, seed: int, scalings: Any, cond: Tensor):
        self.network, self.scalings, self.cond = GoldenNetwork(seed), scalings, cond

    def __call__(self, x: Tensor, rescaled_t: Tensor) -> Tensor:
        sigma = torch.exp(rescaled_t / 250)
        skip, out, scale = (value.view(-1, 1, 1, 1) for value in self.scalings(sigma))
        x = x / scale
        return (denoised(self.network, x, sigma, self.cond) - skip * x) / out


def main() -> None:
    module, generator = authors(), torch.Generator().manual_seed(0)
    shape = (len(INDICES), 4, 2, 2)
    given = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name in ("latents", "noise")}
    given["cond"] = torch.randn(shape[:2], generator=generator, dtype=torch.float64)
    index = torch.tensor(INDICES)
    student, teacher = (
        module.KarrasDenoiser(loss_norm="l2", weight_schedule="uniform", distillation=of_student)
        for of_student in (True, False)
    )
    boundary = student.get_scalings_for_boundary_condition

    def save(name: str, tensors: dict[str, Tensor], function: str) -> None:
        save_golden(name, tensors, "openai/consistency_models", commit(CHECKOUT), function)

    for name, teachers in (("cm_training", False), ("cm_distillation", True)):
        module.th = Given(torch, randint=[index])
        model, target = Scaled(1, boundary, given["cond"]), Scaled(2, boundary, given["cond"])
        options: dict[str, Any] = {"target_model": target, "noise": given["noise"]}
        if teachers:
            options["teacher_model"] = Scaled(3, teacher.get_scalings, given["cond"])
            options["teacher_diffusion"] = teacher
        loss = student.consistency_losses(model, SIGMA_DATA * given["latents"], LEVELS, **options)["loss"].mean()
        loss.backward()
        results = {"gradient": model.network.flat(), "loss": loss, "index": index}
        save(name, given | results, f"{FILE}, KarrasDenoiser.consistency_losses")
    with mock.patch.object(torch, "linspace", lambda *a: torch.arange(LEVELS, dtype=torch.float64) / (LEVELS - 1)):
        sigmas = module.get_sigmas_karras(LEVELS, student.sigma_min, student.sigma_max)[:-1]
    save("cm_levels", {"sigmas": sigmas}, f"{FILE}, get_sigmas_karras")
    schedules = defined(CHECKOUT / "cm/script_util.py", "create_ema_and_scales_fn", {"np": numpy})
    law = schedules("adaptive", 0.95, "progressive", 2, 200, 800_000, 0)  # "L_CT^N on ImageNet-64"
    updates = torch.tensor([0, 1, 1000, 50_000, 200_000, 400_000, 799_999])
    ema, scales = zip(*(law(int(update)) for update in updates), strict=True)
    tensors = {"update": updates, "ema": torch.tensor(ema, dtype=torch.float64), "levels": torch.tensor(scales)}
    save("cm_schedule", tensors, "cm/script_util.py, create_ema_and_scales_fn")


if __name__ == "__main__":
    main()
