"""What benchmarks/streaming say of a changed prompt, and of tones, on videos whose answer is known."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.streaming.moving_digits import after_a_change, turned_prompt
from benchmarks.streaming.tones import tone_scores
from fastgen.data.digits import load_digits
from fastgen.data.moving_digits import placement, tones


def video(turns_at: int) -> Tensor:
    """A seven that moves right, and up from this picture on; 25 pictures [1, 25, 3, 32, 32]."""
    digits, labels = load_digits("test", 16)
    seven = digits[int((labels == 7).nonzero()[0]), 0]
    picture = torch.arange(25)
    rows = 16.0 - (picture - turns_at).clamp(min=0) * 0.5
    columns = picture.clamp(max=turns_at) * 0.5
    drawn = placement(rows) @ seven @ placement(columns).mT
    return drawn[None, :, None].expand(-1, -1, 3, -1, -1)


@pytest.mark.parametrize(("turns_at", "turned"), [(12, 1.0), (16, 1.0), (20, 0.0), (24, 0.0)])
def test_a_video_has_turned_if_its_second_chunk_with_the_new_prompt_moves_so(turns_at: int, turned: float) -> None:
    """The prompt changes with picture 13; the second chunk is made of the pictures 17 to 20."""
    found = after_a_change([video(turns_at)], [["a seven moving up, slowly"]])
    assert found["turned"] == turned and found["kept"] == 1.0
    assert after_a_change([video(turns_at)], [["a two moving up, slowly"]])["kept"] == 0.0


def test_the_new_prompt_keeps_digit_and_speed() -> None:
    assert turned_prompt("a seven moving right, slowly") == "a seven moving up, slowly"
    assert turned_prompt("a two moving down, fast") == "a two moving right, fast"


@pytest.mark.parametrize(("higher", "off"), [(0.0, 0.0), (2.0, 0.0), (-2.0, 0.0), (4.0, 1.0)])
def test_a_tone_is_as_far_from_its_digit_as_it_is_too_high_or_too_low(higher: float, off: float) -> None:
    """A square of 16 pixels, whose upper edge moves down from row 4 to 10: its middle is 20 to 14 above the border."""
    rows = 4.0 + torch.arange(25) // 4
    drawn = placement(rows) @ torch.ones(16, 16) @ placement(torch.full((25,), 8.0)).mT
    found = tone_scores([drawn[None, :, None].expand(-1, -1, 3, -1, -1)], [tones(24 - rows + higher)[None]])
    assert found["tone_error"] == pytest.approx(abs(higher), abs=1e-4) and found["off"] == off
    assert found["late"] == pytest.approx(abs(higher), abs=1e-4) and found["loudness"] == pytest.approx(1, abs=0.05)
