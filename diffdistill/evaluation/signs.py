"""The signs of a run that is not well, one function each, and the thresholds they hold figures against."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping

from diffdistill.evaluation.course import Course, Verdict
from diffdistill.evaluation.dissection import STUDENT

# Each lies between what healthy and sick runs showed; docs/health.md has the figures.
LAG = 0.8  # of a critic's error, explained by the plainest correction; critics begin with more
SLOW = 0.02  # of the student's relative step, that a critic takes
BALANCE = 10.0  # times the first term's gradient, of the others together
UPDATE = 0.05  # of a role's weights, moved in one step
APART = 0.3  # of the student's weights, between them and their average
STILL = 1e-9  # less than that is no movement
MEAN = 0.5  # standard deviations of the right law
STD = 2.0  # times, or one part of
SATURATED = 0.5  # of values beyond the range of the right law; noise takes half of those that lie at its ends there
SPREAD = 0.15  # of that under one condition
MEMORISED = 0.9  # of samples; fresh data are at .5
AWAY = 1.0  # typical distances that samples have moved away from the right law
HEEDED = 0.5  # slope; 1 is exact
OUTSIDE = 0.6  # of the times at which a critic is asked, outside those it is trained at
FACTOR = 10.0  # between the noise level that a student is asked at and the nearest it is trained at
TELLING = 0.1  # of the teacher's calls, at noise levels that say something of the data
FIRST = 0.5  # of an average that would still be the weights it began from at the end
STALL = 20.0  # times the usual seconds between two logged steps
STALL_LEAST = 120.0  # seconds

Slope = tuple[float, float]  # and its doubt, two standard errors


def _told(
    name: str, course: Course, figure: float | None, threshold: float, bad: bool, well: str, ill: str, fix: str
) -> Verdict:
    if figure is None:
        return Verdict(name, "unknown", "not measured here, or too seldom so far")
    if not bad:
        return Verdict(name, "well", well, figure, threshold)
    return Verdict(name, "alarm", ill, figure, threshold, fix, course.step)


def _worst(found: Mapping[str, float | None]) -> tuple[str, float | None]:
    """The role with the largest figure."""
    known = {role: value for role, value in found.items() if value is not None}
    role = max(known, key=lambda r: known[r], default="")
    return role, known.get(role)


def _settled(
    name: str, course: Course, key: str, threshold: float, well: str, ill: str, fix: str, below: bool = False
) -> Verdict:
    """Of a figure of the samples that may be off at first. below: whether small is bad."""
    value = course.settled(f"health/sample/{key}", below=below)
    bad = value is not None and (value < threshold if below else value > threshold)
    return _told(name, course, value, threshold, bad, well, ill, fix)


def finite(course: Course) -> Verdict:
    failed = next((line for line in course.lines if "failed" in line), None)
    if failed is not None:
        fix = "resume from an older checkpoint with a lower trainer.optimizer lr, or a smaller trainer.clip."
        return Verdict("finite", "alarm", f"the run ended: {failed['failed']}", None, None, fix, failed["step"])
    broken = course.series("health/sample/nonfinite")
    value = broken[-1][1] if broken else None
    return _told(
        "finite", course, value, 0, value not in (None, 0.0),
        "no nan or inf", "samples with nan or inf are drawn", "lower the lr of the student.",
    )  # fmt: skip


def step_size(course: Course) -> Verdict:
    found = {role: max(v for _, v in course.series(f"health/update/{role}")) for role in course.keys("health/update/")}
    role, value = _worst(found)
    far = max((v for _, v in course.series(f"health/average/{STUDENT}")), default=0.0)
    if far > APART and (value is None or value <= UPDATE):
        return _told(
            "step size", course, far, APART, True, "",
            "the student's weights leave their average far behind: its learning rate is far too high",
            f"divide trainer.optimizer's lr for {STUDENT} by 10, then by 10 again.",
        )  # fmt: skip
    return _told(
        "step size", course, value, UPDATE, value is not None and value > UPDATE,
        "steps are small beside the weights",
        f"one step moves the weights of {role} by {0 if value is None else value:.0%}: its rate is far too high",
        f"divide trainer.optimizer's lr for {role} by 10, then by 10 again.",
    )  # fmt: skip


def movement(course: Course) -> Verdict:
    moved: dict[str, float | None] = {}
    for role in course.keys("health/update/"):
        last = [value for _, value in course.series(f"health/update/{role}")][-2:]
        moved[role] = max(last) if len(last) == 2 else None
    still = [role for role, value in moved.items() if value is not None and value <= STILL]
    known = [value for value in moved.values() if value is not None]
    return _told(
        "movement", course, min(known, default=None), STILL, bool(still),
        "every role that is trained moves",
        f"{', '.join(still)} {'is' if len(still) == 1 else 'are'} trained and does not move",
        f"look at the lr of {', '.join(still)}, and whether its loss has a gradient; a critic equal to the teacher "
        "gives the student none.",
    )  # fmt: skip


def critic_lag(course: Course) -> Verdict:
    roles = course.keys("health/lag/")
    student = course.recent(f"health/update/{STUDENT}", 2) or 0.0
    moved = {role: course.recent(f"health/update/{role}", 2) for role in roles}
    frozen = [role for role, size in moved.items() if size is not None and size <= max(STILL, SLOW * student)]
    fix = "raise the lr of {}, or let it step more often than the student (distiller.student_every)."
    if frozen:
        ratio = (moved[frozen[0]] or 0.0) / student if student else 0.0
        return _told(
            "critic lag", course, ratio, SLOW, True, "",
            f"{frozen[0]} hardly moves beside the student, whose samples it has to know", fix.format(frozen[0]),
        )  # fmt: skip
    role, value = _worst({role: course.settled(f"health/lag/{role}") for role in roles})
    return _told(
        "critic lag", course, value, LAG, value is not None and value > LAG,
        "the critic knows the student's samples",
        f"{role} does not know the student's samples: a shift and a scale would mend much of its error",
        fix.format(role),
    )  # fmt: skip


def term_balance(course: Course) -> Verdict:
    found: dict[str, float | None] = {}
    names: dict[str, str] = {}
    for role in dict.fromkeys(key.partition("/")[0] for key in course.keys("health/term/")):
        terms = course.keys(f"health/term/{role}/")
        norms = [course.recent(f"health/term/{role}/{term}") for term in terms]
        first, others = norms[0], [(norm, term) for norm, term in zip(norms[1:], terms[1:], strict=True) if norm]
        if first and others:
            largest, names[role] = max(others)
            found[role] = largest / first
    role, value = _worst(found)
    return _told(
        "term balance", course, value, BALANCE, value is not None and value > BALANCE,
        "the loss's own term leads",
        f"the term {names.get(role)} drowns the others in the gradient of {role}",
        f"divide the weight of {names.get(role)} by {0 if value is None else value:.0f}.",
    )  # fmt: skip


def mean(course: Course) -> Verdict:
    return _settled(
        "mean", course, "mean", MEAN,
        "samples lie where they should", "samples lie elsewhere than they should, on average over each condition",
        "look at the picture in samples/; lower the student's lr, and check scale and offset of the data.",
    )  # fmt: skip


def std(course: Course) -> Verdict:
    off = course.settled("health/sample/std", lambda value: math.exp(abs(math.log(max(value, 1e-12)))))
    much = "too much" if (course.recent("health/sample/std") or 0.0) > 1 else "too little"
    return _told(
        "std", course, off, STD, off is not None and off > STD,
        "samples vary as much as they should", f"samples vary {much}",
        "lower the student's lr; check sigma_data and guidance.scale.",
    )  # fmt: skip


def saturation(course: Course) -> Verdict:
    return _settled(
        "saturation", course, "saturated", SATURATED,
        "values stay within the range of the data", "values leave the range of the data",
        "lower guidance.scale if it is above 1, else the student's lr.",
    )  # fmt: skip


def diversity(course: Course) -> Verdict:
    return _settled(
        "diversity", course, "spread", SPREAD,
        "samples of one condition differ as they should", "samples of one condition are nearly alike: a collapse",
        "raise the critic's lr, or the steps it gets per student step; lower the weight of a GAN.",
        below=True,
    )  # fmt: skip


def memorisation(course: Course) -> Verdict:
    return _settled(
        "memorisation", course, "memorised", MEMORISED,
        "samples are no copies of the data", "samples are copies of the data",
        "stop earlier (evaluation.stop), or train on more data or pairs.",
    )  # fmt: skip


def direction(course: Course) -> Verdict:
    found = [value for _, value in course.series("health/sample/distance")]
    away = found[-1] - min(found) if len(found) > 2 else None
    rising = len(found) > 2 and found[-3] < found[-2] < found[-1]
    return _told(
        "direction", course, away, AWAY, rising and away is not None and away > AWAY,
        "samples do not move away from where they should be",
        "samples move away from where they should be, further at every look",
        "check the sign of the student's loss, then lower its lr.",
    )  # fmt: skip


def labels(course: Course) -> Verdict:
    return _slope(
        course, "labels", _last(course, "data"), HEEDED,
        "the data's conditions are theirs in the eyes of the teacher",
        "the data's conditions belong to other samples in the eyes of the teacher",
        "check the order of labels, and what numbers or embeddings the teacher was trained with.",
    )  # fmt: skip


def guidance(course: Course) -> Verdict:
    return _slope(
        course, "guidance", _last(course, "teacher"), _heeded_by_data(course),
        "the teacher's sampler draws what it is told to",
        "the teacher's sampler does not draw what it is told to",
        "set guidance.scale to 1, it is w of D_null + w (D_c - D_null); then check sampler.grid and sampler.num_steps.",
    )  # fmt: skip


def condition(course: Course) -> Verdict:
    looks = sorted(course.late(_looks(course, STUDENT)), key=sum)
    return _slope(
        course, "condition", looks[1] if len(looks) > 1 else None, _heeded_by_data(course),
        "the student draws what it is told to",
        "the student does not draw what it is told to",
        "if labels are well, lower the student's lr; check null_share and guidance.scale.",
    )  # fmt: skip


def _heeded_by_data(course: Course) -> float:
    """Half of what a teacher that knows its law only roughly gives the data themselves."""
    data = course.series("health/condition/data")
    return HEEDED * min(1.0, max(HEEDED, data[-1][1])) if data else HEEDED


def _looks(course: Course, of: str) -> list[tuple[int, Slope]]:
    doubts = dict(course.series(f"health/condition/{of}_doubt"))
    found = course.series(f"health/condition/{of}")
    return [(step, (slope, doubts[step])) for step, slope in found if step in doubts]


def _last(course: Course, of: str) -> Slope | None:
    looks = _looks(course, of)
    return looks[-1][1] if looks else None


def _slope(course: Course, name: str, found: Slope | None, least: float, well: str, ill: str, fix: str) -> Verdict:
    slope = None if found is None else found[0]
    return _told(name, course, slope, least, found is not None and sum(found) < least, well, ill, fix)


def time_range(course: Course) -> Verdict:
    telling = course.recent("health/times/telling")
    if telling is not None and telling < TELLING:
        return _told(
            "time range", course, telling, TELLING, True, "",
            "the teacher is hardly ever asked at noise levels that say something of the data",
            "mend the law of times (student_law, law or pairs): noise from a tenth to eight times the data's std.",
        )  # fmt: skip
    gap = course.recent(f"health/times/{STUDENT}_beyond")
    if gap is not None and gap > math.log(FACTOR):
        return _told(
            "time range", course, math.exp(gap), FACTOR, True, "",
            "the student's sampler asks it at noise levels far from those it is trained at",
            "let the law of training times reach distiller.times.",
        )  # fmt: skip
    others = [key.removesuffix("_outside") for key in course.keys("health/times/") if key.endswith("_outside")]
    role, value = _worst({r: course.recent(f"health/times/{r}_outside") for r in others if r != STUDENT})
    known = value if value is not None else (gap if gap is not None else telling)
    return _told(
        "time range", course, known, OUTSIDE, value is not None and value > OUTSIDE,
        "networks are trained where they are asked",
        f"{role} is asked at times it is not trained at",
        "widen critic_law until it covers student_law.",
    )  # fmt: skip


def average(course: Course) -> Verdict:
    found: dict[str, float | None] = {}
    for key in course.keys("health/average/"):
        shares = course.series(f"health/average/{key}")[-2:]
        if not key.endswith("_first") or len(shares) < 2:
            continue
        (before, old), (step, new) = shares
        if new < old:  # else it was begun again in between, as at the stages of a method that has some
            found[key.removesuffix("_first")] = new * (new / old) ** ((course.steps - step) / (step - before))
    role, value = _worst(found)
    return _told(
        "average", course, value, FIRST, value is not None and value > FIRST,
        "the averaged weights follow", f"at the end the average of {role} would still be mostly what it began with",
        f"lower trainer.ema.{role}.decay, or train longer.",
    )  # fmt: skip


def stall(course: Course) -> Verdict:
    if course.idle is None:
        return Verdict("stall", "unknown", "not measured here")
    steps = sorted({line["step"] for line in course.lines})
    seconds = [value for _, value in course.series("time/step_seconds")]
    between = statistics.median([b - a for a, b in zip([0, *steps], steps, strict=False)]) if steps else 0
    usual = statistics.median(seconds) * between if seconds else 0.0
    limit = max(STALL_LEAST, STALL * usual)
    return _told(
        "stall", course, course.idle, round(limit), course.idle > limit,
        "it goes on", f"nothing was written for {course.idle:.0f} s",
        "look whether the process computes; stop it by SIGTERM and go on with resume=true.",
    )  # fmt: skip


SIGNS: tuple[Callable[[Course], Verdict], ...] = (
    finite, movement, step_size, critic_lag, term_balance, direction, mean, std, saturation, diversity, memorisation,
    labels, guidance, condition, time_range, average, stall,
)  # fmt: skip
