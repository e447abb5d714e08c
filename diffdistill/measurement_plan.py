"""What a measurement is of, against and made from: everything is found and checked here, before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig

from diffdistill.config import build
from diffdistill.data import Data
from diffdistill.errors import UserError
from diffdistill.evaluation import harness
from diffdistill.evaluation.clip_score import ClipScore, load_clip
from diffdistill.evaluation.features import Classifier, FeatureNetwork, WholePictures
from diffdistill.evaluation.harness import Evaluation
from diffdistill.evaluation.metrics import COST, METRICS, Space, check_metrics, shortfall, usual_replicates
from diffdistill.evaluation.protocol import tensor_sha256
from diffdistill.evaluation.reference import Known, Reference
from diffdistill.evaluation.rows import Extract, columns
from diffdistill.evaluation.sources import Files, Generated, InMemory, Source
from diffdistill.evaluation.spaces import CleanFid
from diffdistill.evaluation.statistics_file import Statistics, read_statistics, require_fitting
from diffdistill.pictures import where
from diffdistill.pipelines import PipelineSampler, hashes
from diffdistill.saved_run import Choice
from diffdistill.subject import Subject, subject

GENERATED = 10_000  # samples, where the number was left out
Theirs = Files | InMemory | Statistics | None  # what samples are measured against


@dataclass(frozen=True)
class Folders:
    """How folders of pictures are read; captions: whether samples need them."""

    clips: bool
    size: int | None
    corrupt_share: float
    captions: bool

    def read(self, path: str, key: str, channels: Literal[1, 3], limit: int | None = None) -> Files:
        captions = self.captions and key == "samples"
        return Files(path, self.clips, channels, self.size, self.corrupt_share, captions, limit, key)


@dataclass(frozen=True)
class Measured:
    """What is measured. source: its samples.  of: the generator behind them, None for a folder.  data: that the
    samples are told to imitate."""

    name: str
    source: Source
    of: Subject | None
    data: Data | None
    device: torch.device

    @classmethod
    def found(
        cls, run: str | None, pipeline: str | None, samples: str | None, data: DictConfig | None, steps: int | None,
        checkpoint: Choice, num_samples: int | None, seed: int, batch_size: int, folders: Folders,
    ) -> Measured:  # fmt: skip
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if samples is not None:
            if run is not None or pipeline is not None:
                given = f"run={run} pipeline={pipeline} samples={samples}"
                raise UserError("run, pipeline, samples", "must be given one alone", given, "Give one.")
            for key, value in (("steps", steps), ("checkpoint", None if checkpoint == "last" else checkpoint)):
                if value is not None:
                    raise UserError(key, "is for a generator", f"samples={samples}", "Leave it out.")
            told: Data | None = None if data is None else build(data)
            channels: Literal[1, 3] = 1 if told is not None and told.shape[0] == 1 else 3
            return cls(samples, folders.read(samples, "samples", channels, num_samples), None, told, device)
        of = subject(run, pipeline, data, steps, checkpoint)
        device, dtype = where(of.networks)
        name = run or pipeline or ""
        num = num_samples or GENERATED
        weights = partial(_weights, of, pipeline)
        source = Generated(name, of.sampler, of.data, num, seed, batch_size, device, dtype, weights)
        return cls(name, source, of, of.data, device)

    def teacher(self) -> Source:
        """The samples of a run's teacher from the same seeds."""
        assert self.of is not None and self.of.recipe is not None
        assert isinstance(self.source, Generated)
        return replace(self.source, name="teacher", sampler=self.of.recipe.sampler)

    @cached_property
    def own_features(self) -> Classifier | None:
        return None if self.data is None else self.data.features()

    @cached_property
    def own_reference(self) -> Reference | None:
        """Of the data; None for prompts and latents, which say so by refusing."""
        if self.data is None:
            return None
        try:
            return self.data.reference()
        except UserError:
            return None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample; where the data tells it nothing is drawn for it."""
        known = self.own_reference if isinstance(self.source, Generated) else None
        return self.source.shape if known is None else known.shape


def _weights(of: Subject, pipeline: str | None) -> Mapping[str, Any]:
    """What tells one generator from another."""
    if of.networks is None:
        listed = hashes(Path(str(pipeline))) if Path(str(pipeline)).is_dir() else {"hub": str(pipeline)}
        assert isinstance(of.sampler, PipelineSampler)
        return {"pipeline": listed, "call": of.sampler.call, "data": of.data.name}
    roles = [role for role in sorted(of.networks.owned) if of.networks.roles[role].build == "denoiser"]
    weights = [tensor_sha256(*(value for _, value in sorted(of.networks.state(role).items()))) for role in roles]
    return {"weights": weights, "nfe": of.sampler.nfe, "data": of.data.name}


def reference_of(path: str | None, mine: Measured, folders: Folders) -> Theirs:
    """What the samples are measured against, of their own shape; None: nothing."""
    if path is None:
        own = mine.own_reference
        return None if own is None else InMemory(own)
    if Path(path).expanduser().is_file():
        return read_statistics(path, mine.shape)
    channels: Literal[1, 3] = 1 if mine.shape[0] == 1 else 3
    found = folders.read(path, "reference", channels)
    if found.shape != mine.shape:
        fix = "Nothing is resized unasked: set size=N for the central squares of folders, or sample at that size."
        raise UserError("reference", f"must hold samples of the shape {mine.shape}", found.shape, fix)
    return found


@dataclass(frozen=True)
class _Facts:
    """What is known of both sides: see `evaluation.reference.Known`."""

    name: str
    shape: tuple[int, ...]
    size: int
    labelled: bool
    law: Any
    motion: Any


@dataclass(frozen=True)
class Plan:
    """Which figures, made of what. left_out: with [all], the others and why."""

    names: tuple[str, ...]
    left_out: Mapping[str, str]
    facts: Known
    features: FeatureNetwork | None
    classifier: Classifier | None
    clip: ClipScore | None
    prdc_space: Space
    seed: int
    replicates: int
    teacher: bool

    @classmethod
    def made(
        cls, asked: tuple[str, ...] | None, mine: Measured, theirs: Theirs,
        features: FeatureNetwork | None, prdc_space: Space | None, seed: int, replicates: int | None,
        clip: str | None, teacher: bool, saving: bool,
    ) -> Plan:  # fmt: skip
        """Refuses what cannot be measured, before any work."""
        own = mine.own_reference
        facts = _Facts(
            "the samples" if theirs is None else theirs.name, mine.shape, 0 if theirs is None else theirs.size,
            mine.source.labelled and mine.own_features is not None, None if own is None else own.law,
            None if own is None else own.motion,
        )  # fmt: skip
        if prdc_space is None:
            prdc_space = "features" if isinstance(features, WholePictures) else "values"
        if teacher and (mine.of is None or mine.of.recipe is None):
            raise UserError("teacher", "is for a run", mine.name, "Leave it out.")
        if saving and theirs is None:
            raise UserError(
                "statistics", "needs a reference to be written", None, "Add reference=FOLDER, or data=NAME."
            )
        judge = _Judge(mine, theirs, facts, features, prdc_space, clip is not None)
        names, left_out = judge.chosen(asked)
        for name in names:
            judge.require(name)
        score = None
        if "clip_score" in names:
            score = load_clip(str(clip), mine.device)
        elif clip is not None:
            raise UserError("clip", "is for clip_score", clip, "Add clip_score to metrics, or leave it out.")
        if replicates is None:
            replicates = usual_replicates(names, facts, features)
        plan = cls(
            names, left_out, facts, features, mine.own_features, score, prdc_space, seed, replicates, teacher
        )  # fmt: skip
        if saving and not plan.columns("reference"):
            fix = "Add the metrics that it shall serve, for example fd."
            raise UserError("statistics", "needs a metric that looks at the reference", list(names), fix)
        if isinstance(theirs, Statistics):
            require_fitting(theirs, plan.columns("reference"), features, mine.shape)
        return plan

    def columns(self, side: Literal["samples", "reference"]) -> frozenset[str]:
        return columns(self.names, side, self.prdc_space)

    def extract(self, side: Literal["samples", "reference"]) -> Extract:
        return Extract(self.columns(side), self.features, self.classifier, self.facts.motion, self.clip)

    def card(self, side: Literal["samples", "reference"], source: Source) -> dict[str, Any]:
        """All that decides the rows of one side."""
        return {
            "source": dict(source.identity), "seed": self.seed, "columns": sorted(self.columns(side)),
            "features": None if self.features is None else self.features.sha256,
            "resize": "none" if self.features is None else self.features.resize,
            "clip": None if self.clip is None else self.clip.sha256,
        }  # fmt: skip


@dataclass(frozen=True)
class _Judge:
    """Says of each metric whether it can be measured."""

    mine: Measured
    theirs: Theirs
    facts: Known
    features: FeatureNetwork | None
    prdc_space: Space
    clip: bool

    def chosen(self, asked: tuple[str, ...] | None) -> tuple[tuple[str, ...], dict[str, str]]:
        """The metrics to measure, and with [all] why the others are not."""
        if asked == ("all",):
            refused = {name: text for name in METRICS if (text := self._refusal(name)) is not None}
            return tuple(name for name in METRICS if name not in refused), refused
        if asked is not None:
            return asked, {}
        if self.mine.of is not None and isinstance(self.theirs, InMemory) and self.features is self.mine.own_features:
            judge = Evaluation(0, self.mine.source.size, 1, None, 0, 1, 1, "none")
            return judge.names(self.mine.of.data), {}
        cost = ("latency", "nfe") if self.mine.of is not None else ()
        on_features: tuple[str, ...] = ()
        if len(self.facts.shape) == 4:
            on_features = ("frame_fd",) if self.features is not None else ("frame_fd_pixel",)
            return (*on_features, "motion", *cost), {}
        if self.features is not None:
            fid = isinstance(self.features, CleanFid)
            on_features = ("fid" if fid else "fd", "kid", "prdc") if self.theirs is not None else ("diversity",)
        elif self.theirs is not None:
            on_features = ("swd", "prdc")
        return (*on_features, *(["clip_score"] if self.clip else []), *cost), {}

    def require(self, name: str) -> None:
        """Raises UserError if `name` cannot be measured."""
        mine, theirs = self.mine, self.theirs
        if name in COST and mine.of is None:
            raise UserError("metrics", f"must fit a folder: {name} is of a generator", name, "Leave it out.")
        check_metrics(
            [name], self.facts, self.features, mine.source.size,
            classifier=mine.own_features, prompts=mine.source.prompted, key="metrics",
        )  # fmt: skip
        if name == "clip_score" and not self.clip:
            fix = "Add clip=transformers:openai/clip-vit-base-patch16, or leave clip_score out."
            raise UserError("clip", "must name a CLIP model for clip_score", None, fix)
        if self.prdc_space == "features" and self.features is None and name == "prdc":
            fix = "Set it to values, or name a network in features."
            raise UserError("prdc_space", "must be values without a feature network", self.prdc_space, fix)
        needed = columns([name], "reference", self.prdc_space)
        if needed and theirs is None and name not in ("diversity", "motion"):
            raise UserError(
                "reference", f"must be given for {name}", None, "Add reference=FOLDER or FILE, or data=NAME."
            )
        if isinstance(theirs, InMemory):
            lack = harness.shortfall(name, theirs.reference)
        else:
            rows_alone = isinstance(theirs, Statistics) and theirs.size == 0  # its size is not told
            lack = None if theirs is None or not needed or rows_alone else shortfall(name, self.facts)
        if lack is not None:
            fix = "Leave it out, or measure against more data."
            raise UserError("metrics", f"must fit the reference: {name} needs {lack}", name, fix)

    def _refusal(self, name: str) -> str | None:
        try:
            self.require(name)
        except UserError as error:
            told = error.constraint.removeprefix("must fit the data set: ").removeprefix("must fit the reference: ")
            return told.removeprefix(f"{name} ")
        return None
