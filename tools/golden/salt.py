"""Numbers of the semigroup term of Salt's SC-DMD (XingtongGe/Salt), for tests/golden_video_dmd.py.

python tools/golden/salt.py CHECKOUT

Its training step is part of a long method. At run time the statements from the one that assigns `dt1` to the one that
fills `scfm_weights` are taken from pipeline/sc_training.py, and the body of the `if` that computes `sc_loss` from
model/sc_dmd.py, and executed with tensors of ours as their variables. The network is a GoldenNetwork that predicts the
velocity, whose channels are the frames of one chunk."""

import ast
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from called import called_with, checkout_of, gradients_of, normal
from golden_rows import GoldenNetwork, save_golden
from torch import Tensor

REPOSITORY, COMMIT = "XingtongGe/Salt", "5fbb513543ac7cd335522d72fd70232a2ed4ab54"
BATCH, FRAMES, SHAPE = 2, 4, (3, 2, 2)
START, MIDDLE, END = 750, 500, 250


def statements(path: Path, first: str, last: str) -> Any:
    """The statements of one block from the one that assigns `first` to the one that contains `last`, compiled."""
    for node in ast.walk(ast.parse(path.read_text())):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        begin = [
            i for i, part in enumerate(body) if isinstance(part, ast.Assign) and ast.unparse(part).startswith(first)
        ]
        end = [i for i, part in enumerate(body) if last in ast.unparse(part)]
        if begin and end and begin[0] <= end[-1]:
            return compile(ast.Module(body[begin[0] : end[-1] + 1], []), str(path), "exec")
    raise SystemExit(f"{path} has no statements from {first} to {last}")


def main() -> None:
    checkout = checkout_of(REPOSITORY, COMMIT)
    student = GoldenNetwork(0)
    x, cond = normal(0, BATCH, FRAMES, *SHAPE), normal(1, BATCH, 4)

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
    with called_with():
        exec(statements(checkout / "pipeline/sc_training.py", "dt1 =", "scfm_weights[:]"), names)
        names |= {"scfm_pred": names["scfm_pred_container"], "scfm_target": names["scfm_target_container"]}
        names["gradient_mask"] = None
        exec(statements(checkout / "model/sc_dmd.py", "mse =", "sc_loss ="), names)
    loss = names["sc_loss"]
    given = {"x": x, "cond": cond, "levels": torch.tensor([START, MIDDLE, END]), "loss": loss}
    given |= {"gradient": gradients_of(student, loss)}
    function = "pipeline/sc_training.py, inference_with_trajectory, and model/sc_dmd.py, generator_loss (statements)"
    save_golden("sc_dmd_semigroup", given, REPOSITORY, COMMIT, function)


if __name__ == "__main__":
    main()
