"""What starting a command loads: modules are counted, not seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from diffdistill import tracing
from diffdistill.cli import VERBS
from diffdistill.image_folder import IMG_EXTENSIONS

# what takes a good part of a second each, and belongs to some runs alone
HEAVY = (
    "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.onnx", "sympy", "diffusers", "transformers",
    "peft", "torchvision", "sklearn", "scipy", "matplotlib", "pandas",
)  # fmt: skip


def loaded_by(code: str, *names: str) -> list[str]:
    """Which of the modules a process has loaded after `code`."""
    script = f"{code}\nimport sys\nimport json\nprint(json.dumps([name for name in {names!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout))


def test_importing_the_package_loads_no_library() -> None:
    assert loaded_by("import diffdistill", "torch", "numpy", "hydra", "omegaconf", "rich", "accelerate", *HEAVY) == []


def test_verbs_load_neither_the_compiler_nor_libraries_of_some_runs_alone() -> None:
    modules = sorted({verb.function.partition(":")[0] for verb in VERBS.values()})
    assert {"diffdistill.launch", "diffdistill.doctor", "diffdistill.report"} <= set(modules)
    code = "import importlib\nfor name in " + repr(modules) + ": importlib.import_module(name)"
    assert loaded_by(code, "torch", *HEAVY) == ["torch"]


def test_marks_for_the_compiler_are_torch_s() -> None:
    ours, theirs = tracing.constant(lambda: 1), torch.compiler.assume_constant_result(lambda: 1)
    assert vars(ours) == vars(theirs) != {}

    @tracing.untraced
    def seen() -> bool:
        return torch.compiler.is_compiling()

    assert torch.compile(lambda x: x + (2 if seen() else 1), backend="eager")(torch.zeros(1)) == 1


def test_endings_of_pictures_are_torchvision_s() -> None:
    from torchvision.datasets import folder

    assert folder.IMG_EXTENSIONS == IMG_EXTENSIONS
