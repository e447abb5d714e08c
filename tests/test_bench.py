"""The bench's list of passes is the training step's, and what it measures alone is what the step does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffdistill import bench, bench_step, cli, cli_run
from diffdistill.bench_passes import Made, Recorder, answered
from diffdistill.distillers.base import Phase
from diffdistill.errors import UserError
from diffdistill.launch import accelerator_of

DEFAULTS = {
    "distillers": ["dmd2"], "teachers": ["gmm2d"], "pairs": 2, "batch_size": 8, "overrides": [], "device": "cpu",
    "quick": False, "out": None, "plot": None,
}  # fmt: skip


def benched(name: str, *overrides: str) -> bench_step.Bench:
    settings = bench.Pair(name, "gmm2d", tuple(bench._words(name, "gmm2d", 4, overrides))).settings()
    return bench_step.Bench(settings, accelerator_of("fp32", cpu=True), compiled=False)


def test_passes_of_dmd2_are_listed_with_their_direction_and_sum_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    status = bench.step(**(DEFAULTS | {"out": str(out), "plot": str(plot)}))
    assert status in (0, bench.NOISY)
    (result,) = json.loads(out.read_text())["results"]
    parts = {part["name"]: part for part in result["parts"]}
    assert parts["student: student forward + backward, batch 8"]["backward_milliseconds"] > 0
    assert parts["student: target forward, batch 8"]["count"] == 1
    steps = result["steps_in_cycle"]
    assert parts["critic: fake_score forward + backward, batch 8"]["count"] == steps > 1
    assert parts["critic: student forward, batch 8"]["count"] == steps - 1  # one step's samples are the student phase's
    total = sum(part["milliseconds"] for part in parts.values())
    assert result["sum_milliseconds"] == pytest.approx(total)
    assert result["ratio"] == pytest.approx(result["step_milliseconds"] / total)
    own = [part["milliseconds"] for name, part in parts.items() if "batch" in name]
    assert result["ratio_to_passes"] == pytest.approx(result["step_milliseconds"] / sum(own))
    assert result["peak_bytes"] > 4 * result["parameters"] and not any(
        p["graphs_without_gradient"] for p in parts.values()
    )
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("verdict:") and plot.stat().st_size > 1000


@pytest.mark.parametrize("name", ["dmd2", "sida", "mean_flow", "scm"])
def test_a_pass_made_again_alone_gives_what_the_step_got(name: str) -> None:
    bench = benched(name)
    assert {made.direction for made in bench.passes} == (
        {"forward", "jvp"} if name in ("mean_flow", "scm") else {"forward"}
    )
    for made in bench.passes:
        bench.networks.train_only(made.phase.trains)
        again = made.forward()
        for one, other in zip(again, made.answers, strict=True):
            torch.testing.assert_close(one.detach(), other, rtol=1e-5, atol=1e-6)
        assert any(out.requires_grad for out in again) == made.reached
        if made.reached:
            made.backward(again)
            trained = made.role in made.phase.trains
            owned = bench.networks.weights(made.role) if made.role in bench.networks.owned else []
            assert any(weight.grad is not None for weight in owned) == trained
        bench.networks.zero_grad()


@pytest.mark.parametrize("name", ["dmd2", "sida", "scm"])
def test_arithmetic_alone_computes_the_step_s_losses_without_a_network_call(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With exact derivatives left out: a recorded answer has no tangent."""
    bench = benched(name)
    phases = [(step, phase) for step in range(bench.length) for phase in bench.distiller.phases(step)]
    losses, turn = [], iter(bench.passes)
    batches = {step: bench._batches(step) for step in range(bench.length)}
    for step, phase in phases:
        bench.networks.train_only(phase.trains)
        losses.append(phase.loss(batches[step][0], bench.trainer.rng(step, phase.name, 0, "cpu")).total.item())
    for network in {
        id(v.network): v.network for v in (bench.networks[r] for r in bench.networks.modes if r != "weight")
    }.values():
        monkeypatch.setattr(network, "forward", lambda *a: pytest.fail("a network ran"))
    batches = {step: bench._batches(step) for step in range(bench.length)}
    with answered(list(turn)):
        for (step, phase), wanted in zip(phases, losses, strict=True):
            bench.networks.train_only(phase.trains)
            total = phase.loss(batches[step][0], bench.trainer.rng(step, phase.name, 0, "cpu")).total
            assert total.requires_grad
            total.backward()
            if name != "scm":
                assert total.item() == pytest.approx(wanted, rel=1e-6)


def test_a_graph_through_which_no_gradient_comes_is_told() -> None:
    bench = benched("dmd2")
    student, x, t = bench.networks["student"], torch.zeros(4, 2), torch.ones(4)
    cond = {"label": torch.zeros(4, dtype=torch.long)}
    phase = Phase("x", ("student",), lambda batch, rng: None)  # type: ignore[arg-type,return-value]
    bench.networks.train_only(("student",))
    recorder = Recorder()
    with recorder.during(phase):
        used, unused = student(x, t, cond), student(x, t, cond)
        (used + unused.detach()).sum().backward()
    assert [(made.graph, made.reached) for made in recorder.passes] == [(True, True), (True, False)]
    bench.passes = recorder.passes
    assert [part.wasted for part in bench._parts().values()][:2] == [0, 1]


