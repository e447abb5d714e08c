"""Feature networks by name: each library's own numbers, on small networks built here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import tokenizer
from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.evaluation import kid
from diffdistill.evaluation.clip_score import ClipScore, load_clip
from diffdistill.evaluation.frechet import frechet_distance, moments
from diffdistill.evaluation.spaces import INCEPTION, MODES, CleanFid, load_space, pictures_of, plain_embedding


def images(num: int, channels: int = 3, side: int = 24, seed: int = 0) -> Tensor:
    """Smooth images in [-1, 1] that use the whole range, [num, channels, side, side]."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num, channels, 6, 6, generator=rng) * 2.4 - 1.2
    return nn.functional.interpolate(coarse, size=side, mode="bilinear").clamp(-1, 1)


def saved(x: Tensor, folder: Path) -> Path:
    """The images as files, written by diffusers as a pipeline's are."""
    from diffusers.utils.pil_utils import numpy_to_pil

    folder.mkdir(parents=True)
    for index, picture in enumerate(numpy_to_pil((x / 2 + 0.5).permute(0, 2, 3, 1).numpy())):
        picture.save(folder / f"{index:04d}.png")
    return folder


def small_network(x: Tensor) -> Tensor:
    """Sixteen features of pictures [B, 3, H, W] in 0..255."""
    rng = torch.Generator().manual_seed(1)
    mixed = torch.einsum("oc,bchw->bohw", torch.randn(16, 3, generator=rng), x / 127.5 - 1)
    return torch.tanh(nn.functional.adaptive_avg_pool2d(mixed, 3)).flatten(2).mul(torch.arange(1.0, 10)).sum(2)


@pytest.mark.parametrize(("mode", "channels"), [("clean", 1), *((mode, 3) for mode in MODES)])
def test_distances_are_those_of_clean_fid_on_the_same_features(tmp_path: Path, mode: str, channels: int) -> None:
    from cleanfid import fid

    a, b = images(60, channels), images(60, channels, seed=1) * 0.8
    ours, theirs = (str(saved(x, tmp_path / name)) for name, x in (("a", a), ("b", b)))
    how = {"mode": mode, "num_workers": 0, "device": torch.device("cpu"), "verbose": False}
    space = CleanFid(small_network, mode, "none", "cpu")
    x, y = space.features(a), space.features(b)
    wanted = [fid.get_folder_features(folder, small_network, **how) for folder in (ours, theirs)]
    np.testing.assert_allclose(np.stack([x, y]), np.stack(wanted), rtol=1e-5, atol=1e-5)
    distance = frechet_distance(moments(x), moments(y))
    exact = [features.astype(np.float64) for features in wanted]
    assert distance == pytest.approx(fid.fid_from_feats(*exact), rel=1e-6)
    # its means are summed in float32
    assert distance == pytest.approx(
        fid.compute_fid(ours, theirs, custom_feat_extractor=small_network, **how), rel=3e-6
    )
    # sixty of each are one subset, whatever the order
    assert kid.kernel_distance(x, y, seed=0) == pytest.approx(fid.kernel_distance(*exact[::-1]), rel=1e-6)


def test_kid_is_that_of_torchmetrics() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    class Features(nn.Module):
        num_features = 16

        def forward(self, x: Tensor) -> Tensor:
            return small_network(x.float())

    theirs = KernelInceptionDistance(feature=Features(), subsets=2, subset_size=50)
    a, b = (images(50, seed=seed) for seed in (0, 1))
    as_bytes = [torch.from_numpy(np.stack(pictures_of(x))).permute(0, 3, 1, 2) for x in (a, b)]
    theirs.update(as_bytes[1], real=True)
    theirs.update(as_bytes[0], real=False)
    ours = kid.kernel_distance(*(small_network(x.float()) for x in as_bytes), seed=0)
    assert ours == pytest.approx(float(theirs.compute()[0]), rel=1e-4)  # it sums in float32


class Script(nn.Module):
    """What clean-fid asks of its scripted Inception."""

    class Layers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.adaptive_avg_pool2d(x, (32, 64)).mean(1).flatten(1)

    def __init__(self) -> None:
        super().__init__()
        self.layers = self.Layers()

    def forward(self, x: Tensor, return_features: bool = True) -> Tensor:
        return self.layers(nn.functional.interpolate(x, size=(299, 299)) / 128 - 1)


