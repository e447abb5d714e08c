"""notebooks/: stored without outputs, defining nothing, importing what there is. `make notebooks` runs them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from diffdistill.denoiser import Denoiser
from diffdistill.errors import UserError
from diffdistill.evaluation import sketches
from diffdistill.networks.exact import Gaussian
from diffdistill.process import EDM
from diffdistill.solvers import DPMpp2M, Solver, ddim, heun, karras, sample, states

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DEFINING = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def tree(path: Path) -> ast.Module:
    """All its code; magics are left out."""
    code = [source(cell) for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    return ast.parse(re.sub(r"^%.*$", "", "\n".join(code), flags=re.MULTILINE))


def words(path: Path) -> str:
    return "\n\n".join(source(cell) for cell in read(path)["cells"] if cell["cell_type"] == "markdown")


def test_there_are_five_in_order() -> None:
    names = ["process", "teacher_ode", "one_method_on_2d", "compare_methods", "digits_to_pipeline"]
    assert [path.stem for path in NOTEBOOKS] == [f"0{number}_{name}" for number, name in enumerate(names, 1)]


@each
def test_it_is_stored_without_outputs(path: Path) -> None:
    content = read(path)
    assert set(content["metadata"]) == {"kernelspec", "language_info"}
    for cell in content["cells"]:
        assert set(cell["metadata"]) <= {"tags"}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, source(cell)


@each
def test_it_defines_nothing_and_imports_what_there_is(path: Path) -> None:
    for node in ast.walk(tree(path)):
        assert not isinstance(node, DEFINING), ast.unparse(node)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("diffdistill"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@each
def test_every_question_has_an_answer_and_something_to_see(path: Path) -> None:
    cells = read(path)["cells"]
    asked = [index for index, cell in enumerate(cells) if "**Question.**" in source(cell)]
    answered = [index for index, cell in enumerate(cells) if "**Answer.**" in source(cell)]
    assert len(asked) == len(answered) >= 3
    for index in answered:  # what is answered was seen in a cell before
        assert cells[index - 1]["cell_type"] == "code", source(cells[index])[:80]


@each
def test_its_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?![a-z]+:)([^)#\s]+)", words(path)):
        assert (path.parent / target).resolve().exists(), target


# --- what runs them


@pytest.fixture(scope="module")
def executing() -> ModuleType:
    """docs/execute_notebook.py"""
    pytest.importorskip("nbclient")
    spec = importlib.util.spec_from_file_location("execute_notebook", ROOT / "docs" / "execute_notebook.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("code", "most", "said"),
    [
        ("print(6 * 7)", "60", ""),
        ("1 / 0", "60", "ZeroDivisionError"),
        ("import sys\nprint('look', file=sys.stderr)", "60", "prints to stderr: look"),
        ("import time\ntime.sleep(60)", "2", "timed out"),
    ],
    ids=["well", "error", "stderr", "slow"],
)
def test_a_notebook_that_fails_warns_or_takes_long_is_refused(
    code: str, most: str, said: str, executing: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = read(NOTEBOOKS[0])
    cell = {"cell_type": "code", "execution_count": None, "id": "a", "metadata": {}, "outputs": [], "source": code}
    notebook, out = tmp_path / "n.ipynb", tmp_path / "out" / "n.ipynb"
    notebook.write_text(json.dumps({**content, "cells": [cell]}))
    before = dict(os.environ)
    status = executing.main([str(notebook), str(out), most])
    own = {"PYTEST_CURRENT_TEST"}
    assert {k: v for k, v in os.environ.items() if k not in own} == {k: v for k, v in before.items() if k not in own}
    assert (status, out.exists()) == ((1, False) if said else (0, True))
    if said:
        assert said in capsys.readouterr().err
    else:
        assert read(out)["cells"][0]["outputs"][0]["text"] in ("42\n", ["42\n"])


def test_the_site_names_the_notebooks_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    monkeypatch.delitem(sys.modules, "site_parts", raising=False)
    parts = importlib.import_module("site_parts")
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    (tmp_path / "docs" / "notebooks").mkdir(parents=True)
    (tmp_path / "docs" / "notebooks" / NOTEBOOKS[1].name).write_text("{}")
    assert parts.missing_notebooks() == [path.name for path in NOTEBOOKS if path != NOTEBOOKS[1]]
    linked = parts.filled("[a](02_teacher_ode.ipynb) [b](../docs/leaderboard.md)", "docs/notebooks")
    assert linked == "[a](02_teacher_ode.ipynb) [b](../leaderboard.md)"


# --- what they draw with


@pytest.mark.parametrize("solver", [ddim, heun, DPMpp2M()], ids=["ddim", "heun", "dpmpp_2m"])
def test_states_are_those_that_a_sample_passes_through(solver: Solver) -> None:
    process = EDM(t_min=0.002, t_max=20.0)
    denoiser = Denoiser(Gaussian(process, mean=[[0.4, 0.1]], std=[[0.3, 0.3]]))
    z = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = karras(process, 6)
    passed = list(states(denoiser, solver, times, z, {}))
    assert len(passed) == len(times)
    assert torch.equal(passed[0], 20.0 * z)
    assert torch.equal(passed[-1], sample(denoiser, solver, times, z, {}))
    # from a state on, the rest of the way is the same; DPM-Solver++ remembers the step before
    if not isinstance(solver, DPMpp2M):
        rest = list(states(denoiser, solver, times[3:], passed[3] / times[3], {}))
        assert torch.allclose(rest[-1], passed[-1], atol=1e-12)


def test_sketches_draw_what_they_are_given() -> None:
    x, points = torch.linspace(1, 2, 5), torch.rand(7, 2)
    figure = sketches.curves({"a": {"one": (x, x**2), "two": (x, x)}, "b": {"": (x, x)}}, "t", ("log", "linear"))
    (first, second) = figure.axes
    assert [line.get_ydata().tolist() for line in first.lines] == [(x.double() ** 2).tolist(), x.tolist()]
    assert (first.get_xscale(), first.get_yscale()) == ("log", "linear")
    assert (first.get_title(), second.get_xlabel()) == ("a", "t")
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["one", "two"]
    walked = sketches.paths({"p": torch.stack([points, points + 1])}, points).axes[0]
    assert len(walked.lines) == 3 * 7  # a path, where it begins, where it ends
    assert walked.lines[2].get_xdata()[0] == pytest.approx(float(points[0, 0]) + 1)
    drawn = sketches.arrows({"p": (points, 2 * points)}, points).axes[0].collections[-1]
    assert torch.allclose(torch.from_numpy(drawn.U).float(), 2 * points[:, 0])
    assert len(sketches.panels({"a": points, "b": points}).axes) == 2
    with pytest.raises(UserError, match="must have points and directions"):
        sketches.arrows({"p": (points, points[:3])}, points)
