"""compare: budgets, runs that go on, refusals, the report."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from interruption import killed_after

import diffdistill
from diffdistill import leaderboard
from diffdistill.compare_budget import Budget
from diffdistill.compare_plan import Plan
from diffdistill.config import compose
from diffdistill.errors import UserError
from diffdistill.trainer import NonFiniteError

# of the figures those that the tests read: neighbours among 10,000 reference samples take seconds each time
FIGURES = "evaluation.metrics=[modes,kl,w2,swd,nfe]"
FAST = f"overrides=['evaluation.num_samples=300','{FIGURES}','trainer.batch_size=8','probe=null']"
WORDS = ("data=gmm2d", "budget.iterations=3", FAST)


def run(out: Path, *words: str) -> Any:
    return diffdistill.compare(*(words or WORDS), out=str(out))


def table(out: Path) -> dict[str, dict[str, str]]:
    with (out / "table.csv").open(newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compare") / "two"
    assert run(out, *WORDS, "distillers=[sid,dmd2]") == 0
    return out


def settings(name: str, *words: str) -> Any:
    return compose("train", ["data=gmm2d", f"distiller={name}", "run_dir=none", *words])


@pytest.mark.parametrize(("name", "steps"), [("sid", 7), ("dmd2", 31), ("consistency", 7)])
def test_iterations_are_updates_of_the_student(name: str, steps: int) -> None:
    """DMD2 updates its student at steps 0, 5, 10, ...: the seventh time at step 30."""
    assert Budget(7, None, None).steps(settings(name)) == (steps, 7)


def test_a_student_that_waits_is_counted_from_its_first_update() -> None:
    assert Budget(7, None, None).steps(settings("sida", "distiller.student_from=4")) == (11, 7)


def test_seconds_buy_steps_at_their_measured_price(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffdistill.compare_budget as budget

    monkeypatch.setattr(budget, "_prices", lambda settings: (0.5, 10.0))
    assert Budget(None, 60.0, None).steps(settings("sid")) == (95, 95)  # .95 (60 - 10) / .5
    assert Budget(20, 60.0, None).steps(settings("sid")) == (20, 20)
    assert Budget(None, 60.0, None).steps(settings("dmd2")) == (95, 19)
    with pytest.raises(UserError, match=r"budget\.seconds.*one step"):
        Budget(None, 10.2, None).steps(settings("sid"))


def test_a_method_dearer_than_its_price_ends_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffdistill.compare_budget as budget

    monkeypatch.setattr(budget, "_prices", lambda settings: (1e-6, 0.0))
    assert run(tmp_path, "data=gmm2d", "distillers=[dmd2]", "budget.seconds=2", FAST) == 0
    row = table(tmp_path)["dmd2"]
    assert 0.5 < float(row["cpu_seconds"]) <= 2
    assert int(row["steps"]) == json.loads((tmp_path / "dmd2" / "summary.json").read_text())["iterations"]
    assert int(row["iterations"]) == -(-int(row["steps"]) // 5)  # DMD2's student takes every fifth step


def test_a_price_is_positive_and_counts_the_making_of_pairs() -> None:
    from diffdistill.compare_budget import _prices

    step, once = _prices(settings("dmd", "trainer.batch_size=8", "pairs.num=5000"))
    assert step > 0 and once > 0
    assert _prices(settings("sid", "trainer.batch_size=8"))[1] == 0.0


@pytest.mark.parametrize(
    ("values", "key"),
    [((None, None, None), "iterations, seconds"), ((0, None, None), "iterations"), ((1, -1.0, None), "seconds"),
     ((1, None, 0), "batch_size")],
)  # fmt: skip
def test_a_budget_without_limit_or_below_zero_is_refused(values: tuple, key: str) -> None:
    with pytest.raises(UserError, match=key):
        Budget(*values)


def test_each_method_is_a_run_of_its_own_with_the_shared_seed_and_settings(two: Path) -> None:
    for name, steps in (("sid", 3), ("dmd2", 11)):
        summary = json.loads((two / name / "summary.json").read_text())
        assert summary["iterations"] == steps
        config = (two / name / "config.yaml").read_text()
        assert "batch_size: 8" in config and "seed: 0" in config
    assert diffdistill.evaluate(run=str(two / "sid"), num_samples=50, metrics=["swd"])["figures"]["swd"] > 0


def test_the_table_has_every_method_its_cost_and_the_teachers(two: Path) -> None:
    rows = table(two)
    assert set(rows) == {"teacher", "teacher, one step from 20", "sid", "dmd2"}
    assert {"modes", "kl", "w2", "swd", "nfe", "cpu_seconds", "peak_memory_bytes", "iterations", "steps"} <= set(
        rows["sid"]
    )
    assert (rows["dmd2"]["iterations"], rows["dmd2"]["steps"], rows["dmd2"]["nfe"]) == ("3", "11", "1")
    assert rows["teacher"]["nfe"] == "35" and float(rows["teacher"]["kl"]) < float(rows["sid"]["kl"])
    assert float(rows["sid"]["cpu_seconds"]) > 0 and int(rows["sid"]["peak_memory_bytes"]) > 0
    page = (two / "table.md").read_text()
    assert page.count("\n| ") == 4 and "| sid |" in page
    for picture in ("samples.png", "distance_against_cost.png"):
        assert (two / picture).stat().st_size > 10_000


def test_the_same_call_again_trains_nothing_and_gives_the_same_table(two: Path) -> None:
    before, stamp = (two / "table.csv").read_text(), (two / "sid" / "summary.json").stat().st_mtime_ns
    assert run(two, *WORDS, "distillers=[sid,dmd2]") == 0
    assert (two / "table.csv").read_text() == before
    assert (two / "sid" / "summary.json").stat().st_mtime_ns == stamp


def test_two_comparisons_give_the_same_figures(two: Path, tmp_path: Path) -> None:
    run(tmp_path / "again", *WORDS, "distillers=[sid]")
    ours, theirs = table(tmp_path / "again")["sid"], table(two)["sid"]
    for key in ("kl", "w2", "swd", "modes", "iterations", "peak_memory_bytes"):
        assert ours[key] == theirs[key]


def test_a_method_that_was_killed_goes_on_from_its_checkpoint(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with killed_after(monkeypatch, 8):  # in the seventh of DMD2's eleven steps
        run(tmp_path, *WORDS, "distillers=[dmd2]")
    assert not (tmp_path / "table.csv").exists()
    capsys.readouterr()
    assert run(tmp_path, *WORDS, "distillers=[dmd2]") == 0
    assert "going on after step 6 of 11" in capsys.readouterr().out
    assert table(tmp_path)["dmd2"]["kl"] == table(two)["dmd2"]["kl"]


def test_methods_are_added_to_a_comparison_and_all_stay_in_the_table(two: Path, tmp_path: Path) -> None:
    out = tmp_path / "more"
    shutil.copytree(two, out)
    assert run(out, *WORDS, "distillers=[consistency]") == 0
    assert {"sid", "dmd2", "consistency"} <= set(table(out))


def test_a_method_from_another_start_brings_the_teachers_one_step_from_there(two: Path, tmp_path: Path) -> None:
    out = tmp_path / "starts"
    shutil.copytree(two, out)
    before = table(out)
    later = [word.replace("'evaluation", "'distiller.times=[2.5]','evaluation", 1) for word in WORDS]
    with pytest.raises(UserError, match="overrides must be"):
        run(out, *later, "distillers=[consistency]")
    config = out / "sid" / "config.yaml"  # as if sid had begun at 2.5
    config.write_text(config.read_text().replace("times: null", "times: [2.5]"))
    assert run(out, *WORDS, "distillers=[dmd2]") == 0
    assert {"teacher", "teacher, one step from 20", "teacher, one step from 2.5"} < set(table(out))
    for name in ("teacher", "teacher, one step from 20"):
        assert table(out)[name] == before[name]


def test_a_finished_run_of_other_settings_is_refused_not_read(two: Path, tmp_path: Path) -> None:
    out = tmp_path / "edited"
    shutil.copytree(two, out)
    config = out / "sid" / "config.yaml"
    config.write_text(config.read_text().replace("alpha: 1.2", "alpha: 1.0"))
    with pytest.raises(UserError, match=r"sid: distiller\.alpha must be 1\.0"):
        run(out, *WORDS, "distillers=[sid,dmd2]")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["data=gmm2d", "budget.iterations=4", FAST, "distillers=[sid]"], "budget must be"),
        (["data=gmm2d", "budget.iterations=3", "distillers=[sid]"], "overrides must be"),
        ([*WORDS, "seed=1", "distillers=[sid]"], "seed must be 0"),
        ([*WORDS, "data.std=0.07", "distillers=[consistency]"], "data must be gmm2d, .* got gmm2d data.std=0.07"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused_by_name(two: Path, words: list[str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        run(two, *words)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["data=gmm2d", "distillers=[sid]"], "budget"),
        ([*WORDS, "distillers=[]"], "distillers must name a method"),
        ([*WORDS, "distillers=[sidd]"], r"distillers must name options.*sid"),
        ([*WORDS, "distillers=[denoising]"], "fewer evaluations than the teacher"),
        (["data=gmm2d", "budget.iterations=3", "distillers=[sid]", "overrides=['trainer.steps=9']"], "overrides must"),
        ([*WORDS, "budget.batch_size=4", "distillers=[sid]"], "overrides must leave .* 'trainer.batch_size=8'"),
        (["data=gmm2d", "budget.iterations=3", "distillers=[sid]", "overrides=['data.std=1']"], "overrides must leave"),
        (["data=gmm2d", "budget.iterations=3", "distillers=[dmd]", "overrides=['pairs=null']"], "needs pair"),
        (
            [
                "data=gmm2d",
                "budget.iterations=3",
                "distillers=[sid,consistency]",
                "overrides=['trainer.clip.fake_score=1.0']",
            ],
            "^consistency: trainer.clip.fake_score must",
        ),
        (["data=gauss", "budget.iterations=3", "distillers=[vsd]"], "needs null|needs.*null"),
        (["data=digits", "budget.iterations=3", "distillers=[dmd2_2step]"], "distillers must name options"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path, words: list[str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        run(tmp_path / "bad", *words)
    assert not (tmp_path / "bad").exists()


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="out must be new or empty"):
        run(tmp_path / "full", *WORDS, "distillers=[sid]")


def test_a_method_that_diverges_is_told_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    module = importlib.import_module("diffdistill.compare")
    real = module.call

    def call(node: Any, function: Any) -> Any:
        if node.distiller._target_.endswith("SiD") and not node.dry_run:
            raise NonFiniteError("student", "loss student/sid", 1)
        return real(node, function)

    monkeypatch.setattr(module, "call", call)
    assert run(tmp_path / "out", *WORDS, "distillers=[sid,consistency]") == 1
    rows = table(tmp_path / "out")
    assert "finite" in rows["sid"]["error"] and rows["sid"]["kl"] == ""
    assert float(rows["consistency"]["kl"]) > 0
    assert "sid" in (tmp_path / "out" / "table.md").read_text()

    assert run(tmp_path / "out", *WORDS, "distillers=[consistency]") == 1  # the failure stays in the table
    assert "finite" in table(tmp_path / "out")["sid"]["error"]
    assert run(tmp_path / "out", *WORDS, "distillers=[sid]") == 1  # and may be tried again
    monkeypatch.setattr(module, "call", real)
    assert run(tmp_path / "out", *WORDS, "distillers=[sid]") == 0
    assert table(tmp_path / "out")["sid"]["error"] == ""
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["methods"]["sid"]["error"] is None


def test_processes_that_share_a_folder_lose_no_decision_of_each_other(tmp_path: Path) -> None:
    plan = Plan(tmp_path, {"data": "gmm2d"})
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: plan.decide(f"method{i % 40}", {"words": [], "steps": i}), range(80)))
    methods = plan.methods()
    assert set(methods) == {f"method{i}" for i in range(40)}
    first = methods["method7"]["steps"]
    assert plan.decide("method7", {"words": [], "steps": -1})["steps"] == first  # who came first decided
    with pytest.raises(UserError, match="data must be gmm2d"):
        Plan(tmp_path, {"data": "digits"}).decide("method7", {})


def test_the_leaderboard_page_has_the_command_the_machine_and_the_table(two: Path, tmp_path: Path) -> None:
    leaderboard.write(str(two), str(tmp_path / "docs"))
    page = (tmp_path / "docs" / "two.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("diffdistill compare"))
    assert shlex.split(line)[2:] == [
        "data=gmm2d", "distillers=[sid,dmd2]", "budget.iterations=3", "seed=0", FAST
    ]  # fmt: skip
    assert (two / "table.md").read_text().strip() in page and "torch" in page
    assert (tmp_path / "docs" / "two.csv").read_text() == (two / "table.csv").read_text()
    with pytest.raises(UserError, match="comparison must hold"):
        leaderboard.write(str(tmp_path), str(tmp_path / "docs"))


def test_a_dry_run_checks_and_writes_nothing(tmp_path: Path) -> None:
    assert run(tmp_path / "dry", *WORDS, "distillers=[sid]", "dry_run=true") == 0
    assert not (tmp_path / "dry").exists()


def test_the_teachers_row_is_the_plain_teacher_whichever_method_comes_first(two: Path, tmp_path: Path) -> None:
    """A guided recipe is trained on another teacher; the table's is the one all methods are held against."""
    shutil.copytree(two, out := tmp_path / "out")
    from diffdistill.compare import _with_plain_teacher
    from diffdistill.compare_plan import Plan

    stored = json.loads((out / "compare.json").read_text())
    guided = settings("sid_lsg", "guidance.scale=1.5", "experiment=none")
    plan = Plan(out, {key: stored[key] for key in ("data", "overrides", "seed", "budget")})
    assert _with_plain_teacher(guided, plan).guidance.scale == 1.0
    asked = Plan(out, {**plan.shared, "overrides": ["guidance.scale=2.0"]})
    assert _with_plain_teacher(guided, asked).guidance.scale == 2.0


def test_values_of_the_data_reach_every_method(tmp_path: Path) -> None:
    whole = "overrides=['evaluation.num_samples=300','trainer.batch_size=8']"  # all figures that fit, and the probe
    run(tmp_path / "out", *WORDS[:2], whole, "data.std=0.07", "distillers=[consistency]")
    assert float(table(tmp_path / "out")["consistency"]["coverage"]) > 0
    assert "std: 0.07" in (tmp_path / "out" / "consistency" / "config.yaml").read_text()
