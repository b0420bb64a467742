"""The README of the moving digits teacher's folder, from what was measured."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

from diffusers import WanPipeline
from torch import nn
from training import progress

ROWS = {
    "accuracy, mean over pictures": "video_accuracy",
    "accuracy, first latent frame": "video_accuracy_first",
    "accuracy, last latent frame": "video_accuracy_last",
    "told direction": "direction_accuracy",
    "speed error, pixels a picture": "speed_error",
    "wander across, pixels": "wander",
    "brightness, late / early": "mass_ratio",
    "frozen videos": "freeze_share",
    "flicker": "flicker",
}


def write_card(folder: Path, work: Path, seed: int) -> None:
    """Write README.md and training.json."""
    measured = json.loads((folder / "metrics.json").read_text())
    training = {name: progress(work / name) for name in ("vae", "transformer")}
    machine = {
        "seed": seed,
        "device": f"one CPU thread ({platform.machine()})",
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "scikit-learn")},
    }
    (folder / "training.json").write_text(json.dumps({**training, **machine}, indent=2) + "\n")
    (folder / "README.md").write_text(card(measured, training, machine, sizes(folder)))


def sizes(folder: Path) -> str:
    """Rows of a table: the parameters of each network."""
    pipe = WanPipeline.from_pretrained(folder)
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return "\n".join(f"| {name} | {sum(p.numel() for p in part.parameters()):,} |" for name, part in networks.items())


def table(measured: dict) -> str:
    """The measured numbers: the data, the autoencoder alone, and the teacher at each guidance."""
    columns = {
        "data": measured["data"],
        "autoencoder alone": measured["autoencoder"],
        "autoencoder alone, 49 pictures": measured["autoencoder_49_frames"],
        "autoencoder alone, 109 pictures": measured["autoencoder_109_frames"],
    }
    columns |= {f"teacher, guidance {row['guidance']:g}": row for row in measured["teacher"]}
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for text, key in ROWS.items():
        lines.append(f"| {text} | {' | '.join(f'{column[key]:.3f}' for column in columns.values())} |")
    return "\n".join(lines)


def by_latent_frame(measured: dict) -> str:
    """The accuracy of every latent frame, a row for each of the columns above that has seven of them."""
    rows = {"autoencoder alone": measured["autoencoder"]}
    rows |= {f"teacher, guidance {row['guidance']:g}": row for row in measured["teacher"]}
    lines = ["| latent frame | 1 | 2 | 3 | 4 | 5 | 6 | 7 |", "|---" * 8 + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{share:.3f}' for share in row['accuracy_by_latent_frame'])} |")
    return "\n".join(lines)


def card(measured: dict, training: dict, machine: dict, parts: str) -> str:
    best = max(measured["teacher"], key=lambda row: row["video_accuracy"])
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    vae, transformer = training["vae"], training["transformer"]
    psnr, psnr_49 = (measured[name]["psnr"] for name in ("autoencoder", "autoencoder_49_frames"))
    return f"""---
license: apache-2.0
inference:
  parameters: {{guidance_scale: {best["guidance"]}, num_inference_steps: 25}}
---

# Moving digits teacher

A real, tiny Wan pipeline that draws videos of a handwritten digit moving and bouncing, 32x32 pixels. It exists so that
distillation into streaming video students can be run and tested in minutes on a CPU. Made by
`tools/make_moving_digits_teacher.py`.

```python
from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained("assets/teachers/moving_digits")
video = pipe(
    "a seven moving right, fast", height=32, width=32, num_frames=25, max_sequence_length=16,
    num_inference_steps=25, guidance_scale={best["guidance"]:g},
).frames[0]
```

Prompts it knows: "a seven moving right, fast", for each digit from zero to nine (or "digit"), right, left, up, down
(or none) and fast or slowly (or none): "a digit moving up", "a two moving, slowly"; and the empty prompt, for
guidance. Other words were never trained on. A fast digit moves one pixel a picture, a slow one half a pixel.

## Data and licence

Trained from scratch on 1,198 of the 1,797 digits that scikit-learn ships (the test part of the UCI "Optical
Recognition of Handwritten Digits" data, E. Alpaydin and C. Kaynak, 1998, CC BY 4.0), enlarged from 8x8 to 16x16. The
other 599 are held out: the networks never saw them. Nothing was taken from another model, so no other model's licence
applies; the weights go under the licence of this repository.

## What it is

| part | parameters |
|---|---|
{parts}

25 pictures make 7 latent frames of 4x4 tokens. The text encoder is random and frozen; the transformer learned to read
it. Scheduler shift 3.

The autoencoder had {vae["steps"]:,} steps in {vae["minutes"]:.0f} CPU minutes, the transformer
{transformer["steps"]:,} steps in {transformer["minutes"]:.0f}, both on {machine["device"]}; seed {machine["seed"]};
{versions}. The weights are the running averages.

## Measured

{measured["videos"]} prompts that state everything, 25 steps, by the metrics `video_accuracy`, `motion_error` and
`drift`. The columns "autoencoder alone" are videos of held-out digits, encoded and decoded: what a perfect
transformer would reach. Its PSNR is {psnr:.1f} dB, {psnr_49:.1f} dB with 49 pictures. 109 pictures were measured on a
quarter of the videos.

{table(measured)}

{by_latent_frame(measured)}
"""
