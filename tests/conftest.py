"""What all tests share, and what the whole run says of itself."""

from __future__ import annotations

from typing import Any

import composing
import pytest

from diffdistill import config_files


def pytest_configure(config: pytest.Config) -> None:
    config_files.composed = composing.composed


@pytest.fixture
def composed_by_hydra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line composed from the files, as users' are."""
    monkeypatch.setattr(config_files, "composed", composing.by_hydra)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many pairs of method and family were run."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    done = [r for r in reports if "test_matrix[" in r.nodeid]
    if done:
        good = sum(r.passed for r in done)
        terminalreporter.write_line(f"matrix: {good} of {len(done)} pairs of method and family passed")
