"""The folder of a run: schema versions, full disks and folders without permission, one message each."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from diffdistill import checkpoint, logs, run_folder
from diffdistill.captioned import captioned
from diffdistill.checkpoint import DamagedError
from diffdistill.cli import main
from diffdistill.errors import UserError
from diffdistill.run_folder import RunFolder

QUICK = [
    "train", "data=gmm2d", "distiller=dmd2", "trainer.steps=6", "trainer.batch_size=16", "trainer.log_every=1",
    "trainer.checkpoint_every=2", "evaluation=none",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "x"
    assert main([*QUICK, f"run_dir={folder}"]) == 0
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def one_message(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one message on stderr."""
    text = capsys.readouterr().err
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]
    return lines[0]


# --- schema


def older(folder: Path) -> None:
    """Rewrite a run as the first release wrote it: weights and averages, no manifest, no key `schema`."""
    for path in checkpoint.steps(folder / "checkpoints"):
        values = json.loads((path / "state.json").read_text())
        kept = {key: values[key] for key in ("step", "roles", "averages")}
        (path / "state.json").write_text(json.dumps({"schema": 1, **kept}))
        for name in ["manifest.json", *(p.name for p in path.glob("optimizer-*"))]:
            (path / name).unlink()
    settings = OmegaConf.load(folder / "config.yaml")
    for key in ("schema", "init", "stages"):
        del settings[key]  # type: ignore[attr-defined]
    del settings.trainer["keep"]  # type: ignore[union-attr]
    (folder / "config.yaml").write_text("# schema 1\n" + OmegaConf.to_yaml(settings))


