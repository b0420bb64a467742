"""Policies and the imitation loss of pi-Flow: python tools/golden/pi_flow.py CHECKOUT

CHECKOUT: Lakonik/piFlow at 422954182a10f27eb05458bb5a43f1518817cf70. The policies, the mixture's posterior mean and
the loss of one segment are compiled from their files, because their packages import mmgen. Networks, what the student
predicts, and draws are given."""

from types import SimpleNamespace
from typing import Any

import torch
from checkout import checkout_of
from draws import Float64, GivenDraws, Random
from golden_rows import GoldenNetwork
from torch import Tensor

CHECKOUT = checkout_of("Lakonik/piFlow", "422954182a10f27eb05458bb5a43f1518817cf70")
FOLDER = "lakonlab/models/diffusions"
LOSS = f"{FOLDER}/piflow.py"
METHODS = ("policy_rollout", "policy_average_u", "piid_segment")
SUBSTEPS = 100_000  # Euler steps of a unit of time, so many that what they leave is small


class Unwarped:
    """A timestep sampler without shift."""

    logit_normal_enable = False

    def warp_t(self, raw_t: Tensor, seq_len: Any = None) -> Tensor:
        return raw_t


def policies() -> tuple[Any, Any]:
    """DXPolicy and GMFlowPolicy."""
    known: dict[str, Any] = {"torch": torch, "BasePolicy": object, "Dict": dict}
    plain = SimpleNamespace(jit=SimpleNamespace(script=lambda function: function))  # its compiler wants a module
    mean = CHECKOUT.define(f"{FOLDER}/gmflow.py", "gmflow_posterior_mean_jit", {"torch": plain})
    line = CHECKOUT.define(f"{FOLDER}/piflow_policies/dx.py", "DXPolicy", dict(known))
    known |= {"gmflow_posterior_mean_jit": mean}
    return line, CHECKOUT.define(f"{FOLDER}/piflow_policies/gmflow.py", "GMFlowPolicy", known)


def shape_info(x: Tensor) -> tuple[int, int, int]:
    return x.dim(), len(x), x.shape[2:].numel()


def segment_loss(mixture: Any, policy: Any, teacher: Any, given: dict[str, Tensor], **settings: Any) -> Tensor:
    """PiFlowImitation.piid_segment, whose loss is the mean of half the square."""
    own: Any = SimpleNamespace(
        train_cfg={"total_substeps": SUBSTEPS, "num_intermediate_states": 3, "gm_dropout": 0.3, **settings},
        timestep_sampler=Unwarped(),
        num_timesteps=1,
        get_shape_info=shape_info,
        flow_loss=lambda found: 0.5 * (found["u_t_pred"] - found["u_t"]).square().mean(),
    )
    known = {"torch": torch, "GMFlowPolicy": mixture, "module_eval": lambda _network: torch.no_grad()}
    CHECKOUT.bind(own, LOSS, "PiFlowImitationBase", METHODS, known)
    top = given["top"]
    sigma = top.reshape(-1, 1, 1, 1)
    teach = lambda return_u, x_t, t: teacher(x_t, t)  # noqa: E731
    with Float64(), GivenDraws(uniform=[given["components"], given["student_states"], given["teacher_states"]]):
        return own.piid_segment(teach, policy, given["x"], top, sigma, 0.0, given["length"], {})[0]


def main() -> None:
    random, count, size = Random(41), 3, 4
    shape = (count, 4, 2, 2)
    line, mixture = policies()
    top = torch.tensor([0.9, 0.7, 1.0], dtype=torch.float64)
    x, y, t = random.normal(*shape), random.normal(*shape), top - 0.3 * random.uniform(count)
    means, logits = random.normal(count, size, 4, 2, 2), random.normal(count, size, 1, 2, 2)
    log_std = random.normal(count)
    length = torch.full((count,), 0.4, dtype=torch.float64)
    given = {"x": x, "y": y, "t": t, "top": top, "means": means, "length": length}

    on_line = line(means, x, top, segment_size=0.4)
    source = f"{FOLDER}/piflow_policies/dx.py, DXPolicy.pi"
    CHECKOUT.save("pi_flow_line", given | {"velocity": on_line.pi(y, t)}, source)

    leaves = [value.requires_grad_() for value in (means.clone(), logits, log_std)]
    output = {"means": leaves[0], "logweights": leaves[1].log_softmax(1), "logstds": leaves[2].reshape(-1, 1, 1, 1, 1)}
    policy = mixture(output, x, top, checkpointing=False)
    given |= {"logits": logits, "log_std": log_std}
    source = f"{FOLDER}/piflow_policies/gmflow.py, GMFlowPolicy.pi"
    CHECKOUT.save("pi_flow_mixture", given | {"velocity": policy.pi(y, t)}, source)

    given |= {name: random.uniform(count, wide) for name, wide in (("student_states", 3), ("teacher_states", 2))}
    given |= {"components": random.uniform(count, size)}
    loss = segment_loss(mixture, policy, GoldenNetwork(1), given)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])
    source = f"{LOSS}, PiFlowImitationBase.piid_segment"
    CHECKOUT.save("pi_flow_segment", given | {"loss": loss, "gradient": gradient}, source)


if __name__ == "__main__":
    main()
