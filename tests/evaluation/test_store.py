"""Rows on disk: whoever writes them and however often it is cut short, they are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffdistill.errors import UserError
from diffdistill.evaluation import store as stores
from diffdistill.evaluation.rows import Extract
from diffdistill.evaluation.store import RowStore

SIZE = 25


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "SHARD", 10)


def rows_of(ids: range) -> dict[str, torch.Tensor]:
    values = torch.stack([torch.full((3,), float(i)) for i in ids])
    return {"values": values, "label": torch.tensor(list(ids)), "projections": values.double()[:, None] * 2}


def filled(folder: Path, world: int) -> RowStore:
    for rank in reversed(range(world)):
        mine = RowStore(folder, SIZE, {"a": 1})
        for ids in mine.shards(rank, world):
            mine.write(ids, rows_of(ids))
    return RowStore(folder, SIZE, {"a": 1})


@pytest.mark.parametrize("world", [1, 2, 5])
def test_any_number_of_processes_fill_the_same_rows(tmp_path: Path, world: int) -> None:
    found = filled(tmp_path, world).rows()
    expected = rows_of(range(SIZE))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        assert torch.equal(found[name], values), name


def test_what_was_done_is_not_done_again(tmp_path: Path) -> None:
    store = RowStore(tmp_path, SIZE, {"a": 1})
    assert store.shards() == [range(10), range(10, 20), range(20, 25)]
    store.write(range(10, 20), rows_of(range(10, 20)))
    again = RowStore(tmp_path, SIZE, {"a": 1})
    assert again.shards() == [range(10), range(20, 25)]
    assert again.shards(1, 2) == []
    with pytest.raises(AssertionError):
        again.rows()


def test_a_shard_that_was_cut_short_counts_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RowStore(tmp_path, SIZE, {})
    rows = rows_of(range(10))

    def cut(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stores, "_write_text", cut)
    with pytest.raises(KeyboardInterrupt):
        store.write(range(10), rows)
    assert len(RowStore(tmp_path, SIZE, {}).shards()) == 3


@pytest.mark.parametrize(("size", "card", "field"), [(SIZE, {"a": 2}, "a is 1"), (24, {"a": 1}, "size is 25")])
def test_rows_of_another_measurement_are_refused(tmp_path: Path, size: int, card: dict[str, int], field: str) -> None:
    RowStore(tmp_path, SIZE, {"a": 1})
    with pytest.raises(UserError, match=f"work must hold rows of this measurement: {field}"):
        RowStore(tmp_path, size, card)


def test_a_block_of_samples_becomes_the_rows_of_each(tmp_path: Path) -> None:
    extract = Extract(frozenset({"values", "projections", "movement", "label"}))
    clips = torch.randn(7, 1, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    whole = extract(clips)
    parts = [extract(clips[:3]), extract(clips[3:])]
    for name in whole:
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), whole[name], rtol=1e-12, atol=1e-12)
