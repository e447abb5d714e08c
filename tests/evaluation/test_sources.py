"""Folders of images and clips: what counts, in which order, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.evaluation.sources import Files


def image(seed: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    rng = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(256, (*size, 3), generator=rng, dtype=torch.uint8).numpy())


def folder(root: Path, names: list[str]) -> Path:
    """Images of different content under these names."""
    for index, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image(index).save(root / name)
    return root


def drawn(source: Files) -> Tensor:
    return source.draw(range(source.size)).samples


def test_names_and_dates_do_not_change_the_order(tmp_path: Path) -> None:
    one = Files(str(folder(tmp_path / "a", ["1.png", "2.png", "3.png"])))
    other = Files(str(folder(tmp_path / "b", ["z.png", "y.png", "c.png"])))
    assert torch.equal(drawn(one), drawn(other))
    assert one.sha256 == other.sha256 and one.identity == other.identity
    assert one.shape == (3, 8, 8) and one.size == 3 and not one.labelled
    assert torch.equal(one.draw(range(1, 3)).samples, drawn(one)[1:])


def test_values_are_those_of_the_files(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (0, 255, 51)).save(tmp_path / "x.png")
    found = drawn(Files(str(tmp_path)))[0, :, 0, 0]
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, 51 / 127.5 - 1]))


def test_folders_below_are_conditions(tmp_path: Path) -> None:
    source = Files(str(folder(tmp_path, ["b/1.png", "a/1.png", "b/deep/2.png"])))
    samples, labels = drawn(source), source.draw(range(3)).labels
    for index, label in ((0, 1), (1, 0), (2, 1)):
        expected = torch.from_numpy(np.array(image(index))).permute(2, 0, 1).float() / 127.5 - 1
        (place,) = [i for i, x in enumerate(samples) if torch.allclose(x, expected)]
        assert labels[place] == label
    with pytest.raises(UserError, match="in folders of their class, or without"):
        Files(str(folder(tmp_path, ["0.png"])))


def test_captions_are_conditions_and_prompts(tmp_path: Path) -> None:
    folder(tmp_path, ["1.png", "2.png", "3.png"])
    for name, text in (("1", "a cat"), ("2", "a dog"), ("3", "a cat")):
        (tmp_path / f"{name}.txt").write_text(text)
    source = Files(str(tmp_path), captions=True)
    found = source.draw(range(3))
    assert sorted(found.prompts) == ["a cat", "a cat", "a dog"]
    assert [("a cat", "a dog")[label] for label in found.labels.tolist()] == list(found.prompts)
    (tmp_path / "2.txt").unlink()
    with pytest.raises(UserError, match="samples must hold captions for clip_score.*2.png"):
        Files(str(tmp_path), captions=True)


def test_damaged_files_are_named_counted_and_refused_above_the_stated_share(tmp_path: Path) -> None:
    folder(tmp_path, [f"{i}.png" for i in range(9)])
    whole = (tmp_path / "4.png").read_bytes()
    (tmp_path / "4.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        UserError, match=r"samples must hold at most 0 of damaged files, got 1 of 9: .*4\.png \(.*0\.111"
    ):
        Files(str(tmp_path))
    with pytest.raises(UserError, match="1 of 9"):
        Files(str(tmp_path), corrupt_share=0.11)
    source = Files(str(tmp_path), corrupt_share=0.12)
    assert source.size == 8 and len(source.damaged) == 1 and "4.png" in source.damaged[0]


def test_mixed_sizes_are_refused_with_their_counts_and_cropped_when_told(tmp_path: Path) -> None:
    folder(tmp_path, ["1.png", "2.png"])
    image(7, (12, 16)).save(tmp_path / "wide.png")
    with pytest.raises(UserError, match="must hold samples of one size, got 2 of 8x8, 1 of 12x16"):
        Files(str(tmp_path))
    assert Files(str(tmp_path), side=8).shape == (3, 8, 8)
    assert torch.equal(drawn(Files(str(tmp_path), side=8, limit=3)), drawn(Files(str(tmp_path), side=8)))
    with pytest.raises(UserError, match=r"3 of 3: .*none is scaled up to 20"):
        Files(str(tmp_path), side=20)


def test_clips_are_folders_of_frames_or_animations(tmp_path: Path) -> None:
    frames = [image(seed) for seed in range(5)]
    for index, frame in enumerate(frames):
        (tmp_path / "one").mkdir(exist_ok=True)
        frame.save(tmp_path / "one" / f"{index:02d}.png")
    frames[0].save(tmp_path / "two.png", save_all=True, append_images=frames[1:])
    source = Files(str(tmp_path), clips=True)
    assert source.size == 2 and source.shape == (3, 5, 8, 8) and not source.labelled
    assert torch.equal(*drawn(source))
    frames[0].save(tmp_path / "short.gif", save_all=True, append_images=frames[1:3])
    with pytest.raises(UserError, match="samples must hold samples of one size, got 2 of 5x8x8, 1 of 3x8x8"):
        Files(str(tmp_path), clips=True)


@pytest.mark.parametrize(
    ("names", "clips", "message"),
    [
        ([], False, "must hold images, got none in"),
        ([], True, "must hold clips, got none in"),
        (["1.png"], True, "must hold clips, got single frames"),
    ],
)
def test_folders_without_samples_are_refused(tmp_path: Path, names: list[str], clips: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Files(str(folder(tmp_path, names)), clips=clips)


def test_a_path_that_is_no_folder_and_too_many_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reference must be a folder of images, got /nowhere"):
        Files("/nowhere", key="reference")
    with pytest.raises(UserError, match="num_samples must be at most the 2 in"):
        Files(str(folder(tmp_path, ["1.png", "2.png"])), limit=3)
