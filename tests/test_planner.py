"""What a plan says against what real steps hold, closed forms of operations, and recipes that `train` takes."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import planned
import pytest
import torch
from planned import Case
from test_matrix import DISTILLERS
from tiny_families import TINY, write_families
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffdistill import UserError, planner
from diffdistill.cli import main
from diffdistill.config import build, compose
from diffdistill.memory import PeakBytes
from diffdistill.networks.families.stock import Stock
from diffdistill.rehearsal import Rehearsal, rehearse
from diffdistill.rng import Rng
from diffdistill.shapes_only import Ledger, OnAGpu
from diffdistill.stand_in import StandIn, stand_in

QUICK = ("digits dmd2 copy", "digits dmd2 lora", "shapes_t2i dmd2 lora")


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=[] if c.name in QUICK else [pytest.mark.slow]) for c in planned.cases()],
)
def test_the_peak_is_that_of_a_real_step(case: Case) -> None:
    found, _ = planned.predicted(case)
    assert found == pytest.approx(planned.measured(case), rel=0.05)


def digits(*words: str, data: str = "digits", devices: int = 1, lowered: bool = False) -> Rehearsal:
    settings = compose("train", [f"data={data}", "experiment=none", "evaluation=none", "run_dir=none", *words])
    with torch.device("meta"):
        network = build(settings.networks)
    return rehearse(settings, build(settings.data), network, devices, lowered)


@pytest.mark.parametrize("method", DISTILLERS)
def test_every_method_can_be_planned(method: str) -> None:
    found = digits(f"distiller={method}", "trainer.batch_size=2", data="gmm2d")
    trained = {part.role for part in found.parts if part.optimizer}
    assert trained and all(part.gradients == part.weights for part in found.parts if part.role in trained)
    assert all(value > 0 for value in found.flops.values())


def test_operations_are_per_sample_and_micro_batch() -> None:
    one, two = digits("trainer.batch_size=4"), digits("trainer.batch_size=8")
    again = digits("trainer.batch_size=4", "trainer.accumulate=3")
    for phase, value in one.flops.items():
        assert two.flops[phase] == pytest.approx(2 * value, rel=1e-3)
        assert again.flops[phase] == pytest.approx(3 * value, rel=1e-6)
    assert (one.samples, two.samples, again.samples) == (4, 8, 12)


def test_a_denoising_step_computes_three_times_its_forward_pass() -> None:
    """Of an MLP's linears, but for the gradient of the first one's input."""
    settings = compose("train", ["data=gmm2d", "distiller=denoising", "evaluation=none", "run_dir=none"])
    with torch.device("meta"):
        network = build(settings.networks)
    linears = [m for m in network.modules() if isinstance(m, nn.Linear)]
    each = [2 * int(settings.trainer.batch_size) * m.in_features * m.out_features for m in linears]
    found = sum(rehearse(settings, build(settings.data), network, 1, lowered=False).flops.values())
    assert 3 * sum(each) - 2 * max(each) <= found <= 3 * sum(each)


def test_attention_is_four_products_and_ten_backwards() -> None:
    B, H, N, M, D = 2, 3, 40, 24, 8
    ledger = Ledger({}, {})
    q, k, v = (torch.empty(B, H, n, D, device="meta", requires_grad=True) for n in (N, M, M))
    with OnAGpu(ledger, lowered=False), ledger:
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        forward = ledger.flops
        out.sum().backward()
    assert out.shape == (B, H, N, D) and q.grad is not None and q.grad.shape == q.shape
    assert forward == 4 * B * H * N * M * D
    assert ledger.flops - forward == 10 * B * H * N * M * D


def test_rollouts_count_with_their_mean_length() -> None:
    """Of four steps on average one and a half come before the one with gradients."""
    words = ("distiller=dmd2", "trainer.batch_size=2", "distiller.student_every=1")
    one = digits(*words)
    four = digits(*words, "distiller.times=[20.0,5.0,1.0,0.3]")
    forward = _forward(2)
    rolled = (four.flops["student"] - one.flops["student"]) / forward
    assert rolled == pytest.approx(1.5, abs=0.5)  # of a dozen steps


def _forward(batch: int) -> float:
    settings = compose("train", ["data=digits", "evaluation=none", "run_dir=none", "experiment=none"])
    with torch.device("meta"):
        network = build(settings.networks)
        x, t, label = torch.empty(batch, 1, 8, 8), torch.ones(batch), torch.ones(batch, dtype=torch.int64)
        ledger = Ledger({}, {})
        with torch.no_grad(), OnAGpu(ledger, lowered=False), ledger:
            network(x, t, {"label": label})
    return ledger.flops


def test_devices_share_what_is_held_and_not_what_is_computed() -> None:
    one, four = digits(), digits(devices=4)
    for kind in ("weights", "optimizer", "averages"):
        assert four.peak[kind] == pytest.approx(one.peak[kind] / 4)
    assert four.flops == one.flops
    assert four.gathered > 0 and one.gathered == 0
    assert four.samples == 4 * one.samples


# parameters as their model cards and papers tell them
PUBLISHED = {
    "sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684, "flux": 11_901_408_320,
    "wan_1_3b": 1_418_996_800, "wan_14b": 14_288_491_584, "cogvideox_5b": 5_570_283_072, "sana": 1_604_462_752,
    "hunyuan_video": 12_821_012_544, "qwen_image": 20_430_401_088, "ltx_video": 1_923_385_472,
}  # fmt: skip
FOLDER = Path(planner.__file__).parent / "assets" / "sizes"


@pytest.mark.parametrize("size", sorted(path.name for path in FOLDER.iterdir()))
def test_shipped_shapes_are_those_of_the_published_models(size: str) -> None:
    from diffdistill.networks.families.folder import family_of
    from diffdistill.networks.families.words import latent_factors

    path = f"asset:sizes/{size}"
    settings = compose("train", [f"networks={family_of(path)}", f"networks.path={path}", "data=gmm2d"])
    with torch.device("meta"):
        network: Stock = build(settings.networks)
    if size in PUBLISHED:
        assert sum(weight.numel() for weight in network.parameters()) == PUBLISHED[size]
    pixels = None if network.model.config.get("sample_size") else (480, 832)
    data = stand_in(network, pixels, 9, latent_factors(path))
    assert set(network.needs) <= data.sizes.keys()


@pytest.mark.parametrize("family", sorted(TINY))
def test_every_family_runs_on_the_conditions_it_asks_for(family: str) -> None:
    network: Any = TINY[family].network()
    data = StandIn(TINY[family].shape, network.asked(), network.num_classes)
    batch = data.batch(Rng(0, ids=range(2)), 2, frozenset({"x0"}), torch.float32)
    assert batch.x0 is not None and set(network.needs) <= batch.cond.keys()
    with torch.no_grad():
        out = network(batch.x0, torch.ones(2), batch.cond)
    assert out.shape == (2, *TINY[family].shape)


@contextmanager
def autocast_of_cuda() -> Iterator[None]:
    """CUDA's autocast where there is no GPU, for tensors that only claim to be on one."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


