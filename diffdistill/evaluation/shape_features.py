"""A small classifier of captioned shapes whose penultimate layer serves as feature space; trained by this module."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.evaluation.features import read_asset, write_asset
from diffdistill.rng import Rng

ASSET = Path(__file__).parent.parent / "assets" / "shapes_features"
STEPS = 1500
BATCH_SIZE = 64
PEAK_LR = 2e-3
NOISE = 0.1  # std, added in training
NUM_HELD_OUT = 4000


class ShapeFeatures(nn.Module):
    """Four convolutions and a head per attribute on 32x32 pictures. Its classes are the captions.

    sha256: hash of the weight file it was loaded from, "" for an untrained one.
    """

    dim = 64
    resize = "none"

    def __init__(self, counts: tuple[int, int, int], width: int = 24) -> None:
        super().__init__()
        self.counts, self.width, self.sha256 = counts, width, ""
        layers: list[nn.Module] = []
        for before, after in ((3, width), (width, width), (width, 2 * width), (2 * width, 2 * width)):
            stride = 1 if before == 3 else 2
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(8, after), nn.SiLU()]
        self.convs = nn.Sequential(*layers)
        self.neck = nn.Linear(2 * width * 16, self.dim)
        self.heads = nn.ModuleList(nn.Linear(self.dim, count) for count in counts)

    def features(self, x: Tensor) -> Tensor:
        """x: [B, 3, 32, 32] in [-1, 1].  Returns the penultimate layer, [B, 64]."""
        return F.silu(self.neck(self.convs(x).flatten(1)))

    def attributes(self, x: Tensor) -> list[Tensor]:
        """x: [B, 3, 32, 32] in [-1, 1].  Log-probabilities of colours [B, 6], shapes [B, 5] and places [B, 9]."""
        found = self.features(x)
        return [head(found).log_softmax(1) for head in self.heads]

    def logits(self, x: Tensor) -> Tensor:
        """x: [B, 3, 32, 32] in [-1, 1].  Log-probabilities of the captions, [B, 270]: the largest is that of the
        likeliest colour, shape and place."""
        colour, shape, place = self.attributes(x)
        return (colour[:, :, None, None] + shape[:, None, :, None] + place[:, None, None]).flatten(1)


def load_shape_features(path: str | Path | None = None) -> ShapeFeatures:
    """The trained network in `path` (default: the shipped one), frozen, in eval mode, on the CPU.

    Raises UserError if a file is missing or the weights are not those that config.json names.
    """
    config, weights = read_asset(Path(path) if path is not None else ASSET, __name__)
    network = ShapeFeatures(tuple(config["counts"]), config["width"])
    network.load_state_dict(weights)
    network.sha256 = config["sha256"]
    return network.eval().requires_grad_(False)


def train() -> ShapeFeatures:
    """Fit the classifier to pictures drawn afresh at every step: AdamW, one-cycle rate, noise of std .1."""
    from diffdistill.shapes import COUNTS, attributes, render

    torch.manual_seed(0)
    network = ShapeFeatures(COUNTS)
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=STEPS)
    for step in range(STEPS):
        rng = Rng(0, step, "features", range(BATCH_SIZE))
        labels = rng.integers(math.prod(COUNTS), (BATCH_SIZE,))
        pictures = render(rng, labels)
        pictures = pictures + NOISE * rng.normal(tuple(pictures.shape), pictures.dtype)
        told = network.attributes(pictures)
        loss = torch.stack([F.nll_loss(found, wanted) for found, wanted in zip(told, attributes(labels), strict=True)])
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        schedule.step()
    return network.eval().requires_grad_(False)


def accuracies(network: ShapeFeatures) -> tuple[float, ...]:
    """On held-out pictures: of colour, shape, place, and of all three at once."""
    from diffdistill.shapes import COUNTS, attributes, render

    rng = Rng(1, 0, "held out", range(NUM_HELD_OUT))
    labels = rng.integers(math.prod(COUNTS), (NUM_HELD_OUT,))
    right = [
        found.argmax(1) == wanted
        for found, wanted in zip(network.attributes(render(rng, labels)), attributes(labels), strict=True)
    ]
    return tuple(float(share.double().mean()) for share in (*right, torch.stack(right).all(0)))


CARD = """# shapes_features

A classifier of captioned shapes (colour, shape, place) for `fd`, `prdc` and `label_agreement`.
Input: [B, 3, 32, 32] in [-1, 1].  Features: the penultimate layer, [B, 64].  Classes: the 270 captions.
Trained on pictures of `diffdistill.shapes`, drawn by this package.

- held-out accuracy on {num} pictures: colour {colour:.4f}, shape {shape:.4f}, place {place:.4f}, all three {all:.4f}
- parameters: {parameters}
- sha256 of model.safetensors: `{sha256}`
- made by: `python -m diffdistill.evaluation.shape_features --out diffdistill/assets/shapes_features`
"""


def write(network: ShapeFeatures, out: Path) -> None:
    """Write model.safetensors, config.json and README.md into the folder `out`."""
    colour, shape, place, everything = accuracies(network)
    config = {"counts": list(network.counts), "width": network.width, "dim": network.dim,
              "held_out_accuracy": everything}  # fmt: skip
    card = CARD.format(num=NUM_HELD_OUT, colour=colour, shape=shape, place=place, all=everything,
                       sha256="{sha256}", parameters="{parameters:,}")  # fmt: skip
    write_asset(network, out, config, card)


def main() -> None:
    """Train and write the asset."""
    parser = argparse.ArgumentParser(prog="python -m diffdistill.evaluation.shape_features", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    write(train(), parser.parse_args().out)


if __name__ == "__main__":
    main()
