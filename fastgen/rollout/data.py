"""One step of the student from real data, in the place of a rollout."""

import torch
from torch import Tensor

from fastgen.batch import Batch
from fastgen.denoiser import Denoiser
from fastgen.policy import RolloutPolicy
from fastgen.rollout.simulation import Rollout, kept
from fastgen.rollout.steps import Step, predict_x0


def step_from_data(student: Denoiser, policy: RolloutPolicy, batch: Batch, stop: Tensor, grad: bool = True) -> Rollout:
    """One step of the student from real samples, noised to timesteps[stop[i]], in the place of a simulated input.

        x_t = alpha_t latents + sigma_t noise      (the inputs of FastGen's DMD2, and of CausVid, arXiv 2412.07772)

    The input has the teacher's law, not that of the student's own steps, from which it will sample. At level 1 it is
    noise. stop, grad, and what is returned: as in `backward_simulation`, with s = 0. Needs `batch.latents`."""
    latents = batch.latents
    assert latents is not None

    def run() -> Rollout:
        t = latents.new_tensor(policy.timesteps)[stop]
        x_t = student.schedule.add_noise(latents, batch.normal("initial"), t)
        with torch.set_grad_enabled(grad):
            x0 = predict_x0(student, x_t, t, batch.cond, policy)
        return Rollout(x0, torch.zeros_like(t), stop, (Step(x_t, t, x0, x0),))

    return kept(batch, grad, run)
