"""What the report of a run says, section by section, from what lies in its folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffdistill.evaluation.course import Verdict
from diffdistill.evaluation.health import judge
from diffdistill.evaluation.svg import number
from diffdistill.export_cards import command_of
from diffdistill.methods import docstring
from diffdistill.report_curves import Group, groups
from diffdistill.report_figures import FIRST, Row, latest, protocol, rows
from diffdistill.report_pictures import Frame, Picture, frame_of, picture, strip
from diffdistill.run_course import Condition, condition_of
from diffdistill.run_folder import RunFolder, read_json
from diffdistill.small_samples import Estimates, SameNoise, kept_steps, num_damaged

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Pictures:
    """over_training: by step.  side_by_side: teacher and student.  strips: (title, what each thinks x0 is).  notes: on
    what is missing, or shown otherwise than it is."""

    over_training: Sequence[Picture]
    side_by_side: Sequence[Picture]
    strips: Sequence[tuple[str, Sequence[Picture]]]
    notes: Sequence[str]


@dataclass(frozen=True)
class Page:
    """All that the template shows of a run."""

    title: str
    condition: Condition
    about: str
    method: Mapping[str, str]
    headline: Sequence[Row]
    figures: Sequence[Row]
    figures_note: str
    protocol: tuple[Pairs, Pairs]
    alarms: Sequence[Verdict]
    verdicts: Sequence[Verdict]
    health_note: str
    early_stop: str
    probe: Sequence[str]
    pictures: Pictures
    curves: Sequence[Group]
    load: str
    load_note: str
    call: str
    commands: str
    cost: Pairs
    machines: Sequence[str]
    config: str


def page(folder: RunFolder, drawn: SameNoise | None) -> Page:
    """drawn: teacher and student from the same noise, where there are any."""
    settings = folder.read_config("run")
    condition = condition_of(folder, settings)
    summary = read_json(folder.path / "summary.json", "run") if folder.is_finished else {}
    teacher, student, note = _figures(summary, condition)
    table = rows(teacher, student)
    verdicts = judge(condition.course)
    load, load_note, call = _load(folder.path, summary)
    return Page(
        title=folder.path.resolve().name,
        condition=condition,
        about=_about(settings, drawn, student, teacher, summary.get("protocol", {}).get("reference")),
        method=_method(settings),
        headline=[row for row in table if row.name in FIRST and row.student][:4],
        figures=table,
        figures_note=note,
        protocol=protocol(summary.get("protocol", {})),
        alarms=[verdict for verdict in verdicts if verdict.state == "alarm"],
        verdicts=sorted(verdicts, key=lambda verdict: ("alarm", "well", "unknown").index(verdict.state)),
        health_note=_health_note(settings, condition),
        early_stop=_early_stop(settings, summary, condition),
        probe=_probe(folder, settings),
        pictures=_pictures(folder, drawn),
        curves=groups(condition.course, teacher),
        load=load,
        load_note=load_note,
        call=call,
        commands=_commands(folder, settings),
        cost=_cost(summary, condition),
        machines=_machines(folder),
        config=folder.config_file.read_text(),
    )


def _figures(summary: Mapping[str, Any], condition: Condition) -> tuple[Mapping[str, Any], Mapping[str, Any], str]:
    """Of teacher and student, and a note on where they come from."""
    if summary.get("student"):
        return summary.get("teacher") or {}, summary["student"], ""
    found = latest(condition.course.lines)
    if found is not None:
        step, figures = found
        return {}, figures, f"Of the evaluation after step {step}; the one at the end is missing."
    return {}, {}, "Nothing was measured: the run ended before an evaluation, or evaluation=none."


def _about(
    settings: DictConfig,
    drawn: SameNoise | None,
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    reference: str | None,
) -> str:
    """What was trained from what, and what it saves. reference: name of the data."""
    source = settings["networks"].get("path") or settings["networks"].get("_target_")
    data = reference or str(settings["data"].get("_target_", "")).rpartition(".")[2]
    text = f"Teacher: {source}. Data: {data}."
    own = student.get("nfe", drawn.student.nfe if drawn else None)
    theirs = teacher.get("nfe", drawn.teacher.nfe if drawn else None)
    if own is None:
        return text
    calls = f"{own} network evaluation{'s' if own != 1 else ''} per sample"
    return f"{text} {calls}" + ("." if theirs in (None, own) else f" in place of the teacher's {theirs}.")


def _method(settings: DictConfig) -> dict[str, str]:
    """Name, what it does and its paper."""
    target = str(settings["distiller"].get("_target_", ""))
    text = docstring(target) if target.startswith("diffdistill.") else ""
    paper = re.search(r"^Paper: (.+?arXiv:\d{4}\.\d{4,5})", text, re.MULTILINE | re.DOTALL)
    name, does = target.rpartition(".")[2], " ".join(text.split("\n\n")[0].split())
    return {
        "name": name,
        "does": does.removeprefix(f"{name}: "),
        "paper": " ".join(paper.group(1).split()) if paper else "",
    }


def _health_note(settings: DictConfig, condition: Condition) -> str:
    if condition.course.keys("health/"):
        return ""
    every = OmegaConf.select(settings, "health.every", default=None)
    why = "it was switched off" if every is None else f"a run is first measured after step {every}"
    return f"The vital signs were not measured: {why}."


def _early_stop(settings: DictConfig, summary: Mapping[str, Any], condition: Condition) -> str:
    if (stop := summary.get("early_stop")) is not None:
        return (
            f"Ended early, after step {stop['step']}: {stop['metric']} {stop['why']}. The best was {stop['best']:.4g}, "
            f"of step {stop['best_step']}."
        )
    metric = OmegaConf.select(settings, "evaluation.stop.metric", default=None)
    if metric is not None:
        return f"Watched {metric}; it did not end the run."
    if summary and summary["iterations"] < condition.course.steps:
        return f"Ended by trainer.cpu_seconds after {summary['iterations']} of {condition.course.steps} steps."
    return "Not asked for."


def _probe(folder: RunFolder, settings: DictConfig) -> list[str]:
    for start in folder.starts():
        if (found := start.get("probe")) is not None:
            return [str(line).removeprefix("probe: ") for line in found["lines"]]
    if settings.get("probe") is None:
        return ["the teacher was not asked (probe=null)"]
    return ["nothing is kept of it"]


def _pictures(folder: RunFolder, drawn: SameNoise | None) -> Pictures:
    steps, notes = kept_steps(folder.path), []
    if not steps:
        notes.append("No samples were kept over training.")
    if (damaged := num_damaged(folder.path)) > 0:
        notes.append(f"Of the samples kept over training {damaged} cannot be read.")
    frame = _frame(drawn, [look.samples for look in steps.values()])
    columns = drawn.columns if drawn else 10
    over = [
        picture(look.samples, f"step {step}{'' if look.finite else ', not all finite'}", columns, frame)
        for step, look in steps.items()
    ]
    if drawn is None:
        notes.append("Teacher and student were not drawn from the same noise: there is no checkpoint to draw from.")
        return Pictures(over, [], [], notes)
    if drawn.decoded is False:
        notes.append("Samples are latents and no codec is there: their first channels are shown as colours.")
    sides, strips = [], []
    for name, of in (("teacher", drawn.teacher), ("student", drawn.student)):
        sides.append(picture(of.samples, of.caption(name), columns, frame))
        strips += _strip(name, of, columns, frame, notes)
    return Pictures(over, sides, strips, notes)


def _strip(
    name: str, of: Estimates, columns: int, frame: Frame | None, notes: list[str]
) -> list[tuple[str, Sequence[Picture]]]:
    if of.x0 is None:
        notes.append(f"The sampler of the {name} cannot be looked into.")
        return []
    return [(name, strip(of.x0, of.times, of.samples, columns, frame))]


def _frame(drawn: SameNoise | None, kept: Sequence[Any]) -> Frame | None:
    if drawn is not None and drawn.reference is not None:
        return frame_of(drawn.reference)
    return frame_of(kept[-1]) if kept and kept[-1].ndim == 2 else None


def _load(folder: Path, summary: Mapping[str, Any]) -> tuple[str, str, str]:
    """Code that loads the pipeline, a note, and call.json."""
    pipeline = folder / "pipeline"
    if not pipeline.is_dir():
        why = summary.get("no_pipeline", "it is written when training has ended")
        return "", f"There is no pipeline folder: {why}", ""
    card = pipeline / "README.md"
    code = re.search(r"```python\n(.*?)```", card.read_text() if card.is_file() else "", re.DOTALL)
    call = pipeline / "call.json"
    told = json.dumps(json.loads(call.read_text()).get("call", {}), indent=1) if call.is_file() else ""
    if code is None:
        return "", f"{pipeline} holds the model; its README says how it is called.", told
    return code.group(1).replace('"this folder"', json.dumps(str(pipeline))).strip(), "", told


def _commands(folder: RunFolder, settings: DictConfig) -> str:
    path = folder.path
    lines = [command_of(settings)]
    if not folder.is_finished:
        lines.append(f"diffdistill train run_dir={path} resume=true")
    lines += [
        f"diffdistill doctor run={path}",
        f"diffdistill sample run={path} out=grid.png",
        f"diffdistill evaluate run={path} out=eval.json",
    ]
    return "\n".join(lines)


def _cost(summary: Mapping[str, Any], condition: Condition) -> Pairs:
    found: Pairs = []
    if summary:
        found = [
            ("steps", str(summary["iterations"])),
            ("training, seconds", f"{summary['wall_seconds']:g}"),
            ("of the processor, seconds", f"{summary['cpu_seconds']:g}"),
            ("peak of live tensors", f"{summary['peak_memory_bytes'] / 2**20:.1f} MiB"),
        ]
    if (each := condition.course.recent("time/step_seconds", 99)) is not None:
        found.append(("a step, median seconds", number(each)))
    if (look := condition.course.recent("time/health_seconds", 99)) is not None:
        found.append(("a look at its health, median seconds", number(look)))
    return found


def _machines(folder: RunFolder) -> list[str]:
    """Each start of the run in words, equal ones once."""
    found: dict[str, list[int]] = {}
    for start in folder.starts():
        on = "{processor}, {cores} cores, {machine}, threads: {threads}".format(**start["machine"])
        libraries = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
        found.setdefault(f"{on}; {libraries}", []).append(start["step"])
    return [f"{text} (from step {', '.join(map(str, steps))})" for text, steps in found.items()]
