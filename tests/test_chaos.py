"""Ten kills at random moments and inside saves; `make chaos` has a hundred."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_ten_kills_lose_nothing_that_was_committed() -> None:
    words = [sys.executable, str(Path(__file__).with_name("chaos.py")), "--kills", "10", "--steps", "300"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"(\d+) kills \(SIGKILL\), (\d+) of them inside a save; .* largest (\d+); ", done.stdout)
    assert found is not None, done.stdout
    kills, mid_save, largest = map(int, found.groups())
    assert kills == 10
    assert mid_save >= 3
    assert largest <= 5  # the interval between checkpoints
    assert "damaged checkpoints met: 0" in done.stdout
