"""Trains a style slider on the emoji teacher, an adapter between "3d" and "flat", and measures what it does to the
teacher and to students that were distilled without it.

    python benchmarks/emoji_slider.py runs/emoji_dmd2_4step runs/emoji_dmd2_1step

Concept sliders (arXiv 2311.12092): at noised pictures, the teacher with the adapter learns for a name without a style

    v(x_t, name) + strength (v(x_t, "name, flat") - v(x_t, "name, 3d")),      v: the velocity of the teacher without it

The pictures are the teacher's own, and training takes about five minutes of one core. The slider is kept in --work.
For each path and each scale, a row of emoji_slider.jsonl has what benchmarks/emoji_style.py measures, with one judge,
which learns from the teacher's pictures: flat_judged is the share of flat pictures, clip_retrieval the alignment."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.emoji_style import EMOJI, held_out_names, make_judge, numbers, pictures
from benchmarks.rows import append_row
from fastgen.backbones.base import RoleOptions
from fastgen.backbones.sd3 import SD3Config
from fastgen.modules.lora import LoraConfig
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.adapters import Adapter, with_adapters
from fastgen.sampling.sampler import Sampler, load_sampler, teacher_sampler

TABLE = Path(__file__).resolve().with_name("emoji_slider.jsonl")
TEACHER = EMOJI / "teacher"
RANK, RATE, UPDATES, BATCH, STRENGTH = 8, 1e-3, 200, 32, 2.0
PICTURES = 512  # of the teacher, which are noised
SCALES = (-1.0, 0.0, 1.0, 2.0)
GUIDANCE, STEPS = 2.0, 4  # of the teacher


def train_slider(folder: Path) -> None:
    """Writes the adapter as diffusers' users have it, pytorch_lora_weights.safetensors, into the folder."""
    torch.manual_seed(0)
    roles = RoleOptions({"student": LoraConfig(rank=RANK)})
    backbone = SD3Config(path=str(TEACHER)).build(torch.device("cpu"), torch.float32, 0, roles)
    student, teacher = backbone.load("student"), backbone.load("teacher")
    student.reset(0)
    names = (EMOJI / "names.txt").read_text().splitlines()
    chosen = [names[i] for i in torch.randperm(len(names))[:PICTURES]]
    x0 = clean_latents(teacher_sampler(backbone, STEPS, GUIDANCE, teacher), chosen)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    for _ in tqdm(range(UPDATES), desc="slider"):
        rows = torch.randint(PICTURES, (BATCH,))
        t = torch.rand(BATCH)
        x_t = torch.lerp(x0[rows], torch.randn_like(x0[rows]), t[:, None, None, None])
        prompts = [chosen[i] for i in rows.tolist()]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            plain, flat, solid = (
                teacher(x_t, t, backbone.encode_prompts([p + style for p in prompts]), predict="flow_prediction")
                for style in ("", ", flat", ", 3d")
            )
        with torch.autocast("cpu", torch.bfloat16):
            found = student(x_t, t, backbone.encode_prompts(prompts), predict="flow_prediction")
        loss = (found.float() - (plain + STRENGTH * (flat - solid)).float()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"last loss {loss.item():.4f}")
    backbone.save_pipeline(student, RolloutPolicy((1.0,)), folder)


def clean_latents(sampler: Sampler, names: list[str]) -> Tensor:
    """Latents of the teacher's pictures of these names."""
    parts = [
        sampler.latents(names[i : i + 64], range(i, min(i + 64, len(names)))) for i in tqdm(range(0, len(names), 64))
    ]
    return torch.cat(parts)


def open_sampler(path: Path) -> Sampler:
    return load_sampler(path, num_steps=STEPS, guidance_scale=GUIDANCE) if path == TEACHER else load_sampler(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="+", type=Path, help="runs or exports")
    parser.add_argument("--work", type=Path, default=Path("build/emoji_slider"))
    parser.add_argument("--names", type=int, default=490, help="how many held-out names are sampled")
    parser.add_argument("--table", type=Path, default=TABLE)
    arguments = parser.parse_args()
    if not any(arguments.work.glob("*.safetensors")):
        train_slider(arguments.work)
    judge, about = make_judge(open_sampler(TEACHER))
    print(about)
    names = held_out_names()[: arguments.names]
    for path in (TEACHER, *arguments.students):
        for scale in SCALES:
            sampler = with_adapters(open_sampler(path), [Adapter(arguments.work, scale)])
            row = numbers(pictures(sampler, names), names, judge)
            append_row(arguments.table, {"name": f"{path.name}, slider {scale:g}", **about, **row})
            print(path.name, scale, {key: round(value, 3) for key, value in row.items()})


if __name__ == "__main__":
    main()
