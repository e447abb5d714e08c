"""Several processes: the curve of one, runs that go on with another number, and how they stop together."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from interruption import assert_equal, killed_after, outcome

from diffdistill import config_files, ranks
from diffdistill.cli import main
from diffdistill.config import build, compose
from diffdistill.data import Mixture2D
from diffdistill.errors import UserError
from diffdistill.latents import Latents, write
from diffdistill.parallel import Parallel
from diffdistill.rng import Rng

BASE = ["train", "trainer.log_every=1", "evaluation=none", "health=null", "probe=null"]
DMD2 = [*BASE, "data=gmm2d", "distiller=dmd2"]
GAN = ["distiller.gan_weight=0.1", "distiller.critic_gan_weight=0.1"]
LORA = ["roles.student=lora", "roles.fake_score=lora"]
CASES = {
    "dmd2 with a GAN": [*DMD2, *GAN, "distiller.student_every=2"],
    "scm": [*BASE, "data=gmm2d", "distiller=scm"],
    "four steps": [*DMD2, "distiller.times=[20.0,5.0,1.0,0.3]"],
    "tdm": [*BASE, "experiment=gmm2d_tdm"],
    "lora on one backbone": [*DMD2, *LORA, "lora.rank=4"],
}  # fmt: skip
STATISTICS = ["experiment=gmm2d_f_distill", "evaluation=none", "health=null", "probe=null", "trainer.log_every=1"]
HALVES = ["trainer.batch_size=8", "trainer.accumulate=2"]  # on one process what two do with the first of them alone
OF_THE_BATCH = ("gmm2d_f_distill", "gmm2d_uni_instruct")
WHOLE, HALF = ["trainer.batch_size=16"], ["trainer.batch_size=8"]


def curves(folder: Path) -> dict[str, list[float]]:
    """Losses and norms of a run by name."""
    found: dict[str, list[float]] = {}
    for line in outcome(folder)[1]:
        for name, value in line.items():
            if "/" in name and isinstance(value, float):
                found.setdefault(name, []).append(value)
    return found


def apart(ours: Path, theirs: Path) -> float:
    """The largest difference of two runs' curves, as a share of the curve's largest value."""
    a, b = curves(ours), curves(theirs)
    assert a.keys() == b.keys()
    assert all(len(a[name]) == len(b[name]) for name in a)
    return max(
        max(abs(x - y) for x, y in zip(a[name], b[name], strict=True)) / max(1e-30, *map(abs, a[name])) for name in a
    )


def succeeded(found: list[processes.Ended]) -> None:
    for one in found:
        assert one.status == 0, one.err
        assert set(one.statuses) <= {0, None}, one.err


@pytest.mark.parametrize("steps", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_two_processes_have_the_curves_of_one(steps: int, tmp_path: Path) -> None:
    """In float32, with the same micro-batches, bit for bit; adapters that are sharded to rounding.

    Where a network runs sharded, gradients of one tensor that come from a block add up before those of the next block
    join them. Adapters have two in each block, so their sums are rounded in another order.
    """
    words = {name: [*case, f"trainer.steps={steps}"] for name, case in CASES.items()}
    meshes: dict[str, list[str]] = {
        "shard": [],
        "gathered": ["parallel.reshard_after_forward=false"],
        "replicate": ["parallel.mesh=replicate", "patch=in_small_messages"],
    }
    for name, line in words.items():
        assert main([*line, *HALVES, f"run_dir={tmp_path / name / 'one'}"]) == 0
    lines = [
        [*line, *HALF, *mesh, f"run_dir={tmp_path / name / kind}"]
        for name, line in words.items()
        for kind, mesh in meshes.items()
    ]
    succeeded(processes.run(2, lines))
    found = {(name, kind): apart(tmp_path / name / "one", tmp_path / name / kind) for name in words for kind in meshes}
    print(found)
    assert max(found.pop(("lora on one backbone", kind)) for kind in ("shard", "gathered")) < 5e-4
    assert max(found.values()) < 1e-6


@pytest.mark.slow
def test_every_method_has_the_curve_of_one(tmp_path: Path) -> None:
    """Every experiment on points, its pairs and trajectories included; sharded and as replicas.

    Two of them take ratios over the whole batch: one process has it in one piece.
    """
    names = [name for name in config_files.groups()["experiment"] if name.startswith("gmm2d_")]
    quiet = ["evaluation=none", "health=null", "probe=null", "trainer.log_every=1"]
    words = {name: ["train", f"experiment={name}", *quiet, "trainer.steps=6"] for name in names}
    meshes, lines = ("shard", "replicate"), []
    for name, line in words.items():
        alone = WHOLE if name in OF_THE_BATCH else HALVES
        assert main([*line, *alone, f"run_dir={tmp_path / name / 'one'}"]) == 0
        lines += [[*line, *HALF, f"parallel.mesh={mesh}", f"run_dir={tmp_path / name / mesh}"] for mesh in meshes]
    succeeded(processes.run(2, lines))
    found = {(n, m): apart(tmp_path / n / "one", tmp_path / n / m) for n in words for m in meshes}
    print({key: value for key, value in found.items() if value})
    assert max(found.pop((name, mesh)) for name in OF_THE_BATCH for mesh in meshes) < 5e-3
    assert max(found.values()) < 5e-4
    assert max(value for (_, mesh), value in found.items() if mesh == "replicate") == 0


@pytest.mark.slow
def test_a_batch_cut_in_two_differs_by_rounding_alone(tmp_path: Path) -> None:
    """In float64, against one process with the whole batch: what is not linear in the batch goes through all of it.

    Heads compute in float32 whatever the networks do.
    """
    words = {**CASES, "statistics of the batch": ["train", *STATISTICS]}
    lines = {name: [*case, "trainer.steps=50"] for name, case in words.items()}
    places = {name: tmp_path / name for name in lines}
    precise = "patch=in_float64"
    succeeded(processes.run(1, [[*lines[n], *WHOLE, precise, f"run_dir={p / 'one'}"] for n, p in places.items()]))
    succeeded(processes.run(2, [[*lines[n], *HALF, precise, f"run_dir={p / 'two'}"] for n, p in places.items()]))
    found = {name: apart(place / "one", place / "two") for name, place in places.items()}
    print(found)
    assert max(found.values()) < 1e-4
    assert max(found[name] for name in ("four steps", "tdm", "lora on one backbone")) < 1e-8


INTERIM = [
    "evaluation=default", "evaluation.teacher=none", "evaluation.metrics=[swd]", "evaluation.num_samples=50",
    "evaluation.interim_samples=40", "evaluation.batch_size=15", "evaluation.every=4",
]  # fmt: skip
GOING = [*DMD2, *GAN, *INTERIM, "trainer.steps=12", "trainer.checkpoint_every=3", "trainer.keep=20"]


def test_a_run_goes_on_with_more_processes_and_with_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one process to two that shard, to two that replicate, and back: evaluations, weights and curves of one that
    was alone and never stopped."""
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    assert main([*GOING, *HALVES, f"run_dir={alone}"]) == 0
    with killed_after(monkeypatch, 4):  # the student's update comes with the first critic's and every fifth after it
        main([*GOING, *HALVES, f"run_dir={moved}"])
    more = ["train", f"run_dir={moved}", "resume=true", "trainer.accumulate=1"]
    found = processes.run(2, [[*more, "kill=4"], [*more, "parallel.mesh=replicate", "kill=4"]])
    succeeded(found)
    assert [one.statuses for one in found] == [[None, None]] * 2
    assert "going on after step 3" in found[0].out
    assert "going on after step 6" in found[0].out
    assert found[1].out.count("\n") == 1  # the main process talks for both
    with pytest.raises(UserError, match=r"batch_size .* must be the 16 samples per step .* Set trainer.batch_size=8"):
        build_and_resume(moved)
    assert main(["train", f"run_dir={moved}", "resume=true"]) == 0
    assert apart(alone, moved) < 1e-6
    assert_close(alone, moved)


