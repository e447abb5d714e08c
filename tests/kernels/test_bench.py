"""`bench attention`: rates, floors, exit statuses."""

from __future__ import annotations

import json

import pytest
import torch
from attention_cases import skip_unless

from diffdistill.errors import UserError
from diffdistill.kernels.attention import bench, bench_threads, cpu
from diffdistill.kernels.attention.bench_floors import floors
from diffdistill.kernels.attention.bench_runners import MASKS, Group, layout_of, runners
from diffdistill.kernels.attention.bench_threads import Scaling
from diffdistill.kernels.attention.layout import BlockLayout


def measured(**changes):
    values = {
        "length": 16384, "width": 128, "dtype": "bf16", "direction": "forward", "runner": "ours", "density": 1.0,
        "milliseconds": 10.0, "spread": 0.0, "gflops": 400.0, "share": 0.8,
    }  # fmt: skip
    return bench.Measured(**(values | changes))


def test_a_small_bench_writes_rates_of_computed_blocks(tmp_path, capsys):
    skip_unless("cpu")
    groups = [
        Group(256, 64, "fp32", "forward", (1.0, 0.5), ("sdpa", "gather_sdpa", "gather_bmm")),
        Group(256, 64, "fp32", "backward", (0.5,), ("sdpa", "gather_bmm")),
    ]
    out, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    before = torch.get_num_threads()
    status = bench.run(groups, 2, None, str(out), str(plot))
    assert status in (0, bench.NOISY) and torch.get_num_threads() == before
    report = json.loads(out.read_text())
    assert report["machine"]["kernel"] == cpu.variant() and report["machine"]["processor"]
    rows = {(r["direction"], r["runner"], r["density"]): r for r in report["results"]}
    assert set(rows) == {
        ("forward", "ours", 1.0), ("forward", "ours", 0.5), ("forward", "sdpa", 1.0), ("forward", "gather_sdpa", 0.5),
        ("forward", "gather_bmm", 0.5), ("backward", "ours", 0.5), ("backward", "sdpa", 1.0),
        ("backward", "gather_bmm", 0.5),
    }  # fmt: skip
    for (direction, _, density), row in rows.items():
        operations = (4 if direction == "forward" else 10) * 64 * 256**2 * density
        assert row["gflops"] == pytest.approx(operations / row["milliseconds"] / 1e6)
    top = report["ceilings"][0]
    assert rows["forward", "ours", 1.0]["share"] == pytest.approx(
        rows["forward", "ours", 1.0]["gflops"] / top["gflops"]
    )
    assert plot.stat().st_size > 1000
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("verdict:")


def test_masks_are_made_once_and_have_no_rate():
    skip_unless("cpu")
    made = [r for r in runners(Group(512, 64, "fp32", "forward", (1.0, 0.5), tuple(MASKS))) if r.name in MASKS]
    assert [(r.name, r.density, r.operations) for r in made] == [(name, 0.5, 0) for name in MASKS]
    assert all(isinstance(r.call(), BlockLayout) for r in made)
    wide = [g for g in bench.all_groups() if set(MASKS) & set(g.rivals)]
    assert {(g.length, g.width, g.dtype, g.direction) for g in wide} == {
        (16384, 128, dtype, "forward") for dtype in ("bf16", "fp32")
    }
    rows, _ = bench._measure(Group(512, 64, "fp32", "forward", (0.5,), tuple(MASKS)), 1, bench.CPU)
    assert [r.share is None for r in rows] == [False, True, True]


def test_layouts_of_the_bench_have_equal_rows():
    layout = layout_of(1024, 0.3)
    assert layout.kv_num.unique().tolist() == [2] and layout.density == 0.25
    assert layout_of(1024, 1.0).density == 1.0


def test_every_runner_of_a_group_computes_the_same():
    skip_unless("cpu")
    group = Group(256, 64, "fp32", "forward", (0.5,), ("gather_sdpa", "gather_bmm"))
    ours, gathered, products = (r.call() for r in runners(group))
    torch.testing.assert_close(ours[0], gathered, rtol=1e-4, atol=1e-5)
    rows = torch.cat(products)  # in the order of the chunks: rows of equal length keep theirs
    torch.testing.assert_close(rows.view(1, 1, 256, 64), gathered, rtol=1e-4, atol=1e-5)


