"""The best of all other readings, screened on a few samples before it is measured on all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from diffdistill.denoiser import Network
from diffdistill.probe_residuals import Asked, Errors, summed
from diffdistill.probe_verdict import FITS, Finding
from diffdistill.readings import Reading, kinds, other_inputs


def compared(
    asked: Asked, reading: Reading, network: Network, has_data: bool, margin: float
) -> tuple[Finding, Finding | None]:
    """What `reading` leaves, and the best of those that leave decisively less; None if there is none."""
    first = kinds(network, reading.inputs)
    own: dict[int, Errors] = {}
    better: list[Finding] = []
    alive: list[Reading] = list(first[1:])
    found: dict[Reading, dict[int, Errors]] = {other: {} for other in first}
    for level in asked.order:
        errors = asked.residuals(first, level)
        own[level] = errors[reading]
        for other in alive:
            found[other][level] = errors[other]
    alive = [other for other in alive if all(survives(found[other][i], own[i]) for i in asked.order)]
    better += [summed(other, found[other]) for other in alive]
    screen = max(2, len(asked.x0) // 16)
    for inputs in other_inputs(network, has_data):
        better += survivors(asked, kinds(network, inputs), own, screen)
    mine = summed(reading, own)
    decisive = [f for f in better if f.fits and f.residual <= (1 - margin) * mine.residual]
    least = min((f.residual for f in decisive), default=0.0)
    return mine, next((f for f in decisive if f.residual <= 1.005 * least), None)  # of equals the plainest comes first


def survivors(asked: Asked, readings: tuple[Reading, ...], own: Mapping[int, Errors], screen: int) -> list[Finding]:
    """Of readings that share their inputs, those no worse than the declared one at any level, and denoisers."""
    found: dict[Reading, dict[int, Errors]] = {reading: {} for reading in readings}
    for level in asked.order:
        if level == asked.order[0] and screen < len(asked.x0):  # a few samples tell most of them
            errors = asked.residuals(found, level, screen)
            mine = replace(own[level], each=own[level].each[:screen])
            found = {r: {} for r in found if survives(errors[r], mine, slack=1.5)}
        if not found:
            return []
        errors = asked.residuals(found, level)
        found = {r: {**levels, level: errors[r]} for r, levels in found.items() if survives(errors[r], own[level])}
    return [summed(reading, levels) for reading, levels in found.items()]


def survives(other: Errors, own: Errors, slack: float = 1.0) -> bool:
    """No worse than the declared reading within the noise of paired samples, and no worse than a straight line."""
    if not other.residual <= slack * FITS:
        return False
    gap = other.each - own.each
    noise = 2 * slack * float(gap.std()) / math.sqrt(len(gap))
    return float(gap.mean()) <= 0.02 * own.residual + (noise if math.isfinite(noise) else math.inf)
