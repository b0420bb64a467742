"""Make the moving digits teacher: a real, tiny Wan text-to-video folder.

Everything is trained from scratch on scikit-learn's handwritten digits, the held-out third never seen:

    python tools/make_moving_digits_teacher.py --work build/moving_digits

The same command continues an interrupted training from the checkpoints in --work. Stages may also be run one by one;
each reads what the earlier ones wrote.
"""

import argparse
from pathlib import Path

import torch
from moving_digits_card import write_card
from moving_digits_measure import measure
from moving_digits_transformer import make_latents, make_text, train_transformer
from moving_digits_vae import train_vae

STAGES = ("vae", "text", "latents", "transformer", "measure", "card")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("assets/teachers/moving_digits"))
    parser.add_argument("--work", type=Path, required=True, help="a folder for checkpoints, outside the repository")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="in their usual order")
    parser.add_argument("--vae-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=9000, help="training steps of the transformer")
    parser.add_argument("--videos", type=int, default=500, help="measured for each number")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.5, 4.0], help="scales to measure at")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the transformer")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    folder, work, seed = args.output, args.work, args.seed
    run = {
        "vae": lambda: train_vae(folder, work / "vae", seed, args.vae_steps),
        "text": lambda: make_text(folder, seed),
        "latents": lambda: make_latents(folder, work, seed),
        "transformer": lambda: train_transformer(folder, work, seed, args.steps, args.device),
        "measure": lambda: measure(folder, args.guidance, args.videos, seed),
        "card": lambda: write_card(folder, work, seed),
    }
    for stage in STAGES:
        if stage in args.stages:
            run[stage]()


if __name__ == "__main__":
    main()
