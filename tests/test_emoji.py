"""The emoji world: its CLIP on pictures that nobody trained on, through the project's own metrics."""

from pathlib import Path

import pytest
import torch

import fastgen
from benchmarks.emoji_style import cross_validated, reference, statistics
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


def test_no_prompt_of_training_is_a_held_out_caption() -> None:
    """Pairs of an emoji and a skin tone are held out whole; other emoji in one of their styles."""
    held = set(read_captions(EMOJI / "reference" / "metadata.csv", "caption"))
    prompts = set((EMOJI / "prompts.txt").read_text().splitlines())
    assert len(held) > 500 and not held & prompts


def test_the_judge_of_style_tells_real_pictures_apart() -> None:
    """By cross-validation on the held-out pictures themselves."""
    captions, pixels = reference()
    flat = torch.tensor([float(caption.endswith("flat")) for caption in captions])
    accuracy = cross_validated(statistics(pixels), flat)
    print(f"accuracy {accuracy:.3f}")
    assert accuracy > 0.95


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
