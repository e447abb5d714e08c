"""The configuration files: what there is, as text, and composed. Hydra is imported only to compose, --help is quick."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from omegaconf import DictConfig

PACKAGE = "diffdistill.configs"  # the folder configs/


def groups() -> dict[str, list[str]]:
    """Each config group and its options; a group inside another has its path, distiller/pairs."""
    return dict(_groups(resources.files(PACKAGE), ""))


def _groups(folder: Traversable, prefix: str) -> Iterator[tuple[str, list[str]]]:
    for inner in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if inner.is_dir() and not inner.name.startswith(("_", ".")):
            options = sorted(entry.name[:-5] for entry in inner.iterdir() if entry.name.endswith(".yaml"))
            if options:
                yield f"{prefix}{inner.name}", options
            yield from _groups(inner, f"{prefix}{inner.name}/")


def text(name: str) -> str:
    """The YAML text of a file: "train", or "trainer/default"; empty if there is none."""
    path = resources.files(PACKAGE).joinpath(f"{name}.yaml")
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def composed(verb: str, overrides: Sequence[str]) -> DictConfig:
    """The files of a verb under overrides, with Hydra's own node, as Hydra composes them; also inside a running job."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    running, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with hydra.initialize_config_module(PACKAGE, version_base="1.3"):
            return hydra.compose(verb, list(overrides), return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = running
