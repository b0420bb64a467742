"""Numbers of LightX2V's Phased DMD (ModelTC/LightX2V), for tests/golden_phased_dmd.py.

python tools/golden/lightx2v.py CHECKOUT

PhasedRolloutEngine works on the attributes of a trainer. Here these are GoldenNetworks that predict the velocity, the
authors' scheduler with a list of four levels, and the authors' functions of phased_dmd/math.py and dmd/math.py."""

import types
from typing import Any

import torch
from called import called_with, checkout_of, gradients_of, normal, package, stub
from golden_rows import GoldenNetwork, save_golden
from torch import Tensor

REPOSITORY, COMMIT = "ModelTC/LightX2V", "f8aee98b5462cca8d7288888146ebd95592bf266"
BATCH, SHAPE, LEVELS, FIRST_OF_LOW = 3, (4, 2, 2), (1.0, 0.8, 0.5, 0.25, 0.0), 2
FOLDER = "lightx2v_train/lightx2v_train"


def rollout_engine(networks: dict[str, GoldenNetwork], exit_step: int) -> Any:
    from lightx2v_train.schedulers.dmd_scheduler import DMDFlowMatchingScheduler
    from lightx2v_train.trainers.dmd import math as dmd
    from lightx2v_train.trainers.phased_dmd import math as phased
    from lightx2v_train.trainers.phased_dmd.rollout import PhasedRolloutEngine

    scheduler = DMDFlowMatchingScheduler.__new__(DMDFlowMatchingScheduler)
    scheduler.sigmas = torch.tensor(LEVELS, dtype=torch.float64)
    scheduler.set_timesteps = lambda *_, **__: None  # type: ignore[method-assign]
    roles = {role: types.SimpleNamespace(transformer=network, device="cpu") for role, network in networks.items()}

    def levels_of(raw: Tensor, dtype: object) -> Tensor:
        return raw.double() / 1000  # without warp_denoising_step

    def score_levels(batch: int, low: int, high: int, device: object, dtype: object) -> Tensor:
        return phased.sample_score_sigma_range(
            batch,
            low,
            high,
            device="cpu",
            dtype=torch.float64,
            score_timestep_min=20,
            score_timestep_max=980,
            num_train_timestep=1000,
            convert_timesteps=levels_of,
            broadcast_value=lambda value: value,
        )

    trainer = types.SimpleNamespace(
        scheduler=scheduler,
        num_inference_steps=4,
        denoising_sigmas=scheduler.sigmas,
        denoising_steps=1000 * scheduler.sigmas,
        match_step_index=FIRST_OF_LOW,
        match_timestep=int(1000 * LEVELS[FIRST_OF_LOW]),
        score_timestep_margin=20,
        num_train_timestep=1000,
        running_dtype=torch.float64,
        guidance_distill=4.0,
        cfg_norm="none",
        dmd_norm_clip_min=1e-4,
        diversity_trick=types.SimpleNamespace(minimum_dmd_step_index=0),
        model=roles["student"],
        student_2_model=roles["student"],
        teacher_model=roles["teacher"],
        fake_model=roles["fake_score"],
        _sample_synced_int=lambda low, high: exit_step,
        _predict_velocity=lambda model, x, sigma, cond: model.transformer(x, sigma, cond),
        _euler_step=dmd.euler_step,
        _do_cfg=dmd.do_cfg,
        _dmd_loss=dmd.dmd_loss,
        _phase_sigma=lambda batch, dtype: torch.full((batch,), LEVELS[FIRST_OF_LOW], dtype=torch.float64),
        _raw_timestep_from_warped_step=lambda step: int(step),
        _sample_score_sigma_range=score_levels,
        _phased_forward=lambda *args: phased.phased_forward(*args, 1e-8),
        _phased_velocity_target=lambda *args: phased.phased_velocity_target(*args, 1e-8),
        _fake_model_for_dmd=lambda region, branch: roles["fake_score"],
    )
    return PhasedRolloutEngine(trainer)


def main() -> None:
    root = checkout_of(REPOSITORY, COMMIT) / FOLDER
    for name in ("", ".trainers", ".trainers.dmd", ".trainers.phased_dmd", ".schedulers", ".runtime"):
        package(f"lightx2v_train{name}", root / name.replace(".", "/").strip("/"))
    stub(
        "lightx2v_train.tricks", "lightx2v_train.runtime.sequence_parallel", "lightx2v_train.utils.registry", "loguru"
    )
    import lightx2v_train.runtime.sequence_parallel as parallel

    parallel.broadcast_sequence_parallel_value = lambda value: value
    networks = {"student": GoldenNetwork(0), "teacher": GoldenNetwork(1), "fake_score": GoldenNetwork(2)}
    noise, cond, uncond = normal(0, BATCH, *SHAPE), normal(1, BATCH, 4), normal(2, BATCH, 4)
    shared, first = {"cond": cond, "uncond": uncond}, 1000 * LEVELS[FIRST_OF_LOW] + 20

    engine, index, fresh = rollout_engine(networks, 1), torch.tensor([3, 130, 420]), normal(3, BATCH, *SHAPE)
    x_s, x0, s, _ = engine._run_region_rollout(cond, [BATCH, *SHAPE], "high", True, noise)
    with called_with([fresh], [index]):
        loss = engine._dmd_loss_for_region(x_s, x0, s, (cond, uncond), "high", "high")
    given = {"initial": noise, "stop": torch.tensor(1), "t": (first + index).double() / 1000, "noise": fresh}
    given |= {"loss": loss, "gradient": gradients_of(networks["student"], loss)}
    function = "trainers/phased_dmd/rollout.py, PhasedRolloutEngine._run_region_rollout and _dmd_loss_for_region"
    save_golden("phased_dmd_generator", shared | given, REPOSITORY, COMMIT, f"{FOLDER}/{function}")

    index, fresh = torch.tensor([0, 200, 440]), normal(4, BATCH, *SHAPE)
    with called_with([fresh], [index]):
        loss = engine._fake_loss_for_score_range(engine.fake_model, x_s.detach(), s, cond, int(first), 1000)
    given = {"x_s": x_s, "t": (first + index).double() / 1000, "noise": fresh, "loss": loss}
    given |= {"gradient": gradients_of(networks["fake_score"], loss)}
    function = "trainers/phased_dmd/rollout.py, PhasedRolloutEngine._fake_loss_for_score_range"
    save_golden("phased_dmd_fake_score", shared | given, REPOSITORY, COMMIT, f"{FOLDER}/{function}")


if __name__ == "__main__":
    main()
