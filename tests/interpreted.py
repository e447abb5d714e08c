"""The Triton kernels under Triton's interpreter, beside compiled ones in the same process."""

from __future__ import annotations

import importlib
import sys
from contextlib import contextmanager

import pytest

LAUNCH = "diffdistill.kernels.attention.triton_kernels.launch"


@contextmanager
def interpreting():
    """Within the context the `triton` backend takes CPU tensors, and its kernels are interpreted.

    Triton decides where a function is defined, its own library's too: Python modules of both are imported anew.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        held = {name: sys.modules.pop(name) for name in list(sys.modules) if _ours(name)}
        try:
            yield importlib.import_module(LAUNCH)
        finally:
            for name in [name for name in sys.modules if _ours(name)]:
                del sys.modules[name]
            sys.modules.update(held)


def _ours(name: str) -> bool:
    return name.startswith(LAUNCH.rpartition(".")[0] + ".") or (
        name.split(".")[0] == "triton" and not name.startswith("triton._C")
    )
