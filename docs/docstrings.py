"""The project's docstrings as reStructuredText: plain sentences with formulas, shapes and `code`, which need no markup.

Stars, bars and trailing underscores are text; an indented paragraph is a formula; `name:` at the beginning of a line,
after a sentence, a semicolon or a shape introduces what a parameter is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_CODE = re.compile(r"(``[^`\n]+``|`[^`\n]+`)")
_NAME = re.compile(r"(?:^|(?<=  )|(?<=[.;] )|(?<=\], ))([A-Za-z_]\w*(?:\[\w+\])?(?:, [A-Za-z_]\w*)*):(?= |$)")
_PROSE = {"Paper", "Source", "Headline", "Returns", "Raises", "Note"}


def as_rst(lines: list[str]) -> list[str]:
    """The lines of a docstring, ready for docutils."""
    return list(_paragraphs(lines))


def _paragraphs(lines: list[str]) -> Iterator[str]:
    formula = False
    for index, line in enumerate(lines):
        before = lines[index - 1].strip() if index else ""
        if line.startswith(" ") and not before and not formula:  # a block begins
            formula = True
            yield from ("::", "")
        elif line.strip() and not line.startswith(" "):
            formula = False
        yield line if formula or not line.strip() else _line(line)


def _line(line: str) -> str:
    named = _NAME.sub(lambda found: found[0] if found[1] in _PROSE else f"`{found[1]}`:", line)
    return "".join(_code(part) if part.startswith("`") else _text(part) for part in _CODE.split(named))


def _code(part: str) -> str:
    return f"``{part.strip('`')}``\\ "


def _text(part: str) -> str:
    return re.sub(r"(\w)_(?!\w)", r"\1\\_", re.sub(r"([*|\\])", r"\\\1", part))
