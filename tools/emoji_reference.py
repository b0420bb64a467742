"""The held-out pictures with their captions, and the prompts of the pictures that are trained on."""

import csv
from pathlib import Path

from emoji_pictures import WORDINGS, Emoji, split
from PIL import Image
from torch import Tensor


def write_reference(output: Path, work: Path) -> None:
    """Writes reference/, the held-out pictures in a table with captions; prompts.txt, a prompt for every picture that
    is trained on, its wordings in turn; and the names of both, which leave the style open: names.txt of the pictures
    that are trained on, and held_out_names.txt."""
    held, pixels = split(work, held=True)
    emoji, _ = split(work, held=False)
    write_pictures(output / "reference", held, pixels)
    write_lines(output / "prompts.txt", [e.prompt(i % len(WORDINGS)) for i, e in enumerate(emoji)])
    write_lines(output / "names.txt", [e.name for e in emoji])
    write_lines(output / "held_out_names.txt", [e.name for e in held])


def write_lines(path: Path, lines: list[str]) -> None:
    """Each different line once."""
    path.write_text("\n".join(dict.fromkeys(lines)) + "\n")


def write_training(work: Path) -> None:
    """Writes training/ into `work`, the pictures that are not held out: for recipes that train on pictures."""
    if not (work / "training/metadata.csv").is_file():
        write_pictures(work / "training", *split(work, held=False), effort=0)


def write_pictures(folder: Path, emoji: list[Emoji], pixels: Tensor, effort: int = 6) -> None:
    """Lossless pictures [N, 3, S, S] uint8 and a metadata.csv in the layout of ImageFolder. effort: 0 to 6, of the
    compression; the most is a hundred times slower than the least."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [("file_name", "caption")]
    for number, (e, picture) in enumerate(zip(emoji, pixels, strict=True)):
        rows.append((f"{number:03}.webp", e.prompt(0)))
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        image.save(folder / rows[-1][0], lossless=True, quality=100, method=effort)
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
