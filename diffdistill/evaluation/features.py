"""A small digit classifier whose penultimate layer serves as feature space; trained by this module's own command."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

from diffdistill.errors import UserError

ASSET = Path(__file__).parent.parent / "assets" / "digits_features"
SPLIT_SEED = 0
NUM_HELD_OUT = 360
TRAIN_SEED = 0
EPOCHS = 40
BATCH_SIZE = 64
PEAK_LR = 2e-3


class FeatureNetwork(Protocol):
    """What distances ask of a feature network. sha256: of its weights.  dim: of its features.  resize: how pictures
    become its input, in words."""

    sha256: str
    dim: int
    resize: str

    def features(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W] in [-1, 1].  Returns [B, dim]."""
        ...


class Classifier(FeatureNetwork, Protocol):
    """A feature network that knows the classes of a data set."""

    def logits(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W] in [-1, 1].  Returns [B, classes]."""
        ...


class WholePictures(ABC):
    """A feature network for pictures of any kind and size: quantised to 8 bits, as a file holds them, and resized.

    name: as it was asked for.  The rest as of a FeatureNetwork.
    """

    name: str
    sha256: str
    dim: int
    resize: str

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W] in [-1, 1], C 1 or 3.  Returns [B, dim] float32 on the CPU."""


class DigitFeatures(nn.Module):
    """Four convolutions and two linears on 8x8 digits, 80,330 parameters.

    sha256: hash of the weight file it was loaded from, "" for an untrained one.
    held_out_accuracy: on the scans kept out of its training, nan for an untrained one.
    """

    dim = 64
    resize = "none"

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.sha256 = ""
        self.held_out_accuracy = math.nan
        self.convs = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.GroupNorm(8, 2 * width), nn.SiLU(),
            nn.Conv2d(2 * width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
        )  # fmt: skip
        self.neck = nn.Linear(16 * width, self.dim)
        self.head = nn.Linear(self.dim, 10)

    def features(self, x: Tensor) -> Tensor:
        """x: [B, 1, 8, 8] in [-1, 1].  Returns the penultimate layer, [B, 64]."""
        return F.silu(self.neck(self.convs(x).flatten(1)))

    def logits(self, x: Tensor) -> Tensor:
        """x: [B, 1, 8, 8] in [-1, 1].  Returns unnormalised log-probabilities of the digits 0..9, [B, 10]."""
        return self.head(self.features(x))


def load_features(path: str | Path | None = None) -> DigitFeatures:
    """The trained network in `path` (default: the shipped one), frozen, in eval mode, on the CPU.

    Raises UserError if a file is missing or the weights are not those that config.json names.
    """
    config, weights = read_asset(Path(path) if path is not None else ASSET, __name__)
    network = DigitFeatures(config["width"])
    network.load_state_dict(weights)
    network.sha256 = config["sha256"]
    network.held_out_accuracy = config["held_out_accuracy"]
    return network.eval().requires_grad_(False)


