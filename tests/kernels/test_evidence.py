"""The Triton kernels compiled and taken apart without a GPU."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from diffdistill.errors import UserError
from diffdistill.kernels.attention.triton_kernels import configs
from diffdistill.kernels.attention.triton_kernels.configs import Tile

triton = pytest.importorskip("triton", "3.4", reason="older Triton has no descriptors to compile with")
evidence = pytest.importorskip("diffdistill.kernels.attention.triton_kernels.evidence")
Config, Found = evidence.Config, evidence.Found

QUICK = [
    Config(arch, loads, 2, width, kernel, configs.TABLE[arch][loads, 2, width][kernel][0])
    for arch, loads, width, kernels in (
        (80, "pointers", 128, ("forward", "dq", "dkv")),
        (90, "tma", 128, configs.KERNELS),
        (90, "tma", 64, ("forward",)),
        (100, "tma", 128, ("forward", "dkv")),
    )
    for kernel in kernels
]


def found(**changes):
    values = {
        "registers": 100, "stack": 0, "shared": 1024, "programs": 2, "bound": 1.0, "serial": 1.0,
        "loop": {"HGMMA.64x64x16.F32.BF16": 8, "UTMALDG.4D": 2},
    }  # fmt: skip
    return Found(**(values | changes))


PLAIN = Config(90, "tma", 2, 128, "forward", Tile(64, 128, 4, 2))


@pytest.mark.parametrize("config", QUICK, ids=lambda c: c.name)
def test_compiled_code_has_tensor_cores_copies_and_no_spills(config):
    seen = evidence.inspect(config)
    assert evidence.problems(config, seen) == []
    golden = json.loads(evidence.GOLDEN.read_text())
    if golden["triton"] == triton.__version__:
        assert evidence.moved({config: seen}, golden) == []
    t = config.tile
    exponentials = seen.count("MUFU.EX2")
    assert exponentials >= t.m * t.n // (32 * t.warps)  # each of a tile's, by some thread
    if config.arch == 80 and config.kernel == "forward":  # one instruction of a warp is a 16 x 8 x 16 product
        assert seen.count("HMMA.16816") * t.warps * 4096 == 4 * t.m * t.n * config.width


def test_a_configuration_that_spills_is_found():
    config = Config(90, "tma", 2, 128, "dkv", Tile(128, 128, 4, 2))
    said = " ".join(evidence.problems(config, evidence.inspect(config)))
    assert "bytes of local memory" in said and "spills in the main loop" in said


@pytest.mark.slow
@pytest.mark.parametrize("features", ["", "masked"])
def test_every_shipped_configuration_is_clean(features):
    seen = evidence.gather(list(evidence.shipped(features=(features,))))
    said = [f"{c.name}: {p}" for c, f in seen.items() for p in evidence.problems(c, f)]
    if features:  # a bias and ragged ends may cost registers
        said = [p for p in said if "local memory" not in p and "spills" not in p]
    assert said == []


@pytest.mark.parametrize(
    ("element", "width", "tokens"), [(2, 128, 32), (2, 64, 1), (2, 128, 128), (2, 256, 64), (4, 64, 32)]
)
def test_scores_between_blocks_neither_spill_nor_outgrow_shared_memory(element, width, tokens):
    for arch in (86, 90):  # of the least shared memory, and of those that were at hand
        local, shared = evidence.scores_usage(arch, element, width, tokens)
        assert local == 0 and shared <= evidence.SHARED_LIMIT[arch] * 1024
    assert configs.scores_tile(4, 128, 32, 32) is None and configs.scores_tile(4, 64, 32, 64) is None


def test_each_problem_is_told():
    assert evidence.problems(PLAIN, found()) == []
    for changes, said in (
        ({"stack": 16}, "16 bytes of local memory"),
        ({"loop": {"HGMMA.x": 1, "UTMALDG.4D": 1, "STL.64": 2, "LDL": 1}}, "3 spills in the main loop"),
        ({"loop": {"HMMA.16816.F32.BF16": 8, "UTMALDG.4D": 2}}, "no HGMMA in the main loop"),
        ({"loop": {"HGMMA.x": 1}}, "no asynchronous copies in the main loop"),
        ({"loop": {"HGMMA.x": 1, "UTMALDG.4D": 1, "LDG.E.128": 1}}, "tiles are loaded synchronously"),
        ({"shared": 240 * 1024}, "245760 bytes of shared memory"),
        ({"programs": 0}, "no program fits a multiprocessor"),
    ):
        assert evidence.problems(PLAIN, found(**changes)) == [said]


def test_accepted_spills_are_of_shipped_configurations_and_have_a_reason():
    names = {c.name for c in evidence.shipped()}
    assert set(evidence.ACCEPTED) <= names
    assert all(len(reason) > 20 for reason in evidence.ACCEPTED.values())


def test_the_main_loop_is_the_one_with_most_products():
    assembly = """
