"""Random command lines, seeded: valid and invalid keys, values, structures and options in any mixture.

Each must end with status 0 or 2, with exactly one message on stderr for 2 and nothing on stdout, without touching the
folder of another run. `python tests/fuzz.py --lines 10000 --real 200` prints one summary line; training is always dry.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from config_keys import Key, Outcome, command_lines, keys, run

from diffdistill import config_files
from diffdistill.config import override

VERBS = {
    "train": 74, "sample": 8, "evaluate": 6, "export": 5, "doctor": 2, "bench step": 5, "bench attention": 3,
    "bench pipeline": 4,
}  # fmt: skip
SECONDS = 120  # of one line, many times what any needs
# Real sampling stays cheap: what a line begins with; bench would run for long, so it always has a mistake.
BASE = {
    "train": ("dry_run=true", "run_dir=new"),
    "sample": ("run=FINISHED", "num=4", "out=grid.png"),
    "evaluate": ("run=FINISHED", "num_samples=20", "replicates=2", "metrics=[swd]", "out=eval.json"),
    "export": ("run=FINISHED", "out=exported"),
    "doctor": (),
    "bench step": ("pairs=1",),
    "bench attention": ("repeats=1",),
    "bench pipeline": ("pairs=1", "pipeline=FINISHED/pipeline"),
}
# not mutated in their verbs
HELD = ("dry_run", "num", "num_samples", "replicates", "metrics", "pairs", "repeats", "batch_size")


def _words(text: str) -> tuple[str, ...]:
    """What stands between two spaces or more: words may hold one."""
    return tuple(re.split(r"\s{2,}", text.strip()))


VALUES = _words(r"""
    0  1  2  -1  3  7  0.5  1.5  -0.1  1e-8  1e400  nan  inf  -inf  1000000000  0x10  1_000  01  +1  .5  5.  9E40
    true  false  null  yes  off  word  two words  ''  '1'  ???  é  'é'  nowhere  FINISHED  LONGNAME  /dev/null
    []  [1]  [1,2]  [2.0,1.0]  [a,b]  [[1.0],[2.0]]  [null]  [[]]  {}  {a:1}  {a:{b:[c]}}  [{a:1}]  /proc/nowhere/x
    ${seed}  ${trainer.steps}  ${run_dir}  ${nope}  ${oc.env:NOPE}  ${oc.env:HOME}  ${now:%Y}  ${  $  \  '
    (  a=b  =  a:b  a,b  1,2  range(1,3)  choice(a,b)  glob(*)  ~  *  %s  {0}  #  !  asset:gmm2d  asset:..  "
""")
VALUES += ("", "\t", '"a\nb"', "9" * 40, "9" * 5000, "x" * 300)
OPTIONS = _words("""
    --multirun  -m  --multirun=1  --cfg job  --cfg  --cfg nope  --cfg=job  -c all  --cfg job --resolve  --resolve
    --package trainer  --package  -p nope --cfg job  --info defaults  --info  --run  --help  --config-dir nowhere
    --config-dir FINISHED  --config-dir  --config-name x  --nope  -x  --  -  -h  --cfg job --multirun  --hydra-help
""")
HYDRA = _words("""
    hydra.run.dir=up  hydra.sweep.dir=up  hydra.sweep.subdir=../up  hydra/job_logging=default  ~hydra  hydra=null
    hydra.mode=MULTIRUN  +hydra.job.env_set.A=1  hydra.output_subdir=x
""")
GARBAGE = _words("""
    =  =1  ==  a  .  a.  .a=1  a..b=1  ~  +  ++  a b=1  'a'=1  a[0]=1  é=1  @  a@b=c  {a:1}  [1]  ${a}  ${a}=1  1=1
    _target_=x  trainer=  ~=1  -1=2
""")
GARBAGE += ("", " ", "\n", "\t=1", "x" * 500)


@functools.cache
def _contexts(verb: str) -> tuple[tuple[str, ...], ...]:
    return tuple(words for name, words in command_lines() if name == verb)


@functools.cache
def _keys(verb: str, words: tuple[str, ...]) -> tuple[Key, ...]:
    return tuple(keys(verb, words))


@functools.cache
def _targets() -> tuple[str, ...]:
    found = {
        key.value for words in _contexts("train") for key in _keys("train", words) if key.name.endswith("_target_")
    }
    return (
        *sorted(found),
        "os.system",
        "diffdistill.nowhere",
        "diffdistill.cli.main",
        "torch.nn.Linear",
        "builtins.eval",
    )


class Generator:
    """Command lines as lists of words; FINISHED and LONGNAME stand for the folder of a finished run and a long name."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def line(self) -> list[str]:
        r = self.random
        if r.random() < 0.02:
            return [
                r.choice([*GARBAGE, "trian", "bench", "--version", "help", "--help"]) for _ in range(r.randint(0, 2))
            ]
        verb = r.choices(list(VERBS), list(VERBS.values()))[0]
        context = r.choice([words for words in _contexts(verb) if not any("IMAGES" in word for word in words)])
        words = [*BASE[verb], *(word for word in context if verb == "train" or word.startswith("data="))]
        extra = [word for _ in range(r.randint(0, 4)) for word in self._mutation(verb, context)]
        if r.random() < 0.3:
            r.shuffle(extra)
        return [*verb.split(), *words, *extra]

    def _mutation(self, verb: str, context: tuple[str, ...]) -> list[str]:
        kinds = (self._value, self._own, self._name, self._group, self._target, self._place, self._option, self._odd)
        return self.random.choices(kinds, (30, 14, 14, 12, 8, 6, 8, 8))[0](verb, context)

    def _key(self, verb: str, context: tuple[str, ...]) -> Key:
        free = [key for key in _keys(verb, context) if key.name == "dry_run" or key.name not in HELD]
        return self.random.choice([key for key in free if key.name != "dry_run"] or list(_keys(verb, context)))

    def _value(self, verb: str, context: tuple[str, ...]) -> list[str]:
        sign = self.random.choice(("", "", "", "", "+", "++"))
        return [f"{sign}{self._key(verb, context).name}={self.random.choice(VALUES)}"]

    def _own(self, verb: str, context: tuple[str, ...]) -> list[str]:
        """The value it has anyway, or one scaled, or a list of it."""
        key = self._key(verb, context)
        value: Any = key.value
        if isinstance(value, float | int) and not isinstance(value, bool) and self.random.random() < 0.7:
            value = self.random.choice((value * 2, value / 2, -value, value + 1, 0, [value], str(value)))
        return [override(key.name, value)] if "???" not in str(value) else []

    def _name(self, verb: str, context: tuple[str, ...]) -> list[str]:
        r, name = self.random, self._key(verb, context).name
        place = r.randrange(len(name))
        wrong = r.choice(
            (
                name[:place] + name[place + 1 :],
                name[:place] + r.choice("aqz._-@/1é") + name[place:],
                name.upper(),
                f"{name}.inner",
                name.replace(".", "/", 1),
                f"new.{name}",
            )
        )
        return [r.choice((f"{wrong}=1", f"+{wrong}=1", f"++{wrong}=1", f"~{name}", f"~{wrong}", f"~{name}=1"))]

    def _group(self, verb: str, context: tuple[str, ...]) -> list[str]:
        r, groups = self.random, config_files.groups()
        group = r.choice(list(groups))
        option = r.choice(
            [*groups[group], *groups[group], *groups[group], "nowhere", "null", "", "[a]", "3", "${data}", "a,b"]
        )
        return [
            r.choice(
                (f"{group}={option}",) * 5 + (f"+{group}={option}", f"~{group}", f"{group}@x={option}", f"{group}")
            )
        ]

    def _target(self, verb: str, context: tuple[str, ...]) -> list[str]:
        nodes = [key.name for key in _keys(verb, context) if key.name.endswith(("_target_", "_partial_"))]
        if not nodes:
            return []
        name = self.random.choice(nodes)
        target = self.random.choice(_targets())
        return [f"{name}={target if name.endswith('_target_') else self.random.choice(('true', 'false', '3'))}"]

    def _place(self, verb: str, context: tuple[str, ...]) -> list[str]:
        key = {"train": "run_dir", "export": "out", "sample": "out", "evaluate": "out"}.get(verb, "run")
        places = ("FINISHED", "FINISHED", "FINISHED/samples", "new", "/dev/null", "a/b/c", ".")
        return [f"{key}={self.random.choice(places)}"]

    def _option(self, verb: str, context: tuple[str, ...]) -> list[str]:
        return self.random.choice(OPTIONS).split()

    def _odd(self, verb: str, context: tuple[str, ...]) -> list[str]:
        return [self.random.choice((*HYDRA, *GARBAGE))]


def tree(folder: Path) -> str:
    """Hash of names, contents and times of everything in a folder, but the report, which its verb writes again."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.name != "report.html"):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_mtime_ns}".encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def finished_run(folder: Path) -> Path:
    """A small finished run in a new folder."""
    words = ["experiment=gmm2d_dmd2", "trainer.steps=1", "trainer.batch_size=4", "evaluation=none", f"run_dir={folder}"]
    outcome = run(["train", *words])
    assert outcome.status == 0, outcome
    return folder


def _filled(words: Sequence[str], finished: Path) -> list[str]:
    return [word.replace("FINISHED", str(finished)).replace("LONGNAME", "x" * 5000) for word in words]


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"longer than {SECONDS} s")


def _in_process(words: Sequence[str]) -> Outcome:
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        return run(words)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _real(words: Sequence[str]) -> Outcome:
    command = [sys.executable, "-m", "diffdistill", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10 * SECONDS)
    return Outcome(done.returncode, done.stdout, done.stderr)


class Fuzz:
    """Runs lines in an empty working directory beside a finished run, and collects what breaks the promise."""

    def __init__(self, scratch: Path, finished: Path) -> None:
        self.scratch, self.finished, self.before = scratch, finished, tree(finished)
        self.statuses: dict[int | str, int] = {}
        self.faults: list[str] = []

    def run(self, lines: Sequence[list[str]], real: bool = False) -> None:
        """Run the lines; in the current process, or each in one of its own."""
        here = Path.cwd()
        os.chdir(self.scratch)
        try:
            for words in lines:
                self._one(words, real)
            self._check_tree("the lines together")
        finally:
            os.chdir(here)

    def _one(self, words: list[str], real: bool) -> None:
        full = _filled(words, self.finished)
        if real:
            full = [word.replace("\0", "") for word in full]
        outcome = (_real if real else _in_process)(full)
        self.statuses[outcome.status] = self.statuses.get(outcome.status, 0) + 1
        if outcome.fault:
            self.faults.append(f"{words!r:.300}: {outcome.fault[:300]}")
        if words[:1] not in (["sample"], ["evaluate"], ["export"], ["report"]) or outcome.status != 0:
            self._check_empty(words)
        for path in self.scratch.iterdir():  # what these verbs were asked to write
            path.unlink() if path.is_file() else shutil.rmtree(path)
        if any("FINISHED" in word for word in words) and words[:1] != ["sample"]:
            self._check_tree(repr(words))

    def _check_empty(self, words: list[str]) -> None:
        if written := sorted(path.name for path in self.scratch.iterdir()):
            self.faults.append(f"{words!r:.300}: wrote {written}")

    def _check_tree(self, what: str) -> None:
        after = tree(self.finished)
        if after != self.before:
            self.faults.append(f"{what:.300}: changed the folder of another run")
            self.before = after


def lines(seed: int, count: int) -> Iterator[list[str]]:
    """`count` command lines of a seed."""
    generator = Generator(seed)
    return (generator.line() for _ in range(count))


def fuzz(folder: Path, num_lines: int, num_real: int, seed: int) -> Fuzz:
    """Fuzz in an empty folder: num_lines in this process, then num_real in processes of their own."""
    scratch = folder / "scratch"
    scratch.mkdir()
    found = Fuzz(scratch, finished_run(folder / "finished"))
    found.run(list(lines(seed, num_lines)))
    found.run(list(lines(seed + 1, num_real)), real=True)
    if odd := {path.name for path in folder.iterdir()} - {"scratch", "finished"}:
        found.faults.append(f"wrote beside the working directory: {sorted(odd)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=250)
    parser.add_argument("--real", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = fuzz(Path(folder), args.lines, args.real, args.seed)
    for fault in found.faults:
        print(fault)
    counts = ", ".join(f"{count} with status {status}" for status, count in sorted(found.statuses.items(), key=str))
    print(
        f"fuzz seed {args.seed}: {args.lines} lines in process and {args.real} real: {counts};"
        f" {len(found.faults)} faults; {time.monotonic() - started:.0f} s"
    )
    return bool(found.faults)


if __name__ == "__main__":
    sys.exit(main())
