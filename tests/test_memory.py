"""memory: the peak of live tensor bytes on known sequences of allocations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffdistill.memory import PeakBytes, optimizer_tensors


def test_what_is_live_at_entry_counts_once_per_storage():
    a, b = torch.zeros(100), torch.zeros(50, dtype=torch.float64)
    assert PeakBytes([a, b, a, a.view(10, 10), a[3:]]).current == 400 + 400


def test_the_peak_is_the_largest_sum_of_live_storages():
    given = torch.zeros(1000)
    with PeakBytes([given]) as counter:
        a = torch.zeros(500)
        assert counter.current == 4000 + 2000
        b = a + 1
        assert counter.current == 4000 + 4000
        del a, b
        assert counter.current == 4000
        c = torch.empty(250, dtype=torch.float64)
        assert counter.current == 4000 + 2000
    assert counter.peak == 4000 + 4000
    del c


def test_views_and_in_place_results_add_nothing():
    with PeakBytes([]) as counter:
        a = torch.zeros(10, 10)
        views = [a.view(100), a[2:5], a.T, a.reshape(4, 25), a.detach(), a.expand(3, 10, 10)]
        a.add_(1)
        views[0].mul_(2)
        assert counter.current == counter.peak == 400
        del a
        assert counter.current == 400, "a view keeps its storage alive"
        del views
        assert counter.current == 0


def test_a_freed_storage_is_replaced_not_added():
    with PeakBytes([]) as counter:
        for _ in range(5):
            x = torch.zeros(1000)
            del x
    assert (counter.peak, counter.current) == (4000, 0)


def test_activations_kept_for_the_backward_pass_count_and_leave_after_it():
    layers = nn.Sequential(*[nn.Sigmoid() for _ in range(3)])
    x = torch.zeros(1000, requires_grad=True)
    with PeakBytes([x]) as counter:
        out = layers(x).sum()
        # the input, and the output of each sigmoid, which its derivative needs
        assert counter.current == 4 * 4000 + 4
        out.backward()
        del out
        assert counter.current == 2 * 4000, "the input and its gradient"
    assert counter.peak >= 4 * 4000 + 4
    with PeakBytes([x]) as lean, torch.no_grad():
        layers(x).sum()
    assert lean.peak == 3 * 4000, "two activations at a time"


@pytest.mark.parametrize(("make", "copies"), [(torch.optim.Adam, 2), (torch.optim.SGD, 0)])
def test_optimizer_tensors_are_its_moments(make, copies):
    weight = nn.Parameter(torch.ones(100))
    optimizer = make([weight], 0.1)
    assert optimizer_tensors([optimizer]) == []
    weight.grad = torch.ones(100)
    optimizer.step()
    moments = [tensor for tensor in optimizer_tensors([optimizer]) if tensor.numel() == 100]
    assert len(moments) == copies