.L_x_1:
        /*0010*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4] ;
        /*0020*/              @P0  BRA `(.L_x_1) ;
        /*0030*/                   STL [R1], R2 ;
.L_x_2:
        /*0040*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4] ;
        /*0050*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4] ;
        /*0060*/              @!P1 MUFU.EX2 R3, R4 ;
        /*0070*/              @P0  BRA `(.L_x_3) ;
        /*0080*/             @!UP2 BRA.U `(.L_x_2) ;
.L_x_3:
        /*0090*/                   EXIT ;
"""
    loop = evidence.main_loop(assembly, ("HGMMA",))
    assert loop == Counter({"HGMMA.64x64x16.F32": 2, "MUFU.EX2": 1, "BRA": 1, "BRA.U": 1})


def test_occupancy_is_the_scarcest_resource():
    assert evidence.occupancy(PLAIN, 128, 40 * 1024) == 4  # registers: 65536 / (128 * 128)
    assert evidence.occupancy(PLAIN, 121, 40 * 1024) == 4  # they come in eights
    assert evidence.occupancy(PLAIN, 64, 75 * 1024) == 3  # shared memory: 228 / 76
    assert evidence.occupancy(Config(90, "tma", 2, 64, "dq", Tile(64, 64, 8, 1)), 24, 1024) == 8  # 64 warps / 8


def test_the_roofline_is_that_of_the_scarcest_unit():
    products, exponentials, loads = 4 * 128 / 4096, 1 / 16, 2 * 128 * 2 / 64 / 64
    assert evidence.roofline(PLAIN) == (1.0, pytest.approx(products / (products + exponentials)))
    assert loads == products
    narrow = Config(90, "tma", 2, 64, "forward", Tile(32, 64, 4, 2))
    assert evidence.roofline(narrow)[0] == pytest.approx((4 * 64 / 4096) / (2 * 64 * 2 / 32 / 64))
    exact = Config(90, "tma", 4, 64, "forward", Tile(64, 64, 4, 2))
    assert evidence.roofline(exact)[0] == pytest.approx(1 / 6)


def test_longest_rows_first_balance_adaptive_lists():
    assert evidence.makespan([10] * 64, 16) == 1
    uneven = [1 + i * i // 16 for i in range(100)]
    assert 1 <= evidence.makespan(sorted(uneven, reverse=True), 16) < evidence.makespan(uneven, 16)
    assert evidence.makespan([8, 1, 1, 1, 1], 2) == 8 / 6  # no order helps one long row
    natural, ours, longest = evidence.balance()
    assert 1 <= longest <= ours < 1.1 < natural


def test_differences_from_the_golden_file_are_told():
    seen = {PLAIN: found()}
    golden = evidence.recorded(seen)
    assert evidence.moved(seen, golden) == []
    assert evidence.moved({PLAIN: found(registers=108)}, golden) == []
    assert evidence.moved({PLAIN: found(registers=109)}, golden) == [f"{PLAIN.name}: registers 100 -> 109"]
    assert evidence.moved({PLAIN: found(shared=2048)}, golden) == [f"{PLAIN.name}: shared 1024 -> 2048"]
    assert "not recorded" in evidence.moved(seen, {"configurations": {}})[0]


def test_the_readme_gets_its_tables(tmp_path):
    readme = tmp_path / "README.md"
    parts = [*(f"sm_{arch}" for arch in configs.ARCHITECTURES), "accepted"]
    readme.write_text("\n".join(f"<!-- evidence {part} -->\nold\n<!-- end -->" for part in parts) + "\nrest\n")
    evidence.write_readme({PLAIN: found()}, readme)
    text = readme.read_text()
    assert "old" not in text and text.endswith("rest\n") and text.count("<!-- end -->") == len(parts)
    assert "| forward | tma | bf16 | 128 | 64 x 128 | 4 | 2 | 100 | 1 KiB | 2 | 8 | 0 | 2 | 100% |" in text
    readme.write_text("nothing")
    with pytest.raises(UserError, match="readme must hold <!-- evidence sm_80 -->"):
        evidence.write_readme({}, readme)
    with pytest.raises(UserError, match="evidence must be given golden and readme only, got \\['out'\\]"):
        evidence.main(["out=x"])


def test_every_architecture_and_call_finds_a_tile():
    for arch in configs.ARCHITECTURES:
        for loads, element, width in configs.TABLE[arch]:
            for kernel in configs.KERNELS:
                for blocks in ((64, 64), (64, 128), (128, 64), (128, 128)):
                    tile = configs.tile(arch, loads, element, width, kernel, *blocks)
                    assert blocks[0] % tile.m == 0 and blocks[1] % tile.n == 0
        widths = {loads: {e: max(w for ld, s, w in configs.TABLE[arch] if (ld, s) == (loads, e)) for e in (2, 4)}
                  for loads, _, _ in configs.TABLE[arch]}  # fmt: skip
        assert all(w == {e: configs.widest(arch, e) for e in (2, 4)} for w in widths.values())
    capabilities = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
    assert list(map(configs.architecture, capabilities)) == [80, 86, 86, 90, 100, 86]
