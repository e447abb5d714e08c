"""The pictures of docs/: a run's report and the demo, in headless Chromium. `make screenshots`

python tests/screenshots.py RUN OUT

RUN: folder of a finished digits run, such as runs/quickstart. Written into OUT: report_light.png, report_dark.png,
demo_light.png and demo_dark.png, each wide and light, or as on a phone and dark.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from browser import BROWSER_PATH
from PIL import Image

SHAPES = {"light": (1100, 860), "dark": (390, 844)}
MOST_BYTES = 200_000
REPORT_HEIGHT = {"light": 1265, "dark": 985}  # of what is shown of it: to the end of a section
COLOURS = 128


@contextmanager
def demo_of(*words: str) -> Iterator[str]:
    """The address of a demo, served by the command line while the context lasts; as a shell's background job, which
    is told to ignore Ctrl-C."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "diffdistill", "demo", *words, f"port={port}"]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # processes inherit that
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    assert server.stdout is not None and server.stderr is not None
    try:
        address = server.stdout.readline().partition(" ")[0]
        assert address, server.stderr.read()
        yield address
    finally:
        server.send_signal(signal.SIGINT)
        _, said = server.communicate(timeout=60)
    assert (server.returncode, said) == (0, "")


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser, by playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=BROWSER_PATH, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Any, address: str, scheme: str) -> Any:
    """A page of that colour scheme, in the window that goes with it."""
    width, height = SHAPES[scheme]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.goto(address)
    return page


def take(page: Any, path: Path, height: int | None = None) -> None:
    """A picture of the page from its top, `height` or all of it, with few colours so that it stays small."""
    size = page.viewport_size
    clip = {} if height is None else {"clip": {"x": 0, "y": 0, "width": size["width"], "height": height}}
    page.screenshot(path=path, full_page=True, **clip)
    with Image.open(path) as whole:
        whole.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < MOST_BYTES, f"{path} has {path.stat().st_size} bytes"


def main(words: Sequence[str]) -> int:
    run, out = (Path(word).resolve() for word in words)
    with chromium() as browser:
        for scheme, height in REPORT_HEIGHT.items():
            take(opened(browser, (run / "report.html").as_uri(), scheme), out / f"report_{scheme}.png", height)
        with demo_of(f"pipeline={run / 'pipeline'}", "teacher=asset:digits") as address:
            for scheme in SHAPES:
                page = opened(browser, address, scheme)
                page.get_by_role("button", name="Generate").click()
                page.wait_for_selector("#together :text('of the time')")  # what is filled in last
                page.wait_for_timeout(500)  # what fades in has
                take(page, out / f"demo_{scheme}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
