"""Make the emoji world: pictures, a CLIP, a preference model, a text-to-image teacher, and held-out references, from
two npm packages.

    python tools/make_emoji_world.py --work build/emoji

The same command continues an interrupted training from the checkpoints in --work. Stages may also be run one by one;
each reads what the earlier ones wrote. `pictures` needs npm, to install the packages into --work."""

import argparse
from pathlib import Path

import torch
from emoji_clip import train_clip
from emoji_measure import measure
from emoji_pictures import make_pictures
from emoji_preference import train_preference
from emoji_reference import write_reference, write_training
from emoji_transformer import train_transformer
from emoji_vae import train_vae

STAGES = ("pictures", "clip", "preference", "vae", "transformer", "reference", "measure")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("assets/emoji"))
    parser.add_argument("--work", type=Path, required=True, help="a folder for checkpoints, outside the repository")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="in their usual order")
    parser.add_argument("--clip-steps", type=int, default=1500)
    parser.add_argument("--preference-steps", type=int, default=400)
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=7000, help="training steps of the transformer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="faster on a processor that multiplies bfloat16")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    work, seed = args.work, args.seed
    clip, teacher = args.output / "clip", args.output / "teacher"

    def pictures() -> None:
        make_pictures(work, seed)
        write_training(work)

    run = {
        "pictures": pictures,
        "clip": lambda: train_clip(clip, work, seed, args.clip_steps, args.bf16),
        "preference": lambda: train_preference(
            args.output / "preference", clip, work, seed, args.preference_steps, args.bf16
        ),
        "vae": lambda: train_vae(teacher, clip, work, seed, args.vae_steps, args.bf16),
        "transformer": lambda: train_transformer(teacher, work, seed, args.steps, args.bf16),
        "reference": lambda: write_reference(args.output, work),
        "measure": lambda: measure(args.output, work, seed),
    }
    for stage in STAGES:
        if stage in args.stages:
            run[stage]()


if __name__ == "__main__":
    main()
