"""Files that were changed behind a run's back, and disks that take no more: what is seen, and what goes on."""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from chaos_kills import QUICK, Row, finished, last_logged, newest_step, same, start, undisturbed
from PIL import Image

from diffdistill import checkpoint, latents
from diffdistill.captioned import captioned
from diffdistill.checkpoint import DamagedError
from diffdistill.errors import UserError
from diffdistill.latents import Latents

DAMAGES = ("flip", "truncate", "delete", "swap", "empty", "append")


def damage(file: Path, how: str, draws: random.Random, other: Path) -> None:
    """Change a file. other: whose content it gets by `swap`."""
    raw = file.read_bytes()
    if how == "flip":
        place = draws.randrange(len(raw))
        file.write_bytes(raw[:place] + bytes([raw[place] ^ (1 << draws.randrange(8))]) + raw[place + 1 :])
    elif how == "truncate":
        file.write_bytes(raw[: draws.randrange(1, len(raw))])
    elif how == "delete":
        file.unlink()
    elif how == "swap":
        file.write_bytes(other.read_bytes())
        other.write_bytes(raw)
    else:
        file.write_bytes(b"" if how == "empty" else raw + b"\0")


def checkpoints(per_damage: int, seed: int, place: Path) -> Row:
    """Every file of the newest checkpoint, damaged in every way; then runs that go on past a damaged one."""
    row, draws = Row("a changed file in a checkpoint", "detected"), random.Random(seed)
    words = [*QUICK, "trainer.steps=15", "trainer.keep=9", "distiller.critic_gan_weight=0.2"]
    whole = undisturbed(words)
    older, last = checkpoint.steps(whole / "checkpoints")[-2:]
    names = sorted(path.name for path in last.iterdir())
    for name in names:
        for how in DAMAGES:
            for _ in range(per_damage if how in ("flip", "truncate") else 1):
                with copies(last, older, place) as (copy, before):
                    damage(copy / name, how, draws, before / name)
                    row.count(damaged(copy), f"{how} of {name}")
    for one, two in [(names[0], names[1]), (names[-1], names[-2])]:  # files of one checkpoint exchanged
        with copies(last, older, place) as (copy, _):
            damage(copy / one, "swap", draws, copy / two)
            row.count(damaged(copy), f"{one} for {two}")
    with copies(last, older, place) as (copy, before):  # a checkpoint under another's name
        shutil.rmtree(copy)
        before.rename(copy)
        row.count(damaged(copy), "a checkpoint renamed")
    for how in DAMAGES:
        broken = place / f"broken-{how}"
        shutil.copytree(whole, broken)
        (broken / "summary.json").unlink()
        there = broken / "checkpoints"
        damage(there / last.name / draws.choice(names), how, draws, there / older.name / "state.json")
        log = place / f"{how}.log"
        status = finished(["train", f"run_dir={broken}", "resume=true"], log)
        text = log.read_text()
        going_on = re.search(r"going on after step (\d+)", text)
        row.lost.append(int(last.name[5:]) - (int(going_on[1]) if going_on else 0))
        row.went_on(status == 0 and "damaged checkpoint" in text and same(whole, broken))
    return row


@contextmanager
def copies(last: Path, older: Path, place: Path) -> Iterator[tuple[Path, Path]]:
    """The two checkpoints elsewhere, under their names."""
    aside = place / "aside"
    shutil.copytree(last, aside / last.name)
    shutil.copytree(older, aside / older.name)
    try:
        yield aside / last.name, aside / older.name
    finally:
        shutil.rmtree(aside)


def damaged(path: Path) -> bool:
    """Whether it is refused."""
    try:
        checkpoint.verified(path)
    except (DamagedError, UserError):
        return True
    return False


# --- tar shards


def shards(num: int, seed: int, place: Path) -> Row:
    """Tar shards of latents and of captioned images with a flipped bit, or cut: an error must name the file."""
    row, draws = Row("a damaged tar shard", "detected"), random.Random(seed)
    for folder, read in (
        (_latents(place / "latents"), _read_latents),
        (_captioned(place / "captioned"), _read_captioned),
    ):
        file = folder / "000001.tar"
        whole, intact = file.read_bytes(), read(folder)
        places = _meant(file, with_content=read is _read_latents)
        for index in range(num):
            how = "flip" if index % 2 else "truncate"
            at = draws.choice(places)
            if how == "flip":
                file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << draws.randrange(8))]) + whole[at + 1 :])
            else:
                file.write_bytes(whole[:at])
            row.count(_refused(partial(read, folder), file, intact), f"{how} of {file} at {at}")
        file.write_bytes(whole)
        if read(folder) != intact:
            raise AssertionError("the file is whole again")
    return row


def _meant(file: Path, with_content: bool) -> list[int]:
    """Bytes of a tar that mean something: headers, contents, the mark of the end; not what fills up blocks."""
    found: list[int] = []
    with tarfile.open(file) as archive:
        for member in archive:
            found += range(member.offset, member.offset_data)
            found += range(member.offset_data, member.offset_data + member.size * with_content)
        found += range(archive.offset, archive.offset + 1024)
    return found


