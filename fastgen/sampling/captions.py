"""Prompts below the pictures of a grid."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

SMALLEST = 128  # pixels: narrower pictures are enlarged to at least this, so that words fit below them
MOST_LINES = 3  # of a caption
PADDING = 2  # pixels around each picture, as in torchvision's grids


def captioned(pictures: Sequence[Image.Image], captions: Sequence[str], columns: int) -> Image.Image:
    """Pictures of one size in a grid, each with its caption below. A caption of more than three lines is cut, and ends
    with an ellipsis. The font has Latin, Greek and Cyrillic letters."""
    times = -(-SMALLEST // pictures[0].width)
    width, height = (side * times for side in pictures[0].size)
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", max(11, width // 24))
    texts = [wrapped(caption, font, width) for caption in captions]
    line = sum(font.getmetrics())
    across, down = width + PADDING, height + line * max(map(len, texts)) + PADDING
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * across + PADDING, rows * down + PADDING), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, lines) in enumerate(zip(pictures, texts, strict=True)):
        left, top = PADDING + i % columns * across, PADDING + i // columns * down
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
        for k, text in enumerate(lines):
            draw.text((left, top + height + k * line), text, "black", font)
    return sheet


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Breaks a text into lines of at most `width` pixels: between words, or inside a word that fills a line."""
    lines, rest = list[str](), " ".join(text.split())
    while rest and len(lines) < MOST_LINES:
        fits = next((n for n in range(len(rest), 1, -1) if font.getlength(rest[:n]) <= width), 1)
        space = rest.rfind(" ", 0, fits + 1)
        end = fits if fits == len(rest) or space < 1 else space
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    if rest:
        last = lines[-1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines[-1] = last + "…"
    return lines
