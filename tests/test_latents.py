"""Latents in shards: read as written, in epochs, mistakes named."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch

from diffdistill.errors import UserError
from diffdistill.latents import Latents, write
from diffdistill.pictures import draw_picture
from diffdistill.rng import Rng


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    x = torch.arange(10.0).view(10, 1, 1, 1).expand(-1, 4, 2, 2)
    cond = {"text": torch.arange(10.0).view(10, 1, 1).expand(-1, 3, 5), "label": torch.arange(10) % 3}
    write(tmp_path / "set", x, cond, {"text": torch.zeros(1, 3, 5)}, "somewhere", per_shard=4)
    return tmp_path / "set"


def test_an_epoch_holds_every_sample_with_its_conditions(folder: Path) -> None:
    data = Latents(str(folder), num_classes=3)
    assert data.shape == (4, 2, 2) and len(list(folder.glob("*.tar"))) == 3
    seen = []
    for step in range(2):
        batch = data.batch(Rng(0, step, "data", range(5)), 5, frozenset({"x0"}), torch.float32)
        assert batch.x0 is not None and batch.shape == (5, 4, 2, 2)
        values = batch.x0[:, 0, 0, 0]
        assert torch.equal(batch.cond["text"][:, 0, 0], values) and torch.equal(batch.cond["label"], values.long() % 3)
        seen += values.tolist()
    assert sorted(seen) == list(range(10))
    assert data.null is not None and data.null["text"].shape == (1, 3, 5)
    drawn = data.batch(Rng(0, 0, "data", range(5)), 5, frozenset(), torch.float32)
    assert drawn.x0 is None and drawn.cond["text"].shape == (5, 3, 5)


def whole(data: Latents) -> None:
    data.batch(Rng(0, 0, "data", range(10)), 10, frozenset({"x0"}), torch.float32)


def test_samples_of_another_form_are_named(folder: Path) -> None:
    """Within a shard; another shard of another form is another bucket."""
    write(folder / "more", torch.zeros(1, 4, 3, 3), {"text": torch.zeros(1, 3, 5), "label": torch.zeros(1)}, None, "")
    (folder / "more" / "000000.tar").rename(folder / "000003.tar")
    data = Latents(str(folder))
    assert data.shape == (4, 2, 2) and [len(bucket) for bucket in data._buckets] == [10, 1]
    with tarfile.open(folder / "000003.tar") as other, tarfile.open(folder / "000000.tar", "a") as shard:
        member = other.getmembers()[0]
        body = other.extractfile(member)
        member.name = "000000009.safetensors"
        shard.addfile(member, body)
    data = Latents(str(folder))
    everything = list(range(len(data._members)))[:11]
    with pytest.raises(UserError, match=r"samples of one form.*000000.tar:000000009.safetensors"):
        data._stacked(everything, torch.device("cpu"))


def test_webdataset_reads_the_shards_too(folder: Path) -> None:
    """Members are what webdataset takes for samples: one key, one extension."""
    with tarfile.open(folder / "000000.tar") as archive:
        assert archive.getnames() == [f"{i:09d}.safetensors" for i in range(4)]


def test_mistakes_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"latents.json with a schema"):
        Latents(str(tmp_path / "nowhere"))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "latents.json").write_text('{"schema": 0}')
    with pytest.raises(UserError, match="must have schema 1"):
        Latents(str(tmp_path / "old"))
    (tmp_path / "old" / "latents.json").write_text('{"schema": 1}')
    with pytest.raises(UserError, match="must be a folder with tar shards"):
        Latents(str(tmp_path / "old"))
    with pytest.raises(UserError, match="num_classes must be above every label, 2 among them"):
        whole(Latents(str(folder), num_classes=2))
    with pytest.raises(UserError, match="evaluation must be none for latents"):
        Latents(str(folder)).reference()
    write(tmp_path / "plain", torch.zeros(2, 4, 2, 2), {}, None, "somewhere")
    assert Latents(str(tmp_path / "plain")).null is None
    with pytest.raises(UserError, match=r"data.num_classes needs samples with a label"):
        Latents(str(tmp_path / "plain"), num_classes=3)
    shard = folder / "000001.tar"
    body = bytearray(shard.read_bytes())
    body[512:600] = b"\xff" * 88  # the header of its first sample
    shard.write_bytes(bytes(body))
    data = Latents(str(folder))
    with pytest.raises(UserError, match=r"samples that can be read.*000001.tar:000000004.safetensors"):
        whole(data)
    (folder / "000000.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"tar shards that can be read.*000000.tar"):
        Latents(str(folder))
    assert json.loads((folder / "latents.json").read_text()) == {"schema": 1, "pipeline": "somewhere", "vae": None}


@pytest.mark.parametrize("shape", [(16, 4, 4), (4, 3, 4, 4), (1, 4, 4), (8, 20)])
def test_latents_of_every_kind_have_a_picture(shape: tuple[int, ...], tmp_path: Path) -> None:
    write(tmp_path / "set", torch.randn(2, *shape), {}, None, "somewhere")
    draw_picture(Latents(str(tmp_path / "set")), Noise(), 2, 0, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 0


class Noise:
    nfe = 1

    def sample(self, z: torch.Tensor, cond: object, rng: Rng) -> torch.Tensor:
        return z