class Block(nn.Module):
    """What networks are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.groups = nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.layer, self.linear, self.out = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.groups(self.convolution(x))).flatten(2).mT
        x = x + self.out(nn.functional.gelu(self.linear(self.layer(x))))
        return x + (x @ x.mT).softmax(-1) @ x


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_kept_for_the_backward_pass_is_what_cuda_s_autocast_keeps(frozen: bool) -> None:
    def made() -> tuple[Block, Tensor]:
        return Block().requires_grad_(not frozen), torch.zeros(2, 8, 12, 12, requires_grad=True)

    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            block, x = made()
        with PeakBytes([*block.parameters(), x]) as real, autocast_of_cuda():
            kept = block(x)
        gc.collect()
        bytes_kept = real.current
    with torch.device("meta"):
        block, x = made()
    ledger = Ledger({"weights": [*block.parameters(), x]}, {})
    mode = OnAGpu(ledger, lowered=True)
    with mode, ledger:
        ours = block(x)
    mode.forget()
    gc.collect()
    assert ours.dtype == kept.dtype
    assert sum(ledger.bytes.values()) == bytes_kept


def report(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", *words, "out=plan.json"]) == 0
    capsys.readouterr()
    found: dict[str, Any] = json.loads(Path("plan.json").read_text())
    return found


@pytest.mark.parametrize(
    ("words", "memory", "helps"),
    [
        (("experiment=digits_dmd2", "evaluation=none"), "100MiB", []),
        (("experiment=digits_dmd2", "evaluation=none"), "22MiB", ["roles.student=lora"]),
        (("experiment=digits_dmd2", "evaluation=none", "precision=fp32", "trainer.batch_size=256"), "34MiB",
         ["trainer.batch_size", "trainer.accumulate"]),
    ],
    ids=["fits", "lora", "batch"],
)  # fmt: skip
def test_a_plan_that_fits_is_a_recipe_that_train_takes(
    words: tuple[str, ...],
    memory: str,
    helps: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    found = report(capsys, *words, f"device_memory={memory}")
    assert found["fits"] and found["steps"][-1]["bytes"] <= found["device_memory"]
    assert all(any(word.startswith(key) for word in found["overrides"]) for key in helps)
    assert bool(helps) == (len(found["steps"]) > 1)
    named = [step["words"] for step in found["steps"]]
    assert all(len(set(words)) == len(words) for words in named)
    sizes = [step["bytes"] for step in found["steps"] if not step["what"].startswith("without")]
    assert sizes == sorted(sizes, reverse=True)
    assert main(["train", *found["overrides"], "run_dir=new", "dry_run=true"]) == 0
    settings = compose("train", found["overrides"])
    assert settings.trainer.batch_size * settings.trainer.accumulate == found["samples_per_step"]


def test_a_pipeline_of_one_s_own_is_planned_and_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_families(tmp_path)
    own = ("networks=sd15", "distiller=dmd2", "networks.path=families/sd15", "data.path=prompts.txt")
    whole = report(capsys, *own)
    found = report(capsys, *own, f"device_memory={whole['steps'][0]['bytes'] * 0.7 / 2**20:.1f}MiB")
    assert found["fits"] and len(found["steps"]) > 1
    assert found["overrides"][0] == "experiment=t2i_dmd2"
    assert main(["train", *found["overrides"], "run_dir=new", "dry_run=true"]) == 0


def test_more_devices_are_the_last_resort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = report(capsys, "data=gmm2d", "distiller=dmd2", "device_memory=1.6MiB", "device_rate=2")
    assert found["fits"] and found["devices"] > 1
    first = next(i for i, step in enumerate(found["steps"]) if step["devices"] > 1)
    assert found["steps"][first - 1]["words"][-1] == "roles.fake_score=lora"
    assert found["seconds_per_step"] == pytest.approx(found["flops_per_step"] / 2e12)


def test_what_cannot_fit_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "data=gmm2d", "distiller=dmd2", "device_memory=0.01MiB"]) == 0
    assert "does not fit" in capsys.readouterr().out


def test_a_family_without_a_folder_is_planned_at_a_published_size() -> None:
    words, fill = planner.completed(["networks=wan", "distiller=scm"])
    assert words == ["networks=wan", "distiller=scm", "data=prompts", "evaluation=none"]
    assert fill == ["networks.path='asset:sizes/wan_1_3b'", "data.path=FILL_IN"]
    words, fill = planner.completed(["networks=dit", "distiller=dmd2"])
    assert words == ["networks=dit", "distiller=dmd2", "data=latents", "evaluation=none"]
    assert planner.completed(["experiment=digits_dmd2"]) == (["experiment=digits_dmd2"], [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["device_memory=much"], "device_memory must be a positive size"),
        (["device_memory=0GiB"], "device_memory must be a positive size"),
        (["device_memory=24XB"], "Write 24GiB; units are"),
        (["devices=0"], "devices must be >= 1"),
        (["device_rate=0"], "device_rate must be > 0 TFLOP/s, or measure"),
        (["out=."], "out must name a file in an existing folder"),
        (["networks=sdx", "distiller=dmd2"], "networks must name an option of the group networks, got sdx. Did you"),
        (["nowhere=1"], "nowhere"),
        (["data=prompts", "data.path=x", "networks=digits"], "prompts need a network that reads text"),
    ],
)
def test_mistakes_are_one_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told


def test_a_file_of_a_run_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in ("config.yaml", "summary.json"):
        (tmp_path / name).write_text("{}")
    assert main(["plan", "data=gmm2d", f"out={tmp_path}/summary.json"]) == 2
    assert "out must not replace a file of a run" in capsys.readouterr().err
    assert (tmp_path / "summary.json").read_text() == "{}"


def test_the_measured_rate_is_this_machine_s() -> None:
    assert 1e-4 < planner.measured_rate(size=256) < 1e4
    with pytest.raises(UserError):
        planner.plan(None, 1, -1.0, None, None, None, ())
