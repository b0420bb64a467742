"""The numbers of FastGen's TCM: python tools/golden/fastgen_tcm.py CHECKOUT

CHECKOUT: of NVlabs/FastGen. Its package has the name of this one: as in nvidia_fastgen.py, methods are taken from
their files and called on stand-ins. The levels are drawn by its own law, from uniform numbers of ours."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy
import torch
from checkout import checkout_of
from draws import GivenDraws, Random
from golden_rows import GoldenNetwork
from scipy import stats
from sigma_networks import SIGMA_DATA, denoised
from torch import Tensor
from trig_networks import expanded

CHECKOUT = checkout_of("NVlabs/FastGen", "34f30e8ff1a563555fc0c7d59f1c1409dacd8af2")
FOLDER = "fastgen/methods/consistency_model"
FILE, STAGES = f"{FOLDER}/TCM.py", "fastgen/networks/noise_schedule.py"
COUNT, BOUNDARY, STAGE = 8, (0, 5), 3  # the samples at the boundary; the stage of the shrinking ratio


class Network:
    """A clean prediction of ours for data of std 0.5, under EDM's schedule."""

    net_pred_type = "x0"

    def __init__(self, seed: int, schedule: Any):
        self.network, self.noise_scheduler = GoldenNetwork(seed), schedule

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor, **_: Any) -> Tensor:
        return denoised(self.network, x, t, condition)


def main() -> None:
    random = Random(51)
    given = {name: random.normal(COUNT, 4, 2, 2) for name in ("latents", "noise")}
    given |= {"cond": random.normal(COUNT, 4), "pair": random.uniform(COUNT)}
    own: Any = SimpleNamespace(clamp_min=1e-6, t_precision=torch.float64)
    known = {"torch": torch, "np": numpy, "stats": stats, "Optional": None}
    own.law = CHECKOUT.define(STAGES, "EDMNoiseSchedule._truncated_log_t_sample", known)
    uniform = mock.patch.object(numpy.random, "uniform", lambda a, b, n: a + (b - a) * given["pair"].numpy())
    with uniform:
        t = own.law(own, COUNT, mean=0.0, std=0.2, min_t=1.0, max_t=80.0, df=0.01)

    schedule: Any = SimpleNamespace(min_t=1e-6, max_t=80.0, clamp_min=0.0, sample_t=lambda *_, **__: t.clone())
    schedule.forward_process = lambda x, noise, t: x + expanded(t, x) * noise
    student, first = Network(1, schedule), Network(2, schedule)
    known = {"torch": torch, "sync_all": lambda value, _: value, "sync_any": lambda value, _: value}
    both = CHECKOUT.define(FILE, "TCMPrecond", known)(first, student, 1.0)
    loss_config = SimpleNamespace(use_cd=False, huber_const=0.0, use_squared_l2=False, weighting_ct_loss="default")
    self: Any = SimpleNamespace(
        net=student,
        net_tcm=both,
        ratio=1 - 2.0 ** -(STAGE + 1),
        sample_t_cfg=SimpleNamespace(min_r=1e-6, quantize=False),
        loss_config=loss_config,
        config=SimpleNamespace(boundary_prob=len(BOUNDARY) / COUNT, w_boundary=0.1, transition_t=1.0),
        device=torch.device("cpu"),
        _prepare_training_data=lambda data: (data, given["cond"], None),
        _get_outputs=lambda *_, **__: {},
    )
    more: dict[str, Any] = {"torch": torch, "expand_like": expanded, "convert_cfg_to_dict": lambda _: {}}
    more["t_to_r_sigmoid"] = CHECKOUT.define(f"{FOLDER}/CM.py", "t_to_r_sigmoid", {"torch": torch})
    CHECKOUT.bind(self, f"{FOLDER}/CM.py", "CMModel", ("_compute_cm_loss", "_pred_to_loss"), more)
    CHECKOUT.bind(self, FILE, "TCMModel", ("single_train_step",), more)
    order = torch.tensor([*BOUNDARY, *(i for i in range(COUNT) if i not in BOUNDARY)])
    with GivenDraws(normal=[given["noise"]], integer=[order]):
        loss = self.single_train_step(SIGMA_DATA * given["latents"], 0)[0]["total_loss"]
    tensors = given | {"loss": loss, "gradient": student.network.gradient(loss)}
    source = f"{FILE}, TCMModel.single_train_step; {STAGES}, EDMNoiseSchedule._truncated_log_t_sample"
    CHECKOUT.save("fastgen_tcm", tensors, source)


if __name__ == "__main__":
    main()