@pytest.fixture
def inception(tmp_path: Path) -> Path:
    torch.jit.script(Script()).save(tmp_path / INCEPTION)
    return tmp_path / INCEPTION


@pytest.mark.parametrize("mode", ["clean", "legacy_tensorflow"])
def test_inception_comes_from_a_file(inception: Path, mode: str, tmp_path: Path) -> None:
    from cleanfid import fid
    from cleanfid.inception_torchscript import InceptionV3W

    x = images(5)
    space = load_space(f"inception:{mode}@{inception}")
    model = InceptionV3W(str(inception.parent), download=False, resize_inside=mode == "legacy_tensorflow")
    folder = str(saved(x, tmp_path / "files"))
    expected = fid.get_folder_features(folder, model, num_workers=0, device="cpu", mode=mode, verbose=False)
    np.testing.assert_allclose(space.features(x).numpy(), expected, rtol=1e-6, atol=1e-6)
    assert (space.dim, len(space.sha256)) == (2048, 64)
    assert f"clean-fid {mode}" in space.resize


def timm_folder(folder: Path) -> str:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7)
    timm.models.save_for_hf(model, folder)
    return f"timm:{folder}"


def transformers_folder(folder: Path, clip: bool = False) -> str:
    from transformers import BitImageProcessor, CLIPConfig, CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    if clip:
        words = tokenizer("<|endoftext|>")
        size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        ends = {"bos_token_id": 0, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
        text = {**size, **ends, "vocab_size": len(words), "max_position_embeddings": 77}
        config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 30, "patch_size": 15})
        CLIPModel(config).save_pretrained(folder)
        words.save_pretrained(folder)
        CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}).save_pretrained(folder)
    else:
        layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}
        Dinov2Model(Dinov2Config(hidden_size=32, image_size=28, patch_size=14, **layers)).save_pretrained(folder)
        BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return f"transformers:{folder}"


def open_clip_file(folder: Path) -> str:
    import json

    import open_clip

    settings = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    folder.mkdir(parents=True)
    (folder / "tiny-clip.json").write_text(json.dumps(settings))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-clip").state_dict(), folder / "tiny.pt")
    return f"open_clip:tiny-clip@{folder / 'tiny.pt'}"


def by_timm(folder: Path, pictures: list[Image.Image]) -> Tensor:
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return model(torch.stack([transform(p) for p in pictures]))


def by_transformers(folder: Path, pictures: list[Image.Image]) -> Tensor:
    from transformers import AutoImageProcessor, Dinov2Model

    inputs = AutoImageProcessor.from_pretrained(folder)(images=pictures, return_tensors="pt")
    return Dinov2Model.from_pretrained(folder).eval()(**inputs).last_hidden_state[:, 0]


def by_open_clip(folder: Path, pictures: list[Image.Image]) -> Tensor:
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms("tiny-clip", pretrained=str(folder / "tiny.pt"))
    return model.eval().encode_image(torch.stack([transform(p) for p in pictures]))


@pytest.mark.parametrize(
    ("make", "expected"),
    [(timm_folder, by_timm), (transformers_folder, by_transformers), (open_clip_file, by_open_clip)],
)
@torch.no_grad()
def test_features_are_those_of_the_library(
    tmp_path: Path, make: Callable[[Path], str], expected: Callable[[Path, list[Image.Image]], Tensor]
) -> None:
    x = images(3)
    space = load_space(make(tmp_path / "net"))
    found = space.features(x)
    wanted = expected(tmp_path / "net", [Image.fromarray(p) for p in pictures_of(x)])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert space.dim == wanted.shape[1] and "8 bits" in space.resize
    assert float(found.std(0).max()) > 1e-4  # pictures differ
    assert load_space(space.name).sha256 == space.sha256


