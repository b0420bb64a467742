"""Numbers of Self-Forcing's code (guandeh17/Self-Forcing), for tests/golden_video_dmd.py.

python tools/golden/self_forcing.py CHECKOUT

The DMD model is made without its constructor, which loads Wan. Its networks are GoldenNetworks that predict the flow,
behind the calling convention of their wrapper. A video is one block of four frames, so that no memory of earlier
frames is read. Methods, training pipeline and scheduler are the authors' own."""

import sys
import types
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from called import called_with, checkout_of, gradients_of, normal, package, stub
from golden_rows import GoldenNetwork, save_golden
from torch import Tensor, nn

REPOSITORY, COMMIT = "guandeh17/Self-Forcing", "33593df3e81fa3ec10239271dd2c100facac6de1"
BATCH, FRAMES, SHAPE, SHIFT = 1, 4, (3, 2, 2), 5.0  # their pipeline takes one video at a time


class Wrapper(nn.Module):
    """A GoldenNetwork whose channels are the frames, as Self-Forcing calls its networks: returns flow and x0."""

    def __init__(self, network: GoldenNetwork, convert: Any):
        super().__init__()
        self.network, self.convert = network, convert

    def forward(
        self, noisy_image_or_video: Tensor, conditional_dict: dict[str, Tensor], timestep: Tensor, **memory: object
    ) -> tuple[Tensor, Tensor]:
        x = noisy_image_or_video
        flow = self.network(x, timestep[:, 0].double() / 1000, conditional_dict["embedding"])
        x0 = self.convert(flow.flatten(0, 1), x.flatten(0, 1), timestep.flatten(0, 1)).unflatten(0, x.shape[:2])
        return flow, x0


def dmd_model(kind: Any, networks: dict[str, GoldenNetwork], **options: object) -> Any:
    """A model of this class of theirs, with the settings of their configs."""
    from utils.loss import FlowPredLoss
    from utils.scheduler import FlowMatchScheduler
    from utils.wan_wrapper import WanDiffusionWrapper

    scheduler = FlowMatchScheduler(shift=SHIFT, sigma_min=0.0, extra_one_step=True)
    scheduler.set_timesteps(1000, training=True)
    scheduler.alphas_cumprod = None

    def convert(flow: Tensor, x: Tensor, timestep: Tensor) -> Tensor:
        return WanDiffusionWrapper._convert_flow_pred_to_x0(holder, flow, x, timestep)

    holder = types.SimpleNamespace(scheduler=scheduler)
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    model.generator = Wrapper(networks["student"], convert)
    model.real_score, model.fake_score = (Wrapper(networks[role], convert) for role in ("teacher", "fake_score"))
    model.scheduler, model.device, model.dtype = scheduler, torch.device("cpu"), torch.float64
    model.denoising_loss_func, model.args = FlowPredLoss(), types.SimpleNamespace(denoising_loss_type="flow")
    model.num_train_timestep, model.min_step, model.max_step = 1000, 20, 980
    model.real_guidance_scale, model.fake_guidance_scale, model.timestep_shift = 3.0, 0.0, SHIFT
    model.ts_schedule, model.ts_schedule_max, model.min_score_timestep = False, False, 0
    model.num_frame_per_block = FRAMES
    for name, value in options.items():
        setattr(model, name, value)
    return model


def training_pipeline(model: Any) -> Any:
    from pipeline.self_forcing_training import SelfForcingTrainingPipeline

    timesteps = torch.cat([model.scheduler.timesteps, torch.zeros(1)])
    steps = timesteps[1000 - torch.tensor([1000, 750, 500, 250])]  # as with warp_denoising_step
    pipeline = SelfForcingTrainingPipeline(
        steps, model.scheduler, model.generator, FRAMES, same_step_across_blocks=True
    )
    pipeline.num_transformer_blocks, pipeline.kv_cache_size = 1, 1
    return pipeline


