"""The figures of a report in words: which way is better, and under which protocol they were measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffdistill.evaluation.early_stop import HIGHER_IS_BETTER, LOWER_IS_BETTER
from diffdistill.evaluation.svg import number

WORDS = {
    "nfe": "network evaluations per sample",
    "latency_ms": "milliseconds per sample",
    "fd_pixel": "Fréchet distance on pixels",
    "fd": "Fréchet distance on features",
    "kid": "kernel distance on features",
    "label_agreement": "share of samples that a classifier gives their class",
    "precision": "share of samples near real data",
    "recall": "share of real data near samples",
    "density": "how densely real data surround samples",
    "coverage": "share of real data with a sample near",
    "memorised": "share of samples nearer to a real one than real ones are to each other",
    "swd": "sliced Wasserstein distance",
    "w2": "Wasserstein distance",
    "kl": "divergence from the known density, in nats",
    "modes": "modes that are reached",
    "mode_share": "balance between modes",
    "frame_fd": "Fréchet distance of frames, on features",
    "frame_fd_pixel": "Fréchet distance of frames, on pixels",
    "velocity_error": "error of the motion that was asked for",
    "clip_score": "agreement of picture and prompt",
    "diversity": "difference of samples of one prompt",
}
FIRST = ("nfe", "fd_pixel", "fd", "frame_fd", "kl", "swd", "label_agreement")  # what a headline tells, in this order
PROTOCOL = {
    "num_samples": "samples", "reference": "against", "reference_size": "reference samples", "seed": "seed",
    "prdc_space": "space of precision to coverage", "interval": "intervals", "replicates": "bootstrap replicates",
    "schema": "schema",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A figure of teacher and student; "" where it was not measured. better: lower, higher or ""."""

    name: str
    words: str
    teacher: str
    student: str
    teacher_interval: str = ""
    student_interval: str = ""
    better: str = ""


def rows(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> list[Row]:
    """Every figure that either has; those of a headline first."""
    names = [name for name in dict.fromkeys([*student, *teacher]) if not name.endswith("_ci")]
    order = {name: index for index, name in enumerate(FIRST)}
    names.sort(key=lambda name: order.get(name, len(order)))
    return [
        Row(
            name, WORDS.get(name, ""), _text(teacher.get(name)), _text(student.get(name)),
            _interval(teacher.get(f"{name}_ci")), _interval(student.get(f"{name}_ci")), better(name),
        )
        for name in names
    ]  # fmt: skip


def better(name: str) -> str:
    if name in (*LOWER_IS_BETTER, "nfe", "latency_ms"):
        return "lower"
    return "higher" if name in HIGHER_IS_BETTER else ""


def protocol(found: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """What matters most of a protocol in words, then everything else under its own name."""
    main = [(words, str(found[key])) for key, words in PROTOCOL.items() if key in found]
    return main, [(key, str(value)) for key, value in found.items() if key not in PROTOCOL]


def latest(lines: Iterable[Mapping[str, Any]]) -> tuple[int, dict[str, Any]] | None:
    """Step and figures of the last evaluation inside a run."""
    found = None
    for line in lines:
        figures = {k.removeprefix("evaluation/"): v for k, v in line.items() if k.startswith("evaluation/")}
        found = (int(line["step"]), figures) if figures else found
    return found


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f"{number(ends[0])} to {number(ends[1])}"