def _refused(read: Callable[[], object], file: Path, intact: object) -> bool:
    """Whether the damage is told with the file's name, or leaves all that is read as it was: a checksum's own name."""
    try:
        return read() == intact
    except UserError as error:
        return file.name in str(error) and "must hold" in str(error)


def _latents(folder: Path) -> Path:
    torch.manual_seed(0)
    cond = {"prompt": torch.randn(6, 2, 4)}
    latents.write(folder, torch.randn(6, 4, 4, 4), cond, None, "nowhere", per_shard=3, captions=list("abcdef"))
    return folder


def _read_latents(folder: Path) -> list[object]:
    data = Latents(str(folder))
    samples = [data._read(index) for index in range(6)]
    return [
        (data._caption(index), {key: value.tolist() for key, value in samples[index].items()}) for index in range(6)
    ]


def _captioned(folder: Path) -> Path:
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for index in range(3):
                picture = io.BytesIO()
                Image.new("RGB", (8, 8), (40 * index, 0, 0)).save(picture, "png")
                for end, body in (("png", picture.getvalue()), ("txt", b"a red square")):
                    entry = tarfile.TarInfo(f"{index}.{end}")
                    entry.size = len(body)
                    archive.addfile(entry, io.BytesIO(body))
    return folder


def _read_captioned(folder: Path) -> list[object]:
    found = captioned(str(folder), None)
    return [(found.caption(index), found.opened(index).tobytes()) for index in range(len(found))]


# --- disks


def full_disks(num: int, seed: int, place: Path) -> Row:
    """A disk that fills up, or where it cannot be made, a limit on the size of a file; then room is made."""
    row, draws = Row("a full disk", "survived"), random.Random(seed)
    words = [*QUICK, "trainer.steps=40", "trainer.keep=9"]
    whole = undisturbed(words)
    for index in range(num):
        folder, log = place / f"full-{index}" / "run", place / f"full-{index}.log"
        folder.parent.mkdir()
        size = draws.randrange(1500, 3500)  # KiB: some checkpoints fit
        mounted = index % 2 == 0 and _mounted(folder.parent, f"size={size}k")
        if mounted:
            status = finished([*words, f"run_dir={folder}"], log)
        else:  # of one file
            least = draws.randrange(1024, 64 * 1024)
            status = finished([*words, f"run_dir={folder}"], log, partial(_limit, least))
        text = log.read_text()
        row.count(status == 2 and text.count("error: ") == 1 and "must be writable" in text, f"{status}: {text[-300:]}")
        row.lost.append(max(0, last_logged(folder) - newest_step(folder)))
        elsewhere = place / f"moved-{index}"
        shutil.copytree(folder, elsewhere)
        if mounted:
            subprocess.run(["umount", "-l", str(folder.parent)], check=True)
        row.went_on(finished([*words, f"run_dir={elsewhere}", "resume=auto"], log) == 0 and same(whole, elsewhere))
    return row


def _limit(least: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (least, least))


def read_only(num: int, seed: int, place: Path) -> Row:
    """Checkpoints that turn read-only while a run writes; then they can be written again."""
    row, draws = Row("a folder that turns read-only", "survived"), random.Random(seed)
    words = [*QUICK, "trainer.steps=200"]
    whole = undisturbed(words)
    for index in range(num):
        folder, log = place / f"sealed-{index}", place / f"sealed-{index}.log"
        pid, saves = start([*words, f"run_dir={folder}"], log), folder / "checkpoints"
        while not saves.is_dir() and os.waitpid(pid, os.WNOHANG)[0] == 0:
            time.sleep(0.001)
        time.sleep(draws.uniform(0.0, 0.3))
        if not _sealed(saves):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            row.skipped = "mounting a file system is not permitted here"
            return row
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        text = log.read_text()
        row.count(status == 2 and "must be writable: it is read-only" in text, f"{status}: {text[-300:]}")
        subprocess.run(["umount", "-l", str(saves)], check=True)
        row.lost.append(last_logged(folder) - newest_step(folder))
        row.went_on(finished([*words, f"run_dir={folder}", "resume=auto"], log) == 0 and same(whole, folder))
    return row


def _sealed(folder: Path) -> bool:
    """Mount a folder over itself, read-only; nothing stays mounted where that is refused.

    It is made read-only aside and put over the folder in one call: remounted in its place it would be refused
    (EBUSY) whenever the run has a file of it open for writing, and would stay there writable.
    """
    aside = folder.with_name(f"{folder.name}-sealed")
    aside.mkdir()
    try:
        if not _run("mount", "--bind", str(folder), str(aside)):
            return False
        try:
            return _run("mount", "-o", "remount,bind,ro", str(aside)) and _run(
                "mount", "--bind", str(aside), str(folder)
            )
        finally:
            subprocess.run(["umount", "-l", str(aside)], check=True)
    finally:
        aside.rmdir()


def _run(*words: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(words, check=False, capture_output=True).returncode == 0
    return False


def _mounted(place: Path, options: str) -> bool:
    return _run("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place))
