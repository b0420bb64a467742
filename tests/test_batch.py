"""Conditioning and the draws of a batch."""

import pytest
import torch

from fastgen.batch import Batch, Conditioning

COND = Conditioning({"a": torch.arange(6.0).reshape(3, 2), "b": torch.tensor([7, 8, 9])})


def make(ids: list[int], group: list[int] | None = None) -> Batch:
    groups = None if group is None else torch.tensor(group)
    return Batch(torch.tensor(ids), 5, COND, COND, (2, 2), group=groups, dtype=torch.float64)


def test_conditioning_selects_repeats_and_concatenates_rows() -> None:
    assert COND.select(torch.tensor([2, 0]))["b"].tolist() == [9, 7]
    assert COND.select(slice(1, None))["a"].tolist() == [[2, 3], [4, 5]]
    assert COND.repeat(2)["b"].tolist() == [7, 7, 8, 8, 9, 9]
    assert Conditioning.cat([COND, COND.select(slice(0, 1))])["b"].tolist() == [7, 8, 9, 7]
    with pytest.raises(ValueError, match="keys"):
        Conditioning.cat([COND, Conditioning({"a": COND["a"]})])


def test_rows_of_a_draw_are_the_rows_of_the_whole() -> None:
    batch, rows = make([4, 9, 2]), torch.tensor([2, 0])
    assert torch.equal(batch.normal("x", rows=rows), batch.normal("x")[rows])
    assert not torch.equal(batch.normal("x"), batch.normal("y"))


def test_draws_by_group_are_shared_within_it() -> None:
    batch = make([0, 1, 2], group=[3, 3, 4])
    drawn = batch.normal("x", by_group=True)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert batch.uniform("t", by_group=True)[0] == batch.uniform("t", by_group=True)[1]
    with pytest.raises(ValueError, match="group"):
        make([0, 1, 2]).normal("x", by_group=True)


def test_integers_are_shared_by_the_update_whatever_the_samples() -> None:
    assert make([0, 1, 2]).integer("stop", 4) == make([7, 8, 9]).integer("stop", 4)