def test_floors_are_the_ratios_that_they_name():
    rows = [
        measured(),
        measured(density=0.1, milliseconds=1.25, share=0.6),
        measured(runner="flex", milliseconds=50.0, density=1.0),
        measured(runner="flex", milliseconds=4.0, density=0.1),
        measured(runner="gather_sdpa", milliseconds=6.0, density=0.1),
        measured(runner="gather_bmm", milliseconds=5.0, density=0.1),
        measured(dtype="fp32", milliseconds=80.0, share=None),
        measured(dtype="fp32", density=0.1, milliseconds=8.0, share=None),
        measured(dtype="fp32", density=0.1, runner="mask of means", milliseconds=1.0, share=None),
        measured(dtype="fp32", density=0.1, runner="mask of samples", milliseconds=5.0, share=None),
        measured(direction="backward", milliseconds=20.0),
        measured(direction="backward", milliseconds=2.0, density=0.1),
        measured(direction="backward", runner="sdpa", milliseconds=40.0),
    ]
    found = {f.name: (f.value, f.least, f.met) for f in floors(rows, Scaling({"forward": 1.6}, {"forward": 1.9}))}
    cell = "S=16384, D=128, density"
    assert found == {
        f"share of the ceiling, bf16 forward, {cell} 1.00": (0.8, 0.65, True),
        f"share of the ceiling, bf16 forward, {cell} 0.10": (0.6, 0.65, False),
        f"over flex, bf16 forward, {cell} 1.00": (5.0, 4.0, True),
        f"over flex, bf16 forward, {cell} 0.10": (pytest.approx(3.2), 4.0, False),
        f"over gather + SDPA, bf16 forward, {cell} 0.10": (pytest.approx(4.8), 4.0, True),
        f"linear in density, bf16 forward, {cell} 0.10": (pytest.approx(0.8), 0.8, True),
        f"linear in density, fp32 forward, {cell} 0.10": (pytest.approx(1.0), 0.8, True),
        f"attention over making its mask of means, fp32 forward, {cell} 0.10": (8.0, 1 / 0.15, True),
        f"attention over making its mask of samples, fp32 forward, {cell} 0.10": (1.6, 1 / 0.6, False),
        f"over dense, bf16 backward, {cell} 1.00": (2.0, 1.7, True),
        f"over dense, bf16 backward, {cell} 0.10": (20.0, 15.0, True),
        "two threads over one, forward": (1.6, 1.7, False),
    }


def test_a_processor_without_a_bf16_unit_has_no_share_to_miss():
    assert not floors([measured(share=None)], None)


@pytest.mark.parametrize(
    ("share", "spread", "status", "last"),
    [
        (0.9, 0.1, 0, "verdict: all 1 floors met, 1 of the goals"),
        (0.3, 0.1, 1, "verdict: 1 of 1 floors missed: share of the ceiling"),
        (0.3, 0.2, 3, "verdict: too noisy to tell (the ceiling varied by 20%"),
    ],
)
def test_the_verdict_is_the_exit_status(monkeypatch, capsys, share, spread, status, last):
    skip_unless("cpu")
    row = measured(share=share)
    monkeypatch.setattr(bench, "_measure", lambda group, repeats, side: ([row], bench.Ceiling("bf16", 500.0, spread)))
    monkeypatch.setattr(bench.ceiling, "bandwidth", lambda: 1e10)
    assert bench.run([Group(16384, 128, "bf16", "forward", (1.0,), ())], 5, None, None, None) == status
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith(last)


@pytest.mark.slow
def test_two_processes_and_two_threads_are_compared(monkeypatch):
    skip_unless("cpu")
    monkeypatch.setattr(bench_threads, "ROUNDS", 1)
    found = bench_threads.scaling()
    assert set(found.ratios) == set(found.processes) == {"forward", "backward"}
    assert all(0.2 < value < 4 for value in (*found.ratios.values(), *found.processes.values()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repeats": 4}, "repeats must be >= 5, got 4"),
        ({"out": "nowhere/x.json"}, "out must name a file in an existing folder"),
        ({"plot": "nowhere/x.png"}, "plot must name a file in an existing folder"),
        ({"plot": "x.jsn"}, "plot must end in one of"),
    ],
)
def test_mistakes_are_told_before_any_work(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "run", lambda *arguments: pytest.fail("it ran"))
    with pytest.raises(UserError, match=message):
        bench.attention(**({"device": "cpu", "repeats": 5, "quick": True, "out": None, "plot": None} | changes))


def test_a_machine_without_the_kernel_is_told_why(monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: False)
    monkeypatch.setattr(cpu, "why_not", lambda: "no C++ compiler")
    with pytest.raises(UserError, match="bench attention must find its kernel, got no C\\+\\+ compiler"):
        bench.attention("cpu", 5, True, None, None)


def test_a_machine_without_a_gpu_is_told_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device must be a GPU that the kernels take, got cuda: torch finds none"):
        bench.attention("cuda", 5, True, None, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench.bench_cuda.support, "missing", lambda device: "the GPU is older than sm_80")
    with pytest.raises(UserError, match="got cuda: the GPU is older than sm_80"):
        bench.attention("cuda", 5, True, None, None)


@pytest.mark.parametrize(("spread", "status"), [(0.0, 0), (0.5, bench.NOISY)])
def test_a_gpus_verdict_has_no_floors_but_tells_noise(monkeypatch, capsys, spread, status):
    top = bench.Ceiling("bf16", 500.0, spread)
    monkeypatch.setattr(bench, "_measure", lambda group, repeats, side: ([measured(runner="flex")], top))
    side = bench.Side(None, None, None, lambda: {"gpu": "one"}, ("TF/s", 1000.0))
    assert bench.run([Group(16384, 128, "bf16", "forward", (1.0,), ())], 5, None, None, None, side) == status
    told = capsys.readouterr().out
    assert "gpu one" in told and ("no floors are set" in told) == (status == 0)
