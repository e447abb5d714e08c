"""How fast training goes and what memory it holds, for the lines of metrics.jsonl; nothing waits for a device."""

from __future__ import annotations

from dataclasses import dataclass

from diffdistill.memory import held


@dataclass
class Meter:
    """samples: of one step, over all processes.  step, seconds: steps done and seconds of training at the last look."""

    samples: int
    step: int
    seconds: float

    def figures(self, step: int, seconds: float) -> dict[str, float]:
        """Rates since the last look, in steps and samples per second of training, and bytes of memory."""
        steps, elapsed = step - self.step, seconds - self.seconds
        self.step, self.seconds = step, seconds
        rate = steps / elapsed if elapsed > 0 else 0.0
        rates = {"time/steps_per_second": rate, "time/samples_per_second": rate * self.samples}
        return {**rates, **{f"memory/{name}": float(value) for name, value in held().items()}}
