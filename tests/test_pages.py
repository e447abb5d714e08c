"""README and docs: command lines compose, Python imports what there is, links lead somewhere, quoted messages exist."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import composing
import pytest

import diffdistill
from diffdistill import cli, config_check, config_files
from diffdistill.config import compose
from diffdistill.config_errors import UserError

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md")),
    *sorted(DOCS.glob("*.md")),
    *sorted(DOCS.glob("api/*.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
EXAMPLES = DOCS / "examples"
WITH_KEYS_OF_TRAIN = {
    "distill": "diffdistill.distill",
    "plan": "diffdistill.planner",
    "doctor": "diffdistill.doctor",
    "bench step": "diffdistill.bench",
}


def blocks(page: str, language: str) -> Iterator[str]:
    """The fenced blocks of a language."""
    yield from re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def command_lines(page: str) -> list[str]:
    """What follows `diffdistill` in blocks of shell commands and in `code`, without comments and `...`."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`(diffdistill [a-z][^`\n]*=[^`\n]*)`", text)
    found = (re.search(r"(?:^|\s)diffdistill ((?!VERB\b)[a-z].*)", line) for line in lines)
    return [match[1] for match in found if match]


LINES = sorted({(page, line) for page in NAMES for line in command_lines(page)})


def words_of(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    return [word for word in words if word != "..."]


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}: {line[:60]}" for page, line in LINES])
def test_every_command_line_fits_its_verb(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Composed and compared with the verb's annotations; what it would read or write is not looked at."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv(config_check.OWN_PACKAGES, "fresh_pairs")
    name, rest = cli._verb(words_of(line))
    if "--help" in rest:
        return
    if name in WITH_KEYS_OF_TRAIN:
        rest = importlib.import_module(WITH_KEYS_OF_TRAIN[name]).arguments(rest)
    options, overrides = cli._options_and_overrides(rest)
    if folder := options.get("--config-dir"):
        place = ROOT / folder
        assert place.is_dir()
        search = f"hydra.searchpath=[file://{place}]"
        monkeypatch.setattr(config_files, "composed", lambda verb, words: composing.by_hydra(verb, [search, *words]))
    if "--multirun" in options:
        overrides = [re.sub(r"=([^\[{']*?),.*", r"=\1", word) for word in overrides]
    verb = cli.VERBS[name]
    settings = compose(verb.config, overrides)
    missing = [key for key in settings if settings._get_node(key)._is_missing()]
    assert not missing, f"the line lacks {missing}"
    config_check.check(settings, cli.function_of(verb))
    if inner := settings.get("overrides"):
        compose("train", [word for word in inner if isinstance(word, str)])


def test_the_command_lines_are_seen() -> None:
    assert len(LINES) > 80 and {line.split()[0] for _, line in LINES} >= {name.split()[0] for name in cli.VERBS}
    with pytest.raises(UserError):
        compose("train", words_of("train experiment=digits_dmd2 trainer.stepz=1  # a comment")[1:])


@pytest.mark.parametrize("page", NAMES)
def test_python_on_a_page_imports_what_there_is(page: str) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("diffdistill"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "diffdistill":
                assert hasattr(diffdistill, node.attr), ast.unparse(node)


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", NAMES)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: str) -> None:
    here = ROOT / page
    for target in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", here.read_text()):
        path, _, anchor = target.partition("#")
        found = (here.parent / path).resolve() if path else here
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_every_page_of_docs_is_in_the_table_of_contents() -> None:
    listed = set()
    for index in (DOCS / "index.md", DOCS / "api" / "index.md"):
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```$", index.read_text(), re.MULTILINE | re.DOTALL):
            names = [re.sub(r".*<(.+)>", r"\1", line) for line in block.splitlines() if line and line[0] != ":"]
            listed |= {(index.parent / f"{name}.md").resolve() for name in names}
    assert {page for page in PAGES if DOCS in page.parents} == (listed - missing(listed)) | {DOCS / "index.md"}


def missing(pages: set[Path]) -> set[Path]:
    return {page for page in pages if page.stem in site_parts().OPTIONAL and not page.exists()}


def site_parts() -> object:
    sys.path.insert(0, str(DOCS))
    try:
        return importlib.import_module("site_parts")
    finally:
        sys.path.remove(str(DOCS))


def test_messages_that_troubleshooting_quotes_are_in_the_code() -> None:
    tables = [line for line in (DOCS / "troubleshooting.md").read_text().splitlines() if line.startswith("| ")]
    tables += [line for line in (DOCS / "export_and_load.md").read_text().splitlines() if line.startswith("| `")]
    quoted = {text for line in tables for text in re.findall(r"`([^`]+)`", line.split("|")[1])}
    said = {text for text in quoted if " " in text and "=" not in text and not text.startswith("diffdistill ")}
    code = " ".join(" ".join(constants(path)) for path in sorted(ROOT.glob("diffdistill/**/*.py")))
    assert len(said) > 25
    assert not [text for text in sorted(said) if text not in code]


def constants(path: Path) -> Iterator[str]:
    """Every text in a module, those in f-strings and those that Python joins among them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_what_the_site_fills_in_is_of_today() -> None:
    parts = site_parts()
    verbs, files = parts.verbs(), parts.configuration()  # type: ignore[attr-defined]
    assert all(f"\n## {name}\n" in verbs and f"usage: diffdistill {name} " in verbs for name in cli.VERBS)
    for group, options in config_files.groups().items():
        for option in options:
            assert f"### {group}={option}\n" in files and config_files.text(f"{group}/{option}").rstrip() in files
    table = parts.needs()  # type: ignore[attr-defined]
    assert "| `kd` | pairs of the teacher, made first | `student` | - | copy, lora |" in table
    assert "| `mean_flow` | data, forward-mode derivatives (JVP) | `student` | `target` | copy, lora |" in table
    assert "`discriminator` (heads)" in table
    assert len(table.splitlines()) == 2 + len(config_files.groups()["distiller"])


def test_docstrings_are_shown_as_they_are_meant() -> None:
    sys.path.insert(0, str(DOCS))
    try:
        as_rst = importlib.import_module("docstrings").as_rst
    finally:
        sys.path.remove(str(DOCS))
    given = [
        "As `x`.",
        "",
        "    L = E |a_ * b|",
        "",
        "z, x0: [B, *shape], k: [C]  w: a scale_ of x_0.",
        "Returns: it; t_: [B].",
    ]
    assert as_rst(given) == [
        "As ``x``\\ .",
        "",
        "::",
        "",
        "    L = E |a_ * b|",
        "",
        "``z, x0``\\ : [B, \\*shape], ``k``\\ : [C]  ``w``\\ : a scale\\_ of x_0.",
        "Returns: it; ``t_``\\ : [B].",
    ]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    build = pytest.importorskip("sphinx.cmd.build")
    assert build.main(["-q", "-W", "--keep-going", "-d", str(tmp_path / "trees"), str(DOCS), str(tmp_path)]) == 0
    assert "usage: diffdistill train" in (tmp_path / "command_line.html").read_text()
