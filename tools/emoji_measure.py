"""What the emoji teacher reaches, beside its training pictures and what its autoencoder makes of real ones."""

import json
from pathlib import Path
from typing import Any

import torch
from emoji_clip import read_clip, retrieval
from emoji_pictures import split
from emoji_reference import write_pictures
from emoji_vae import encode_raw, psnr, read_vae

import fastgen

METRICS = "fid,mmd,precision_recall,clip_retrieval,clip_score"
GUIDANCE = (1.0, 2.0, 3.0, 5.0)
STEPS = (50, 8, 4, 1)


def measure(output: Path, work: Path, seed: int) -> None:
    """Writes metrics.json. Every number compares with the held-out pictures in reference/, in CLIP's features."""
    clip, teacher = output / "clip", output / "teacher"
    reference = output / "reference"
    options = {
        "metrics": METRICS,
        "features": "clip",
        "clip": str(clip),
        "reference": str(reference),
        "scorers": {"clip_score": {"path": str(clip)}},
        "seed": seed,
    }
    held, pixels = split(work, held=True)
    network, tokenizer = read_clip(clip)
    found: dict[str, Any] = {"held_out": retrieval(network, tokenizer, held, pixels.float() / 255)}
    vae = read_vae(teacher)
    found["autoencoder_psnr"] = psnr(vae, pixels)
    emoji, seen = split(work, held=False)
    chosen = torch.randperm(len(emoji), generator=torch.Generator().manual_seed(seed))[: len(held)]
    write_pictures(work / "measured/training", [emoji[i] for i in chosen.tolist()], seen[chosen])
    again = torch.cat([vae.decode(part).sample for part in encode_raw(vae, pixels).split(64)]) / 2 + 0.5
    write_pictures(work / "measured/autoencoder", held, (again.clamp(0, 1) * 255).round().to(torch.uint8))
    for name in ("training", "autoencoder"):
        found[name] = fastgen.evaluate(work / "measured" / name, **options)["metrics"]
    found["held_out"] |= fastgen.evaluate(reference, **options)["metrics"]
    options |= {"num_samples": len(held)}
    for scale in GUIDANCE:
        row = fastgen.evaluate(teacher, guidance_scale=scale, num_steps=STEPS[0], **options)
        found.setdefault("teacher", []).append({"guidance": scale, "steps": STEPS[0], **row["metrics"]})
    best = min(found["teacher"], key=lambda row: row["fid"])["guidance"]
    for steps in STEPS[1:]:
        row = fastgen.evaluate(teacher, guidance_scale=best, num_steps=steps, **options)
        found["teacher"].append({"guidance": best, "steps": steps, **row["metrics"]})
    (output / "metrics.json").write_text(json.dumps(found, indent=2) + "\n")
