"""What can be known of the Triton kernels without a GPU: every shipped configuration compiled, taken apart and checked.

    python -m diffdistill.kernels.attention.triton_kernels.evidence [readme=kernels/README.md] [golden=FILE]

prints a table per architecture and what is wrong, if anything; readme: writes the tables there too; golden: records
registers, shared memory and opcodes. Compiles for every architecture of the table whatever this machine has; registers
and spills come from cuobjdump, the main loop's instructions from nvdisasm, both part of Triton's wheel.
"""

from __future__ import annotations

import heapq
import json
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffdistill.errors import UserError
from diffdistill.kernels.attention.triton_kernels import configs
from diffdistill.kernels.attention.triton_kernels.backward import dkv_kernel, dq_kernel
from diffdistill.kernels.attention.triton_kernels.configs import Kernel, Loads, Tile
from diffdistill.kernels.attention.triton_kernels.forward import forward_kernel
from diffdistill.kernels.attention.triton_kernels.pooling import scores_kernel
from diffdistill.kernels.attention.triton_kernels.schedule import start_order
from diffdistill.kernels.attention.triton_kernels.tangent import tangent_kernel

END = "<!-- end -->"
GOLDEN = Path(__file__).with_name("golden.json")
PROGRAMS = {"forward": forward_kernel, "dq": dq_kernel, "dkv": dkv_kernel, "tangent": tangent_kernel}
STREAMED = {"forward": "KV", "dq": "KV", "dkv": ("Q", "DO"), "tangent": ("K", "V", "KT", "VT")}
TENSORS = {"Q", "K", "V", "OUT", "DO", "DQ", "DK", "DV_OUT", "QT", "KT", "VT", "OT"}
FLOATS = {"LSE", "LSE2", "DELTA", "BIAS", "LSET"}
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4, "tangent": 5}  # of tiles, in one step of the loop
MMA = {80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
SHARED_LIMIT = {80: 163, 86: 99, 90: 227, 100: 227}  # KiB of one program
SHARED = {80: 164, 86: 100, 90: 228, 100: 228}  # KiB of a multiprocessor
WARPS = {80: 64, 86: 48, 90: 64, 100: 64}  # of a multiprocessor
TENSOR_RATE = {80: 2048, 86: 1024, 90: 4096, 100: 8192}  # bf16 operations of a multiprocessor in a clock
EXP_RATE = 16  # exponentials, likewise
L2_BYTES = 64  # from the second cache, likewise

_OUTSIDE = "some bytes kept in local memory before or after the main loop, none in it"
_FASTEST = "spills, and was the fastest of those timed on an H200 all the same"
_NO_OTHER = "five products of three TF32 terms each: no tile tried is without spills"
# configurations that keep something in local memory, and why they are shipped
ACCEPTED: dict[str, str] = {
    "sm_80 pointers fp32 D=128 tangent 16x16 w4 s1": _NO_OTHER,
    "sm_86 pointers fp32 D=128 tangent 16x16 w4 s1": _NO_OTHER,
    "sm_90 tma bf16 D=64 tangent 128x64 w4 s2": _OUTSIDE,
    "sm_90 tma bf16 D=128 dkv 64x64 w4 s2": _OUTSIDE,
    "sm_90 tma fp32 D=64 forward 128x64 w4 s1": _FASTEST,
    "sm_90 tma fp32 D=64 dq 64x64 w4 s1": _OUTSIDE,
    "sm_90 tma fp32 D=128 dq 64x64 w4 s1": _FASTEST,
    "sm_90 tma fp32 D=128 dkv 32x64 w4 s2": _FASTEST,
    "sm_90 tma fp32 D=128 tangent 64x32 w4 s2": _FASTEST,
    "sm_90 pointers fp32 D=64 forward 64x64 w4 s2": _OUTSIDE,
    "sm_90 pointers fp32 D=128 forward 64x32 w8 s1": _OUTSIDE,
    "sm_90 pointers fp32 D=128 dkv 32x16 w4 s1": _OUTSIDE,
    "sm_90 pointers fp32 D=128 tangent 64x32 w8 s1": _OUTSIDE,
}


@dataclass(frozen=True)
class Config:
    """One compiled configuration. features: "" or "masked" (ragged ends, key bias and, with pointers, valid counts)."""

    arch: int
    loads: Loads
    element: int
    width: int
    kernel: Kernel
    tile: Tile
    features: str = ""

    @property
    def name(self) -> str:
        t = self.tile
        kind = {2: "bf16", 4: "fp32"}[self.element]
        tail = f" {self.features}" if self.features else ""
        return (
            f"sm_{self.arch} {self.loads} {kind} D={self.width} {self.kernel} {t.m}x{t.n} w{t.warps} s{t.stages}{tail}"
        )


@dataclass(frozen=True)
class Found:
    """What the compiled code shows. shared: bytes.  programs: that fit a multiprocessor at once.  loop: instructions of
    the main loop by opcode.  local: LDL and STL in it.  bound, serial: share of the tensor cores' peak if everything
    overlaps, and if products and exponentials do not."""

    registers: int
    stack: int
    shared: int
    programs: int
    loop: dict[str, int]
    bound: float
    serial: float

    @property
    def local(self) -> int:
        return sum(n for op, n in self.loop.items() if op.split(".")[0] in ("LDL", "STL"))

    def count(self, *prefixes: str) -> int:
        """Instructions of the loop whose opcode starts with one of these."""
        return sum(n for op, n in self.loop.items() if op.startswith(prefixes))


def shipped(arches: Iterable[int] = configs.ARCHITECTURES, features: Iterable[str] = ("",)) -> Iterator[Config]:
    """Every configuration of the table."""
    for arch in arches:
        for (loads, element, width), kernels in configs.TABLE[arch].items():
            for kernel, tiles in kernels.items():
                for tile in tiles:
                    for feature in features:
                        yield Config(arch, loads, element, width, kernel, tile, feature)


def inspect(config: Config) -> Found:
    """Compile and take apart."""
    compiled = _compile(config)
    numbers = _usage(compiled.asm["cubin"])
    assembly = _run("nvdisasm", compiled.asm["cubin"])
    shared = compiled.metadata.shared
    bound, serial = roofline(config)
    return Found(
        registers=numbers["REG"],
        stack=numbers["STACK"] + numbers["LOCAL"],
        shared=shared,
        programs=occupancy(config, numbers["REG"], shared),
        loop=dict(sorted(main_loop(assembly, mma(config)).items())),
        bound=bound,
        serial=serial,
    )


def problems(config: Config, found: Found) -> list[str]:
    """What is wrong with a configuration, in words; empty if nothing is."""
    said = []
    reason = ACCEPTED.get(config.name)
    if found.stack and reason is None:
        said.append(f"{found.stack} bytes of local memory")
    if found.local and reason in (None, _OUTSIDE):
        said.append(f"{found.local} spills in the main loop")
    if not found.count(*mma(config)):
        said.append(f"no {' or '.join(mma(config))} in the main loop")
    copies = ("UTMALDG",) if config.loads == "tma" else ("LDGSTS", "UTMALDG")
    if (config.tile.stages > 1 or config.loads == "tma") and not found.count(*copies):
        said.append("no asynchronous copies in the main loop")
    if config.tile.stages > 1 and found.count("LDG.E.128", "LDG.E.LTC128B.128"):
        said.append("tiles are loaded synchronously")
    if found.shared > SHARED_LIMIT[config.arch] * 1024:
        said.append(f"{found.shared} bytes of shared memory")
    if found.programs < 1:
        said.append("no program fits a multiprocessor")
    return said


# -- models ---------------------------------------------------------------------------------------------------


def occupancy(config: Config, registers: int, shared: int) -> int:
    """Programs that fit a multiprocessor at once, by registers, shared memory and warps."""
    per_program = 32 * config.tile.warps * (-(-registers // 8) * 8)
    return min(
        65536 // per_program,
        SHARED[config.arch] * 1024 // (shared + 1024),
        WARPS[config.arch] // config.tile.warps,
    )


def roofline(config: Config) -> tuple[float, float]:
    """Share of the tensor cores' peak rate that a multiprocessor can reach: if products, exponentials and loads overlap
    entirely, and if products wait for exponentials. float32 counts three products in TF32, at half of bf16's rate."""
    slow = 6 if config.element == 4 else 1
    products = 2 * PRODUCTS[config.kernel] * config.width * slow / TENSOR_RATE[config.arch]
    exponentials = 1 / EXP_RATE
    streamed = len(STREAMED[config.kernel]) * config.width * config.element
    loads = streamed / (config.tile.n if config.kernel == "dkv" else config.tile.m) / L2_BYTES
    useful = products / slow
    return useful / max(products, exponentials, loads), useful / max(products + exponentials, loads)


def makespan(lengths: list[int], slots: int) -> float:
    """Time until the last of `slots` programs at once is done, over the time of a perfect balance.

    lengths: key blocks of each row, in the order of launch.
    """
    free = [0] * slots
    for length in lengths:
        heapq.heapreplace(free, free[0] + length)
    return max(free) / (sum(lengths) / slots)


def balance(heads: int = 12, rows: int = 256, slots: int = 264) -> tuple[float, float, float]:
    """`makespan` of an adaptive mask like BLADE's on Wan: rows of 5 to 17% of the keys, the last two (text) of all.

    Launched as they lie, as the kernels do (schedule.start_order), and longest first over all. slots: two programs on
    each multiprocessor of an H100.
    """
    draw = random.Random(0)
    lists = [[draw.randint(rows // 20, rows // 6) for _ in range(rows - 2)] + [rows] * 2 for _ in range(heads)]
    flat = [length for row in lists for length in row]
    ours = [flat[place] for place in start_order(torch.tensor([lists])).tolist()]
    return makespan(flat, slots), makespan(ours, slots), makespan(sorted(flat, reverse=True), slots)


# -- compiling ------------------------------------------------------------------------------------------------


def _compile(config: Config) -> Any:
    program, tile = PROGRAMS[config.kernel], config.tile
    masked, element = config.features == "masked", {2: "bf16", 4: "fp32"}[config.element]
    values = {
        "BLOCK_Q": max(64, tile.m), "BLOCK_K": max(64, tile.n), "TILE_M": tile.m, "TILE_N": tile.n,
        "D": config.width, "DV": config.width, "PAD_D": config.width, "PAD_DV": config.width,
        "HAS_VALID": masked and config.loads == "pointers", "HAS_BIAS": masked, "RAGGED": masked,
        "HAS_QT": True, "HAS_KT": True, "HAS_VT": True, "PRECISION": "tf32x3" if config.element == 4 else "tf32",
        "UPCAST": False, "TMA": config.loads == "tma",
    }  # fmt: skip
    rows = tile.m if config.kernel == "dkv" else tile.n
    tensors = STREAMED[config.kernel] if config.loads == "tma" else ()
    described = dict.fromkeys(tensors, f"tensordesc<{element}[1,1,{rows},{config.width}]>")
    return _built(program, values, described, element, config.arch, tile)


def scores_usage(arch: int, element: int, width: int, tokens: int) -> tuple[int, int]:
    """Bytes of local and of shared memory of the kernel of scores between blocks of `tokens`."""
    tile = configs.scores_tile(element, width, tokens, tokens)
    assert tile is not None
    values = {
        "TOKENS_Q": tokens, "TOKENS_K": tokens, "TILE_M": tile.m, "TILE_N": tile.n, "D": width, "PAD_D": width,
        "PEAK": False, "PRECISION": "tf32x3" if element == 4 else "tf32", "UPCAST": False,
    }  # fmt: skip
    compiled = _built(scores_kernel, values, {"OUT": "*fp32"}, {2: "bf16", 4: "fp32"}[element], arch, tile)
    numbers = _usage(compiled.asm["cubin"])
    return numbers["STACK"] + numbers["LOCAL"], compiled.metadata.shared


def _built(program: Any, values: dict[str, Any], types: dict[str, str], element: str, arch: int, tile: Tile) -> Any:
    """A kernel compiled for an architecture. values: of its constants.  types: of arguments that are not as named."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    hints: dict[tuple[int], Any] = {}
    for index, parameter in enumerate(program.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constants[(index,)] = "constexpr", values[name]
        else:
            signature[name] = types.get(name) or _type(name, element)
            if signature[name].startswith("*") or name.endswith(("_b", "_h", "_s")):
                hints[(index,)] = [["tt.divisibility", 16]]  # as the launcher says of aligned tensors
    return triton.compile(
        ASTSource(program, signature, constants, hints),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )


def _type(name: str, element: str) -> str:
    if name in TENSORS:
        return "*" + element
    if name in FLOATS:
        return "*fp32"
    if name.isupper():
        return "*i32"
    return "fp32" if name == "scale" else "i32"


def _usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL of compiled code."""
    return {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", _run("cuobjdump", cubin, "-res-usage"))}


def _run(tool: str, cubin: bytes, *options: str) -> str:
    """What a tool prints of compiled code."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return subprocess.run([_tool(tool), *options, str(file)], capture_output=True, text=True, check=True).stdout


@cache
def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def mma(config: Config) -> tuple[str, ...]:
    """Opcodes of the tensor cores' products. The newest take 64 rows: narrower tiles and some float32 get others."""
    newest = MMA[config.arch]
    if config.element == 2 and min(config.tile.m, config.tile.n) >= 64:
        return (newest,)
    return tuple(dict.fromkeys((newest, "HGMMA", "HMMA")))


def main_loop(assembly: str, products: tuple[str, ...]) -> Counter[str]:
    """Opcodes, with their modifiers, of the loop with most products: from a label to a branch back to it."""
    lines: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if label := re.match(r"^(\.L_[\w.]+):", line):
            labels[label[1]] = len(lines)
        elif found := re.match(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?\s*([\w.]+)(.*)", line):
            lines.append((found[1], found[2]))
    best: Counter[str] = Counter()
    for index, (opcode, rest) in enumerate(lines):
        if not opcode.startswith("BRA") or not (target := re.search(r"`\((\.L_[\w.]+)\)", rest)):
            continue
        start = labels.get(target[1], len(lines))
        if start <= index:
            loop = Counter(op for op, _ in lines[start : index + 1])
            if _matching(loop, products) > _matching(best, products) or (not best and loop):
                best = loop
    return best


def _matching(loop: Counter[str], prefixes: tuple[str, ...]) -> int:
    return sum(n for op, n in loop.items() if op.startswith(prefixes))


# -- reporting ------------------------------------------------------------------------------------------------


def gather(wanted: list[Config], jobs: int | None = None) -> dict[Config, Found]:
    """Inspect many, in processes."""
    with ProcessPoolExecutor(jobs) as pool:
        return dict(zip(wanted, pool.map(inspect, wanted, chunksize=4), strict=True))


def recorded(found: dict[Config, Found]) -> dict[str, Any]:
    """What a golden file holds: the numbers that a change of code or compiler may move."""
    rows = {
        c.name: {
            "registers": f.registers,
            "shared": f.shared,
            "mma": f.count(*mma(c)),
            "exp": f.count("MUFU.EX2"),
            "copies": f.count("LDGSTS", "UTMALDG"),
        }
        for c, f in found.items()
    }
    return {"triton": triton.__version__, "configurations": rows}


def moved(found: dict[Config, Found], golden: dict[str, Any]) -> list[str]:
    """Differences from a golden file: registers by more than 8, anything else at all."""
    said = []
    for name, now in recorded(found)["configurations"].items():
        before = golden["configurations"].get(name)
        if before is None:
            said.append(f"{name}: not recorded")
            continue
        for key, value in now.items():
            if abs(value - before[key]) > (8 if key == "registers" else 0):
                said.append(f"{name}: {key} {before[key]} -> {value}")
    return said


def table(found: dict[Config, Found], arch: int) -> str:
    """Markdown rows of one architecture."""
    head = ["kernel", "loads", "type", "D", "tile", "warps", "stages", "registers", "shared", "programs", "MMA", "exp2"]
    head += ["copies", "bound", "serial"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for c, f in found.items():
        if c.arch == arch:
            cells = [c.kernel, c.loads, {2: "bf16", 4: "fp32"}[c.element], c.width, f"{c.tile.m} x {c.tile.n}"]
            cells += [c.tile.warps, c.tile.stages, f.registers, f"{f.shared / 1024:.0f} KiB", f.programs]
            cells += [f.count(*mma(c)), f.count("MUFU.EX2"), f.count("LDGSTS", "UTMALDG")]
            cells += [f"{f.bound:.0%}", f"{f.serial:.0%}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """The command. Exit status 1 if a configuration has a problem."""
    known = {"readme", "golden"}
    given = dict(a.partition("=")[::2] for a in argv)
    if unknown := sorted(set(given) - known):
        raise UserError("evidence", f"must be given {' and '.join(sorted(known))} only", unknown, "See its docstring.")
    found = gather(list(shipped()))
    failures = [f"{c.name}: {p}" for c, f in found.items() for p in problems(c, f)]
    if "golden" in given:
        Path(given["golden"]).write_text(json.dumps(recorded(found), indent=1) + "\n")
    if "readme" in given:
        write_readme(found, Path(given["readme"]))
    for arch in configs.ARCHITECTURES:
        print(f"\nsm_{arch}\n{table(found, arch)}")
    natural, ours, longest = balance()
    print(f"\nadaptive mask, the slowest program's work over the mean: {natural:.2f} as its rows lie,")
    print(f"{ours:.2f} in the order they are started in, {longest:.2f} longest first over all heads")
    print("\n" + "\n".join(failures or [f"{len(found)} configurations, no problem"]))
    return 1 if failures else 0


def write_readme(found: dict[Config, Found], path: Path) -> None:
    """Replace what stands between the README's markers."""
    text = path.read_text()
    for arch in configs.ARCHITECTURES:
        text = _between(text, f"<!-- evidence sm_{arch} -->", table(found, arch), path)
    reasons = [f"| {name} | {reason} |" for name, reason in ACCEPTED.items()]
    accepted = "\n".join(["| configuration | why it is shipped |", "|---|---|", *reasons])
    path.write_text(_between(text, "<!-- evidence accepted -->", accepted, path))


def _between(text: str, begin: str, content: str, path: Path) -> str:
    """The text with `content` between a marker and the end after it."""
    head, found, rest = text.partition(begin)
    if not found or END not in rest:
        raise UserError("readme", f"must hold {begin} and {END}", path, "Name kernels/README.md.")
    return f"{head}{begin}\n{content}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