def test_steps_of_a_bench_leave_weights_as_they_were() -> None:
    bench = benched("dmd2")
    before = [weight.clone() for weight in bench.networks.weights("student")]
    bench.cycle()
    bench.round()
    assert all(torch.equal(a, b) for a, b in zip(before, bench.networks.weights("student"), strict=True))


def test_a_pass_adds_its_gradients_to_those_of_the_passes_before_it_in_its_phase(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in the step, where a weight that several passes of a phase use gets a sum; each phase begins anew."""
    bench = benched("f_distill")
    there: dict[int, list[bool]] = {}
    timed = bench._time

    def noted(made: Made) -> None:
        if made.phase.name == "critic" and made.role == "fake_score" and made.reached:
            there.setdefault(id(made.phase), []).append(bench.networks.weights("fake_score")[0].grad is not None)
        timed(made)

    monkeypatch.setattr(bench, "_time", noted)
    bench.round()
    assert list(there.values()) == [[False, True, True, True, True]] * bench.length
    assert all(weight.grad is None for weight in bench.networks.weights("fake_score"))


def test_updates_alone_step_every_role_by_gradients_as_long_as_those_of_the_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ready = benched("dmd2")
    assert {role for made in ready.updates for role in made.norms} == set(ready.state.optimizers)
    found = []

    def apply(*args: Any) -> dict[str, torch.Tensor]:
        found.append(original(*args))
        return found[-1]

    original = ready.trainer.apply
    monkeypatch.setattr(ready.trainer, "apply", apply)
    assert ready._updates() > 0
    for norms, made in zip(found, ready.updates, strict=True):
        assert norms.keys() == made.norms.keys()
        for role, norm in norms.items():
            torch.testing.assert_close(norm, made.norms[role])


def test_a_period_is_found() -> None:
    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

    assert bench_step.period(lambda step: [Named("a")] if step % 3 else [Named("b")]) == 3  # type: ignore[list-item,return-value]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": "/no/folder/x.json"}, "out must name a file"),
        ({"plot": "x.txt"}, "plot must end in one of"),
        ({"pairs": 1}, "pairs must be >= 2"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"distillers": ["dmd3"]}, "distillers must name options of the group distiller, got .*dmd3"),
        ({"teachers": ["nowhere"]}, "teachers must name options of the group networks"),
        ({"teachers": []}, "teachers must name options of the group networks"),
        ({"teachers": ["sd15"]}, "dmd2 on sd15: "),
        ({"overrides": ["trainer.stepz=1"]}, "stepz"),
        ({"overrides": ["compile=reduce-overhead"]}, "compile reduce-overhead needs a GPU"),
        ({"distillers": ["kd"], "overrides": ["roles.student=adapter"]}, "kd on gmm2d: roles.student"),
    ],
)
def test_mistakes_are_told_before_anything_is_timed(
    changes: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "measured", lambda *arguments: pytest.fail("it ran"))
    with pytest.raises(UserError, match=message):
        bench.step(**(DEFAULTS | changes))


def test_without_a_gpu_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device must be one that torch finds here, got .*cuda"):
        bench.step(**(DEFAULTS | {"device": "cuda"}))


def test_all_leaves_out_what_does_not_fit_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = bench.config_files.groups()
    monkeypatch.setattr(bench.config_files, "groups", lambda: groups | {"distiller": ["agd", "boot", "dmd2"]})
    todo, left_out = bench._fitting("all", ["gmm2d"], 4, [])
    assert [pair.distiller for pair in todo] == ["agd", "boot", "dmd2"] and left_out == []
    with pytest.raises(UserError, match="must be trainable by some method, got .*closed-form"):
        bench._fitting("all", ["gauss_exact"], 4, [])


def test_networks_may_be_named_by_their_group(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def step(**given: object) -> int:
        seen.update(given)
        return 0

    monkeypatch.setattr(cli_run, "call", lambda cfg, function: step(**cfg))
    assert cli.main(["bench", "step", "distillers=all", "networks=[digits, transformer_50m, unet_100m]"]) == 0
    assert seen["distillers"] == "all" and list(seen["teachers"]) == ["digits", "transformer_50m", "unet_100m"]


@pytest.mark.parametrize(("networks", "millions"), [("transformer_50m", 50), ("unet_100m", 100)])
def test_networks_of_the_bench_have_the_size_of_their_name(networks: str, millions: int) -> None:
    pair = bench.Pair("dmd2", networks, tuple(bench._words("dmd2", networks, 2, [])))
    recipe = bench.assemble(pair.settings(), "meta")
    assert sum(p.numel() for p in recipe.networks.teacher.parameters()) == pytest.approx(1e6 * millions, rel=0.06)


def test_made_is_named_by_phase_role_direction_and_batch() -> None:
    phase = Phase("critic", ("fake_score",), lambda batch, rng: None)  # type: ignore[arg-type,return-value]
    made = Made(phase, "fake_score", 7, False, "forward", True, lambda: None, (), (True,), [])
    assert made.name == "critic: fake_score features, batch 7"
    made.reached = True
    assert made.name == "critic: fake_score features + backward through its input, batch 7"
