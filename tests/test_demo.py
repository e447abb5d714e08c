"""demo: the same noise for both, evaluations counted, what does not fit told before anything is served, the page."""

from __future__ import annotations

import base64
import io
import re
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from browser import needs_browser
from PIL import Image
from screenshots import chromium, demo_of
from torch import Tensor, nn

from diffdistill import demo, demo_page
from diffdistill.cli import main
from diffdistill.demo_sides import (
    ENOUGH_SECONDS,
    MOST_CALLS,
    Choices,
    DenoiserSide,
    Measured,
    PipelineSide,
    Side,
    Wish,
    check_pair,
    load_student,
    load_teacher,
)  # fmt: skip
from diffdistill.errors import UserError
from diffdistill.export import stock_unet
from diffdistill.networks.diffusers import unet2d, unet2d_from_config
from diffdistill.pipelines import PipelineSampler, write_contract


@pytest.fixture(scope="module")
def one_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits teacher itself, as an exported pipeline of one step from its largest time."""
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    folder = tmp_path_factory.mktemp("demo") / "one_step"
    network = unet2d("asset:digits", 0.5, 0.002, 20.0, has_null=True, tame=True)
    scheduler = CMStochasticIterativeScheduler(
        num_train_timesteps=40, sigma_min=0.002, sigma_max=20.0, sigma_data=0.5, rho=7.0, clip_denoised=False
    )
    ConsistencyModelPipeline(unet=stock_unet(network, drop_null=True), scheduler=scheduler).save_pretrained(folder)
    write_contract(folder, {}, 1, (20.0,))
    return folder


@pytest.fixture(scope="module")
def student(one_step: Path) -> PipelineSide:
    return load_student(str(one_step))


@pytest.fixture(scope="module")
def teacher(student: PipelineSide) -> Side:
    return load_teacher("asset:digits", student)


@pytest.fixture(scope="module")
def shapes() -> PipelineSide:
    """A stock text-to-image pipeline without call.json."""
    return load_student("asset:shapes_t2i")


# --- what is drawn


def test_one_step_of_the_teacher_equals_its_pipeline_on_the_same_seed(student: PipelineSide, teacher: Side) -> None:
    wish = Wish(seed=5, num=10, steps=1)
    ours, theirs = student.draw(wish), teacher.draw(wish)
    # a solver's last step ends at t_min = .002, the pipeline's at 0
    assert float((ours - theirs).abs().max()) < 0.005
    assert float((ours - teacher.draw(Wish(seed=6, num=10, steps=1))).abs().max()) > 0.05
    of_class = student.draw(Wish(seed=5, num=10, label=3))
    assert torch.equal(of_class[3], ours[3]) or float((of_class[3] - ours[3]).abs().max()) < 1e-5
    assert float((of_class[4] - ours[4]).abs().max()) > 0.05


def test_two_pipelines_draw_the_same_picture_from_the_same_seed_and_words(shapes: PipelineSide) -> None:
    other = load_teacher("asset:shapes_t2i", shapes)
    wish = Wish(seed=1, num=1, prompt="a red circle at the top left", steps=2, guidance=1.5)
    assert torch.equal(shapes.draw(wish), other.draw(wish))
    assert shapes.draw(wish).shape == (1, 3, 32, 32)


def test_a_teacher_without_contract_is_called_at_the_students_size(tmp_path: Path, shapes: PipelineSide) -> None:
    settled = PipelineSampler(shapes.sampler.pipeline, {"height": 16, "width": 16}, 1, settled=True)
    told = load_teacher("asset:shapes_t2i", PipelineSide(settled))
    assert told.draw(Wish(0, 1, steps=1)).shape[-2:] == (16, 16)


def test_evaluations_are_counted_with_those_of_guidance(
    student: PipelineSide, teacher: Side, shapes: PipelineSide
) -> None:
    def counted(side: Side, **wish: float) -> float:
        return Measured("one", side).make(Wish(0, 3, **wish)).nfe  # type: ignore[arg-type]

    assert counted(student) == student.sampler.nfe == 1
    assert counted(teacher) == 35
    assert counted(teacher, steps=4, guidance=1.0) == 7
    assert counted(teacher, steps=4, guidance=2.0) == 14
    assert counted(shapes, steps=3, guidance=1.0) == 3
    assert counted(shapes, steps=3, guidance=1.5) == 6


def test_steps_and_guidance_are_free_only_without_a_contract(
    student: PipelineSide, teacher: Side, shapes: PipelineSide
) -> None:
    assert student.choices == Choices(num_classes=10)
    assert teacher.choices == Choices(num_classes=10, steps=18, guidance=1.0)
    assert shapes.choices == Choices(words=True, steps=50, guidance=7.5)
    assert torch.equal(student.draw(Wish(0, 2, steps=7, guidance=3.0)), student.draw(Wish(0, 2)))


def test_a_shipped_teacher_of_clips_is_a_whole_pipeline_with_its_words() -> None:
    found = load_student("asset:moving_digits").choices
    assert found.words and found.steps is None and found.prompts[0] == "digit 0 moving up" and len(found.prompts) == 80


@dataclass
class Counting:
    """A side that counts its draws."""

    choices: Choices = field(default_factory=Choices)
    networks: tuple[nn.Module, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    draws: int = 0

    def draw(self, wish: Wish) -> Tensor:
        self.draws += 1
        return torch.zeros(wish.num, 1, 8, 8)


def test_the_first_call_with_a_number_of_samples_is_not_timed() -> None:
    side = Counting()
    measured = Measured("student", side)
    assert ENOUGH_SECONDS > 0.1  # what these calls take is far below
    assert measured.make(Wish(0, 2)).calls == MOST_CALLS
    assert side.draws == 1 + MOST_CALLS
    measured.make(Wish(1, 2))
    assert side.draws == 1 + 2 * MOST_CALLS
    measured.make(Wish(1, 3))
    assert side.draws == 2 + 3 * MOST_CALLS


# --- what is refused, before anything is served


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["demo", *words]) == 2
    captured = capsys.readouterr()
    assert not captured.out and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ("nowhere", "error: teacher must be a diffusers pipeline folder"),
        ("asset:nowhere", "error: teacher must be one of asset:digits, "),
        ("asset:gmm2d", "error: teacher must hold a diffusers pipeline or a UNet2DModel"),
        ("asset:shapes_t2i", "error: teacher must be told what the student is told, 10 classes, got one of words"),
    ],
)
def test_a_teacher_that_does_not_match_is_told(
    teacher: str, said: str, one_step: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(capsys, f"pipeline={one_step}", f"teacher={teacher}", "dry_run=true").startswith(said)


def test_a_teacher_of_other_classes_or_sizes_is_told(tmp_path: Path, student: PipelineSide) -> None:
    config = {"in_channels": 1, "out_channels": 1, "block_out_channels": [32], "layers_per_block": 1,
              "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "norm_num_groups": 4}  # fmt: skip
    for name, more, said in (
        ("classes", {"num_class_embeds": 5, "sample_size": 8}, "10 classes, got one of 5 classes"),
        ("size", {"num_class_embeds": 11, "sample_size": 16}, r"shape \[1, 8, 8\], got \[1, 16, 16\]"),
    ):
        network = unet2d_from_config({**config, **more}, 0.5, 0.002, 80.0, tame=False, seed=0)
        network.unet.save_pretrained(tmp_path / name)
        other = load_teacher(str(tmp_path / name), student)
        assert isinstance(other, DenoiserSide)
        with pytest.raises(UserError, match=said):
            check_pair(student, other)


def test_a_wrong_folder_and_a_changed_file_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, f"pipeline={tmp_path}", "dry_run=true").startswith(
        "error: pipeline must be a diffusers pipeline"
    )
    assert told(capsys, "pipeline=asset:digits", "dry_run=true").startswith("error: pipeline must be a diffusers")


def test_an_address_that_cannot_be_listened_at_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert told(capsys, "pipeline=x", f"port={port}").startswith(f"error: port must be free, got {port}")
    assert told(capsys, "pipeline=x", "port=0").startswith("error: port must lie in 1..65535")
    assert told(capsys, "pipeline=x", "host=203.0.113.1").startswith("error: host must be an address of this machine")


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert 'pip install "diffdistill[demo]"' in told(capsys, "pipeline=x")


@pytest.mark.parametrize(
    ("host", "alone"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False)]
)
def test_only_addresses_of_this_machine_alone_are_loopback(host: str, alone: bool) -> None:
    assert demo._is_loopback(host) is alone


# --- the page


def test_controls_of_each_side_go_to_that_side_alone() -> None:
    values = [18, 2.5, 4]
    wish = demo_page._wish(7.0, 3, Choices(num_classes=10), "4")
    first = demo_page._own_wish(wish, Choices(steps=18, guidance=1.0), values)
    second = demo_page._own_wish(wish, Choices(steps=2), values)
    assert (first.steps, first.guidance, first.label, first.seed, first.num) == (18, 2.5, 4, 7, 3)
    assert (second.steps, second.guidance, values) == (4, None, [])
    assert demo_page._wish(0, 1, Choices(num_classes=10), demo_page.IN_TURN).label is None


@pytest.mark.parametrize(("shape", "kind", "frames"), [((10, 1, 8, 8), "PNG", 1), ((2, 3, 4, 8, 8), "GIF", 4)])
def test_samples_are_one_picture_of_their_values(shape: tuple[int, ...], kind: str, frames: int) -> None:
    samples = torch.zeros(shape)
    samples[0] = 1.0
    samples[1, 0].view(-1, 8, 8)[:, 0, 0] = torch.arange(frames) / 8  # GIFs leave out frames that change nothing
    found = demo_page._picture(samples, "student")
    image = Image.open(io.BytesIO(base64.b64decode(re.findall(r"base64,([^\"]*)", found)[0])))
    assert (image.format, getattr(image, "n_frames", 1)) == (kind, frames)
    tile = demo_page.TILE
    assert image.convert("L").getpixel((tile // 2, tile // 2)) == 255
    assert image.convert("L").getpixel((tile + tile // 2, tile // 2)) == 0


@needs_browser
def test_a_visitor_gets_both_pictures_and_nothing_is_asked_elsewhere(one_step: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    pytest.importorskip("playwright.sync_api")
    with demo_of(f"pipeline={one_step}", "teacher=asset:digits") as address, chromium() as browser:
        assert address.startswith("http://127.0.0.1:")
        for size, scheme, dark in (((1280, 900), "light", False), ((360, 740), "dark", True)):
            page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
            page.set_default_timeout(60_000)
            said: list[str] = []
            asked: list[str] = []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            answer = page.goto(address)
            assert "default-src 'self'" in answer.headers["content-security-policy"]
            page.get_by_label("Seed").fill("3")
            page.get_by_role("button", name="Generate").click()
            page.wait_for_selector("#together :text('of the time')")  # what is filled in last
            for name, words in (("teacher", "35 network evaluations"), ("student", "1 network evaluation ")):
                image = page.locator(f"#{name}-drawn img").first
                image.evaluate("image => image.decode()")
                assert image.evaluate("image => image.naturalWidth") > 300
                text = page.locator(f"#{name}-measured").first.inner_text()
                assert words in text
                assert re.search(r"[\d.]+ (ms|s) ", text)
            assert page.evaluate("document.scrollingElement.scrollWidth") == size[0]
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 380) is dark
            assert len(page.query_selector_all("text=Steps")) and not said, said
            assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
            taken = page.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)
            assert Image.open(io.BytesIO(taken)).width == size[0]
