"""`bench pipeline`: the recorded network calls are all of a pipeline's, and the figures are what they say."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from torch import nn

from diffdistill import bench_pipeline
from diffdistill.bench_pipeline import PipelineBench, Round, figures
from diffdistill.compiling import check_compile
from diffdistill.errors import UserError
from diffdistill.pipeline_calls import networks_of, recorded_calls, tensors_in
from diffdistill.pipelines import PipelineSampler

DEFAULTS: dict[str, Any] = {
    "batch_sizes": [1], "pairs": 2, "precision": "fp32", "channels_last": False, "compile": False, "device": "cpu",
    "quick": False, "out": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of three steps and ten classes, of a class that digits students are exported as."""
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel

    folder = tmp_path_factory.mktemp("unconditional") / "pipeline"
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
        layers_per_block=1, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        num_class_embeds=10,
    )  # fmt: skip
    ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler()).save_pretrained(folder)
    (folder / "call.json").write_text(json.dumps({"schema": 1, "call": {"num_inference_steps": 3}, "nfe": 3}))
    return folder


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with a text encoder, guidance and a decoder."""
    folder = tiny_pipelines.written("sd15", tmp_path_factory.mktemp("told") / "sd15")
    call = {"num_inference_steps": 2, "height": 16, "width": 16}
    contract = {"schema": 1, "call": call, "nfe": 2, "prompts": ["a red circle", "a blue square"]}
    (folder / "call.json").write_text(json.dumps(contract))
    return folder


def benched(folder: Path) -> PipelineBench:
    return PipelineBench(PipelineSampler.load(str(folder)), torch.device("cpu"))


def test_figures_are_medians_over_rounds_and_the_ratio_is_of_them() -> None:
    rounds = [
        Round(10.0, 11.0, ((1.0, 2.0, 3.0), (2.0, 2.0, 4.0)), 12.0),
        Round(13.0, 13.0, ((1.0, 1.0, 2.0), (1.0, 3.0, 5.0)), 15.0),
        Round(20.0, 18.0, ((2.0, 2.0, 2.0), (2.0, 2.0, 2.0)), 30.0),
    ]
    found = figures(rounds, ["text_encoder.forward", "unet.forward", "unet.forward"])
    networks = statistics.median([6, 8, 4, 9, 6, 6])
    assert found["networks_milliseconds"] == networks == 6
    assert found["call_milliseconds"] == 13 and found["as_called_milliseconds"] == 15
    assert found["ratio"] == pytest.approx(13 / 6) and found["ratio_as_called"] == pytest.approx(15 / 6)
    assert found["beside_networks_milliseconds"] == 7
    assert found["null_ratio"] == pytest.approx(statistics.median([1.1, 1.0, 0.9]))
    assert found["parts"] == [
        {"name": "text_encoder.forward", "count": 1, "milliseconds": 1.5},
        {"name": "unet.forward", "count": 2, "milliseconds": statistics.median([5, 6, 3, 8, 4, 4])},
    ]
    alone = figures([Round(1.0, 1.0, ((1.0,),))], ["unet.forward"])
    assert alone["as_called_milliseconds"] is None and alone["ratio_as_called"] is None


def test_every_call_of_a_pipeline_with_text_and_decoder_is_recorded(told: Path) -> None:
    """Counted once more by torch's own hooks, which see every module."""
    bench = benched(told)
    outermost: list[str] = []
    depth = [0]
    names = {id(module): name for name, part in networks_of(bench.pipeline).items() for module in part.modules()}

    def before(module: nn.Module, inputs: Any) -> None:
        outermost.extend([names[id(module)]] if not depth[0] else [])
        depth[0] += 1

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        depth[0] -= 1

    handles = [
        nn.modules.module.register_module_forward_pre_hook(before),
        nn.modules.module.register_module_forward_hook(after),
    ]
    try:
        with recorded_calls(bench.pipeline) as calls:
            bench.whole(bench.inputs(2))
    finally:
        for handle in handles:
            handle.remove()
    unets = [call for call in calls if call.name == "unet.forward"]
    assert [call.name for call in calls if call not in unets] == ["text_encoder.forward"] * 2 + ["vae.decode"]
    assert len(unets) == 2 and {len(call.arguments[0]) for call in unets} == {4}  # with and without the prompt
    assert set(outermost) == {"text_encoder", "unet", "vae"}
    assert outermost.count("unet") == 2 and outermost.count("text_encoder") == 2


def test_a_call_made_again_alone_gives_the_pipeline_s_answer_and_the_pipeline_is_left_as_it_was(
    unconditional: Path,
) -> None:
    bench = benched(unconditional)
    before = {name: dict(vars(part)) for name, part in bench.pipeline.unet.named_modules()}
    calls = bench.recorded(4)
    assert [call.name for call in calls] == ["unet.forward"] * 3
    times = [float(call.arguments[1]) for call in calls]
    assert times[0] > times[1] > times[2]
    for call in calls:
        (was,), (now,) = call.answer, tensors_in(call.again())
        assert torch.equal(was, now) and not now.requires_grad
        assert call.keywords["class_labels"].tolist() == [0, 1, 2, 3]
    assert {name: dict(vars(part)) for name, part in bench.pipeline.unet.named_modules()} == before


def test_a_module_called_by_itself_is_recorded_and_a_method_of_its_own_comes_back(unconditional: Path) -> None:
    pipeline = benched(unconditional).pipeline
    pipeline.unet.time_proj.forward = own = pipeline.unet.time_proj.forward
    with recorded_calls(pipeline) as calls:
        out = pipeline.unet.conv_in(torch.zeros(1, 1, 8, 8))
        pipeline.unet.time_proj(torch.zeros(1))
    assert [call.name for call in calls] == ["unet.conv_in.forward", "unet.time_proj.forward"]
    assert torch.equal(calls[0].answer[0], out)
    assert vars(pipeline.unet.time_proj)["forward"] is own


