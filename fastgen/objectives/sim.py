"""SIM: Score Implicit Matching (Luo et al., arXiv 2410.16794).

    paper        here                 what it is
    s_phi        networks.teacher     the teacher's score
    s_psi        networks.fake_score  the score of the student's samples
    y_t          delta                their difference, here of the clean predictions: mu_real - mu_fake
    d(y)         huber                pseudo-Huber distance sqrt(|y|^2 + c^2) - c; the norm is over a whole sample
    x_0          rollout.x            the student's sample

SIM minimises E_t E_{x_t} d(y_t) over the student, where the law of x_t is held fixed, without the derivative of s_psi
with respect to the student. Its theorem replaces that derivative by

    -E[d'(y) . (s_psi(x_t) - grad log q(x_t | x_0))],   gradient through x_t and x_0, not to s_psi's weights

(derived; the released repository has inference alone). Written in clean predictions, with the weight by level that
makes d a function of delta, this is SiD's loss at alpha = 1 with omega = 1 / sqrt(mean delta^2 + c^2), where omega
carries gradient (sid.py). The mean over elements, where the norm has a sum, makes c a size per element. With a squared
distance omega would be 1. The rest is SiD's, with its options.
"""

from typing import Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from fastgen import signals
from fastgen.objectives.sid import SiD


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class SIM(SiD):
    name: Literal["sim"] = "sim"  # type: ignore[assignment]
    huber: float = Field(default=1e-3, gt=0)  # c, in units of the latents; no public value

    @model_validator(mode="after")
    def _implicit(self) -> "SIM":
        if self.alpha != 1:
            raise ValueError(f"sim is the case alpha 1 of the score identity, and alpha is {self.alpha:g}: use sid")
        if self.normaliser_floor != 1e-5:
            raise ValueError("sim divides by the distance of huber, not by mean|x - real|: leave normaliser_floor out")
        return self

    def sample_weight(self, x: Tensor, fake: Tensor, real: Tensor) -> Tensor:
        """omega [B] = 1 / sqrt(mean (real - fake)^2 + c^2), with gradient: delta omega is d'(delta)."""
        return (signals.per_sample_mean((real - fake).square()) + self.huber**2).rsqrt()
