"""Numbers of RTDMD's code: its step with log-probability, its advantages, and the gradients of both stages.

python tools/golden/rtdmd.py CHECKOUT

The step is a function of the repository. The rest are methods of its trainers, taken from the checkout and called with
a self that holds GoldenNetworks, a scheduler, and the settings of configs/*/sd3m.yaml. Its classifier-free guidance is
its own (`predict_noise_sd35`); decoding is the identity, and the reward of the last step a sum of two of ours."""

import contextlib
import logging
from collections import defaultdict
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pieces import Torch, checkout_of, in_float64, method, module_at, normals
from torch import Tensor

REPOSITORY, COMMIT = "Harahan/RTDMD", "6c3cb0309732b34313d296ca78d02b5f88a50ca0"
ROOT = checkout_of(REPOSITORY, COMMIT) / "rtdmd"

from golden_rows import GoldenNetwork, save_golden  # noqa: E402

ROWS, SHAPE, LEVELS = 4, (4, 2, 3), [1.0, 0.9, 0.75, 0.5]
SIZES = ((17, 8), (5, 16))  # of a tall and a wide picture
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of pixels, OpenAI's CLIP
STEP = module_at(ROOT / "diffusers_patch/sde_with_logprob.py").sde_step_with_logprob
UTILS = module_at(ROOT / "trainers/ac_dmd_utils.py")
GRPO = SimpleNamespace(
    **{
        "adv_clip_max": 5.0,
        "noise_level": 0.9,
        "sde_type": "cps",
        "clip_range": 1e-5,
        "beta": 0.0,
        "max_grad_norm": 0,
    },
    **{"cfg_in_training": False, "num_inner_epochs": 1, "num_batches_per_epoch": 1, "weight_advantages": True},
    **{"per_prompt_stat_tracking": True, "per_prompt_global_std": True, "reward_fn": {"a": 1.0, "b": 2.5}},
)
LAST_STEP = SimpleNamespace(  # also of stage 1, where the keys have no prefix
    **{
        "enabled": True,
        "loss_type": "ac_dmd",
        "weight": 1e-3,
        "gradient_normalization": True,
        "start_mode": "next_sigma",
    },
    **{
        "real_guidance_scale_min": 7.0,
        "real_guidance_scale_max": 7.0,
        "fake_guidance_scale": 1.0,
        "end_timestep": 1000,
    },
    **{"min_step": 20, "max_step": 980, "min_renoise_step": 20, "max_renoise_step": 980, "timestep_offset": 10.0},
    **{"fake_train_guidance_scale": 1.0, "target_formula_move_scale_out": True, "fake_loss_weight_clamp_min": 0.0},
    **{"fake_loss_weight_clamp_max": 10.0, "consistency_enabled": True, "consistency_weight": 0.01, "cps_eta": 0.9},
    **{"consistency_epsilon_timestep": 200.0, "consistency_num_steps": 1, "consistency_stopgrad_transitions": True},
    **{"consistency_use_two_sample_unbiased": True, "all_include_terminal_when_no_random_stop": True},
    **{"bp_only_deterministic": True, "bp_reward_margin": 3.0, "bp_grad_scale": 1e-4, "fake_score_batch_size": 0},
    **{"generator_scheduler": "cps", "num_inference_steps": 4, "random_stop_idx": True},
)
for key, value in list(vars(LAST_STEP).items()):
    setattr(LAST_STEP, f"ac_{key}", value)


