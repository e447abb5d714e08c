"""What the site shows that no page holds: other files' pages, and tables, help and reference made from the package.

A page asks for a part by a comment alone on its line, `<!-- site: verbs -->`. On GitHub nothing is seen there, so the
page says in words what the site puts in.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffdistill import cli_help, config_files, methods
from diffdistill.cli import VERBS

ROOT = Path(__file__).parents[1]
NOTEBOOKS = [path.name for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
PAGES = {
    "README.md": "readme.md",
    "kernels/README.md": "kernels.md",
    "CONTRIBUTING.md": "contributing.md",
    **{f"notebooks/{name}": f"notebooks/{name}" for name in NOTEBOOKS},  # executed copies: make notebooks
}
OPTIONAL = ("scale_out",)  # pages that a table of contents may name before they are written
_PART = re.compile(r"^<!-- site: (\w+)(?: (\S+))? -->$", re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def missing_notebooks() -> list[str]:
    """Notebooks whose executed copies are not there."""
    return [name for name in NOTEBOOKS if not (ROOT / "docs" / "notebooks" / name).is_file()]


def filled(text: str, folder: str = "docs") -> str:
    """A page's text with its parts in place; links to the files that have a page here lead to it.

    folder: where the page lies, relative to the root of the project.
    """
    for name in OPTIONAL:
        if not (ROOT / "docs" / f"{name}.md").exists():
            text = text.replace(f"\n{name}\n", "\n")
    source = "notebooks" if folder == "docs/notebooks" else folder  # where it was written
    return _PART.sub(lambda found: PARTS[found[1]](*filter(None, [found[2]])), relinked(text, source, folder))


def depends(text: str) -> bool:
    """Whether what a page shows hangs on more than the page."""
    return bool(_PART.search(text)) or any(f"\n{name}\n" in text for name in OPTIONAL)


def relinked(text: str, folder: str, page: str = "docs") -> str:
    """Relative links of a text that lies in `folder`, as they are from a page in the folder `page`."""

    def moved(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, found[1]))
        if path in PAGES:
            return posixpath.relpath(f"docs/{PAGES[path]}", page)
        outside = "path:" if path.endswith(".md") and not path.startswith("docs/") else ""
        return outside + posixpath.relpath(path, page)

    return _LINK.sub(moved, text)


def page(path: str) -> str:
    """Another Markdown file of the project."""
    return relinked((ROOT / path).read_text(), posixpath.dirname(path))


# --- the command line


def verbs() -> str:
    """Each verb with its --help."""
    parts = [_block("text", cli_help.overview(VERBS))]
    for name, verb in VERBS.items():
        parts += [f"## {name}", _block("text", cli_help.verb_help(name, verb))]
    return "\n\n".join(parts)


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"


# --- the configuration


def configuration() -> str:
    """Every file of configs/: the roots of the verbs, then each group, as shipped."""
    parts = ["## The verbs' own keys"]
    parts += [f"### {name}\n\n{_file(verb.config)}" for name, verb in VERBS.items()]
    for group, options in config_files.groups().items():
        parts.append(f"## {group}=")
        parts += [f"### {group}={option}\n\n{_file(f'{group}/{option}')}" for option in options]
    return "\n\n".join(parts)


def _file(name: str) -> str:
    return f"[configs/{name}.yaml](../configs/{name}.yaml)\n\n{_block('yaml', config_files.text(name))}"


# --- the methods


def table_of_methods() -> str:
    """The README's table."""
    return methods.table()


def needs() -> str:
    """What every method asks for, read off its class under its shipped hyperparameters."""
    rows = [
        "| `distiller=` | needs | trains | other roles | `roles.student=` |",
        "|---|---|---|---|---|",
    ]
    for name in config_files.groups()["distiller"]:
        asked, roles = _asked(name)
        trained = ", ".join(_role(role, known) for role, known in roles.items() if known.trainable)
        frozen = ", ".join(f"`{role}`" for role, known in roles.items() if not known.trainable)
        modes = ", ".join(roles["student"].modes) if "student" in roles else "-"
        wanted = ", ".join(words for need, words in WORDS.items() if need in asked) or "noise alone"
        rows.append(f"| `{name}` | {wanted} | {trained} | {frozen or '-'} | {modes} |")
    return "\n".join(rows)


WORDS = {
    "x0": "data",
    "pair": "pairs of the teacher, made first",
    "trajectory": "guided trajectories of the teacher, made first",
    "condition": "a condition",
    "null": "a null condition",
    "codec": "the decoder of latents",
    "jvp": "forward-mode derivatives (JVP)",
}


def _asked(name: str) -> tuple[frozenset[str], Mapping[str, Any]]:
    from diffdistill.config import build, compose

    part = build(compose("train", [f"distiller={name}", "run_dir=none"]).distiller)
    return part.func.needs(**part.keywords), part.func.roles(**part.keywords)


def _role(name: str, role: Any) -> str:
    return f"`{name}`" if role.build == "denoiser" else f"`{name}` ({role.build})"


# --- examples


def file(path: str) -> str:
    """A file of the project, as it is."""
    languages = {".py": "python", ".yaml": "yaml"}
    return _block(languages[Path(path).suffix], (ROOT / path).read_text())


PARTS: dict[str, Callable[..., str]] = {
    "page": page,
    "verbs": verbs,
    "configuration": configuration,
    "methods": table_of_methods,
    "needs": needs,
    "file": file,
}