def build_and_resume(folder: Path) -> None:
    from diffdistill import train

    train(run_dir=str(folder), resume=True, **{"trainer.batch_size": 4})


def assert_close(ours: Path, theirs: Path) -> None:
    (a, _, values_a), (b, _, values_b) = outcome(ours), outcome(theirs)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-5, atol=1e-7), name
    assert values_a == values_b
    summaries = [json.loads((folder / "summary.json").read_text())["student"] for folder in (ours, theirs)]
    assert summaries[0]["swd"] == pytest.approx(summaries[1]["swd"], rel=1e-5)


WRONG = {
    "nan_on_rank_1": "fake_score: loss critic/denoising must be finite, at step 3",
    "bad_file_on_rank_1": "data.path must hold images that can be read, got b.png",
    "full_disk": "run_dir must be writable: the disk is full",
}


def test_what_goes_wrong_on_one_stops_all_with_one_message(tmp_path: Path) -> None:
    line = [*DMD2, *HALF, "trainer.steps=6", "trainer.checkpoint_every=5"]
    found = processes.run(2, [[*line, f"patch={patch}", f"run_dir={tmp_path / patch}"] for patch in WRONG])
    assert [one.statuses for one in found] == [[2, 2, 2]] * 2, [one.err for one in found]
    told = [[line for line in one.err.splitlines() if line.startswith("error: ")] for one in found]
    assert not told[1]
    assert all(message in line for message, line in zip(WRONG.values(), told[0], strict=True))
    assert "must be finite" in (tmp_path / "nan_on_rank_1" / "metrics.jsonl").read_text().splitlines()[-1]


