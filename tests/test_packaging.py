"""The package as others install it: wheel and sdist, with configuration files and assets inside, no compiler needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}


def run(*words: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={**os.environ, **NO_COMPILER, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def source_files() -> list[str]:
    """Tracked files, and those that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("needs a git checkout")
    return [name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the sources, and what `python -m build` makes of it: the sdist, and from that the wheel."""
    folder = tmp_path_factory.mktemp("packaging")
    for name in source_files():
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy)
    run("-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=folder / "source")
    (wheel,) = (folder / "dist").glob("*.whl")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder / "site", wheel, cwd=folder)
    return wheel, sdist, folder / "site"


def expected() -> set[str]:
    """Where each file that the installed package needs ends up."""
    names = set()
    for name in source_files():
        top = name.split("/")[0]
        if (
            top == "diffdistill" and (name.endswith((".py", "py.typed")) or "/assets/" in name or "/templates/" in name)
        ) or (top in ("configs", "kernels") and name.endswith((".py", ".yaml", ".cpp", ".h", ".json"))):
            names.add(name if top == "diffdistill" else f"diffdistill/{name}")
    return names


def test_wheel_holds_every_module_configuration_and_asset_and_nothing_else(built):
    wheel, _, _ = built
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected()


def test_sdist_builds_the_same_and_carries_licence_and_tests(built):
    _, sdist, _ = built
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "pyproject.toml", "setup.py", "configs/train.yaml", "tests/test_packaging.py"} <= names


def test_nothing_named_configs_or_kernels_lands_beside_the_package(built):
    site = built[2]
    assert sorted(p.name for p in site.iterdir() if not p.name.endswith(".dist-info")) == ["bin", "diffdistill"]


PROBE = """
from importlib import resources
import diffdistill, diffdistill.configs, diffdistill.kernels
from diffdistill.config_files import composed
print(diffdistill.__file__)
for part in (diffdistill, diffdistill.configs, diffdistill.kernels):
    assert part.__file__.startswith({site!r}), part.__file__
assert resources.files("diffdistill").joinpath("assets").is_dir()
assert composed("sample", ["num=3"]).num == 3
"""


def test_without_a_compiler_the_sources_of_the_native_library_are_there_and_it_is_not(built):
    folder = built[2] / "diffdistill" / "kernels" / "attention"
    assert (folder / "native" / "attention.cpp").is_file() and not list(folder.glob("*.so"))


def test_installed_wheel_runs_from_elsewhere(built, tmp_path):
    site = built[2]
    run("-c", PROBE.format(site=str(site)), cwd=tmp_path, PYTHONPATH=str(site))
    text = run("-m", "diffdistill", "--help", cwd=tmp_path, PYTHONPATH=str(site))
    assert "usage: diffdistill VERB" in text
    assert list(tmp_path.iterdir()) == []