def test_a_run_of_schema_1_samples_but_does_not_go_on(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older(copy)
    (copy / "summary.json").unlink()
    assert main(["sample", f"run={copy}", f"out={tmp_path / 'grid.png'}", "num=8"]) == 0
    capsys.readouterr()
    assert main([*QUICK, f"run_dir={copy}", "resume=true"]) == 2
    one_message(capsys, "resume", "schema 1", "init.student=run:DIR")


def test_a_run_of_schema_1_warms_a_new_one(copy: Path, tmp_path: Path) -> None:
    older(copy)
    assert main([*QUICK, f"run_dir={tmp_path / 'new'}", f"init.student=run:{copy}"]) == 0


@pytest.mark.parametrize("where", ["config.yaml", "state.json"])
def test_a_newer_schema_is_refused_by_name(where: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if where == "config.yaml":
        text = (copy / where).read_text()
        (copy / where).write_text(text.replace(f"schema: {run_folder.SCHEMA}", "schema: 99"))
    else:
        for path in checkpoint.steps(copy / "checkpoints"):
            values = json.loads((path / where).read_text())
            (path / where).write_text(json.dumps({**values, "schema": 99}))
    assert main(["sample", f"run={copy}"]) == 2
    one_message(capsys, "schema", "99", "Upgrade diffdistill")


@pytest.mark.parametrize(
    "text", ["", "a: [", "schema: two\n", "schema: 2\n", "- 1\n- 2\n", "\x00\x01", "schema: 2\ndata: 3\n"]
)
def test_a_damaged_config_is_one_message(text: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "config.yaml").write_text(text)
    for verb in ("sample", "evaluate"):
        assert main([verb, f"run={copy}"]) == 2
        one_message(capsys, "run ", "config.yaml" if text != "schema: two\n" else "schema")


def test_an_edited_config_that_no_longer_fits_is_one_message(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = (copy / "config.yaml").read_text()
    for old, new in (("student_every: 5", "student_every: often"), ("distribution_matching.dmd2.DMD2", "nope.X")):
        assert old in original
        (copy / "config.yaml").write_text(original.replace(old, new))
        assert main(["sample", f"run={copy}"]) == 2
        one_message(capsys, "config.yaml that builds")


def test_code_outside_the_allowed_packages_is_not_called_from_a_config(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (copy / "config.yaml").read_text().replace("diffdistill.data.Mixture2D", "os.system")
    (copy / "config.yaml").write_text(text)
    assert main(["sample", f"run={copy}"]) == 2
    one_message(capsys, "must lie inside")


# --- checkpoints as files


def test_every_flipped_byte_is_seen(tmp_path: Path) -> None:
    """Wherever a byte changes in any file of a checkpoint, it is not whole any more."""
    torch.manual_seed(0)
    folder = checkpoint.commit(tmp_path, 3, {"student": {"w": torch.randn(4)}}, {"roles": ["student"]})
    assert checkpoint.verified(folder).step == 3
    for path in sorted(folder.iterdir()):
        original = path.read_bytes()
        for place in range(len(original)):
            raw = bytearray(original)
            raw[place] ^= 4
            path.write_bytes(raw)
            try:
                found = checkpoint.verified(folder)
            except (DamagedError, UserError):
                continue
            finally:
                path.write_bytes(original)
            pytest.fail(f"byte {place} of {path.name} was taken: {found}")


def test_a_checkpoint_under_another_steps_name_is_damaged(tmp_path: Path) -> None:
    folder = checkpoint.commit(tmp_path, 3, {"student": {"w": torch.ones(4)}}, {"roles": ["student"]})
    folder.rename(tmp_path / "step-00000006")
    with pytest.raises(DamagedError, match="it is of step 3"):
        checkpoint.verified(tmp_path / "step-00000006")


@pytest.mark.parametrize(
    "state", [{}, {"a": 1, "b": [1.5, None, "x"]}, {"t": torch.ones(2), "n": {"u": [torch.zeros(1)]}}]
)
def test_a_methods_state_survives(state: dict[str, Any]) -> None:
    plain, tensors = checkpoint.split(state)
    again = checkpoint.joined(json.loads(json.dumps(plain)), tensors)
    assert checkpoint.split(again)[0] == plain
    assert all(torch.equal(checkpoint.split(again)[1][key], value) for key, value in tensors.items())


def test_tied_weights_are_written(tmp_path: Path) -> None:
    w = torch.randn(3, 2)
    folder = checkpoint.commit(tmp_path, 1, {"role": {"a": w, "b": w, "c": w.t()}}, {})
    found = checkpoint.verified(folder).tensors("role")
    assert torch.equal(found["b"], w)
    assert torch.equal(found["c"], w.t())


# --- where nothing can be written


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_one_message_and_what_was_committed_stands(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_disk / "run"
    # every checkpoint is about .45 MiB; keep=9 fills the disk at the third
    words = [*QUICK, "trainer.keep=9", "roles.student=lora", "roles.fake_score=lora", "lora.rank=8"]
    assert main([*words, f"run_dir={folder}", "trainer.steps=40"]) == 2
    one_message(capsys, "run_dir", "disk is full", "resume=true")
    found = checkpoint.steps(folder / "checkpoints")
    assert found
    for path in found:
        checkpoint.verified(path)
    assert not list((folder / "checkpoints").glob(".*"))
    # room is made: elsewhere it goes on
    shutil.copytree(folder, tmp_path / "moved")
    assert main([*words, f"run_dir={tmp_path / 'moved'}", "trainer.steps=40", "resume=true"]) == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("nth", [1, 4, 9])
def test_no_room_at_any_moment_of_a_save_leaves_the_older_checkpoint(
    number: int, nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count, original = [0], os.fsync

    def fsync(handle: int) -> None:
        count[0] += 1
        if count[0] > 12 + nth:
            raise OSError(number, os.strerror(number))
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    folder = tmp_path / "run"
    assert main([*QUICK, f"run_dir={folder}"]) == 2
    one_message(capsys, "run_dir must be writable")
    assert checkpoint.newest(folder / "checkpoints", pytest.fail) is not None


def test_a_read_only_file_system_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(place)], check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        assert main([*QUICK, f"run_dir={place / 'run'}"]) == 2
        one_message(capsys, "run_dir must be writable: it is read-only")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_sample_evaluate_and_export_name_a_place_that_cannot_be_written(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(place)], check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        assert main(["sample", f"run={finished}", "num=4", f"out={place / 'x.png'}"]) == 2
        one_message(capsys, "out must be writable: it is read-only")
        words = ["evaluate", f"run={finished}", "num_samples=50", "metrics=[swd]"]
        assert main([*words, f"out={place / 'x.json'}"]) == 2
        one_message(capsys, "out must be writable: it is read-only")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_folder_without_permission_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Path.mkdir

    def refused(self: Path, *args: Any, **keys: Any) -> None:
        if self.name == "run":  # root may write anywhere
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        original(self, *args, **keys)

    monkeypatch.setattr(Path, "mkdir", refused)
    assert main([*QUICK, f"run_dir={tmp_path / 'run'}"]) == 2
    one_message(capsys, "run_dir must be writable: permission denied")


def test_a_file_in_the_way_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        assert main([*QUICK, f"run_dir={place}"]) == 2
        one_message(capsys, "run_dir")


def test_weights_of_another_configuration_are_one_message(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint whose files are whole but belong to another network."""
    last = checkpoint.steps(copy / "checkpoints")[-1]
    values = {k: v for k, v in checkpoint.verified(last).values.items() if k not in ("schema", "step")}
    tensors = {p.stem: load_file(p) for p in last.glob("*.safetensors")}
    tensors["student"] = {key: value[..., :1].clone() for key, value in tensors["student"].items()}
    checkpoint.commit(copy / "checkpoints", 6, tensors, values)
    assert main(["sample", f"run={copy}"]) == 2
    one_message(capsys, "weights that fit")


def test_a_damaged_summary_is_one_message(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "summary.json").write_text("{")
    assert main([*QUICK, f"run_dir={copy}", "resume=auto"]) == 2
    one_message(capsys, "run_dir", "summary.json")


def test_a_damaged_line_of_the_metrics_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.add_metrics(step, {"a": step})
    text = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text.replace('"a": 2}', '"a": 2') + '{"st')
    assert [line["a"] for line in folder.metrics()] == [1, 3]
    logs.begin()
    folder.cut_metrics(3)
    assert "metrics.jsonl: line 2 cannot be read and is left out" in capsys.readouterr().err
    folder.cut_metrics(3)  # they are gone
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("url", ["s3://bucket/run", "memory://run", "gs://bucket/run", "file:///tmp/run"])
def test_a_url_is_refused_where_a_folder_is_written_or_read(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fix = "Write /tmp/run." if url.startswith("file") else "Mount it"
    tries = (
        [*QUICK, f"run_dir={url}"], ["sample", f"run={url}"], ["export", f"run={tmp_path}", f"out={url}"],
        ["train", "data=image_folder", f"data.path={url}", "dry_run=true", "run_dir=x"],
        ["train", "data=latents", f"data.path={url}", "networks=sd15", "networks.path=x", "dry_run=true", "run_dir=x"],
    )  # fmt: skip
    for words in tries:
        assert main(words) == 2
        one_message(capsys, "must be a path of this machine, not a URL", url, fix)
    with pytest.raises(UserError, match="not a URL"):
        captioned(url, None)
    assert not list(tmp_path.iterdir())


def test_metrics_are_cut_to_a_step_and_a_torn_line_goes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.add_metrics(step, {"a": 0.1 * step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "evalu')
    folder.cut_metrics(2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "a": 0.1}, {"step": 2, "a": 0.2}]
