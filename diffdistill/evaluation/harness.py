"""Draw samples, measure them, and read the teacher's figures from its card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffdistill.data import Data, of_classes, seen
from diffdistill.errors import UserError, require_at_least
from diffdistill.pipelines import PipelineSampler
from diffdistill.rng import Rng
from diffdistill.solvers import Sampler

from . import metrics
from .costs import latency_ms
from .early_stop import EarlyStop
from .metrics import check_metrics, check_name, measure
from .protocol import Protocol, require_same
from .reference import Reference

CARD_SCHEMA = 1
ON_IMAGES = ("fd_pixel", "fd", "label_agreement", "prdc", "memorised", "latency", "nfe")
ON_PIXELS = ("fd_pixel", "prdc", "memorised", "latency", "nfe")  # of images without a feature network
ON_VIDEOS = ("latency", "nfe")  # of unknown motion
ON_MOTION = ("frame_fd", "frame_fd_pixel", "velocity_error", "label_agreement", *ON_VIDEOS)
ON_POINTS = ("swd", "prdc", "latency", "nfe")
ON_MODES = (*ON_POINTS, "modes", "kl", "w2")  # of points whose density is known
# Values per image up to which fd_pixel is measured unasked: there, 100 replicates of 2,000 samples take five minutes of
# one core, beyond it their time grows with the third power and a distance of pixels says little.
FD_PIXEL_VALUES = 1024


@dataclass(frozen=True)
class Evaluation:
    """every: steps between evaluations in a run, 0 is only at the end.  num_samples, seed, batch_size: of the draw.

    metrics: names, None is those that fit the data (see `names`).  replicates: of the bootstrap.  teacher: where its
    figures come from: `card` of the shipped weights (hash and protocol checked), `fresh` measures, `none` leaves them
    out.
    prdc_space: whether prdc works on the values themselves or on features.
    interim_samples: samples of the evaluations before the last (fd_pixel reads higher on fewer).
    factors: at the end of a run also report what fewer steps and sparse attention save (see `factors`).
    stop: when a run ends before its steps are over.
    """

    every: int
    num_samples: int
    interim_samples: int
    metrics: tuple[str, ...] | None
    seed: int
    batch_size: int
    replicates: int
    teacher: Literal["card", "fresh", "none"]
    prdc_space: Literal["values", "features"] = "values"
    factors: bool = False
    stop: EarlyStop | None = None

    def __post_init__(self) -> None:
        require_at_least(
            1,
            num_samples=self.num_samples,
            interim_samples=self.interim_samples,
            batch_size=self.batch_size,
            replicates=self.replicates,
        )
        require_at_least(0, every=self.every, seed=self.seed)
        if self.stop_metric is not None and self.metrics != () and not self.every:
            fix = "Set it to the steps between evaluations."
            raise UserError("every", "must be >= 1 for evaluation.stop to be asked", self.every, fix)
        if self.stop is not None and self.metrics == ():
            self.stop.check(())

    @property
    def stop_metric(self) -> str | None:
        """What early stop looks at, and what the best checkpoint is the best by; None where it is off."""
        return None if self.stop is None else self.stop.metric

    def names(self, data: Data) -> tuple[str, ...]:
        """The metrics to measure on this data: those given, or all that it has what they need for.

        Left out unasked: what needs more reference samples than there are, and fd_pixel above 1,024 values per image.
        """
        if self.metrics is not None:
            return self.metrics
        reference = data.reference()
        if len(data.shape) == 4:
            return ON_VIDEOS if reference.motion is None else ON_MOTION
        if len(data.shape) != 3:
            return ON_POINTS if reference.law is None else ON_MODES
        large = reference.data[0].numel() > FD_PIXEL_VALUES
        names = ON_PIXELS if data.features() is None else ON_IMAGES
        return tuple(
            name for name in names if shortfall(name, reference) is None and not (name == "fd_pixel" and large)
        )

    def check(self, data: Data) -> None:
        """Refuse metrics that do not exist, do not fit the data or need more samples, before any work."""
        names, reference, features = self.names(data), data.reference(), data.features()
        if "peak_memory" in names:
            fix = "Leave it out: a run tells its own peak in summary.json; diffdistill evaluate measures a sampler's."
            raise UserError("evaluation.metrics", "must be figures of samples, nfe or latency", "peak_memory", fix)
        check_metrics(names, reference, features, self.num_samples, classifier=features)
        if self.stop is not None:
            self.stop.check(names)
        if self.every:
            check_metrics(names, reference, features, self.interim_samples, classifier=features)
        for name in names:
            if (lack := shortfall(name, reference)) is not None:
                raise UserError("evaluation.metrics", f"must fit the data set: {name} needs {lack}", name,
                                "Leave it out, or measure against more data.")  # fmt: skip
        if self.prdc_space == "features" and features is None and "prdc" in names:
            constraint = f"must be values for {reference.name}, which has no feature network"
            raise UserError("evaluation.prdc_space", constraint, self.prdc_space, "Set it to values.")


@dataclass(frozen=True)
class NoEvaluation(Evaluation):
    """Nothing is measured, whatever metrics an experiment asks for."""

    def __post_init__(self) -> None:
        for name in self.metrics or ():
            check_name(name, "metrics")
        object.__setattr__(self, "metrics", ())
        super().__post_init__()


def shortfall(name: str, reference: Reference) -> str | None:
    """What the reference lacks to measure `name` against it, in words; None if nothing."""
    lack = metrics.shortfall(name, reference)
    if lack is None and name == "memorised" and not bool((reference.data != reference.data[:1]).any()):
        return f"two different reference images, {reference.name} has one"
    return lack


def draw(
    sampler: Sampler,
    data: Data,
    num_samples: int,
    seed: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    labels: Tensor | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """num_samples samples, [N, *shape] on the CPU, and their labels [N] or None.

    labels: the classes to draw, [N]; None draws them uniformly.  first: number of the first sample. Latents come
    decoded where the data can decode them.

    The draws are keyed by sample index: another batch size gives the same samples.
    """
    samples, drawn = [], []
    for start in range(0, num_samples, batch_size):
        ids = range(first + start, first + min(start + batch_size, num_samples))
        rng = Rng(seed, 0, "evaluation", ids, device)
        cond = data.conditions(rng.fork("conditions"))
        if labels is not None:
            cond = {**cond, **of_classes(data, labels[start : start + len(rng)].to(device))}
        z = rng.fork("prior").normal((len(rng), *data.shape), dtype)
        made = sampler.sample(z, cond, rng.fork("sampler")).float()
        samples.append((made if isinstance(sampler, PipelineSampler) else seen(data, made)).cpu())
        if "label" in cond:
            drawn.append(cond["label"].cpu())
    found = torch.cat(samples)
    if isinstance(sampler, PipelineSampler) and data.provides:  # of prompts alone any size is right
        wanted = tuple(data.reference().data.shape[1:])
        if (shape := tuple(found.shape[1:])) != wanted:
            fix = "Choose the data that the pipeline imitates."
            raise UserError("data", f"must have the pipeline's sample shape {shape}", wanted, fix)
    return found, torch.cat(drawn) if drawn else None


def evaluate(
    sampler: Sampler,
    data: Data,
    evaluation: Evaluation,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Any], Protocol]:
    """All figures of a sampler on the data, in summary.json's names, with their protocol."""
    samples, labels = draw(sampler, data, evaluation.num_samples, evaluation.seed, evaluation.batch_size, device, dtype)
    figures, protocol = judged(samples, labels, sampler.nfe, data, evaluation)
    if "latency" in evaluation.names(data):
        figures["latency_ms"] = latency_ms(sampler, data, device, dtype)
    return figures, protocol


