"""CTM's endpoints and its denoising loss: python tools/golden/ctm.py CHECKOUT

CHECKOUT: of sony/ctm. The methods of KarrasDenoiser and the sampler of the denoising levels are taken from their
files, with networks of ours behind EDM's scalings, which are inverted. The two ends of the grid are left out, where
the authors' path ends at 0.002 and 80; jumps that end at 0.002 end at 0 here. The distance is the square, not LPIPS,
and the weight of the denoising loss is 1."""

from types import SimpleNamespace
from typing import Any

import torch
from checkout import checkout_of
from draws import GivenDraws, Random
from golden_rows import GoldenNetwork
from sigma_networks import SIGMA_DATA
from torch import Tensor
from trig_networks import expanded

CHECKOUT = checkout_of("sony/ctm", "87cca3be93df8dc1e6797175bf4f404dfb536f28")
FILE, LAW, CLASS = "code/cm/karras_diffusion.py", "code/cm/resample.py", "KarrasDenoiser"
SCALINGS = ("get_edm_scalings", "get_inner_scalings", "get_outer_scalings", "get_c_in", "get_snr", "rescaling_t")
METHODS = (*SCALINGS, "get_denoised", "get_denoised_and_G", "heun_solver", "get_ctm_estimate", "get_ctm_target")
LEVELS, STEPS = 18, 3
START, END = (2, 5, 9, 12), (15, 8, 14, 16)  # of t and s, counted from sigma = 80; u is three levels after t


class Scaled:
    """A two-time network as the authors call it: the output that, after EDM's scalings, is the denoiser of ours."""

    def __init__(self, seed: int, cond: Tensor):
        self.network, self.cond = GoldenNetwork(seed), cond

    def __call__(self, x: Tensor, rescaled_t: Tensor, s: Tensor | None = None, **_: Any) -> Tensor:
        sigma = torch.exp(rescaled_t / 250)
        scale = expanded((sigma**2 + SIGMA_DATA**2).sqrt(), x)
        skip, out = SIGMA_DATA**2 / scale**2, expanded(sigma, x) * SIGMA_DATA / scale
        x = x * scale
        t, end = sigma / (sigma + SIGMA_DATA), None if s is None else torch.exp(s / 250)
        x_t = x * expanded(1 - t, x) / SIGMA_DATA
        u = self.network(x_t, t, self.cond, None if end is None else end / (end + SIGMA_DATA))
        return (SIGMA_DATA * (x_t - expanded(t, x) * u) - skip * x) / out


def main() -> None:
    random, count = Random(41), len(START)
    given = {name: random.normal(count, 4, 2, 2) for name in ("latents", "noise", "denoising")}
    given |= {"cond": random.normal(count, 4), "start": torch.tensor(START), "end": torch.tensor(END)}
    given |= {"lognormal": random.normal(2), "high": random.uniform(2)}
    common = {"sigma_data": SIGMA_DATA, "sigma_max": 80.0, "rho": 7, "start_scales": LEVELS, "time_continuous": False}
    common |= {"large_log": False, "outer_parametrization": "euler", "inner_parametrization": "edm"}
    common |= {"target_subtract": False, "self_learn": False, "training_mode": "ctm", "apply_adaptive_weight": False}
    common |= {"diffusion_weight_schedule": "karras_weight", "diffusion_mult": 0.7}
    grid: Any = SimpleNamespace(args=SimpleNamespace(sigma_min=0.002, **common))
    own: Any = SimpleNamespace(args=SimpleNamespace(sigma_min=0.0, **common), get_t=lambda index: grid.get_t(index))
    own.adopt_weight = lambda weight, *_, **__: weight
    known: dict[str, Any] = {"th": torch, "append_dims": lambda value, dims: value.reshape(-1, *(1,) * (dims - 1))}
    known |= {"mean_flat": lambda value: value.flatten(1).mean(1), "dist_util": SimpleNamespace(dev=lambda: "cpu")}
    known["get_weightings"] = CHECKOUT.define(FILE, "get_weightings", dict(known))
    CHECKOUT.bind(grid, FILE, CLASS, ("get_t",), known)
    CHECKOUT.bind(own, FILE, CLASS, METHODS, known)
    CHECKOUT.bind(own, FILE, CLASS, ("get_DSM_loss",), known)
    student, target = Scaled(1, given["cond"]), Scaled(2, given["cond"])
    own.teacher_model = Scaled(3, given["cond"])

    x = SIGMA_DATA * given["latents"]
    t, u, s = (grid.get_t(index.double()) for index in (given["start"], given["start"] + STEPS, given["end"]))
    x_t = x + SIGMA_DATA * given["noise"] * expanded(t / SIGMA_DATA, x)
    networks = (student, target)
    estimate = own.get_ctm_estimate(x_t, t, u, s, *networks, True, "target_model_sg", "model", False)
    x_u = own.heun_solver(target, x_t, given["start"].double(), x.dim(), t, u, num_step=STEPS)
    aim = own.get_ctm_target(x_u, u, s, *networks, True, "model_sg")
    loss = (estimate - aim).square().mean()
    tensors = given | {"loss": loss, "gradient": student.network.gradient(loss)}
    CHECKOUT.save("ctm_endpoints", tensors, f"{FILE}, {CLASS}.get_ctm_estimate, heun_solver, get_ctm_target")

    law: Any = SimpleNamespace(p_mean=-1.2, p_std=1.2, args=SimpleNamespace(sigma_min=0.002, **common))
    CHECKOUT.bind(law, LAW, "HalfLogNormalHalfUniformSampler", ("get_t", "sample"), {"th": torch})
    own.diffusion_schedule_sampler = law
    with GivenDraws(normal=[given["lognormal"], given["denoising"]], uniform=[given["high"]]):
        loss = own.get_DSM_loss(student, x, {}, None, 0, 0).mean()
    tensors = given | {"loss": loss, "gradient": student.network.gradient(loss)}
    source = f"{FILE}, {CLASS}.get_DSM_loss; {LAW}, HalfLogNormalHalfUniformSampler.sample"
    CHECKOUT.save("ctm_denoising", tensors, source)


if __name__ == "__main__":
    main()
