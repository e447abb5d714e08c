"""A page opened in headless Chromium: what its console says, what it asks the network for, how wide it gets."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

BROWSER = next((name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), None)
BROWSER_PATH = None if BROWSER is None else shutil.which(BROWSER)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium: make browser")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-default-apps", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--virtual-time-budget=3000",
)  # fmt: skip
_FRAME = """<!doctype html><title>frame</title><iframe width="{}" height="{}" style="border:0" src="copy.html"></iframe>
<script>onmessage = event => { document.documentElement.dataset.found = event.data; };</script>"""
_PROBE = """<script>
const page = document.scrollingElement, found = {inner: innerWidth, width: page.scrollWidth,
  background: getComputedStyle(document.body).backgroundColor, images: 0, broken: 0, opened: 0};
for (const part of document.querySelectorAll("details")) { part.open = true; found.opened += 1; }
found.open_width = page.scrollWidth;
for (const image of document.images) { found.images += 1; found.broken += image.naturalWidth == 0; }
parent.postMessage(JSON.stringify(found), "*");
</script></body>"""
_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


@dataclass(frozen=True)
class Opened:
    """console: its lines.  requests: addresses that were asked for, but the page itself and what it holds."""

    console: list[str]
    requests: list[str]


def opened(page: Path, scratch: Path, *flags: str) -> Opened:
    """Load a page as it is."""
    log = scratch / "net.json"
    said = _run(scratch, f"--log-net-log={log}", "--net-log-capture-mode=Everything", *flags, page.as_uri())
    console = [line for line in said.stderr.splitlines() if "CONSOLE" in line]
    return Opened(console, _requests(log, page))


def _requests(log: Path, page: Path) -> list[str]:
    text = log.read_text().rstrip().rstrip(",")
    try:
        content = json.loads(text)
    except ValueError:  # the browser ended before it closed the lists
        content = json.loads(text + "]}")
    found = [event.get("params", {}) for event in content["events"]]
    # what the browser asks for of itself has no origin
    urls = {str(asked["url"]) for asked in found if asked.get("initiator", "not an origin") != "not an origin"}
    return sorted(urls - {page.as_uri()})


def measured(page: Path, scratch: Path, size: tuple[int, int], dark: bool) -> dict[str, object]:
    """Widths, background and pictures of a page, told by a script in a copy of it, in a frame of that size: windows
    have a least width."""
    copy = scratch / "copy.html"
    copy.write_text(_POLICY.sub("", page.read_text()).replace("</body>", _PROBE))
    frame = scratch / "frame.html"
    frame.write_text(_FRAME.replace("{}", str(size[0]), 1).replace("{}", str(size[1]), 1))
    said = _run(scratch, *shape((1400, 1000), dark), "--dump-dom", frame.as_uri())
    match = re.search(r'data-found="([^"]*)"', said.stdout)
    assert match is not None, said.stderr[-2000:]
    found: dict[str, object] = json.loads(match.group(1).replace("&quot;", '"'))
    return found


def shape(size: tuple[int, int], dark: bool) -> tuple[str, str]:
    """Flags for a window and a colour scheme."""
    return f"--window-size={size[0]},{size[1]}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"


def _run(scratch: Path, *words: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    profile = scratch / "profile"
    flags = (*_FLAGS, f"--user-data-dir={profile}")
    done = subprocess.run(
        [BROWSER, *flags, *words], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "HOME": str(scratch)},
    )  # fmt: skip
    shutil.rmtree(profile, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done
