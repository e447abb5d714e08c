"""read_ahead: batches from files are those that would have been made, made earlier."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from diffdistill.config import build, compose
from diffdistill.distillers.base import Batch
from diffdistill.errors import UserError
from diffdistill.image_folder import ImageFolder
from diffdistill.read_ahead import ReadAhead, reading_ahead
from diffdistill.recipe import assemble
from diffdistill.rng import Rng
from diffdistill.trainer import Progress

X0 = frozenset({"x0"})


class Files:
    """Data that notes what it was asked for, and where."""

    from_files = True
    shape = (3,)

    def __init__(self, bad: int | None = None) -> None:
        self.bad, self.made, self.others = bad, [], set[str]()
        self.found = threading.Condition()

    def batch(self, rng: Rng, global_batch: int, needs: frozenset[str], dtype: torch.dtype) -> Batch:
        with self.found:
            self.made.append((rng.step, int(rng.ids[0])))
            self.others |= {threading.current_thread().name} - {threading.main_thread().name}
            self.found.notify_all()
        if rng.step == self.bad:
            raise UserError("data.path", "must hold images that can be read", "step", "Mend it.")
        return Batch({}, (len(rng), 3), rng.normal((len(rng), 3), dtype))

    def wait_for(self, *wanted: tuple[int, int]) -> None:
        with self.found:
            assert self.found.wait_for(lambda: set(wanted) <= set(self.made), 20)


def stream(step: int, first: int = 0) -> Rng:
    return Rng(5, step, "data", range(first, first + 4))


def x0(data: Any, rng: Rng) -> torch.Tensor:
    found = data.batch(rng, 8, X0, torch.float32).x0
    assert found is not None
    return found


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_batches_are_those_of_the_data_each_made_once(steps: int) -> None:
    data = Files()
    with reading_ahead(data, steps, last=6) as ahead:  # type: ignore[arg-type]
        assert ahead.shape == (3,)
        for step in range(7):
            for first in (0, 4):
                assert torch.equal(x0(ahead, stream(step, first)), x0(Files(), stream(step, first)))
    assert sorted(data.made) == [(step, first) for step in range(7) for first in (0, 4)]
    assert data.others


def test_those_of_later_steps_are_made_before_they_are_asked_for() -> None:
    data = Files()
    with reading_ahead(data, 2, last=9) as ahead:  # type: ignore[arg-type]
        x0(ahead, stream(3))
        data.wait_for((3, 0), (4, 0), (5, 0))
        assert (6, 0) not in data.made


def test_steps_may_be_left_out_and_asked_for_again() -> None:
    data = Files()
    with reading_ahead(data, 2, last=20) as ahead:  # type: ignore[arg-type]
        for step in (0, 1, 7, 3, 3, 8):
            assert torch.equal(x0(ahead, stream(step)), x0(Files(), stream(step)))


def test_what_goes_wrong_is_told_at_its_own_step() -> None:
    data = Files(bad=2)
    with reading_ahead(data, 3, last=9) as ahead:  # type: ignore[arg-type]
        for step in range(2):
            x0(ahead, stream(step))
        data.wait_for((2, 0))
        with pytest.raises(UserError, match="images that can be read"):
            x0(ahead, stream(2))


def test_no_thread_is_left() -> None:
    before = threading.active_count()

    def interrupted() -> None:
        with reading_ahead(Files(), 4, last=99) as ahead:  # type: ignore[arg-type]
            x0(ahead, stream(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert threading.active_count() == before


def test_data_that_is_drawn_or_held_is_left_as_it_is(tmp_path: Path) -> None:
    for index in range(3):
        Image.fromarray(np.full((4, 4, 3), index, np.uint8)).save(tmp_path / f"{index}.png")
    held = ImageFolder(str(tmp_path), size=4, channels=3, fit="crop", classes="none")
    assert not held.from_files
    for data, steps in ((held, 2), (Files(), 0)):
        with reading_ahead(data, steps, last=9) as same:  # type: ignore[arg-type]
            assert same is data


def losses(read_ahead: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict[str, float]], list[str]]:
    """Of a run on a folder too large to be held, and the threads that decoded its images."""
    monkeypatch.setattr("diffdistill.image_folder.HELD", 0)
    net = (
        "networks.config={layers_per_block:1,block_out_channels:[8,16],down_block_types:[DownBlock2D,DownBlock2D],"
        "up_block_types:[UpBlock2D,UpBlock2D],norm_num_groups:4}"
    )
    words = ["experiment=image_folder_teacher", "run_dir=none", "evaluation=none", f"data.path={folder}",
             "data.size=8", "data.classes=none", "distiller.null_share=0", net, "trainer.steps=5",
             "trainer.accumulate=2", "trainer.batch_size=4", "trainer.log_every=1",
             f"trainer.read_ahead={read_ahead}"]  # fmt: skip
    settings = compose("train", words)
    recipe = assemble({str(key): settings[key] for key in settings})
    decoding: list[str] = []
    images = ImageFolder._images

    def noting(self: ImageFolder, indices: Any) -> torch.Tensor:
        decoding.append(threading.current_thread().name)
        return images(self, indices)

    monkeypatch.setattr(ImageFolder, "_images", noting)
    trainer, lines = build(settings["trainer"]), []
    progress = Progress(lambda step, figures: lines.append(dict(figures)), lambda step: None, lambda step: None)
    state = trainer.start(recipe.distiller, recipe.networks)
    trainer.fit(state, recipe.data, recipe.needs, Accelerator(), progress)
    monkeypatch.setattr(ImageFolder, "_images", images)
    return lines, decoding


def test_a_run_is_the_same_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    for index in range(11):
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / f"{index}.png")
    plain, alone = losses(0, tmp_path, monkeypatch)
    ahead, threads = losses(2, tmp_path, monkeypatch)
    assert len(plain) == len(ahead) == 5
    for one, other in zip(plain, ahead, strict=True):
        assert one["time/data_seconds"] > 0
        assert {k: v for k, v in one.items() if "time/" not in k} == {
            k: v for k, v in other.items() if "time/" not in k
        }
    assert set(alone) == {"MainThread"} and len(threads) == 10
    assert sum(name.startswith("data") for name in threads) == 8  # all but the first step's two


def test_it_is_asked_through_what_wraps_it() -> None:
    class Wrapped:
        def __init__(self, data: Any) -> None:
            self.data = data

        def __getattr__(self, name: str) -> Any:
            return getattr(self.data, name)

    with reading_ahead(Wrapped(Files()), 2, last=9) as ahead:  # type: ignore[arg-type]
        assert isinstance(ahead, ReadAhead)