def test_a_signal_to_one_saves_and_stops_all(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    line = [*DMD2, *HALF, "trainer.steps=100000", f"run_dir={folder}"]
    started = processes.start(2, ["-m", "diffdistill", *line])
    until = time.monotonic() + 60
    while not (folder / "metrics.jsonl").is_file() and time.monotonic() < until:
        time.sleep(0.1)
    started[1].send_signal(signal.SIGTERM)
    found = processes.ended(started)
    assert [one.status for one in found] == [0, 0], [one.err for one in found]
    assert "stopped by SIGTERM after step" in found[0].out
    (saved,) = (folder / "checkpoints").glob("step-*")
    assert f"after step {int(saved.name[5:])}," in found[0].out


def test_gradients_are_reduced_once_per_update(tmp_path: Path) -> None:
    """However many micro-batches there are."""
    words = [*DMD2, *HALF, "trainer.steps=2", "patch=counted_reductions"]
    found = processes.run(2, [[*words, f"trainer.accumulate={n}", f"run_dir={tmp_path / str(n)}"] for n in (1, 3)])
    succeeded(found)
    once, thrice = (int(line[11:]) for line in found[0].out.splitlines() if line.startswith("REDUCTIONS "))
    assert once == thrice > 0


@pytest.mark.parametrize("name", ["gmm2d", "latents"])
def test_shares_of_the_data_do_not_overlap(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What two processes draw is what one draws, shared out."""
    data: Any = Mixture2D()
    if name == "latents":
        x = torch.arange(37.0)[:, None, None, None].expand(37, 4, 2, 2)
        write(tmp_path / "set", x, {"label": torch.arange(37)}, None, "nowhere", per_shard=10)
        data = Latents(str(tmp_path / "set"))
    needs = frozenset({"x0"})

    def drawn(rank: int, size: int, batch_size: int) -> list[torch.Tensor]:
        monkeypatch.setattr(ranks, "place", lambda: (rank, size))
        trainer = build(compose("train", ["data=gmm2d", f"trainer.batch_size={batch_size}", "trainer.accumulate=2",
                                          "run_dir=x"]).trainer)  # fmt: skip
        return [
            data.batch(trainer.rng(step, "data", i, "cpu"), trainer.global_batch, needs, torch.float32).x0
            for step in range(3)
            for i in range(2)
        ]

    one = drawn(0, 1, 8)
    halves = [drawn(rank, 2, 4) for rank in range(2)]
    for whole, first, second in zip(one, *halves, strict=True):
        assert torch.equal(whole, torch.cat([first, second]))


def test_rollout_lengths_are_shared() -> None:
    first, second = (Rng(0, 3, "student", range(start, start + 4)) for start in (0, 4))
    assert torch.equal(first.shared().integers(4, (1,)), second.shared().integers(4, (1,)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"mesh": "hybrid"}, "shard_size must be given for mesh=hybrid"),
        ({"shard_size": 2}, "shard_size must be null for mesh=shard"),
        ({"mesh": "hybrid", "shard_size": 3}, "parallel.shard_size must divide the 4 processes, got 3"),
        ({"backend": "nccl"}, "parallel.backend must be gloo or null without a GPU, got nccl"),
        ({"timeout": 0.0}, "timeout must be > 0"),
    ],
)
def test_what_the_processes_cannot_do_is_refused(
    words: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(UserError, match=message):
        Parallel(**words).check(4)


def test_processes_that_nobody_introduced_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE must come with .*MASTER_ADDR"), Parallel().running():
        pass


def test_one_process_shards_nothing(tmp_path: Path) -> None:
    """Whatever mesh is asked for."""
    for mesh in ("shard", "replicate"):
        words = ["trainer.steps=2", f"parallel.mesh={mesh}", f"run_dir={tmp_path / mesh}"]
        assert main([*DMD2, *HALF, *words]) == 0
    assert_equal(tmp_path / "shard", tmp_path / "replicate")


@pytest.mark.slow
def test_groups_of_processes_have_the_curve_of_one(tmp_path: Path) -> None:
    """Four processes, two of which hold everything together; in float64, as four summands add up in another order."""
    line = [*CASES["four steps"], "trainer.steps=8", "patch=in_float64"]
    four = ["trainer.batch_size=4", "parallel.mesh=hybrid", "parallel.shard_size=2"]
    one = ["trainer.batch_size=4", "trainer.accumulate=4"]
    succeeded(processes.run(1, [[*line, *one, f"run_dir={tmp_path / 'one'}"]]))
    succeeded(processes.run(4, [[*line, *four, f"run_dir={tmp_path / 'four'}"]]))
    assert apart(tmp_path / "one", tmp_path / "four") < 1e-10
