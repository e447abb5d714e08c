"""Steps with together=true against those without: `python tests/together_figures.py NETWORKS DISTILLER BATCH ROUNDS`,
then overrides of train, as `guidance.scale=2`.

Both are held in one process on one thread and take turns, by CPU clock; the last line compares the steps without with
themselves, which is what the machine alone does.
"""

from __future__ import annotations

import statistics
import sys

import torch

from diffdistill.bench import Pair, _words
from diffdistill.bench_step import Bench
from diffdistill.launch import accelerator_of


def benched(networks: str, distiller: str, batch: int, words: list[str], together: bool) -> Bench:
    more = ("roles.fake_score=lora", *words, f"together={together}".lower())
    pair = Pair(distiller, networks, tuple(_words(distiller, networks, batch, more)))
    return Bench(pair.settings(), accelerator_of("fp32", cpu=True), compiled=False)


def main() -> None:
    networks, distiller, batch, rounds, *words = sys.argv[1:]
    torch.set_num_threads(1)
    plain, joined = (benched(networks, distiller, int(batch), words, together) for together in (False, True))
    times: dict[str, list[float]] = {"separate": [], "together": [], "again": []}
    for _ in range(int(rounds)):
        for name, bench in (("separate", plain), ("together", joined), ("again", plain)):
            times[name].append(bench.cycle() / bench.length)
    for bench in (plain, joined):
        bench.cycle(measured=True)
    print(
        f"{distiller} on {networks}, batch {batch}, {' '.join(words)}: {rounds} rounds, cycles of {plain.length} steps"
    )
    for name, bench in (("separate", plain), ("together", joined)):
        calls = len(bench.passes) / bench.length
        median = statistics.median(times[name])
        print(f"{name}: {median:.1f} ms a step, {calls:g} calls a step, peak live MiB {bench.peak / 2**20:.1f}")
    for name in ("together", "again"):
        ratios = sorted(one / other for one, other in zip(times[name], times["separate"], strict=True))
        quarter = len(ratios) // 4
        print(
            f"{name} / separate: median {statistics.median(ratios):.3f}, half of the rounds within "
            f"{ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f}"
        )


if __name__ == "__main__":
    main()
