"""report.html: what it says of runs that ended well, failed or stopped, and that it is one file, safe and readable."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from browser import measured, needs_browser, opened, shape

import diffdistill
from diffdistill import report_run, run, run_pictures, small_samples
from diffdistill.cli import main
from diffdistill.config import compose
from diffdistill.data import Digits
from diffdistill.errors import UserError
from diffdistill.evaluation import harness
from diffdistill.evaluation.svg import Curve, cost_chart, line_chart, number, scatter
from diffdistill.generator import Generator
from diffdistill.recipe import Recipe, assemble
from diffdistill.report_figures import rows
from diffdistill.report_pictures import frame_of, picture, png
from diffdistill.run_folder import RunFolder
from diffdistill.small_samples import SIDE, kept_same_noise, kept_steps, small, spacing, with_estimates
from diffdistill.solvers import heun

POINTS = [
    "train", "experiment=gmm2d_dmd2", "trainer.steps=40", "trainer.batch_size=16", "trainer.log_every=4",
    "evaluation.num_samples=200", "evaluation.interim_samples=100", "evaluation.every=10",
    "evaluation.metrics=[swd,nfe]", "health.every=10",
]  # fmt: skip
NAME = '<script>alert("x")<b>'
FASTEST = ["train", "experiment=gmm2d_dmd2", "trainer.batch_size=4", "evaluation=none", "probe=null", "health=null"]


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on points, under a name that would be a script."""
    folder = tmp_path_factory.mktemp("report") / NAME
    diffdistill.train(*POINTS[1:], run_dir=str(folder))
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "digits"
    words = [
        "train", "experiment=digits_dmd2", "trainer.steps=2", "trainer.batch_size=4", "trainer.log_every=1",
        "evaluation.num_samples=80", "evaluation.interim_samples=70", "evaluation.every=1", "evaluation.replicates=4",
        "evaluation.metrics=[fd_pixel,label_agreement,nfe]", "evaluation.teacher=none", "health.every=2",
        "health.num_samples=16", "probe.num_samples=32", f"run_dir={folder}",
    ]  # fmt: skip
    assert main(words) == 0
    return folder


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "compared"
    told = (
        "overrides=['evaluation.num_samples=200','evaluation.metrics=[swd,kl,nfe]','trainer.batch_size=8','probe=null']"
    )
    words = ("data=gmm2d", "budget.iterations=3", "distillers=[sid,dmd2]", told)
    assert diffdistill.compare(*words, out=str(out)) == 0
    return out


def text_of(page: str) -> str:
    """What a reader sees, on one line."""
    text = re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL)
    for entity, sign in (("&lt;", "<"), ("&gt;", ">"), ("&#34;", '"'), ("&#39;", "'"), ("&amp;", "&")):
        text = text.replace(entity, sign)
    return " ".join(text.split())


