"""rCM's numbers: python tools/golden/rcm.py CHECKOUT

CHECKOUT: of NVlabs/rcm. Its model is a class that imports its training framework; the methods that compute the losses
are taken from it at run time and called on a stand-in for `self` with networks of ours. Their casts to
float32 are read as casts to float64. Needs einops."""

import math
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import einops
import numpy
import torch
from checkout import checkout_of
from draws import Float64, GivenDraws, Random
from golden_rows import GoldenNetwork
from torch import Tensor

CHECKOUT = checkout_of("NVlabs/rcm", "5b41aa92c493d0627df8651996a04196e9de186f")
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


class Network:
    """A GoldenNetwork as rCM calls one, also for a value and its derivative."""

    def __init__(self, seed: int):
        self.network = GoldenNetwork(seed)

    def __call__(self, x_B_C_T_H_W: Any, timesteps_B_T: Any, cond: Tensor, withT: bool = False) -> Any:
        if not withT:
            return self.network(x_B_C_T_H_W, timesteps_B_T, cond)
        (x, dx), (t, dt) = x_B_C_T_H_W, timesteps_B_T
        return torch.func.jvp(lambda x, t: self.network(x, t, cond), (x, t), (dx, dt))


def model() -> SimpleNamespace:
    """A stand-in for `self`: networks and settings."""
    times = CHECKOUT.module("rcm/utils/timestep_utils.py")
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
    found.scaling = CHECKOUT.module("rcm/utils/denoiser_scaling.py").RectifiedFlow_TrigFlowWrapper(1.0, 1.0)
    found.p_G, found.p_D = times.LogNormal(p_mean=0.7, p_std=1.6), times.UniformShift(shift=5.0)  # the Wan config's
    shared = {
        "torch": torch,
        "np": numpy,
        "math": math,
        "rearrange": einops.rearrange,
        "repeat": einops.repeat,
        "log": SimpleNamespace(debug=lambda _: None),
        "DenoisePrediction": lambda x0, F: SimpleNamespace(x0=x0, F=F),
        "rf_to_trig_time": times.rf_to_trig_time,
    }
    CHECKOUT.bind(found, MODEL, "T2VDistillModel_rCM", METHODS, shared)
    return found


def draws(size: tuple[int, ...]) -> dict[str, Tensor]:
    random = Random(sum(size))
    normal = random.normal
    names = ("latents", "noise", "initial", "step1", "step2", "renoise")
    given = {name: normal(3, 4, *size) for name in names}
    levels = ("time", "simulation_time1", "simulation_time2", "renoise_time")
    given |= {name: random.uniform(3) for name in levels}
    return given | {"cond": normal(3, 4), "uncond": normal(3, 4)}


def losses(given: dict[str, Tensor], iteration: int, *names: str) -> dict[str, Tensor]:
    """The means of their losses "scm" and "dmd" over the samples, and the parameter gradients."""
    self = model()
    conds = [SimpleNamespace(to_dict=lambda name=name: {"cond": given[name]}) for name in ("cond", "uncond")]
    levels = [given[name] for name in ("simulation_time1", "simulation_time2", "renoise_time")]
    draws = {
        "scm": GivenDraws([torch.special.ndtri(given["time"]), given["noise"]]),
        "dmd": GivenDraws([given[name] for name in ("initial", "step1", "step2", "renoise")], levels),
    }
    ones, found = partial(torch.ones, dtype=torch.float64), dict[str, Tensor]()
    for name in names:
        with Float64(), draws[name], mock.patch.object(torch, "ones", ones):
            loss = getattr(self, f"_student_{name}_step")((given["latents"], *conds), iteration)[1].mean()
        found |= {f"{name}_loss": loss, f"{name}_gradient": self.net.network.gradient(loss)}
    return found


def main() -> None:
    tensors, ratios = dict[str, Tensor](), list[Tensor]()
    for index, size in enumerate(SIZES):
        given = draws(size)
        found = losses(given, WARM, "scm", "dmd")
        ratios.append(found["dmd_gradient"].norm() / found["scm_gradient"].norm())
        tensors |= {f"{name}{index}": value for name, value in given.items()}
        if not index:
            first, warm, half = given, found, losses(given, HALF_WARM, "scm")
    used = {name: first[name] for name in ("latents", "noise", "time", "cond", "uncond")}
    tangent = {"gradient": half["scm_gradient"], "loss": half["scm_loss"]}
    CHECKOUT.save("rcm_tangent", used | tangent, f"{MODEL}, _student_scm_step")
    del first["latents"], first["noise"], first["time"]
    matching = {"gradient": warm["dmd_gradient"], "loss": warm["dmd_loss"]}
    CHECKOUT.save("rcm_matching", first | matching, f"{MODEL}, _student_dmd_step, backward_simulation")
    function = f"{MODEL}, _student_scm_step, _student_dmd_step"
    CHECKOUT.save("rcm_ratio", tensors | {"ratio": torch.stack(ratios)}, function)


if __name__ == "__main__":
    main()
