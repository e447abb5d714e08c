"""Figures of several processes here: `python tests/scale_out_figures.py bytes|scaling|saving` (`make scaling`).

bytes     what a process holds of roles, averages and optimizers, times the processes, over what one process holds
scaling   seconds of a run by two processes against two such runs beside each other, which talk to nobody: the machine's
          own loss is in both
saving    share of the wall clock that checkpoints take, at one every 100 steps
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile

import processes

BASE = ["train", "evaluation=none", "health=null", "probe=null", "trainer.log_every=1000", "patch=training_alone"]
WAN = "networks.config"
# 50 M parameters in 12 blocks, on clips of 100 tokens
TRANSFORMER = [
    *BASE, "data=moving_digits", "networks=moving_digits_scratch", "data.frames=4", "data.size=20",
    "distiller=denoising",
    "distiller.time_law.mean=1.0", "distiller.time_law.std=1.2", f"{WAN}.num_attention_heads=8",
    f"{WAN}.attention_head_dim=64", f"{WAN}.ffn_dim=2048", f"{WAN}.num_layers=12", f"{WAN}.text_dim=32",
    "trainer.batch_size=2",
]  # fmt: skip
CASES = {
    "digits dmd2": [*BASE, "experiment=digits_dmd2", "trainer.batch_size=16"],
    "digits dmd2, adapters": [
        *BASE, "experiment=digits_dmd2", "trainer.batch_size=16", "roles.student=lora", "roles.fake_score=lora",
    ],
    "50 M transformer": TRANSFORMER,
}  # fmt: skip
MESHES = {
    "shard": [],
    "gathered": ["parallel.reshard_after_forward=false"],
    "replicate": ["parallel.mesh=replicate"],
}
STEPS = {"digits dmd2": 200, "50 M transformer": 15}


def in_bytes(size: int) -> None:
    """One step, then what lies where."""
    for name, words in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            line = [*words, "trainer.steps=1", "patch=counted_bytes"]
            alone = _counted(processes.run(1, [[*line, f"run_dir={folder}/one"]]))[0]
            shares = _counted(processes.run(size, [[*line, f"run_dir={folder}/several"]]))
        largest = max(shares)
        print(
            f"{name}: {alone} bytes alone; {shares} on {size}: largest x {size} / total = {largest * size / alone:.4f}"
        )


def _counted(found: list[processes.Ended]) -> list[int]:
    return [int(text) for text in _told(found, "BYTES")]


def _told(found: list[processes.Ended], word: str) -> list[str]:
    """What the processes printed after a word."""
    for one in found:
        if one.status or set(one.statuses) != {0}:
            sys.exit(one.err[-3000:])
    lines = (line for one in found for line in one.out.splitlines())
    return [line.removeprefix(f"{word} ") for line in lines if line.startswith(f"{word} ")]


def scaling(tries: int, names: list[str], mesh: str, extra: list[str]) -> None:
    """Weak scaling of two processes, every try printed. extra: words of all runs."""
    for name in names:
        ratios = []
        for attempt in range(tries):
            with tempfile.TemporaryDirectory() as folder:
                line = [*CASES[name], f"trainer.steps={STEPS[name]}", *MESHES[mesh], *extra]
                joint = processes.start(2, _python([*line, f"run_dir={folder}/joint"]))
                together = statistics.mean(_seconds(processes.ended(joint)))
                single = [processes.start(1, _python([*line, f"run_dir={folder}/{i}"]))[0] for i in range(2)]
                beside = statistics.mean(_seconds(processes.ended(single)))
            ratios.append(beside / together)
            print(
                f"{name}, mesh={mesh}, try {attempt + 1}: {beside:.2f} s beside each other, {together:.2f} s together: "
                f"{ratios[-1]:.3f}"
            )
        print(f"{name}: best {max(ratios):.3f}, median {statistics.median(ratios):.3f} of {tries}")


def _python(line: list[str]) -> list[str]:
    return ["-m", "processes", json.dumps([line])]


def _seconds(found: list[processes.Ended]) -> list[float]:
    return [float(text) for text in _told(found, "WALL")]


def saving(size: int, steps: int) -> None:
    """The 50 M transformer, saved every 100 steps."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"trainer.steps={steps}", "trainer.checkpoint_every=100", "patch=timed_saves", f"run_dir={folder}/run"]
        found = processes.run(size, [[*TRANSFORMER, *words]])
    saves, wall = json.loads(_told(found, "SAVES")[0]), _seconds(found)[0]
    share = sum(saves) / (sum(saves) + wall)
    print(f"{size} processes, {steps} steps in {wall:.1f} s, saves {saves} s: {share:.4f} of both")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=["bytes", "scaling", "saving"])
    parser.add_argument("--size", type=int, default=2, help="processes")
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="of the run that is saved")
    parser.add_argument("--case", choices=list(STEPS), help="one of those that are timed")
    parser.add_argument("--mesh", choices=list(MESHES), default="shard", help="of the runs that are timed")
    parser.add_argument(
        "--batch-size", type=int, help="of a process, of the runs that are timed; the case's own if not given"
    )
    given = parser.parse_args()
    os.environ.setdefault("LIMIT", "3600")
    if given.figure == "bytes":
        in_bytes(given.size)
    elif given.figure == "scaling":
        extra = [f"trainer.batch_size={given.batch_size}"] if given.batch_size else []
        scaling(given.tries, [given.case] if given.case else list(STEPS), given.mesh, extra)
    else:
        saving(given.size, given.steps)


if __name__ == "__main__":
    main()
