"""Numbers of RTDMD's first stage, AC-DMD (Harahan/RTDMD), for tests/golden_phased_dmd.py.

python tools/golden/rtdmd.py CHECKOUT

ACDMDTrainer is made without its constructor, which loads pipelines. Its networks are GoldenNetworks that predict the
velocity; `_generate_latents`, which runs the sampler, is replaced by one call of the student at a given x_t. The
updates are the authors' own; their optimizer is one that does nothing, so that the gradients stay."""

import types
from contextlib import nullcontext
from typing import Any

import torch
from called import called_with, checkout_of, normal, package, stub
from golden_rows import GoldenNetwork, save_golden
from torch import Tensor

REPOSITORY, COMMIT = "Harahan/RTDMD", "6c3cb0309732b34313d296ca78d02b5f88a50ca0"
BATCH, SHAPE, T, S, GUIDANCE = 3, (4, 2, 2), 0.75, 0.5, 7.0

DMD = {"generator_scheduler": "cps", "cps_eta": 0.9, "num_inference_steps": 4, "random_stop_idx": True}
DMD |= {"num_train_timesteps": 1000, "min_step": 20, "max_step": 980, "gradient_normalization": True}
DMD |= {"fake_guidance_scale": 1.0, "fake_train_guidance_scale": 1.0}
DMD |= {"real_guidance_scale_min": GUIDANCE, "real_guidance_scale_max": GUIDANCE}
AC = {"enabled": True, "start_mode": "next_sigma", "end_timestep": 1000.0, "timestep_offset": 10.0}
AC |= {"min_renoise_step": 20, "max_renoise_step": 980, "all_include_terminal_when_no_random_stop": False}
AC |= {"target_formula_move_scale_out": True, "fake_loss_weight_clamp_min": 0.0, "fake_loss_weight_clamp_max": 10.0}
AC |= {"consistency_enabled": True, "consistency_weight": 0.01, "consistency_epsilon_timestep": 200.0}
AC |= {"consistency_num_steps": 1, "consistency_use_two_sample_unbiased": True}
AC |= {"consistency_stopgrad_transitions": True}  # all as in configs/cold_start


def trainer(networks: dict[str, GoldenNetwork], x_t: Tensor) -> Any:
    from rtdmd.trainers.ac_dmd_trainer import ACDMDTrainer

    class Idle:
        def zero_grad(self, **_: object) -> None: ...
        def step(self) -> None: ...
        def get_last_lr(self) -> list[float]:
            return [0.0]

    def predict(
        network: GoldenNetwork, x: Tensor, cond: Tensor, step: Tensor, pooled: object, **guidance: Any
    ) -> Tensor:
        on, scale = network(x, step / 1000, cond), guidance["guidance_scale"]
        if scale == 1:
            return on
        off = network(x, step / 1000, guidance["uncond_text_embeddings"])
        return off + scale * (on - off)

    def generate(cond: Tensor, *_: object, **__: object) -> Any:
        velocity = networks["student"](x_t, torch.full((len(x_t),), T, dtype=torch.float64), cond)
        return x_t - T * velocity, 2, {"x_t": x_t, "v_pred": velocity, "sigma": T, "sigma_next": S}

    made = ACDMDTrainer.__new__(ACDMDTrainer)
    solver = types.SimpleNamespace(max_grad_norm=0)
    made.config = types.SimpleNamespace(
        dmd=types.SimpleNamespace(**DMD),
        ac_dmd=types.SimpleNamespace(**AC),
        solver=types.SimpleNamespace(fake_score=solver, generator=solver),
    )
    made.scheduler, made._consistency_deterministic_warned = None, False
    made._generate_latents, made._predict_noise, made._autocast = generate, predict, nullcontext
    made.generator, made.fake_score_net = networks["student"], networks["fake_score"]
    made.teacher = networks["teacher"]
    made.optimizers = made.schedulers = {"generator": Idle(), "fake_score": Idle()}
    return made


def main() -> None:
    checkout = checkout_of(REPOSITORY, COMMIT)
    package("rtdmd", checkout / "rtdmd")
    package("rtdmd.trainers", checkout / "rtdmd/trainers")
    stub("rtdmd.config", "rtdmd.schedulers", "rtdmd.data", "rtdmd.data.prompt_dataset", "rtdmd.models")
    stub(
        "rtdmd.models.flux", "rtdmd.models.flux2_klein", "rtdmd.models.sd35", "rtdmd.parallel", "rtdmd.parallel.utils"
    )
    stub("rtdmd.utils", "rtdmd.utils.checkpoint", "rtdmd.utils.fast_init", "rtdmd.utils.lora")
    stub("rtdmd.trainers.base_trainer")
    import rtdmd.trainers.base_trainer as base

    base.BaseTrainer = object
    networks = {"student": GoldenNetwork(0), "teacher": GoldenNetwork(1), "fake_score": GoldenNetwork(2)}
    x_t, cond, uncond = normal(0, BATCH, *SHAPE), normal(1, BATCH, 4), normal(2, BATCH, 4)
    exit_noise, noise, back = (normal(3 + i, BATCH, *SHAPE) for i in range(3))
    u = torch.tensor([0.06, 0.4, 0.93], dtype=torch.float64)
    shared = {"x_t": x_t, "cond": cond, "uncond": uncond, "exit": exit_noise, "noise": noise, "u": u}
    made, arguments = trainer(networks, x_t), (cond, None, uncond, None)

    with called_with([exit_noise, noise, back], uniforms=[u]):
        metrics = made._update_generator(*arguments)
    given = {
        "back": back,
        "loss": torch.tensor(metrics["loss_dm"], dtype=torch.float64),
        "gradient": networks["student"].flat(),
    }
    function = "rtdmd/trainers/ac_dmd_trainer.py, ACDMDTrainer._update_generator"
    save_golden("ac_dmd_generator", shared | given, REPOSITORY, COMMIT, function)

    steps, two = torch.tensor([17, 200, 90]), [normal(10 + i, BATCH, *SHAPE) for i in range(2)]
    with called_with([exit_noise, noise, *two], [steps], [u]):
        metrics = made._update_fake_score(*arguments)
    given = {"steps": steps, "consistency1": two[0], "consistency2": two[1]}
    given |= {
        "loss": torch.tensor(metrics["loss_fake"], dtype=torch.float64),
        "gradient": networks["fake_score"].flat(),
    }
    function = "rtdmd/trainers/ac_dmd_trainer.py, ACDMDTrainer._update_fake_score"
    save_golden("ac_dmd_fake_score", shared | given, REPOSITORY, COMMIT, function)


if __name__ == "__main__":
    main()
