"""precompute: captioned images to latents that train as the pipeline would see them; buckets; going on; mistakes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import written

import diffdistill
from diffdistill.captioned import captioned, covering, nearest_bucket
from diffdistill.errors import UserError
from diffdistill.latents import Latents
from diffdistill.networks.codec import codec_of
from diffdistill.networks.families.pixels import load_codec
from diffdistill.networks.files import quiet_libraries
from diffdistill.rng import Rng

CAPTIONS = ("a red circle", "a blue square")
SIZES = [[16, 16], [16, 24]]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written("sd15", tmp_path_factory.mktemp("pipeline") / "sd15")


def pixels(index: int) -> np.ndarray:
    height, width = ((16, 16), (16, 24), (40, 32))[index % 3]
    return np.random.default_rng(index).integers(0, 255, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for i in range(7):
        file = folder / ("more" if i == 6 else ".") / f"{i}.png"
        Image.fromarray(pixels(i)).save(file)
        file.with_suffix(".txt").write_text(CAPTIONS[i % 2] + "\n")
    return folder


def made(photos: Path, pipeline: Path, out: Path, **keys: Any) -> Latents:
    told = {"path": str(photos), "networks.path": str(pipeline), "out": str(out), "sizes": SIZES, "per_chunk": 4}
    diffdistill.precompute("networks=sd15", **{**told, **keys})
    return Latents(str(out))


def test_samples_are_the_vae_s_and_the_encoders_own(photos: Path, pipeline: Path, tmp_path: Path) -> None:
    data = made(photos, pipeline, tmp_path / "set")
    assert data.shape == (4, 8, 8)  # of the five square ones
    with quiet_libraries():
        stock: Any = diffusers.DiffusionPipeline.from_pretrained(pipeline)
    for place, index in ((0, 0), (3, 5)):  # of the first chunk's squares, and of the second's
        sample = data._read(data._largest[place])
        image = covering(Image.fromarray(pixels(index)), (16, 16))
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float().div(127.5).sub(1)
        mean = stock.vae.encode(x).latent_dist.mode() - 0.1  # its shift_factor
        torch.testing.assert_close(sample["latent"], (mean * stock.vae.config.scaling_factor)[0])
        text = stock.encode_prompt(CAPTIONS[index % 2], "cpu", 1, False)[0]
        torch.testing.assert_close(sample["cond.text"], text[0])
    texts, cond = data.examples() or ([], {})
    assert texts == [CAPTIONS[0], CAPTIONS[0]] and cond["text"].shape[0] == 2
    assert data.null is not None
    torch.testing.assert_close(data.null["text"], stock.encode_prompt("", "cpu", 1, False)[0])
    decoded = load_codec(str(pipeline)).decode(data._read(0)["latent"][None])
    torch.testing.assert_close(decoded, codec_of(stock.vae).decode(data._read(0)["latent"][None]))


def test_a_batch_is_of_one_bucket_and_an_epoch_holds_every_sample(photos: Path, pipeline: Path, tmp_path: Path) -> None:
    data = made(photos, pipeline, tmp_path / "set")
    assert [len(bucket) for bucket in data._buckets] == [5, 2]
    for epoch in range(2):
        shapes, seen = [], []
        for step in range(4 * epoch, 4 * epoch + 4):  # three batches of two squares, one of two wide ones
            batch = data.batch(Rng(0, step, "data", range(2)), 2, frozenset({"x0"}), torch.float32)
            assert batch.x0 is not None and batch.shape == batch.x0.shape
            shapes.append(batch.shape[2:])
            seen += [float(x.sum()) for x in batch.x0]
            halves = [data.batch(Rng(0, step, "data", range(i, i + 1)), 2, frozenset({"x0"}), torch.float32)
                      for i in range(2)]  # fmt: skip
            assert torch.equal(torch.cat([half.x0 for half in halves if half.x0 is not None]), batch.x0)
        assert sorted(shapes) == [(8, 8)] * 3 + [(8, 12)]
        assert len(set(seen)) == 7  # one square twice, to fill its last batch up
    drawn = [data.batch(Rng(0, step, "d", range(2)), 2, frozenset(), torch.float32).shape[2:] for step in range(60)]
    assert 5 < drawn.count((8, 12)) < 30  # about two in seven


def test_it_goes_on_where_it_stopped(photos: Path, pipeline: Path, tmp_path: Path) -> None:
    whole = made(photos, pipeline, tmp_path / "whole")
    out = tmp_path / "set"
    made(photos, pipeline, out)
    (out / "000001.json").unlink()  # as if it had been killed before
    with pytest.raises(UserError, match="must be precomputed to its end, got 1 chunks are missing"):
        Latents(str(out))
    kept = (out / "000000-16x16.tar").stat().st_mtime_ns
    again = made(photos, pipeline, out)
    assert (out / "000000-16x16.tar").stat().st_mtime_ns == kept
    assert torch.equal(again._read(6)["latent"], whole._read(6)["latent"])
    assert json.loads((out / "000001.json").read_text()) == {"samples": 3, "broken": []}
    with pytest.raises(UserError, match="out must have been begun with the same negative"):
        made(photos, pipeline, out, negative="red")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="out must be new, empty, or begun"):
        made(photos, pipeline, tmp_path / "other")


def test_processes_share_the_chunks(
    photos: Path, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = made(photos, pipeline, tmp_path / "whole"), tmp_path / "set"
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        diffdistill.precompute("networks=sd15", path=str(photos), **{"networks.path": str(pipeline)}, out=str(out),
                               sizes=SIZES, per_chunk=4)  # fmt: skip
        assert (out / "latents.json").is_file() and (out / "000001.json").is_file() == (rank == "1")
    assert torch.equal(Latents(str(out))._read(6)["latent"], whole._read(6)["latent"])


def test_webdataset_and_metadata_are_read_too(photos: Path, pipeline: Path, tmp_path: Path) -> None:
    folder = captioned(str(photos), None)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(7):
            body = io.BytesIO()
            folder.opened(i).save(body, "png")
            for end, raw in (("png", body.getvalue()), ("json", json.dumps({"text": folder.caption(i)}).encode())):
                entry = tarfile.TarInfo(f"{i:03d}.{end}")
                entry.size = len(raw)
                archive.addfile(entry, io.BytesIO(raw))
    shards = captioned(str(tmp_path / "a.tar"), None)
    assert [shards.caption(i) for i in range(7)] == [folder.caption(i) for i in range(7)]
    assert all(np.array_equal(shards.opened(i), folder.opened(i)) for i in range(7))
    for file in photos.rglob("*.txt"):
        file.unlink()
    with pytest.raises(UserError, match=r"caption for every image.*0\.png"):
        len(captioned(str(photos), None))
    names = ["0.png", "1.png", "2.png", "3.png", "4.png", "5.png", "more/6.png"]
    (photos / "metadata.jsonl").write_text("".join(json.dumps({"file_name": n, "told": n}) + "\n" for n in names))
    assert captioned(str(photos), "told").caption(6) == "more/6.png"
    with pytest.raises(UserError, match="column must be in every row"):
        captioned(str(photos), None).caption(0)


def test_what_cannot_be_read_is_named_and_counted(photos: Path, pipeline: Path, tmp_path: Path) -> None:
    (photos / "3.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"images that can be read.*3\.png"):
        made(photos, pipeline, tmp_path / "a")
    with pytest.raises(UserError, match=r"max_broken must not be exceeded.*1 of 7"):
        made(photos, pipeline, tmp_path / "b", max_broken=0.1)
    data = made(photos, pipeline, tmp_path / "c", max_broken=0.2)
    assert len(data._members) == 6
    assert json.loads((tmp_path / "c" / "000000.json").read_text())["broken"][0]["image"].endswith("3.png")


def test_mistakes_are_told(photos: Path, pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none is scaled up to 32x32"):
        made(photos, pipeline, tmp_path / "a", sizes=[[32, 32]])
    assert made(photos, pipeline, tmp_path / "b", sizes=[[32, 32]], upscale=True).shape == (4, 16, 16)
    with pytest.raises(UserError, match="multiples of 2"):
        made(photos, pipeline, tmp_path / "c", sizes=[[15, 16]])
    with pytest.raises(UserError, match="path must be a folder or a tar shard"):
        made(tmp_path / "nowhere", pipeline, tmp_path / "d")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="path must hold images"):
        made(tmp_path / "empty", pipeline, tmp_path / "e")


def test_latents_of_another_vae_are_refused(photos: Path, pipeline: Path, tmp_path: Path) -> None:
    data = made(photos, pipeline, tmp_path / "set")
    network = torch.nn.Linear(1, 1)
    assert data.told(network, str(pipeline)).codec is not None
    other = written("sd15", tmp_path / "other")
    vae: Any = diffusers.AutoencoderKL.from_pretrained(other / "vae")
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(1)
    vae.save_pretrained(other / "vae")
    with pytest.raises(UserError, match=r"data.path must be made with the VAE of"):
        data.told(network, str(other))


def test_buckets_are_chosen_by_ratio() -> None:
    buckets = [(64, 64), (48, 80), (80, 48)]
    assert nearest_bucket(100, 100, buckets) == (64, 64)
    assert nearest_bucket(160, 100, buckets) == (48, 80)
    assert nearest_bucket(100, 170, buckets) == (80, 48)
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255
    assert np.array(covering(Image.fromarray(wide), (5, 5))).min() > 200  # the middle third, at half size
