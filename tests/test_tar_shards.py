"""Tar shards that were damaged: told by name, nothing is passed over. Checksums of latents."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from chaos_files import _captioned, _latents, _meant, _read_captioned, _read_latents
from safetensors.torch import load, save

from diffdistill.cli import main
from diffdistill.errors import UserError
from diffdistill.latents import CHECKSUM, Latents, _parts
from diffdistill.tar_shards import entries

READERS = {"latents": (_latents, _read_latents), "captioned": (_captioned, _read_captioned)}


@pytest.fixture(params=READERS)
def shards(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Callable[[Path], object]]:
    write, read = READERS[request.param]
    return write(tmp_path / "shards"), read


def member_offsets(file: Path) -> list[int]:
    with tarfile.open(file) as archive:
        return [member.offset for member in archive]


def spoilt(file: Path, how: str) -> bytes:
    """The file's bytes after damage; tarfile alone would read most of these to an early end."""
    raw, second = file.read_bytes(), member_offsets(file)[1]
    return {
        "empty": b"",
        "no tar": b"x" * 2048,
        "damaged header of the first": raw[:3] + b"\xff" + raw[4:],
        "damaged header of the second": raw[: second + 3] + b"\xff" + raw[second + 4 :],
        "checksum of the second": raw[: second + 150] + b"7" + raw[second + 151 :],
        "zeros for the second": raw[:second] + bytes(512) + raw[second + 512 :],
        "cut between members": raw[:second],
        "cut in a header": raw[: second + 100],
        "cut in a member": raw[: second + 512 + 5],
        "cut end": raw[: len(raw) - 10240 + 5] if len(raw) > 20480 else raw[: second + 5],
        "more behind the end": raw + b"y" * 512,
        "gzip": __import__("gzip").compress(raw),
    }[how]


@pytest.mark.parametrize(
    "how",
    ["empty", "no tar", "damaged header of the first", "damaged header of the second", "checksum of the second",
     "zeros for the second", "cut between members", "cut in a header", "cut in a member", "cut end",
     "more behind the end", "gzip"],
)  # fmt: skip
def test_a_damaged_shard_is_told_by_name(how: str, shards: tuple[Path, Callable[[Path], object]]) -> None:
    folder, read = shards
    read(folder)
    file = folder / "000001.tar"
    file.write_bytes(spoilt(file, how))
    with pytest.raises(
        UserError, match=r"must hold tar shards that can be read, got .*000001\.tar\. .*Restore"
    ) as told:
        read(folder)
    assert "\n" not in str(told.value)


def test_tarfile_alone_would_lose_samples_without_a_word(tmp_path: Path) -> None:
    """Why the shards are read strictly."""
    file = _captioned(tmp_path / "shards") / "000001.tar"
    file.write_bytes(spoilt(file, "damaged header of the second"))
    with tarfile.open(file) as archive:
        assert len(archive.getmembers()) == 1
    with pytest.raises(UserError, match=r"damaged at byte \d+"):
        list(entries(file, "path"))


def test_links_and_folders_are_no_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
        archive.addfile(tarfile.TarInfo("file"), io.BytesIO())
    assert [entry.name for entry in entries(tmp_path / "x.tar", "path")] == ["file"]


def test_every_flipped_bit_of_a_sample_is_seen(tmp_path: Path) -> None:
    folder = _latents(tmp_path / "latents")
    file = folder / "000001.tar"
    raw, intact, meant = file.read_bytes(), _read_latents(folder), _meant(file, with_content=True)
    with tarfile.open(file) as archive:
        member = archive.getmembers()[0]
    for place in range(member.offset_data, member.offset_data + member.size, 3):
        file.write_bytes(raw[:place] + bytes([raw[place] ^ 4]) + raw[place + 1 :])
        assert place in meant
        told, found = "", None
        try:
            found = _read_latents(folder)
        except UserError as error:
            told = str(error)
        assert found == intact or "000001.tar:000000003.safetensors" in told
        if found is not None:  # in the name of the checksum itself
            assert CHECKSUM.encode() not in file.read_bytes()[member.offset_data : member.offset_data + member.size]


def test_the_checksum_is_of_the_whole_member_but_itself(tmp_path: Path) -> None:
    folder = _latents(tmp_path / "latents")
    body = Latents(str(folder))._bytes(0)
    header, values = _parts(body)
    metadata = dict(header["__metadata__"])
    told = metadata.pop(CHECKSUM)
    plain = json.dumps([{**header, "__metadata__": metadata}], sort_keys=True).encode()
    assert told == str(zlib.crc32(plain + values))
    assert metadata == {"caption": "a"}


def test_members_without_a_checksum_are_read_as_they_are(tmp_path: Path) -> None:
    folder = _latents(tmp_path / "latents")
    bodies = [load(Latents(str(folder))._bytes(index)) for index in range(3)]
    with tarfile.open(folder / "000000.tar", "w") as archive:
        for index, tensors in enumerate(bodies):
            body = save(tensors)
            entry = tarfile.TarInfo(f"{index}.safetensors")
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
    _read_latents(folder)
    assert torch.equal(Latents(str(folder))._read(1)["latent"], bodies[1]["latent"])


def test_precompute_refuses_a_damaged_shard_whatever_may_be_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """max_broken is a share of images; how many a damaged shard holds nobody knows."""
    from tiny_pipelines import written

    folder, pipeline = _captioned(tmp_path / "shards"), written("sd15", tmp_path / "sd15")
    file = folder / "000001.tar"
    file.write_bytes(spoilt(file, "cut between members"))
    words = ["precompute", f"path={folder}", "networks=sd15", f"networks.path={pipeline}", "max_broken=0.9"]
    assert main([*words, f"out={tmp_path / 'out'}", "sizes=[[8,8]]"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: path must hold tar shards that can be read")
    assert "000001.tar" in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "out").exists()
