"""The cosine of images and texts under a tiny CLIP of transformers' own classes, made on the spot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from diffdistill.alignment import ClipAlignment, hinge
from diffdistill.cli import main
from diffdistill.errors import UserError

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
WORDS = ["<|startoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|endoftext|>"]
PROMPTS = ("a b", "c d e", "f")
SIZE = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    last = len(WORDS) - 1
    text = {"vocab_size": len(WORDS), "max_position_embeddings": 10, "bos_token_id": 0, "eos_token_id": last}
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, **text, "pad_token_id": last},
        vision_config={**tower, "image_size": SIZE, "patch_size": 4},
        projection_dim=12,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(path)
    CLIPTokenizer({word: number for number, word in enumerate(WORDS)}, [], model_max_length=10).save_pretrained(path)
    return path


def pictures(num: int = 3, channels: int = 3, size: tuple[int, int] = (SIZE, SIZE)) -> torch.Tensor:
    return torch.rand(num, channels, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def labels(*values: int) -> dict[str, torch.Tensor]:
    return {"label": torch.tensor(values)}


def theirs(folder: Path, pixels: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """Cosines [images, texts] as CLIPModel itself gives them."""
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    out = model(pixel_values=pixels, **tokenizer(texts, padding=True, return_tensors="pt"))
    return (out.logits_per_image / model.logit_scale.exp()).detach()


def normalised(x: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    return (x / 2 + 0.5 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


PUBLISHED = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def test_each_class_has_its_own_text_and_the_cosine_is_clips_own(folder: Path) -> None:
    align, x = ClipAlignment(str(folder), PROMPTS), pictures()
    every = theirs(folder, normalised(x, *PUBLISHED), list(PROMPTS))
    for picked in ((0, 1, 2), (2, 2, 0)):
        cosine = align(x, labels(*picked))
        torch.testing.assert_close(cosine, every[torch.arange(3), torch.tensor(picked)])
        assert bool((cosine.abs() <= 1).all())
    assert float((every[:, 0] - every[:, 1]).abs().min()) > 1e-3  # the texts differ


def test_texts_may_come_with_the_condition(folder: Path) -> None:
    align, x = ClipAlignment(str(folder), None), pictures()
    ids = align.tokens(["f", "a b", "c d e"])
    by_class = ClipAlignment(str(folder), PROMPTS)(x, labels(2, 0, 1))
    torch.testing.assert_close(align(x, {"text_ids": ids}), by_class)
    with pytest.raises(UserError, match="needs conditions with text_ids"):
        align(x, labels(0, 0, 0))


def test_grey_images_are_repeated(folder: Path) -> None:
    align, grey = ClipAlignment(str(folder), PROMPTS), pictures(channels=1)
    assert torch.equal(align(grey, labels(0, 1, 2)), align(grey.expand(-1, 3, -1, -1), labels(0, 1, 2)))


@pytest.mark.parametrize("size", [(16, 16), (12, 20), (5, 5)])
def test_images_are_sized_as_clips_own_processor_does(folder: Path, size: tuple[int, int]) -> None:
    levels = torch.randint(40, 216, (1, 3, *size), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    image = Image.fromarray(levels[0].permute(1, 2, 0).numpy())
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    ours = ClipAlignment(str(folder), PROMPTS)(levels.float() / 127.5 - 1, labels(1))
    # theirs is rounded to 8 bits once more
    torch.testing.assert_close(ours, theirs(folder, pixels, ["c d e"])[0], atol=5e-3, rtol=0)


def test_the_folders_own_normalisation_is_taken(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "clip")
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    CLIPImageProcessor(image_mean=mean, image_std=std).save_pretrained(tmp_path / "clip")
    x = pictures()
    ours = ClipAlignment(str(tmp_path / "clip"), PROMPTS)(x, labels(0, 1, 2))
    torch.testing.assert_close(ours, theirs(folder, normalised(x, mean, std), list(PROMPTS)).diagonal())


def test_the_gradient_reaches_the_images_and_no_weight(folder: Path) -> None:
    align, x = ClipAlignment(str(folder), PROMPTS), pictures().double().requires_grad_()
    before = float(align(x, labels(0, 1, 2)).sum().detach())
    (gradient,) = torch.autograd.grad(align(x, labels(0, 1, 2)).sum(), x)
    assert gradient.dtype == torch.float64 and bool((gradient.flatten(1).norm(dim=1) > 0).all())
    assert float(align(x + 0.05 * gradient / gradient.norm(), labels(0, 1, 2)).sum().detach()) > before
    assert not any(weight.requires_grad for weight in align._clip.model.parameters())
    assert not isinstance(align, torch.nn.Module)  # nothing that holds it takes its weights for its own


def test_the_hinge_pulls_below_the_threshold_alone() -> None:
    cosine = torch.tensor([-0.5, 0.3, 0.35, 0.8], requires_grad=True)
    value = hinge(cosine, 0.35)
    torch.testing.assert_close(value, torch.tensor([0.85, 0.05, 0.0, 0.0]))
    (gradient,) = torch.autograd.grad(value.sum(), cosine)
    assert gradient.tolist() == [-1.0, -1.0, 0.0, 0.0]


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_without_a_text_is_refused(folder: Path, label: int) -> None:
    with pytest.raises(UserError, match=rf"alignment.prompts must hold a text for label {label}, got 3 texts"):
        ClipAlignment(str(folder), PROMPTS)(pictures(), labels(0, label, 1))


def test_what_is_no_image_is_refused(folder: Path) -> None:
    align = ClipAlignment(str(folder), PROMPTS)
    for x in (torch.zeros(2, 2), torch.zeros(2, 4, 8, 8)):
        with pytest.raises(UserError, match=r"needs images \[B, 1 or 3, H, W\]"):
            align(x, labels(0, 1))
    with pytest.raises(UserError, match="needs conditions with label"):
        align(pictures(), {})


def test_texts_that_would_be_cut_short_or_are_none_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"prompts\[1\] must have at most 10 tokens, has 14"):
        ClipAlignment(str(folder), ("a", "a b c d e f g h i j k l", "b"))
    with pytest.raises(UserError, match="a text for each class"):
        ClipAlignment(str(folder), ())


def no_tokenizer(path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (path / name).unlink(missing_ok=True)


def another_model(path: Path) -> None:
    (path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))


def one_layer_more(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    (path / "config.json").write_text(json.dumps(config))


def cut(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-100])


def bad_normalisation(path: Path) -> None:
    (path / "preprocessor_config.json").write_text("{")


@pytest.mark.parametrize("damage", [shutil.rmtree, no_tokenizer, another_model, one_layer_more, cut, bad_normalisation])
def test_a_folder_that_holds_no_whole_model_is_named(
    damage, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    path = tmp_path / "clip"
    shutil.copytree(folder, path)
    damage(path)
    with pytest.raises(UserError) as told:
        ClipAlignment(str(path), PROMPTS)
    assert told.value.key == "path" and told.value.constraint.startswith("must hold")
    assert "\n" not in str(told.value) and tuple(capfd.readouterr()) == ("", "")


def test_without_transformers_the_extra_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match=r"diffdistill\[clip\]"):
        ClipAlignment(str(tmp_path), PROMPTS)


def test_a_run_takes_it_from_its_configuration(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    texts = ",".join("abcdefghij")
    node = f"distiller.alignment={{_target_:diffdistill.alignment.ClipAlignment,path:{folder},prompts:[{texts}]}}"
    words = ["data=digits", "distiller=vsd", "evaluation=none", "trainer.steps=1", "trainer.batch_size=4"]
    assert main(["train", *words, node, "trainer.log_every=1", f"run_dir={tmp_path / 'run'}"]) == 0
    assert capfd.readouterr().err == ""
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["student/alignment"] > 0
    wrong = node.replace(str(folder), str(tmp_path / "nowhere"))
    assert main(["train", *words, wrong, "dry_run=true", f"run_dir={tmp_path / 'new'}"]) == 2
    assert capfd.readouterr().err.startswith("error: distiller.alignment.path must hold a CLIP model")
