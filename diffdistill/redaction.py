"""Keys, tokens and passwords: refused where they are typed, replaced where a message would show them.

A secret is the value of an environment variable whose name ends in TOKEN, KEY, SECRET or PASSWORD, a text of a form
that services give their keys, the user and password of a URL, or the value of a key with such a name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import UserError

HIDDEN = "***"
_NAMES = re.compile(r"(?:^|[_.\-])(?:token|api_?key|access_?key|secret|secret_?key|password|passwd)$", re.IGNORECASE)
_VARIABLES = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE)
_FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[\w-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bAKIA[0-9A-Z]{16}\b"
    r"|\bxox[abprs]-[\w-]{10,}|\bAIza[\w-]{30,}|\bwandb_v1_\w{16,}|(?<=://)[^/\s@:]*:[^/\s@]+(?=@)"
)
_SHORTEST = 8  # of an environment variable's value: a shorter one would hide ordinary words


def redacted(text: str) -> str:
    """`text` with every secret in it replaced."""
    for value in _values():
        text = text.replace(value, HIDDEN)
    return _FORMS.sub(HIDDEN, text)


def refuse(words: Sequence[str]) -> None:
    """Raise UserError for the first override (key=value) that holds a secret: it would stand in files and messages."""
    for word in words:
        key, equals, value = word.lstrip("+~").partition("=")
        named = bool(equals) and value not in ("", "null") and _NAMES.search(key)
        if named or redacted(word) != word:
            raise _refused(redacted(key) if equals else "the command line")


def refuse_in(node: Any, key: str = "") -> None:
    """The same for every text of nested mappings and lists, whose interpolations are resolved."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            refuse_in(value, f"{key}.{name}".strip("."))
    elif isinstance(node, list | tuple):
        for value in node:
            refuse_in(value, key)
    elif isinstance(node, str) and redacted(node) != node:
        raise _refused(key)


def _refused(key: str) -> UserError:
    fix = "Leave it out, and set it in the environment: HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY."
    return UserError(key, "must not hold a token, key or password: it would be written into files", HIDDEN, fix)


def _values() -> list[str]:
    """Of the environment's secrets, the longest first."""
    found = {v for name, v in os.environ.items() if _VARIABLES.search(name) and len(v) >= _SHORTEST}
    return sorted(found, key=len, reverse=True)