def read_asset(folder: Path, module: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the weights of a feature network's folder; `python -m module --out DIR` makes such.

    Raises UserError if a file is missing or the weights are not those that config.json names.
    """
    key = "evaluation.features"
    try:
        config = json.loads((folder / "config.json").read_text())
        weights = (folder / "model.safetensors").read_bytes()
    except FileNotFoundError as error:
        raise UserError(key, "must be a folder with config.json and model.safetensors", folder,
                        f"Make one with `python -m {module} --out DIR`.") from error  # fmt: skip
    sha256 = hashlib.sha256(weights).hexdigest()
    if sha256 != config["sha256"]:
        raise UserError(key, f"must hold the weights with sha256 {config['sha256']}", sha256,
                        "Restore the folder, or train it again.")  # fmt: skip
    return config, load(weights)


def write_asset(network: nn.Module, out: Path, config: Mapping[str, Any], card: str) -> None:
    """Write model.safetensors, config.json and README.md into the folder `out`. card: its {sha256} and {parameters} are
    filled in."""
    weights = save({name: value.contiguous() for name, value in network.state_dict().items()})
    sha256 = hashlib.sha256(weights).hexdigest()
    card = card.format(sha256=sha256, parameters=sum(p.numel() for p in network.parameters()))
    out.mkdir(parents=True, exist_ok=True)
    (out / "model.safetensors").write_bytes(weights)
    (out / "config.json").write_text(json.dumps({"schema": 1, **config, "sha256": sha256}, indent=2) + "\n")
    (out / "README.md").write_text(card)
    print(card)


def split_scans(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (train, held out) of a fixed stratified split of scans with labels [n]; 360 are held out."""
    rng = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(len(labels), generator=rng)
    # Ranks within each class, spread over (0, 1): the smallest 360 take the same share of every class.
    rank = torch.empty(len(labels), dtype=torch.float64)
    for digit in labels.unique():
        members = order[labels[order] == digit]
        rank[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    ordered = rank.argsort(stable=True)
    return ordered[NUM_HELD_OUT:].sort().values, ordered[:NUM_HELD_OUT].sort().values


def augment(x: Tensor, rng: torch.Generator) -> Tensor:
    """Shift images [B, 1, 8, 8] by up to half a pixel per axis (bilinear) and add noise of std .1."""
    B = len(x)
    theta = torch.zeros(B, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1
    theta[:, :, 2] = (torch.rand(B, 2, generator=rng) - 0.5) * (2 / x.shape[-1])  # grid units: 2 is the whole width
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    shifted = F.grid_sample(x + 1, grid, align_corners=False) - 1  # zero padding must mean black, -1
    return shifted + 0.1 * torch.randn(x.shape, generator=rng)


def train(images: Tensor, labels: Tensor) -> DigitFeatures:
    """Fit the classifier to images [n, 1, 8, 8] and labels [n]: AdamW, one-cycle rate, label smoothing .05."""
    torch.manual_seed(TRAIN_SEED)
    rng = torch.Generator().manual_seed(TRAIN_SEED)
    network = DigitFeatures()
    batches = math.ceil(len(images) / BATCH_SIZE)
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=EPOCHS * batches)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(images), generator=rng).split(BATCH_SIZE):
            scores = network.logits(augment(images[index], rng))
            loss = F.cross_entropy(scores, labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval().requires_grad_(False)


def accuracy(network: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is their label's."""
    return float((network.logits(images).argmax(1) == labels).double().mean())


CARD = """# digits_features

A classifier of 8x8 digits for `fd`, `kid`, `prdc` and `label_agreement`.
Input: [B, 1, 8, 8] in [-1, 1] (raw / 8 - 1).  Features: the penultimate layer, [B, 64].
Trained on {num_train} of scikit-learn's 1,797 scans (Alpaydin & Kaynak 1998, CC BY 4.0); stratified split, seed {seed}.

- held-out accuracy: {held_out:.4f} on {num_held_out} scans ({training:.4f} on the training scans)
- parameters: {parameters}
- sha256 of model.safetensors: `{sha256}`
- made by: `python -m diffdistill.evaluation.features --out diffdistill/assets/digits_features`
"""


def write(network: DigitFeatures, out: Path, *, held_out: float, training: float, num_train: int) -> None:
    """Write model.safetensors, config.json and README.md into the folder `out`.

    held_out, training: accuracies on the two parts of the split.  num_train: images in the training part.
    """
    config = {"width": network.width, "dim": network.dim, "split_seed": SPLIT_SEED,
              "num_held_out": NUM_HELD_OUT, "held_out_accuracy": held_out}  # fmt: skip
    card = CARD.format(num_train=num_train, num_held_out=NUM_HELD_OUT, seed=SPLIT_SEED, held_out=held_out,
                       training=training, sha256="{sha256}", parameters="{parameters:,}")  # fmt: skip
    write_asset(network, out, config, card)


def main() -> None:
    """Train on the scans and write the asset."""
    from diffdistill.data import digit_scans

    parser = argparse.ArgumentParser(prog="python -m diffdistill.evaluation.features", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    out: Path = parser.parse_args().out
    images, labels = digit_scans()
    kept, held_out = split_scans(labels)
    network = train(images[kept], labels[kept])
    write(network, out, held_out=accuracy(network, images[held_out], labels[held_out]),
          training=accuracy(network, images[kept], labels[kept]), num_train=len(kept))  # fmt: skip


if __name__ == "__main__":
    main()
