"""Dependencies point one way: process, denoiser, solvers and generator, distillers, trainer, command line."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import diffdistill

ROOT = Path(diffdistill.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if "assets" not in path.parts)


def name_of(path):
    parts = ("diffdistill", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


@cache
def imports(path):
    """Every module that a file names in an import, anywhere in it; of relative imports the absolute name."""
    found = set()
    package = name_of(path).split(".") if path.stem == "__init__" else name_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return frozenset(found)


def own(path):
    """Modules of this package that a file imports."""
    return {name for name in imports(path) if name in MODULES and name != "diffdistill"}


def reached(path):
    """Modules of this package that a file imports, directly or not."""
    seen, todo = set(), [path]
    while todo:
        for name in own(todo.pop()) - seen:
            seen.add(name)
            todo.append(MODULES[name])
    return seen


def under(package):
    return [path for name, path in MODULES.items() if name == package or name.startswith(package + ".")]


def starts_with(names, *prefixes):
    return {name for name in names if any(name == p or name.startswith(p + ".") for p in prefixes)}


def test_the_rules_see_the_files_and_their_imports():
    assert own(ROOT / "process.py") == {"diffdistill.autodiff", "diffdistill.errors"}
    assert "diffdistill.process" in own(ROOT / "denoiser.py")
    assert "torch.func.jvp" in attributes(ROOT / "autodiff.py")
    assert "diffdistill.autodiff" in reached(ROOT / "generator.py")


def test_process_knows_nothing_of_the_package_but_errors_and_autodiff():
    assert own(ROOT / "process.py") <= {"diffdistill.autodiff", "diffdistill.errors"}
    assert own(ROOT / "autodiff.py") <= {"diffdistill.errors", "diffdistill.forward_rules"}
    assert not own(ROOT / "forward_rules.py")
    assert not own(ROOT / "errors.py")


@pytest.mark.parametrize(
    ("lower", "higher"),
    [
        ("denoiser", ("solvers", "generator", "times", "losses", "distillers", "trainer", "networks.roles")),
        ("rng", ("denoiser", "solvers", "generator", "distillers", "trainer")),
        ("solvers", ("generator", "distillers", "trainer", "data", "networks.roles")),
        ("generator", ("solvers", "distillers", "trainer", "data", "networks.roles")),
        ("networks", ("distillers", "trainer", "data", "evaluation", "generator", "solvers")),
        ("distillers", ("trainer", "data", "evaluation", "export", "checkpoint", "run", "config", "cli")),
        ("trainer", ("run", "cli", "cli_run", "config", "export")),
    ],
)
def test_dependencies_point_one_way(lower, higher):
    forbidden = [f"diffdistill.{name}" for name in higher]
    for path in under(f"diffdistill.{lower}"):
        assert not starts_with(reached(path), *forbidden), path.name


@pytest.mark.parametrize("path", under("diffdistill.distillers"), ids=name_of)
def test_distillers_do_not_know_trainer_diffusers_accelerate_or_hydra(path):
    assert not starts_with(imports(path), "accelerate", "hydra", "omegaconf", "diffusers")
    assert not starts_with(reached(path), "diffdistill.trainer", "diffdistill.networks.diffusers")


@pytest.mark.parametrize("name", ["process", "denoiser", "solvers", "generator", "rng", "times", "losses", "autodiff"])
def test_the_core_needs_torch_and_numpy_alone(name):
    path = ROOT / f"{name}.py"
    assert not starts_with(imports(path), "diffusers", "accelerate", "hydra", "omegaconf", "sklearn", "wandb", "peft")


def attributes(path):
    """Dotted names that a file uses, such as torch.func.jvp."""
    return {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}


def test_autodiff_is_the_only_caller_of_forward_mode_derivatives():
    duals = ("torch.autograd.forward_ad", "torch._VF._make_dual", "torch._VF._unpack_dual")
    forward = ("torch.func.jvp", "torch.func.jacfwd", "torch.func.linearize", *duals)
    callers = {
        path.name
        for path in FILES
        if starts_with(imports(path) | attributes(path), *forward, "torch.autograd.functional")
    }
    # the rules are used by autodiff alone, to which a layer of our own adds its own, and plain loops, which it is
    # measured against, do without it
    assert callers == {"autodiff.py", "forward_rules.py", "bench_plain.py"}
    assert {path.name for path in FILES if "diffdistill.forward_rules" in imports(path)} == {"autodiff.py", "onednn.py"}


def test_the_rng_of_the_package_is_the_only_source_of_random_numbers_in_methods():
    drawing = ("torch.randn", "torch.rand", "torch.randint", "torch.randn_like", "torch.rand_like", "np.random")
    for package in ("distillers", "generator", "solvers", "losses", "times", "denoiser", "process"):
        for path in under(f"diffdistill.{package}"):
            assert not starts_with(attributes(path), *drawing), path.name
