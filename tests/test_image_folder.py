"""image_folder: pixels, labels, epochs, mistakes with status 2, and a teacher distilled into a pipeline folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffdistill import image_folder
from diffdistill.cli import main
from diffdistill.errors import UserError
from diffdistill.image_folder import ImageFolder, class_rows
from diffdistill.rng import Rng

X0 = frozenset({"x0"})
NET = (
    "networks.config={layers_per_block:1,block_out_channels:[8,16],down_block_types:[DownBlock2D,DownBlock2D],"
    "up_block_types:[UpBlock2D,UpBlock2D],norm_num_groups:4}"
)


def save(path: Path, image: Image.Image | int, size: int = 4, **keywords: object) -> Path:
    """Write an image, or a grey one of that value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.new("L", (size, size), image) if isinstance(image, int) else image).save(path, **keywords)
    return path


def flat(path: Path, **keywords: object) -> ImageFolder:
    return ImageFolder(**{"path": str(path), "size": 4, "channels": 1, "fit": "none", "classes": "none", **keywords})


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Ten grey images: four cats of 0..3, six ants of 10..15; names sort otherwise than values."""
    for value in range(4):
        save(tmp_path / "cat" / f"{9 - value}.png", value)
    for value in range(10, 16):
        save(tmp_path / "ant" / ("deep/er" if value % 2 else "") / f"{value}.PNG", value)
    for name in ("README.md", "cat/.DS_Store", "cat/notes.txt", "cat/._9.png", ".cache/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    return tmp_path


def grey(batch_x0: torch.Tensor) -> list[int]:
    """The raw value of each constant image."""
    return ((batch_x0[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


# --- pixels


def test_the_values_of_a_png_are_exact(tmp_path: Path) -> None:
    raw = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
    raw[0, 0], raw[3, 3] = 0, 255
    save(tmp_path / "a.png", Image.fromarray(raw))
    data = flat(tmp_path, channels=3)
    x0 = data.reference().data
    assert (x0.shape, x0.dtype) == ((1, 3, 4, 4), torch.float32)
    assert (float(x0.min()), float(x0.max())) == (-1.0, 1.0)
    assert torch.equal(x0[0], torch.from_numpy(raw).permute(2, 0, 1).float() / 127.5 - 1)


def palette() -> Image.Image:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    return image


def clear_palette() -> Image.Image:
    image = palette()
    image.info["transparency"] = 1
    return image


CONVERSIONS: dict[str, tuple[Image.Image, str, tuple[int, int, int]]] = {
    "grey": (Image.new("L", (4, 4), 77), "png", (77, 77, 77)),
    "one bit": (Image.new("1", (4, 4), 1), "png", (255, 255, 255)),
    "palette": (palette(), "png", (10, 20, 30)),
    "transparent palette": (clear_palette(), "png", (255, 255, 255)),
    "half transparent red": (Image.new("RGBA", (4, 4), (255, 0, 0, 127)), "png", (255, 128, 128)),
    "hidden colour": (Image.new("LA", (4, 4), (0, 0)), "png", (255, 255, 255)),
    "16 bits": (Image.fromarray(np.full((4, 4), 257 * 200 + 100, np.uint16)), "png", (200, 200, 200)),
    "16 bits in a tiff": (Image.fromarray(np.full((4, 4), 257 * 9 + 200, np.uint16)), "tif", (10, 10, 10)),
    "cmyk": (Image.new("CMYK", (4, 4), (255, 0, 0, 0)), "tif", (0, 255, 255)),
}


@pytest.mark.parametrize("case", CONVERSIONS)
def test_every_mode_is_converted_by_its_rule(case: str, tmp_path: Path) -> None:
    image, ending, colour = CONVERSIONS[case]
    save(tmp_path / f"a.{ending}", image)
    raw = (flat(tmp_path, channels=3).reference().data[0] + 1) * 127.5
    assert raw[:, 2, 2].round().int().tolist() == list(colour)
    luma = round(0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2])
    assert grey(flat(tmp_path).reference().data) == [luma]


def test_the_orientation_of_a_camera_is_applied(tmp_path: Path) -> None:
    raw = np.zeros((4, 4), np.uint8)
    raw[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the upper row becomes the right column
    save(tmp_path / "a.png", Image.fromarray(raw), exif=exif)
    assert flat(tmp_path).reference().data[0, 0].tolist() == [[-1.0, -1.0, -1.0, 1.0]] * 4


def test_crop_takes_the_central_square_and_averages_what_it_scales_down(tmp_path: Path) -> None:
    raw = np.arange(4 * 8, dtype=np.uint8).reshape(4, 8)
    save(tmp_path / "a" / "wide.png", Image.fromarray(raw))
    cut = flat(tmp_path / "a", fit="crop").reference().data[0, 0]
    assert torch.equal(cut, torch.from_numpy(raw[:, 2:6].copy()).float() / 127.5 - 1)
    board = (np.indices((16, 16)).sum(0) % 2 * 255).astype(np.uint8)
    save(tmp_path / "b" / "board.png", Image.fromarray(board))
    assert flat(tmp_path / "b", fit="crop").reference().data.abs().max() < 0.2


# --- labels and epochs


def test_labels_follow_sorted_class_names_and_other_files_are_passed_over(pets: Path) -> None:
    data = flat(pets, classes="subfolders")
    assert data.class_names == ("ant", "cat")
    reference = data.reference()
    assert reference.labels is not None
    assert sorted(grey(reference.data[reference.labels == 0])) == [10, 11, 12, 13, 14, 15]
    assert grey(reference.data[reference.labels == 1]) == [3, 2, 1, 0]  # by file name
    assert (data.num_classes, class_rows(str(pets), "subfolders")) == (2, 3)
    assert data.source.description == "a folder of 10 images, classes in order: ant, cat"
    assert data.source.licence == "unknown"


def test_without_classes_all_images_count_and_nothing_is_conditioned(pets: Path) -> None:
    data = flat(pets)
    batch = data.batch(Rng(0, 0, "data", range(10)), 10, X0, torch.float64)
    assert batch.x0 is not None
    assert batch.x0.dtype == torch.float64
    assert sorted(grey(batch.x0)) == [0, 1, 2, 3, 10, 11, 12, 13, 14, 15]
    assert batch.cond == data.conditions(Rng(0, 0, "data", range(3))) == {}
    assert data.reference().labels is None
    assert (data.num_classes, class_rows(str(pets), "none")) == (0, None)


def test_every_image_comes_once_per_epoch_with_its_label_however_the_batch_is_dealt(
    pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = flat(pets, classes="subfolders")

    def drawn(parts: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for step in range(5):  # 20 samples, two epochs
            for part in range(parts):
                share = 4 // parts
                batch = data.batch(Rng(3, step, "data", range(part * share, (part + 1) * share)), 4, X0, torch.float32)
                assert batch.x0 is not None
                found += zip(grey(batch.x0), batch.cond["label"].tolist(), strict=True)
        return found

    whole = drawn(1)
    labelled = [(value, int(value < 10)) for value in (0, 1, 2, 3, 10, 11, 12, 13, 14, 15)]
    assert sorted(whole[:10]) == sorted(whole[10:]) == labelled
    assert whole[:10] != whole[10:]
    assert drawn(2) == drawn(4) == whole
    monkeypatch.setattr(image_folder, "HELD", 0)
    data = flat(pets, classes="subfolders")
    assert drawn(2) == whole  # read when drawn
    assert "_pixels" not in vars(data)


def test_evaluation_draws_classes_uniformly_whatever_their_size(pets: Path) -> None:
    batch = flat(pets, classes="subfolders").batch(Rng(0, 0, "data", range(4000)), 4000, frozenset(), torch.float32)
    assert batch.x0 is None
    assert float(batch.cond["label"].double().mean()) == pytest.approx(0.5, abs=0.03)


def test_a_link_back_up_is_not_followed_for_ever(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 1)
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    assert len(flat(tmp_path).reference().data) == 1


# --- mistakes


def broken(name: str, content: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "ant" / name).write_bytes(content)

    return make


def truncated(folder: Path) -> None:
    file = save(folder / "cat" / "cut.jpg", Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 4, 3), "u1")))
    file.write_bytes(file.read_bytes()[:-20])


def cut_png(folder: Path) -> None:
    file = save(folder / "cat" / "cut.png", Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 4, 3), "u1")))
    file.write_bytes(file.read_bytes()[:50])


def a_float_image(folder: Path) -> None:
    save(folder / "cat" / "float.tif", Image.fromarray(np.zeros((4, 4), np.float32)))


def nothing(folder: Path) -> None: ...


MISTAKES: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    # what is done to the folder, words on the command line, what the message names
    "missing folder": (nothing, ["data.path=DIR/nowhere"], ["data.path", "DIR/nowhere", "no such folder"]),
    "a name too long": (nothing, ["data.path=" + 300 * "x"], ["data.path", "no such folder"]),
    "home of nobody": (nothing, ["data.path='~no-such-user/x'"], ["data.path", "no such folder"]),
    "no path": (nothing, ["data.path=???"], ["data.path must be given"]),
    "file for a folder": (nothing, ["data.path=DIR/cat/9.png"], ["data.path", "It is a file"]),
    "empty folder": (lambda d: (d / "e").mkdir(), ["data.path=DIR/e"], ["must hold images", "DIR/e"]),
    "empty folder without classes": (
        lambda d: (d / "e").mkdir(), ["data.path=DIR/e", "data.classes=none"], ["must hold images", "DIR/e", ".png"],
    ),
    "class without images": (lambda d: (d / "bee").mkdir(), [], ["every class folder", "DIR/bee"]),
    "images without classes": (nothing, ["data.path=DIR/cat"], ["data.classes=none", "null_share=0"]),
    "image beside the classes": (lambda d: save(d / "x.png", 1), [], ["data.classes", "DIR/x.png"]),
    "null condition without classes": (nothing, ["data.classes=none"], ["needs null", "distiller.null_share=0"]),
    "no image inside": (broken("fake.png", b"I am text"), [], ["DIR/ant/fake.png", "cannot identify"]),
    "empty file": (broken("none.jpeg", b""), [], ["DIR/ant/none.jpeg", "empty"]),
    "broken link": (lambda d: (d / "ant" / "l.png").symlink_to(d / "gone"), [], ["DIR/ant/l.png", "No such file"]),
    "truncated jpeg": (truncated, ["evaluation=none"], ["DIR/cat/cut.jpg", "truncated"]),
    "truncated png": (cut_png, ["evaluation=none"], ["DIR/cat/cut.png"]),
    "pixels without a range": (a_float_image, [], ["DIR/cat/float.tif", "mode F"]),
    "other size": (nothing, ["data.size=8"], ["data.fit none needs", "DIR/ant/10.PNG of 4x4", "data.size=4"]),
    "mixed sizes": (lambda d: save(d / "cat" / "w.png", 1, 9), [], ["DIR/cat/w.png of 9x9", "data.fit=crop"]),
    "scaled up": (lambda d: save(d / "cat" / "w.png", 1, 9), ["data.size=8", "data.fit=crop"],
                  ["data.size", "DIR/ant/10.PNG of 4x4", "data.size=4"]),
    "size of nothing": (nothing, ["data.size=0"], ["data.size must be >= 1"]),
    "channels": (nothing, ["data.channels=2"], ["data.channels must be one of 1, 3"]),
    "fit": (nothing, ["data.fit=stretch"], ["data.fit must be one of none, crop"]),
    "size the network cannot halve": (nothing, ["networks.config.down_block_types="
                                       "[DownBlock2D,DownBlock2D,DownBlock2D,DownBlock2D]",
                                       "networks.config.up_block_types=[UpBlock2D,UpBlock2D,UpBlock2D,UpBlock2D]",
                                       "networks.config.block_out_channels=[8,8,8,8]"], ["divisible by 8", "4x4"]),
    "network for another shape": (nothing, ["networks=digits"], ["shape [1, 4, 4]", "[1, 8, 8]"]),
    "too few classes in the network": (nothing, ["networks.config.num_class_embeds=2"], ["class row", "2 rows"]),
    "metric of a larger folder": (nothing, ["evaluation.metrics=[fd_pixel]", "evaluation.num_samples=99"],
                                  ["fd_pixel needs 17 reference samples or more", "has 10"]),
    "features that are not there": (nothing, ["evaluation.prdc_space=features"], ["evaluation.prdc_space"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_ends_with_status_2_one_message_and_no_folder(
    case: str, pets: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, words, named = MISTAKES[case]
    spoil(pets)
    folder = tmp_path_factory.mktemp("runs") / "run"
    base = ["train", "experiment=image_folder_teacher", "data.path=DIR", "data.size=4", "data.channels=1"]
    small = [] if "networks=digits" in words else [NET]
    given = [word.replace("DIR", str(pets)) for word in [*base, *small, *words]]
    assert main([*given, "dry_run=true", f"run_dir={folder}"]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert "Traceback" not in shown.err + shown.out
    for text in named:
        assert text.replace("DIR", str(pets)) in shown.err
    assert not folder.exists()


def test_a_damaged_file_of_a_folder_too_large_to_hold_is_named_when_drawn(
    pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truncated(pets)
    monkeypatch.setattr(image_folder, "HELD", 0)
    data = flat(pets)
    with pytest.raises(UserError, match=r"cut\.jpg"):
        data.batch(Rng(0, 0, "data", range(11)), 11, X0, torch.float32)


# --- whole runs


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of four colour JPEGs, 12x8."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in ("oak", "ash", "elm"):
        for index in range(4):
            save(folder / name / f"{index}.jpg", Image.fromarray(rng.integers(0, 255, (8, 12, 3), dtype=np.uint8)))
    return folder


QUICK = [
    "data.size=8", "data.fit=crop", "trainer.steps=4", "trainer.batch_size=8", "sampler.num_steps=3",
    "evaluation.num_samples=40",
]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "teacher"
    words = ["train", "experiment=image_folder_teacher", f"data.path={photos}", NET, *QUICK, f"run_dir={run}"]
    assert main(words) == 0
    return run


def test_a_teacher_run_measures_itself_and_leaves_a_stock_model(teacher: Path) -> None:
    from diffusers import UNet2DModel

    unet = UNet2DModel.from_pretrained(teacher / "pipeline")
    assert (unet.config.in_channels, unet.config.sample_size, unet.config.num_class_embeds) == (3, 8, 4)
    card = (teacher / "pipeline" / "README.md").read_text()
    assert "license: unknown" in card
    assert "a folder of 12 images, classes in order: ash, elm, oak" in card
    summary = json.loads((teacher / "summary.json").read_text())
    assert {"precision", "memorised", "latency_ms"} <= summary["student"].keys()
    assert "fd_pixel" not in summary["student"]  # 192 values per image, 12 images
    assert summary["protocol"]["reference_size"] == 12


def test_the_teacher_is_distilled_into_a_pipeline_that_samples(
    teacher: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "data=image_folder", f"data.path={photos}", "networks=unet2d", "distiller=dmd2", *QUICK]
    words.append(f"networks.path={teacher}/pipeline")
    assert main([*words, f"run_dir={tmp_path / 'run'}"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    taught = json.loads((teacher / "summary.json").read_text())["student"]
    assert summary["teacher"] == taught  # from its card
    assert summary["student"]["nfe"] == 1
    unet = json.loads((tmp_path / "run" / "pipeline" / "unet" / "config.json").read_text())
    assert unet["num_class_embeds"] == 3  # without the null row
    drawn = ["sample", f"pipeline={tmp_path / 'run' / 'pipeline'}", "data=image_folder", f"data.path={photos}",
             "data.size=8", "data.fit=crop", "num=6", f"out={tmp_path / 'grid.png'}"]  # fmt: skip
    assert main(drawn) == 0
    assert (tmp_path / "grid.png").stat().st_size > 200
    capsys.readouterr()
    for wrong in (["networks.has_null=false"], ["data.classes=none"], ["data.channels=1"]):
        assert main([*words, *wrong, f"run_dir={tmp_path / 'wrong'}"]) == 2
        assert capsys.readouterr().err.startswith("error: networks must ")
    assert not (tmp_path / "wrong").exists()


def test_a_folder_without_classes_trains_an_unconditional_teacher(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["train", f"data.path={photos}", "data.classes=none", *QUICK, "evaluation=none"]
    run = tmp_path / "run"
    words = ["experiment=image_folder_teacher", "distiller.null_share=0", NET, f"run_dir={run}"]
    assert main([*base, *words]) == 0
    config = json.loads((run / "pipeline" / "config.json").read_text())
    assert config["num_class_embeds"] is None
    capsys.readouterr()
    words = ["data=image_folder", "networks=unet2d", f"networks.path={run}/pipeline", "distiller=dmd2"]
    assert main([*base, *words, f"run_dir={tmp_path / 'x'}"]) == 2
    assert "networks.has_null must be false" in capsys.readouterr().err
    assert main([*base, *words, "networks.has_null=false", "dry_run=true", f"run_dir={tmp_path / 'x'}"]) == 0