class Loads(HTMLParser):
    """Every attribute that makes a browser load something, and every tag that could run or embed something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: set[str] = set()
        self.handlers: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attributes:
            if name in ("src", "srcset", "poster", "data", "action", "xlink:href") or (name == "href" and tag != "a"):
                self.loaded.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)


def assert_one_file(page: str) -> None:
    found = Loads(page)
    assert all(value.startswith("data:") for value in found.loaded)
    assert not found.tags & {"script", "iframe", "object", "embed", "base", "form", "video", "audio", "frame"}
    assert not found.handlers
    assert "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page
    assert not re.search(r'(?:href|src)="(?:https?:)?//', page)


# --- what it says


def test_the_report_of_a_run_says_what_the_run_found(points: Path) -> None:
    page = (points / "report.html").read_text()
    text, summary = text_of(page), json.loads((points / "summary.json").read_text())
    assert "finished, step 40 of 40" in text and "DMD2 : the student follows the score difference" in text
    assert "arXiv:2405.14867" in text and "1 network evaluation per sample in place of the teacher's 35." in text
    for who in ("student", "teacher"):
        assert f"{summary[who]['swd']:.4g}" in text
    assert "samples 200 against gmm2d reference samples 10000 seed 0" in text
    assert "the teacher is read as it was trained" in text
    for sign in ("finite", "movement", "critic lag", "stall"):
        assert sign in text
    for step in (0, 20, 40):
        assert f"step {step}" in text
    assert "There is no pipeline folder: export needs a network with a diffusers class" in text
    assert "student_every: 5" in text and f"torch {version('torch')}" in text
    assert f"{summary['wall_seconds']:g}" in text and "diffdistill evaluate run=" in text


def test_the_report_of_pictures_shows_them_and_how_to_load_the_pipeline(digits: Path) -> None:
    page = (digits / "report.html").read_text()
    text, summary = text_of(page), json.loads((digits / "summary.json").read_text())
    low, high = summary["student"]["fd_pixel_ci"]
    assert f"{number(low)} to {number(high)}" in text
    # kept at 0 and 2; teacher and student; its 8 estimates and the end, the one and the end
    assert page.count("<img ") == 2 + 2 + 9 + 2
    code = re.search(r"<pre>(from diffusers.*?)</pre>", page, re.DOTALL)
    assert code is not None and f"from_pretrained(&#34;{digits}/pipeline&#34;)" in code.group(1)
    assert len(page) < 3_000_000
    assert page.count("<title>fd_pixel at step") == 1  # with its interval


def test_curves_are_drawn_where_there_are_figures(points: Path) -> None:
    page = (points / "report.html").read_text()
    for name in (
        "swd",
        "critic/denoising",
        "gradient norm",
        "learning rate",
        "step size beside the weights",
        "critic lag",
    ):
        assert re.search(rf"<figcaption>{name}[^<]*(<span[^<]*</span>)?</figcaption>\s*<svg", page), name
    assert "dashed: alarm above 0.05" in page and "dashed: teacher" in page


def test_a_run_that_failed_has_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sick"
    words = [
        "train",
        "data=gmm2d",
        *FASTEST[2:],
        "trainer.steps=30",
        "trainer.checkpoint_every=1",
        "trainer.optimizer.default.lr=1e20",
    ]
    assert main([*words, "distiller=consistency", f"run_dir={folder}"]) == 2
    assert not (folder / "report.html").exists()
    assert main(["report", f"run={folder}"]) == 0
    page = (folder / "report.html").read_text()
    text = text_of(page)
    assert "failed, step" in text and "The run failed." in text and "must be finite, at step" in text
    assert "Alarm: finite" in text and "Nothing was measured" in text
    assert "resume=true" in text and "it is written when training has ended" in text
    assert_one_file(page)


def test_a_run_that_stopped_is_drawn_from_its_checkpoint_and_left_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    assert main([*FASTEST, "trainer.steps=3", f"run_dir={folder}"]) == 0
    for name in ("summary.json", "report.html"):
        (folder / name).unlink()
    shutil.rmtree(folder / "samples")
    before = sorted(path.name for path in folder.rglob("*"))
    assert main(["report", f"run={folder}", f"out={tmp_path / 'r.html'}"]) == 0
    assert sorted(path.name for path in folder.rglob("*")) == before
    text = text_of((tmp_path / "r.html").read_text())
    assert "stopped, step 3 of 3" in text and "No samples were kept over training." in text
    assert "teacher, 35 evaluations" in text and "student, 1 evaluation" in text
    assert "1 network evaluation per sample in place of the teacher's 35." in text
    shutil.rmtree(folder / "checkpoints")
    assert main(["report", f"run={folder}"]) == 0
    assert "there is no checkpoint to draw from" in text_of((folder / "report.html").read_text())


def test_the_report_of_a_comparison_holds_its_table_plot_and_samples(comparison: Path) -> None:
    page = (comparison / "report.html").read_text()
    text, table = text_of(page), json.loads((comparison / "table.json").read_text())
    for row in table["rows"]:
        assert row["name"] in text and f"{row['figures']['kl']:.4g}" in text
    assert {name for name in ("sid", "dmd2") if f'<a href="{name}/report.html">' in page} == {"sid", "dmd2"}
    assert (comparison / "sid" / "report.html").is_file()
    assert page.count('class="dots reference"') == 3  # the teacher once, and both methods
    assert page.count('class="mark"') == 2 and "kl against CPU seconds of training" in text
    assert "diffdistill compare data=gmm2d" in text and "iterations 3" in text
    assert_one_file(page)
    assert main(["report", f"run={comparison}", f"out={comparison.parent / 'again.html'}"]) == 0
    assert (comparison.parent / "again.html").read_text() == page


# --- one file, escaped, and never in the way of a run


@pytest.mark.parametrize("name", ["points", "digits"])
def test_it_is_one_file_without_script(name: str, request: pytest.FixtureRequest) -> None:
    assert_one_file((request.getfixturevalue(name) / "report.html").read_text())


def test_names_are_escaped(points: Path) -> None:
    page = (points / "report.html").read_text()
    assert NAME not in page and "<script" not in page
    assert page.count("&lt;script&gt;alert(&#34;x&#34;)&lt;b&gt;") >= 5  # title, heading, commands, configuration


def test_drawings_escape_names_too() -> None:
    bad = "</title><script>"
    drawings = [
        line_chart([Curve(bad, [(0, 1.0), (1, 2.0)], (0.5, 1.5), (1.5, 2.5))], {bad: 1.0}, bad),
        cost_chart({bad: (1.0, 2.0)}, {bad: 3.0}, (bad, bad), {bad: bad}),
    ]
    assert all("<script" not in drawing and "&lt;script&gt;" in drawing for drawing in drawings)
    caption = picture(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), bad, 2, None).caption
    assert caption == bad  # plain text: the template escapes it


def test_a_report_that_fails_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "x"
    with monkeypatch.context() as patched:

        def broken(*args: object) -> None:
            raise KeyError("a defect")

        patched.setattr(report_run, "page", broken)
        assert main([*FASTEST, "trainer.steps=2", f"run_dir={folder}"]) == 0
    said = capsys.readouterr().err
    assert "no report.html was written" in said and "a defect" in said and f"diffdistill report run={folder}" in said
    assert (folder / "summary.json").is_file() and not (folder / "report.html").exists()
    assert main(["report", f"run={folder}"]) == 0
    assert (folder / "report.html").is_file()


def test_samples_that_cannot_be_kept_are_told_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(run_pictures, "keep_step", broken)
    assert main([*FASTEST, "trainer.steps=2", f"run_dir={tmp_path / 'x'}"]) == 0
    assert capsys.readouterr().err.count("out of memory") == 1
    assert "No samples were kept over training." in text_of((tmp_path / "x" / "report.html").read_text())


def test_keeping_samples_changes_nothing_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*FASTEST, "trainer.steps=7", "trainer.log_every=1"]
    assert main([*words, f"run_dir={tmp_path / 'a'}"]) == 0
    monkeypatch.setattr(run, "spacing", lambda steps: 1)
    assert main([*words, f"run_dir={tmp_path / 'b'}"]) == 0
    assert list(kept_steps(tmp_path / "a")) == [0, 7] and list(kept_steps(tmp_path / "b")) == list(range(8))

    def figures(folder: Path) -> list[dict[str, float]]:
        return [
            {k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))}
            for line in RunFolder(folder).metrics()
        ]

    assert figures(tmp_path / "a") == figures(tmp_path / "b")
    ours, theirs = (kept_steps(tmp_path / name) for name in "ab")
    assert all(torch.equal(ours[step].samples, theirs[step].samples) for step in ours)
    assert not torch.equal(theirs[0].samples, theirs[7].samples)


def test_no_role_is_in_training_while_samples_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(run, "spacing", lambda steps: 1)
    monkeypatch.setattr(run_pictures, "keep_step", lambda *arguments: seen.append(arguments[-1].training))
    assert main([*FASTEST, "trainer.steps=3", f"run_dir={tmp_path / 'x'}"]) == 0
    assert seen == [()] * 5  # at the start, after three steps and at the end


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", f"run={tmp_path}"]) == 2
    assert "must be a folder that `diffdistill train` wrote" in capsys.readouterr().err
    (tmp_path / "compare.json").write_text("{}")
    assert main(["report", f"run={tmp_path}"]) == 2  # a comparison without a table
    folder = tmp_path / "x"
    diffdistill.train(*FASTEST[1:], run_dir=str(folder), **{"trainer.steps": 1})
    with pytest.raises(UserError, match="out must not replace a file of a run"):
        diffdistill.report(run=str(folder), out=str(folder / "config.yaml"))


# --- what is kept


def recipe(*words: str) -> Recipe:
    settings = compose("train", [*words, "run_dir=none", "evaluation=none"])
    return assemble({str(key): settings[key] for key in settings})


def test_estimates_are_what_the_sampler_went_on_from() -> None:
    found = recipe("experiment=gmm2d_dmd2", "guidance.scale=2")
    teacher = found.sampler
    assert teacher.solver is heun and teacher.denoiser.guidance is not None
    samples, estimates = with_estimates(teacher, found.data, 8, found.networks)
    labels = torch.arange(8)
    plain, _ = harness.draw(teacher, found.data, 8, 0, 8, labels=labels)
    assert torch.equal(samples, plain)  # looking changes nothing
    # float32: times are those of the grid as the network is told them
    assert sorted(estimates, reverse=True) == pytest.approx([float(t) for t in torch.tensor(teacher.times[:-1])])
    x, cond = teacher.denoiser.process.alpha_sigma(torch.tensor([teacher.times[0]]))[1] * _noise(8), {"label": labels}
    with torch.no_grad():
        for now, after in pairwise(teacher.times):  # at the states that steps end in, not at Euler's points in between
            t, s = torch.full((8,), now), torch.full((8,), after)
            assert torch.allclose(estimates[float(t[0])], teacher.denoiser(x, t, cond), atol=1e-4), now
            x = heun(teacher.denoiser, x, t, s, cond)
    last = estimates[min(estimates)]
    assert torch.allclose(last, samples, atol=0.02)


def _noise(num: int) -> torch.Tensor:
    """As `harness.draw` draws it for seed 0."""
    from diffdistill.rng import Rng

    return Rng(0, 0, "evaluation", range(num)).fork("prior").normal((num, 2), torch.float32)


@pytest.mark.parametrize("words", [("experiment=gmm2d_consistency",), ("experiment=gmm2d_dmd2",)])
def test_the_last_estimate_of_a_student_is_its_sample(words: tuple[str, ...]) -> None:
    found = recipe(*words)
    generator = found.distiller.generator
    assert isinstance(generator, Generator)
    samples, estimates = with_estimates(generator, found.data, 6, found.networks)
    assert len(estimates) == len(generator.times)
    assert torch.equal(estimates[min(estimates)], samples)


def test_pictures_are_kept_small_and_clips_short() -> None:
    picture = small(torch.linspace(-1, 1, 200 * 100).reshape(1, 1, 200, 100))
    assert picture.shape == (1, 1, SIDE, SIDE // 2) and picture.dtype == torch.uint8
    assert picture.min() <= 2 and picture.max() >= 253
    clip = torch.zeros(2, 1, 20, 8, 8)
    clip[:, :, -1] = 1
    kept = small(clip)
    assert kept.shape == (2, 1, 6, 8, 8) and kept[:, :, -1].min() == 255 and kept[:, :, :-1].max() == 128
    assert small(torch.full((1, 1, 4, 4), float("nan"))).max() == 0
    assert small(torch.randn(3, 4, 8, 8)).shape == (3, 3, 8, 8)  # latents: their first channels
    assert small(torch.randn(5, 2)).dtype == torch.float32


def test_samples_that_are_not_finite_are_said_to_be(points: Path, tmp_path: Path) -> None:
    class Sick:
        nfe = 1

        def sample(self, z: torch.Tensor, cond: object, rng: object) -> torch.Tensor:
            return z / 0 * 0

    small_samples.keep_step(tmp_path, 7, Digits(), Sick(), recipe("experiment=gmm2d_dmd2").networks)
    look = kept_steps(tmp_path)[7]
    assert not look.finite and look.samples.max() == 0
    shutil.copy(points / "config.yaml", tmp_path)
    assert main(["report", f"run={tmp_path}"]) == 0
    assert "step 7, not all finite" in text_of((tmp_path / "report.html").read_text())


def test_a_long_run_is_looked_at_ten_times() -> None:
    assert [spacing(steps) for steps in (1, 200, 2700, 100_000)] == [20, 20, 270, 10_000]


def test_what_was_kept_is_read_back_and_what_is_damaged_left_out(points: Path, tmp_path: Path) -> None:
    shutil.copytree(points / "samples", tmp_path / "samples")
    assert list(kept_steps(tmp_path)) == [0, 20, 40]
    found = kept_same_noise(tmp_path)
    assert found is not None and found.step == 40 and found.teacher.nfe == 35 and found.decoded is None
    assert torch.equal(kept_steps(tmp_path)[40].samples, found.student.samples)  # the same noise, the same weights
    assert all(look.finite for look in kept_steps(tmp_path).values())
    for path in (tmp_path / small_samples.FOLDER).iterdir():
        path.write_bytes(path.read_bytes()[:50])
    assert kept_steps(tmp_path) == {} and kept_same_noise(tmp_path) is None and small_samples.num_damaged(tmp_path) == 3
    shutil.copy(points / "config.yaml", tmp_path)
    assert main(["report", f"run={tmp_path}"]) == 0
    assert "Of the samples kept over training 3 cannot be read." in text_of((tmp_path / "report.html").read_text())


# --- drawings


def test_a_picture_holds_its_tiles_pixel_by_pixel() -> None:
    import base64
    import io

    from PIL import Image

    tiles = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 2, 3) * 40
    data = re.search(r"base64,([^\"]+)", png(tiles, 4))
    assert data is not None
    image = Image.open(io.BytesIO(base64.b64decode(data.group(1))))
    assert image.size == (4 * 4 - 1, 2 * 3 - 1)
    assert image.getpixel((0, 0)) == (0, 255) and image.getpixel((4, 3)) == (200, 255)  # the second of the second row
    assert image.getpixel((3, 0)) == (0, 0) and image.getpixel((8, 3)) == (0, 0)  # between tiles, and beyond the last


def test_points_outside_the_frame_are_counted() -> None:
    reference = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    samples = torch.tensor([[0.0, 0.0], [50.0, 0.0], [float("nan"), 0.0]])
    found = picture(samples, "step 3", 1, frame_of(reference))
    assert found.caption == "step 3, 2 of 3 outside"
    assert len(re.findall(r"h0", found.content)) == 3  # both of the reference, one sample
    assert "M60.0 60.0h0" in found.content


def test_curves_lie_where_their_figures_say() -> None:
    drawing = line_chart([Curve("loss", [(0, 0.0), (10, 1.0)])], {"alarm above": 0.5})
    (path,) = re.findall(r'class="line" d="M([^"]+)"', drawing)
    (x0, y0), (x1, y1) = (tuple(map(float, pair.split())) for pair in path.split("L"))
    (level,) = re.findall(r'class="level" d="M\d+ ([\d.]+)H', drawing)
    assert x0 < x1 and y0 > y1 and float(level) == pytest.approx((y0 + y1) / 2, abs=0.1)
    grown = line_chart([Curve("loss", [(0, 0.001), (10, 0.1), (20, 10.0)])])  # logarithmic: a straight line
    (path,) = re.findall(r'class="line" d="M([^"]+)"', grown)
    heights = [float(pair.split()[1]) for pair in path.split("L")]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)


def test_curves_that_are_long_broken_or_flat_are_drawn() -> None:
    long = line_chart([Curve("x", [(step, float(step % 2)) for step in range(10_000)])])
    (path,) = re.findall(r'class="line" d="M([^"]+)"', long)
    heights = {pair.split()[1] for pair in path.split("L")}
    assert len(path.split("L")) <= 240 and len(heights) == 1  # means of equal neighbours
    nan = line_chart([Curve("x", [(0, 1.0), (1, float("nan")), (2, 3.0)])])
    assert "nan" not in nan and len(re.findall(r"h0", nan)) == 2
    for flat in ([(0, 0.0)], [(5, 2.0), (6, 2.0)], [(0, 1e-300), (1, 1e300)]):
        assert re.search(r'class="line" d="M\d', line_chart([Curve("x", flat)]))
    assert line_chart([Curve("x", [(0, float("inf"))])]) == ""
    assert scatter([[0.5]], [[0.1], [0.2]], ((0.0, 1.0), (0.0, 1.0))).count("bars") == 2


def test_figures_say_which_way_is_better() -> None:
    found = {
        row.name: row for row in rows({"fd": 1.0, "nfe": 35}, {"recall": 0.5, "nfe": 1, "fd": 2.0, "fd_ci": [1.5, 2.5]})
    }
    assert list(found) == ["nfe", "fd", "recall"]
    assert (found["fd"].better, found["recall"].better, found["nfe"].better) == ("lower", "higher", "lower")
    assert (found["fd"].student, found["fd"].student_interval, found["recall"].teacher) == ("2", "1.5 to 2.5", "")


def test_the_number_of_small_samples_fits_the_data() -> None:
    assert small_samples.num_small(Digits()) == 20


# --- in a browser

SHAPES = [((360, 800), True), ((360, 800), False), ((1280, 900), True), ((1280, 900), False)]


@needs_browser
@pytest.mark.parametrize("name", ["points", "digits", "comparison"])
def test_a_browser_shows_it_without_complaint_and_asks_for_nothing(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    shutil.copy(request.getfixturevalue(name) / "report.html", page)
    found = opened(page, tmp_path, *shape(*SHAPES[0]))
    assert found.console == [] and found.requests == []


@needs_browser
@pytest.mark.parametrize("name", ["points", "digits", "comparison"])
@pytest.mark.parametrize(("size", "dark"), SHAPES[:1] + SHAPES[3:])
def test_it_fits_a_phone_and_a_desktop_in_light_and_dark(
    name: str, size: tuple[int, int], dark: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    shutil.copy(request.getfixturevalue(name) / "report.html", page)
    found = measured(page, tmp_path, size, dark)
    assert found["inner"] == size[0]
    assert found["width"] == found["open_width"] == size[0]
    assert found["background"] == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")
    assert found["broken"] == 0 and found["images"] == page.read_text().count("<img ")


@needs_browser
def test_the_browser_would_tell(tmp_path: Path) -> None:
    """That it complains where there is something to complain about."""
    page = tmp_path / "bad.html"
    body = '<p style="width:900px">wide</p><img src="http://nowhere.example/x.png"><script>console.error("a")</script>'
    page.write_text(f"<!doctype html><html><body>{body}</body></html>")
    found = opened(page, tmp_path, *shape(*SHAPES[0]))
    assert any('"a"' in line for line in found.console)
    assert found.requests == ["http://nowhere.example/x.png"]
    wide = measured(page, tmp_path, *SHAPES[0])
    assert wide["width"] != 360 and wide["broken"] == 1
