"""The fake score of distribution matching: a denoiser of the student's own samples, trained online.

Several objectives share it. With `condition_on_stop` (ours) it is conditioned on the step of the rollout that made its
input, so that the samples of each step are matched by themselves, not only their mixture; see dmd2.py."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from fastgen import signals
from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.denoiser import NO_INPUTS, Denoiser, Inputs
from fastgen.modules.expert_levels import draw_levels
from fastgen.networks import Networks
from fastgen.rollout import RolloutPolicy
from fastgen.schedule import PredictionType, TimeSampler


def make_fake_score(backbone: Backbone, policy: RolloutPolicy, condition_on_stop: bool = False) -> Denoiser:
    """A copy of the teacher's network. With condition_on_stop, the index of the policy's step is added as an input."""
    fake_score = backbone.load("fake_score")
    if condition_on_stop:
        fake_score.add_inputs({"stop": policy.num_steps}, backbone.time_dim)
    return fake_score


def stop_input(stop: Tensor, condition_on_stop: bool) -> Inputs:
    """The inputs of the fake score for samples made at these stops [B]."""
    return Inputs(stop=stop) if condition_on_stop else NO_INPUTS


def denoising_loss(
    networks: Networks,
    batch: Batch,
    x0: Tensor,
    time: TimeSampler,
    space: PredictionType | None = None,
    inputs: Inputs = NO_INPUTS,
    within: tuple[Tensor, Tensor] | None = None,
    predict: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Scalar: `signals.denoising_loss` of the fake score, at the student's clean samples x0 [B, ...] renoised to
    levels drawn from `time`.

    space: the prediction type in which the error is measured; None is the fake score's own.
    within: each sample's lowest and highest level, [B] each; None: the whole law.
    predict: x0 from x_t and t; None: the fake score with the batch's prompts and these inputs.
    Gradient flows to the fake score."""
    schedule = networks.teacher.schedule
    t = draw_levels(batch, "fake_time", partial(time, within=within), networks.fake_score)
    x_t = schedule.add_noise(x0, batch.normal("fake_noise"), t)
    prediction = predict(x_t, t) if predict else networks.fake_score(x_t, t, batch.cond, inputs)
    return signals.denoising_loss(prediction, x0, x_t, t, schedule, space or networks.fake_score.prediction_type)
