"""Writes assets/tones, for pipelines that are driven by a sound: for each prompt of assets/moving_digits_prompts.txt a
tone whose pitch follows the height of such a digit, as long as the videos of assets/teachers/moving_digits.

    python tools/make_tones.py assets/tones
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastgen.data.moving_digits import pitches, scenes_as_told, tones
from fastgen.data.prompts import read_prompts
from fastgen.data.sounds import ENDING, KEY

PICTURES = 25
SEED = 1


def write_tones(folder: Path) -> None:
    prompts = read_prompts("assets/moving_digits_prompts.txt")
    folder.mkdir(parents=True, exist_ok=True)
    sounds = tones(pitches(scenes_as_told(prompts, SEED), PICTURES))
    for i, (prompt, sound) in enumerate(zip(prompts, sounds, strict=True)):
        save_file({KEY: sound.to(torch.float16)}, folder / f"{i:02d}{ENDING}")
        (folder / f"{i:02d}.txt").write_text(f"{prompt}\n")


if __name__ == "__main__":
    write_tones(Path(sys.argv[1]))
