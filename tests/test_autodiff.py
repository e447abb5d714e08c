"""Forward-mode derivatives against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diffdistill.autodiff import jvp


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_group_norm_in_any_memory_format(memory: torch.memory_format) -> None:
    """Scaling or shifting a group changes nothing; any other derivative is that of (x - mean) / std."""
    norm = nn.GroupNorm(2, 4, eps=0.0, affine=False).double()

    def by_hand(x: Tensor) -> Tensor:
        groups = x.reshape(len(x), 2, -1)
        centred = groups - groups.mean(-1, keepdim=True)
        return (centred / centred.square().mean(-1, keepdim=True).sqrt()).reshape(x.shape)

    x, v = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.contiguous(memory_format=memory)
    for along in (x, torch.ones_like(x)):
        assert jvp(norm, (x,), (along,))[1].abs().max() < 1e-12
    for got, wanted in zip(jvp(norm, (x,), (v,)), jvp(by_hand, (x,), (v,)), strict=True):
        torch.testing.assert_close(got, wanted)
