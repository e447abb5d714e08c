"""Where weights come from: folders, hub ids and the shipped assets, or a seed."""

from __future__ import annotations

import logging
import re
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


def refuse_unsafe(folder: Path, key: str = "path") -> None:
    """Refuse a folder of weights that would run code: Python files, which diffusers takes for classes of the pipeline,
    and weights as pickles where there are none as safetensors. Looks into the folder and those directly below.
    """
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        names = sorted(path.name for path in place.iterdir())
        code = [name for name in names if name.endswith(".py")]
        if code:
            fix = "Read it; if the stock classes do, remove it and mend model_index.json."
            raise UserError(key, "must hold no code, which loading would run", str(place / code[0]), fix)
        pickled = [name for name in names if _PICKLED.fullmatch(name)]
        if pickled and not any(name.endswith(".safetensors") for name in names):
            fix = "If you trust it, load it with diffusers or transformers and save_pretrained(DIR) it again."
            constraint = "must hold weights as safetensors: a pickle may run code"
            raise UserError(key, constraint, str(place / pickled[0]), fix)


# what diffusers and transformers would unpickle
_PICKLED = re.compile(r"(?:diffusion_)?(?:pytorch_)?model(?:[.\-].*)?\.(?:bin|pt|pth|ckpt)(?:\.index\.json)?")


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
