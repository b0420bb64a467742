"""The held-out pictures with their captions, and the prompts of the pictures that are trained on."""

import csv
from pathlib import Path

from emoji_pictures import WORDINGS, Emoji, split
from PIL import Image
from torch import Tensor


def write_reference(output: Path, work: Path) -> None:
    """Writes reference/, the held-out pictures in a table with captions, and prompts.txt, a prompt for every picture
    that is trained on, its wordings in turn."""
    write_pictures(output / "reference", *split(work, held=True))
    emoji, _ = split(work, held=False)
    prompts = [e.prompt(i % len(WORDINGS)) for i, e in enumerate(emoji)]
    (output / "prompts.txt").write_text("\n".join(dict.fromkeys(prompts)) + "\n")


def write_pictures(folder: Path, emoji: list[Emoji], pixels: Tensor) -> None:
    """Lossless pictures [N, 3, S, S] uint8 and a metadata.csv in the layout of ImageFolder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metadata.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("file_name", "caption"))
        for number, (e, picture) in enumerate(zip(emoji, pixels, strict=True)):
            name = f"{number:03}.webp"
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / name, lossless=True, quality=100, method=6)
            table.writerow((name, e.prompt(0)))
