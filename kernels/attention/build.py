"""The native library of this folder: compiled by setup.py into a wheel, else at its first use into a cache folder.

Standard library only: setup.py loads this file by its path, before the package can be imported.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

NATIVE = Path(__file__).parent / "native"
COMPILE = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
)
LINK = ("-shared", "-pthread")
AVX2 = ("-mavx2", "-mfma")
# named one by one: a compiler older than the processor resolves -march=native to an older processor
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
SOURCES: dict[str, tuple[str, ...]] = {  # file -> its own flags
    "attention.cpp": (),
    "variant_avx2.cpp": AVX2,
    "variant_avx512.cpp": AVX512,
    "variant_avx512_bf16.cpp": (*AVX512, "-mavx512bf16"),
}


class CannotBuildError(Exception):
    """There is no compiler for this machine, or it refused: the text says which, in the compiler's words."""


def source_hash() -> str:
    """16 hex digits of the sources and flags: what a library says it was built from."""
    digest = hashlib.sha256(repr((COMPILE, LINK, SOURCES)).encode())
    for path in sorted(NATIVE.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def compiler() -> list[str]:
    """The words that call the C++ compiler: $CXX, else c++, g++ or clang++. Raises CannotBuildError."""
    if platform.machine().lower() not in ("x86_64", "amd64") or os.name != "posix":
        raise CannotBuildError(f"the kernel is for x86-64 on POSIX systems, not {platform.machine()} on {os.name}")
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"]) or ["c++"]
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise CannotBuildError("no C++ compiler on the PATH (c++, g++, clang++), and CXX is not set")


def build(library: Path) -> None:
    """Compile the sources into `library`, which appears whole or not at all. Raises CannotBuildError."""
    command = compiler()
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
        objects = []
        for name, flags in SOURCES.items():
            objects.append(str(Path(folder) / f"{name}.o"))
            define = f'-DSOURCE_HASH="{source_hash()}"'
            _call([*command, *COMPILE, *flags, define, "-c", str(NATIVE / name), "-o", objects[-1]])
        made = Path(folder) / library.name
        _call([*command, *LINK, *objects, "-o", str(made)])
        os.replace(made, library)


def cached_library() -> Path:
    """Where the library of these sources lies once built at first use: $XDG_CACHE_HOME or ~/.cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "diffdistill" / f"attention-{source_hash()}.so"


def _call(words: list[str]) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CannotBuildError(f"{words[0]} cannot be run: {error}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or f"exit status {done.returncode}, no message"
        raise CannotBuildError(f"{shlex.join(words[:1])} failed: {said[-2000:]}")