def judged(
    samples: Tensor, labels: Tensor | None, nfe: int, data: Data, evaluation: Evaluation
) -> tuple[dict[str, Any], Protocol]:
    """The figures of samples [N, *shape] that a sampler of `nfe` network evaluations made, without its latency."""
    names = evaluation.names(data)
    figures: dict[str, Any] = {"nfe": nfe} if "nfe" in names else {}
    measured, protocol = measure(
        samples,
        labels,
        data.reference(),
        names,
        data.features(),
        seed=evaluation.seed,
        replicates=evaluation.replicates,
        prdc_space=evaluation.prdc_space,
    )
    return figures | measured, protocol


def interim(evaluation: Evaluation) -> Evaluation:
    """The smaller evaluation inside a run."""
    return replace(evaluation, num_samples=evaluation.interim_samples)


def write_card(path: Path, figures: dict[str, Any], protocol: Protocol, weights_sha256: str, command: str) -> None:
    """The figures a teacher ships with: protocol, hash of the weights they belong to, command that made them."""
    card = {
        "schema": CARD_SCHEMA,
        "weights_sha256": weights_sha256,
        "command": command,
        "figures": figures,
        "protocol": protocol.to_json(),
    }
    path.write_text(json.dumps(card, indent=1) + "\n")


def read_card(path: Path, weights_sha256: str, evaluation: Evaluation, data: Data, nfe: int) -> dict[str, Any]:
    """The figures on a teacher's card, refused unless weights, protocol and network evaluations are this run's.

    nfe: of the run's own teacher sampler; guidance or other steps would make other samples than the card's.
    """
    if not path.is_file():
        raise UserError(
            "evaluation.teacher",
            "card needs a teacher with metrics.json beside it",
            str(path),
            "Set it to fresh or none.",
        )
    card = json.loads(path.read_text())
    if card.get("schema") != CARD_SCHEMA:
        raise UserError("evaluation.teacher", f"needs a card of schema {CARD_SCHEMA}", card.get("schema"), "Use fresh.")
    if card["weights_sha256"] != weights_sha256:
        raise UserError(
            "evaluation.teacher", "card belongs to other weights than these", weights_sha256[:12], "Set it to fresh."
        )
    if card["figures"].get("nfe") != nfe:
        raise UserError(
            "evaluation.teacher",
            f"card was measured with {card['figures'].get('nfe')} network evaluations, without guidance",
            f"a sampler of {nfe}",
            "Set it to fresh.",
        )
    protocol = Protocol.from_json(card["protocol"])
    probe = torch.zeros(2, *data.reference().data.shape[1:])
    _, ours = measure(
        probe, None, data.reference(), (), data.features(),
        seed=evaluation.seed, replicates=evaluation.replicates, prdc_space=evaluation.prdc_space,
    )  # fmt: skip
    require_same(protocol, replace(ours, num_samples=evaluation.num_samples))
    return dict(card["figures"])


def table(rows: Sequence[tuple[str, dict[str, Any]]]) -> Any:
    """A rich table of figures, one column per row given, a line per figure."""
    from rich.table import Table

    out = Table("figure", *(name for name, _ in rows), title=None)
    keys = list(dict.fromkeys(key for _, figures in rows for key in figures if not key.endswith("_ci")))
    for key in keys:
        out.add_row(key, *(_cell(figures, key) for _, figures in rows))
    return out


def _cell(figures: dict[str, Any], key: str) -> str:
    if key not in figures:
        return "-"
    value = figures[key]
    text = str(value) if isinstance(value, int) else f"{value:.4g}"
    interval = figures.get(f"{key}_ci")
    return text if interval is None else f"{text}  [{interval[0]:.4g}, {interval[1]:.4g}]"
