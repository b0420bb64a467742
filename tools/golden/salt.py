"""Numbers of the semigroup term of Salt's SC-DMD (XingtongGe/Salt), for tests/golden_video_dmd.py.

python tools/golden/salt.py CHECKOUT

Its training step is part of a long method. At run time the statements from the one that assigns `dt1` to the one that
fills `scfm_weights` are taken from pipeline/sc_training.py, and the body of the `if` that computes `sc_loss` from
model/sc_dmd.py, and executed with tensors of ours as their variables. The network is a GoldenNetwork that predicts the
velocity, whose channels are the frames of one chunk."""

import types
from typing import Any

import torch
import torch.nn.functional as F
from checkout import checkout_of
from draws import Float64, Random
from golden_rows import GoldenNetwork
from torch import Tensor

CHECKOUT = checkout_of("XingtongGe/Salt", "5fbb513543ac7cd335522d72fd70232a2ed4ab54")
PIPELINE, MODEL = "pipeline/sc_training.py", "model/sc_dmd.py"
BATCH, FRAMES, SHAPE = 2, 4, (3, 2, 2)
START, MIDDLE, END = 750, 500, 250


def main() -> None:
    student = GoldenNetwork(0)
    x, cond = Random(0).normal(BATCH, FRAMES, *SHAPE), Random(1).normal(BATCH, 4)

    def generator(noisy_image_or_video: Tensor, timestep: Tensor, **_: object) -> tuple[Tensor, Tensor]:
        t = timestep[:, 0].double() / 1000
        velocity = student(noisy_image_or_video, t, cond)
        return velocity, noisy_image_or_video - t[:, None, None, None, None] * velocity

    pipeline = types.SimpleNamespace(generator=generator, scfm_use_latent_target=True, frame_seq_length=1)
    pipeline.kv_cache1 = pipeline.crossattn_cache = None
    velocity, _ = generator(x, torch.full((BATCH, FRAMES), START))
    names: dict[str, Any] = {"torch": torch, "F": F, "self": pipeline, "noise": x, "noisy_input": x, "v1": velocity}
    names |= {"t_start": START, "t_mid": MIDDLE, "t_end": END, "batch_size": BATCH, "current_num_frames": FRAMES}
    names |= {
        "current_start_frame": 0,
        "conditional_dict": {},
        "scfm_weights": torch.zeros(BATCH, dtype=torch.float64),
    }
    names |= {f"scfm_{kind}_container": torch.zeros_like(x) for kind in ("target", "pred", "target_x0")}
    with Float64():
        CHECKOUT.execute(PIPELINE, "dt1 =", "if scfm_weights is not None", names)
        CHECKOUT.execute(PIPELINE, "if scfm_weights is not None:\n    scfm_weights[:] = 1 - t_start", None, names)
        names |= {"scfm_pred": names["scfm_pred_container"], "scfm_target": names["scfm_target_container"]}
        names["gradient_mask"] = None
        CHECKOUT.execute(MODEL, "mse =", "sc_loss = mse", names)
        CHECKOUT.execute(MODEL, "sc_loss = mse", None, names)
    loss = names["sc_loss"]
    given = {"x": x, "cond": cond, "levels": torch.tensor([START, MIDDLE, END]), "loss": loss}
    given |= {"gradient": student.gradient(loss)}
    function = "pipeline/sc_training.py, inference_with_trajectory, and model/sc_dmd.py, generator_loss (statements)"
    CHECKOUT.save("sc_dmd_semigroup", given, function)


if __name__ == "__main__":
    main()