def main() -> None:
    checkout = checkout_of(REPOSITORY, COMMIT)
    stub("wan", "wan.modules", "wan.modules.model", "wan.modules.t5", "wan.modules.vae", "wan.modules.tokenizers")
    stub("wan.modules.causal_model", "einops")
    package("model", checkout / "model")
    package("pipeline", checkout / "pipeline")
    import_pipeline()
    from model.dmd import DMD

    noise, cond, uncond = normal(0, BATCH, FRAMES, *SHAPE), normal(1, BATCH, 4), normal(2, BATCH, 4)
    networks = {"student": GoldenNetwork(0), "teacher": GoldenNetwork(1), "fake_score": GoldenNetwork(2)}
    both = {"embedding": cond}, {"embedding": uncond}

    def save(name: str, tensors: dict[str, Tensor], function: str) -> None:
        save_golden(name, {"cond": cond, "uncond": uncond} | tensors, REPOSITORY, COMMIT, function)

    for schedule, stop in ((False, 1), (True, 2)):
        model = dmd_model(DMD, networks, ts_schedule=schedule, ts_schedule_max=schedule)
        between = [normal(10 + i, BATCH, FRAMES, *SHAPE) for i in range(stop)]
        with called_with([*between, normal(19, BATCH * FRAMES, *SHAPE)], [torch.tensor([stop])]), on_one_process():
            x, top, bottom = training_pipeline(model).inference_with_trajectory(noise, **both[0])
        low, high = (bottom, top) if schedule else (0, 1000)
        drawn, fresh = torch.tensor([low + (high - low) // 3]), normal(20, BATCH, FRAMES, *SHAPE)
        with called_with([fresh], [drawn]):
            loss, _ = model.compute_distribution_matching_loss(x, *both, None, top, bottom)
        given = {"rollout": torch.stack([noise, *between]), "stop": torch.tensor(stop), "drawn": drawn, "noise": fresh}
        given |= {"range": torch.tensor([low, high])}
        given |= {"loss": loss, "gradient": gradients_of(networks["student"], loss)}
        save(
            f"self_forcing_generator{'_ts_schedule' if schedule else ''}",
            given,
            "pipeline/self_forcing_training.py, inference_with_trajectory; "
            "model/dmd.py, DMD.compute_distribution_matching_loss",
        )

    model = dmd_model(DMD, networks)
    x, drawn, fresh = normal(30, BATCH, FRAMES, *SHAPE), torch.tensor([140]), normal(31, BATCH, FRAMES, *SHAPE)
    model._run_generator = lambda **_: (x, None, None, None)
    with called_with([fresh], [drawn]):
        loss, _ = model.critic_loss([BATCH, FRAMES, *SHAPE], *both, None)
    given = {"x": x, "drawn": drawn, "noise": fresh, "loss": loss}
    given |= {"gradient": gradients_of(networks["fake_score"], loss)}
    save("self_forcing_critic", given, "model/dmd.py, DMD.critic_loss (on given samples)")

    raw = torch.arange(3, 1000, 83)
    seen: list[Tensor] = []
    for value in raw:
        x = normal(40, 1, FRAMES, *SHAPE)
        with called_with([x], [value[None]]):
            _, log = model.compute_distribution_matching_loss(x, {"embedding": cond[:1]}, {"embedding": uncond[:1]})
        seen.append(log["timestep"][0, 0])
    save_golden(
        "self_forcing_levels",
        {"drawn": raw, "timestep": torch.stack(seen)},
        REPOSITORY,
        COMMIT,
        "model/dmd.py, DMD.compute_distribution_matching_loss (its levels)",
    )


def import_pipeline() -> None:
    """What model/dmd.py imports from the package pipeline, whose __init__ imports more."""
    from pipeline.self_forcing_training import SelfForcingTrainingPipeline

    sys.modules["pipeline"].SelfForcingTrainingPipeline = SelfForcingTrainingPipeline  # type: ignore[attr-defined]


def on_one_process() -> Any:
    """Nothing to broadcast, and tensors stay where they are."""
    stack = ExitStack()
    stack.enter_context(patch("torch.distributed.broadcast", lambda *_, **__: None))
    stack.enter_context(patch.object(torch.Tensor, "cuda", lambda self: self))
    return stack


if __name__ == "__main__":
    main()