class Nothing:
    """An optimizer, a schedule or a log, none of which matters for a gradient."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: [0.0] if name == "get_last_lr" else 0.0


class Transformer(torch.nn.Module):
    """A GoldenNetwork with the call of an SD3 transformer."""

    def __init__(self, seed: int):
        super().__init__()
        self.network = GoldenNetwork(seed)

    def forward(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(sample=self.network(x, timestep / 1000, encoder_hidden_states))


def scheduler(*noises: Tensor) -> Any:
    module = module_at(ROOT / "schedulers/cps_scheduler.py")
    module.torch = Torch(list(noises))  # type: ignore[attr-defined]
    made = module.CPSScheduler()
    made.set_eta(0.9)
    made.set_timesteps(sigmas=LEVELS)
    made.sigmas, made.timesteps = made.sigmas.double(), made.timesteps.double()
    return made


def trainer(methods: dict[str, list[str]], given: Torch, schedule: Any) -> SimpleNamespace:
    """A self with these methods, "file: Class" -> names, whose torch is `given`."""
    dmd = {"F": F, "torch": given}
    known = {
        **{name: value for name, value in vars(UTILS).items() if not name.startswith("__")},
        **{"torch": given, "F": F, "dist": torch.distributed, "np": np, "contextlib": contextlib},
        **{"nullcontext": contextlib.nullcontext, "defaultdict": defaultdict, "logger": logging.getLogger()},
        **{"sde_step_with_logprob": STEP, "dmd_loss": method(ROOT / "trainers/dmd_trainer.py", "dmd_loss", dmd)},
        **{"FSDP": Nothing, "DDP": Nothing, "is_main_process": lambda: False, "free_fsdp_unsharded_params": id},
        **{"PerPromptStatTracker": module_at(ROOT / "trainers/grpo_utils.py").PerPromptStatTracker},
    }
    predict = method(ROOT / "models/sd35.py", "predict_noise_sd35", {"torch": torch})
    solver = SimpleNamespace(max_grad_norm=0)
    config = {"dmd": LAST_STEP, "ac_dmd": LAST_STEP, "grpo": SimpleNamespace(last_step_loss=LAST_STEP)}
    networks = {"generator": Transformer(0), "fake_score_net": Transformer(1), "teacher": Transformer(2)}
    result = SimpleNamespace(
        **networks,
        dmd_real_score_model=networks["teacher"],
        config=SimpleNamespace(**config, solver=SimpleNamespace(generator=solver, fake_score=solver)),
        optimizers=defaultdict(Nothing),
        schedulers=defaultdict(Nothing),
        x0_scheduler=schedule,
        sde_scheduler=schedule,
        scheduler=schedule,
        latent_channels=4,
        latent_size=0,
        wandb_logger=None,
        _ema=None,
        _grpo_epoch=0,
        _grpo_global_step=0,
        _stat_tracker=module_at(ROOT / "trainers/grpo_utils.py").PerPromptStatTracker(),
        _log_grpo_group_images=lambda *_: None,
        _consistency_deterministic_warned=False,
        _ac_consistency_deterministic_warned=False,
        _autocast=contextlib.nullcontext,
        _get_denoising_sigmas=lambda _: LEVELS,
        _num_train_timesteps=lambda: 1000.0,
        _compute_grad_norm=lambda _: 0.0,
        _clip_grad_norm=lambda *_: 0.0,
        _get_uncond_embeds=lambda rows: (torch.zeros(rows, 4).double(), torch.zeros(rows, 1).double()),
        _predict_noise=predict,
        _forward_transformer=lambda model, x, t, embeds, pooled: predict(model, x, embeds, t, pooled),
    )
    methods = {"dmd_trainer: DMDTrainer": ["_sigma_to_model_timestep", "_model_timestep_to_sigma"], **methods}
    for place, names in methods.items():
        file, owner = place.split(": ")
        for name in names:
            function = method(ROOT / f"trainers/{file}.py", f"{owner}.{name}", known)
            setattr(result, name, MethodType(function, result))
    return result


def save(name: str, tensors: dict[str, Tensor], function: str) -> None:
    save_golden(name, tensors, REPOSITORY, COMMIT, f"rtdmd/{function}")


def step() -> None:
    normal, rows = normals(0), [0, 1, 2]
    x_t, velocity, noise = normal(3, *SHAPE), normal(3, *SHAPE).requires_grad_(), normal(3, *SHAPE)
    schedule = scheduler()
    t = schedule.timesteps[rows]
    with in_float64():
        x_next, *_ = STEP(schedule, velocity, t, x_t, 0.9, sde_type="cps", variance_noise=noise)
        seen = normal(3, *SHAPE)
        _, log_prob, *_ = STEP(schedule, velocity, t, x_t, 0.9, prev_sample=seen, sde_type="cps")
    grad = torch.autograd.grad(log_prob.sum(), velocity)[0]
    tensors = {"x_t": x_t, "velocity": velocity, "noise": noise, "x_next": x_next, "seen": seen, "log_prob": log_prob}
    levels = {"t": schedule.sigmas[rows], "t_next": schedule.sigmas[[i + 1 for i in rows]]}
    function = "diffusers_patch/sde_with_logprob.py, sde_step_with_logprob(sde_type=cps)"
    save("rtdmd_cps_step", {**tensors, **levels, "grad": grad}, function)


def advantages() -> None:
    """Two rewards with unequal weights; one differs five times more between prompts than the other."""
    normal, group = normals(1), torch.arange(64) // 16
    shift = torch.tensor([0.0, 3.0, -2.0, 1.0]).double()[group]
    rewards = {"a": normal(64) + 5 * shift, "b": normal(64) + shift}
    rewards["b"][3] += 60  # beyond the clip
    self = trainer({"grpo_trainer: GRPOTrainer": ["_grpo_compute_advantages"]}, Torch(), scheduler())
    keys = ("prompt_embeds", "pooled_prompt_embeds", "timesteps", "latents", "next_latents", "log_probs")
    samples: dict[str, Any] = {key: torch.zeros(64, 3) for key in keys}
    samples["rewards"] = {**rewards, "mean": rewards["a"] + 2.5 * rewards["b"]}
    self._grpo_compute_advantages(GRPO, samples, [str(g) for g in group.tolist()], [], 3)
    found = samples["advantages"][:, 0]
    assert len(found) == 64 and found.max() > 5
    tensors = {"reward_a": rewards["a"], "reward_b": rewards["b"], "group": group, "advantage": found}
    save("rtdmd_advantages", tensors, "trainers/grpo_trainer.py, GRPOTrainer._grpo_compute_advantages")


STAGE_1 = {
    "ac_dmd_trainer: ACDMDTrainer": [
        *("_update_generator", "_update_fake_score", "_prepare_ac_subinterval", "_sample_ac_timesteps"),
        *("_ac_step_bounds", "_ac_metrics", "_compute_consistency_loss"),
    ],
    "dmd_trainer: DMDTrainer": ["_sigma_to_model_timestep", "_model_timestep_to_sigma", "_generate_latents"],
}


def stage_1() -> None:
    """One update of either network with stop index 3 of 1 to 4, so that x_s is at 0.5."""
    normal = normals(2)
    names = ("initial", "step1", "step2", "exit", "renoise", "back", "consistency1", "consistency2")
    draws = {name: normal(ROWS, *SHAPE) for name in names}
    cond, u = normal(ROWS, 4), torch.tensor([0.1, 0.35, 0.6, 0.95]).double()
    steps, stop = torch.tensor([5, 60, 150, 200]), torch.tensor([3])
    shared = {**draws, "cond": cond, "u": u, "steps": steps, "stop": stop - 1}
    for name, network, extra in (
        ("_update_generator", "generator", ["back"]),
        ("_update_fake_score", "fake_score_net", ["consistency1", "consistency2"]),
    ):
        order = [draws[key].clone() for key in ("initial", "renoise", *extra)]
        given = Torch(order, rand=[u.clone()], randint=[stop.clone(), steps.clone()])
        self = trainer(STAGE_1, given, scheduler(*(draws[key] for key in ("step1", "step2", "exit"))))
        with in_float64():
            getattr(self, name)(cond, torch.zeros(ROWS, 1), *self._get_uncond_embeds(ROWS))
        tensors = {**shared, "grad": getattr(self, network).network.flat()}
        row = "student" if network == "generator" else "fake"
        save(f"rtdmd_stage_1_{row}", tensors, f"trainers/ac_dmd_trainer.py, ACDMDTrainer.{name}")


STAGE_2 = {
    "rtdmd_trainer: RTDMDTrainer": ["_grpo_dmd_training_stage", "_compute_aux_loss", "_lookup_step_sigmas"],
    "bp_mixin: BPMixin": ["_compute_bp_loss"],
    "ac_dmd_mixin: ACDMDMixin": [
        *("_compute_aux_loss_ac_dmd", "_build_ac_subinterval", "_sample_ac_timesteps", "_ac_step_bounds"),
        *("_ac_metrics", "_ac_transition_is_stochastic", "_train_fake_score_ac_from_rollout"),
        "_compute_ac_consistency_loss",
    ],
}


def reward(x0: Tensor) -> Tensor:
    """1.5 x its first element minus the mean square, plus 3: above and below the margin."""
    return 3 + 1.5 * x0.flatten(1)[:, 0] - x0.square().flatten(1).mean(1)


def stage_2() -> None:
    """The gradient of an update from a trajectory of a slightly older student: PPO at steps 0 and 2, and the matching
    and the reward terms at the last, and then that of the last step alone. The released code divides the sum of the
    three by three."""
    normal, rows = normals(3), 6
    cond, u = normal(rows, 4), torch.rand(rows, generator=torch.Generator().manual_seed(0)).double()
    x, x_next, advantage = normal(rows, 4, *SHAPE), normal(rows, 4, *SHAPE), 3 * normal(rows)
    unused, renoise, back = (normal(rows, *SHAPE) for _ in range(3))
    draws, order = [unused, renoise, back] * 2, torch.arange(rows)
    given, schedule = Torch(draws, rand_like=[u, u], randperm=[order, order]), scheduler()
    self = trainer(STAGE_2, given, schedule)
    self._bp_enabled = self._use_training_rewards_for_bp = lambda: True
    self._decode_latents_to_tensor_with_grad = lambda latents: latents
    self._compute_bp_training_weighted_reward = lambda images, batch: (reward(images), {})
    t = schedule.timesteps.expand(rows, 4)
    older = Transformer(0)
    for i, p in enumerate(older.parameters()):
        p.data += 3e-4 * normals(10 + i)(*p.shape)
    with torch.no_grad(), in_float64():
        v = [self._predict_noise(older, x[:, j], cond, t[:, j], cond) for j in range(4)]
        old = [STEP(schedule, v[j], t[:, j], x[:, j], 0.9, x_next[:, j], sde_type="cps")[1] for j in range(4)]
    samples = {"prompt_embeds": cond, "pooled_prompt_embeds": cond[:, :1], "timesteps": t, "latents": x}
    samples |= {
        "next_latents": x_next,
        "log_probs": torch.stack(old, 1),
        "advantages": advantage[:, None].expand(-1, 4),
    }
    grads = {}
    for name, policy in (("grad", [0, 2]), ("grad_last", [])):
        steps = {"ppo_steps": set(policy), "aux_steps": {3}, "all_steps": [*policy, 3]}
        self.generator.network.zero_grad()
        with in_float64():
            self._grpo_dmd_training_stage(
                GRPO, contextlib.nullcontext, dict(samples), cond, cond, len(policy) + 1, 1e-5, 1e-5, **steps
            )
        grads[name] = self.generator.network.flat()
    tensors = {
        "x": x,
        "x_next": x_next,
        "cond": cond,
        "advantage": advantage,
        "u": u,
        "renoise": renoise,
        "back": back,
    }
    tensors |= {"v_old": torch.stack(v, 1), **grads}
    save("rtdmd_stage_2_student", tensors, "trainers/rtdmd_trainer.py, RTDMDTrainer._grpo_dmd_training_stage")


def stage_2_fake() -> None:
    """The gradient of the fake score from cached samples, which are the outcome of the last step."""
    normal, steps = normals(4), torch.tensor([5, 60, 150, 200])
    x0, cond, u = normal(ROWS, *SHAPE), normal(ROWS, 4), torch.tensor([0.3, 0.45, 0.6, 0.95]).double()
    noises = {name: normal(ROWS, *SHAPE) for name in ("fake_noise", "consistency1", "consistency2")}
    schedule, path = scheduler(), x0[:, None].expand(-1, 4, *SHAPE)
    self = trainer(STAGE_2, Torch(list(noises.values()), rand_like=[u], randint=[steps]), schedule)
    samples = {
        "prompt_embeds": cond,
        "pooled_prompt_embeds": cond[:, :1],
        "timesteps": schedule.timesteps.expand(ROWS, 4),
    }
    samples |= {"latents": path, "next_latents": path, "noise_preds": path}
    with in_float64():
        self._train_fake_score_ac_from_rollout(samples, LAST_STEP, contextlib.nullcontext, {3})
    tensors = {"x0": x0, "cond": cond, "u": u, "steps": steps, **noises, "grad": self.fake_score_net.network.flat()}
    save("rtdmd_stage_2_fake", tensors, "trainers/ac_dmd_mixin.py, ACDMDMixin._train_fake_score_ac_from_rollout")


def hpsv2_input() -> None:
    """HPSv2's preprocessing of a tall and of a wide picture."""
    from torchvision.transforms import Compose, InterpolationMode, Normalize
    from torchvision.transforms import functional as transforms

    path = ROOT / "rewards/hpsv2_scorer.py"
    known = {
        "nn": torch.nn,
        "torch": torch,
        "F": transforms,
        "InterpolationMode": InterpolationMode,
        "Compose": Compose,
    }
    known |= {"Normalize": Normalize}
    for name in ("ResizeMaxSize", "MaskAwareNormalize", "image_transform_tensor"):
        known[name] = method(path, name, known)
    transform = known["image_transform_tensor"](14, MEAN, STD)
    tall, wide = (
        0.3 + 0.4 * torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(h)).double() for h, w in SIZES
    )
    tensors = {"tall": tall, "wide": wide, "tall_input": transform(tall), "wide_input": transform(wide)}
    save("hpsv2_input", tensors, "rewards/hpsv2_scorer.py, image_transform_tensor")


if __name__ == "__main__":
    step()
    stage_2_fake()
    hpsv2_input()
    advantages()
    stage_1()
    stage_2()
