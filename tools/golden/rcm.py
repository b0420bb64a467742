"""rCM's numbers: python tools/golden/rcm.py CHECKOUT

CHECKOUT: of NVlabs/rcm. Its model is a class that imports its training framework; the methods that compute the losses
are taken from it at run time (`extract`) and called on a stand-in for `self` with networks of ours. Their casts to
float32 are read as casts to float64. Needs einops."""

import importlib.util
import math
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import einops
import numpy
import torch
from extract import Given, commit, defined
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from golden_rows import GoldenNetwork, save_golden

CHECKOUT = Path(sys.argv[1])
MODEL = "rcm/models/t2v_model_distill_rcm.py"
METHODS = (
    "_sample_rf_time",
    "draw_training_time_G",
    "draw_training_time_D",
    "denoise",
    "student_F_withT",
    "backward_simulation",
    "get_effective_iteration",
    "_student_scm_step",
    "_student_dmd_step",
)
WARMUP, HALF_WARM, WARM = 1000, 500, 1010  # at iteration 1010 a simulation has 3 steps
SIZES = ((1, 2, 2), (2, 2, 4))  # 16 and 64 elements


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, CHECKOUT / f"rcm/utils/{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


class Network:
    """A GoldenNetwork as rCM calls one, also for a value and its derivative."""

    def __init__(self, seed: int):
        self.network = GoldenNetwork(seed)

    def __call__(self, x_B_C_T_H_W: Any, timesteps_B_T: Any, cond: Tensor, withT: bool = False) -> Any:
        if not withT:
            return self.network(x_B_C_T_H_W, timesteps_B_T, cond)
        (x, dx), (t, dt) = x_B_C_T_H_W, timesteps_B_T
        return torch.func.jvp(lambda x, t: self.network(x, t, cond), (x, t), (dx, dt))


def model(given: dict[str, Tensor]) -> SimpleNamespace:
    """A stand-in for `self`: networks, settings, and draws that are ours, in the order of theirs."""
    times = module("timestep_utils")
    uniform = [given[name][:, None] for name in ("simulation_time1", "simulation_time2", "renoise_time")]
    times.torch = Given(torch, randn=[torch.special.ndtri(given["time"])[:, None]], rand=uniform)  # type: ignore[attr-defined]
    config = SimpleNamespace(
        teacher_guidance=5.0,
        fd_type=0,
        tangent_warmup=WARMUP,
        student_update_freq=5,
        loss_scale=100.0,
        loss_scale_dmd=1.0,
        max_simulation_steps_fake=4,
        dmd_fix_timesteps=False,
    )
    networks = {"net": Network(1), "net_teacher": Network(2), "net_fake_score": Network(3)}
    found = SimpleNamespace(config=config, tensor_kwargs={"dtype": torch.float64}, **networks)
    found.sync = lambda *values: values[0] if len(values) == 1 else values
    found.scaling = module("denoiser_scaling").RectifiedFlow_TrigFlowWrapper(1.0, 1.0)
    found.p_G, found.p_D = times.LogNormal(p_mean=0.7, p_std=1.6), times.UniformShift(shift=5.0)  # the Wan config's
    noises = [given[name] for name in ("noise", "initial", "renoise")]
    drawn = {"randn": noises, "randn_like": [given["step1"], given["step2"]]}
    shared = {
        "torch": Given(torch, ones=lambda *shape, device: torch.ones(*shape, dtype=torch.float64), **drawn),
        "np": numpy,
        "math": math,
        "rearrange": einops.rearrange,
        "repeat": einops.repeat,
        "log": SimpleNamespace(debug=lambda _: None),
        "DenoisePrediction": lambda x0, F: SimpleNamespace(x0=x0, F=F),
        "rf_to_trig_time": times.rf_to_trig_time,
    }
    for name in METHODS:
        function = defined(CHECKOUT / MODEL, f"T2VDistillModel_rCM.{name}", dict(shared))
        setattr(found, name, partial(function, found))
    return found


def draws(size: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(size))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    names = ("latents", "noise", "initial", "step1", "step2", "renoise")
    given = {name: normal(3, 4, *size) for name in names}
    levels = ("time", "simulation_time1", "simulation_time2", "renoise_time")
    given |= {name: torch.rand(3, generator=generator, dtype=torch.float64) for name in levels}
    return given | {"cond": normal(3, 4), "uncond": normal(3, 4)}


def losses(given: dict[str, Tensor], iteration: int) -> dict[str, Tensor]:
    """The means of their two losses over the samples, and the parameter gradients."""
    self = model(given)
    conds = [SimpleNamespace(to_dict=lambda name=name: {"cond": given[name]}) for name in ("cond", "uncond")]
    found = dict[str, Tensor]()
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        for name, step in (("scm", self._student_scm_step), ("dmd", self._student_dmd_step)):
            loss = step((given["latents"], *conds), iteration)[1].mean()
            self.net.network.zero_grad()
            loss.backward()
            found |= {f"{name}_loss": loss, f"{name}_gradient": self.net.network.flat()}
    return found


def main() -> None:
    tensors, ratios = dict[str, Tensor](), list[Tensor]()
    for index, size in enumerate(SIZES):
        given = draws(size)
        found = losses(given, WARM)
        ratios.append(found["dmd_gradient"].norm() / found["scm_gradient"].norm())
        tensors |= {f"{name}{index}": value for name, value in given.items()}
        if not index:
            first, warm, half = given, found, losses(given, HALF_WARM)
    save = partial(save_golden, repository="NVlabs/rcm", commit=commit(CHECKOUT))
    used = {name: first[name] for name in ("latents", "noise", "time", "cond", "uncond")}
    tangent = {"gradient": half["scm_gradient"], "loss": half["scm_loss"]}
    save("rcm_tangent", used | tangent, function=f"{MODEL}, _student_scm_step")
    del first["latents"], first["noise"], first["time"]
    matching = {"gradient": warm["dmd_gradient"], "loss": warm["dmd_loss"]}
    save("rcm_matching", first | matching, function=f"{MODEL}, _student_dmd_step, backward_simulation")
    function = f"{MODEL}, _student_scm_step, _student_dmd_step"
    save("rcm_ratio", tensors | {"ratio": torch.stack(ratios)}, function=function)


if __name__ == "__main__":
    main()
