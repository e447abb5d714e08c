"""Captioned shapes: what is drawn, what its classifier sees, what its pipeline is trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import diffdistill
from diffdistill.config import compose
from diffdistill.errors import UserError
from diffdistill.evaluation import harness
from diffdistill.evaluation.shape_features import accuracies, load_shape_features
from diffdistill.networks.files import quiet_libraries, resolve
from diffdistill.pipelines import PipelineSampler
from diffdistill.recipe import Recipe, assemble
from diffdistill.rng import Rng
from diffdistill.shapes import COLOURS, COUNTS, PLACES, SHAPES, Shapes, attributes, captions, render
from diffdistill.shapes_pipeline import error

ASSET = Path(resolve("asset:shapes_t2i"))


def drawn(labels: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return render(Rng(seed, 0, "x", range(len(labels))), labels)


def test_captions_name_the_attributes() -> None:
    texts = captions()
    assert len(texts) == len(set(texts)) == 270
    for label in (0, 13, 269):
        colour, shape, place = (int(a[0]) for a in attributes(torch.tensor([label])))
        assert texts[label] == f"a {list(COLOURS)[colour]} {SHAPES[shape]} at the {PLACES[place]}"


def test_colours_and_places_are_drawn() -> None:
    labels = torch.arange(270)
    x, (colour, _, place) = drawn(labels), attributes(labels)
    assert x.shape == (270, 3, 32, 32) and x.abs().max() <= 1
    shown = (x.amax(1) > -0.3).float()  # brighter than any ground
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    count = shown.sum((1, 2))
    centre = torch.stack([(shown * rows).sum((1, 2)), (shown * columns).sum((1, 2))], 1) / count[:, None]
    assert torch.equal((centre / 10.67).long(), torch.stack([place // 3, place % 3], 1))
    mean = (x * shown[:, None]).sum((2, 3)) / count[:, None]
    table = torch.tensor(list(COLOURS.values()))
    assert torch.equal(torch.cdist(mean, table).argmin(1), colour)
    assert torch.equal(drawn(labels), x) and not torch.equal(drawn(labels, 1), x)


def test_the_classifier_sees_what_was_drawn() -> None:
    network = load_shape_features()
    assert min(accuracies(network)) > 0.99
    labels = torch.arange(0, 270, 7)
    scores = network.logits(drawn(labels))
    assert scores.shape == (len(labels), 270) and torch.equal(scores.argmax(1), labels)
    assert torch.allclose(scores.exp().sum(1), torch.ones(len(labels)))


def test_the_vae_keeps_what_is_drawn() -> None:
    vae: Any = diffusers.AutoencoderKL.from_pretrained(ASSET / "vae")
    with torch.no_grad():
        assert error(vae) < 0.1
        labels = torch.arange(0, 270, 3)
        shown = vae.decode(vae.encode(drawn(labels)).latent_dist.mode()).sample
    agree = (load_shape_features().logits(shown).argmax(1) == labels).double().mean()
    assert float(agree) > 0.98


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    words = ["data=shapes_t2i", "distiller=dmd2", "experiment=none", "evaluation=none", "run_dir=none"]
    return assemble(compose("train", words))  # type: ignore[arg-type]


def test_a_batch_is_latents_with_their_captions_embeddings(recipe: Recipe) -> None:
    data: Any = recipe.data
    batch = data.batch(Rng(0, 0, "data", range(8)), 8, frozenset({"x0"}), torch.float32)
    labels = batch.cond["label"]
    assert batch.x0.shape == (8, 4, 8, 8) and batch.cond["text"].shape == (8, 12, 64)
    with quiet_libraries():
        stock: Any = diffusers.DiffusionPipeline.from_pretrained(ASSET)
    told = stock.encode_prompt([captions()[i] for i in labels], "cpu", 1, False)[0]
    torch.testing.assert_close(batch.cond["text"], told)
    agree = load_shape_features().logits(data.codec.decode(batch.x0)).argmax(1) == labels
    assert float(agree.double().mean()) >= 0.75
    assert recipe.networks.teacher.null is not None
    told = stock.encode_prompt("", "cpu", 1, False)[0]
    torch.testing.assert_close(recipe.networks.teacher.null["text"], told)
    halves = [data.batch(Rng(0, 0, "data", range(i, i + 4)), 8, frozenset({"x0"}), torch.float32).x0 for i in (0, 4)]
    torch.testing.assert_close(torch.cat(halves), batch.x0)


def test_the_teacher_draws_what_it_is_told(recipe: Recipe) -> None:
    """Also as a stock pipeline: the shipped folder is one."""
    from dataclasses import replace

    from diffdistill.denoiser import Guidance

    guided = recipe.networks["teacher"].guided(Guidance(2.0, recipe.networks.teacher.null))
    sampler = replace(recipe.sampler, denoiser=guided)
    samples, labels = harness.draw(sampler, recipe.data, 64, 0, 64)
    assert samples.shape == (64, 3, 32, 32) and labels is not None
    features = load_shape_features()
    assert float((features.logits(samples).argmax(1) == labels).double().mean()) > 0.85
    pipeline = PipelineSampler.load(str(ASSET))
    told = Shapes().of_pipeline()
    whole = PipelineSampler(pipeline.pipeline, {"num_inference_steps": 25, "guidance_scale": 2.0}, 50, told.texts)
    samples, labels = harness.draw(whole, told, 64, 0, 64)
    assert labels is not None
    assert float((features.logits(samples).argmax(1) == labels).double().mean()) > 0.85


def test_figures_are_of_what_is_seen(recipe: Recipe) -> None:
    judge = harness.Evaluation(0, 72, 72, ("label_agreement", "fd", "nfe"), 0, 72, 2, "none")
    judge.check(recipe.data)
    figures, protocol = harness.evaluate(recipe.distiller.generator, recipe.data, judge)
    assert figures["nfe"] == 1 and 0 <= figures["label_agreement"] <= 1 and figures["fd"] > 0
    assert protocol.reference == "shapes_t2i" and protocol.clip == (-1.0, 1.0)


def test_a_run_ends_with_a_pipeline_that_can_be_measured(tmp_path: Path) -> None:
    words = ["experiment=shapes_t2i", "trainer.steps=2", "trainer.batch_size=4", "evaluation=none", "probe=null"]
    diffdistill.train(*words, run_dir=str(tmp_path / "run"))
    assert not json.loads((tmp_path / "run" / "summary.json").read_text())["student"]
    contract = json.loads((tmp_path / "run" / "pipeline" / "call.json").read_text())
    assert contract["prompts"] == captions() and contract["nfe"] == 1
    found = diffdistill.evaluate(
        pipeline=str(tmp_path / "run" / "pipeline"), data="shapes_t2i", num_samples=32, metrics=["label_agreement"]
    )
    assert 0 <= found["figures"]["label_agreement"] <= 1
    picture = tmp_path / "grid.png"
    diffdistill.sample(pipeline=str(tmp_path / "run" / "pipeline"), data="shapes_t2i", num=8, out=str(picture))
    assert picture.is_file()
    (tmp_path / "p.txt").write_text("a red circle at the top\n")
    picture.unlink()
    told = ["data=prompts", f"data.path={tmp_path / 'p.txt'}"]
    diffdistill.sample(*told, pipeline=str(tmp_path / "run" / "pipeline"), num=4, out=str(picture))
    assert picture.is_file()


def test_mistakes_are_told() -> None:
    words = ["data=shapes_t2i", "networks=gmm2d", "experiment=none", "evaluation=none", "run_dir=none"]
    with pytest.raises(UserError, match="shapes need a network that reads text, got Mlp"):
        assemble(compose("train", words))  # type: ignore[arg-type]
    assert len(COUNTS) == 3