def test_a_picture_has_its_features_whatever_stands_beside_it(tmp_path: Path) -> None:
    space = load_space(timm_folder(tmp_path / "net"))
    x = images(70, side=16)
    torch.testing.assert_close(space.features(x)[60:], space.features(x[60:]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "features must be data, or KIND:NAME"),
        ("timm:", "features must be data, or KIND:NAME"),
        ("timm:no_such_net", "features must name a network that timm can load"),
        ("transformers:/nowhere/net", "features must name a network that transformers can load"),
        ("open_clip:ViT-B-32", "features must name a network that open_clip can load.*needs @"),
        ("inception:other", "features must be inception:MODE with MODE among clean"),
        ("inception:clean@/nowhere/x.pt", f"features must end in @ and the path of {INCEPTION}"),
        ("inception:legacy_pytorch@x.pt", "features must name no file for inception:legacy_pytorch"),
    ],
)
def test_what_cannot_be_loaded_is_one_message(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_space(spec)


def test_a_damaged_inception_is_one_message(tmp_path: Path) -> None:
    (tmp_path / INCEPTION).write_bytes(b"no weights")
    with pytest.raises(UserError, match="features needs the weights of clean-fid's Inception"):
        load_space(f"inception:clean@{tmp_path / INCEPTION}")


@torch.no_grad()
def test_clip_score_of_open_clip_is_the_cosine_of_its_embeddings(tmp_path: Path) -> None:
    import open_clip

    score = load_clip(open_clip_file(tmp_path / "net"))
    x, prompts = images(4), ["a cat", "two dogs", "the sea", "a cat"]
    seen = by_open_clip(tmp_path / "net", [Image.fromarray(p) for p in pictures_of(x)])
    model = open_clip.create_model("tiny-clip", pretrained=str(tmp_path / "net" / "tiny.pt")).eval()
    told = model.encode_text(open_clip.get_tokenizer("tiny-clip")(prompts))
    cosine = (seen * told).sum(1) / (seen.norm(dim=1) * told.norm(dim=1))
    torch.testing.assert_close(score(x, prompts), 100 * cosine.clamp(min=0).double(), rtol=1e-4, atol=1e-3)


def test_clip_score_is_that_of_torchmetrics(tmp_path: Path) -> None:
    from torchmetrics.functional.multimodal import clip_score
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPProcessor

    spec = transformers_folder(tmp_path / "net", clip=True)
    x, prompts = images(6), ["a cat", "two dogs", "the sea", "a cat", "a house", "rain"]
    as_bytes = torch.from_numpy(np.stack(pictures_of(x))).permute(0, 3, 1, 2)
    folder = tmp_path / "net"
    processor = CLIPProcessor(CLIPImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))

    class Plain(CLIPModel):
        """Embeddings as torchmetrics knows them, before transformers 5 wrapped them."""

        def get_image_features(self, *args: Any, **keywords: Any) -> Tensor:
            return plain_embedding(super().get_image_features(*args, **keywords))

        def get_text_features(self, *args: Any, **keywords: Any) -> Tensor:
            return plain_embedding(super().get_text_features(*args, **keywords))

    theirs = (Plain.from_pretrained(folder).eval(), processor)
    for index in range(6):  # its mean is clipped at 0, not each score
        expected = clip_score(as_bytes[index], prompts[index], lambda: theirs)
        found = load_clip(spec)(x[index : index + 1], prompts[index : index + 1])
        assert float(found) == pytest.approx(float(expected), rel=1e-4, abs=1e-4)


def test_prompts_that_a_model_cannot_read_to_their_end_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    score = load_clip(open_clip_file(tmp_path / "net"))
    score(images(2), ["a cat", "long " * 200])
    assert score.cut == 1
    score.tell_cut()
    assert "1 prompts are longer than the model reads" in capsys.readouterr().err


@pytest.mark.parametrize("spec", ["nowhere", "transformers:", "timm:resnet18", "transformers:/nowhere", "open_clip:x"])
def test_what_is_no_clip_model_is_one_message(spec: str) -> None:
    with pytest.raises(UserError, match="clip must"):
        load_clip(spec)


def test_a_constant_cosine_gives_its_hundredfold() -> None:
    """Embeddings at 60 degrees."""
    table = nn.Embedding.from_pretrained(torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5]]))
    score = ClipScore(
        table,
        lambda pictures: torch.zeros(len(pictures), dtype=torch.long),
        table,
        lambda prompts: (torch.ones(len(prompts), dtype=torch.long), 0),
        table,
    )
    torch.testing.assert_close(score(images(2), ["a", "b"]), torch.full((2,), 50.0, dtype=torch.float64))
