"""The emoji world: its CLIP on pictures that nobody trained on, through the project's own metrics."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import fastgen
from benchmarks import emoji, emoji_style
from benchmarks.rows import read_rows
from fastgen.data.tables import read_captions

EMOJI = Path(__file__).parents[1] / "assets" / "emoji"
CLIP = str(EMOJI / "clip")


def test_captions_fit_their_own_held_out_pictures_best() -> None:
    """Twelve pictures in both styles: each is nearer to its caption than to the next one's, on the mean by far."""
    captions = read_captions(EMOJI / "reference" / "metadata.csv", "caption")[:120:10]
    pictures = [EMOJI / "reference" / f"{number:03}.webp" for number in range(0, 120, 10)]
    own, other = (
        torch.tensor(fastgen.score(pictures, said, "clip_score", path=CLIP))
        for said in (captions, captions[1:] + captions[:1])
    )
    assert (own - other).mean() > 0.3 and (own > other).float().mean() > 0.8


def test_the_preference_model_prefers_whole_pictures_and_those_of_the_caption() -> None:
    """Held-out pictures, beside the same ones at a quarter of their size, and beside other pictures."""
    captions = read_captions(EMOJI / "reference" / "metadata.csv", "caption")[:240:10]
    pixels = pixels_of([EMOJI / "reference" / f"{number:03}.webp" for number in range(0, 240, 10)])
    coarse = F.interpolate(F.interpolate(pixels, scale_factor=0.25, mode="area"), scale_factor=4, mode="nearest")
    whole, blocks, others = (
        torch.tensor(fastgen.score(list(shown), captions, "pickscore", path=str(EMOJI / "preference")))
        for shown in (pixels, coarse, pixels.roll(1, 0))
    )
    shares = [float((whole > worse).double().mean()) for worse in (blocks, others)]
    print(f"prefers {shares}; means {[round(float(v.mean()), 2) for v in (whole, blocks, others)]}")
    assert min(shares) > 0.85


def test_no_prompt_of_training_is_a_held_out_caption() -> None:
    """Pairs of an emoji and a skin tone are held out whole; other emoji in one of their styles."""
    held = set(read_captions(EMOJI / "reference" / "metadata.csv", "caption"))
    prompts = set((EMOJI / "prompts.txt").read_text().splitlines())
    assert len(held) > 500 and not held & prompts


@pytest.mark.slow
def test_the_judge_of_style_tells_real_pictures_apart() -> None:
    """Taught by two thirds of the held-out pictures, asked about the others."""
    captions = read_captions(EMOJI / "reference" / "metadata.csv", "caption")
    flat = torch.tensor([float(caption.endswith("flat")) for caption in captions])
    pixels = pixels_of([EMOJI / "reference" / f"{number:03}.webp" for number in range(len(captions))])
    torch.manual_seed(0)
    asked = torch.arange(len(captions)) % 3 == 0
    judge = emoji_style.taught(pixels[~asked], flat[~asked])
    accuracy = float((judge.flat(pixels[asked]).float() == flat[asked]).float().mean())
    print(f"accuracy {accuracy:.3f}")
    assert accuracy > 0.9


def pixels_of(files: list[Path]) -> Tensor:
    pictures = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def test_the_pages_have_the_rows_that_were_measured() -> None:
    table = emoji.table(read_rows(emoji.TABLE))
    assert table.count("\n") > 12
    for page in (emoji.PAGE, EMOJI.parents[1] / "benchmarks/leaderboard/report.md"):
        assert table in page.read_text(), page
    assert emoji_style.table(read_rows(emoji_style.TABLE)) in emoji.PAGE.read_text()


def test_the_names_leave_the_style_open() -> None:
    captions = read_captions(EMOJI / "reference" / "metadata.csv", "caption")
    held = (EMOJI / "held_out_names.txt").read_text().splitlines()
    assert held == list(dict.fromkeys(caption.rpartition(",")[0] for caption in captions))


def test_all_that_ships_of_it_is_small() -> None:
    assert sum(path.stat().st_size for path in EMOJI.rglob("*") if path.is_file()) < 25e6
    assert (EMOJI / "NOTICE").is_file()


@pytest.mark.slow
def test_held_out_captions_are_found(tmp_path: Path) -> None:
    """Among 693 pictures."""
    found = fastgen.evaluate(
        EMOJI / "reference",
        metrics="clip_retrieval",
        features="clip",
        clip=CLIP,
        reference=str(EMOJI / "reference"),
        output=tmp_path / "results.json",
    )["metrics"]
    print(found)
    assert found["clip_retrieval"] > 0.55 and found["clip_retrieval_5"] > 0.78
