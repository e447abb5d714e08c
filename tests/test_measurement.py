"""The verb evaluate: every origin against every reference, and that nothing but the samples decides the figures."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import diffdistill
from diffdistill.cli import main
from diffdistill.data import digit_scans
from diffdistill.evaluation import store
from diffdistill.evaluation.features import load_features
from diffdistill.evaluation.frechet import frechet_distance, moments
from diffdistill.evaluation.harness import draw
from diffdistill.evaluation.sources import Files
from diffdistill.pipelines import PipelineSampler

QUICK = ("evaluation=none", "probe=null", "trainer.steps=2", "trainer.batch_size=8")
ALL_OF_DIGITS = {
    "nfe", "latency_ms", "peak_memory_bytes", "fd_pixel", "fd_pixel_ci", "fd", "fd_ci", "kid", "label_agreement",
    "precision", "recall", "density", "coverage", "memorised", "swd", "diversity", "diversity_reference",
}  # fmt: skip
EXACT = ("fd_pixel", "fd", "kid", "precision", "recall", "memorised", "swd", "diversity", "label_agreement")
METRICS = "metrics=[fd_pixel,fd,kid,prdc,memorised,swd,diversity,label_agreement]"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits") / "run"
    assert main(["train", "data=digits", "distiller=dmd2", *QUICK, f"run_dir={path}"]) == 0
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two sets of 300 scans as files, a folder per digit."""
    root = tmp_path_factory.mktemp("scans")
    images, labels = digit_scans()
    for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        if index % 6 > 1:
            continue
        place = root / "ab"[index % 6] / str(label)
        place.mkdir(parents=True, exist_ok=True)
        values = ((image[0] / 2 + 0.5) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(values).save(place / f"{index:04d}.png")
    return root / "a", root / "b"


def measured(*words: str) -> dict[str, Any]:
    return diffdistill.evaluate(*words)


def refusal(capsys: pytest.CaptureFixture, *words: str) -> str:
    capsys.readouterr()
    assert main(["evaluate", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def test_one_command_measures_all_that_a_cpu_can(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "all.json"
    words = [f"pipeline={run / 'pipeline'}", "data=digits", "metrics=[all]", "num_samples=200", "replicates=5"]
    assert main(["evaluate", *words, "latency_batches=[1,3]", f"out={out}"]) == 0
    found = json.loads(out.read_text())
    assert found["figures"].keys() == ALL_OF_DIGITS | {"latency_ms_of_3"}
    said = capsys.readouterr().out
    assert "left out: clip_score: needs prompts and digits has none" in said
    assert set(found["left_out"]) == {
        "clip_score", "modes", "w2", "kl", "frame_fd", "frame_fd_pixel", "velocity_error", "fid", "motion",
    }  # fmt: skip
    # the weights alone are 1.2 MB, and a call on three images makes more
    weights = (run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert weights < found["figures"]["peak_memory_bytes"] < 4 * weights


def test_figures_are_those_of_the_samples(run: Path) -> None:
    """Streamed through files they are what the definition says of all samples at once."""
    found = measured(f"run={run}", "num_samples=150", METRICS, "replicates=3")
    from diffdistill.evaluation.metrics import measure
    from diffdistill.saved_run import load_run

    recipe, _ = load_run(str(run))
    samples, labels = draw(recipe.distiller.generator, recipe.data, 150, 0, 64)
    names = METRICS.removeprefix("metrics=[").removesuffix("]").split(",")
    expected, _ = measure(samples, labels, recipe.data.reference(), names, recipe.data.features(), seed=0, replicates=3)
    for name in expected:
        if name != "diversity_reference":
            assert found["figures"][name] == pytest.approx(expected[name], rel=1e-6), name


@pytest.mark.parametrize("batch", [7, 64])
def test_the_batch_size_does_not_matter(run: Path, batch: int) -> None:
    one, other = (
        measured(f"run={run}", "num_samples=130", METRICS, "replicates=0", f"batch_size={b}") for b in (130, batch)
    )
    for name in EXACT:
        assert other["figures"][name] == pytest.approx(one["figures"][name], rel=2e-5, abs=2e-6), name
    assert one["protocol"] == other["protocol"]


def test_the_order_of_files_does_not_matter(folders: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = folders
    shuffled = tmp_path / "shuffled"
    files = sorted(a.rglob("*.png"))
    for index, place in enumerate(np.random.default_rng(0).permutation(len(files))):
        target = shuffled / files[place].parent.name / f"{index:05d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(files[place], target)
    words = (f"reference={b}", "metrics=[swd,prdc,fd_pixel,memorised]", "replicates=3")
    one, other = (measured(f"samples={folder}", *words) for folder in (a, shuffled))
    assert one["figures"] == other["figures"]


def test_the_number_of_processes_does_not_matter(run: Path, tmp_path: Path) -> None:
    words = [f"run={run}", "num_samples=2300", METRICS, "replicates=2", "batch_size=500"]
    one = measured(*words)
    out = tmp_path / "two.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29511"]
    shared = [f"work={tmp_path / 'work'}", f"out={out}"]
    found = subprocess.run([*launch, "-m", "diffdistill", "evaluate", *words, *shared], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    two = json.loads(out.read_text())
    assert two["figures"] == one["figures"] and two["protocol"] == one["protocol"]
    assert found.stdout.count("label_agreement") == 1


def test_what_was_interrupted_goes_on(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHARD", 40)
    words = [f"run={run}", "num_samples=150", METRICS, "replicates=2"]
    whole = measured(*words)
    calls = itertools.count()
    original = store.RowStore.write

    def write(self: Any, *args: Any) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt
        original(self, *args)

    work = f"work={tmp_path / 'work'}"
    with monkeypatch.context() as patched:
        patched.setattr(store.RowStore, "write", write)
        with pytest.raises(KeyboardInterrupt):
            measured(*words, work)
    assert len(list((tmp_path / "work" / "samples" / "done").iterdir())) == 2
    drawn: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(
            "diffdistill.evaluation.sources.draw", lambda *a, **k: drawn.append(k["first"]) or draw(*a, **k)
        )
        again = measured(*words, work)
    assert drawn == [80, 120]
    assert again["figures"] == whole["figures"]


def test_the_whole_set_is_never_in_memory(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most a shard of samples is alive, whatever their number."""
    from diffdistill.evaluation import sources

    monkeypatch.setattr(store, "SHARD", 20)
    sizes: list[int] = []
    monkeypatch.setattr(sources, "draw", lambda *a, **k: sizes.append(a[2]) or draw(*a, **k))
    measured(f"run={run}", "num_samples=90", "metrics=[swd]")
    assert sizes == [20, 20, 20, 20, 10]


def test_the_teacher_is_measured_from_the_same_seeds(run: Path) -> None:
    found = measured(f"run={run}", "num_samples=120", "metrics=[diversity,fd,nfe]", "replicates=0", "teacher=true")
    assert found["teacher"]["nfe"] > found["figures"]["nfe"] == 1
    assert found["teacher"]["fd"] < found["figures"]["fd"]
    assert found["teacher"]["diversity"] > 0


def test_a_folder_is_measured_against_a_folder_and_its_statistics(folders: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = folders
    file = tmp_path / "b.safetensors"
    words = (f"samples={a}", "data=digits", METRICS, "replicates=2")
    direct = measured(*words, f"reference={b}", f"statistics={file}")
    again = measured(*words, f"reference={file}")
    assert again["figures"] == direct["figures"]
    assert again["protocol"] == direct["protocol"]
    assert direct["figures"]["label_agreement"] > 0.99  # folders 0 to 9 are the classes
    x, y = (Files(str(folder), channels=1) for folder in folders)
    features = [load_file(file)["features"], load_features().features(x.draw(range(x.size)).samples)]
    assert direct["figures"]["fd"] == pytest.approx(frechet_distance(*map(moments, reversed(features))), rel=1e-6)
    assert y.size == len(features[0])


def test_statistics_of_clean_fid_serve_as_reference(folders: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = folders
    words = (f"samples={a}", "data=digits", "replicates=0", "metrics=[fd]")
    file = tmp_path / "b.safetensors"
    direct = measured(*words, f"reference={b}", f"statistics={file}")
    rows = load_file(file)["features"].numpy()
    np.savez(tmp_path / "b.npz", mu=rows.mean(0), sigma=np.cov(rows, rowvar=False))
    np.savez(tmp_path / "feats.npz", feats=rows)
    for name in ("b", "feats"):
        again = measured(*words, f"reference={tmp_path / name}.npz")
        assert again["figures"]["fd"] == pytest.approx(direct["figures"]["fd"], rel=1e-5)


def test_an_earlier_measurement_stands_beside_it_if_its_protocol_is_the_same(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "one.json"
    words = [f"run={run}", "num_samples=100", "metrics=[fd_pixel]", "replicates=2"]
    measured(*words, f"out={out}")
    capsys.readouterr()
    assert main(["evaluate", *words, f"against={out}"]) == 0
    assert "(before)" in capsys.readouterr().out
    said = refusal(capsys, *words, "seed=1", f"against={out}")
    assert "protocol.seed must be the same for figures that are compared, got 0 and 1" in said


def clips(root: Path, still: bool, num: int = 12) -> Path:
    rng = np.random.default_rng(int(still))
    for clip in range(num):
        frames = rng.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
        (root / str(clip)).mkdir(parents=True)
        for index in range(5):
            Image.fromarray(frames[0 if still else index]).save(root / str(clip) / f"{index}.png")
    return root


def test_clips_have_a_motion_and_distances_of_frames(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    moving, still = clips(tmp_path / "moving", False, 60), clips(tmp_path / "still", True, 60)
    words = (f"samples={still}", f"reference={moving}", "clips=true")
    found = measured(*words)["figures"]
    assert found["motion"] == 0 and found["motion_distance"] == pytest.approx(found["motion_reference"])
    # two uniform values on [-1, 1] differ by sqrt(2/3) rms
    assert found["motion_reference"] == pytest.approx((2 / 3) ** 0.5, rel=0.01)
    assert found["frame_fd_pixel"] > 0
    assert "swd is not for clips" in refusal(capsys, *words, "metrics=[swd]")


BAD = [
    (["samples=A", "reference=B", "metrics=[fd]"], "fd needs a feature network"),
    (["samples=A", "reference=B", "metrics=[fid]", "data=digits"], "fid is fd on the Inception network"),
    (["samples=A", "reference=B", "metrics=[motion]"], "motion is for clips"),
    (["samples=A", "reference=B", "metrics=[frame_fd]"], "frame_fd is for clips"),
    (["samples=A", "reference=B", "metrics=[clip_score]"], "samples must hold captions for clip_score"),
    (["run=RUN", "metrics=[clip_score]"], "clip_score needs prompts and digits has none"),
    (["run=RUN", "num_samples=60", "metrics=[fd]"], "num_samples must be at least 65 for the metric fd"),
    (["samples=A", "metrics=[swd]"], "reference must be given for swd"),
    (["samples=A", "reference=B", "metrics=[nfe]"], "nfe is of a generator"),
    (["samples=A", "reference=B", "run=RUN"], "run, pipeline, samples must be given one alone"),
    (["samples=A", "reference=B", "steps=2"], "steps is for a generator"),
    (["samples=A", "reference=B", "teacher=true"], "teacher is for a run"),
    (["samples=A", "reference=B", "size=5000"], "none is scaled up to 5000"),
    (["samples=A", "reference=B", "corrupt_share=1.5"], "corrupt_share must lie in"),
    (["samples=A", "reference=B", "corrupt_share=nan"], "corrupt_share must be finite"),
    (["samples=A", "reference=B", "latency_batches=[0]"], "latency_batches must be batch sizes >= 1"),
    (["samples=A", "reference=B", "metrics=[all,swd]"], "metrics must be [all], or names"),
    (["samples=A", "reference=B", "metrics=[swd]", "clip=transformers:x"], "clip is for clip_score"),
    (["samples=A", "reference=B", "num_samples=5000"], "num_samples must be at most the 300"),
    (["samples=A", "statistics=x.safetensors", "metrics=[diversity]", "features=nowhere"], "features must be data, or"),
    (["samples=A", "reference=B", "statistics=x.npz"], "statistics must end in .safetensors"),
    (["samples=A", "reference=B", "prdc_space=features", "metrics=[prdc]"], "prdc_space must be values without"),
    (["samples=A", "reference=B", "against=RUN/config.yaml"], "against must be a file that out= wrote"),
    (["run=RUN", "reference=B", "size=4"], "reference must hold samples of the shape (1, 8, 8)"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_what_cannot_be_measured_is_one_message(
    run: Path, folders: tuple[Path, Path], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path, words: Sequence[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    places = {"A": str(folders[0]), "B": str(folders[1]), "RUN": str(run)}
    full = []
    for word in words:
        key, _, value = word.partition("=")
        head, slash, rest = value.partition("/")
        full.append(f"{key}={places.get(head, head)}{slash}{rest}")
    assert message in refusal(capsys, *full)


def test_statistics_of_other_features_or_without_what_is_needed_are_refused(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from evaluation.test_spaces import timm_folder

    a, b = folders
    file = tmp_path / "b.safetensors"
    words = (f"samples={a}", "data=digits")
    measured(*words, f"reference={b}", "metrics=[kid]", f"statistics={file}")
    said = refusal(capsys, *words, f"reference={file}", "metrics=[swd]")
    assert "reference must hold projections, got features in the file" in said
    other = timm_folder(tmp_path / "net")
    said = refusal(capsys, *words, f"reference={file}", "metrics=[kid]", f"features={other}")
    assert "protocol.features must be the same for samples and reference" in said
    np.savez(tmp_path / "b.npz", mu=np.zeros(7), sigma=np.eye(7))
    said = refusal(capsys, *words, f"reference={tmp_path / 'b.npz'}", "metrics=[fd]")
    assert "reference must be statistics of 64 features, got 7" in said
    np.savez(tmp_path / "c.npz", other=np.zeros(7))
    assert "must hold mu and sigma, or feats" in refusal(capsys, *words, f"reference={tmp_path / 'c.npz'}")


def test_several_processes_need_a_folder_of_their_own(
    monkeypatch: pytest.MonkeyPatch, run: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("diffdistill.measurement.PartialState", lambda **how: SimpleNamespace(num_processes=2))
    assert "work must be given for 2 processes" in refusal(capsys, f"run={run}")


def test_features_of_another_network_are_measured_and_named_in_the_protocol(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    from evaluation.test_spaces import timm_folder

    a, b = folders
    found = measured(f"samples={a}", f"reference={b}", f"features={timm_folder(tmp_path / 'net')}", "num_samples=290")
    assert {"fd", "kid", "precision"} <= found["figures"].keys()
    assert "(timm)" in found["protocol"]["resize"] and found["protocol"]["prdc_space"] == "features"


def test_a_pipeline_may_be_named_by_its_hub_id(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DiffusionPipeline

    asked: list[str] = []
    monkeypatch.setattr(DiffusionPipeline, "download", lambda name: asked.append(name) or str(run / "pipeline"))
    assert PipelineSampler.load("some/one-step").nfe == 1
    assert asked == ["some/one-step"]


def test_unasked_are_measured_what_the_run_itself_measures(run: Path) -> None:
    from diffdistill.data import Digits
    from diffdistill.evaluation.harness import Evaluation

    found = measured(f"run={run}", "num_samples=80", "replicates=2")
    usual = Evaluation(0, 80, 1, None, 0, 80, 2, "none").names(Digits())
    assert set(usual) == {"fd_pixel", "fd", "label_agreement", "prdc", "memorised", "latency", "nfe"}
    figures = {key.removesuffix("_ms") for key in found["figures"] if not key.endswith("_ci")}
    assert figures == {*usual, "precision", "recall", "density", "coverage"} - {"prdc"}


def test_what_has_no_reference_of_its_own_is_measured_against_a_folder(
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    from diffdistill.data import Digits
    from diffdistill.errors import UserError

    def none(self: Digits) -> None:
        raise UserError("evaluation", "must be none for latents, which nobody sees", "latents", "Leave it out.")

    monkeypatch.setattr(Digits, "reference", none)
    words = [f"run={run}", "num_samples=80", "metrics=[swd]"]
    assert measured(*words, f"reference={folders[1]}")["figures"]["swd"] > 0
    assert "reference must be given for swd" in refusal(capsys, *words)
