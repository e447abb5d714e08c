"""Run a notebook from top to bottom in a folder of its own and write the executed copy: `make notebooks`.

python docs/execute_notebook.py NOTEBOOK OUT [most seconds]

Status 1, and no copy, if a cell raises, prints to stderr, or all of it takes longer than it may.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

MOST_SECONDS = 120.0
_WIDGET = "application/vnd.jupyter.widget-view+json"


def execute(notebook: Path, out: Path, most: float) -> float:
    """Write the executed copy; returns the seconds it took. Raises RuntimeError with what is wrong with it."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError

    content = nbformat.read(notebook, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        # what it writes goes with it; this process keeps its own environment
        own = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "TMPDIR": folder}
        client = NotebookClient(
            content, timeout=most, kernel_name="python3", resources={"metadata": {"path": folder}},
            extra_arguments=["--IPKernelApp.log_level=40"],  # errors
        )  # fmt: skip
        started = time.monotonic()
        try:
            client.execute(env={**os.environ, **own})
        except (CellExecutionError, CellTimeoutError) as error:
            raise RuntimeError(str(error)) from None
        seconds = time.monotonic() - started
    if seconds > most:
        raise RuntimeError(f"took {seconds:.0f} s, {most:.0f} is the most")
    for cell in content.cells:  # bars are over, and a page would ask another server for the script that draws them
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _WIDGET not in output.get("data", {})]
    content.metadata.pop("widgets", None)
    outputs = [output for cell in content.cells for output in cell.get("outputs", [])]
    loud = [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    if loud:
        raise RuntimeError(f"prints to stderr: {''.join(loud)[:2000]}")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_suffix(".part")
    nbformat.write(content, aside)
    aside.replace(out)  # whole or not there: make takes what is there for done
    return seconds


def main(words: Sequence[str]) -> int:
    notebook, out = Path(words[0]), Path(words[1])
    most = float(words[2]) if len(words) > 2 else MOST_SECONDS
    try:
        seconds = execute(notebook.resolve(), out.resolve(), most)
    except RuntimeError as error:
        print(f"{notebook}: {error}", file=sys.stderr)
        return 1
    print(f"{notebook}: {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
