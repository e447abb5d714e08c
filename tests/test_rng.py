"""rng: the numbers of a sample depend on seed, step, phase, draw and global index, and on nothing else."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy import stats

from diffdistill.rng import _STREAM, Rng


def ids(rank, world, micro_batch, batch):
    """The global indices of one micro-batch on one process."""
    return (micro_batch * world + rank) * batch + np.arange(batch)


def draws(rng):
    """Some draws of every kind, one after the other."""
    batch = len(rng)
    return [
        rng.normal((batch, 3, 5)),
        rng.uniform((batch,)),
        rng.integers(1000, (batch, 2)),
        rng.normal((batch, 7), torch.float64),
        rng.fork("noise").normal((batch, 9)),
    ]


def run(world, accumulate, batch):
    """All draws of one step in the order of the global indices."""
    parts = [
        draws(Rng(3, 11, "student", ids(rank, world, micro_batch, batch)))
        for micro_batch in range(accumulate)
        for rank in range(world)
    ]
    return [torch.cat(kind) for kind in zip(*parts, strict=True)]


@pytest.mark.parametrize(("world", "accumulate", "batch"), [(2, 1, 12), (1, 2, 12), (2, 2, 6), (3, 4, 2)])
def test_values_are_equal_for_any_number_of_processes_and_any_accumulation(world, accumulate, batch):
    for got, wanted in zip(run(world, accumulate, batch), run(1, 1, 24), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (7,), (8,), (9,), (17,), (2, 3, 5), (1, 8, 8), (64,), (65,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_slice_of_the_batch_is_bit_equal_to_the_slice_of_the_whole(shape, dtype):
    whole_ids, part_ids = np.arange(13), np.arange(5, 9)
    for kind in ("normal", "uniform"):
        whole = getattr(Rng(0, 2, "p", whole_ids), kind)((13, *shape), dtype)
        part = getattr(Rng(0, 2, "p", part_ids), kind)((4, *shape), dtype)
        assert torch.equal(part, whole[5:9])
        assert whole.dtype == dtype
        assert whole.shape == (13, *shape)
    assert torch.equal(
        Rng(0, 2, "p", part_ids).integers(10**6, (4, *shape)),
        Rng(0, 2, "p", whole_ids).integers(10**6, (13, *shape))[5:9],
    )


def test_values_stay_the_same_from_one_version_to_the_next():
    # runs resume and figures repeat by these numbers; a sample owns whole blocks of 8 words
    eight = Rng(0, 0, "p", range(3)).integers(1000, (3, 8))
    nine = Rng(0, 0, "p", range(3)).integers(1000, (3, 9))
    assert eight[0].tolist() == [579, 592, 912, 251, 616, 556, 336, 438]
    assert eight[1].tolist() == [298, 410, 943, 998, 264, 839, 608, 50]
    assert nine[0].tolist() == [*eight[0].tolist(), 298]
    assert nine[1].tolist() == [*eight[2].tolist(), 5]


def test_scattered_indices_get_the_same_numbers_as_in_the_whole():
    chosen = np.array([11, 2, 3, 4, 0, 12])
    whole = Rng(0, 0, "p", np.arange(13)).normal((13, 5))
    assert torch.equal(Rng(0, 0, "p", chosen).normal((6, 5)), whole[chosen])


def test_an_empty_part_draws_an_empty_tensor():
    assert Rng(0, 0, "p", np.arange(0)).normal((0, 5)).shape == (0, 5)


def test_neighbouring_samples_share_no_numbers():
    values = Rng(0, 0, "p", np.arange(1000)).uniform((1000, 9), torch.float64)
    assert len(values.unique()) == values.numel()


@pytest.mark.parametrize(
    "other",
    [Rng(1, 0, "p", range(64)), Rng(0, 1, "p", range(64)), Rng(0, 0, "q", range(64)), Rng(0, 0, "p", range(64, 128))],
    ids=["seed", "step", "phase", "ids"],
)
def test_another_seed_step_phase_or_index_gives_other_values(other):
    a, b = Rng(0, 0, "p", range(64)).normal((64, 16)), other.normal((64, 16))
    assert not (a == b).any()
    assert abs(np.corrcoef(a.flatten(), b.flatten())[0, 1]) < 4 / 32


def test_each_draw_gives_new_values():
    rng = Rng(0, 0, "p", range(64))
    assert not (rng.normal((64, 16)) == rng.normal((64, 16))).any()


# -- take, fork, shared -------------------------------------------------------------------------------------------


def test_take_gives_the_chosen_samples_their_own_numbers():
    whole = Rng(0, 0, "p", range(8)).normal((8, 3))
    index = torch.tensor([6, 1])
    assert torch.equal(Rng(0, 0, "p", range(8)).take(index).normal((2, 3)), whole[index])
    assert torch.equal(Rng(0, 0, "p", range(8)).take(slice(2, 5)).normal((3, 3)), whole[2:5])
    assert torch.equal(Rng(0, 0, "p", range(8)).take(torch.arange(8) > 5).normal((2, 3)), whole[6:])


def test_take_and_its_source_advance_one_draw_counter():
    reference = Rng(0, 0, "p", range(8))
    first, second, third = (reference.normal((8, 3)) for _ in range(3))
    rng = Rng(0, 0, "p", range(8))
    part = rng.take(slice(0, 4))
    assert torch.equal(rng.normal((8, 3)), first)
    assert torch.equal(part.normal((4, 3)), second[:4])
    assert torch.equal(rng.normal((8, 3)), third)


def test_fork_is_a_stream_of_its_own_that_starts_at_draw_0():
    rng = Rng(0, 0, "p", range(64))
    before = rng.fork("a").normal((64, 16))
    rng.normal((64, 16))
    assert torch.equal(rng.fork("a").normal((64, 16)), before)
    others = [
        rng.fork("b").normal((64, 16)),
        Rng(0, 0, "p", range(64)).normal((64, 16)),
        rng.fork("a").fork("a").normal((64, 16)),
    ]
    for other in others:
        assert abs(np.corrcoef(before.flatten(), other.flatten())[0, 1]) < 4 / 32
        assert not (before == other).any()


def test_drawing_from_a_fork_leaves_the_source_where_it_was():
    rng, reference = Rng(0, 0, "p", range(8)), Rng(0, 0, "p", range(8))
    rng.fork("a").normal((8, 3))
    rng.shared().uniform((1,))
    assert torch.equal(rng.normal((8, 3)), reference.normal((8, 3)))


def test_shared_is_equal_on_all_ranks_and_in_all_micro_batches_and_advances():
    def lengths(rank, micro_batch):
        rng = Rng(0, 5, "p", ids(rank, 2, micro_batch, 4))
        rng.normal((4, rank + 1))  # what a rank draws of its own does not matter
        return [int(rng.shared().integers(10**6, (1,))) for _ in range(4)]

    reference = lengths(0, 0)
    assert len(set(reference)) == 4
    for rank, micro_batch in ((1, 0), (0, 1), (1, 3)):
        assert lengths(rank, micro_batch) == reference
    assert reference[0] != int(Rng(0, 6, "p", range(4)).shared().integers(10**6, (1,)))


def test_shared_of_a_part_goes_on_where_shared_of_the_whole_is():
    reference = Rng(0, 0, "p", range(8)).shared()
    first, second, third = (float(reference.uniform((1,))) for _ in range(3))
    rng = Rng(0, 0, "p", range(8))
    assert float(rng.shared().uniform((1,))) == first
    assert float(rng.take(slice(0, 4)).shared().uniform((1,))) == second
    assert float(rng.shared().uniform((1,))) == third


def test_shared_streams_of_forks_differ():
    rng = Rng(0, 0, "p", range(8))
    values = [float(r.shared().uniform((1,))) for r in (rng, rng.fork("a"), rng.fork("b"))]
    assert len(set(values)) == 3


# -- laws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normals_are_standard_normal(dtype):
    x = Rng(0, 0, "p", range(4000)).normal((4000, 25), dtype).double().flatten().numpy()
    assert abs(x.mean()) < 4 / np.sqrt(len(x))
    assert abs(x.var() - 1) < 4 * np.sqrt(2 / len(x))
    assert abs((x**3).mean()) < 4 * np.sqrt(15 / len(x))
    assert abs((x**4).mean() - 3) < 4 * np.sqrt(96 / len(x))
    assert stats.kstest(x, "norm").pvalue > 1e-3


def test_the_coordinates_of_a_sample_and_the_samples_are_uncorrelated():
    x = Rng(0, 0, "p", range(20_000)).normal((20_000, 6), torch.float64)
    correlation = x.T @ x / len(x) - torch.eye(6)
    assert correlation.abs().max() < 5 / np.sqrt(len(x)) * np.sqrt(2)
    assert abs((x[1:] * x[:-1]).mean()) < 4 / np.sqrt(x.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniforms_are_uniform_on_the_half_open_unit_interval(dtype):
    x = Rng(0, 0, "p", range(4000)).uniform((4000, 25), dtype)
    assert x.min() >= 0
    assert x.max() < 1
    assert stats.kstest(x.double().flatten().numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("high", [1, 2, 10, 1797])
def test_integers_are_uniform_below_high(high):
    x = Rng(0, 0, "p", range(4000)).integers(high, (4000, 25))
    assert x.dtype == torch.int64
    counts = torch.bincount(x.flatten(), minlength=high)
    assert len(counts) == high
    if high > 1:
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_float32_and_float64_draws_agree():
    for kind in ("normal", "uniform"):
        single = getattr(Rng(0, 0, "p", range(1000)), kind)((1000, 25), torch.float32)
        double = getattr(Rng(0, 0, "p", range(1000)), kind)((1000, 25), torch.float64)
        torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5)


def test_bfloat16_normals_are_the_rounded_float32_ones():
    single = Rng(0, 0, "p", range(8)).normal((8, 3))
    assert torch.equal(Rng(0, 0, "p", range(8)).normal((8, 3), torch.bfloat16), single.bfloat16())


def test_a_permutation_depends_on_seed_and_name_only():
    first = Rng(0, 3, "p", range(4)).permutation(50, "epoch 0")
    assert sorted(first) == list(range(50))
    assert (first == Rng(0, 9, "q", range(8)).permutation(50, "epoch 0")).all()
    assert (first != Rng(0, 3, "p", range(4)).permutation(50, "epoch 1")).any()
    assert (first != Rng(1, 3, "p", range(4)).permutation(50, "epoch 0")).any()


def test_the_dropout_seed_differs_between_steps_phases_and_micro_batches():
    rngs = [
        Rng(0, 0, "p", range(4)),
        Rng(0, 1, "p", range(4)),
        Rng(0, 0, "q", range(4)),
        Rng(0, 0, "p", range(4, 8)),
        Rng(1, 0, "p", range(4)),
    ]
    assert len({rng.torch_seed() for rng in rngs}) == 5
    assert Rng(0, 0, "p", range(4)).torch_seed() == rngs[0].torch_seed()
    assert all(0 <= rng.torch_seed() < 2**63 for rng in rngs)


def test_a_draw_of_another_batch_size_is_refused():
    with pytest.raises(ValueError, match=r"shape\[0\] == 4 samples, got \(5, 2\)"):
        Rng(0, 0, "p", range(4)).normal((5, 2))


@pytest.mark.parametrize("key", [0, 1, 2**64, 2**64 + 5, 2**128 - 1])
def test_the_stream_is_philox_s_from_any_block_on(key):
    for block, num in ((0, 4), (3, 8), (2**40, 1024)):
        wanted = np.random.Philox(key=key)
        wanted.advance(block)
        assert np.array_equal(_STREAM.raw(key, block, num), wanted.random_raw(num))


def test_threads_do_not_disturb_each_other():
    def many(seed):
        return [Rng(seed, step, "p", range(100)).normal((100, 3)) for step in range(200)]

    with ThreadPoolExecutor(4) as pool:
        for seed, found in enumerate(pool.map(many, range(4))):
            assert all(torch.equal(one, other) for one, other in zip(found, many(seed), strict=True))


def test_the_same_stream_on_another_device_begins_anew():
    rng = Rng(3, 2, "p", range(4, 9))
    first = rng.normal((5, 2))
    assert torch.equal(rng.on("cpu").normal((5, 2)), first)
    assert rng.on("meta").device.type == "meta"
