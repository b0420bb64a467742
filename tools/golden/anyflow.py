"""Both stages of AnyFlow, by the authors' code: python tools/golden/anyflow.py CHECKOUT

CHECKOUT: NVlabs/AnyFlow at 549236a9d9b154105e52bc1914fafc2a96e8771d. Their scheduler is imported. The methods of their
trainers and of their pipeline are compiled from the checkout's files; networks, levels, noise and what Python's random
draws are given. Videos have their frames before their channels there, and times from 0 to 1000. The numbers of their
recipe are kept (shift 5, guidance 3, weight 1), except that levels have no weights (weight_type: uniform)."""

import copy
import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import torch
import torch.nn.functional as F
from authors import functions, given_draws, normals
from golden_rows import GoldenNetwork, save_golden
from torch import Tensor, nn

COMMIT = "549236a9d9b154105e52bc1914fafc2a96e8771d"
COUNT, STEPS, JUMP = 8, 4, 1
ON_POLICY = ("_compute_kl_grad", "generator_loss", "discriminator_loss")
ON_POLICY_FILE = "trainers/trainer_wan_anyflow_onpolicy.py"
PRETRAIN_FILE = "trainers/trainer_wan_anyflow_pretrain.py"
PRETRAIN = ("sample_timestep", "compute_central_difference", "train_bidirection")


class Configuration(dict[str, Any]):
    __getattr__ = dict.__getitem__


class Net(nn.Module):
    """GoldenNetwork with their arguments. two_time: whether it is given the level that it jumps to."""

    def __init__(self, seed: int, two_time: bool):
        super().__init__()
        self.network, self.two_time = GoldenNetwork(seed), two_time

    def forward(self, hidden_states: Tensor, timestep: Tensor, r_timestep: Tensor, **options: Any) -> tuple[Tensor]:
        cond = options["encoder_hidden_states"].expand(len(hidden_states), -1)
        t, s = timestep[:, 0] / 1000, r_timestep[:, 0] / 1000
        out = self.network(hidden_states.movedim(2, 1), t, cond, s if self.two_time else None)
        return (out.movedim(1, 2),)


