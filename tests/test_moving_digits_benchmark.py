"""What benchmarks/streaming/moving_digits.py says of a changed prompt, on videos whose answer is known."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.streaming.moving_digits import after_a_change, turned_prompt
from fastgen.data.digits import load_digits
from fastgen.data.moving_digits import placement


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