def test_a_network_that_answers_otherwise_when_asked_again_is_refused(unconditional: Path) -> None:
    bench = benched(unconditional)
    bench.pipeline.unet.down_blocks[0].resnets[0].dropout.p = 0.5
    bench.pipeline.unet.train()
    with pytest.raises(UserError, match=r"answer the same again: unet.forward does not"):
        bench.recorded(2)


def test_the_file_has_what_was_timed_and_on_what(
    unconditional: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    given = DEFAULTS | {"batch_sizes": [1, 3], "out": str(out)}
    status = bench_pipeline.pipeline(str(unconditional), **given)
    assert status in (0, bench_pipeline.NOISY)
    report = json.loads(out.read_text())
    assert {"schema", "machine", "versions", "pipeline", "form", "results"} == set(report)
    assert report["pipeline"]["nfe"] == 3 and report["pipeline"]["class"] == "ConsistencyModelPipeline"
    assert report["pipeline"]["parameters"]["unet"] > 1000
    assert report["form"] == {"precision": "fp32", "channels_last": False, "compile": False}
    for size, result in zip((1, 3), report["results"], strict=True):
        assert result["batch_size"] == size and result["pairs"] == 2
        assert [(part["name"], part["count"]) for part in result["parts"]] == [("unet.forward", 3)]
        assert result["ratio"] == pytest.approx(result["call_milliseconds"] / result["networks_milliseconds"])
    assert report["machine"]["threads"] and report["versions"]["diffusers"]
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("verdict:")


def test_in_bf16_channels_last_networks_are_so_and_what_cannot_be_called_is_left_out(unconditional: Path) -> None:
    sampler = PipelineSampler.load(str(unconditional), dtype=torch.bfloat16)
    bench = PipelineBench(sampler, torch.device("cpu"), channels_last=True)
    (result,) = [bench.measured(2, bench.recorded(2), 1)]
    weight = bench.pipeline.unet.conv_out.weight
    assert weight.dtype == torch.bfloat16 and weight.is_contiguous(memory_format=torch.channels_last)
    assert result["ratio_as_called"] is None and result["ratio"] > 0  # numpy has no bfloat16


@pytest.mark.parametrize(
    ("null", "status", "text"),
    [(1.0, 0, "costs 1.500 at batch 1 times"), (1.03, 3, "too noisy to tell"), (0.97, 3, "too noisy to tell")],
)
def test_the_verdict_depends_on_the_null_ratio(
    null: float, status: int, text: str, unconditional: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rounds = [Round(3.0, 3.0 * null, ((2.0 * (1 + null) / 2,),))]
    made = {"batch_size": 1, **figures(rounds, ["unet.forward"])}
    monkeypatch.setattr(PipelineBench, "measured", lambda *arguments: made)
    assert bench_pipeline.pipeline(str(unconditional), **DEFAULTS) == status
    assert text in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": "/no/folder/x.json"}, "out must name a file"),
        ({"pairs": 1}, "pairs must be >= 2"),
        ({"batch_sizes": []}, "batch_sizes must name a batch size"),
        ({"batch_sizes": [1, 0]}, "batch_sizes must be >= 1"),
        ({"pipeline": "nowhere"}, "pipeline must be a diffusers pipeline folder"),
        ({"compile": "reduce-overhead"}, "compile reduce-overhead needs a GPU: .* Set compile=default"),
        ({"compile": "max-autotune"}, "compile max-autotune needs a GPU: .* Set compile=max-autotune-no-cudagraphs"),
    ],
)
def test_mistakes_are_told_before_anything_is_timed(
    changes: dict[str, Any], message: str, unconditional: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PipelineBench, "measured", lambda *arguments: pytest.fail("it ran"))
    with pytest.raises(UserError, match=message):
        bench_pipeline.pipeline(**(DEFAULTS | {"pipeline": str(unconditional)} | changes))


def test_without_a_gpu_cuda_is_refused(unconditional: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device must be one that torch finds here, got .*cuda"):
        bench_pipeline.pipeline(str(unconditional), **(DEFAULTS | {"device": "cuda"}))


def test_modes_with_cuda_graphs_are_legal_on_a_gpu_alone() -> None:
    for mode in (False, True, "default", "max-autotune-no-cudagraphs"):
        check_compile(mode, "cpu")  # type: ignore[arg-type]
    for mode in ("reduce-overhead", "max-autotune"):
        check_compile(mode, "cuda")  # type: ignore[arg-type]


def test_a_pipeline_that_takes_neither_prompts_nor_a_batch_size_is_refused(
    unconditional: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = benched(unconditional)
    monkeypatch.setattr(type(bench.pipeline), "__call__", lambda self, image: None)
    with pytest.raises(UserError, match="must take prompts or a batch size"):
        bench.inputs(1)


def test_the_page_s_way_of_loading_a_pipeline_works(unconditional: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With code that is traced but not compiled, which takes a minute."""
    inner = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: inner(self, backend="eager"))
    page = (Path(__file__).parents[1] / "docs" / "speed.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert 'folder = "runs/x/pipeline"' in block
    made: dict[str, Any] = {}
    exec(block.replace("runs/x/pipeline", str(unconditional)), made)
    assert made["images"].shape == (16, 1, 8, 8) and made["images"].dtype == torch.bfloat16