def load_scheduler(checkout: Path) -> Any:
    path = checkout / "far/schedulers/scheduling_flowmap_euler_discrete.py"
    spec = importlib.util.spec_from_file_location("scheduling", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FlowMapDiscreteScheduler(shift=5.0, weight_type="uniform")


def repeat(value: Tensor, pattern: str, b: int, f: int) -> Tensor:
    return value[:, None].expand(b, f)


def rearrange(value: Tensor, pattern: str) -> Tensor:
    return value.transpose(1, 2)


def trainer(checkout: Path, uncond: Tensor, diffusion_ratio: float) -> SimpleNamespace:
    """The object that their methods are called with, and the methods bound to it."""
    known = {
        "torch": torch, "F": F, "copy": copy, "Optional": Optional, "tqdm": lambda steps: steps, "repeat": repeat,
        "rearrange": rearrange, "get_dist_rank": lambda: 0, "get_world_size": lambda: 1,
        "random": SimpleNamespace(choice=lambda counts: STEPS, randrange=lambda low, high: JUMP, random=lambda: 1.0),
        "dist": SimpleNamespace(nn=SimpleNamespace(all_gather=lambda value: [value])),
    }  # fmt: skip
    found = SimpleNamespace(vae=None, tokenizer=None, text_encoder=None, negative_embedding=uncond)
    found.transformer, found.real_score, found.discriminator = Net(0, True), Net(1, False), Net(2, False)
    found.scheduler = found.dmd_scheduler = load_scheduler(checkout)
    found.config = Configuration(
        device=torch.device("cpu"), dtype=torch.float64, transformer_cfg={"i2v_prob": 0}, text_encoder_cfg={},
        rollout_cfg={"rollout_pipeline": "WanAnyFlowPipeline", "num_inference_steps_list": [2, 4, 8, 16, 50]},
        dmd_cfg=Configuration(dmd_weight=1.0, real_guidance_scale=3.0),
        flowmap_cfg={"epsilon": 5, "diffusion_ratio": diffusion_ratio, "consistency_ratio": 0.25},
    )  # fmt: skip
    pipeline = functions(
        checkout / "far/pipelines/pipeline_wan_anyflow.py", ("training_rollout",), known, "WanAnyFlowPipeline"
    )

    def build_pipeline(name: str) -> Any:
        def build(transformer: Any, scheduler: Any, **unused: Any) -> Any:
            options = {"use_mean_velocity": True, "do_classifier_free_guidance": False, "_execution_device": "cpu"}
            own = SimpleNamespace(transformer=transformer, scheduler=scheduler, **options)
            return SimpleNamespace(training_rollout=lambda **named: pipeline.training_rollout(own, **named))

        return build

    known["build_pipeline"] = build_pipeline
    known["compute_density_for_timestep_sampling"] = lambda **options: found.fake_levels
    for file, owner, names in (
        (ON_POLICY_FILE, "Wan_AnyFlow_OnPolicy_Trainer", ON_POLICY),
        (PRETRAIN_FILE, "Wan_AnyFlow_Pretrain_Trainer", PRETRAIN),
    ):
        for name, method in vars(functions(checkout / "far" / file, names, known, owner)).items():
            setattr(found, name, partial(method, found))
    found.build_pipeline = build_pipeline
    return found


def main() -> None:
    checkout, normal = Path(sys.argv[1]), normals(12)
    draws = {name: normal(COUNT, 4, 2, 3, 3) for name in ("x", "noise", "initial", "renoise", "fake_noise")}
    cond, uncond = normal(COUNT, 4), normal(1, 4)
    levels = torch.rand(4, COUNT, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    uniforms = dict(zip(("first", "second", "renoise_time", "fake_time"), levels.clamp(0.05, 0.95), strict=True))
    given = draws | uniforms | {"cond": cond, "uncond": uncond}
    frames = {name: value.transpose(1, 2) for name, value in draws.items()}

    def save(name: str, used: str, file: str, function: str, **result: Tensor) -> None:
        tensors = {key: given[key] for key in used.split()} | result
        save_golden(f"any_flow_{name}", tensors, "NVlabs/AnyFlow", COMMIT, f"far/{file}, {function}")

    own = trainer(checkout, uncond, diffusion_ratio=1.0)
    own.fake_levels = torch.sigmoid(torch.special.ndtri(uniforms["fake_time"]))
    with given_draws(torch.distributed, broadcast=[None] * 9):
        random = {"randn_like": [frames["initial"], frames["renoise"], frames["noise"]]}
        random["rand"] = [uniforms["renoise_time"], uniforms["first"], uniforms["second"], torch.ones(1)]
        with given_draws(torch, **random):
            loss = own.generator_loss(draws["x"], cond) + own.train_bidirection(draws["x"], cond, 0)
        loss.backward()
        gradient = own.transformer.network.flat()
        used = "x noise initial renoise first second renoise_time cond uncond"
        save("step", used, ON_POLICY_FILE, "generator_loss and train_bidirection", gradient=gradient)

        with given_draws(torch, randn_like=[frames["initial"], frames["fake_noise"]]):
            loss = own.discriminator_loss(draws["x"], cond)
        loss.backward()
        result = {"loss": loss, "gradient": own.discriminator.network.flat()}
        save("fake", "initial fake_noise fake_time cond", ON_POLICY_FILE, "discriminator_loss", **result)

    own = trainer(checkout, uncond, diffusion_ratio=0.5)
    with given_draws(torch, rand=[uniforms["first"], uniforms["second"]]):
        t, r, _ = own.sample_timestep(COUNT, torch.float64, "cpu")
    t, r = own.scheduler.apply_shift(t), own.scheduler.apply_shift(r)
    save("pairs", "first second", PRETRAIN_FILE, "sample_timestep", t=t, r=r)

    broadcast = {"broadcast": [None]}
    random = {"randn_like": [frames["noise"]], "rand": [uniforms["first"], uniforms["second"], torch.ones(1)]}
    with given_draws(torch.distributed, **broadcast), given_draws(torch, **random):
        loss = own.train_bidirection(draws["x"], cond, 0)
    loss.backward()
    gradient = own.transformer.network.flat()
    save("map", "x noise first second cond", PRETRAIN_FILE, "train_bidirection", loss=loss, gradient=gradient)

    sampler = own.build_pipeline("")(own.transformer, own.scheduler)
    with torch.no_grad():
        video = sampler.training_rollout(latents=frames["initial"], prompt_embeds=cond, num_inference_steps=8)
    file = "pipelines/pipeline_wan_anyflow.py"
    save("sampler", "initial cond", file, "training_rollout", video=video.transpose(1, 2))


if __name__ == "__main__":
    main()
