"""Where weights come from: folders, hub ids and the shipped assets, or a seed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from diffdistill.errors import UserError


def resolve(path: str) -> str | Path:
    """`asset:<name>` -> the folder inside this package; anything else stays as it is."""
    if path.startswith("asset:"):
        return Path(__file__).parents[1] / "assets" / path.removeprefix("asset:")
    return path


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the context torch's own draws start at `seed`; afterwards they go on as if nothing had been drawn."""
    if not 0 <= seed < 2**63:
        raise UserError("seed", "must lie in 0..2^63 - 1", seed, "0 is a good seed.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the context diffusers and transformers draw no progress bars and print no log: what is wrong is told as an
    exception."""
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    before = [
        (module, module.get_verbosity(), module.is_progress_bar_enabled()) for module in (diffusers, transformers)
    ]
    for module, _, _ in before:
        module.set_verbosity(logging.CRITICAL)
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module, level, bar in before:
            module.set_verbosity(level)
            if bar:
                module.enable_progress_bar()
